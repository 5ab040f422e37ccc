"""A plotly figure drawn by matplotlib, for machines without a browser.

Covers what this package makes: heat maps with a shared or own colour scale, scatter traces (lines, markers, bands,
error bars), grouped bars, straight lines, annotations, several panels. Anything else raises; nothing is left out
silently.
"""

# ruff: noqa: TID253 (only export.py imports this package, and only when it draws)

from __future__ import annotations

import io
import warnings
from typing import Any

import plotly.graph_objects as go
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from interp.plotting.raster.convert import colour, decoded
from interp.plotting.raster.page import Page
from interp.plotting.raster.panel import Panel
from interp.plotting.raster.traces import DRAWERS

SUPPORTED: tuple[str, ...] = tuple(DRAWERS)
"""Kinds of trace that can be drawn."""


def draw(figure: go.Figure, *, width: int | None = None, height: int | None = None) -> Figure:
    """The figure as a matplotlib figure: one axes per panel in order of appearance, then one per colour bar.

    pyplot is not involved, so no global state changes and nothing has to be closed.

    Raises:
        NotImplementedError: If a trace, or something it asks for (a fill, a marker, an arrow), is of a kind that is not
            drawn; the message lists what is.
    """
    given: Any = figure.data  # plotly declares no types of traces
    unknown = sorted({trace.type for trace in given} - set(SUPPORTED))
    if unknown:
        raise NotImplementedError(
            f"the matplotlib renderer cannot draw {', '.join(unknown)} traces, only {', '.join(SUPPORTED)}; "
            "install Chrome or Chromium for the others, or save HTML with save_html"
        )
    # A figure that was read from JSON (a notebook's outputs, for one) keeps its arrays in base64.
    figure = go.Figure(decoded(figure.to_dict()))
    drawn: Any = figure.data
    layout: Any = figure.layout
    width, height = int(width or layout.width or 700), int(height or layout.height or 450)
    # 100 dots per inch: one layout pixel is one dot before scaling.
    canvas = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor=colour(layout.paper_bgcolor) or "white")
    FigureCanvasAgg(canvas)
    page = Page(canvas, layout, width, height)
    traces_of: dict[tuple[str, str], list[Any]] = {}
    for trace in drawn:
        if trace.visible in (None, True):
            traces_of.setdefault((trace.xaxis or "x", trace.yaxis or "y"), []).append(trace)
    for (x_name, y_name), traces in traces_of.items():
        panel = Panel(page, x_name, y_name, traces)
        bars = [trace for trace in traces if trace.type == "bar"]
        for trace in traces:
            if trace.type == "bar":
                DRAWERS["bar"](panel, trace, bars.index(trace), len(bars))
            else:
                DRAWERS[trace.type](panel, trace)
        panel.decorate()
    page.finish()
    return canvas


def to_png(canvas: Figure, scale: float | int) -> bytes:
    """PNG bytes with `scale` image pixels per layout pixel."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        # A character that no installed font has is drawn as a box, which tells the reader as much as a warning would.
        warnings.filterwarnings("ignore", message=r"(Glyph .* missing from|Matplotlib currently does not support)")
        canvas.savefig(stream, format="png", dpi=100 * scale, facecolor=canvas.get_facecolor())
    return stream.getvalue()
