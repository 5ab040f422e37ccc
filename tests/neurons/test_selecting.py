"""Average precision against its definition, nulls that hold their level, and planted detectors."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from interp.hooks import hook_name
from interp.neurons import Selectivity, _ranking, neuron_selectivity, selectivity
from interp.neurons._ranking import Ranking, chance, chance_p, grouped_p, tied_p
from interp.prompts import Prompts
from tests.helpers import FAMILIES, tiny_bridge, tiny_tokens


def by_definition(scores: list[float], positive: list[bool]) -> float:
    """Sum over distinct values, from the largest, of recall gained times precision there."""
    total, gained_before = 0.0, 0
    for value in sorted(set(scores), reverse=True):
        taken = [label for score, label in zip(scores, positive, strict=True) if score >= value]
        total += (sum(taken) - gained_before) / sum(positive) * sum(taken) / len(taken)
        gained_before = sum(taken)
    return total


def draw(n: int = 20, units: int = 7, seed: int = 0, levels: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, units, generator=generator)
    if levels is not None:
        scores = (scores * levels).round() / levels
    return scores, torch.arange(n) % 3 == 0


@pytest.mark.parametrize("levels", [None, 1, 3])
def test_average_precision_is_its_definition_with_and_without_ties(levels: int | None) -> None:
    scores, positive = draw(levels=levels)
    ranking = Ranking.of(scores)
    expected = [by_definition(scores[:, unit].tolist(), positive.tolist()) for unit in range(7)]
    assert ranking.precision(positive).numpy() == pytest.approx(expected, abs=1e-12)
    assert bool(ranking.tied.all()) == (levels is not None) == bool(ranking.tied.any())


def test_order_of_examples_does_not_matter_and_a_constant_unit_has_the_base_rate() -> None:
    scores, positive = draw(levels=1)
    scores[:, 0] = 2.0
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    one, other = (Ranking.of(scores).precision(positive), Ranking.of(scores[shuffled]).precision(positive[shuffled]))
    assert torch.allclose(one, other, atol=1e-12)
    assert float(one[0]) == pytest.approx(7 / 20)


def test_shared_null_is_that_of_all_permutations() -> None:
    positions = list(itertools.combinations(range(7), 3))
    every = sorted(by_definition(list(range(7, 0, -1)), [i in chosen for i in range(7)]) for chosen in positions)
    null = chance(7, 3, draws=20_000, seed=0)
    assert np.quantile(null, [0.2, 0.5, 0.9]) == pytest.approx(np.quantile(every, [0.2, 0.5, 0.9]), abs=0.02)
    assert chance_p(np.array([1.0]), null)[0] == pytest.approx(1 / 35, rel=0.15)
    assert chance_p(np.array([0.0]), null)[0] == 1.0


def test_nulls_hold_their_level_on_noise_with_and_without_ties() -> None:
    scores, positive = draw(n=30, units=400)
    p = chance_p(Ranking.of(scores).precision(positive).numpy(), chance(30, 10, draws=4000, seed=1))
    assert 0.02 < (p <= 0.05).mean() < 0.09
    assert abs(p.mean() - 0.5) < 0.05
    tied, positive = draw(n=30, units=100, levels=1)
    p = tied_p(Ranking.of(tied), positive, draws=400, seed=0)
    assert (p <= 0.05).mean() < 0.12
    assert abs(p.mean() - 0.5) < 0.1


def test_tied_p_counts_like_the_shared_null_where_nothing_is_tied() -> None:
    scores, positive = draw(n=24, units=12)
    ranking = Ranking.of(scores)
    shared = chance_p(ranking.precision(positive).numpy(), chance(24, 8, draws=20_000, seed=0))
    own = tied_p(ranking, positive, draws=2000, seed=0)
    striking = shared < 0.2
    assert own[striking] == pytest.approx(shared[striking], abs=0.03)
    assert own[~striking] == pytest.approx(shared[~striking], abs=0.25)  # few draws where nothing is striking


def test_grouped_null_is_that_of_every_choice_of_groups() -> None:
    scores, _ = draw(n=18, units=5, levels=2)
    groups = torch.tensor([0] * 2 + [1] * 5 + [2] * 3 + [3] * 3 + [4] + [5] * 4)  # of different sizes
    positive = groups < 2
    p = grouped_p(Ranking.of(scores), [positive], groups, draws=6000, seed=0)[0]
    for unit in range(5):
        values = scores[:, unit].tolist()
        observed = by_definition(values, positive.tolist())
        every = [
            by_definition(values, [int(g) in chosen for g in groups]) for chosen in itertools.combinations(range(6), 2)
        ]
        assert p[unit] == pytest.approx(np.mean([value >= observed - 1e-9 for value in every]), abs=0.03)


class _Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_grouped_null_is_that_of_all_pairs_of_groups_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, _ = draw(n=60, units=6, levels=4)
    n_groups, draws = 30, 400
    groups = torch.arange(60) * 7 % n_groups
    positives = [groups < 4, groups % 3 == 0]
    monkeypatch.setattr(_ranking, "_CELLS", 8000)
    with _Largest() as seen:
        found = grouped_p(Ranking.of(scores), positives, groups, draws=draws, seed=3)
    assert seen.elements <= draws * n_groups  # the outer product of all draws would be 30 times that
    rng = np.random.default_rng(3)
    for label, positive in enumerate(positives):
        own = np.isin(np.arange(n_groups), groups[positive])
        hits = np.zeros(6)
        for _ in range(draws):
            permuted = torch.from_numpy(rng.permutation(own))[groups]
            precision = Ranking.of(scores).precision(permuted) >= Ranking.of(scores).precision(positive) - 1e-9
            hits += precision.numpy()
        np.testing.assert_allclose(found[label], (hits + 1) / (draws + 1))


def test_planted_detectors_are_found_on_their_side_and_noise_is_not() -> None:
    scores, _ = draw(n=60, units=300)
    labels = ["a", "b", "c"] * 20
    where = torch.arange(60) % 3 == 0
    scores[where, 5] += 8
    scores[where, 9] -= 8
    found = selectivity(scores, labels, units=[(u // 100, u % 100) for u in range(300)], n_permutations=20_000)
    assert found.labels == ["a", "b", "c"]
    assert (
        float(found.values.sel(label="a", side="high")[5]) == 1.0 == float(found.values.sel(label="a", side="low")[9])
    )
    assert found.sets(1)["a"] == [(0, 5)]
    assert found.sets(1, side="low")["a"] == [(0, 9)]
    assert set(found.sets(q=0.05, side="both")["a"]) == {(0, 5), (0, 9)}
    assert found.sets(q=0.05)["b"] == [] == found.sets(q=0.05)["c"]
    assert float(found.separation.sel(label="a")[5]) > 5 > -5 > float(found.separation.sel(label="a")[9])
    assert found.chance.values == pytest.approx([1 / 3] * 3)
    summary = found.summary().set_index(["label", "side"])
    assert summary.loc[("a", "high"), "units"] == 1


def test_equal_precision_is_ordered_by_separation_and_exclusive_sets_do_not_share() -> None:
    scores, _ = draw(n=30, units=40)
    labels = torch.arange(30) % 2
    scores[labels == 1, 3] += 6
    scores[labels == 1, 2] += 60
    scores[labels == 1, 4] += 12
    found = selectivity(scores, labels, units=[(0, u) for u in range(40)])
    assert found.labels == ["1"]  # of 0 and 1, the label and not its absence
    assert found.sets(3)["1"] == [(0, 2), (0, 4), (0, 3)]
    several = selectivity(scores, {"one": labels == 1, "same": labels == 1, "other": torch.arange(30) % 5 == 0},
                          units=[(0, u) for u in range(40)])  # fmt: skip
    sets = several.sets(10, exclusive=True)
    assert sets["same"] == []
    assert not set(sets["one"]) & set(sets["other"])


def test_group_labels_are_harder_to_reach_than_example_labels() -> None:
    scores, _ = draw(n=60, units=20)
    groups = torch.arange(60) // 15  # four groups, two of them positive: no p-value below one sixth
    scores[groups < 2, 0] += 5
    labels = ["x" if g < 2 else "y" for g in groups]
    plain = selectivity(scores, labels, n_permutations=2000)
    grouped = selectivity(scores, labels, groups=groups, n_permutations=2000)
    assert np.array_equal(plain.values, grouped.values)
    assert float(plain.p_values.sel(label="x", side="high")[0]) < 0.001
    assert float(grouped.p_values.min()) > 0.12


def test_refusals() -> None:
    scores, positive = draw()
    labels = positive.tolist()
    with pytest.raises(ValueError, match="19 entries but there are 20"):
        selectivity(scores, labels[:-1])
    with pytest.raises(ValueError, match="is on 20 of 20 examples"):
        selectivity(scores, ["a"] * 20)
    with pytest.raises(ValueError, match="1 activations are not finite"):
        selectivity(
            scores.index_fill(0, torch.tensor([3]), 1.0).put(torch.tensor([0]), torch.tensor(torch.nan)), labels
        )
    with pytest.raises(ValueError, match="group 0 holds examples with and without label"):
        selectivity(scores, labels, groups=[i // 10 for i in range(20)])
    with pytest.raises(ValueError, match="names 3 neurons but activations has 7"):
        selectivity(scores, labels, units=[(0, 0)] * 3)
    found = selectivity(scores, labels, n_permutations=10)
    with pytest.raises(ValueError, match="give k="):
        found.sets()
    with pytest.raises(ValueError, match="have no layer"):
        found.sets(3)
    with pytest.raises(ValueError, match="no label 'z'"):
        found.ranking("z")


def prompts_of(seed: int, n: int = 6, pos: int = 7) -> Prompts:
    tokens = tiny_tokens(n, pos, seed)
    return Prompts(
        tokens, tokens, torch.full((n,), 5), torch.full((n,), 6), positions={"end": torch.full((n,), pos - 2)}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_are_read_at_their_position(family: str) -> None:
    bridge = tiny_bridge(family)
    sets = {"a": [prompts_of(0), prompts_of(1, pos=9)], "b": prompts_of(2)}
    found = neuron_selectivity(bridge, sets, layers=[1], n_permutations=50)
    rows = []
    for one in (*sets["a"], sets["b"]):
        _, cache = bridge.run_with_cache(one.clean)
        rows.append(cache[hook_name("neuron", 1)][:, int(one.positions["end"][0])])
    expected = selectivity(torch.cat(rows), ["a"] * 12 + ["b"] * 6, n_permutations=50)
    assert np.allclose(found.values, expected.values, atol=1e-6)
    assert found.values["layer"].values.tolist() == [1] * found.values.sizes["unit"]
    assert found.provenance["n_prompts"] == {"a": [6, 6], "b": [6]}


def test_prompts_as_groups_saving_plotting_and_refusals(tmp_path) -> None:
    bridge = tiny_bridge("gpt2")
    sets = {"a": [prompts_of(0), prompts_of(1)], "b": [prompts_of(2), prompts_of(3)]}
    found = neuron_selectivity(bridge, sets, by_prompts=True, n_permutations=200)
    assert found.provenance["groups"] == 4
    assert float(found.p_values.min()) > 0.1  # six ways to choose two of four
    again = Selectivity.load(found.save(tmp_path / "s.nc"))
    assert again.sets(3) == found.sets(3)
    figure: Any = found.plot()
    assert {trace.name for trace in figure.data if trace.name} >= {"a", "b"}
    with pytest.raises(ValueError, match="at least two"):
        neuron_selectivity(bridge, {"a": prompts_of(0)})
    with pytest.raises(ValueError, match="name positions"):
        neuron_selectivity(bridge, sets, position="subject")
    with pytest.raises(ValueError, match="layers=\\[7\\]"):
        neuron_selectivity(bridge, sets, layers=[7])
