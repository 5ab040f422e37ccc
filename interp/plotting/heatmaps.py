"""Heat maps over two named dimensions: layer x position, layer x head, or any other pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from interp.plotting.grid import Axis, Panel, draw_grid
from interp.plotting.style import FONT_SIZE, escape, to_numpy, token_labels

_TITLES = {"pos": "Position", "dest": "Destination position", "src": "Source position", "kv_head": "Key-value head"}


def heatmap(
    values: Any,
    *,
    title: str,
    unit: str,
    x_labels: Sequence[str] | None = None,
    y_labels: Sequence[str] | None = None,
    signed: bool = True,
    origin: Literal["bottom", "top"] = "bottom",
    hover: Mapping[str, Any] | None = None,
    limit: float | int | None = None,
    colours: Sequence[str] | None = None,
    dims: tuple[str, str] | None = None,
) -> go.Figure:
    """Heat map of a 2-D array: first dimension on the y axis with its first row at the bottom, second on the x axis.

    Axis titles are the names of the dimensions, tick labels their coordinates. Signed values get a red-white-blue scale
    centred on zero (blue is positive), unsigned ones viridis from the smallest value (or 0) to the largest. NaN cells
    are grey and say so when hovered over.

    Args:
        values: 2-D DataArray; or a DataFrame (index on y, columns on x); or an array or tensor together with `dims`.
        title: The variable that is shown.
        unit: Unit of the values; titles the colour bar.
        x_labels, y_labels: Tick labels; the coordinates by default. They may repeat.
        origin: `"top"` puts the first row at the top, as attention patterns are usually read.
        hover: Further arrays of the shape of `values` to show when hovering, by name (for example interval ends).
        limit: Largest absolute value of the colour scale; the data's by default. Values beyond it are drawn in the end
            colours.
        colours: Colour scale instead of the default one, from low to high.
        dims: Names of the two dimensions, for arrays that have none.

    Raises:
        ValueError: If `values` is not 2-D, is all NaN, holds an infinity, or has more than `MAX_CELLS` cells.
    """
    panel = _panel(values, "values", x_labels=x_labels, y_labels=y_labels, hover=hover, dims=dims)
    return draw_grid({"": panel}, title=title, unit=unit, signed=signed, origin=origin, limit=limit, colours=colours)


def heatmaps(
    panels: Mapping[str, Any],
    *,
    title: str,
    unit: str,
    tokens: Sequence[str] | None = None,
    signed: bool = True,
    origin: Literal["bottom", "top"] = "bottom",
    limit: float | int | None = None,
    colours: Sequence[str] | None = None,
    columns: int | None = None,
    square: bool = False,
) -> go.Figure:
    """Several heat maps with one colour scale, each under its name; for example one per site of a sweep.

    Panels whose axes are all equal share them: tick labels appear at the left and the bottom of the grid only.

    Args:
        panels: 2-D DataArrays by name, in the order in which they are drawn.
        tokens: One per position, for the dimensions `pos`, `dest` and `src` of every panel that has them; the
            coordinate `token` by default.
        columns: Panels per row; by default all in one row where that stays legible, otherwise one below the other.
        square: Give every panel equal sides, as for attention patterns.

    Other arguments and errors as for `heatmap`; the limit of `MAX_CELLS` is for all panels together.
    """
    if not panels:
        raise ValueError("heatmaps got no panels; pass a mapping from panel title to a 2-D DataArray")
    made = {}
    for name, values in panels.items():
        values = _token_coordinate(values, tokens)
        made[str(name)] = _panel(values, f"panel {name!r}")
    if columns is None:
        columns = len(made) if sum(p.values.shape[1] for p in made.values()) <= 64 else 1
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    return draw_grid(
        made,
        title=title,
        unit=unit,
        signed=signed,
        origin=origin,
        limit=limit,
        colours=colours,
        columns=min(columns, len(made)),
        square=square,
    )


def layer_position(
    values: Any,
    tokens: Sequence[str] | None = None,
    *,
    title: str = "Effect by layer and position",
    unit: str | None = None,
    signed: bool = True,
    hover: Mapping[str, Any] | None = None,
    limit: float | int | None = None,
) -> go.Figure:
    """Heat map with layers on the y axis (layer 0 at the bottom) and positions, labelled with tokens, on the x axis.

    Args:
        values: DataArray with the dimension `layer` and one other (`pos`, or named positions), in either order; or an
            array or tensor `[layer, pos]`.
        tokens: One token per position; the coordinate `token` by default. Spaces are made visible, and a token that
            occurs twice is followed by its position.
        unit: Unit of the values; `values.attrs["unit"]` by default.

    Other arguments and errors as for `heatmap`.
    """
    values = _layer_first(values, "layer_position", "pos")
    values = _token_coordinate(values, tokens)
    unit = unit or str(values.attrs.get("unit", "effect"))
    return heatmap(values, title=title, unit=unit, signed=signed, hover=hover, limit=limit)


def layer_head(
    values: Any,
    *,
    title: str = "Effect by layer and head",
    unit: str | None = None,
    signed: bool = True,
    hover: Mapping[str, Any] | None = None,
    limit: float | int | None = None,
    label_top: int = 0,
) -> go.Figure:
    """Heat map with layers on the y axis (layer 0 at the bottom) and heads on the x axis; hovering names a head (L9H6).

    Args:
        values: DataArray with the dimension `layer` and `head` (or `kv_head`), in either order; or an array or tensor
            `[layer, head]`.
        unit: Unit of the values; `values.attrs["unit"]` by default.
        label_top: Write the name into this many cells with the largest absolute values.

    Other arguments and errors as for `heatmap`.
    """
    values = _layer_first(values, "layer_head", "head")
    unit = unit or str(values.attrs.get("unit", "effect"))
    figure = heatmap(values, title=title, unit=unit, signed=signed, hover=hover, limit=limit)
    trace: Any = figure.data[0]
    magnitude = np.abs(trace.z)
    order = [i for i in np.argsort(-magnitude, axis=None) if not np.isnan(magnitude.flat[i])]  # NaN sorts last
    scale = figure.layout.coloraxis.cmax  # type: ignore[union-attr]
    for row, column in (np.unravel_index(i, magnitude.shape) for i in order[:label_top]):
        strong = magnitude[row, column] > 0.6 * scale
        figure.add_annotation(
            x=trace.x[column],
            y=trace.y[row],
            xref="x",
            yref="y",
            text=f"L{trace.y[row]}H{trace.x[column]}",
            showarrow=False,
            # Strong cells are dark on the diverging scale and light on the sequential one.
            font={"size": FONT_SIZE - 4, "color": "white" if strong == signed else "#222222"},
        )
    return figure


def _panel(
    values: Any,
    name: str,
    *,
    x_labels: Sequence[str] | None = None,
    y_labels: Sequence[str] | None = None,
    hover: Mapping[str, Any] | None = None,
    dims: tuple[str, str] | None = None,
) -> Panel:
    array = _two_dimensional(values, name, dims)
    numbers = array.values.astype(np.float32)
    if np.isinf(numbers).any():
        row, column = np.argwhere(np.isinf(numbers))[0]
        raise ValueError(
            f"{name} is infinite at [{row}, {column}]; a colour scale cannot show that, use NaN for no value"
        )
    extra = {}
    for key, item in (hover or {}).items():
        if isinstance(item, xr.DataArray) and set(item.dims) == set(array.dims):
            item = item.transpose(*array.dims)
        extra[str(key)] = item = to_numpy(item).astype(np.float32)
        if item.shape != numbers.shape:
            raise ValueError(
                f"hover[{key!r}] has shape {item.shape} but {name} has {numbers.shape}; they must be equal"
            )
    return Panel(numbers, _axis(array, 1, x_labels), _axis(array, 0, y_labels), extra)


def _two_dimensional(values: Any, name: str, dims: tuple[str, str] | None) -> xr.DataArray:
    if isinstance(values, pd.DataFrame):
        names = (str(values.index.name or "row"), str(values.columns.name or "column"))
        values = xr.DataArray(
            values.to_numpy(), dims=names, coords=dict(zip(names, (values.index, values.columns), strict=True))
        )
    if not isinstance(values, xr.DataArray):
        array = to_numpy(values)
        if dims is None:
            raise ValueError(
                f"{name} is a plain array of shape {array.shape}; pass dims=('layer', 'pos') or a DataArray"
            )
        if array.ndim != 2 or len(dims) != 2:
            raise ValueError(f"{name} has shape {array.shape} and dims={dims}; a heat map needs two dimensions")
        values = xr.DataArray(array, dims=dims)
    if values.ndim != 2:
        advice = (
            'average first, for example values.mean("example")' if "example" in values.dims else "select or average"
        )
        raise ValueError(f"{name} has dimensions {dict(values.sizes)}; a heat map needs exactly two: {advice}")
    if values.size == 0:
        raise ValueError(f"{name} has no cells: its dimensions are {dict(values.sizes)}")
    return values


def _axis(array: xr.DataArray, place: int, labels: Sequence[str] | None) -> Axis:
    dim = str(array.dims[place])
    size = array.shape[place]
    title = _TITLES.get(dim, dim.replace("_", " ").capitalize())
    coordinate = array.coords[dim].values if dim in array.coords else np.arange(size)
    tokens = _tokens_of(array, dim) if labels is None else None
    if labels is not None:
        if len(labels) != size:
            raise ValueError(f"got {len(labels)} labels for the dimension {dim!r} of size {size}; give one per entry")
    elif tokens is not None:
        labels = token_labels(list(tokens), coordinate.tolist())
        title = f"{title} (token)"
    elif np.issubdtype(coordinate.dtype, np.integer) and (size == 1 or (np.diff(coordinate) == 1).all()):
        return Axis([int(c) for c in coordinate], title, category=False)
    else:
        labels = [f"{c:g}" if isinstance(c, (float, np.floating)) else str(c) for c in coordinate]
    return Axis(_unique([escape(str(label)) for label in labels]), title, category=True, monospace=tokens is not None)


def _tokens_of(array: xr.DataArray, dim: str) -> np.ndarray | None:
    """The coordinate `token` or `{dim}_token` that runs along this dimension alone."""
    for name in (f"{dim}_token", "token"):
        if name in array.coords and array.coords[name].dims == (dim,):
            return array.coords[name].values
    return None


def _unique(labels: list[str]) -> list[str]:
    # Equal categories would share one column, so repeated labels are numbered by place.
    return [f"{s} [{i}]" if labels.count(s) > 1 else s for i, s in enumerate(labels)]


def _token_coordinate(values: Any, tokens: Sequence[str] | None) -> Any:
    if tokens is None or not isinstance(values, xr.DataArray):
        return values
    texts = [str(token) for token in tokens]
    for dim in ("pos", "dest", "src"):
        if dim in values.dims:
            if len(texts) != values.sizes[dim]:
                raise ValueError(
                    f"got {len(texts)} tokens for {values.sizes[dim]} positions ({dim}); give one per position"
                )
            values = values.assign_coords({"token" if dim == "pos" else f"{dim}_token": (dim, texts)})
    return values


def _layer_first(values: Any, function: str, other: str) -> xr.DataArray:
    if not isinstance(values, xr.DataArray):
        array = to_numpy(values)
        if array.ndim != 2:
            raise ValueError(f"{function} needs [layer, {other}] but got an array of shape {array.shape}")
        return xr.DataArray(array, dims=("layer", other))
    if values.ndim != 2:
        return _two_dimensional(values, "values", None)  # raises with advice
    if "layer" not in values.dims:
        raise ValueError(
            f"{function} needs the dimensions layer and {other} but got {values.dims}; heatmap() takes any two"
        )
    return values.transpose("layer", ...)
