"""The sheet that holds the panels: pixel geometry, title, legend, colour bars, lines and notes."""

# ruff: noqa: TID253 (only export.py imports this package, and only when it draws)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from interp.plotting.raster.convert import DASHES, POINT, colour, either, families, plain
from interp.plotting.style import FONT_SIZE

if TYPE_CHECKING:
    from interp.plotting.raster.panel import Panel

_MARGIN = {"l": 80, "r": 80, "t": 100, "b": 80}  # plotly's defaults


class Page:
    """What the panels of one figure share."""

    def __init__(self, canvas: Figure, layout: Any, width: int, height: int) -> None:
        self.canvas, self.layout, self.width, self.height = canvas, layout, width, height
        self.margin = {side: either(layout.margin[side], default) for side, default in _MARGIN.items()}
        self.plot_width = width - self.margin["l"] - self.margin["r"]
        self.plot_height = height - self.margin["t"] - self.margin["b"]
        self.size = either(layout.font.size, FONT_SIZE)
        self.ink = colour(layout.font.color) or "#222222"
        self.panels: dict[tuple[str, str], Panel] = {}
        self.scales: dict[str, tuple[ScalarMappable, Any]] = {}  # by plotly's name of the colour axis
        self.legend: list[tuple[Any, str]] = []

    def point(self, x: float | int, y: float | int) -> tuple[float, float]:
        """Figure fraction of a point in plotly's paper coordinates (0 to 1 over the plotting area)."""
        left, bottom = self.margin["l"], self.margin["b"]
        return (left + x * self.plot_width) / self.width, (bottom + y * self.plot_height) / self.height

    def font(self, size: float | int | None = None, family: str | None = None) -> dict[str, Any]:
        """Font keywords; labels are never formulas, whatever dollar signs a token has."""
        names = families("mono" in (family or "").lower())
        return {"fontsize": (size or self.size) * POINT, "family": names, "parse_math": False}

    def finish(self) -> None:
        """Draw everything that belongs to no single panel."""
        for mappable, bar in self.scales.values():
            self._colour_bar(mappable, bar)
        for shape in self.layout.shapes or ():
            self._line(shape)
        for note in self.layout.annotations or ():
            self._note(note)
        title = self.layout.title
        if title.text:
            x, y = (either(title.pad.l, 0) + 4) / self.width, 1 - min(self.margin["t"], 54) / 2 / self.height
            font = self.font(either(title.font.size, self.size + 4))
            self.canvas.text(x, y, plain(title.text), ha="left", va="center", color=self.ink, **font)
        if self.legend and self.layout.showlegend is not False:
            self._legend(self.layout.legend)

    def _legend(self, legend: Any) -> None:
        made = self.canvas.legend(
            [handle for handle, _ in self.legend],
            [name for _, name in self.legend],
            loc="upper left",
            bbox_to_anchor=self.point(either(legend.x, 1.02), either(legend.y, 1.0)),
            frameon=False,
            borderaxespad=0,
            title=plain(legend.title.text) or None,
            alignment="left",
        )
        for text in [*made.get_texts(), made.get_title()]:
            text.set(**self.font(), color=self.ink)

    def _colour_bar(self, mappable: ScalarMappable, bar: Any) -> None:
        x, y = self.point(either(bar.x, 1.02), either(bar.y, 0.5))
        length = bar.len if bar.lenmode == "pixels" else either(bar.len, 1.0) * self.plot_height
        length = min(length, self.plot_height) / self.height
        bottom = y - length if bar.yanchor == "top" else y - length / 2
        left, width = x + either(bar.xpad, 10) / self.width, either(bar.thickness, 30) / self.width
        made = self.canvas.colorbar(mappable, cax=self.canvas.add_axes((left, bottom, width, length)))
        if bar.tickvals is not None:
            made.set_ticks([float(value) for value in bar.tickvals])
        made.ax.tick_params(length=3 * POINT, width=0.6, colors=self.ink)
        for label in made.ax.get_yticklabels():
            label.set(**self.font())
        made.ax.set_ylabel(plain(bar.title.text), color=self.ink, **self.font(bar.title.font.size))
        for spine in made.ax.spines.values():
            spine.set_visible(False)

    def _place(self, reference: str | None, which: str) -> tuple[Any, str]:
        """The panel, and "data", "axes" or "paper" for the coordinates, that a reference such as "x2 domain" names."""
        if reference == "paper":
            return None, "paper"
        name, _, domain = (reference or which).partition(" ")  # the first axis where plotly was told nothing
        for (x_name, y_name), panel in self.panels.items():
            if name == (x_name if which == "x" else y_name):
                return panel, "axes" if domain else "data"
        raise NotImplementedError(f"a shape or annotation refers to the axis {reference!r}, on which nothing is drawn")

    def _line(self, shape: Any) -> None:
        (x_panel, x_system), (y_panel, y_system) = self._place(shape.xref, "x"), self._place(shape.yref, "y")
        panel = x_panel or y_panel
        if shape.type != "line" or panel is None:
            raise NotImplementedError(
                f"the matplotlib renderer draws shapes of type line on an axis, not a {shape.type} on the paper"
            )
        systems = {"data": panel.ax.transData, "axes": panel.ax.transAxes, "paper": panel.ax.transAxes}
        xs = panel.x.numbers([shape.x0, shape.x1]) if x_system == "data" else [shape.x0, shape.x1]
        ys = panel.y.numbers([shape.y0, shape.y1]) if y_system == "data" else [shape.y0, shape.y1]
        panel.ax.plot(
            xs,
            ys,
            transform=blended_transform_factory(systems[x_system], systems[y_system]),
            color=colour(shape.line.color) or self.ink,
            linewidth=either(shape.line.width, 2) * POINT,
            linestyle=DASHES[shape.line.dash or "solid"],
            zorder=1.5,
            scalex=False,
            scaley=False,
        )

    def _note(self, note: Any) -> None:
        if note.showarrow is not False:
            raise NotImplementedError("the matplotlib renderer draws no arrows; give the annotation showarrow=False")
        at = []
        for axis, which in enumerate("xy"):
            panel, system = self._place(note[f"{which}ref"], which)
            value = note[which]
            if system == "paper":
                at.append(self.point(value, value)[axis])
            elif system == "data":
                scale = panel.x if which == "x" else panel.y
                spot = panel.ax.transData.transform((scale.number(value), scale.number(value)))
                at.append(float(self.canvas.transFigure.inverted().transform(spot)[axis]))
            else:
                low, high = panel.ax.get_position().min[axis], panel.ax.get_position().max[axis]
                at.append(low + value * (high - low))
        x, y = at[0] + either(note.xshift, 0) / self.width, at[1] + either(note.yshift, 0) / self.height
        self.canvas.text(
            x,
            y,
            plain(note.text),
            ha={"left": "left", "right": "right"}.get(note.xanchor or "center", "center"),
            va={"top": "top", "bottom": "bottom"}.get(note.yanchor or "middle", "center"),
            rotation=-either(note.textangle, 0),
            color=colour(note.font.color) or self.ink,
            **self.font(note.font.size),
        )
