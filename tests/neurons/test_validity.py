"""Validity: every cosine and rank against whole forwards, the write side in the last layer, cost, planted signs."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import interp
from interp.cache import capture
from interp.hooks import hook_name
from interp.models import geometry
from interp.neurons import Validity, _clamp_runs, clamped, decode, neuron_statistics, validate
from interp.neurons._sides import side_vectors, unembedding
from interp.neurons.validity_result import QUADRANTS
from interp.results import labelled, load
from tests.helpers import FAMILIES, fresh_bridge, tiny_bridge, tiny_tokens
from tests.neurons.test_clamping import counting, no_forward

N, POS, M = 4, 7, 48


def decoded(bridge: Any, layer: int, side: Any) -> Tensor:
    logits = side_vectors(bridge, layer, side) @ unembedding(bridge)
    return logits - logits.mean(1, keepdim=True)


def own_labels(bridge: Any, *sides: Any) -> dict[Any, Tensor]:
    """Best token of every neuron by mean-centred logit."""
    layers = range(len(bridge.blocks))
    return {side: torch.stack([decoded(bridge, layer, side).argmax(1) for layer in layers]) for side in sides}


def sides_of(bridge: Any) -> list[Any]:
    return ["in", "gate", "out"] if geometry(bridge).gated else ["in", "out"]


@pytest.mark.parametrize(
    ("family", "mode", "where"),
    [*((family, "set", "each") for family in FAMILIES), ("llama", "set", "last"), ("gpt2", "add", "each")],
)
def test_cosines_ranks_and_sizes_equal_those_of_whole_forwards(family: str, mode: Literal["set", "add"], where: str):
    bridge, tokens = tiny_bridge(family), tiny_tokens(N, POS)
    positions: Any = -1 if where == "last" else torch.tensor([2, 6, 2, 0])
    at = torch.tensor([POS - 1] * N) if where == "last" else positions
    rows = torch.arange(N)
    labels = own_labels(bridge, *sides_of(bridge))
    neurons = [(2, 5), (0, 30), (1, 11)]
    found = validate(bridge, labels, tokens, neurons, mode=mode, dose=2.5, positions=positions)
    intact = bridge(tokens)[rows, at]
    for i, (layer, index) in enumerate(neurons):
        with clamped(bridge, [(layer, index)], 2.5, mode=mode, positions=at):
            effect = bridge(tokens)[rows, at] - intact
        post = capture(bridge, tokens, hook_name("neuron", layer), positions=at)[hook_name("neuron", layer)][:, index]
        effect = effect * (torch.sign(2.5 - post) if mode == "set" else torch.ones(N))[:, None]
        effect = effect - effect.mean(1, keepdim=True)
        np.testing.assert_allclose(found.effect.values[i], effect.norm(dim=1), rtol=1e-3, atol=1e-4)
        for s, side in enumerate(sides_of(bridge)):
            cosine = torch.cosine_similarity(effect, decoded(bridge, layer, side)[[index]], dim=1)
            np.testing.assert_allclose(found.values.values[s, i], cosine, atol=1e-3)
            label = int(labels[side][layer, index])
            rank = (effect > effect[:, [label]]).sum(1)
            assert np.abs(found.rank.values[s, i] - rank.numpy()).max() <= 1  # rounding may swap two neighbours
            assert int(found.values["label"].values[s, i]) == label
            assert found.values["label_token"].values[s, i] == bridge.tokenizer.decode([label])
    assert list(found.values["neuron"].values) == ["L2 N5", "L0 N30", "L1 N11"]
    assert list(found.doses.values) == [2.5] * 3 and bool(np.isnan(found.specificity).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_last_layer_the_write_side_predicts_the_effect_and_the_read_side_does_not(family: str):
    # a norm after the MLP shrinks what the other neurons write: at the 99.9 % quantile 0.93, for a small push 0.97
    small: dict[str, Any] = {"mode": "add", "dose": 0.05} if family == "gemma2" else {}
    bridge = tiny_bridge(family)
    found = validate(bridge, own_labels(bridge, *sides_of(bridge)), tiny_tokens(6, 12), **small)
    table = found.summary().set_index(["side", "layer"])
    assert table.loc[("out", 2), "cosine"] > 0.95 and table.loc[("out", 2), "top_10"] > 0.95
    assert table.loc[("out", 0), "cosine"] < table.loc[("out", 1), "cosine"] < table.loc[("out", 2), "cosine"]
    assert (table.loc["in", "cosine"].abs() < 0.15).all() and (table["shuffled"].abs() < 0.15).all()
    assert (table["neurons"] == M).all()
    if small:
        usual = validate(bridge, own_labels(bridge, "out"), tiny_tokens(6, 12)).summary().set_index("layer")
        assert 0.9 < usual.loc[2, "cosine"] < table.loc[("out", 2), "cosine"]


@pytest.mark.parametrize("name", ["tinyworld-gpt", "tinyworld-llama"])
def test_in_the_last_layer_of_the_embedded_models_decoding_predicts_the_effect(name: str):
    bridge = interp.load_model(name, check=False)
    prompts = interp.prompts.facts(bridge, n=6, seed=0)
    last = len(bridge.blocks) - 1
    neurons = [(last, index) for index in range(0, geometry(bridge).d_mlp, 4)]
    end = prompts.positions["end"]
    found = validate(bridge, own_labels(bridge, "in", "out"), prompts.clean, neurons, positions=end)
    table = found.summary().set_index("side")
    assert table.loc["out", "cosine"] > 0.95 and table.loc["out", "top_1"] > 0.5
    assert abs(table.loc["in", "cosine"]) < 0.2 and abs(table.loc["out", "shuffled"]) < 0.1
    assert table.loc["out", "shuffled_top_10"] < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cost_is_counted_and_budgets_and_prefixes_change_no_number(family: str, monkeypatch: pytest.MonkeyPatch):
    bridge, tokens = tiny_bridge(family), tiny_tokens(N, POS)
    labels = own_labels(bridge, "out")
    validate(bridge, labels, tokens, dose=2.0)  # what is probed once is known from now on
    with counting(bridge) as seen:
        found = validate(bridge, labels, tokens, dose=2.0)
    cost = found.provenance["cost"]
    own = 1 if family == "gemma2" else 0  # with a norm after the MLP a row enters at its own block
    # a neuron costs one token of each example through the blocks above its own
    assert sum(seen) == 3 * N * POS + M * N * ((2 + own) + (1 + own) + own)
    assert cost["forward_equivalents"] == pytest.approx(sum(seen) / (3 * N * POS), abs=1e-3)
    assert cost["rows"] == 2 * N + 3 * M * N
    small = validate(bridge, labels, tokens, [(1, 4), (1, 9)], dose=2.0, memory_budget=1)
    assert small.provenance["cost"]["forwards"] == N * (2 + 2)  # each example alone: unclamped, its end, two neurons
    np.testing.assert_allclose(small.values.values[0], found.values.values[0, [M + 4, M + 9]], atol=1e-4)
    monkeypatch.setattr(_clamp_runs.hooks, "supports_prefix_reuse", lambda _bridge: False)
    whole = validate(bridge, labels, tokens, [(1, 4), (1, 9)], dose=2.0)
    np.testing.assert_allclose(whole.values, small.values, atol=1e-4)
    np.testing.assert_allclose(whole.effect, small.effect, rtol=1e-3)


def test_doses_are_quantiles_of_the_neurons_own_activation():
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(8, 10)
    labels = own_labels(bridge, "out")
    statistics = neuron_statistics(bridge, tokens, quantiles=(0.9, 0.1, 0.999, 0.001))
    upper, lower = statistics.column("q90")[1, :6], statistics.column("q10")[1, :6]
    neurons = [(1, i) for i in range(6)]
    larger = np.where(np.abs(upper) >= np.abs(lower), upper, lower)
    assert not np.array_equal(larger, upper) and not np.array_equal(larger, lower)
    tails: Any = {"upper": upper, "lower": lower, "larger": larger}
    for tail, expected in tails.items():
        given = validate(bridge, labels, tokens, neurons, quantile=0.9, tail=tail, statistics=statistics)
        measured = validate(bridge, labels, tokens, neurons, quantile=0.9, tail=tail)
        np.testing.assert_allclose(given.doses, expected, rtol=1e-6)
        np.testing.assert_allclose(measured.doses, expected, rtol=1e-5)
    default = validate(bridge, labels, tokens, neurons, statistics=statistics)
    q = statistics.column("q99.9")[1, :6], statistics.column("q0.1")[1, :6]
    np.testing.assert_allclose(default.doses, np.where(np.abs(q[0]) >= np.abs(q[1]), *q), rtol=1e-6)


def test_signs_of_labels_and_doses_and_neurons_that_are_never_active():
    bridge, tokens, token = fresh_bridge("llama"), tiny_tokens(N, POS), 17
    mlp = bridge.blocks[2].mlp.original_component
    direction = bridge.ln_final.weight.detach() * bridge.W_U[:, token].detach()
    direction = direction / direction.norm()
    mlp.down_proj.weight[:, 0] = 0.3 * direction
    mlp.down_proj.weight[:, 1] = -0.3 * direction
    mlp.up_proj.weight[3] = 0.0  # never active
    shape = (1, 3, M)
    ids, scores, z = (np.zeros(shape, dtype) for dtype in (np.int32, np.float32, np.float32))
    ids[..., :2], scores[0, 2, :2], z[0, 2] = token, (0.9, -0.9), np.arange(M)
    dims = ("side", "layer", "neuron")
    atlas: Any = SimpleNamespace(
        **{name: labelled(array, dims, {"side": ["out"]}) for name, array in (("values", scores), ("z", z))},
        label_ids=labelled(ids, dims, {"side": ["out"]}).astype(np.int32),
    )
    for dose in (0.5, -0.5):  # a lowered activation does the reverse, and so is reversed
        found = validate(bridge, atlas, tokens, [(2, 0), (2, 1), (2, 2)], mode="add", dose=dose)
        assert (found.values.values[0] > 0.9).all()
        assert (found.rank.values[0, :2] == 0).all() and list(found.values["sign"].values[0, :2]) == [1, -1]
        assert list(found.specificity.values[0]) == [0, 1, 2]
    dead = validate(bridge, atlas, tokens, [(2, 0), (2, 3)])
    assert np.isnan(dead.values.values[0, 1]).all() and np.isnan(dead.rank.values[0, 1]).all()
    table = dead.table()
    assert np.isnan(table["validity"][1]) and table["quadrant"][1] == "" and table["quadrant"][0] == QUADRANTS[2]
    assert dead.summary()["neurons"][0] == 1


def test_the_shuffle_compares_with_another_neuron_of_the_layer():
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(N, POS)
    labels = own_labels(bridge, "out")
    found, other = (validate(bridge, labels, tokens, dose=2.0, seed=seed) for seed in (0, 1))
    assert not np.array_equal(found.shuffled, other.shuffled) and np.array_equal(found.values, other.values)
    for layer in range(3):
        own, shuffled = (a.values[0, layer * M : (layer + 1) * M] for a in (found.values, found.shuffled))
        assert np.mean(shuffled) < np.mean(own) - 0.3
        # never its own: no neuron's cosine comes back
        assert np.abs(own - shuffled).max(1).min() > 1e-4


def test_neurons_without_a_label_are_nobodys_other(monkeypatch: pytest.MonkeyPatch):
    bridge, tokens = fresh_bridge("gpt2"), tiny_tokens(N, POS)
    with torch.no_grad():
        bridge.blocks[1].mlp.W_out[: M // 2] = 0.0  # writes nothing, so says nothing
    found = validate(bridge, decode(bridge, weights=["in", "out"], null=None), tokens, dose=2.0)
    assert list(found.values["index"].values[M : M + 3]) == [24, 25, 26] and found.values.shape[1] == 3 * M - M // 2
    assert np.isfinite(found.shuffled.values).all() and (found.shuffled_rank.values >= 0).all()
    labels = own_labels(bridge, "in", "out")  # a label of one side only does not count
    labels["in"][2, 9:], labels["out"][2, :7] = -1, -1
    two = validate(bridge, labels, tokens, [(2, 7), (2, 8)], dose=2.0)
    crossed = validate(bridge, {"out": labels["out"][:, [*range(7), 8, 7, *range(9, M)]]}, tokens, [(2, 7)], dose=2.0)
    other = int(labels["out"][2, 8])
    assert int(crossed.values["label"].values[0, 0]) == other  # the shuffled rank is that of the other's label
    np.testing.assert_array_equal(two.shuffled_rank.values[1, 0], crossed.rank.values[0, 0])
    labels["in"][2, 8:] = -1
    no_forward(bridge, monkeypatch)
    with pytest.raises(ValueError, match="layer 2 has a label on every side for 1 neuron .*at least two"):
        validate(bridge, labels, tokens, dose=2.0)


def test_an_atlas_of_another_model_of_this_shape_is_refused(monkeypatch: pytest.MonkeyPatch):
    bridge, other, tokens = tiny_bridge("gpt2"), tiny_bridge("gpt2", seed=1), tiny_tokens(N, POS)
    atlas = decode(bridge, null=None)
    statistics = neuron_statistics(bridge, tokens, quantiles=(0.999, 0.001))
    assert validate(bridge, atlas, tokens, [(2, 0)], statistics=statistics).values.size == N
    theirs = re.escape(other_revision := str(decode(other, null=None).provenance["revision"]))
    assert other_revision != atlas.provenance["revision"]
    no_forward(bridge, monkeypatch)
    own = re.escape(str(atlas.provenance["revision"]))
    with pytest.raises(ValueError, match=f"the atlas is of tiny-gpt2 at {own}.*this model is tiny-gpt2 at {theirs}"):
        validate(other, atlas, tokens, [(2, 0)])
    with pytest.raises(ValueError, match=f"statistics are of tiny-gpt2 at {own}.*this model is tiny-gpt2 at {theirs}"):
        validate(other, own_labels(other, "out"), tokens, [(2, 0)], statistics=statistics)


def made() -> Validity:
    """Six neurons in two layers, one in each quadrant, one unmeasured, one without specificity."""
    cosine = np.array([[0.9, 0.2, 0.8, 0.1, np.nan, 0.7]])[..., None] + np.array([0.0, 0.04])
    z = np.array([[5.0, 4.0, 1.0, 0.0, 9.0, np.nan]])
    layers, indices = [0, 0, 0, 1, 1, 1], [3, 4, 5, 0, 1, 2]
    one = {"neuron": [f"L{a} N{b}" for a, b in zip(layers, indices, strict=True)], "layer": ("neuron", layers)}
    one["index"] = ("neuron", indices)
    both = {"side": ["out"], **one, "label_token": (("side", "neuron"), np.array([list("abcdef")]))}
    dims = ("side", "neuron", "example")
    rank = np.where(np.isnan(cosine), np.nan, [0.0, 12.0])
    return Validity(
        values=labelled(cosine, dims, both), provenance={}, shuffled=labelled(cosine / 10, dims, both),
        rank=labelled(rank, dims, both), shuffled_rank=labelled(rank + 5, dims, both),
        effect=labelled(np.ones((6, 2)), dims[1:], one), doses=labelled(np.arange(6), ("neuron",), one),
        specificity=labelled(z, dims[:2], both),
    )  # fmt: skip


def test_tables_and_summaries_are_what_they_say():
    table = made().table()
    assert list(table["quadrant"]) == [*QUADRANTS, "", ""]
    assert list(table["label"]) == list("abcdef") and list(table["neuron"]) == [3, 4, 5, 0, 1, 2]
    assert table["validity"][0] == pytest.approx(0.92) and table["shuffled"][0] == pytest.approx(0.092)
    assert table[["validity", "shuffled", "rank", "top_1"]].iloc[4].isna().all()
    assert table["rank"][0] == 6 and table["top_1"][0] == 0.5 and table["dose"][3] == 3
    assert list(made().table(valid=0.15, specific=4.5)["quadrant"][:4]) == [
        QUADRANTS[0],
        *[QUADRANTS[2]] * 2,
        QUADRANTS[3],
    ]
    summary = made().summary().set_index("layer")
    assert summary.loc[0, "cosine"] == pytest.approx(0.82) and summary.loc[1, "cosine"] == pytest.approx(0.42)
    assert summary.loc[0, "shuffled"] == pytest.approx(0.082)
    assert list(summary["neurons"]) == [3, 2]
    assert (summary["top_1"] == 0.5).all() and (summary["top_10"] == 0.5).all()
    assert (summary["shuffled_top_10"] == 0.5).all()
    with pytest.raises(ValueError, match="no side 'in'"):
        made().table("in")


def test_the_figure_names_the_quadrants_with_their_counts(tmp_path: Any):
    figure = made().plot()
    texts = [note.text for note in figure.layout.annotations]
    for name in QUADRANTS:
        assert f"{name}: 1" in texts
    assert sum(len(trace.x) for trace in figure.data) == 4
    corner = {note.text.split(":")[0]: (note.x, note.y) for note in figure.layout.annotations}
    assert corner["sharp and true"] == (0.99, 0.99) and corner["broad but true"] == (0.01, 0.99)
    assert corner["sharp but false"] == (0.99, 0.01) and corner["noise"] == (0.01, 0.01)
    unknown = made()
    unknown.specificity.values[:] = np.nan
    with pytest.raises(ValueError, match="null='rotation'"):
        unknown.plot()
    again = load(made().save(tmp_path / "v.nc"))
    assert isinstance(again, Validity) and again.values.equals(made().values)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_atlas_brings_its_labels_signs_and_peaks(family: str):
    bridge, tokens = tiny_bridge(family), tiny_tokens(N, POS)
    sides = sides_of(bridge)
    atlas = decode(bridge, weights=sides, top_k=2, layers=[0, 2])
    found = validate(bridge, atlas, tokens, dose=1.0, mode="add")
    assert list(found.values["side"].values) == sides and found.values.shape[1] == 2 * M
    assert set(found.values["layer"].values) == {0, 2}
    at = sides.index("out")
    assert np.array_equal(found.values["label"].values[at, M:], atlas.label_ids.sel(side="out").values[2])
    assert np.array_equal(found.specificity.values[at, M:], atlas.z.sel(side="out").values[2].astype(np.float32))
    assert np.array_equal(found.values["sign"].values[at, M:], np.sign(atlas.values.sel(side="out").values[2]))
    # labels of either sign are among the most moved tokens
    last = found.rank.values[at, M:]
    for sign in (1, -1):
        assert float((last[found.values["sign"].values[at, M:] == sign] < 10).mean()) > 0.8
    assert found.plot().data
    with pytest.raises(ValueError, match=r"no label for neurons \[\(1, 0\)\]"):
        validate(bridge, atlas, tokens, [(1, 0)])
    only = validate(bridge, atlas, tokens, [(2, 0)], sides=["in"])
    assert list(only.values["side"].values) == ["in"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "neuron": ({"neurons": [(0, M)]}, "do not exist"),
    "no neurons": ({"neurons": []}, "empty"),
    "side": ({"sides": ["in"]}, "those in the atlas: 'out'"),
    "no sides": ({"sides": []}, "those in the atlas"),
    "other model": ({"atlas": {"out": torch.zeros(3, 4, dtype=torch.long)}}, r"\(3, 4\).*3 layers of 48"),
    "other tokens": ({"atlas": {"out": torch.full((3, M), 60)}}, "token 60.*60 tokens"),
    "nothing decoded": ({"atlas": {"out": torch.full((3, M), -1)}}, "no label for neurons of any layer"),
    "position": ({"positions": POS}, "positions=7"),
    "positions": ({"positions": torch.tensor([1, 2, 3, 7])}, "positions"),
    "quantile": ({"quantile": 0.5}, "quantile=0.5"),
    "dose": ({"dose": float("nan")}, "not finite"),
    "tokens": ({"tokens": torch.full((2, 3), 60)}, "ids from 60"),
    "mode": ({"mode": "scale"}, "mode"),
    "tail": ({"tail": "both"}, "tail"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_before_any_forward(case: str, monkeypatch: pytest.MonkeyPatch):
    bridge, (change, message) = tiny_bridge("gpt2"), REFUSED[case]
    no_forward(bridge, monkeypatch)
    options = {"atlas": {"out": torch.zeros(3, M, dtype=torch.long)}, "tokens": tiny_tokens(N, POS), **change}
    with pytest.raises((ValueError, TypeError), match=message):  # a ValueError where types are not checked at run time
        validate(bridge, **options)


def test_statistics_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch):
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(N, POS)
    labels = {"out": torch.zeros(3, M, dtype=torch.long)}
    own, other = (neuron_statistics(tiny_bridge(family), tokens) for family in ("gpt2", "gpt_neo"))
    no_forward(bridge, monkeypatch)
    with pytest.raises(ValueError, match=r"no 'q0.1'.*quantiles=0.999 and its mirror, 0.001"):
        validate(bridge, labels, tokens, statistics=own)
    with pytest.raises(ValueError, match="4 layers"):
        validate(bridge, labels, tokens, statistics=other)
    with pytest.raises(ValueError, match="give one of them"):
        validate(bridge, labels, tokens, statistics=own, dose=1.0)


def test_hooks_are_removed_after_an_exception(monkeypatch: pytest.MonkeyPatch):
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(N, POS)
    before = bridge(tokens)
    monkeypatch.setattr("interp.neurons.validity.rank_in", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        validate(bridge, own_labels(bridge, "out"), tokens)
    assert torch.equal(bridge(tokens), before) and not any(point.fwd_hooks for point in bridge.hook_points())
