"""Figures for labelled results: arrays and dataframes in, plotly `Figure` out.

Nothing here imports a model, shows a figure or touches plotly's global template. Every figure carries its own layout
(`style.py`), axis names come from the dimensions of the data, signed effects get a diverging scale centred on zero, and
cells that were not measured (NaN) are grey.
"""

from interp.plotting.attention import MAX_PATTERN, AttentionView, attention_view
from interp.plotting.browser import find_browser
from interp.plotting.circuits import circuit_graph
from interp.plotting.export import PNG, SavedPNG, png_bytes, save_html, save_png
from interp.plotting.feature_circuits import feature_graph
from interp.plotting.heatmaps import heatmap, heatmaps, layer_head, layer_position
from interp.plotting.scatter import scatter
from interp.plotting.series import bars, lines
from interp.plotting.strips import strip
from interp.plotting.style import MAX_CELLS, MAX_POINTS, ROLE_COLOURS, token_labels, visible_token
from interp.plotting.text import MAX_FIGURE_TOKENS, ColouredText, coloured_text

__all__ = [
    "AttentionView",
    "ColouredText",
    "MAX_CELLS",
    "MAX_FIGURE_TOKENS",
    "MAX_PATTERN",
    "MAX_POINTS",
    "PNG",
    "ROLE_COLOURS",
    "SavedPNG",
    "attention_view",
    "bars",
    "circuit_graph",
    "coloured_text",
    "feature_graph",
    "find_browser",
    "heatmap",
    "heatmaps",
    "layer_head",
    "layer_position",
    "lines",
    "png_bytes",
    "save_html",
    "save_png",
    "scatter",
    "strip",
    "token_labels",
    "visible_token",
]
