"""One pair of axes: where it lies, how its values map to numbers, and its ticks, titles and grid."""

# ruff: noqa: TID253 (only export.py imports this package, and only when it draws)

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from interp.plotting.raster.convert import INK, POINT, colour, either, plain
from interp.plotting.raster.page import Page


class Scale:
    """Values of one axis as numbers: numbers stay, categories are counted in order of appearance."""

    def __init__(self, axis: Any, values: list[Any]) -> None:
        given = () if axis.categoryarray is None else axis.categoryarray
        flat = [v for array in values if array is not None for v in np.asarray(array, dtype=object).ravel()]
        self.category = axis.type == "category" or (axis.type is None and any(isinstance(v, str) for v in flat))
        self.labels = list(dict.fromkeys([*given, *flat])) if self.category else []
        self._places = {label: place for place, label in enumerate(self.labels)}

    def number(self, value: Any) -> float:
        if self.category and value in self._places:
            return float(self._places[value])
        return float("nan") if value is None else float(value)

    def numbers(self, values: Any) -> np.ndarray:
        return np.array([self.number(v) for v in values], dtype=float)


class Panel:
    """Axes at their place on the page; traces draw into `ax`, then `decorate` finishes them."""

    def __init__(self, page: Page, x_name: str, y_name: str, traces: list[Any]) -> None:
        self.page = page
        self.x_axis, self.y_axis = page.layout[f"xaxis{x_name[1:]}"], page.layout[f"yaxis{y_name[1:]}"]
        self.x, self.y = Scale(self.x_axis, [t.x for t in traces]), Scale(self.y_axis, [t.y for t in traces])
        (x0, x1), (y0, y1) = either(self.x_axis.domain, (0, 1)), either(self.y_axis.domain, (0, 1))
        (left, bottom), (right, top) = page.point(x0, y0), page.point(x1, y1)
        self.ax: Axes = page.canvas.add_axes((left, bottom, right - left, top - bottom))
        self.ax.set_facecolor(colour(page.layout.plot_bgcolor) or "white")
        if self.x_axis.type == "log":
            self.ax.set_xscale("log")
        if self.y_axis.type == "log":
            self.ax.set_yscale("log")
        self.pixels = {"x": (right - left) * page.width, "y": (top - bottom) * page.height}
        page.panels[x_name, y_name] = self

    def decorate(self) -> None:
        """Limits, ticks, titles, grid and lines of both axes; after the traces, which set the automatic limits."""
        for which, scale, axis in (("x", self.x, self.x_axis), ("y", self.y, self.y_axis)):
            self._limits(which, scale, axis)
            self._ticks(which, scale, axis)
            self._lines(which, scale, axis)
        self.ax.set_axisbelow(True)

    def _limits(self, which: str, scale: Scale, axis: Any) -> None:
        low, high = self.ax.get_xlim() if which == "x" else self.ax.get_ylim()
        if axis.range is not None:
            low, high = (10.0**v if axis.type == "log" else float(v) for v in axis.range)
        elif scale.category:
            low, high = -0.5, len(scale.labels) - 0.5
        if axis.autorange == "reversed":
            low, high = high, low
        (self.ax.set_xlim if which == "x" else self.ax.set_ylim)(low, high)

    def _ticks(self, which: str, scale: Scale, axis: Any) -> None:
        page, ruler = self.page, self.ax.xaxis if which == "x" else self.ax.yaxis
        low, high = sorted(self.ax.get_xlim() if which == "x" else self.ax.get_ylim())
        ruler.set_minor_locator(NullLocator())
        values = axis.tickvals if axis.tickvals is not None else (scale.labels if scale.category else None)
        if values is not None:
            texts = values if axis.ticktext is None else axis.ticktext
            ruler.set_ticks(scale.numbers(values), labels=[plain(text) for text in map(str, texts)])
        elif axis.type == "log":
            ruler.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # the default writes formulas
        elif axis.dtick is not None:
            start, step = float(either(axis.tick0, 0)), float(axis.dtick)
            ticks = np.arange(start + np.ceil((low - start) / step) * step, high + 1e-9, step)
            ruler.set_major_locator(FixedLocator(ticks.tolist()))
        else:
            ruler.set_major_locator(MaxNLocator(nbins=max(2, int(self.pixels[which] / 36)), steps=[1, 2, 5, 10]))
        if axis.showticklabels is False:
            ruler.set_ticklabels([])
        angle = either(axis.tickangle, 0)
        for label in ruler.get_ticklabels():
            label.set(color=page.ink, **page.font(axis.tickfont.size, axis.tickfont.family))
            if which == "x" and angle:
                label.set(rotation=-angle, rotation_mode="anchor" if abs(angle) != 90 else "default")
                label.set(ha="center" if abs(angle) == 90 else ("right" if angle < 0 else "left"))
        ruler.set_tick_params(length=3 * POINT if axis.ticks == "outside" else 0, width=0.6)
        ruler.set_tick_params(color=colour(axis.tickcolor) or INK)
        title = self.ax.set_xlabel if which == "x" else self.ax.set_ylabel
        title(plain(axis.title.text), color=page.ink, **page.font(axis.title.font.size))

    def _lines(self, which: str, scale: Scale, axis: Any) -> None:
        near, far = ("bottom", "top") if which == "x" else ("left", "right")
        self.ax.spines[far].set_visible(False)
        self.ax.spines[near].set_visible(bool(axis.showline))
        self.ax.spines[near].set_color(colour(axis.linecolor) or INK)
        if axis.showgrid is not False:
            ruler = self.ax.xaxis if which == "x" else self.ax.yaxis
            ruler.grid(True, color=colour(axis.gridcolor) or "#e8e8e8", linewidth=0.7)
        low, high = sorted(self.ax.get_xlim() if which == "x" else self.ax.get_ylim())
        if axis.zeroline is not False and low < 0 < high and axis.type != "log" and not scale.category:
            line = self.ax.axvline if which == "x" else self.ax.axhline
            width = either(axis.zerolinewidth, 1) * POINT
            line(0, color=colour(axis.zerolinecolor) or INK, linewidth=width, zorder=1)
