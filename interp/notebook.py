"""Opt-in settings for a notebook session."""

from __future__ import annotations

from typing import Any


def setup() -> None:
    """Show plotly figures as interactive plot and PNG together, so that no viewer of the notebook sees a blank cell.

    JupyterLab and VS Code draw the interactive version; GitHub, nbconvert and the study reports fall back to the PNG
    (drawn by kaleido where there is a browser, otherwise by matplotlib). Call it in the first cell. It sets plotly's
    default renderer for this process and nothing else; without this call the package leaves plotly alone.
    """
    import plotly.io
    from plotly.io.base_renderers import MimetypeRenderer

    class InteractiveAndPNG(MimetypeRenderer):
        def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
            return _mimebundle(fig_dict)

    plotly.io.renderers["interp"] = InteractiveAndPNG()
    plotly.io.renderers.default = "interp"


def _mimebundle(fig_dict: dict[str, Any]) -> dict[str, Any]:
    import base64
    import json

    import plotly.graph_objects as go

    from interp.plotting import png_bytes

    figure = go.Figure(fig_dict)
    return {
        "application/vnd.plotly.v1+json": json.loads(str(figure.to_json(validate=False))),
        "image/png": base64.b64encode(png_bytes(figure)).decode("ascii"),
    }
