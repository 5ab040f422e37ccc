"""Plotly's colours, texts, sizes and fonts as matplotlib takes them."""

# ruff: noqa: TID253 (only export.py imports this package, and only when it draws)

from __future__ import annotations

import base64
import re
from functools import cache
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.colors import to_rgba

from interp.plotting.style import unescape

POINT = 0.72  # points per layout pixel at 100 dots per inch
DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
INK = "#444444"  # plotly's default for lines and text

_SANS = ("Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")
_MONOSPACE = ("DejaVu Sans Mono",)


def decoded(node: Any) -> Any:
    """A figure's dictionary with numpy arrays where plotly's JSON form holds base64 (`dtype`, `bdata`, `shape`)."""
    if isinstance(node, dict):
        if {"dtype", "bdata"} <= node.keys():
            flat = np.frombuffer(base64.b64decode(node["bdata"]), dtype=np.dtype(node["dtype"]).newbyteorder("<"))
            return flat.reshape([int(n) for n in str(node["shape"]).split(",")]) if "shape" in node else flat
        return {key: decoded(item) for key, item in node.items()}
    return [decoded(item) for item in node] if isinstance(node, (list, tuple)) else node


def plain(text: Any) -> str:
    """A plotly label as it reads: line breaks kept, other tags dropped, entities resolved."""
    return unescape(re.sub(r"</?(b|i|em|sub|sup|span|a)\b[^>]*>", "", re.sub(r"<br\s*/?>", "\n", str(text or ""))))


def colour(value: Any, opacity: float | int = 1) -> Any:
    """A plotly colour with its opacity, or None where there is none."""
    if not isinstance(value, str):
        return None
    numbers = re.fullmatch(r"rgba?\(([^)]*)\)", value.replace(" ", ""))
    if numbers:
        parts = [float(part) for part in numbers[1].split(",")]
        red, green, blue, alpha = *(part / 255 for part in parts[:3]), (parts[3] if len(parts) > 3 else 1.0)
    else:
        red, green, blue, alpha = to_rgba(value)
    return red, green, blue, alpha * opacity


def either(value: Any, default: Any) -> Any:
    """`value` unless plotly left it open."""
    return default if value is None else value


def is_many(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray))


def first(value: Any) -> Any:
    return value[0] if is_many(value) and len(value) else value


def edges(centres: np.ndarray) -> np.ndarray:
    """Borders of cells around these centres."""
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


@cache
def families(monospace: bool) -> list[str]:
    """Installed font families, best first; naming a missing one makes matplotlib log a line for every text."""
    known = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in (*(_MONOSPACE if monospace else ()), *_SANS) if name in known] or ["DejaVu Sans"]
