"""A workbench for mechanistic interpretability of transformer language models.

Names are loaded on first use (PEP 562), so that `import interp` costs milliseconds and imports neither torch nor
TransformerLens. See `help(interp.load_model)` and the README for a tour.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp import (
        attention,
        cache,
        dictionaries,
        hooks,
        metrics,
        models,
        neurons,
        notebook,
        patching,
        plotting,
        prompts,
        results,
        stats,
        studies,
        tinyworld,
        types,
    )
    from interp.models import list_models, load_model, self_check

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "attention",
    "cache",
    "dictionaries",
    "hooks",
    "list_models",
    "load_model",
    "metrics",
    "models",
    "neurons",
    "notebook",
    "patching",
    "plotting",
    "prompts",
    "results",
    "self_check",
    "stats",
    "studies",
    "tinyworld",
    "types",
]

_FUNCTIONS = ("list_models", "load_model", "self_check")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'interp' has no attribute {name!r}; it has {', '.join(__all__)}")
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module("interp.models"), name)
    else:
        value = importlib.import_module(f"interp.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
