"""Statistics of neurons against direct formulas, and control neurons that are alike where it counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from interp.cache import capture
from interp.hooks import hook_name
from interp.models import geometry
from interp.neurons import NeuronStatistics, match_neurons, neuron_statistics
from interp.results import labelled, load
from tests.helpers import FAMILIES, tiny_bridge, tiny_tokens
from tests.neurons.test_clamping import counting, no_forward


@pytest.mark.parametrize(("family", "masked"), [*((family, False) for family in FAMILIES), ("llama", True)])
def test_statistics_equal_direct_formulas(family: str, masked: bool):
    bridge, tokens = tiny_bridge(family), tiny_tokens(7, 11)
    mask = (torch.arange(77).reshape(7, 11) % 3 != 0) if masked else None
    found = neuron_statistics(bridge, tokens, mask=mask, batch_size=3, quantiles=(0.25, 0.999))
    for layer in range(3):
        name = hook_name("neuron", layer)
        rows = capture(bridge, tokens, name)[name]
        rows = rows.flatten(0, 1) if mask is None else rows[mask]
        rows = rows.double().numpy()
        cut = np.median(np.sqrt((rows**2).mean(0)))
        expected = {
            "frequency": (np.abs(rows) > cut).mean(0), "positive": (rows > 0).mean(0), "negative": (rows < 0).mean(0),
            "mean": rows.mean(0), "rms": np.sqrt((rows**2).mean(0)), "min": rows.min(0), "max": rows.max(0),
            "q25": np.quantile(rows, 0.25, axis=0), "q99.9": np.quantile(rows, 0.999, axis=0),
            "output_norm": bridge.blocks[layer].mlp.W_out.norm(dim=1).numpy(),
        }  # fmt: skip
        assert list(found.values["statistic"].values) == list(expected)
        for statistic, numbers in expected.items():
            np.testing.assert_allclose(found.column(statistic)[layer], numbers, rtol=1e-4, atol=1e-5)
        assert found.provenance["thresholds"][str(layer)] == pytest.approx(cut, rel=1e-4)
    assert found.provenance["positions"] == (77 if mask is None else int(mask.sum()))


def test_a_small_budget_takes_more_passes_and_gives_the_same():
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(4, 6)
    with counting(bridge) as seen:
        whole = neuron_statistics(bridge, tokens)
    assert whole.provenance["passes"] == 1 and sum(seen) == 3 * 24
    per_layer = 4 * 24 * 48
    with counting(bridge) as seen:
        some = neuron_statistics(bridge, tokens, memory_budget=2 * per_layer + 1)
    assert some.provenance["passes"] == 2 and sum(seen) == (2 + 3) * 24  # no pass runs past its layers
    np.testing.assert_allclose(some.values, whole.values, rtol=1e-5, atol=1e-6)
    one = neuron_statistics(bridge, tokens, layers=[1], threshold=0.3, memory_budget=per_layer)
    assert np.isnan(one.values.values[[0, 2]]).all() and not np.isnan(one.values.values[1]).any()
    rows = capture(bridge, tokens, hook_name("neuron", 1))[hook_name("neuron", 1)].flatten(0, 1)
    np.testing.assert_allclose(one.column("frequency")[1], (rows.abs() > 0.3).float().mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="layer 0 was not measured"):
        one.of([(0, 1)])
    with pytest.raises(ValueError, match=r"\(1, 48\) does not exist"):
        one.of([(1, 48)])
    with pytest.raises(KeyError, match="no statistic 'median'"):
        one.column("median")
    assert one.plot("rms").data and len(whole.plot().data) == 3


def test_a_table_has_a_row_per_neuron_and_files_keep_everything(tmp_path: Any):
    found = neuron_statistics(tiny_bridge("gpt2"), tiny_tokens(3, 6))
    table = found.of([(2, 4), (0, 7)])
    assert list(table["layer"]) == [2, 0] and list(table["neuron"]) == [4, 7]
    assert table["rms"][0] == found.column("rms")[2, 4] and table["q50"][1] == found.column("q50")[0, 7]
    again = load(found.save(tmp_path / "s.nc"))
    assert isinstance(again, NeuronStatistics)
    assert np.array_equal(again.values, found.values) and again.provenance == found.provenance


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [3]}, "do not exist"),
        ({"layers": []}, "empty"),
        ({"mask": torch.zeros(3, 6, dtype=torch.bool)}, "keeps 0 positions"),
        ({"mask": torch.ones(3, 5, dtype=torch.bool)}, r"shape \(3, 5\)|mask"),
        ({"quantiles": [1.5]}, r"quantiles=\[1.5\]"),
        ({"quantiles": [0.5, 0.5]}, "different numbers"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"memory_budget": 3455}, "3,456 bytes, memory_budget is 3,455"),
    ],
)
def test_options_are_refused_before_any_forward(change: Any, message: str, monkeypatch: pytest.MonkeyPatch):
    bridge = tiny_bridge("gpt2")
    no_forward(bridge, monkeypatch)
    with pytest.raises((ValueError, TypeError), match=message):
        neuron_statistics(bridge, tiny_tokens(3, 6), **change)


def planted(frequency: np.ndarray, rms: np.ndarray, norm: np.ndarray) -> NeuronStatistics:
    """Statistics with these features of every neuron, `[layer, neuron]`."""
    names = ["frequency", "rms", "output_norm"]
    values = np.stack([frequency, rms, norm], -1)
    return NeuronStatistics(labelled(values, ("layer", "neuron", "statistic"), {"statistic": names}), {"model": "made"})


def random_statistics(n: int = 40, seed: int = 0) -> NeuronStatistics:
    rng = np.random.default_rng(seed)
    return planted(rng.uniform(0.05, 0.9, (2, n)), rng.lognormal(0, 1, (2, n)), rng.lognormal(0, 1, (2, n)))


@pytest.mark.parametrize("feature", ["frequency", "rms", "output_norm"])
def test_the_nearest_neighbour_in_each_feature_is_the_control(feature: str):
    # all alike but for one feature, which grows with the index: the neighbour is the index beside it
    ramps = {"frequency": np.linspace(0.1, 0.4, 20), "rms": np.linspace(1, 2, 20), "output_norm": np.linspace(1, 2, 20)}
    flat = {name: np.full((1, 20), 0.5) for name in ramps}
    statistics = planted(*({**flat, feature: ramps[feature][None]}[name] for name in ramps))
    found = match_neurons(statistics, [(0, 7)], n=1, pool=1)
    assert found.draw(0) in ({(0, 7): (0, 6)}, {(0, 7): (0, 8)})
    row = found.table().iloc[0]
    other = int(row["control"])
    assert (row["layer"], row["neuron"], row["draw"]) == (0, 7, 0)
    own = {"frequency": "frequency_difference", "rms": "scale_ratio", "output_norm": "norm_ratio"}
    change = ramps[feature][other] - ramps[feature][7]
    expected = {
        "frequency_difference": change if feature == "frequency" else 0.0,
        "scale_ratio": 1 + change / ramps["rms"][7] if feature == "rms" else 1.0,
        "norm_ratio": 1 + change / ramps["output_norm"][7] if feature == "output_norm" else 1.0,
    }
    for name in own.values():
        assert row[name] == pytest.approx(expected[name], abs=1e-5)
    scaled = {"frequency": np.arcsin(np.sqrt(ramps["frequency"])), "rms": np.log(ramps["rms"])}
    scaled["output_norm"] = np.log(ramps["output_norm"])
    distance = np.abs(scaled[feature] - scaled[feature][7]) / scaled[feature].std()
    assert row["distance"] == pytest.approx(distance[other], rel=1e-4)
    assert row["layer_distance"] == pytest.approx(np.delete(distance, 7).mean(), rel=1e-4)


def test_controls_are_nearer_than_chance_and_a_dead_neuron_does_not_stretch_the_scale():
    statistics = random_statistics()
    statistics.values.values[0, 39, 1] = 0.0
    found = match_neurons(statistics, [(0, i) for i in range(5)], n=2, seed=1)
    table = found.table()
    assert (table["distance"] < table["layer_distance"]).all()
    assert table["distance"].mean() < 0.6 * table["layer_distance"].mean()
    spread = table["scale_ratio"].map(np.log).abs()
    assert spread.mean() < 0.8  # unmatched, the log ratio of two such neurons is 1.13 on average
    assert (match_neurons(statistics, [(0, 39)], n=1).table()["scale_ratio"].isna()).all()


def test_draws_are_sets_of_the_same_size_that_share_nothing_with_the_neurons():
    statistics = random_statistics()
    neurons = [(0, i) for i in range(0, 24, 2)] + [(1, 3)]
    found = match_neurons(statistics, neurons, n=3, exclude=[(0, 1), (0, 3)], seed=2)
    for k in range(3):
        controls = list(found.draw(k).values())
        assert list(found.draw(k)) == neurons and [layer for layer, _ in controls] == [layer for layer, _ in neurons]
        assert len(set(controls)) == len(controls) and not set(controls) & {*neurons, (0, 1), (0, 3)}
    for neuron in neurons:
        assert len({found.draw(k)[neuron] for k in range(3)}) == 3
    again, other = (match_neurons(statistics, neurons, n=3, exclude=[(0, 1), (0, 3)], seed=s) for s in (2, 3))
    assert np.array_equal(again.controls, found.controls) and not np.array_equal(other.controls, found.controls)


def test_controls_have_another_label():
    statistics, labels = random_statistics(), torch.zeros(2, 40, dtype=torch.long)
    labels[0, 30:] = 1
    found = match_neurons(statistics, [(0, 2)], n=5, labels=labels)
    assert (found.controls.values >= 30).all()
    found = match_neurons(statistics, [(0, 35)], n=5, labels=labels)
    assert (found.controls.values < 30).all()


def test_matching_refuses_what_it_cannot_do():
    statistics = random_statistics(6)
    refused: Any = (
        ({"neurons": []}, "at least one"),
        ({"neurons": [(0, 1), (0, 1)]}, "none twice"),
        ({"neurons": [(2, 0)]}, "does not exist"),
        ({"neurons": [(0, 1)], "n": 6}, "layer 0 has 5 neurons .* too few for 6 draws"),
        ({"neurons": [(0, i) for i in range(4)], "n": 1}, "too few"),
        ({"neurons": [(0, 1)], "n": 0}, "n=0"),
        ({"neurons": [(0, 1)], "n": 3, "pool": 2}, "pool of 2"),
        ({"neurons": [(0, 1)], "labels": torch.zeros(2, 5, dtype=torch.long)}, r"\(2, 5\)"),
    )
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            match_neurons(statistics, **options)


def test_a_model_gives_matches_of_its_own_geometry():
    bridge = tiny_bridge("llama")
    found = match_neurons(neuron_statistics(bridge, tiny_tokens(6, 12)), [(1, 4)], n=3)
    assert found.controls.shape == (1, 3) and int(found.controls.max()) < geometry(bridge).d_mlp
    assert found.provenance["n"] == 3 and found.provenance["pool"] == 6
