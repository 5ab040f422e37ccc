"""Tests of lines and bars: values, intervals, colours of roles, refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from interp import plotting
from interp.plotting.style import ROLE_COLOURS

WORDS = {"title": "T", "unit": "recovery (fraction)"}


def test_lines_hold_the_values_with_gaps_and_bands(table: pd.DataFrame) -> None:
    figure = plotting.lines(table, x="layer", group="direction", interval=("low", "high"), reference=1.0, **WORDS)
    band, line, _, other = figure.data
    np.testing.assert_array_equal(line.y, [0, 1, 2, np.nan, 4, 5])
    np.testing.assert_array_equal(line.customdata[:3], [[-0.25, 0.5], [0.75, 1.5], [1.75, 2.5]])
    assert line.line.color == ROLE_COLOURS["denoise"] != other.line.color
    # Two polygons, before and after the gap: there along the high end, back along the low end.
    np.testing.assert_array_equal(band.x, [0, 1, 2, 2, 1, 0, np.nan, 4, 5, 5, 4])
    np.testing.assert_array_equal(band.y, [0.5, 1.5, 2.5, 1.75, 0.75, -0.25, np.nan, 4.5, 5.5, 4.75, 3.75])
    assert figure.layout.shapes[0].y0 == figure.layout.shapes[0].y1 == 1.0
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("Layer", "recovery (fraction)")


def test_lines_sort_by_x_and_take_labelled_arrays() -> None:
    shuffled = pd.DataFrame({"layer": [2, 0, 1], "value": [5.0, 3.0, 4.0]})
    assert list(plotting.lines(shuffled, x="layer", **WORDS).data[0].y) == [3.0, 4.0, 5.0]
    array = xr.DataArray([[1.0, 2.0], [3.0, 4.0]], dims=("site", "layer"), coords={"site": ["z", "q"], "layer": [0, 1]})
    figure = plotting.lines(array, x="layer", group="site", **WORDS)
    assert {trace.name: list(trace.y) for trace in figure.data} == {"z": [1.0, 2.0], "q": [3.0, 4.0]}
    both = plotting.bars(xr.Dataset({"estimate": array[0], "low": array[0] - 1, "high": array[0] + 1}), x="layer",
                         y="estimate", interval=("low", "high"), **WORDS)  # fmt: skip
    assert list(both.data[0].error_y.array) == [1.0, 1.0]


def test_logarithmic_axes_have_ticks_between_powers_of_ten_and_refuse_zero() -> None:
    frame = pd.DataFrame({"n": [8, 16, 32], "value": [0.02, 0.3, 4.0], "low": [0.0, 0.2, 3.0], "high": [1.0, 1.0, 5.0]})
    figure = plotting.lines(frame, x="n", log_x=True, log_y=True, title="A title", unit="units")
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert {10, 20} < set(figure.layout.xaxis.tickvals) and {0.02, 0.05, 0.1, 1, 2} < set(figure.layout.yaxis.tickvals)
    wide = plotting.lines(frame.assign(n=[1, 10, 10_000]), x="n", log_x=True, title="A title", unit="units")
    assert list(wide.layout.xaxis.ticktext) == ["1", "10", "100", "1000", "10000"]
    with pytest.raises(ValueError, match="above 0, but 'low' has 0"):
        plotting.lines(frame, x="n", log_y=True, interval=("low", "high"), title="A title", unit="units")


def test_bars_keep_the_order_and_draw_the_interval() -> None:
    frame = pd.DataFrame(
        {"head": ["L9H6", "L2H1", "L<4>"], "value": [2.0, -1.0, 1.0], "low": [1.5, -3.0, 0.0], "high": [3.0, 0, 1]}
    )
    bar = plotting.bars(frame, x="head", interval=("low", "high"), **WORDS).data[0]
    assert list(bar.x) == ["L9H6", "L2H1", "L&lt;4&gt;"] and list(bar.y) == [2.0, -1.0, 1.0]
    assert list(bar.error_y.array) == [1.0, 1.0, 0.0] and list(bar.error_y.arrayminus) == [0.5, 2.0, 1.0]
    lying = plotting.bars(frame, x="head", interval=("low", "high"), horizontal=True, **WORDS)
    assert list(lying.data[0].x) == [2.0, -1.0, 1.0] and list(lying.data[0].error_x.array) == [1.0, 1.0, 0.0]
    assert lying.layout.yaxis.autorange == "reversed"  # the first name is at the top


def test_roles_have_the_same_colour_in_every_kind_of_figure(table: pd.DataFrame) -> None:
    frame = pd.DataFrame({"x": ["clean", "other"], "value": [1.0, 2.0]})
    assert plotting.bars(frame, x="x", **WORDS).data[0].marker.color[0] == ROLE_COLOURS["clean"]
    grouped = plotting.bars(frame.assign(run="clean"), x="x", group="run", **WORDS)
    assert grouped.data[0].marker.color == ROLE_COLOURS["clean"]
    assert plotting.strip({"clean": [1.0]}, **WORDS).data[0].marker.color == ROLE_COLOURS["clean"]


def test_refusals_say_what_to_do(table: pd.DataFrame) -> None:
    with pytest.raises(KeyError, match=r"no column 'directio'.*Did you mean 'direction'\?"):
        plotting.lines(table, x="layer", group="directio", **WORDS)
    with pytest.raises(ValueError, match=r"several values at layer=0.*group="):
        plotting.lines(table, x="layer", **WORDS)
    with pytest.raises(ValueError, match="several bars for layer=0"):
        plotting.bars(table, x="layer", **WORDS)
    with pytest.raises(ValueError, match=r"row 0 ends below its start: \[0\.5, -0\.25\]"):
        plotting.lines(table, x="layer", group="direction", interval=("high", "low"), **WORDS)
    with pytest.raises(ValueError, match=r"numbers on the x axis.*use bars"):
        plotting.lines(table, x="direction", y="layer", **WORDS)
    with pytest.raises(ValueError, match="all of the column 'value' is NaN"):
        plotting.lines(table.assign(value=np.nan), x="layer", group="direction", **WORDS)
    long = pd.DataFrame({"pos": range(20_001), "value": 0.0})
    with pytest.raises(ValueError, match=r"20001 points.*20000.*average first"):
        plotting.lines(long, x="pos", **WORDS)
