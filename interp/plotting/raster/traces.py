"""How each kind of trace is drawn into a panel."""

# ruff: noqa: TID253 (only export.py imports this package, and only when it draws)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize

from interp.plotting.raster.convert import DASHES, POINT, colour, edges, either, first, is_many, plain
from interp.plotting.raster.panel import Panel
from interp.plotting.style import PALETTE

_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "cross": "P",
    "x": "X",
    "triangle-up": "^",
    "triangle-down": "v",
}
_STEPS: dict[str | None, str] = {None: "default", "linear": "default", "hv": "steps-post", "vh": "steps-pre"}


def heatmap(panel: Panel, trace: Any) -> None:
    """Cells with the colour scale of the trace, or of the layout's colour axis if it shares one; NaN is transparent."""
    values = np.ma.masked_invalid(np.asarray(trace.z, dtype=float))
    x = panel.x.numbers(range(values.shape[1]) if trace.x is None else trace.x)
    y = panel.y.numbers(range(values.shape[0]) if trace.y is None else trace.y)
    owner = panel.page.layout[trace.coloraxis] if trace.coloraxis else trace
    low, high = (owner.cmin, owner.cmax) if trace.coloraxis else (trace.zmin, trace.zmax)
    mesh = panel.ax.pcolormesh(
        edges(x),
        edges(y),
        values,
        cmap=_colour_map(owner.colorscale),
        norm=Normalize(either(low, values.min()), either(high, values.max())),
        antialiased=False,
        linewidth=0,
    )
    panel.ax.margins(0)
    if trace.coloraxis or trace.showscale is not False:
        panel.page.scales.setdefault(trace.coloraxis or f"trace {id(trace)}", (mesh, owner.colorbar))


def scatter(panel: Panel, trace: Any) -> None:
    """Filled bands, lines, markers and error bars."""
    x, y = panel.x.numbers(trace.x), panel.y.numbers(trace.y)
    ink = colour(trace.line.color) or colour(first(trace.marker.color)) or PALETTE[0]
    opacity, mode = either(trace.opacity, 1.0), trace.mode or "lines+markers"
    _require("text" not in mode, "text in scatter traces", "lines and markers")
    _require(trace.fill in (None, "none", "toself"), f"the fill {trace.fill!r}", "'toself'")
    _require(trace.line.shape in _STEPS, f"the line shape {trace.line.shape!r}", "linear, hv, vh")
    handle = None
    if trace.fill == "toself":
        handle = _fill(panel, x, y, colour(trace.fillcolor, opacity) or colour(trace.line.color, 0.5 * opacity) or ink)
    width = either(trace.line.width, 2)
    if "lines" in mode and width > 0:
        dash, steps = DASHES[trace.line.dash or "solid"], _STEPS[trace.line.shape]
        style = {"color": ink, "linewidth": width * POINT, "alpha": opacity, "linestyle": dash, "drawstyle": steps}
        (handle,) = panel.ax.plot(x, y, **style)
    if "markers" in mode:
        made = _markers(panel, trace.marker, x, y, ink, opacity)
        handle = handle or made
    _error_bars(panel, trace, x, y, ink)
    _legend_entry(panel, trace, handle)


def bar(panel: Panel, trace: Any, place: int, count: int) -> None:
    """Bars beside those of the other `count - 1` bar traces of the panel, in slot `place`."""
    mode = panel.page.layout.barmode or "group"
    _require(mode in ("group", "overlay"), f"the bar mode {mode!r}", "group, overlay")
    _require(trace.text is None, "text on bars", "bars with error bars")
    sideways = trace.orientation == "h"
    at = panel.y.numbers(trace.y) if sideways else panel.x.numbers(trace.x)
    length = np.asarray(trace.x if sideways else trace.y, dtype=float)
    thick = 1 - either(panel.page.layout.bargap, 0.2)
    if mode == "group":
        at = at - thick / 2 + thick / count * (place + 0.5)
        thick /= count
    opacity, given = either(trace.opacity, 1.0), trace.marker.color
    fill = [colour(c, opacity) for c in given] if is_many(given) else colour(either(given, PALETTE[place]), opacity)
    base = np.zeros_like(length) + either(trace.base, 0.0)
    if sideways:
        made = panel.ax.barh(at, length, thick, left=base, color=fill, linewidth=0)
        _error_bars(panel, trace, base + length, at, "#222222")
    else:
        made = panel.ax.bar(at, length, thick, bottom=base, color=fill, linewidth=0)
        _error_bars(panel, trace, at, base + length, "#222222")
    _legend_entry(panel, trace, made)


DRAWERS: dict[str, Callable[..., None]] = {"heatmap": heatmap, "scatter": scatter, "bar": bar}


def _require(condition: bool, what: str, known: str) -> None:
    if not condition:
        raise NotImplementedError(f"the matplotlib renderer does not draw {what}; it draws {known}")


def _colour_map(scale: Any) -> LinearSegmentedColormap:
    stops = [(float(at), colour(name)) for at, name in scale or ((0, "#440154"), (1, "#fde725"))]
    return LinearSegmentedColormap.from_list("plotly", stops)


def _fill(panel: Panel, x: np.ndarray, y: np.ndarray, fill: Any) -> Any:
    """One polygon per stretch between NaNs."""
    handle, gap = None, np.isnan(x) | np.isnan(y)
    for part in np.split(np.arange(len(x)), np.flatnonzero(gap)):
        part = part[~gap[part]]
        if len(part):
            # as high as lines are, so that what comes later is on top, as in the browser
            (handle,) = panel.ax.fill(x[part], y[part], color=fill, linewidth=0, zorder=2)
    return handle


def _markers(panel: Panel, marker: Any, x: np.ndarray, y: np.ndarray, ink: Any, opacity: float | int) -> Any:
    symbol = either(marker.symbol, "circle")
    _require(symbol in _MARKERS, f"the marker {symbol!r}", ", ".join(_MARKERS))
    shared: dict[str, Any] = {
        "s": (np.asarray(either(marker.size, 6), dtype=float) * POINT) ** 2,
        "marker": _MARKERS[symbol],
        "linewidths": either(first(marker.line.width), 0) * POINT,
        "alpha": either(marker.opacity, 1.0) * opacity,
        "zorder": 5,
    }
    if marker.coloraxis:  # numbers, coloured by the layout's scale
        owner = panel.page.layout[marker.coloraxis]
        numbers = np.asarray(marker.color, dtype=float)
        norm = Normalize(either(owner.cmin, numbers.min()), either(owner.cmax, numbers.max()))
        made = panel.ax.scatter(x, y, c=numbers, cmap=_colour_map(owner.colorscale), norm=norm, **shared)
        # a mappable of its own: the bar would be as pale as the points
        panel.page.scales.setdefault(marker.coloraxis, (ScalarMappable(norm, made.get_cmap()), owner.colorbar))
        return made
    _require(not is_many(marker.color) or all(isinstance(c, str) for c in marker.color),
             "numbers as colours without a colour axis", "colours, or numbers with marker.coloraxis")  # fmt: skip
    face = [colour(c) for c in marker.color] if is_many(marker.color) else colour(marker.color) or ink
    return panel.ax.scatter(x, y, facecolors=face, edgecolors=colour(first(marker.line.color)) or face, **shared)


def _error_bars(panel: Panel, trace: Any, x: np.ndarray, y: np.ndarray, ink: Any) -> None:
    # Not Axes.errorbar: it refuses an interval that does not contain the value, which an interval may do.
    for error, at, other, cap in ((trace.error_y, y, x, "_"), (trace.error_x, x, y, "|")):
        if error.array is None or error.visible is False:
            continue
        plus = np.asarray(error.array, dtype=float)
        ends = at - (plus if error.arrayminus is None else np.asarray(error.arrayminus, dtype=float)), at + plus
        shade, width = colour(error.color) or ink, either(error.thickness, 2) * POINT
        lines = panel.ax.vlines if cap == "_" else panel.ax.hlines
        lines(other, *ends, color=shade, linewidth=width, zorder=4)
        for end in ends:
            across = {"marker": cap, "markersize": 2 * either(error.width, 4) * POINT, "markeredgewidth": width}
            spots = (other, end) if cap == "_" else (end, other)
            panel.ax.plot(*spots, linestyle="none", color=shade, zorder=4, **across)


def _legend_entry(panel: Panel, trace: Any, handle: Any) -> None:
    if handle is not None and trace.name and trace.showlegend is not False:
        panel.page.legend.append((handle, plain(trace.name)))
