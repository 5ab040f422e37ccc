"""Activations in memory (`capture`), on disk (`harvest`, planned by `estimate`) and back (`ActivationStore`).

The names are loaded on first use: reading a store takes neither a model nor TransformerLens.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "ActivationStore": "interp.cache.store",
    "Column": "interp.cache.store",
    "Estimate": "interp.cache.estimating",
    "StoreError": "interp.cache._manifest",
    "VerifyReport": "interp.cache.store",
    "capture": "interp.cache.capturing",
    "estimate": "interp.cache.estimating",
    "harvest": "interp.cache.harvesting",
}

__all__ = ["ActivationStore", "Column", "Estimate", "StoreError", "VerifyReport", "capture", "estimate", "harvest"]

if TYPE_CHECKING:
    from interp.cache._manifest import StoreError
    from interp.cache.capturing import capture
    from interp.cache.estimating import Estimate, estimate
    from interp.cache.harvesting import harvest
    from interp.cache.store import ActivationStore, Column, VerifyReport


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'interp.cache' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
