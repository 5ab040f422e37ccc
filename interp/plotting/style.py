"""What every figure shares: colours, one layout function, and labels that survive plotly's markup.

Plotly reads `<b>`, `&amp;` and `$x$` inside labels as markup, so a raw `<bos>` token silently disappears from an axis.
Every label made from data therefore goes through `escape`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

ROLE_COLOURS: dict[str, str] = {
    "clean": "#0072B2",
    "corrupted": "#D55E00",
    "denoise": "#009E73",
    "noise": "#CC79A7",
    "exact": "#0072B2",
    "approximation": "#E69F00",
    "answer": "#0072B2",
    "foil": "#D55E00",
    "control": "#7F7F7F",
    "random": "#7F7F7F",
    "baseline": "#333333",
}
"""One colour per role in every figure (Okabe and Ito's palette, safe for the common kinds of colour blindness)."""

PALETTE: tuple[str, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#333333")
"""Colours for series that have no role, in order of use."""

# ColorBrewer's RdBu: red is negative, blue is positive, and the middle is nearly white.
DIVERGING: tuple[str, ...] = (
    "#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7",
    "#f7f7f7", "#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061",
)  # fmt: skip
# Viridis and not cividis, whose middle is the grey that marks unmeasured cells.
SEQUENTIAL: tuple[str, ...] = (
    "#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725",
)  # fmt: skip
ATTENTION: tuple[str, ...] = ("#ffffff", "#deebf7", "#9ecae1", "#4292c6", "#08519c", "#08306b")
UNMEASURED = "#a6a6a6"

MAX_CELLS = 40_000
"""Most cells in one heat map figure: about half a megabyte in a notebook."""
MAX_POINTS = 20_000
"""Most points in one line, bar or strip figure."""

FONT = "Helvetica, Arial, DejaVu Sans, sans-serif"
MONOSPACE = "DejaVu Sans Mono, Menlo, Consolas, monospace"
FONT_SIZE = 13

_SPECIAL = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽", "▁": "␣"}
_MARKUP = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;"}
_MAX_LABEL = 28


def visible_token(token: str) -> str:
    """The token as a reader should see it: spaces as `␣`, newlines as `↵`, tabs as `⇥`, control characters as `\\x..`.

    The word-start markers of byte-level (`Ġ`, `Ċ`) and SentencePiece (`▁`) vocabularies are shown the same way. An
    empty token is shown as `""`. No markup is escaped here (see `escape`).
    """
    if token == "":
        return '""'
    if token[0] == "Ġ":
        token = " " + token[1:]
    token = token.replace("Ċ", "\n")
    seen = "".join(_SPECIAL.get(c, c) for c in token)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in seen)


def token_labels(tokens: Sequence[str], positions: Sequence[int] | None = None) -> list[str]:
    """One unique label per position: the visible token, with `[position]` behind it where the token occurs twice.

    `positions` are the numbers to show (0, 1, ... by default). Tokens longer than 28 characters are cut with `…`.
    """
    seen = [_shorten(visible_token(str(token))) for token in tokens]
    positions = range(len(seen)) if positions is None else positions
    if len(positions) != len(seen):
        raise ValueError(f"token_labels got {len(seen)} tokens but {len(positions)} positions; give one per token")
    counts = Counter(seen)
    return [f"{s} [{p}]" if counts[s] > 1 else s for s, p in zip(seen, positions, strict=True)]


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_LABEL else text[: _MAX_LABEL - 1] + "…"


def escape(text: str) -> str:
    """Text for plotly to show literally: `<bos>`, `&` and `$x$` would otherwise be read as markup."""
    return "".join(_MARKUP.get(c, c) for c in text)


def unescape(text: str) -> str:
    """The text that plotly shows for a label made by `escape`."""
    for character, entity in reversed(_MARKUP.items()):
        text = text.replace(entity, character)
    return text


def colour_scale(colours: Sequence[str]) -> list[tuple[float, str]]:
    """Evenly spaced plotly colour scale."""
    return [(i / (len(colours) - 1), colour) for i, colour in enumerate(colours)]


def series_colours(names: Sequence[str]) -> list[str]:
    """One colour per name: that of its role if it is one, otherwise the next of the palette that no role has taken."""
    taken = {ROLE_COLOURS[name] for name in names if name in ROLE_COLOURS}
    free = [colour for colour in PALETTE if colour not in taken] or list(PALETTE)
    rest = iter(range(len(names)))
    return [ROLE_COLOURS.get(name) or free[next(rest) % len(free)] for name in names]


def apply_layout(figure: go.Figure, *, title: str, width: int, height: int, margin: dict[str, int]) -> go.Figure:
    """Give one figure the house style; plotly's global template is neither read nor changed."""
    figure.layout.template = go.layout.Template()  # assigned, not updated: the session's default is already in there
    figure.update_layout(
        title={"text": escape(title), "x": 0, "xref": "container", "xanchor": "left", "pad": {"l": 16},
               "font": {"size": FONT_SIZE + 3}},
        font={"family": FONT, "size": FONT_SIZE, "color": "#222222"},
        paper_bgcolor="white",
        plot_bgcolor="white",
        width=width,
        height=height,
        margin=margin,
        hoverlabel={"font": {"family": MONOSPACE}},
    )  # fmt: skip
    return figure


def axis_style(title: str, **options: Any) -> dict[str, Any]:
    """A plain axis with light grid lines; `options` are plotly's own."""
    return {
        "title": {"text": escape(title), "standoff": 8, "font": {"size": FONT_SIZE}},
        "gridcolor": "#e8e8e8",
        "zeroline": True,
        "zerolinecolor": "#9a9a9a",
        "zerolinewidth": 1,
        "showline": True,
        "linecolor": "#555555",
        "ticks": "outside",
        "ticklen": 3,
        "tickcolor": "#888888",
        "automargin": True,
    } | options


def to_numpy(values: Any) -> np.ndarray:
    """Any array (numpy, tensor on any device, DataArray, Series, list) as numpy on the CPU."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) in ("torch.bfloat16", "torch.float16"):
            values = values.float()
    return np.asarray(values)
