"""Heat maps laid out in a grid: geometry in pixels, one colour scale, unmeasured cells, hover text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from interp.plotting.style import (
    DIVERGING,
    FONT_SIZE,
    MAX_CELLS,
    MONOSPACE,
    SEQUENTIAL,
    UNMEASURED,
    apply_layout,
    colour_scale,
    escape,
)

_TITLE, _NAME = 54, 22  # pixels above the grid, and for the name of each panel
_GAP = 16  # between panels that share axes


@dataclass(frozen=True)
class Axis:
    """One axis of a panel: what the trace holds (integers, or unique escaped labels) and the title."""

    values: list[Any]
    title: str
    category: bool
    monospace: bool = False

    @property
    def label_length(self) -> int:
        return max(len(str(v)) for v in self.values)

    def rotated(self, width: int) -> bool:
        """Whether the labels are too long to stand side by side on this many pixels."""
        return self.category and 8.5 * (self.label_length + 1) > width / len(self.values)


@dataclass(frozen=True)
class Panel:
    """Values `[row, column]`, the two axes, and further arrays of the same shape to show when hovering."""

    values: np.ndarray
    x: Axis
    y: Axis
    hover: dict[str, np.ndarray]


def draw_grid(
    panels: dict[str, Panel],
    *,
    title: str,
    unit: str,
    signed: bool,
    origin: str = "bottom",
    limit: float | int | None = None,
    colours: Sequence[str] | None = None,
    columns: int = 1,
    square: bool = False,
) -> go.Figure:
    """The figure; see `heatmaps` for the arguments."""
    if origin not in ("bottom", "top"):
        raise ValueError(f"origin must be 'bottom' or 'top', got {origin!r}")
    _check_size(panels)
    low, high = _range(panels, signed, limit)
    count, rows = len(panels), math.ceil(len(panels) / columns)
    width, height = _panel_size(panels, columns, square)
    axes = next(iter(panels.values()))
    shared = count > 1 and all(p.x == axes.x and p.y == axes.y for p in panels.values())
    below = 54 + max(_label_room(p.x, width) for p in panels.values())
    left = 60 + max(8 * p.y.label_length if p.y.category else 10 for p in panels.values())
    name_room = _NAME if any(panels) else 0
    step_x = width + (_GAP if shared else left + 6)
    step_y = height + name_room + (_GAP if shared else below)
    plot_width, plot_height = (columns - 1) * step_x + width, (rows - 1) * step_y + height

    figure = go.Figure()
    for i, (name, panel) in enumerate(panels.items()):
        row, column = divmod(i, columns)
        start, top = column * step_x / plot_width, 1 - row * step_y / plot_height
        suffix = "" if i == 0 else str(i + 1)
        figure.add_traces(_traces(panel, f"x{suffix}", f"y{suffix}", unit))
        x_axis = _axis_layout(panel.x, f"y{suffix}", width, [start, min(1.0, start + width / plot_width)])
        y_axis = _axis_layout(panel.y, f"x{suffix}", height, [max(0.0, top - height / plot_height), top], vertical=True)
        if origin == "top":
            y_axis["autorange"] = "reversed"
        if shared and i + columns < count:
            x_axis |= {"showticklabels": False, "title": None}
        if shared and column:
            y_axis |= {"showticklabels": False, "title": None}
        figure.update_layout({f"xaxis{suffix}": x_axis, f"yaxis{suffix}": y_axis})
        if name:
            _note(figure, name, start + width / plot_width / 2, top, "center", "bottom", size=FONT_SIZE)
    missing = any(np.isnan(p.values).any() for p in panels.values())
    if missing:
        _note(figure, "grey: not measured", 1.0, 0.0, "left", "top", size=FONT_SIZE - 3, colour="#666666", shift=16)
    figure.update_layout(
        coloraxis=_colour_axis(unit, low, high, colours or (DIVERGING if signed else SEQUENTIAL), plot_height)
    )
    margin = {"l": left, "r": 124 if missing else 104, "t": _TITLE + name_room, "b": below}
    size = (plot_width + margin["l"] + margin["r"], plot_height + margin["t"] + margin["b"])
    return apply_layout(figure, title=title, width=size[0], height=size[1], margin=margin)


def _check_size(panels: dict[str, Panel]) -> None:
    cells = sum(p.values.size for p in panels.values())
    if cells > MAX_CELLS:
        shapes = ", ".join("x".join(map(str, p.values.shape)) for p in panels.values())
        raise ValueError(
            f"{cells} cells ({shapes}) are more than a figure may hold ({MAX_CELLS}); select a part, or average blocks "
            'first, for example values.coarsen(pos=8, boundary="pad").mean()'
        )


def _range(panels: dict[str, Panel], signed: bool, limit: float | int | None) -> tuple[float, float]:
    finite = np.concatenate([p.values[np.isfinite(p.values)] for p in panels.values()])
    if finite.size == 0:
        raise ValueError("every cell is NaN: nothing was measured, so there is nothing to draw")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    limit = None if limit is None else float(limit)
    if signed:
        high = limit or float(np.abs(finite).max()) or 1.0
        return -high, high
    low, high = min(0.0, float(finite.min())), float(finite.max())
    return low, limit or (high if high > low else low + 1.0)


def _panel_size(panels: dict[str, Panel], columns: int, square: bool) -> tuple[int, int]:
    rows, across = (max(p.values.shape[axis] for p in panels.values()) for axis in (0, 1))
    widest = 880 if columns == 1 else max(1180 // columns, 180)
    if square:
        side = min(max(24 * max(rows, across), 150), widest, 620 if columns == 1 else 300)
        return side, side
    return min(max(34 * across, 180), widest), min(max(26 * rows, 150), 620)


def _traces(panel: Panel, xaxis: str, yaxis: str, unit: str) -> list[go.Heatmap]:
    where = f"{_hover_name(panel.y)}: %{{y}}<br>{_hover_name(panel.x)}: %{{x}}"
    if (panel.y.title, panel.x.title) == ("Layer", "Head"):
        where = "L%{y}H%{x}"
    text = [where, f"%{{z:.4g}} {escape(unit)}"]
    text += [f"{escape(key)}: %{{customdata[{i}]:.4g}}" for i, key in enumerate(panel.hover)]
    shared = {"x": panel.x.values, "y": panel.y.values, "xaxis": xaxis, "yaxis": yaxis, "hoverongaps": False}
    traces = [
        go.Heatmap(
            z=panel.values,
            coloraxis="coloraxis",
            customdata=np.stack(list(panel.hover.values()), axis=-1) if panel.hover else None,
            hovertemplate="<br>".join(text) + "<extra></extra>",
            **shared,
        )
    ]
    missing = np.isnan(panel.values)
    if missing.any():  # a trace of its own: plotly cannot say anything about a gap when it is hovered over
        traces.append(
            go.Heatmap(
                z=np.where(missing, np.float32(1), np.float32("nan")),
                colorscale=[(0, UNMEASURED), (1, UNMEASURED)],
                showscale=False,
                name="not measured",
                hovertemplate=where + "<br>not measured<extra></extra>",
                **shared,
            )
        )
    return traces


def _hover_name(axis: Axis) -> str:
    return escape(axis.title.removesuffix(" (token)").lower())


def _colour_axis(unit: str, low: float, high: float, colours: Sequence[str], plot_height: int) -> dict[str, Any]:
    bar = {
        "title": {"text": escape(unit), "side": "right", "font": {"size": FONT_SIZE}},
        "thickness": 14,
        "outlinewidth": 0,
        "ticks": "outside",
        "ticklen": 3,
        "ticksuffix": " ",  # keeps the title off the numbers
        "len": min(plot_height, 320),
        "lenmode": "pixels",
        "x": 1,
        "y": 1,
        "yanchor": "top",
        "xpad": 12,
        "ypad": 0,
    }
    return {"cmin": low, "cmax": high, "colorscale": colour_scale(colours), "colorbar": bar}


def _note(
    figure: go.Figure,
    text: str,
    x: float,
    y: float,
    xanchor: str,
    yanchor: str,
    *,
    size: int,
    colour: str | None = None,
    shift: int = 0,
) -> None:
    """Text at a place on the paper, moved right and down by `shift` pixels to clear the ticks."""
    place = {"x": x, "y": y, "xref": "paper", "yref": "paper", "xanchor": xanchor, "yanchor": yanchor}
    font = {"size": size, "color": colour}
    figure.add_annotation(text=escape(text), showarrow=False, xshift=shift, yshift=-shift, font=font, **place)


def _label_room(axis: Axis, width: int) -> int:
    """Pixels that the tick labels of an x axis need below it."""
    if not axis.category:
        return 0
    return min(round(7.6 * axis.label_length), 190) if axis.rotated(width) else 4


def _axis_layout(axis: Axis, anchor: str, size: int, domain: list[float], vertical: bool = False) -> dict[str, Any]:
    layout: dict[str, Any] = {
        "title": {"text": escape(axis.title), "standoff": 8, "font": {"size": FONT_SIZE}},
        "anchor": anchor,
        "domain": domain,
        "showgrid": False,
        "zeroline": False,
        "ticks": "outside",
        "ticklen": 3,
        "tickcolor": "#888888",
        "automargin": True,
    }
    room = max(size // 16, 1)  # labels that fit along the axis
    if not axis.category:
        dtick = _step(len(axis.values) / (room if vertical else max(size // 22, 1)))
        return layout | {"tickmode": "linear", "tick0": axis.values[0], "dtick": dtick}
    font = {"size": FONT_SIZE - 1} | ({"family": MONOSPACE} if axis.monospace else {})
    shown = axis.values[:: math.ceil(len(axis.values) / room)]
    layout |= {"type": "category", "tickfont": font, "tickmode": "array", "tickvals": shown}
    return layout if vertical else layout | {"tickangle": -90 if axis.rotated(size) else 0}


def _step(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that is at least this."""
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power >= least:
                return factor * power
        power *= 10
