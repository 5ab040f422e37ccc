"""Attention patterns as one self-contained HTML page: no network, no library, safe for any token."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from interp.plotting.heatmaps import heatmaps
from interp.plotting.style import ATTENTION, to_numpy, visible_token

MAX_PATTERN = 500_000
"""Most attention weights in one view, which makes a page of about 0.7 MB: 12 heads x 200 tokens."""

_PAGE = Path(__file__).with_name("attention_view.html")


@dataclass(frozen=True, eq=False, repr=False)
class AttentionView:
    """Attention patterns of some heads over one prompt; shows itself in a notebook.

    Attributes:
        pattern: `[head, dest, src]`, float32, 0 to 1: row `dest` says where that position attends.
        tokens: One per position, as given.
        labels: One per head, such as L9H6.
        title: Heading of the page.
        start: The head that is shown first.
    """

    pattern: np.ndarray
    tokens: tuple[str, ...]
    labels: tuple[str, ...]
    title: str
    start: int = 0

    def __repr__(self) -> str:
        return f"AttentionView({len(self.labels)} heads x {len(self.tokens)} tokens; {self.title!r})"

    def html(self) -> str:
        """The page. Weights are stored as whole numbers from 0 to 255, so they are shown within 0.002."""
        quantised = np.rint(np.clip(self.pattern, 0, 1) * 255).astype(np.uint8)
        n = len(self.tokens)
        causal = not np.triu(quantised, 1).any()  # half the size: the upper triangle is left out
        packed = quantised[(slice(None), *np.tril_indices(n))] if causal else quantised
        data = {
            "tokens": [visible_token(token) for token in self.tokens],
            "labels": self.labels,
            "start": self.start,
            "colours": ATTENTION,
            "causal": bool(causal),
            "pattern": base64.b64encode(packed.tobytes()).decode(),
        }
        # Inside <script>, only these characters could end the element or start markup.
        text = json.dumps(data).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
        page = _PAGE.read_text(encoding="utf-8")
        return page.replace("{{data}}", text).replace("{{title}}", html.escape(self.title))

    def _repr_html_(self) -> str:
        """The page inside a frame of its own, so that several views in one notebook cannot disturb each other."""
        rows = -(-len(self.labels) // 10)
        cell = max(2, min(22, 470 // len(self.tokens)))  # as in the page
        height = min(90 + rows * 104 + max(330, 140 + cell * len(self.tokens)), 1100)
        return (
            f'<iframe title="{html.escape(self.title)}" sandbox="allow-scripts" loading="lazy" '
            f'style="width:100%;height:{height}px;border:0" srcdoc="{html.escape(self.html())}"></iframe>'
        )

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.html(), encoding="utf-8")
        return target

    def figure(self, heads: Sequence[int] | None = None, *, columns: int = 4) -> go.Figure:
        """The patterns as static heat maps (first position at the top), for papers and pages without JavaScript.

        Args:
            heads: Places in `labels`; all by default.
            columns: Panels per row.
        """
        chosen = range(len(self.labels)) if heads is None else heads
        wrong = [head for head in chosen if not 0 <= head < len(self.labels)]
        if wrong:
            raise ValueError(f"heads {wrong} do not exist; this view has places 0 to {len(self.labels) - 1}")
        n = len(self.tokens)
        along = {"dest": xr.Variable("dest", np.arange(n)), "src": xr.Variable("src", np.arange(n))}
        return heatmaps(
            {
                self.labels[head]: xr.DataArray(self.pattern[head], dims=("dest", "src"), coords=along)
                for head in chosen
            },
            title=self.title,
            unit="attention weight",
            tokens=self.tokens,
            signed=False,
            origin="top",
            limit=1.0,
            colours=ATTENTION,
            columns=columns,
            square=True,
        )


def attention_view(
    pattern: Any,
    tokens: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    title: str = "Attention patterns",
    start: int = 0,
) -> AttentionView:
    """An interactive view of attention patterns: a thumbnail per head, the chosen head large, tokens to hover over.

    12 heads x 30 tokens make about 20 kB. `save_html(path)` writes the page, `figure()` draws static heat maps, and a
    notebook shows the view by itself.

    Args:
        pattern: `[head, dest, src]` as array, tensor or DataArray (in any order of these dimensions; a dimension
            `layer` beside `head` is allowed and gives labels such as L9H6). Rows need not sum to one.
        tokens: One per position. Spaces are made visible; markup in a token is shown, not obeyed.
        labels: One per head; by default from the coordinates, or H0, H1, ...
        start: Place of the head to show first.

    Raises:
        ValueError: If the shape does not fit the tokens, a weight is NaN or outside 0 to 1, or there are more than
            `MAX_PATTERN` weights.
    """
    heads, named = _heads(pattern)
    n = len(tokens)
    if heads.ndim != 3 or heads.shape[1:] != (n, n) or not len(heads):
        raise ValueError(
            f"pattern has shape {heads.shape} but {n} tokens need [head, {n}, {n}]; select one example, for example "
            "pattern[0], and pass as many tokens as positions"
        )
    if heads.size > MAX_PATTERN:
        raise ValueError(
            f"{len(heads)} heads x {n} x {n} = {heads.size} weights are more than a view may hold ({MAX_PATTERN}); "
            "select heads or positions first"
        )
    outside = ~((heads >= -1e-4) & (heads <= 1 + 1e-4))  # also true for NaN
    if outside.any():
        head, dest, src = np.argwhere(outside)[0]
        raise ValueError(
            f"pattern[{head}, {dest}, {src}] = {heads[head, dest, src]:g} is not a weight from 0 to 1; pass the "
            "pattern after softmax, or use heatmaps() for scores and differences"
        )
    names = [str(label) for label in labels] if labels is not None else named
    if len(names) != len(heads):
        raise ValueError(f"got {len(names)} labels for {len(heads)} heads; give one per head")
    if not 0 <= start < len(heads):
        raise ValueError(f"start={start} is not the place of one of the {len(heads)} heads")
    return AttentionView(heads, tuple(str(token) for token in tokens), tuple(names), title, start)


def _heads(pattern: Any) -> tuple[np.ndarray, list[str]]:
    """Patterns `[head, dest, src]` and a label per head."""
    if not isinstance(pattern, xr.DataArray):
        array = to_numpy(pattern).astype(np.float32)
        return array, [f"H{i}" for i in range(len(array))] if array.ndim else []
    dims = [dim for dim in ("layer", "head") if dim in pattern.dims]
    if set(pattern.dims) != {*dims, "dest", "src"}:
        raise ValueError(
            f"pattern has dimensions {dict(pattern.sizes)} but a view needs head, dest and src (and layer, if you like)"
            "; select one example, for example pattern.isel(example=0)"
        )
    stacked = pattern.transpose(*dims, "dest", "src")
    labels = [""]
    for dim in ("layer", "head"):  # a coordinate left over from selecting one layer or head names it too
        if dim in dims or dim in pattern.coords:
            entries = np.atleast_1d(pattern.coords[dim].values) if dim in pattern.coords else range(pattern.sizes[dim])
            labels = [f"{label}{dim[0].upper()}{entry}" for label in labels for entry in entries]
    return stacked.values.astype(np.float32).reshape(-1, *stacked.shape[-2:]), labels
