"""Tests of PNG and HTML files: which renderer drew what, and that matplotlib draws the same data."""

from __future__ import annotations

import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import xarray as xr
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.colors import to_rgb

from interp import plotting
from interp.plotting import browser, raster
from interp.plotting.style import DIVERGING, UNMEASURED

needs_browser = pytest.mark.skipif(plotting.find_browser() is None, reason="no browser on this machine")


def pixels(png: bytes) -> np.ndarray:
    """`[row, column, channel]` of a PNG, through an independent reader."""
    import io

    from matplotlib.image import imread

    return imread(io.BytesIO(png), format="png")


def size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert zlib.crc32(png[12:29]) == struct.unpack(">I", png[29:33])[0]
    return struct.unpack(">II", png[16:24])


def test_matplotlib_draws_every_kind_of_figure(figures: dict[str, go.Figure]) -> None:
    for name, figure in figures.items():
        png = plotting.png_bytes(figure, renderer="matplotlib", scale=1)
        assert png.renderer == "matplotlib" and png.why == "asked for"
        assert size(png) == (figure.layout.width, figure.layout.height), name
        coarse = (pixels(png)[::4, ::4, :3] * 255).astype(int) @ [1, 256, 65536]
        assert len(np.unique(coarse)) > 10, name  # not an empty sheet


@needs_browser
def test_the_browser_draws_figures_and_is_started_once(figures: dict[str, go.Figure]) -> None:
    for name in ("heatmaps", "lines", "bars", "strip"):
        figure = figures[name]
        png = plotting.png_bytes(figure, scale=1)
        assert png.renderer == "kaleido", name
        assert size(png) == (figure.layout.width, figure.layout.height), name
        first = browser._shared
    assert plotting.png_bytes(figures["lines"], renderer="kaleido").renderer == "kaleido"
    assert browser._shared is first


@needs_browser
def test_both_renderers_put_the_same_colours_in_the_same_places(effects: xr.DataArray) -> None:
    """Cell centres of the two pictures agree: orientation, scale and geometry are the same."""
    figure = plotting.layer_position(effects, title="T", unit="logits")
    drawn = [pixels(plotting.png_bytes(figure, renderer=r, scale=1)) for r in ("kaleido", "matplotlib")]
    layout: Any = figure.layout
    left, top = layout.margin.l, layout.margin.t
    width, height = layout.width - left - layout.margin.r, layout.height - top - layout.margin.b
    for layer in range(5):
        for pos in range(8):
            row, column = int(top + (4.5 - layer) * height / 5), int(left + (pos + 0.5) * width / 8)
            a, b = (image[row, column, :3] for image in drawn)
            np.testing.assert_allclose(a, b, atol=0.02, err_msg=f"layer {layer}, position {pos}")
    grey = drawn[1][int(top + 3.5 * height / 5), int(left + 2.5 * width / 8), :3]
    np.testing.assert_allclose(grey, to_rgb(UNMEASURED), atol=0.01)


def test_matplotlib_heat_map_holds_the_same_data(effects: xr.DataArray) -> None:
    canvas = raster.draw(plotting.layer_position(effects, title="T $x$", unit="logits"))
    ax, bar = canvas.axes
    drawn, missing = (mesh for mesh in ax.collections if isinstance(mesh, QuadMesh))
    np.testing.assert_array_equal(np.ma.filled(drawn.get_array(), np.nan), effects.values)
    np.testing.assert_array_equal(np.ma.getmaskarray(missing.get_array()), ~np.isnan(effects.values))
    assert (drawn.norm.vmin, drawn.norm.vmax) == (-drawn.norm.vmax, float(np.nanmax(np.abs(effects))))
    np.testing.assert_allclose(drawn.cmap(1.0)[:3], to_rgb(DIVERGING[-1]))
    assert ax.get_ylim() == (-0.5, 4.5) and ax.get_xlim() == (-0.5, 7.5)  # layer 0 at the bottom
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == ["<bos>", "␣Mary [1]", "␣and", "␣John", "␣&amp;", "␣Mary [5]", "␣$5$", "↵"]
    assert not any(label.get_parse_math() for label in ax.get_xticklabels())  # dollars are not formulas
    assert (ax.get_xlabel(), ax.get_ylabel(), bar.get_ylabel()) == ("Position (token)", "Layer", "logits")
    assert {text.get_text() for text in canvas.texts} == {"T $x$", "grey: not measured"}


def test_matplotlib_puts_notes_where_their_cells_are() -> None:
    values = np.zeros((3, 4))
    values[2, 1], values[0, 3] = -9.0, 5.0
    canvas = raster.draw(plotting.layer_head(values, title="T", unit="u", label_top=2))
    to_cell = canvas.axes[0].transData.inverted()
    found = {t.get_text(): to_cell.transform(canvas.transFigure.transform(t.get_position())) for t in canvas.texts}
    np.testing.assert_allclose(found["L2H1"], [1, 2], atol=1e-6)
    np.testing.assert_allclose(found["L0H3"], [3, 0], atol=1e-6)


def test_matplotlib_turns_reversed_axes_and_places_panels(effects: xr.DataArray) -> None:
    figure = plotting.heatmaps({"a": effects, "b": 2 * effects}, title="T", unit="u", origin="top", columns=1)
    first, second, _bar = raster.draw(figure).axes
    assert first.get_ylim() == (4.5, -0.5)
    assert first.get_position().y0 > second.get_position().y1
    np.testing.assert_array_equal(np.ma.filled(second.collections[0].get_array(), np.nan), 2 * effects.values)


def test_matplotlib_lines_hold_values_and_bands(table: pd.DataFrame) -> None:
    figure = plotting.lines(
        table, x="layer", group="direction", interval=("low", "high"), reference=1, title="T", unit="u"
    )
    canvas = raster.draw(figure)
    (ax,) = canvas.axes
    curves = [line for line in ax.lines if len(line.get_xdata()) == 6]
    np.testing.assert_array_equal(curves[0].get_ydata(), [0, 1, 2, np.nan, 4, 5])
    np.testing.assert_array_equal(curves[1].get_ydata(), -0.5 * np.arange(6))
    assert len(ax.patches) == 3  # two parts of the broken band, one whole band
    np.testing.assert_array_equal(ax.patches[0].get_xy()[:3], [[0, 0.5], [1, 1.5], [2, 2.5]])
    assert ax.patches[0].get_facecolor()[3] == pytest.approx(0.2)
    assert [1, 1] in [list(line.get_ydata()) for line in ax.lines]  # the reference
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == ["denoise", "random head"]


@pytest.mark.parametrize("horizontal", [False, True])
def test_matplotlib_bars_hold_values_and_intervals(horizontal: bool) -> None:
    frame = pd.DataFrame({"h": ["a", "b"], "value": [2.0, -1.0], "low": [1.5, -0.5], "high": [3.0, 0.0]})
    figure = plotting.bars(frame, x="h", interval=("low", "high"), horizontal=horizontal, title="T", unit="u")
    (ax,) = raster.draw(figure).axes
    lengths = [patch.get_width() if horizontal else patch.get_height() for patch in ax.patches]
    assert lengths == [2.0, -1.0]
    # The second interval does not contain its value; it is drawn as given.
    ends = [segment[:, 0 if horizontal else 1].tolist() for segment in ax.collections[0].get_segments()]
    assert ends == [[1.5, 3.0], [-0.5, 0.0]]
    names = ax.get_yticklabels() if horizontal else ax.get_xticklabels()
    assert [name.get_text() for name in names] == ["a", "b"]


def test_matplotlib_strip_holds_every_example(figures: dict[str, go.Figure]) -> None:
    (ax,) = raster.draw(figures["strip"]).axes
    dots = [
        c.get_offsets()
        for c in ax.collections
        if not isinstance(c, (QuadMesh, PolyCollection)) and len(c.get_offsets())
    ]
    assert dots[0][:, 1].tolist() == [1.0, 2.0, 3.0] and dots[1][:, 1].tolist() == [0.0]


def test_figures_read_from_json_are_drawn_too(figures: dict[str, go.Figure]) -> None:
    for name in ("layer_position", "strip"):
        again = go.Figure(json.loads(figures[name].to_json()))
        assert plotting.png_bytes(again, renderer="matplotlib") == plotting.png_bytes(
            figures[name], renderer="matplotlib"
        )


def test_characters_without_a_font_do_not_warn() -> None:
    figure = plotting.heatmap(np.eye(1), dims=("layer", "pos"), x_labels=["\U00012345"], title="T", unit="u")
    assert size(plotting.png_bytes(figure, renderer="matplotlib", scale=1))


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        (go.Violin(y=[1, 2]), "cannot draw violin traces, only heatmap, scatter, bar"),
        (go.Scatter(x=[1], y=[1], mode="text", text=["a"]), "does not draw text in scatter traces"),
        (go.Scatter(x=[1], y=[1], fill="tozeroy"), "does not draw the fill 'tozeroy'"),
        (go.Scatter(x=[1], y=[1], mode="markers", marker={"symbol": "star"}), "does not draw the marker 'star'"),
        (go.Bar(x=[1], y=[1], text=["a"]), "does not draw text on bars"),
    ],
)
def test_matplotlib_refuses_what_it_cannot_draw(trace: Any, message: str) -> None:
    with pytest.raises(NotImplementedError, match=message):
        plotting.png_bytes(go.Figure(trace), renderer="matplotlib")


def test_without_a_browser_matplotlib_draws_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, figures: dict[str, go.Figure]
) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-browser"))
    assert plotting.find_browser() is None
    saved = plotting.save_png(figures["bars"], tmp_path / "new" / "bars.png", scale=1)
    assert saved.renderer == "matplotlib" and "no browser found" in saved.why
    assert size(saved.path.read_bytes()) == (figures["bars"].layout.width, figures["bars"].layout.height)
    assert [path.name for path in saved.path.parent.iterdir()] == ["bars.png"]
    with pytest.raises(RuntimeError, match="no browser found: install Chrome or Chromium, or set BROWSER_PATH"):
        plotting.png_bytes(figures["bars"], renderer="kaleido")


def test_without_browser_and_matplotlib_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, figures: dict[str, go.Figure]
) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-browser"))
    monkeypatch.setitem(sys.modules, "interp.plotting.raster", None)
    with pytest.raises(RuntimeError, match=r"no browser found.*pip install 'interp\[png\]'"):
        plotting.png_bytes(figures["bars"])


@needs_browser
def test_a_browser_that_does_not_start_is_reported_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, figures: dict[str, go.Figure]
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    browser.close()
    monkeypatch.setenv("BROWSER_PATH", str(broken))
    try:
        with pytest.warns(RuntimeWarning, match="did not start.*matplotlib drew the figure instead"):
            png = plotting.png_bytes(figures["lines"])
        assert png.renderer == "matplotlib" and str(broken) in png.why
        broken.unlink()
        broken.write_text("would hang")  # not executable: any further start would fail differently
        with pytest.raises(RuntimeError, match="did not start"):
            plotting.png_bytes(figures["lines"], renderer="kaleido")
    finally:
        browser.close()


def test_wrong_arguments_are_refused(tmp_path: Path, figures: dict[str, go.Figure]) -> None:
    with pytest.raises(ValueError, match="name it figure.png"):
        plotting.save_png(figures["lines"], tmp_path / "figure.pdf")
    with pytest.raises(TypeError, match="got dict"):
        plotting.save_html({}, tmp_path / "a.html")


def test_html_needs_no_network(tmp_path: Path, figures: dict[str, go.Figure]) -> None:
    page = plotting.save_html(figures["lines"], tmp_path / "deep" / "lines.html", plotlyjs="directory")
    assert (page.parent / "plotly.min.js").stat().st_size > 1_000_000
    text = page.read_text(encoding="utf-8")
    assert 'src="plotly.min.js"' in text and 'src="http' not in text
    alone = plotting.save_html(figures["lines"], tmp_path / "alone.html").read_text(encoding="utf-8")
    assert "<script src=" not in alone and len(alone) > 1_000_000
    view = plotting.attention_view(np.ones((1, 1, 1)), ["a"])
    assert plotting.save_html(view, tmp_path / "view.html").read_text(encoding="utf-8") == view.html()
