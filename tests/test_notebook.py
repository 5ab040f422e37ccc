"""What a notebook shows after `interp.notebook.setup()`."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import plotly.graph_objects as go
import plotly.io
import pytest

import interp


@pytest.fixture
def renderers() -> Iterator[None]:
    before = plotly.io.renderers.default
    yield
    plotly.io.renderers.default = before


def test_a_figure_is_shown_as_plot_and_as_picture(renderers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4]), layout={"width": 300, "height": 200})
    interp.notebook.setup()
    figure.show()
    (bundle,) = shown
    assert bundle["application/vnd.plotly.v1+json"]["data"][0]["type"] == "scatter"
    assert bundle["application/vnd.plotly.v1+json"]["layout"]["width"] == 300
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")


def test_calling_it_twice_changes_nothing(renderers: None) -> None:
    interp.notebook.setup()
    interp.notebook.setup()
    assert plotly.io.renderers.default == "interp"
