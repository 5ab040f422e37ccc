"""Lines and bars over the columns of a table, with intervals."""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from interp.plotting.style import (
    FONT_SIZE,
    MAX_POINTS,
    PALETTE,
    ROLE_COLOURS,
    apply_layout,
    axis_style,
    escape,
    series_colours,
)

INTERVAL_HOVER = " [%{customdata[0]:.4g}, %{customdata[1]:.4g}]"
MARGIN = {"l": 78, "r": 28, "t": 58, "b": 62}


def lines(
    data: pd.DataFrame | xr.DataArray | xr.Dataset,
    *,
    x: str,
    y: str = "value",
    group: str | None = None,
    interval: tuple[str, str] | None = None,
    title: str,
    unit: str,
    x_title: str | None = None,
    reference: float | int | None = None,
    log_x: bool = False,
    log_y: bool = False,
    height: int = 400,
    width: int = 680,
) -> go.Figure:
    """One line per group over a numeric column, with a band between the two interval columns.

    Args:
        data: Long table, or a DataArray or Dataset, which becomes one (a DataArray's values are the column `y`).
        x, y: Columns of the two axes. NaN in `y` leaves a gap.
        group: Column that names the lines. A name in `ROLE_COLOURS` gets its colour.
        interval: Columns that hold the low and the high end, for example of a bootstrap interval.
        title: The variable that is shown.
        unit: Title of the y axis: the quantity with its unit.
        reference: Height of a dashed horizontal line, for example a baseline.
        log_x, log_y: Logarithmic axes; what is drawn on them must be above 0.

    Raises:
        KeyError: If a column does not exist.
        ValueError: If there are no rows or more than `MAX_POINTS`, if the same x occurs twice in a line, or if an
            interval ends below its start.
    """
    frame = _frame(data, y)
    _check(frame, [x, y, group, *(interval or ())], y, interval)
    if not pd.api.types.is_numeric_dtype(frame[x]):
        raise ValueError(f"lines needs numbers on the x axis but the column {x!r} is {frame[x].dtype}; use bars()")
    upright = [y, *(interval or ())]
    for column in [*([x] if log_x else []), *(upright if log_y else [])]:
        if bool((frame[column] <= 0).any()):
            raise ValueError(f"a logarithmic axis needs numbers above 0, but {column!r} has {frame[column].min():g}")
    figure = go.Figure()
    for colour, name, part in _groups(frame, group):
        part = part.sort_values(x)
        if part[x].duplicated().any():
            twice = part.loc[part[x].duplicated(), x].iloc[0]
            raise ValueError(f"line {name!r} has several values at {x}={twice:g}; average them or pass group=")
        if interval:
            low, high = (part[column].to_numpy(dtype=float) for column in interval)
            figure.add_trace(_band(part[x].to_numpy(dtype=float), low, high, colour, name))
        hover = f"{escape(x)}: %{{x}}<br>%{{y:.4g}}"
        figure.add_trace(
            go.Scatter(
                x=part[x].to_numpy(),
                y=part[y].to_numpy(dtype=float),
                mode="lines+markers" if len(part) <= 60 else "lines",
                line={"color": colour, "width": 2},
                marker={"size": 5, "color": colour},
                name=escape(name),
                legendgroup=name,
                showlegend=group is not None,
                customdata=part[list(interval)].to_numpy(dtype=float) if interval else None,
                hovertemplate=hover + (INTERVAL_HOVER if interval else "") + f"<extra>{escape(name)}</extra>",
            )
        )
    along = _log_ticks(frame[x].to_numpy(dtype=float)) if log_x else {}
    figure.update_xaxes(axis_style(x_title or column_title(x), showgrid=False, zeroline=False, **along))
    figure.update_yaxes(axis_style(unit, **(_log_ticks(frame[upright].to_numpy(dtype=float)) if log_y else {})))
    if not log_x and pd.api.types.is_integer_dtype(frame[x]) and frame[x].nunique() <= 20:
        figure.update_xaxes(tickmode="array", tickvals=sorted(int(v) for v in frame[x].unique()))
    return finish(
        figure,
        title=title,
        width=width,
        height=height,
        margin=MARGIN,
        legend=_legend(frame, group),
        reference=reference,
    )


def bars(
    data: pd.DataFrame | xr.DataArray | xr.Dataset,
    *,
    x: str,
    y: str = "value",
    group: str | None = None,
    interval: tuple[str, str] | None = None,
    title: str,
    unit: str,
    x_title: str | None = None,
    horizontal: bool = False,
    reference: float | int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> go.Figure:
    """Bars over a column of names (in order of appearance), grouped by another, with the interval as error bars.

    Args:
        horizontal: Names on the y axis, first one at the top; for long names.

    Other arguments and errors as for `lines`; each name occurs once per group.
    """
    frame = _frame(data, y)
    _check(frame, [x, y, group, *(interval or ())], y, interval)
    names = [str(name) for name in frame[x].unique()]
    figure = go.Figure()
    for colour, name, part in _groups(frame, group):
        if part[x].duplicated().any():
            twice = part.loc[part[x].duplicated(), x].iloc[0]
            raise ValueError(f"several bars for {x}={twice} in group {name!r}; average them or pass group=")
        at, value = [escape(str(label)) for label in part[x]], part[y].to_numpy(dtype=float)
        if group is None:  # one series: only bars that are roles differ in colour
            colour = [ROLE_COLOURS.get(str(label), colour) for label in part[x]]
        error = None
        if interval:
            low, high = (part[column].to_numpy(dtype=float) for column in interval)
            error = {"array": high - value, "arrayminus": value - low, "color": "#333333", "thickness": 1.4, "width": 4}
        number = "%{x:.4g}" if horizontal else "%{y:.4g}"
        hover = f"%{{{'y' if horizontal else 'x'}}}<br>{number}"
        figure.add_trace(
            go.Bar(
                x=value if horizontal else at,
                y=at if horizontal else value,
                orientation="h" if horizontal else "v",
                marker={"color": colour},
                error_x=error if horizontal else None,
                error_y=None if horizontal else error,
                name=escape(name),
                showlegend=group is not None,
                customdata=part[list(interval)].to_numpy(dtype=float) if interval else None,
                hovertemplate=hover + (INTERVAL_HOVER if interval else "") + f"<extra>{escape(name)}</extra>",
            )
        )
    labels = [escape(label) for label in names]
    longest = max(len(label) for label in names)
    count = len(names) * (frame[group].nunique() if group else 1)
    named = axis_style(
        x_title or column_title(x),
        type="category",
        categoryorder="array",
        categoryarray=labels,
        showgrid=False,
        zeroline=False,
    )
    if horizontal:
        figure.update_yaxes(named, autorange="reversed")
        figure.update_xaxes(axis_style(unit))
        size, left = (width or 680, height or max(200, 26 * count + 140)), 60 + round(7.2 * longest)
        margin = MARGIN | {"l": min(left, 320)}
    else:
        size = (width or min(max(420, 46 * count + 160), 1100), height or 400)
        slanted = 7.2 * longest > (size[0] - 120) / len(names)
        figure.update_xaxes(named, tickangle=-45 if slanted else 0)
        figure.update_yaxes(axis_style(unit))
        margin = MARGIN | {"b": 62 + (min(round(5.4 * longest), 170) if slanted else 0)}
    figure.update_layout(barmode="group", bargap=0.25)
    return finish(
        figure,
        title=title,
        width=size[0],
        height=size[1],
        margin=margin,
        legend=_legend(frame, group),
        reference=reference,
        horizontal=horizontal,
    )


def _frame(data: Any, y: str) -> pd.DataFrame:
    if isinstance(data, pd.DataFrame):
        return data
    if isinstance(data, xr.DataArray):
        return data.to_dataframe(name=y).reset_index()
    if isinstance(data, xr.Dataset):
        return data.to_dataframe().reset_index()
    raise TypeError(f"expected a DataFrame, DataArray or Dataset but got {type(data).__name__}")


def _check(frame: pd.DataFrame, columns: list[str | None], y: str, interval: tuple[str, str] | None) -> None:
    for column in columns:
        if column is not None and column not in frame.columns:
            near = difflib.get_close_matches(column, [str(c) for c in frame.columns], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise KeyError(f"no column {column!r}; the columns are {', '.join(map(repr, frame.columns))}.{hint}")
    if frame.empty or frame[y].isna().all():
        raise ValueError(f"nothing to draw: {len(frame)} rows, all of the column {y!r} is NaN")
    if len(frame) > MAX_POINTS:
        raise ValueError(
            f"{len(frame)} points are more than a figure may hold ({MAX_POINTS}); average first, for example "
            "frame.groupby(...).mean() or values.coarsen(...).mean()"
        )
    if interval and (frame[interval[0]] > frame[interval[1]]).any():
        row = frame.index[frame[interval[0]] > frame[interval[1]]][0]
        ends = [float(frame.at[row, column]) for column in interval]  # type: ignore[arg-type]
        raise ValueError(f"the interval of row {row} ends below its start: {ends}; pass interval=(low, high)")


def _groups(frame: pd.DataFrame, group: str | None) -> list[tuple[Any, str, pd.DataFrame]]:
    """Colour, name and rows of each group, in order of appearance."""
    if group is None:
        return [(PALETTE[0], "", frame)]
    parts = [(str(name), part) for name, part in frame.groupby(group, sort=False)]
    colours = series_colours([name for name, _ in parts])
    return [(colour, name, part) for colour, (name, part) in zip(colours, parts, strict=True)]


def _band(x: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, name: str) -> go.Scatter:
    """Filled polygons between two curves, one per stretch without NaN."""
    xs: list[float] = []
    ys: list[float] = []
    there = np.isfinite(low) & np.isfinite(high)
    for part in np.split(np.arange(len(x)), np.flatnonzero(~there)):
        part = part[there[part]]
        if len(part):
            xs += [*x[part], *x[part][::-1], np.nan]
            ys += [*high[part], *low[part][::-1], np.nan]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return go.Scatter(
        x=np.array(xs[:-1]),
        y=np.array(ys[:-1]),
        mode="lines",
        line={"width": 0, "color": colour},
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.2)",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=name,
        name=f"{escape(name)} interval",
    )


def _log_ticks(numbers: np.ndarray) -> dict[str, Any]:
    """Ticks at powers of ten, and at twice and five times these where there are few of them."""
    low, high = np.log10(np.nanmin(numbers)), np.log10(np.nanmax(numbers))
    decades = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    steps = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def column_title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def finish(
    figure: go.Figure,
    *,
    title: str,
    width: int,
    height: int,
    margin: dict[str, int],
    legend: tuple[str, list[str]] | None = None,
    reference: float | int | None = None,
    horizontal: bool = False,
) -> go.Figure:
    """Add the reference line and room for the legend (its heading and names), then the house layout."""
    if reference is not None:
        line = {"line": {"color": "#555555", "width": 1.2, "dash": "dash"}}
        if horizontal:
            figure.add_shape(type="line", x0=reference, x1=reference, y0=0, y1=1, xref="x", yref="y domain", **line)
        else:
            figure.add_shape(type="line", x0=0, x1=1, y0=reference, y1=reference, xref="x domain", yref="y", **line)
    if legend is not None:
        heading, names = column_title(legend[0]), legend[1]
        room = min(60 + round(7.2 * max(len(name) for name in (heading, *names))), 320)
        margin, width = margin | {"r": margin["r"] + room}, width + room
        head = {"text": escape(heading), "font": {"size": FONT_SIZE}}
        figure.update_layout(legend={"title": head, "x": 1.02, "y": 1, "tracegroupgap": 2})
    return apply_layout(figure, title=title, width=width, height=height, margin=margin)


def _legend(frame: pd.DataFrame, group: str | None) -> tuple[str, list[str]] | None:
    return None if group is None else (group, [str(name) for name in frame[group].unique()])
