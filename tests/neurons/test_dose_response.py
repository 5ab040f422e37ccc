"""Slopes, tables and contrasts of dose responses against numbers made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xarray as xr

from interp.neurons import DoseResponse, clamp
from interp.results import labelled, load
from interp.stats import bootstrap_interval, paired_test
from tests.helpers import tiny_bridge, tiny_tokens

DOSES = np.array([0.0, 1.0, 3.0])
SLOPES = {"clamped": 2.0, "matched 1": 0.5, "matched 2": 0.1, "random 1": -0.2}


def made(n: int = 12) -> DoseResponse:
    """Two neurons whose effect is slope x dose, times one plus a number of the example; the second twice the first."""
    arms = list(SLOPES)
    factor = 1 + 0.1 * np.arange(n)
    values = np.array([[[s * d * scale * factor for d in DOSES] for s in SLOPES.values()] for scale in (1.0, 2.0)])
    coords: dict[str, Any] = {
        "neuron": ["L0 N1", "L1 N2"], "arm": arms, "kind": ("arm", [arm.split()[0] for arm in arms]),
        "level": DOSES, "label_token": ("neuron", [" cat", ""]),
    }  # fmt: skip
    dims = ("neuron", "arm", "level", "example")

    def array(numbers: np.ndarray, d: tuple[str, ...] = dims) -> xr.DataArray:
        return labelled(numbers, d, {k: v for k, v in coords.items() if k != "level" or "level" in d}, unit="logits")

    rank = np.broadcast_to(np.arange(n, dtype=float), values.shape).copy()
    rank[:, :, 0] = np.nan  # a dose of zero changes nothing
    return DoseResponse(
        values=array(values),
        provenance={"metric": "logit_difference", "mode": "set"},
        doses=array(np.broadcast_to(DOSES, (2, 4, 3)), dims[:3]),
        label_log_prob=array(values / 10),
        label_rank=array(rank),
        kl=array(values**2),
        baseline=labelled(np.zeros(n), ("example",)),
    )


def test_slopes_are_least_squares_by_example_and_draws_are_averaged():
    found = made().slopes().set_index(["neuron", "kind"])
    factor = 1 + 0.1 * np.arange(12)
    for neuron, scale in (("L0 N1", 1), ("L1 N2", 2)):
        for kind, slope in (("clamped", 2.0), ("matched", 0.3), ("random", -0.2)):
            row = found.loc[(neuron, kind)]
            expected = bootstrap_interval(slope * scale * factor)
            assert row["slope"] == pytest.approx(expected.estimate, rel=1e-5)
            assert row["low"] == pytest.approx(expected.low, rel=1e-4)
            assert row["high"] == pytest.approx(expected.high, rel=1e-4)
    # an intercept does not matter, a curve is fitted by the line that numpy fits
    curved = made()
    curved.values.values[0, 0] = (5 + DOSES**2)[:, None]
    assert curved.slopes()["slope"][0] == pytest.approx(np.polyfit(DOSES, DOSES**2, 1)[0], rel=1e-5)
    assert made().slopes(confidence=0.5)["low"][0] > made().slopes()["low"][0]


def test_a_slope_needs_two_doses_and_a_control_without_is_left_out():
    single = made()
    single.doses.values[1, 2] = 4.0
    found = single.slopes().set_index(["neuron", "kind"])["slope"]
    assert found["L1 N2", "matched"] == pytest.approx(2 * 0.5 * 1.55, rel=1e-5)
    assert found["L0 N1", "matched"] == pytest.approx(0.3 * 1.55, rel=1e-5)
    single.doses.values[1, 1] = 4.0
    assert np.isnan(single.slopes().set_index(["neuron", "kind"])["slope"]["L1 N2", "matched"])
    single.doses.values[1, 0] = 4.0
    with pytest.raises(ValueError, match="L1 N2 has one dose only"):
        single.slopes()


def test_the_table_averages_draws_and_examples():
    table = made().table().set_index(["neuron", "kind", "level"])
    row = table.loc[("L1 N2", "matched", 3.0)]
    factor = 1 + 0.1 * np.arange(12)
    effects = np.stack([2 * s * 3.0 * factor for s in (0.5, 0.1)])
    interval = bootstrap_interval(effects.mean(0))
    assert row["dose"] == 3.0
    assert (row["effect"], row["low"], row["high"]) == pytest.approx(tuple(map(float, interval)), rel=1e-4)
    assert row["label_log_prob"] == pytest.approx(effects.mean() / 10, rel=1e-5)
    assert row["kl"] == pytest.approx((effects**2).mean(), rel=1e-5)
    assert row["label_rank"] == 5.5 and np.isnan(table.loc[("L0 N1", "clamped", 0.0), "label_rank"])
    assert len(table) == 2 * 3 * 3


def test_contrasts_are_paired_by_example():
    factor = 1 + 0.1 * np.arange(12)
    for against, slope in (("matched", 0.3), ("random", -0.2)):
        for level, dose in ((-1, 3.0), (1, 1.0)):
            row = made().contrast(against, level=level).iloc[1]
            difference = 2 * (2.0 - slope) * dose * factor
            interval = bootstrap_interval(difference)
            assert row["clamped"] == pytest.approx(4.0 * dose * factor.mean(), rel=1e-5)
            assert row[against] == pytest.approx(2 * slope * dose * factor.mean(), rel=1e-5)
            assert (row["difference"], row["low"], row["high"]) == pytest.approx(tuple(map(float, interval)), rel=1e-4)
            assert row["p_value"] == pytest.approx(float(paired_test(difference)))
    assert made().contrast(quantity="label_log_prob")["clamped"][0] == pytest.approx(0.6 * factor.mean(), rel=1e-5)
    with pytest.raises(ValueError, match="quantity='effect'"):
        made().contrast(quantity="effect")
    with pytest.raises(ValueError, match="this result has 'matched', 'random'"):
        made().contrast("uniform")


def test_contrasts_leave_out_examples_that_one_side_does_not_have():
    found = made()
    rng = np.random.default_rng(0)
    found.label_rank.values[:, :, -1] = ranks = rng.integers(0, 50, (2, 4, 12))
    found.label_rank.values[0, 0, -1, 3] = found.label_rank.values[0, 1:3, -1, 5] = np.nan
    found.label_rank.values[0, 1, -1, 7] = np.nan  # the other draw is left
    table = found.contrast(quantity="label_rank")
    own, other = ranks[:, 0].astype(float), ranks[:, 1:3].mean(1)
    other[0, 7] = ranks[0, 2, 7]
    kept = [np.delete(np.arange(12), [3, 5]), np.arange(12)]
    assert list(table["n"]) == [10, 12] and list(made().contrast()["n"]) == [12, 12]
    for neuron, rows in enumerate(kept):
        row, difference = table.iloc[neuron], (own - other)[neuron, rows]
        assert row["clamped"] == pytest.approx(own[neuron, rows].mean())
        assert row["matched"] == pytest.approx(other[neuron, rows].mean())
        interval = tuple(map(float, bootstrap_interval(difference)))
        assert (row["difference"], row["low"], row["high"]) == pytest.approx(interval)
        assert row["p_value"] == pytest.approx(float(paired_test(difference)))
    nothing = made().contrast(quantity="label_rank", level=0)  # changes nothing, so there is no rank at all
    assert list(nothing["n"]) == [0, 0]
    assert np.isnan(nothing[["clamped", "matched", "difference", "low", "high", "p_value"]].to_numpy()).all()


def test_the_figure_has_a_line_per_kind_at_the_doses_of_the_neuron():
    figure = made().plot("L0 N1")
    drawn = {trace.name: trace for trace in figure.data if trace.mode and "lines" in trace.mode and trace.showlegend}
    assert set(drawn) == {"clamped", "matched", "random"}
    assert list(drawn["matched"].x) == list(DOSES)
    np.testing.assert_allclose(drawn["clamped"].y, 2 * DOSES * 1.55, rtol=1e-5)
    assert "' cat'" in figure.layout.title.text and "logit_difference (logits)" in figure.layout.yaxis.title.text
    assert made().plot(-1).layout.title.text.startswith("L1 N2: effect")
    for wrong in (2, "L9 N9"):
        with pytest.raises(ValueError, match="no neuron"):
            made().plot(wrong)
    renamed = replace(made(), provenance={"metric": "m", "mode": "scale"})
    assert renamed.plot().layout.xaxis.title.text == "factor on the activation"


def test_results_are_kept_in_files_and_sets_are_named(tmp_path: Any):
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(4, 6)
    sets = {"a": [(0, 1), (0, 2)], "b": [(1, 1)]}
    found = clamp(bridge, tokens, sets, [0.0, 2.0], labels=[3, 4], n_controls=1)
    again = load(found.save(tmp_path / "d.nc"))
    assert isinstance(again, DoseResponse)
    for name in ("values", "doses", "label_log_prob", "label_rank", "kl"):
        assert getattr(again, name).equals(getattr(found, name)), name
    assert again.provenance == found.provenance and again.unit == "set"
    assert list(found.table()["set"].unique()) == ["a", "b"]
    assert list(found.values["label_token"].values) == ["w3", "w4"]
    assert found.plot("b").data and len(found.slopes()) == 6
    alone = clamp(bridge, tokens, [(0, 1)], None, labels=[3], mode="ablate", controls=())
    assert list(alone.values["level"].values) == ["ablated"] and list(alone.values["index"].values) == [1]
    with pytest.raises(ValueError, match="one dose only"):
        alone.slopes()
    with pytest.raises(ValueError, match="no control"):
        alone.contrast()
