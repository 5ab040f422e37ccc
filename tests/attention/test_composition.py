"""Composition: TransformerLens' numbers, products written out, random weights, changes of basis."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from interp.attention import HeadScores, composition_scores, ov_copying, pattern_scores, prefix_matching_from_weights
from interp.attention._weights import gains, head_weights
from tests.attention.classic_heads import planted_heads, text
from tests.helpers import D_MODEL, FAMILIES, MORE_FAMILIES, N_HEADS, fresh_bridge, tiny_bridge, tiny_tokens

MODES: Any = ("Q", "K", "V")


def change_basis(bridge: Any, seed: int = 0) -> None:
    """Another basis for every head: W_V R, R^-1 W_O, and W_Q S, W_K S^-T. Shared keys and values change as one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in bridge.blocks:
            attention = block.attn
            d_head, groups = attention.W_O.shape[1], attention.W_V.shape[0]
            for kv in range(groups):
                r, s = (torch.eye(d_head) + 0.3 * torch.randn(d_head, d_head, generator=generator) for _ in range(2))
                heads = range(kv * N_HEADS // groups, (kv + 1) * N_HEADS // groups)
                attention.W_V[kv].copy_(attention.W_V[kv] @ r)
                attention.W_K[kv].copy_(attention.W_K[kv] @ torch.linalg.inv(s).T)
                for head in heads:
                    attention.W_O[head].copy_(torch.linalg.inv(r) @ attention.W_O[head])
                    attention.W_Q[head].copy_(attention.W_Q[head] @ s)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
@pytest.mark.parametrize("mode", MODES)
def test_equals_all_composition_scores(family: str, mode: Any) -> None:
    bridge = tiny_bridge(family)
    ours, theirs = composition_scores(bridge, mode).values, bridge.all_composition_scores(mode).scores
    np.testing.assert_allclose(ours.fillna(0).values, theirs.detach().numpy(), atol=1e-5)
    assert int(ours.notnull().sum()) == N_HEADS**2 * sum(range(int(bridge.cfg.n_layers)))
    less = composition_scores(bridge, mode, subtract_baseline=True)
    np.testing.assert_allclose(less.values + D_MODEL**-0.5, ours, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_equals_whole_products_with_norms_between(mode: Any) -> None:
    bridge = tiny_bridge("gpt2")
    weights, found = head_weights(bridge), gains(bridge)
    early, late = (0, 1), (2, 3)
    writes = weights.W_V[early] @ weights.W_O[early]
    read = torch.diag(found.before[late[0]]) @ {"Q": weights.W_Q, "K": weights.W_K, "V": weights.W_V}[mode][late]
    read = read - read.mean(0)
    other = {"Q": weights.W_K, "K": weights.W_Q}.get(mode)
    outer = weights.W_O[late].T if other is None else torch.diag(found.before[late[0]]) @ other[late]
    whole = read @ outer.T
    expected = torch.linalg.norm(writes @ whole) / torch.linalg.norm(writes) / torch.linalg.norm(whole)
    ours = composition_scores(bridge, mode, norms=True).values.values[early + late]
    assert float(ours) == pytest.approx(float(expected), abs=1e-6)
    assert abs(float(ours) - float(composition_scores(bridge, mode).values.values[early + late])) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_random_weights_average_the_baseline(mode: Any) -> None:
    bridge = fresh_bridge("gpt2", n_embd=96, n_head=12)
    with torch.no_grad():
        for block in bridge.blocks:
            for name in ("W_Q", "W_K", "W_V", "W_O"):
                weight = getattr(block.attn, name)
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    found = composition_scores(bridge, mode)
    assert found.baseline == pytest.approx(96**-0.5)
    assert float(found.values.mean()) == pytest.approx(96**-0.5, rel=0.1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_change_of_basis_within_heads_changes_nothing(family: str) -> None:
    bridge = fresh_bridge(family)
    before = {mode: composition_scores(bridge, mode).values for mode in MODES}
    eigen = ov_copying(bridge).values
    raw = bridge.blocks[0].attn.W_V.clone()
    change_basis(bridge)
    assert not torch.allclose(raw, bridge.blocks[0].attn.W_V, atol=1e-2)
    for mode in MODES:
        np.testing.assert_allclose(composition_scores(bridge, mode).values, before[mode], atol=1e-5)
    np.testing.assert_allclose(ov_copying(bridge).values, eigen, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_induction_pair_is_the_strongest(seed: int) -> None:
    bridge, places = planted_heads(seed)
    table = composition_scores(bridge, "K").table()
    wanted = {"L{}H{}".format(*places[kind]) for kind in ("induction", "blind induction")}
    assert set(table["late"].head(2)) == wanted
    assert set(table["early"].head(2)) == {"L{}H{}".format(*places["source"])}
    assert table["score"].iloc[1] > 3 * table["score"].iloc[2]
    previous = pattern_scores(bridge, text(seed=seed), ["previous_token"])
    looks = prefix_matching_from_weights(bridge, previous)
    assert set(looks.best("prefix_matching_weights", 2)) == wanted
    assert float(looks.values.sel(layer=0).notnull().sum()) == 0


def test_prefix_matching_equals_the_trace_of_the_whole_circuit() -> None:
    bridge = tiny_bridge("llama")
    weights, norms = head_weights(bridge), gains(bridge)
    previous = pattern_scores(bridge, tiny_tokens(), ["previous_token"])
    trust = previous.mean("previous_token").values
    head, total = 2, 0.0
    tokens = bridge.W_E.double() - bridge.W_E.double().mean(0)
    for early in range(N_HEADS):
        wrote = (tokens * norms.before[0]) @ weights.W_V[0, early] @ weights.W_O[0, early]
        query = (tokens * norms.before[1]) @ weights.W_Q[1, head]
        wanted = query @ (norms.before[1][:, None] * weights.W_K[1, head]).T
        cosine = (wanted * wrote).sum() / wanted.norm() / wrote.norm()
        eigenvalues = torch.linalg.eigvals(wanted @ wrote.T)  # their sum is the trace
        assert float(eigenvalues.real.sum()) == pytest.approx(float((wanted * wrote).sum()), rel=1e-6)
        total += trust[0, early] * float(cosine)
    found = prefix_matching_from_weights(bridge, previous)
    assert float(found.values.squeeze()[1, head]) == pytest.approx(total / trust[0].sum(), abs=1e-5)


def test_results_are_saved_and_drawn(tmp_path: Any) -> None:
    found = composition_scores(tiny_bridge("llama"), "K")
    again = type(found).load(found.save(tmp_path / "k.nc"))
    assert again.mode == "K"
    assert again.values.identical(found.values)
    assert found.strongest().dims == ("layer", "head")
    assert found.plot().data


def test_what_is_refused() -> None:
    bridge = tiny_bridge("gpt2")
    with pytest.raises(KeyError, match="no score 'previous_token'; there is 'induction'"):
        prefix_matching_from_weights(bridge, pattern_scores(bridge, tiny_tokens(), ["induction"]))
    two = pattern_scores(tiny_bridge("gpt_neo"), tiny_tokens(), ["previous_token"])
    assert isinstance(two, HeadScores)
    with pytest.raises(ValueError, match=r"previous has \(4, 4\) layers and heads; this model has \(3, 4\)"):
        prefix_matching_from_weights(bridge, two)
