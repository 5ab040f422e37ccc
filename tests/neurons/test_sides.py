"""What neurons read and write, held against forwards of the model and against the weights that transformers stores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp.hooks import hook_name, reads
from interp.models import geometry
from interp.neurons._sides import SIDES, Side, Unembedding, side_vectors, unembedding
from tests.helpers import (
    D_MLP,
    D_MODEL,
    D_VOCAB,
    FAMILIES,
    MORE_FAMILIES,
    N_LAYERS,
    fresh_bridge,
    tiny_bridge,
    tiny_model,
    tiny_tokens,
)

STORED = {  # attribute paths in transformers: layers, then the linear layers of a side
    "gpt2": ("transformer.h", {"in": "mlp.c_fc", "out": "mlp.c_proj"}),
    "llama": ("model.layers", {"in": "mlp.up_proj", "gate": "mlp.gate_proj", "out": "mlp.down_proj"}),
    "neox": ("gpt_neox.layers", {"in": "mlp.dense_h_to_4h", "out": "mlp.dense_4h_to_h"}),
    "gemma2": ("model.layers", {"in": "mlp.up_proj", "gate": "mlp.gate_proj", "out": "mlp.down_proj"}),
}


def scale(bridge: Any, stream: Tensor) -> Tensor:
    """What the norms divide by."""
    about = stream - stream.mean(-1, keepdim=True) if geometry(bridge).norm == "LayerNorm" else stream
    return (about.pow(2).mean(-1, keepdim=True) + float(bridge.cfg.eps)).sqrt()


def varies(difference: Tensor, against: Tensor) -> float:
    """How much a [pos, unit] difference changes over positions, beside the size of what it is the difference of."""
    rows = difference.reshape(-1, difference.shape[-1])
    return float((rows - rows.mean(0)).abs().max() / against.abs().max())


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_the_pre_activation_is_the_read_vector_times_the_stream_over_its_scale(family: str) -> None:
    bridge = tiny_bridge(family)
    gated, layer = geometry(bridge).gated, 1
    pre, linear = f"blocks.{layer}.mlp.hook_pre", f"blocks.{layer}.mlp.hook_pre_linear"
    hooks = {side: hook for side, hook in (("gate", pre), ("in", linear)) if gated} if gated else {"in": pre}
    names = [hook_name("resid_pre", layer), hook_name("attn_out", layer)]
    with torch.no_grad(), reads(bridge, [*names, *hooks.values()]) as found:
        bridge(tiny_tokens(2, 9))
    before = found[names[0]].reshape(-1, D_MODEL)
    stream = before if geometry(bridge).parallel else before + found[names[1]].reshape(-1, D_MODEL)
    for side, hook in hooks.items():
        vectors = side_vectors(bridge, layer, side)  # pyright: ignore[reportArgumentType]
        assert vectors.shape == (D_MLP, D_MODEL) and vectors.dtype == torch.float32
        actual = found[hook].reshape(-1, D_MLP)
        assert varies(actual - stream @ vectors.T / scale(bridge, stream), actual) < 1e-5, side


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_the_logits_are_the_stream_over_its_scale_times_the_unembedding(family: str) -> None:
    bridge = tiny_bridge(family)
    last = hook_name("resid_post", int(bridge.cfg.n_layers) - 1)
    with torch.no_grad(), reads(bridge, [last, "unembed.hook_out"]) as found:
        bridge(tiny_tokens(2, 9))
    directions = unembedding(bridge)
    assert directions.shape == (D_MODEL, D_VOCAB) and directions.dtype == torch.float32
    logits = found["unembed.hook_out"]
    assert varies(logits - found[last] @ directions / scale(bridge, found[last]), logits) < 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_what_the_mlp_adds_is_the_activations_times_the_write_vectors(family: str) -> None:
    bridge, layer = tiny_bridge(family), 1
    names = [hook_name("neuron", layer), hook_name("mlp_out", layer)]
    with torch.no_grad(), reads(bridge, names) as found:
        bridge(tiny_tokens(2, 9))
    post, added = found[names[0]].reshape(-1, D_MLP), found[names[1]].reshape(-1, D_MODEL)
    written = post @ side_vectors(bridge, layer, "out")
    if geometry(bridge).post_norm:  # divides by a scale of its own, before its gain
        assert bridge.blocks[layer].mlp.b_out is None
        written = written / scale(bridge, post @ side_vectors(bridge, layer, "out", fold=False))
    if geometry(bridge).norm == "LayerNorm":  # the mean is seen by nothing that comes after
        assert float(side_vectors(bridge, layer, "out").mean(-1).abs().max()) < 1e-7
        added = added - added.mean(-1, keepdim=True)
    assert varies(added - written, added) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_unfolded_vectors_are_the_weights_as_transformers_stores_them(family: str) -> None:
    bridge, plain = tiny_bridge(family), tiny_model(family)
    layers, linears = STORED[family]
    for side, name in linears.items():
        stored = plain.get_submodule(layers)[2].get_submodule(name).weight.detach()
        if family != "gpt2":  # a Conv1D keeps [in, out], a Linear [out, in]
            stored = stored.T
        found = side_vectors(bridge, 2, side, fold=False)  # pyright: ignore[reportArgumentType]
        assert torch.equal(found, stored if side == "out" else stored.T)
    assert torch.equal(unembedding(bridge, fold=False), plain.get_output_embeddings().weight.detach().T)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_folding_is_what_transformer_lens_does_to_processed_weights(family: str) -> None:
    raw, processed = tiny_bridge(family), fresh_bridge(family)
    processed.enable_compatibility_mode()
    for side in ("in", "out"):
        for fold in (True, False):  # nothing is left to fold
            torch.testing.assert_close(side_vectors(processed, 1, side, fold=fold), side_vectors(raw, 1, side))
    expected = unembedding(raw)  # TransformerLens takes the mean over the vocabulary out as well
    torch.testing.assert_close(unembedding(processed), expected - expected.mean(1, keepdim=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "added"), [("gpt2", 0), ("llama", 0), ("gemma2", 1)])
def test_gains_of_half_precision_models_are_not_rounded_again(family: str, added: int) -> None:
    bridge = tiny_bridge(family, dtype=torch.bfloat16)
    stored = bridge.blocks[1].ln2._original_component.weight.float() + added
    expected = bridge.blocks[1].mlp.W_in.T.float() * stored
    if geometry(bridge).norm == "LayerNorm":
        expected = expected - expected.mean(-1, keepdim=True)
    assert torch.equal(side_vectors(bridge, 1, "in"), expected)


def test_a_gain_stored_in_another_form_is_measured() -> None:
    bridge = fresh_bridge("llama")
    inner = bridge.blocks[0].ln2.original_component
    with torch.no_grad():
        inner.weight *= 3
    expected = side_vectors(tiny_bridge("llama"), 0, "in") * 3
    torch.testing.assert_close(side_vectors(bridge, 0, "in"), expected)
    original = inner.forward
    inner.forward = lambda x: 2 * original(x)  # neither its weight nor one more than it
    torch.testing.assert_close(side_vectors(bridge, 0, "in"), expected * 2)


def fresh_with(norm: Any, name: str) -> Any:
    """A new bridge whose first block claims to have this norm."""
    bridge = fresh_bridge("llama")
    bridge.blocks[0]._modules[name] = norm
    return bridge


def test_columns_of_the_unembedding_are_its_parts() -> None:
    for family in ("gpt2", "gemma2"):
        whole = unembedding(tiny_bridge(family))
        assert torch.equal(Unembedding(tiny_bridge(family), fold=True).columns(7, 20), whole[:, 7:20])


def test_a_model_of_another_make_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 0: what its MLP adds is not hook_post @ W_out .*relative difference"):
        side_vectors(fresh_with(tiny_bridge("llama").blocks[0].ln1, "ln2_post"), 0, "out")
    bridge = fresh_bridge("llama")
    with torch.no_grad():
        bridge.blocks[1].mlp.W_in[3, 4] = torch.nan
    with pytest.raises(ValueError, match="layer 1: its activations on three tokens are NaN"):
        side_vectors(bridge, 0, "in")
    bridge = fresh_bridge("llama")
    bridge._modules.pop("ln_final")
    with pytest.raises(ValueError, match="tiny-llama .*no norm before its unembedding"):
        unembedding(bridge)
    bridge = fresh_bridge("llama")
    bridge.blocks[2]._modules.pop("mlp")
    with pytest.raises(ValueError, match="mixture of experts"):
        side_vectors(bridge, 0, "in")


def test_sides_and_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="tiny-gpt2 has no gate: the MLP of GPT2LMHeadModel is plain"):
        side_vectors(tiny_bridge("gpt2"), 0, "gate")
    with pytest.raises(ValueError, match=f"no layer {N_LAYERS} in tiny-llama; its layers are 0 to {N_LAYERS - 1}"):
        side_vectors(tiny_bridge("llama"), N_LAYERS, "in")
    with pytest.raises(ValueError, match="no layer -1"):
        side_vectors(tiny_bridge("llama"), -1, "in")
    unknown: Any = "up"
    with pytest.raises((ValueError, TypeError)):
        side_vectors(tiny_bridge("llama"), 0, unknown)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_the_user_change_nothing_and_stay(family: str) -> None:
    bridge, calls = fresh_bridge(family), []
    expected = [side_vectors(tiny_bridge(family), 0, side) for side in sides_of(family)]
    for name in ("blocks.0.mlp.hook_post", "blocks.0.ln2.hook_out", "ln_final.hook_out"):
        bridge.add_hook(name, lambda tensor, hook: calls.append(hook.name) or tensor * 2)
    with torch.enable_grad():
        for side, vectors in zip(sides_of(family), expected, strict=True):
            found = side_vectors(bridge, 0, side)
            assert torch.equal(found, vectors) and not found.requires_grad
        assert torch.equal(unembedding(bridge), unembedding(tiny_bridge(family))) and torch.is_grad_enabled()
    assert calls == []
    bridge(tiny_tokens(1, 4))
    assert len(calls) == 3


def sides_of(family: str) -> list[Side]:
    return [side for side in SIDES if side != "gate" or geometry(tiny_bridge(family)).gated]
