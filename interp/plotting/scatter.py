"""Scatter plots of one measurement against another, in one panel or a grid of them, with the line of equality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from interp.plotting.series import _check, _frame, column_title, finish
from interp.plotting.style import (
    FONT_SIZE,
    PALETTE,
    SEQUENTIAL,
    axis_style,
    colour_scale,
    escape,
    series_colours,
)

_GAP_X, _GAP_Y, _NAME = 62, 46, 24  # pixels: between panels, and above each for its name
_LAYERS = SEQUENTIAL[:8]  # not the bright end, which is hard to see on white


def scatter(
    data: pd.DataFrame | xr.DataArray | xr.Dataset,
    *,
    x: str,
    y: str,
    colour: str | None = None,
    row: str | None = None,
    column: str | None = None,
    hover: Sequence[str] = (),
    title: str,
    x_title: str | None = None,
    y_title: str | None = None,
    colour_title: str | None = None,
    identity: bool = True,
    correlation: bool | None = None,
    size: int | None = None,
) -> go.Figure:
    """One point per row of a table, column `y` against column `x`; a panel per value of `row` and `column`.

    Every panel has its own ranges, since two methods may differ in scale; the dashed line y = x shows by how much.

    Args:
        data: Long table, or a Dataset, which becomes one.
        x, y: Columns of the two axes. Rows where either is NaN are left out.
        colour: Column that colours the points: numbers (a layer) by a scale from dark to bright, names by the colours
            of their roles.
        row, column: Columns whose values name the rows and columns of panels, in order of appearance.
        hover: Further columns to show when hovering.
        x_title, y_title, colour_title: Titles with units; the column's name by default.
        identity: Draw the line y = x.
        correlation: Write Pearson's r of its points over every panel; by default where there are several panels.
        size: Side of a panel in pixels.

    Raises:
        KeyError: If a column does not exist.
        ValueError: If there is nothing to draw, a value is infinite, or there are more than `MAX_POINTS` points.
    """
    frame: Any = _frame(data, y)  # plotly and pandas declare no types that would help here
    _check(frame, [x, y, colour, row, column, *hover], y, None)
    for axis in (x, y):
        if not pd.api.types.is_numeric_dtype(frame[axis]):
            raise ValueError(f"scatter needs numbers but the column {axis!r} is {frame[axis].dtype}")
    frame = frame[frame[x].notna() & frame[y].notna()]
    infinite = int(np.isinf(frame[[x, y]].to_numpy(dtype=float)).any(1).sum())
    if frame.empty or infinite:
        what = f"{infinite} points are infinite" if infinite else f"no row has both {x!r} and {y!r}"
        raise ValueError(f"nothing to draw: {what}")
    rows, columns = (list(frame[name].unique()) if name else [None] for name in (row, column))
    several = len(rows) * len(columns) > 1
    side = size or (460 if not several else 230)
    scaled = colour is not None and pd.api.types.is_numeric_dtype(frame[colour])
    groups = _groups(frame, None if scaled else colour)

    figure = go.Figure()
    named = _NAME if several else 0
    plot_width = len(columns) * side + (len(columns) - 1) * _GAP_X
    plot_height = len(rows) * side + (len(rows) - 1) * (_GAP_Y + named)
    number, listed = 0, set()
    for i, row_name in enumerate(rows):
        for j, column_name in enumerate(columns):
            here = _where(frame, row, row_name) & _where(frame, column, column_name)
            if not here.any():
                continue
            number += 1
            suffix = "" if number == 1 else str(number)
            left, top = j * (side + _GAP_X) / plot_width, 1 - i * (side + _GAP_Y + named) / plot_height
            for group, (shade, member) in groups.items():
                part = frame[here & member]
                if part.empty:
                    continue
                trace: Any = _points(part, x, y, hover, (row, column, colour))
                trace.update(xaxis=f"x{suffix}", yaxis=f"y{suffix}", name=escape(group), legendgroup=group)
                trace.showlegend = colour is not None and not scaled and group not in listed
                listed.add(group)
                if scaled:
                    trace.marker.update(color=part[colour].to_numpy(dtype=float), coloraxis="coloraxis")
                else:
                    trace.marker.color = shade
                figure.add_trace(trace)
            shown = frame[here]
            x_range, y_range = _range(shown[x]), _range(shown[y])
            bottom = i == len(rows) - 1 or not _where(frame, row, rows[i + 1])[_where(frame, column, column_name)].any()
            layout = {"showline": True, "automargin": True}
            figure.update_layout(
                {
                    f"xaxis{suffix}": axis_style(
                        (x_title or column_title(x)) if bottom else "",
                        anchor=f"y{suffix}", domain=[left, min(1.0, left + side / plot_width)], range=x_range, **layout,
                    ),
                    f"yaxis{suffix}": axis_style(
                        (y_title or column_title(y)) if j == 0 else "",
                        anchor=f"x{suffix}", domain=[max(0.0, top - side / plot_height), top], range=y_range, **layout,
                    ),
                }
            )  # fmt: skip
            if identity:
                _identity(figure, suffix, x_range, y_range)
            names = [str(name) for name in (row_name, column_name) if name is not None]
            if several if correlation is None else correlation:
                names.append(_r(shown[x], shown[y]))
            if names:
                figure.add_annotation(
                    text=escape(" · ".join(names)), showarrow=False, font={"size": FONT_SIZE},
                    x=left + side / plot_width / 2, y=top, xref="paper", yref="paper", xanchor="center",
                    yanchor="bottom",
                )  # fmt: skip
    margin = {"l": 84, "r": 28, "t": 58 + (_NAME if several or correlation else 0), "b": 62}
    if scaled:
        assert colour is not None
        margin["r"] = 96
        figure.update_layout(coloraxis=_scale(frame[colour], colour_title or column_title(colour), plot_height))
    legend = (colour_title or colour, list(groups)) if colour is not None and not scaled else None
    return finish(
        figure,
        title=title,
        width=plot_width + margin["l"] + margin["r"],
        height=plot_height + margin["t"] + margin["b"],
        margin=margin,
        legend=legend,
    )


def _groups(frame: pd.DataFrame, colour: str | None) -> dict[str, tuple[str, pd.Series]]:
    """Colour and rows of each named group, in order of appearance."""
    if colour is None:
        return {"": (PALETTE[0], pd.Series(True, index=frame.index))}
    names = [str(name) for name in frame[colour].unique()]
    shades = series_colours(names)
    return {name: (shade, frame[colour].astype(str) == name) for name, shade in zip(names, shades, strict=True)}


def _where(frame: pd.DataFrame, by: str | None, name: Any) -> pd.Series:
    return pd.Series(True, index=frame.index) if by is None else frame[by] == name


def _points(part: pd.DataFrame, x: str, y: str, hover: Sequence[str], shown: tuple[str | None, ...]) -> go.Scatter:
    extra = list(dict.fromkeys([name for name in (*shown, *hover) if name is not None and name not in (x, y)]))
    text = [f"{escape(name)}: %{{customdata[{i}]}}" for i, name in enumerate(extra)]
    text += [f"{escape(x)}: %{{x:.4g}}", f"{escape(y)}: %{{y:.4g}}"]
    labels = [[escape(str(value)) for value in values] for values in part[extra].itertuples(index=False)]
    return go.Scatter(
        x=part[x].to_numpy(dtype=float),
        y=part[y].to_numpy(dtype=float),
        mode="markers",
        marker={"size": 7, "opacity": 0.75},
        customdata=labels if extra else None,
        hovertemplate="<br>".join(text) + "<extra></extra>",
    )


def _range(values: pd.Series) -> list[float]:
    """The range of the values with a margin; of one value, around it."""
    low, high = float(values.min()), float(values.max())
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - room, high + room]


def _identity(figure: go.Figure, suffix: str, x_range: list[float], y_range: list[float]) -> None:
    """The part of y = x that lies in the panel; none where they do not meet."""
    low, high = max(x_range[0], y_range[0]), min(x_range[1], y_range[1])
    if low < high:
        figure.add_shape(
            type="line", x0=low, y0=low, x1=high, y1=high, xref=f"x{suffix}", yref=f"y{suffix}", layer="below",
            line={"color": "#555555", "width": 1.2, "dash": "dash"},
        )  # fmt: skip


def _r(x: pd.Series, y: pd.Series) -> str:
    a, b = x.to_numpy(dtype=float), y.to_numpy(dtype=float)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return "r undefined"
    return f"r = {np.corrcoef(a, b)[0, 1]:.3f}"


def _scale(values: pd.Series, title: str, plot_height: int) -> dict[str, Any]:
    low, high = float(values.min()), float(values.max())
    bar = {
        "title": {"text": escape(title), "side": "right", "font": {"size": FONT_SIZE}},
        "thickness": 14, "outlinewidth": 0, "ticks": "outside", "ticklen": 3, "ticksuffix": " ",
        "len": min(plot_height, 260), "lenmode": "pixels", "x": 1, "y": 1, "yanchor": "top", "xpad": 12, "ypad": 0,
    }  # fmt: skip
    if pd.api.types.is_integer_dtype(values):
        step = max(1, round((high - low) / 8))
        bar |= {"tickmode": "array", "tickvals": list(range(int(low), int(high) + 1, step))}
    return {"cmin": low, "cmax": high if high > low else low + 1, "colorscale": colour_scale(_LAYERS), "colorbar": bar}
