"""What heads write: planted copiers, suppressors and successors, formulas written out, families."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from interp.attention import (
    attended_token_copying,
    copy_scores,
    name_mover_scores,
    ov_copying,
    successor_scores,
)
from interp.attention._weights import gains, head_weights
from interp.hooks import hook_name
from tests.attention.classic_heads import D_VOCAB, names, planted_heads, text
from tests.helpers import FAMILIES, MORE_FAMILIES, fresh_bridge, tiny_bridge, tiny_tokens


def places_of(values: Any, above: float) -> set[tuple[int, int]]:
    return {(int(layer), int(head)) for layer, head in np.argwhere(values.values > above)}


@pytest.mark.parametrize("seed", range(8))
def test_planted_writers_are_found_and_nothing_else(seed: int) -> None:
    bridge, places = planted_heads(seed)
    copiers = {places[kind] for kind in ("copier", "induction", "mover")}
    tokens = text(seed=seed)
    copies = copy_scores(bridge, tokens)
    assert places_of(copies.mean("copy"), 0.5) == copiers
    assert places_of(copies.mean("negative_copy"), 0.5) == {places["suppressor"]}
    assert all(copies.mean("copy").values[head] == 1 for head in copiers)
    eigen = ov_copying(bridge).mean("ov_copying")
    assert places_of(eigen, 0.9) == copiers
    assert places_of(-eigen, 0.9) == {places["suppressor"]}
    attended = attended_token_copying(bridge, tokens).mean("attended_token_copying")
    copiers_on_text = copiers - {places["induction"]}  # which looks at position 0 where nothing repeats
    assert {head for head in places_of(attended, 0.9) if head != places["induction"]} == copiers_on_text
    count = successor_scores(bridge, [list(range(2, D_VOCAB))])
    assert places_of(count.mean("successor"), 0.5) == {places["successor"]}
    assert places_of(count.mean("copy_in_sequence"), 0.5) == copiers


def test_name_mover_is_attention_times_copying() -> None:
    bridge, places = planted_heads(3)
    found = name_mover_scores(bridge, names())
    assert places_of(found.mean("name_mover"), 0.5) == {places["mover"]}
    assert places_of(found.mean("attention_to_subject"), 0.5) == {places["subject"]}
    product = found.values.sel(score="attention_to_answer") * found.values.sel(score="copy")
    np.testing.assert_allclose(found.values.sel(score="name_mover").values, product.values, atol=1e-6)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_gains_are_those_of_the_norms(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 9)
    found = gains(bridge)
    _, cache = bridge.run_with_cache(tokens)
    for layer in range(int(bridge.cfg.n_layers)):
        stream, read = cache[hook_name("resid_pre", layer)].double(), cache[f"blocks.{layer}.ln1.hook_out"].double()
        if found.centred:
            stream = stream - stream.mean(-1, keepdim=True)
        scale = stream.pow(2).mean(-1, keepdim=True).sqrt()
        ours = stream / scale * found.before[layer]
        # a bias is the same at every position
        torch.testing.assert_close(ours - ours[0, 0], read - read[0, 0], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_head_weights_give_the_output_of_attention(family: str) -> None:
    """Pattern and W_V W_O of every head, summed, are what attention writes up to a bias: GQA is expanded rightly."""
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 9)
    weights = head_weights(bridge)
    _, cache = bridge.run_with_cache(tokens)
    layer = 1
    z = cache[hook_name("z", layer)].double()
    parts = torch.einsum("bphk,hkd->bpd", z, weights.W_O[layer])
    v = cache[hook_name("v", layer)].double().repeat_interleave(z.shape[2] // cache[hook_name("v", layer)].shape[2], 2)
    mixed = torch.einsum("bhij,bjhk->bihk", cache[hook_name("pattern", layer)].double(), v)
    torch.testing.assert_close(mixed, z, atol=1e-5, rtol=1e-4)
    name = (
        f"blocks.{layer}.ln1_post.hook_in"
        if f"blocks.{layer}.ln1_post.hook_in" in cache
        else hook_name("attn_out", layer)
    )
    written = cache[name].double()
    torch.testing.assert_close(parts - parts[0, 0], written - written[0, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_ov_copying_equals_the_eigenvalues_of_the_whole_circuit(family: str) -> None:
    bridge = tiny_bridge(family)
    weights = head_weights(bridge)
    layer, head = 2, 3
    whole = bridge.W_E.double() @ weights.W_V[layer, head] @ weights.W_O[layer, head] @ bridge.W_U.double()
    eigenvalues = torch.linalg.eigvals(whole)
    expected = float(eigenvalues.real.sum() / eigenvalues.abs().sum())
    ours = ov_copying(bridge, norms=False)
    assert float(ours.mean("ov_copying")[layer, head]) == pytest.approx(expected, abs=1e-5)
    assert not np.allclose(ours.values, ov_copying(bridge).values)
    assert ours.interval()["low"].isnull().all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("over", ["sequence", "vocabulary"])
def test_attended_token_copying_equals_a_loop_over_keys(family: str, over: Any) -> None:
    bridge, tokens = tiny_bridge(family), torch.tensor([[0, 5, 6, 7, 8, 9]])
    found = attended_token_copying(bridge, tokens, over=over)
    _, cache = bridge.run_with_cache(tokens)
    layer, head = 1, 3
    weights, norms = head_weights(bridge), gains(bridge)
    kv = head * cache[hook_name("v", layer)].shape[2] // 4
    total = mass = 0.0
    for j in range(1, 6):
        out = cache[hook_name("v", layer)][0, j, kv].double() @ weights.W_O[layer, head] * norms.after[layer]
        out = out - out.mean() if norms.centred else out
        logits = (out * norms.final) @ bridge.W_U.double()
        if over == "sequence":
            logits = logits[tokens[0]]
        raised = (logits - logits.mean()).relu()
        own = raised[j] if over == "sequence" else raised[tokens[0, j]]
        weight = float(cache[hook_name("pattern", layer)][0, head, :, j].sum())
        total, mass = total + weight * float(own / raised.sum()), mass + weight
    assert float(found.values.squeeze()[layer, head]) == pytest.approx(2 * total / mass - 1, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_copy_scores_equal_a_rank_computed_through_the_models_own_modules(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 7)
    found = copy_scores(bridge, tokens, k=12)
    _, cache = bridge.run_with_cache(tokens)
    norms = gains(bridge)
    for layer, head in ((0, 1), (2, 2)):
        stream = cache[hook_name("resid_post", 0)] if layer else cache[hook_name("resid_pre", 0)]
        block = bridge.blocks[layer]
        read = block.ln1(stream)
        kv = head * block.attn.W_V.shape[0] // 4
        out = read @ block.attn.W_V[kv] @ block.attn.W_O[head] * norms.after[layer].float()
        plain = bridge.ln_final(1000 * out) - bridge.ln_final(-1000 * out)  # the norm's bias cancels
        order = (plain @ bridge.W_U).argsort(-1, descending=True)
        hits = (order[:, 1:, :12] == tokens[:, 1:, None]).any(-1).double().mean(-1)
        np.testing.assert_allclose(found.values.sel(score="copy", layer=layer, head=head).values, hits, atol=1e-6)


def test_scores_do_not_depend_on_batching_and_hooks_are_restored() -> None:
    bridge, tokens = fresh_bridge("llama"), torch.stack([torch.randperm(50)[:9] for _ in range(5)])
    hooks = sum(len(point.fwd_hooks) for point in bridge.hook_points())
    whole = attended_token_copying(bridge, tokens)
    parts = attended_token_copying(bridge, tokens, batch_size=2)
    np.testing.assert_allclose(whole.values, parts.values, atol=1e-5)
    copy_scores(bridge, tokens, positions=torch.full((5,), 3))
    assert sum(len(point.fwd_hooks) for point in bridge.hook_points()) == hooks


def test_what_is_refused() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens()
    with pytest.raises(ValueError, match=r"k=60; expected 1 to 59"):
        copy_scores(bridge, tokens, k=60)
    with pytest.raises(ValueError, match=r"positions \(2, 1\) do not fit tokens \(2, 9\)"):
        copy_scores(bridge, tokens, torch.tensor([3, 9]))
    with pytest.raises(ValueError, match=r"sequences of lengths \[2\]: expected at least one, each of 3 or more"):
        successor_scores(bridge, [[4, 5]])
    with pytest.raises(ValueError, match=r"name no positions \['io', 's1', 's2'\]"):
        from interp.prompts import Prompts

        ids = tiny_tokens(2, 5)
        name_mover_scores(bridge, Prompts(ids, ids.clone(), answers=ids[:, 1], foils=ids[:, 2]))
