"""Compositional groups: planted core and exclusive neurons, effects against forwards by hand, controls, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from interp.dictionaries import GroupEffects, amplify_groups, family_groups
from interp.hooks import hook_name, interventions, reads
from tests.helpers import D_MLP, FAMILIES, fresh_bridge, tiny_bridge, tiny_tokens

NAMES = ("one", "two", "three")
TARGETS = {"one": [5], "two": [6, 7], "three": [8]}


def family(d: int = D_MLP) -> torch.Tensor:
    """Neurons 0-3 in all, exclusive 10-12, 20-22, 30-32, neuron 40 in two, neuron 41 in all with two signs."""
    rows = torch.zeros(3, d)
    rows[:, :4] = torch.tensor([1.0, 2, -1, 0.5])
    for i in range(3):
        rows[i, 10 * (i + 1) : 10 * (i + 1) + 3] = torch.tensor([1.0, -2, 3]) * (i + 1)
    rows[:2, 40] = 1
    rows[:, 41] = torch.tensor([1.0, 1, -1])
    return rows


def test_planted_core_and_exclusive_neurons_are_separated() -> None:
    groups = family_groups(family(), NAMES)
    assert groups.vectors["shared core"].nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    for i, name in enumerate(NAMES):
        assert groups.vectors[f"{name} only"].nonzero()[:, 0].tolist() == list(range(10 * (i + 1), 10 * (i + 1) + 3))
    assert groups.counts[40] == 2 and groups.counts[0] == 3 and groups.counts[9] == 0
    two = family_groups(family(), NAMES, core_share=0.6)
    assert two.vectors["shared core"].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 40]  # 41 has both signs
    unit = family()[0] / family()[0].norm()
    torch.testing.assert_close(groups.vectors["one only"][10:13], unit[10:13])
    assert groups.table()["neurons"].tolist() == [4, 3, 3, 3]
    same = family_groups(family() * torch.tensor([[1.0], [5.0], [0.1]]), NAMES)
    for name, vector in groups.vectors.items():
        torch.testing.assert_close(same.vectors[name], vector)  # scale of a feature does not matter


def test_family_arguments() -> None:
    with pytest.raises(ValueError, match="expected two or more, one distinct name for each"):
        family_groups(family(), ("one", "one", "two"))
    with pytest.raises(ValueError, match=r"core_share=0.3; expected more than 1/3"):
        family_groups(family(), NAMES, core_share=0.3)
    dead = family()
    dead[1] = 0
    with pytest.raises(ValueError, match=r"features of \['two'\] are zero"):
        family_groups(dead, NAMES)


@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("positions", ["last", "all"])
def test_effects_are_those_of_adding_by_hand(family_name: str, positions: Any) -> None:
    bridge, tokens, hook = tiny_bridge(family_name), tiny_tokens(3, 6), hook_name("neuron", 1)
    groups = family_groups(family(), NAMES)
    found = amplify_groups(
        bridge, tokens, 1, groups, TARGETS, strength=0.7, positions=positions, n_random=2, batch_size=3
    )
    where = slice(-1, None) if positions == "last" else slice(None)
    with torch.no_grad(), reads(bridge, hook) as seen:
        base = bridge(tokens)[:, -1]
    size = 0.7 * seen[hook][:, where].norm(dim=-1).mean()
    for g, vector in enumerate(groups.vectors.values()):
        added = size * vector / vector.norm()

        def add(post: torch.Tensor, _added: torch.Tensor = added) -> torch.Tensor:
            new = post.clone()
            new[:, where] += _added
            return new

        with torch.no_grad(), interventions(bridge, {hook: add}):
            change = bridge(tokens)[:, -1] - base
        change = change - change.mean(1, keepdim=True)
        expected = torch.stack([change[:, ids].mean(1) for ids in TARGETS.values()])
        np.testing.assert_allclose(found.values.values[g], expected.numpy(), atol=2e-4)
    assert found.values.attrs["unit"] == "logits"
    assert found.provenance["norm"] == pytest.approx(float(size), rel=1e-4)
    assert found.provenance["cost"] == {"forwards": 1, "partial_forwards": 4 * 3}  # a group and two draws each
    split = amplify_groups(
        bridge, tokens, 1, groups, TARGETS, strength=0.7, positions=positions, n_random=2, batch_size=3, seed=1
    )
    np.testing.assert_array_equal(split.values.values, found.values.values)
    assert not np.array_equal(split.control.values, found.control.values)


def test_a_planted_model_has_the_weekday_table() -> None:
    """W_out rows set by hand: core neurons write all members' unembeddings, each exclusive group its own only."""
    bridge = fresh_bridge("llama")
    layer, ids = 2, [5, 6, 8]
    rows = family()
    rows[:, 40:] = 0
    with torch.no_grad():
        own = bridge.W_U.detach().T[ids]
        own = own - bridge.W_U.detach().T.mean(0)
        weight = bridge.original_model.model.layers[layer].mlp.down_proj.weight  # [d_model, d_mlp]
        for neuron, entry in enumerate(rows[0, :4]):
            weight[:, neuron] = entry.sign() * own.mean(0)
        for i in range(3):
            for neuron in range(10 * (i + 1), 10 * (i + 1) + 3):
                weight[:, neuron] = rows[i, neuron].sign() * own[i]
    groups = family_groups(rows, NAMES)
    targets = {name: [i] for name, i in zip(NAMES, ids, strict=True)}
    found = amplify_groups(bridge, tiny_tokens(8, 6), layer, groups, targets, strength=2.0, n_random=39)
    table = found.table()
    assert (table.loc["shared core"] > 0).all()
    for name in NAMES:
        assert table.loc[f"{name} only", name] == table.loc[f"{name} only"].max() > 0
    frame = found.contrasts().set_index("group")
    np.testing.assert_allclose(frame["p_value"], 1 / 40)  # above all draws
    assert (frame.loc[[f"{name} only" for name in NAMES], "own_minus_others_low"] > 0).all()
    assert (frame["random_own"].abs() < 0.5 * frame["own"]).all()
    numbers = found.summary()
    own = np.mean([table.loc[f"{name} only", name] for name in NAMES])
    others = np.mean([table.loc[f"{name} only"].drop(name).mean() for name in NAMES])
    assert numbers["core"] == pytest.approx(table.loc["shared core"].mean(), abs=1e-5)
    assert numbers["exclusive: own"] == pytest.approx(own, abs=1e-5)
    assert numbers["exclusive: others"] == pytest.approx(others, abs=1e-5)
    assert numbers["exclusive with p <= 0.05"] == 1
    assert len(found.plot().data) > 0


def test_groups_of_random_neurons_are_significant_as_often_as_they_should_be() -> None:
    """p <= 0.05 in one case of twenty: by chance 27 +- 5 of 540; sign flips over examples had half of them."""
    bridge, tokens, found = tiny_bridge("llama"), tiny_tokens(6, 5), []
    for seed in range(60):
        rows, order = torch.zeros(9, D_MLP), torch.randperm(D_MLP, generator=torch.Generator().manual_seed(seed))
        rows.scatter_(1, order[:27].reshape(9, 3), torch.tensor([1.0, -2, 3]).expand(9, 3))
        members = [str(i) for i in range(9)]
        targets = {name: [5 * i + seed % 5] for i, name in enumerate(members)}
        effects = amplify_groups(
            bridge, tokens, 2, family_groups(rows, members), targets, n_random=19, seed=seed, batch_size=2000
        )
        found.append(effects.contrasts().set_index("group").drop("shared core")["p_value"].to_numpy())
    p = np.stack(found)
    assert p.shape == (60, 9) and p.min() == 1 / 20
    assert 0.02 < (p <= 0.05).mean() < 0.085
    assert abs(p.mean() - 0.525) < 0.06  # uniform over 1/20, ..., 20/20


def test_p_values_are_the_ranks_among_the_draws() -> None:
    groups, rng = family_groups(family(), NAMES), np.random.default_rng(0)
    found = amplify_groups(tiny_bridge("llama"), tiny_tokens(), 1, groups, TARGETS, n_random=4)
    n = found.values.sizes["example"]
    found.values.values[:] = np.array([1.0, 3, 1])[None, :, None] + rng.normal(size=(4, 3, n)) * 0.01
    gaps = np.array([-1.0, 1.9, 2.1, 5.0])  # of "two only": two of four above its 2
    found.control.values[:] = 0.0
    found.control.values[2, :, 1] = gaps[:, None] + rng.normal(size=(4, n)) * 0.01
    frame = found.contrasts().set_index("group")
    assert frame.loc["two only", "p_value"] == pytest.approx(3 / 5)
    assert frame.loc["two only", "own_minus_others"] == pytest.approx(2, abs=0.05)
    assert frame.loc["two only", "random_own_minus_others"] == pytest.approx(gaps.mean(), abs=0.05)
    assert frame.loc["two only", "random_own_high"] == pytest.approx(np.quantile(gaps, 0.975), abs=0.05)
    assert frame.loc["one only", "p_value"] == 1  # 1 against 2 of the others, draws at 0
    assert frame.loc["shared core", "p_value"] == pytest.approx(1 / 5)


@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("positions", ["last", "all"])
def test_effects_do_not_depend_on_the_batch_size(family_name: str, positions: Any) -> None:
    bridge, groups = tiny_bridge(family_name), family_groups(family(), NAMES)
    tokens = tiny_tokens(5, 6)
    runs = [
        amplify_groups(bridge, tokens, 1, groups, TARGETS, strength=3, positions=positions, n_random=2, batch_size=size)
        for size in (1, 2, len(tokens), 100)
    ]
    for other in runs[:-1]:
        assert other.provenance["norm"] == pytest.approx(runs[-1].provenance["norm"], rel=1e-5)
        np.testing.assert_allclose(other.values.values, runs[-1].values.values, atol=1e-4)
        np.testing.assert_allclose(other.control.values, runs[-1].control.values, atol=1e-4)
    with torch.no_grad(), reads(bridge, hook_name("neuron", 1)) as seen:
        norms = []
        for row in tokens:
            bridge(row[None])
            norms.append(seen[hook_name("neuron", 1)][0, -1 if positions == "last" else slice(None)].norm(dim=-1))
    assert runs[0].provenance["norm"] == pytest.approx(3 * float(torch.stack(norms).mean()), rel=1e-4)
    assert float(torch.stack(norms)[0].mean()) != pytest.approx(float(torch.stack(norms).mean()), rel=1e-3)


def test_controls_are_outside_all_groups_with_the_same_entries_and_nothing_is_measured_for_no_neurons() -> None:
    from interp.dictionaries.groups import _random_like

    groups = family_groups(family(), NAMES)
    vector = groups.vectors["two only"]
    drawn = _random_like(vector, groups.counts, 20, torch.Generator().manual_seed(0))
    for other in drawn:
        assert (groups.counts[other != 0] == 0).all()
        torch.testing.assert_close(other[other != 0].sort().values, vector[vector != 0].sort().values)
    assert len({tuple(other.nonzero()[:, 0].tolist()) for other in drawn}) > 15
    apart = family()
    apart[:, :4] = 0
    found = amplify_groups(tiny_bridge("llama"), tiny_tokens(), 1, family_groups(apart, NAMES), TARGETS, n_random=1)
    assert np.isnan(found.values.sel(group="shared core")).all() and not np.isnan(found.values.values[1:]).any()
    assert found.contrasts().set_index("group").loc["shared core"].drop("neurons").isna().all()
    crowded = torch.ones(3, D_MLP) * torch.tensor([[1.0], [2.0], [3.0]])
    full = amplify_groups(tiny_bridge("llama"), tiny_tokens(), 1, family_groups(crowded, NAMES), TARGETS, n_random=1)
    assert np.isnan(full.control.values).all() and full.contrasts()["p_value"].isna().all()
    none = amplify_groups(tiny_bridge("llama"), tiny_tokens(), 1, groups, TARGETS, n_random=0)
    assert none.contrasts()["p_value"].isna().all() and not none.contrasts()["own"].isna().any()


def test_refusals_come_before_any_forward_and_results_are_saved(tmp_path: Any) -> None:
    bridge, tokens, groups = tiny_bridge("gpt2"), tiny_tokens(), family_groups(family(), NAMES)

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a forward ran")

    handle = bridge.blocks[0].register_forward_pre_hook(refuse)
    try:
        with pytest.raises(ValueError, match=r"targets has no tokens for \['three'\]"):
            amplify_groups(bridge, tokens, 1, groups, {"one": [5], "two": [6], "three": []})
        with pytest.raises(ValueError, match=r"targets name the tokens \[60\]"):
            amplify_groups(bridge, tokens, 1, groups, {**TARGETS, "three": [60]})
        with pytest.raises(ValueError, match="tokens has 1 row"):
            amplify_groups(bridge, tokens[:1], 1, groups, TARGETS)
        with pytest.raises(ValueError, match="groups are of 50 neurons; this model has 48"):
            amplify_groups(bridge, tokens, 1, family_groups(family(50), NAMES), TARGETS)
        with pytest.raises(ValueError, match="expected a positive strength"):
            amplify_groups(bridge, tokens, 1, groups, TARGETS, strength=0)
    finally:
        handle.remove()
    found = amplify_groups(bridge, tokens, 1, groups, TARGETS, n_random=2)
    loaded = GroupEffects.load(found.save(tmp_path / "g.nc"))
    np.testing.assert_array_equal(loaded.control.values, found.control.values)
    before = bridge(tokens)
    with pytest.raises(Exception, match="layers|blocks"):
        amplify_groups(bridge, tokens, 9, groups, TARGETS)
    assert torch.equal(bridge(tokens), before)
