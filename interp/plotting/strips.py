"""Per-example strips: every example as a dot, with the mean and its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from interp.plotting.series import INTERVAL_HOVER, MARGIN, column_title, finish
from interp.plotting.style import MAX_POINTS, axis_style, escape, series_colours, to_numpy


def strip(
    values: Any,
    *,
    interval: Any = None,
    mean: Any = None,
    title: str,
    unit: str,
    labels: Sequence[str] | None = None,
    group_title: str | None = None,
    reference: float | int | None = None,
    height: int = 400,
    width: int | None = None,
) -> go.Figure:
    """One dot per example in a column per group, with the mean and its interval drawn over them.

    Args:
        values: `{name: values of the examples}`; or a DataArray with the dimension `example` and at most one other; or
            an array `[example]`. NaN examples are left out.
        interval: Low and high end per group: an array `[group, 2]` (or `[2]` for one group), or `{name: (low, high)}`.
        mean: Centre per group; the mean of the values by default.
        unit: Title of the y axis: the quantity with its unit.
        labels: One text per example (for example the prompt), shown when hovering.
        reference: Height of a dashed horizontal line.

    Raises:
        ValueError: If the shapes do not fit, a group has no values, or there are more than `MAX_POINTS`.
    """
    groups, dim = _strip_groups(values)
    total = sum(len(v) for v in groups.values())
    if total > MAX_POINTS:
        raise ValueError(f"{total} points are more than a figure may hold ({MAX_POINTS}); show a random part of them")
    ends = _per_group(interval, groups, "interval", 2)
    centres = _per_group(mean, groups, "mean", 1)
    figure = go.Figure()
    colours = series_colours(list(groups))
    for index, (name, numbers) in enumerate(groups.items()):
        if np.isnan(numbers).all():
            raise ValueError(f"group {name!r} has no values: all {len(numbers)} are NaN")
        if labels is not None and len(labels) != len(numbers):
            raise ValueError(
                f"got {len(labels)} labels for {len(numbers)} examples in group {name!r}; give one per example"
            )
        which = [int(i) for i in np.flatnonzero(~np.isnan(numbers))]
        # The golden ratio spreads neighbouring examples evenly, and the same way every time.
        spread = (np.array(which) * 0.6180339887498949) % 1 - 0.5
        text = [f"example {i}" + (f"<br>{escape(labels[i])}" if labels is not None else "") for i in which]
        figure.add_trace(
            go.Scatter(
                x=index + 0.5 * spread,
                y=numbers[which],
                mode="markers",
                marker={"size": 6, "color": colours[index], "opacity": 0.55},
                name=escape(name),
                text=text,
                hovertemplate="%{text}<br>%{y:.4g}<extra>%{fullData.name}</extra>",
                showlegend=False,
            )
        )
    centre = np.array([c[0] for c in centres]) if centres else np.array([np.nanmean(v) for v in groups.values()])
    error, words = None, "mean %{y:.4g}"
    bounds = np.array(ends) if ends else None
    if bounds is not None:
        if (bounds[:, 0] > bounds[:, 1]).any():
            raise ValueError(f"an interval ends below its start: {bounds[bounds[:, 0] > bounds[:, 1]][0].tolist()}")
        error = {
            "array": bounds[:, 1] - centre,
            "arrayminus": centre - bounds[:, 0],
            "color": "#111111",
            "thickness": 1.8,
            "width": 7,
        }
        words += INTERVAL_HOVER
    figure.add_trace(
        go.Scatter(
            x=np.arange(len(groups)),
            y=centre,
            mode="markers",
            marker={"symbol": "diamond", "size": 9, "color": "#111111", "line": {"color": "white", "width": 1}},
            error_y=error,
            customdata=bounds,
            name="mean and interval" if bounds is not None else "mean",
            hovertemplate=words + "<extra></extra>",
            showlegend=False,
        )
    )
    names = [escape(name) for name in groups]
    longest = max(len(name) for name in groups)
    width = width or min(max(360, 130 * len(groups) + 120), 1100)
    slanted = 7.2 * longest > (width - 110) / len(groups)
    title_x = group_title if group_title is not None else (column_title(dim) if dim else "")
    figure.update_xaxes(
        axis_style(
            title_x,
            tickmode="array",
            tickvals=list(range(len(groups))),
            ticktext=names,
            range=[-0.5, len(groups) - 0.5],
            showgrid=False,
            zeroline=False,
            tickangle=-45 if slanted else 0,
        )
    )
    figure.update_yaxes(axis_style(unit))
    margin = MARGIN | {"b": 62 + (min(round(5.4 * longest), 170) if slanted else 0)}
    return finish(figure, title=title, width=width, height=height, margin=margin, reference=reference)


def _strip_groups(values: Any) -> tuple[dict[str, np.ndarray], str | None]:
    if isinstance(values, Mapping):
        groups = {str(name): to_numpy(item).astype(float) for name, item in values.items()}
        wrong = {name: item.shape for name, item in groups.items() if item.ndim != 1 or not item.size}
        if wrong or not groups:
            raise ValueError(f"strip needs one value per example in every group; these have other shapes: {wrong}")
        return groups, None
    if not isinstance(values, xr.DataArray):
        values = xr.DataArray(to_numpy(values), dims=("example",) if to_numpy(values).ndim == 1 else None)
    if "example" not in values.dims or values.ndim > 2:
        raise ValueError(
            f"strip needs the dimension example and at most one other but got {dict(values.sizes)}; select the cells "
            "to show, for example effects.values.sel(layer=9, head=6)"
        )
    if values.ndim == 1:
        return {str(values.name or ""): values.values.astype(float)}, None
    (dim,) = (str(d) for d in values.dims if d != "example")
    rows = values.transpose(dim, "example")
    names = rows.coords[dim].values if dim in rows.coords else range(rows.sizes[dim])
    return {str(name): row.astype(float) for name, row in zip(names, rows.values, strict=True)}, dim


def _per_group(given: Any, groups: Mapping[str, np.ndarray], what: str, size: int) -> list[np.ndarray] | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        missing = [name for name in groups if name not in {str(key) for key in given}]
        if missing:
            raise ValueError(f"{what} has no entry for the groups {missing}")
        by_name = {str(key): item for key, item in given.items()}
        given = [to_numpy(by_name[name]) for name in groups]
    array = to_numpy(given).astype(float)
    if array.size != len(groups) * size:
        wanted = f"[{len(groups)}, 2]" if size == 2 else f"[{len(groups)}]"
        raise ValueError(f"{what} has shape {array.shape} but the groups need {wanted}")
    return list(array.reshape(len(groups), size))
