"""Masking: what each mask does to a head, that it is causal, and the curve on planted heads."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.attention import head_means, masked_heads, masking_curve, matched_random_heads, retrieval_scores
from interp.attention.masking import MASKS
from interp.hooks import reads
from interp.results import load
from tests.attention.planted import N_HEADS, N_LAYERS, RETRIEVAL, planted_model, planted_needles
from tests.attention.test_retrieval import random_needles
from tests.helpers import FAMILIES, tiny_bridge, tiny_tokens


def patterns(bridge: Any, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    names = [f"blocks.{layer}.attn.hook_{site}" for site in ("pattern", "z", "v")]
    with torch.no_grad(), reads(bridge, names) as found:
        bridge(tokens)
    return tuple(found[name] for name in names)  # pyright: ignore


@pytest.mark.parametrize("family", FAMILIES)
def test_each_mask_does_what_it_says(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 12)
    heads = [(0, 1), (1, 0), (1, 3)]
    means = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    visible = patterns(bridge, tokens, 0)[0] > 0  # 12 tokens are inside every window
    logits = [bridge(tokens)]
    for mask in MASKS:
        given = means if mask == "mean" else None
        with torch.no_grad(), masked_heads(bridge, heads, mask, means=given):
            logits.append(bridge(tokens))
            for layer in range(2):
                pattern, z, v = patterns(bridge, tokens, layer)
                v = v.repeat_interleave(4 // v.shape[2], 2)
                for head in range(4):
                    if (layer, head) not in heads:
                        intact = torch.einsum("bqk,bkd->bqd", pattern[:, head], v[:, :, head])
                        assert torch.allclose(z[:, :, head], intact, atol=1e-5)
                    elif mask == "uniform":
                        even = visible[:, head].float()
                        assert torch.allclose(pattern[:, head], even / even.sum(-1, keepdim=True), atol=1e-6)
                    elif mask == "bos":
                        assert torch.allclose(pattern[:, head, :, 0], torch.ones(2, 12))
                        assert torch.allclose(z[:, :, head], v[:, :1, head].expand(2, 12, 8), atol=1e-5)
    for i, a in enumerate(logits):  # all four, and none, are distinct
        for b in logits[i + 1 :]:
            assert not torch.allclose(a, b, atol=1e-4)
    assert torch.equal(bridge(tokens), logits[0])


@pytest.mark.parametrize("mask", ["zero", "mean"])
def test_output_masks_replace_what_the_head_writes(mask: Any) -> None:
    """Against the sum over heads of z W_O: the change of attn_out is that head's part."""
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(2, 9)
    means = torch.ones(3, 4, 8) if mask == "mean" else None
    name = "blocks.1.hook_attn_out"
    outs = []
    for context in (nullcontext(), masked_heads(bridge, [(1, 2)], mask, means=means)):
        with torch.no_grad(), context, reads(bridge, [name, "blocks.1.attn.hook_z"]) as found:
            bridge(tokens)
        outs.append((found[name], found["blocks.1.attn.hook_z"][:, :, 2]))
    new = torch.zeros(8) if means is None else means[1, 2]
    expected = (new - outs[0][1]) @ bridge.blocks[1].attn.W_O[2]
    assert torch.allclose(outs[1][0] - outs[0][0], expected, atol=1e-5)


def test_masks_are_causal_and_by_row() -> None:
    """A later token changes nothing before it under any mask; a row of masks acts on its row alone."""
    bridge, tokens = tiny_bridge("gemma2"), tiny_tokens(3, 12)
    other = tokens.clone()
    other[:, 8] = (other[:, 8] + 1) % 50 + 3
    rows = torch.zeros(3, 3, 4, dtype=torch.bool)
    rows[1, 0, 2] = rows[2, 1, 1] = True
    means = torch.ones(3, 4, 8)
    plain = bridge(tokens)
    for mask in MASKS:
        given = means if mask == "mean" else None
        with torch.no_grad(), masked_heads(bridge, rows, mask, means=given):
            a, b = bridge(tokens), bridge(other)
            with pytest.raises(ValueError, match="masks for 3 rows, but the forward has 2"):
                bridge(tokens[:2])
        assert torch.allclose(a[:, :8], b[:, :8], atol=1e-5)
        assert torch.allclose(a[0], plain[0], atol=1e-5)
        for row, head in ((1, (0, 2)), (2, (1, 1))):
            with torch.no_grad(), masked_heads(bridge, [head], mask, means=given):
                assert torch.allclose(a[row], bridge(tokens)[row], atol=1e-5)
            assert not torch.allclose(a[row], plain[row], atol=1e-4)


def test_the_first_token_must_be_seen() -> None:
    with (
        pytest.raises(ValueError, match="does not see the first token"),
        masked_heads(tiny_bridge("mistral"), [(0, 0)], "bos"),
    ):
        tiny_bridge("mistral")(tiny_tokens(1, 24))  # its window is 16
    with pytest.raises(ValueError, match=r"window of layers \[0, 1, 2\] no longer holds"):
        masking_curve(tiny_bridge("mistral"), random_needles(1), [(0, 0)], ks=[1], mask="bos", n_random=1)
    with pytest.raises(ValueError, match="cannot be replaced"):
        masking_curve(tiny_bridge("gptj"), random_needles(1), [(0, 0)], ks=[1], mask="uniform")
    curve = masking_curve(tiny_bridge("gptj"), random_needles(1), [(0, 0)], ks=[1], mask="zero", n_random=1)
    assert curve.values.sizes == {"k": 1, "heads": 2, "example": 1}


def test_means_are_those_of_whole_forwards() -> None:
    bridge, needles = tiny_bridge("gpt2"), random_needles(3, vary=True)
    expected = torch.zeros(3, 4, 8)
    for sample in needles.samples:
        for layer in range(3):
            expected[layer] += patterns(bridge, sample.tokens[None], layer)[1][0].mean(0) / 3
    assert torch.allclose(head_means(bridge, needles), expected, atol=1e-6)


@pytest.mark.parametrize("when", ["decode", "everywhere"])
def test_masking_the_planted_head_loses_the_needle(when: Any) -> None:
    bridge, plan = planted_model(5)
    needles = planted_needles(3)
    ranking = retrieval_scores(bridge, needles)
    draws = 25 if when == "decode" else 3
    for mask in MASKS:
        curve = masking_curve(bridge, needles, ranking, ks=[1], mask=mask, when=when, n_random=draws, batch_size=78)
        assert (curve.baseline == 1).all()
        assert float(curve.values.sel(heads="top").mean()) < 0.1, mask
        assert float(curve.values.isel(heads=slice(1, None)).mean("example").min()) > 0.95, mask  # 4 x 25 random masks
        chosen = curve.provenance["heads"]
        assert [tuple(head) for head in chosen[0]] == plan.heads(RETRIEVAL)
        assert all(heads[0][0] == chosen[0][0][0] and heads != chosen[0] for heads in chosen[1:])


def test_a_curve_has_intervals_tests_and_a_figure(tmp_path: Any) -> None:
    bridge, _ = planted_model(6)
    needles = planted_needles(8)
    curve = masking_curve(bridge, needles, retrieval_scores(bridge, needles), ks=[1, 2], n_random=2, match="any")
    frame = curve.summary()
    assert frame["k"].tolist() == [0, 0, 1, 1, 2, 2]
    top = frame.query("heads == 'top' and k > 0")
    assert (top["p_value"] < 0.05).all()
    assert frame.query("heads == 'random' and k > 0")["lowest"].tolist() == [1, 1]
    assert curve.plot().data
    back = load(curve.save(tmp_path / "curve.nc"))
    assert back.values.identical(curve.values)
    again = masking_curve(bridge, needles, retrieval_scores(bridge, needles), ks=[1, 2], n_random=2, match="any")
    assert again.provenance["heads"] == curve.provenance["heads"]


def test_random_heads_are_matched() -> None:
    top = [(1, 0), (1, 4), (2, 3)]
    for seed in range(50):
        drawn = matched_random_heads(top, N_LAYERS, N_HEADS, exclude=[(1, 1), (2, 0)], seed=seed)
        assert sorted(layer for layer, _ in drawn) == [1, 1, 2]
        assert not set(drawn) & {*top, (1, 1), (2, 0)}
    counts = np.bincount([head for seed in range(400) for _, head in matched_random_heads([(0, 0)], 1, 5, seed=seed)])
    assert counts[0] == 0
    assert counts[1:].min() > 60  # evenly
    with pytest.raises(ValueError, match="2 random heads of layer 0 are wanted, but only 1"):
        matched_random_heads([(0, 0), (0, 1)], 2, 3)
    with pytest.raises(ValueError, match="of the model are wanted"):
        matched_random_heads([(0, 0), (0, 1)], 1, 3, match="any")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ks": [0]}, r"ks=\[0\]"),
        ({"ks": [3]}, r"ks=\[3\]"),
        ({"ks": [1], "n_random": 0}, "n_random=0"),
        ({"ks": [2]}, "is not a head of this model"),
    ],
)
def test_curves_refuse_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masking_curve(tiny_bridge("llama"), random_needles(2), [(0, 0), (9, 0)], **{"match": "any"} | options)


def test_means_belong_to_the_mean_mask() -> None:
    for mask, means in (("mean", None), ("zero", torch.ones(3, 4, 8))):
        masking = masked_heads(tiny_bridge("llama"), [(0, 0)], mask, means=means)
        with pytest.raises(ValueError, match="means belong to mask='mean'"), masking:
            pass
