"""RazorAttention: scores by brute force and on planted heads, budget, compression, compensation, cache policies."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from interp.attention import (
    CachePolicy,
    cache_effects,
    compensated_attention,
    compression,
    head_budget,
    razor_scores,
)
from interp.attention.razor import copies
from interp.hooks import reads
from interp.results import load
from tests.attention.planted import ANSWER, planted_model, planted_needles
from tests.attention.test_retrieval import random_needles
from tests.helpers import FAMILIES, tiny_bridge, tiny_tokens


@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "opt"])
def test_scores_equal_brute_force(family: str) -> None:
    """Blocks of 5 rows give what loops over the whole pattern give, sliding windows included."""
    bridge = tiny_bridge(family)
    found = razor_scores(bridge, n_tokens=9, repeats=3, n=2, block=5, seed=1)
    torch.manual_seed(0)
    tokens = tiny_tokens(2, 28, seed=3)
    tokens[:, 10:19], tokens[:, 19:28] = tokens[:, 1:10], tokens[:, 1:10]
    own = razor_scores(bridge, tokens=tokens, block=5, batch_size=1)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(len(bridge.blocks))]
    with torch.no_grad(), reads(bridge, names) as patterns:
        bridge(tokens)
    for layer, name in enumerate(names):
        for row in range(2):
            text = tokens[row].tolist()
            echo, induction, queries = torch.zeros(4), torch.zeros(4), 0
            for i in range(len(text)):
                earlier = [j for j in range(i) if text[j] == text[i]]
                queries += bool(earlier)
                for j in earlier:
                    echo += patterns[name][row, :, i, j]
                    induction += patterns[name][row, :, i, j + 1] if j + 1 < i else 0
            expected = torch.stack([echo, induction]) / queries
            assert np.allclose(own.values.values[:, layer, :, row], expected, atol=1e-5)
    assert found.values.sizes == {"score": 2, "layer": len(names), "head": 4, "example": 2}


def test_planted_induction_and_echo_heads_rank_first() -> None:
    bridge, plan = planted_model(7)
    needle = list(range(8, 9 + ANSWER))
    filler = [[30 + (7 * i + j) % 18 for j in range(10)] for i in range(2)]
    tokens = torch.tensor([[0, *filler[i], *needle, *filler[i][:3], *needle, *filler[i][3:6]] for i in range(2)])
    scores = razor_scores(bridge, tokens=tokens)
    frame = scores.summary()
    best = {(int(a), int(b)) for a, b in zip(frame["layer"][:2], frame["head"][:2], strict=True)}
    # the head that takes the earlier copy is an induction head too: of one earlier copy there is but one
    assert best <= set(plan.heads("retrieval", "outside"))
    assert frame["induction"].iloc[0] > 0.9
    assert not set(plan.heads("self", "previous", "sink")) & best
    full = head_budget(scores, induction=2 / 18, echo=0)
    assert {(int(a), int(b)) for a, b in np.argwhere(full.values)} == best


def test_copies_are_earlier_and_followed() -> None:
    same, after = copies(torch.tensor([[5, 6, 5, 5, 7]]), 2, 5)
    assert same[0].int().tolist() == [[1, 0, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert after[0].int().tolist() == [[0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="repeats no token"):
        razor_scores(tiny_bridge("llama"), tokens=torch.tensor([[0, 1, 2, 3]]))
    with pytest.raises(ValueError, match="repeats=1"):
        razor_scores(tiny_bridge("llama"), repeats=1)
    with pytest.raises(ValueError, match="context is 64"):
        razor_scores(tiny_bridge("llama"), n_tokens=40)


def test_the_budget_is_the_union_of_both_shares() -> None:
    values = xr.DataArray(
        np.zeros((2, 10, 10)), dims=("score", "layer", "head"), coords={"score": ["echo", "induction"]}
    )
    values[0, 3, 4], values[1, 2, :], values[1, 5, :4] = 1, 1, 0.5
    values = values.assign_coords(layer=range(10), head=range(10))
    full = head_budget(values)
    assert int(full.sum()) == 15
    assert float(full.mean()) == 0.15
    assert bool(full[3, 4]) and bool(full[2].all()) and bool(full[5, :4].all())
    values[0, 3, 4], values[0, 2, 0] = 0, 1  # an echo head that is an induction head too counts once
    assert int(head_budget(values).sum()) == 14
    grouped = head_budget(values, induction=0.05, echo=0, kv_heads=2)
    assert int(grouped.sum()) == 5  # one group of twenty
    assert int(grouped[2].sum()) == 5
    with pytest.raises(ValueError, match="cannot share 3"):
        head_budget(values, kv_heads=3)
    with pytest.raises(ValueError, match="induction=1.5"):
        head_budget(values, induction=1.5)


def test_compression_is_the_published_one() -> None:
    assert compression(100_000, 0.15, minimum=0, sinks=0, compensation=False) == pytest.approx(3.125)
    assert compression(100_000) == pytest.approx(1 / (0.15 + 0.85 * 20_005 / 100_000))
    assert compression(10_000) == pytest.approx(1 / (0.15 + 0.85 * 4005 / 10_000))  # the minimum of 4000
    assert compression(3000) == 1  # nothing to drop
    assert compression(1000, 0.0, buffer=96, compensation=False) == 10
    with pytest.raises(ValueError, match="full_share=2"):
        compression(100, 2)


def test_compensation_is_exact_for_equal_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        q, k, v = (torch.randn(3, n, 8, generator=generator, dtype=torch.float64) for n in (2, 40, 40))
        keep = torch.zeros(40, dtype=torch.bool)
        keep[:4] = keep[-6:] = True
        k[:, ~keep] = k[:, 10:11]  # equal keys, any values
        whole = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v
        assert torch.allclose(compensated_attention(q.float(), k.float(), v.float(), keep), whole.float(), atol=1e-5)
        exact = (compensated_attention(*(x.float() for x in (q, k, v)), keep) - whole).abs().max()
        assert exact < 2e-6, seed
        dropped = compensated_attention(q.float(), k.float(), v.float(), keep, compensation=False)
        assert (dropped - whole).abs().max() > 0.01
        k[:, 20] += 1  # and only then
        other = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v
        assert (compensated_attention(*(x.float() for x in (q, k, v)), keep) - other).abs().max() > 1e-4


@pytest.mark.parametrize("compensation", [True, False])
def test_policies_equal_attention_over_what_is_kept(compensation: bool) -> None:
    """In the model, against the formula on rotated keys: the first decoding step of every head of layer 0."""
    bridge, needles = tiny_bridge("llama"), random_needles(2, length=30)
    full = xr.DataArray(np.zeros((3, 4), dtype=bool), dims=("layer", "head"))
    full[0, 1] = True
    policy = CachePolicy(full, buffer=6, sinks=3, compensation=compensation)
    names = [f"blocks.0.attn.hook_{site}" for site in ("rot_q", "rot_k", "v", "z")]
    from interp.attention._decoding import decode, prefill
    from interp.attention.cache_policy import _kept

    for sample in needles.samples:
        tokens = sample.tokens[None]
        with torch.no_grad(), reads(bridge, names) as found:
            bridge(tokens)
        whole = {name.rsplit("_", 1)[-1]: found[name].clone() for name in names}
        past = prefill(bridge, tokens[:, :-1])
        with _kept(bridge, policy, 29), reads(bridge, names[-1:]) as found:
            decode(bridge, past, tokens[:, -1], 1)
        keep = torch.ones(30, dtype=torch.bool)
        keep[3:24] = False
        q, k, v = (_heads_first(whole[name]) for name in ("q", "k", "v"))
        k, v = (x.repeat_interleave(2, 0) for x in (k, v))
        short = compensated_attention(q[:, -1:], k, v, keep, compensation=compensation)[:, 0]
        z = found[names[-1]][0, 0]
        assert torch.allclose(z[[0, 2, 3]], short[[0, 2, 3]], atol=1e-5)
        assert torch.allclose(z[1], whole["z"][0, -1, 1], atol=1e-5)


def _heads_first(tensor: torch.Tensor) -> torch.Tensor:
    """[head, pos, d_head] from [1, pos, head, d_head] or [1, head, pos, d_head]: positions are 30."""
    return tensor[0].transpose(0, 1) if tensor.shape[1] == 30 else tensor[0]


def test_policies_lose_or_keep_the_planted_needle() -> None:
    bridge, plan = planted_model(8)
    needles = planted_needles(4)
    full = xr.DataArray(np.zeros((3, 6), dtype=bool), dims=("layer", "head"))
    full[plan.heads("retrieval")[0]] = True
    others = ~full
    policies = {
        "the head": CachePolicy(full, buffer=3, sinks=1),
        "the others": CachePolicy(others, buffer=3, sinks=1, compensation=False),
        "streaming": CachePolicy(None, buffer=3, sinks=1, compensation=False),
        "everything": CachePolicy(None, buffer=64),
    }
    found = cache_effects(bridge, needles, policies)
    frame = found.summary().set_index("policy")
    assert frame["recall"].to_dict() == pytest.approx(
        {"full": 1, "the head": 1, "the others": 0, "streaming": 0, "everything": 1}, abs=0.3
    )
    assert frame.loc["the head", "recall"] == 1
    assert frame.loc["full", "kl"] == 0
    assert frame.loc["everything", "kl"] == pytest.approx(0, abs=1e-6)
    assert frame.loc["everything", "compression"] == 1
    n = len(needles[0].tokens)
    assert frame.loc["the head", "cache"] == pytest.approx(1 / 18 + 17 / 18 * 5 / n)
    assert frame.loc["streaming", "cache"] == pytest.approx(4 / n)
    assert frame.loc["streaming", "kl"] > 0.1
    assert found.plot().data


def test_policies_refuse_what_does_not_fit(tmp_path: Any) -> None:
    bridge, needles = tiny_bridge("llama"), random_needles(2)
    wrong = xr.DataArray(np.zeros((2, 4), dtype=bool), dims=("layer", "head"))
    with pytest.raises(ValueError, match="this model has 3 layers of 4 heads"):
        cache_effects(bridge, needles, {"a": CachePolicy(wrong)})
    with pytest.raises(ValueError, match="at least one policy"):
        cache_effects(bridge, needles, {})
    with pytest.raises(ValueError, match="caps attention scores at 20"):
        cache_effects(tiny_bridge("gemma2"), needles, {"a": CachePolicy(None, 4)})
    with pytest.raises(ValueError, match="buffer=0"):
        CachePolicy(None, 0)
    found = cache_effects(tiny_bridge("gemma2"), needles, {"a": CachePolicy(None, 4, compensation=False)})
    assert load(found.save(tmp_path / "a.nc")).values.identical(found.values)
    assert float(found.values.sel(policy="a", measure="kl").min()) > 0
