"""Loading models, checking what was loaded, and saying what it is. The names are loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "load_model": "interp.models.load",
    "list_models": "interp.models.embedded",
    "data_dir": "interp.models.embedded",
    "self_check": "interp.models.check",
    "CheckReport": "interp.models.report",
    "CheckRow": "interp.models.report",
    "Geometry": "interp.models.identity",
    "geometry": "interp.models.identity",
    "provenance": "interp.models.identity",
    "require_eval": "interp.models.identity",
}

__all__ = [
    "CheckReport", "CheckRow", "Geometry", "data_dir", "geometry", "list_models", "load_model", "provenance",
    "require_eval", "self_check",
]  # fmt: skip

if TYPE_CHECKING:
    from interp.models.check import self_check
    from interp.models.embedded import data_dir, list_models
    from interp.models.identity import Geometry, geometry, provenance, require_eval
    from interp.models.load import load_model
    from interp.models.report import CheckReport, CheckRow


def __getattr__(name: str) -> Any:
    if name not in _HOMES:  # listing the embedded models must not import torch, hence the indirection
        raise AttributeError(f"module 'interp.models' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
