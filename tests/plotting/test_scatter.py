"""Tests of scatter plots: points, panels, colours, the line of equality, both renderers' input, refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from interp import plotting
from interp.plotting import raster
from interp.plotting.style import ROLE_COLOURS


@pytest.fixture
def cells() -> pd.DataFrame:
    """Two methods x two sites x three layers; method "b" is twice "a", and site "z" of "a" was not measured."""
    rows = []
    for method, factor in (("a", 1.0), ("b", 2.0)):
        for site in ("mlp_out", "z"):
            for layer in range(3):
                score = np.nan if (method, site) == ("a", "z") else factor * (layer - 1) + 0.1 * layer**2
                rows.append(
                    {"method": method, "site": site, "layer": layer, "head": f"<{layer}>", "exact": layer - 1.0,
                     "score": score, "role": "clean" if layer else "other"}
                )  # fmt: skip
    return pd.DataFrame(rows)


def draw(cells: pd.DataFrame, **options: object) -> object:
    return plotting.scatter(cells, x="exact", y="score", title="T", **options)  # type: ignore[arg-type]


def test_one_panel_shows_every_point_and_the_line_of_equality(cells: pd.DataFrame) -> None:
    figure = draw(cells[:3], colour="layer", hover=["head"], x_title="exact (logits)")
    (points,) = figure.data
    assert list(points.x) == [-1, 0, 1] and list(points.y) == [-1.0, 0.1, 1.4]
    assert list(points.marker.color) == [0, 1, 2] and points.marker.coloraxis == "coloraxis"
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 2)
    assert list(figure.layout.coloraxis.colorbar.tickvals) == [0, 1, 2]
    assert list(map(list, points.customdata)) == [["0", "&lt;0&gt;"], ["1", "&lt;1&gt;"], ["2", "&lt;2&gt;"]]
    assert points.hovertemplate.startswith("layer: %{customdata[0]}<br>head: %{customdata[1]}<br>exact: %{x:.4g}")
    (line,) = figure.layout.shapes
    assert (line.x0, line.x1) == (line.y0, line.y1)
    x_range, y_range = figure.layout.xaxis.range, figure.layout.yaxis.range
    assert line.x0 == max(x_range[0], y_range[0]) and line.x1 == min(x_range[1], y_range[1])
    assert x_range[0] < -1 < 1 < x_range[1] and y_range[0] < -1 < 1.4 < y_range[1]
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("exact (logits)", "Score")
    assert not figure.layout.annotations  # no name, and no correlation unless asked for
    assert not draw(cells[:3], identity=False).layout.shapes


def test_panels_are_in_rows_and_columns_under_their_name_and_correlation(cells: pd.DataFrame) -> None:
    figure = draw(cells, row="method", column="site", colour="layer")
    assert len(figure.data) == 3 and len(figure.layout.shapes) == 3  # one panel has nothing measured
    names = [note.text for note in figure.layout.annotations]
    r = np.corrcoef([-1, 0, 1], [-1.0, 0.1, 1.4])[0, 1]
    assert names[0] == f"a · mlp_out · r = {r:.3f}" and names[1].startswith("b · mlp_out") and "b · z" in names[2]
    layout = figure.layout
    assert layout.xaxis.domain == layout.xaxis2.domain and layout.yaxis2.domain[1] < layout.yaxis.domain[0]
    assert layout.xaxis3.domain[0] > layout.xaxis2.domain[1] and layout.yaxis3.domain == layout.yaxis2.domain
    # titles at the left and the bottom only
    assert [bool(layout[f"yaxis{i}"].title.text) for i in ("", 2, 3)] == [True, True, False]
    assert [bool(layout[f"xaxis{i}"].title.text) for i in ("", 2, 3)] == [False, True, True]
    assert [trace.xaxis for trace in figure.data] == ["x", "x2", "x3"]


def test_names_are_coloured_by_role_with_one_legend_entry_each(cells: pd.DataFrame) -> None:
    figure = draw(cells, row="method", colour="role")
    assert {trace.name: trace.marker.color for trace in figure.data}["clean"] == ROLE_COLOURS["clean"]
    assert sorted(trace.name for trace in figure.data if trace.showlegend) == ["clean", "other"]
    assert len(figure.data) == 4
    canvas = raster.draw(figure)
    assert sorted(text.get_text() for text in canvas.legends[0].get_texts()) == ["clean", "other"]


def test_any_number_of_panels_fits() -> None:
    for count in (3, 7, 8):  # the last domain ends at 0, which rounding must not pass
        frame = pd.DataFrame({"exact": np.arange(3.0 * count), "score": 1.0, "site": np.repeat(range(count), 3)})
        for way in ("row", "column"):
            assert len(draw(frame, **{way: "site"}).data) == count


def test_correlation_of_constant_points_is_undefined(cells: pd.DataFrame) -> None:
    figure = draw(cells[:3].assign(score=1.0), correlation=True)
    assert figure.layout.annotations[0].text == "r undefined"


def test_matplotlib_draws_the_same_points_colours_lines_and_bar(cells: pd.DataFrame) -> None:
    figure = draw(cells, row="method", column="site", colour="layer")
    canvas = raster.draw(figure)
    *panels, bar = canvas.axes
    assert len(panels) == 3
    for ax, trace, shape in zip(panels, figure.data, figure.layout.shapes, strict=True):
        (dots,) = (c for c in ax.collections if len(c.get_offsets()))
        np.testing.assert_array_equal(dots.get_offsets(), np.column_stack([trace.x, trace.y]))
        np.testing.assert_array_equal(dots.get_array(), [0, 1, 2])
        dots.update_scalarmappable()
        np.testing.assert_allclose(dots.get_facecolors()[0][:3], to_rgba("#440154")[:3], atol=0.01)
        assert dots.get_facecolors()[0][3] == pytest.approx(0.75)
        ends = [list(line.get_xdata()) for line in ax.lines]
        assert [shape.x0, shape.x1] in ends
    assert bar.get_ylabel() == "Layer" and [t.get_text() for t in bar.get_yticklabels()] == ["0", "1", "2"]
    assert all(cell.get_alpha() in (None, 1) for cell in bar.collections)  # the bar is not as pale as the points


def test_refusals_say_what_to_do(cells: pd.DataFrame) -> None:
    with pytest.raises(KeyError, match=r"no column 'exakt'.*Did you mean 'exact'\?"):
        plotting.scatter(cells, x="exakt", y="score", title="T")
    with pytest.raises(ValueError, match="scatter needs numbers but the column 'head'"):
        plotting.scatter(cells, x="head", y="score", title="T")
    with pytest.raises(ValueError, match="1 points are infinite"):
        draw(cells[:3].assign(exact=[0.0, 1.0, np.inf]))
    with pytest.raises(ValueError, match="no row has both 'exact' and 'score'"):
        draw(cells[:3].assign(exact=[np.nan] * 3))
    with pytest.raises(ValueError, match=r"20001 points.*20000"):
        draw(pd.DataFrame({"exact": np.arange(20_001.0), "score": 0.0}))
