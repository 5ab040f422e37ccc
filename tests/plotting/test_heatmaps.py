"""Tests of heat maps: what is drawn where, the colour range, unmeasured cells, labels, refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from interp import plotting
from interp.plotting.style import DIVERGING, SEQUENTIAL, UNMEASURED

WORDS = {"title": "T", "unit": "logits"}


def test_layer_position_holds_the_values_with_layer_zero_at_the_bottom(effects: xr.DataArray) -> None:
    figure = plotting.layer_position(effects, title="T", unit="logits")
    trace = figure.data[0]
    np.testing.assert_array_equal(trace.z, effects.values)
    assert list(trace.y) == [0, 1, 2, 3, 4]
    assert figure.layout.yaxis.autorange is None  # plotly's default: values grow upwards
    assert figure.layout.yaxis.title.text == "Layer"
    assert figure.layout.xaxis.title.text == "Position (token)"
    assert figure.layout.coloraxis.colorbar.title.text == "logits"
    assert figure.layout.title.text == "T"


def test_tokens_become_unique_escaped_labels_in_order(effects: xr.DataArray) -> None:
    labels = list(plotting.layer_position(effects, **WORDS).data[0].x)
    assert labels == ["&lt;bos&gt;", "␣Mary [1]", "␣and", "␣John", "␣&amp;amp;", "␣Mary [5]", "␣&#36;5&#36;", "↵"]
    given = plotting.layer_position(effects, list("abcdefgh"), **WORDS)
    assert list(given.data[0].x) == list("abcdefgh")
    with pytest.raises(ValueError, match="got 2 tokens for 8 positions"):
        plotting.layer_position(effects, ["a", "b"], **WORDS)


def test_dimensions_may_come_in_any_order_and_as_tensors(effects: xr.DataArray) -> None:
    straight = plotting.layer_position(effects, hover={"low": effects - 1}, **WORDS).data[0]
    turned = plotting.layer_position(effects.transpose("pos", "layer"), hover={"low": (effects - 1).T}, **WORDS).data[0]
    np.testing.assert_array_equal(straight.z, turned.z)
    np.testing.assert_array_equal(straight.customdata, turned.customdata)
    tensor = torch.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(plotting.layer_head(tensor, **WORDS).data[0].z, tensor.numpy())


@pytest.mark.parametrize("values", [[[1.0, -3.0], [2.0, 0.5]], [[5.0, 1.0], [2.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]]])
def test_signed_values_have_a_scale_centred_on_zero(values: list[list[float]]) -> None:
    axis = plotting.heatmap(np.array(values), dims=("a", "b"), **WORDS).layout.coloraxis
    assert axis.cmin == -axis.cmax
    assert axis.cmax == (np.abs(values).max() or 1.0)
    assert [colour for _, colour in axis.colorscale] == list(DIVERGING)
    assert axis.colorscale[5] == (0.5, "#f7f7f7")


def test_unsigned_values_start_at_zero_and_limit_fixes_the_range() -> None:
    axis = plotting.heatmap(np.array([[1.0, 4.0]]), dims=("a", "b"), signed=False, **WORDS).layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0.0, 4.0)
    assert [colour for _, colour in axis.colorscale] == list(SEQUENTIAL)
    fixed = plotting.heatmap(np.array([[1.0, 4.0]]), dims=("a", "b"), limit=2, **WORDS).layout.coloraxis
    assert (fixed.cmin, fixed.cmax) == (-2, 2)


def test_unmeasured_cells_are_grey_and_say_so(effects: xr.DataArray) -> None:
    figure = plotting.layer_position(effects, **WORDS)
    drawn, missing = figure.data
    np.testing.assert_array_equal(np.isfinite(missing.z), np.isnan(effects.values))
    assert {colour for _, colour in missing.colorscale} == {UNMEASURED}
    assert "not measured" in missing.hovertemplate
    assert drawn.hoverongaps is False and missing.hoverongaps is False  # so that exactly one of them answers
    assert "grey: not measured" in [note.text for note in figure.layout.annotations]
    complete = plotting.layer_position(effects.fillna(0.0), **WORDS)
    assert len(complete.data) == 1 and not complete.layout.annotations


def test_hover_names_the_cell_the_unit_and_further_arrays(effects: xr.DataArray) -> None:
    trace = plotting.layer_position(effects, hover={"low": effects - 1, "high": effects + 1}, **WORDS).data[0]
    assert trace.hovertemplate == (
        "layer: %{y}<br>position: %{x}<br>%{z:.4g} logits<br>low: %{customdata[0]:.4g}<br>"
        "high: %{customdata[1]:.4g}<extra></extra>"
    )
    np.testing.assert_allclose(trace.customdata[2, 3], [effects[2, 3] - 1, effects[2, 3] + 1])
    heads = plotting.layer_head(np.zeros((2, 3)), **WORDS).data[0]
    assert heads.hovertemplate.startswith("L%{y}H%{x}<br>")
    with pytest.raises(ValueError, match=r"hover\['low'\] has shape \(2, 2\)"):
        plotting.layer_position(effects, hover={"low": np.zeros((2, 2))}, **WORDS)


def test_layer_head_labels_the_strongest_cells() -> None:
    values = np.zeros((3, 4))
    values[2, 1], values[0, 3], values[1, 0] = -9.0, 5.0, np.nan
    notes = plotting.layer_head(values, label_top=2, **WORDS).layout.annotations[1:]  # the first explains the grey
    assert [(n.text, n.x, n.y) for n in notes] == [("L2H1", 1, 2), ("L0H3", 3, 0)]


def test_scattered_layers_and_named_positions_keep_their_labels() -> None:
    values = xr.DataArray(np.eye(3), dims=("layer", "pos"), coords={"layer": [0, 4, 8], "pos": ["io", "s1", "end"]})
    figure = plotting.layer_position(values, **WORDS)
    assert list(figure.data[0].y) == ["0", "4", "8"] and list(figure.data[0].x) == ["io", "s1", "end"]
    assert figure.layout.yaxis.type == "category"


def test_frames_and_repeated_labels() -> None:
    frame = pd.DataFrame([[1.0, 2.0]], index=pd.Index(["a"], name="task"), columns=pd.Index(["x", "y"], name="method"))
    figure = plotting.heatmap(frame, **WORDS)
    assert (figure.layout.yaxis.title.text, figure.layout.xaxis.title.text) == ("Task", "Method")
    assert list(figure.data[0].x) == ["x", "y"]
    twice = plotting.heatmap(np.zeros((1, 2)), dims=("a", "b"), x_labels=["s", "s"], **WORDS)
    assert list(twice.data[0].x) == ["s [0]", "s [1]"]  # equal categories would fall into one column


def test_panels_share_one_scale_and_equal_axes(effects: xr.DataArray) -> None:
    figure = plotting.heatmaps({"resid_pre": effects, "attn_out": 3 * effects}, columns=2, **WORDS)
    limit = 3 * float(np.nanmax(np.abs(effects)))
    assert figure.layout.coloraxis.cmax == pytest.approx(limit)
    assert {t.coloraxis for t in figure.data if t.name != "not measured"} == {"coloraxis"}
    assert [t.xaxis for t in figure.data] == ["x", "x", "x2", "x2"]
    assert (figure.layout.yaxis.showticklabels, figure.layout.yaxis2.showticklabels) == (None, False)
    assert figure.layout.xaxis.domain[1] < figure.layout.xaxis2.domain[0]
    assert [n.text for n in figure.layout.annotations][:2] == ["resid_pre", "attn_out"]
    stacked = plotting.heatmaps({"a": effects, "b": effects[:, :3]}, columns=1, **WORDS)
    assert stacked.layout.yaxis.domain[0] > stacked.layout.yaxis2.domain[1]  # first panel on top
    assert stacked.layout.yaxis2.showticklabels is None  # the axes differ, so nothing is shared
    with pytest.raises(ValueError, match="no panels"):
        plotting.heatmaps({}, **WORDS)


def test_large_arrays_are_refused_and_the_limit_keeps_figures_small() -> None:
    with pytest.raises(ValueError, match=r"262144 cells \(512x512\).*40000.*coarsen"):
        plotting.heatmap(np.zeros((512, 512)), dims=("layer", "pos"), **WORDS)
    largest = plotting.heatmap(np.zeros((200, 200)), dims=("layer", "pos"), **WORDS)
    assert len(largest.to_json()) < 300_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (xr.DataArray(np.zeros((2, 3, 4)), dims=("layer", "pos", "example")), r"values\.mean\(\"example\"\)"),
        (xr.DataArray(np.full((2, 2), np.nan), dims=("layer", "pos")), "every cell is NaN"),
        (xr.DataArray([[0.0, np.inf]], dims=("layer", "pos")), r"infinite at \[0, 1\]"),
        (xr.DataArray(np.zeros((0, 2)), dims=("layer", "pos")), "no cells"),
        (xr.DataArray(np.zeros((2, 2)), dims=("a", "b")), r"layer and pos but got \('a', 'b'\)"),
        (np.zeros(3), r"\[layer, pos\] but got an array of shape \(3,\)"),
    ],
)
def test_refusals_say_what_to_do(values: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plotting.layer_position(values, **WORDS)


def test_further_refusals() -> None:
    with pytest.raises(ValueError, match="pass dims="):
        plotting.heatmap(np.zeros((2, 2)), **WORDS)
    with pytest.raises(ValueError, match="got 1 labels for the dimension 'b' of size 2"):
        plotting.heatmap(np.zeros((2, 2)), dims=("a", "b"), x_labels=["x"], **WORDS)
    with pytest.raises(ValueError, match="limit must be positive"):
        plotting.heatmap(np.zeros((2, 2)), dims=("a", "b"), limit=-1, **WORDS)


def test_unit_comes_from_the_values_when_it_is_not_given(effects: xr.DataArray) -> None:
    figure = plotting.layer_position(effects.assign_attrs(unit="nats"))
    assert figure.layout.coloraxis.colorbar.title.text == "nats"


def test_every_figure_is_compact_and_carries_no_foreign_template(figures: dict) -> None:
    for name, figure in figures.items():
        assert figure.layout.template.layout.plot_bgcolor is None, name
        assert len(figure.to_json()) < 12_000, name
        assert figure.layout.title.text, name
