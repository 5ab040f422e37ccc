"""Running text whose tokens are coloured by a value each."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from interp.plotting.heatmaps import heatmap
from interp.plotting.style import (
    ATTENTION,
    DIVERGING,
    FONT_SIZE,
    MAX_POINTS,
    MONOSPACE,
    escape,
    to_numpy,
    visible_token,
)

MAX_FIGURE_TOKENS = 2_000
"""Most tokens in the figure of a coloured text, where each is a note of its own."""


@dataclass(frozen=True, eq=False, repr=False)
class ColouredText:
    """Lines of tokens with a value each; shows itself in a notebook as coloured text.

    Pages that strip styles (GitHub) keep the words, with marked tokens in bold; `figure()` keeps the colours too, as an
    image. `str()` gives plain text.

    Attributes:
        lines: Tokens of every line.
        values: Their values, NaN where there is none.
        marks: Place of the token that a line is about, or None.
        labels: Heading of every line, empty for none.
        limit: The value at the end of the colour scale.
        signed: Whether colours run from red (-limit) over white to blue (limit), or from white to blue.
        glue: What stands between tokens.
    """

    lines: tuple[tuple[str, ...], ...]
    values: tuple[np.ndarray, ...]
    marks: tuple[int | None, ...]
    labels: tuple[str, ...]
    title: str
    unit: str
    limit: float
    signed: bool
    glue: str

    def __repr__(self) -> str:
        return f"ColouredText({len(self.lines)} lines, {sum(map(len, self.lines))} tokens; {self.title!r})"

    def __str__(self) -> str:
        """Plain text: the marked token in double brackets, else the tokens above half the limit in single ones."""
        out = [self.title] if self.title else []
        width = max(map(len, self.labels))
        for tokens, values, mark, label in zip(self.lines, self.values, self.marks, self.labels, strict=True):
            words = []
            for place, (token, value) in enumerate(zip(tokens, values, strict=True)):
                strong = mark is None and abs(value) > 0.5 * self.limit
                ends = ("[[", "]]") if place == mark else ("[", "]") if strong else ("", "")
                body = _shown(token)
                lead = body[: len(body) - len(body.lstrip(" "))]  # the bracket goes behind a token's own space
                words.append(f"{lead}{ends[0]}{body[len(lead) :]}{ends[1]}")
            out.append((f"{label:>{width}}  " if width else "") + self.glue.join(words))
        return "\n".join(out)

    def html(self) -> str:
        """The text as one `<div>` with inline styles: no script, no style sheet, no frame; every token is escaped."""
        out = [
            # MathJax would read dollar signs in the text as formulas
            '<div class="tex2jax_ignore mathjax_ignore" style="font-family:sans-serif;line-height:1.7;color:#222;'
            'background:#fff;padding:6px 10px">'
        ]
        if self.title:
            out.append(f"<p><b>{html.escape(self.title)}</b> <small>{html.escape(self._legend())}</small></p>")
        glue = html.escape(self.glue)
        for tokens, values, mark, label in zip(self.lines, self.values, self.marks, self.labels, strict=True):
            spans = [self._span(token, float(value), place == mark) for place, (token, value) in
                     enumerate(zip(tokens, values, strict=True))]  # fmt: skip
            head = f'<small style="color:#666">{html.escape(label)}</small> ' if label else ""
            out.append(f'<p style="margin:2px 0;white-space:pre-wrap">{head}{glue.join(spans)}</p>')
        return "\n".join([*out, "</div>"])

    def _repr_html_(self) -> str:
        return self.html()

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that holds only the text."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        head = f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
        target.write_text(f"{head}</head><body>{self.html()}</body></html>\n", encoding="utf-8")
        return target

    def figure(self) -> go.Figure:
        """The lines as rows of a heat map with the tokens written in; marked tokens stand below each other.

        Raises:
            ValueError: If there are more than `MAX_FIGURE_TOKENS`.
        """
        total = sum(map(len, self.lines))
        if total > MAX_FIGURE_TOKENS:
            raise ValueError(f"{total} tokens are more than a figure may hold ({MAX_FIGURE_TOKENS}); show fewer lines")
        before = [mark or 0 for mark in self.marks]
        start = max(before)
        columns = start + max(len(line) - left for line, left in zip(self.lines, before, strict=True))
        grid = np.full((len(self.lines), columns), np.nan, dtype=np.float32)
        for row, (values, left) in enumerate(zip(self.values, before, strict=True)):
            grid[row, start - left : start - left + len(values)] = values
        aligned = any(mark is not None for mark in self.marks)
        x = np.arange(columns) - (start if aligned else 0)
        names = [label or str(row) for row, label in enumerate(self.labels)]
        figure = heatmap(
            xr.DataArray(grid, dims=("context", "pos"), coords={"pos": x}),
            title=self.title, unit=self.unit, y_labels=names, signed=self.signed, origin="top", limit=self.limit,
            colours=DIVERGING if self.signed else ATTENTION,
        )  # fmt: skip
        longest = 1  # below, y is a row's number: labels such as 12.5 would be read as places on the axis
        for row, (tokens, left) in enumerate(zip(self.lines, before, strict=True)):
            for place, token in enumerate(tokens):
                shown = _shorten(visible_token(token))
                longest = max(longest, len(shown))
                value = float(self.values[row][place])
                marked = self.marks[row] == place
                figure.add_annotation(
                    x=int(x[start - left + place]), y=row, xref="x", yref="y", showarrow=False,
                    text=f"<b>{escape(shown)}</b>" if marked else escape(shown),
                    font={"size": FONT_SIZE - 3, "family": MONOSPACE, "color": self._ink(value)},
                )  # fmt: skip
        margin: Any = figure.layout.margin  # type: ignore[union-attr]
        cell = 7 * min(longest, 14) + 10
        figure.update_layout(
            width=margin.l + margin.r + max(cell * columns, 240), height=margin.t + margin.b + 24 * len(self.lines) + 8
        )
        return figure

    def _legend(self) -> str:
        low = f"{-self.limit:.3g} red, " if self.signed else ""
        return f"{self.unit}: {low}0 white, {self.limit:.3g} blue"

    def _colour(self, value: float) -> str:
        scale = DIVERGING if self.signed else ATTENTION
        share = min(max(value / self.limit, -1.0 if self.signed else 0.0), 1.0)
        place = ((share + 1) / 2 if self.signed else share) * (len(scale) - 1)
        low = min(int(place), len(scale) - 2)
        ends = [[int(scale[low + i][j : j + 2], 16) for j in (1, 3, 5)] for i in (0, 1)]
        mixed = [round(a + (b - a) * (place - low)) for a, b in zip(*ends, strict=True)]
        return f"#{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"

    def _ink(self, value: float) -> str:
        """Dark or white text, whichever is read better on the token's colour."""
        if np.isnan(value):
            return "#222222"
        red, green, blue = (int(self._colour(value)[i : i + 2], 16) for i in (1, 3, 5))
        return "#222222" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"

    def _span(self, token: str, value: float, marked: bool) -> str:
        text = html.escape(_shown(token))
        text = f"<b>{text}</b>" if marked else text
        if np.isnan(value):
            return f"<span>{text}</span>"
        style = f"background:{self._colour(value)};color:{self._ink(value)};border-radius:3px"
        style += ";outline:1px solid #222" if marked else ""
        return f'<span title="{value:.4g}" style="{style}">{text}</span>'


def coloured_text(
    tokens: Sequence[str] | Sequence[Sequence[str]],
    values: Any,
    *,
    marks: Sequence[int | None] | None = None,
    labels: Sequence[str] | None = None,
    title: str = "",
    unit: str = "value",
    signed: bool | None = None,
    limit: float | int | None = None,
    glue: str = "",
) -> ColouredText:
    """Text whose tokens are coloured by their values: blue for positive, red for negative, white for zero.

    Args:
        tokens: One text, or several lines of tokens. Tokens are shown as they are; line breaks and control characters
            are made visible, and markup in a token is shown, not obeyed.
        values: One number per token, in the same nesting. NaN leaves a token uncoloured.
        marks: For every line the place of the token that it is about: bold, and aligned in `figure()`.
        labels: A heading for every line.
        signed: Whether the scale has two sides; by default if a value is negative. Without it values below 0 are white.
        limit: Value of the strongest colour; the largest magnitude by default, over all lines. Values beyond it get the
            end colours.
        glue: What stands between tokens: `" "` for tokens that carry no spaces of their own.

    Raises:
        ValueError: If lengths do not fit, a value is infinite, there is no token, or there are more than `MAX_POINTS`.
    """
    if isinstance(tokens, str):
        raise ValueError(f"tokens is the string {tokens[:40]!r}; expected a list of tokens")
    single = len(tokens) > 0 and all(isinstance(token, str) for token in tokens)
    lines = [tuple(map(str, line)) for line in ([tokens] if single else tokens)]
    numbers = [to_numpy(line).astype(np.float32) for line in ([values] if single else values)]
    if not lines or not all(lines):
        raise ValueError(f"there is no text: {len(lines)} lines, of {[len(line) for line in lines]} tokens")
    if [(len(line),) for line in lines] != [line.shape for line in numbers]:
        raise ValueError(
            f"lines of {[len(line) for line in lines]} tokens have values of shapes {[v.shape for v in numbers]}; "
            "give one number per token"
        )
    if sum(map(len, lines)) > MAX_POINTS:
        raise ValueError(f"{sum(map(len, lines))} tokens are more than a text may hold ({MAX_POINTS}); show a part")
    everything = np.concatenate(numbers)
    if np.isinf(everything).any():
        raise ValueError(f"value {int(np.isinf(everything).argmax())} is infinite; use NaN for no value")
    places = tuple(marks) if marks is not None else (None,) * len(lines)
    heads = tuple(map(str, labels)) if labels is not None else ("",) * len(lines)
    for name, given in (("marks", places), ("labels", heads)):
        if len(given) != len(lines):
            raise ValueError(f"got {len(given)} {name} for {len(lines)} lines; give one per line")
    for line, mark in zip(lines, places, strict=True):
        if mark is not None and not 0 <= mark < len(line):
            raise ValueError(f"mark {mark} is not a place in a line of {len(line)} tokens")
    known = everything[~np.isnan(everything)]
    if limit is None:
        limit = float(np.abs(known).max(initial=0)) or 1.0
    if not 0 < limit < np.inf:
        raise ValueError(f"limit={limit}; expected a positive number, the value of the strongest colour")
    two_sided = bool((known < 0).any()) if signed is None else signed
    return ColouredText(tuple(lines), tuple(numbers), places, heads, title, unit, float(limit), two_sided, glue)


def _shown(token: str) -> str:
    return visible_token(token).replace("␣", " ")


def _shorten(text: str, most: int = 14) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
