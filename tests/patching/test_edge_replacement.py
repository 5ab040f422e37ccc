"""The exact pass against an oracle that replaces edges one by one, on every family; and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp import hooks
from interp.patching._edge_replacement import Written, recording, replacing, written
from interp.patching._wiring import wiring
from tests.helpers import FAMILIES, fresh_bridge, tiny_bridge, tiny_tokens
from tests.patching.edge_oracle import EdgeOracle
from tests.patching.oracle import prompts

P = prompts()


def random_masks(exists: Tensor, *shares: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([(torch.rand(exists.shape, generator=generator) < share) & exists for share in shares])


@torch.no_grad()
def run(bridge: Any, other: Written, masks: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits by circuit and example."""
    with replacing(bridge, wiring(bridge), other, masks, positions):
        return bridge(P.clean.repeat(len(masks), 1)).unflatten(0, (len(masks), -1))


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_replacing_edge_by_edge(family: str) -> None:
    """Float64, several circuits in one pass: LayerNorm, grouped, parallel and post-norm models."""
    bridge = tiny_bridge(family, dtype=torch.float64)
    wired = wiring(bridge)
    oracle = EdgeOracle(fresh_bridge(family, dtype=torch.float64), wired.graph)
    masks = random_masks(wired.graph.exists, 0.03, 0.3, 0.8)
    found = run(bridge, written(bridge, wired, P.corrupted), masks)
    other = oracle.written(P.corrupted)
    for mask, logits in zip(masks, found, strict=True):
        expected = oracle(P.clean, other, wired.graph.edges(mask))
        assert torch.allclose(logits, expected, atol=1e-11)
        assert (logits - bridge(P.clean)).abs().max() > 0.1  # else nothing was tested


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3", "phi", "gptj", "gemma3"])
def test_nothing_replaced_is_the_run_and_everything_the_other(family: str) -> None:
    """Normed queries, one norm for both branches and delegated attention too."""
    bridge = tiny_bridge(family)
    exists = wiring(bridge).graph.exists
    other = written(bridge, wiring(bridge), P.corrupted)
    none, every = run(bridge, other, torch.stack([torch.zeros_like(exists), exists]))
    assert torch.allclose(none, bridge(P.clean), atol=1e-6)
    assert torch.allclose(every, bridge(P.corrupted), atol=1e-5)


def test_a_run_of_its_own_is_left_alone_bit_for_bit() -> None:
    bridge = tiny_bridge("llama")
    exists = wiring(bridge).graph.exists
    other = written(bridge, wiring(bridge), P.corrupted)
    assert torch.equal(run(bridge, other, torch.zeros_like(exists)[None])[0], bridge(P.clean))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_of_a_writer_are_its_site(family: str) -> None:
    """What leaves a head or an MLP is replaced wherever it is read: a patch of the activation itself."""
    bridge = tiny_bridge(family, dtype=torch.float64)
    graph = wiring(bridge).graph
    other = written(bridge, wiring(bridge), P.corrupted)
    for writer, site, unit in (("a1.h1", "z", 1), ("m1", "mlp_out", None), ("input", "resid_pre", None)):
        mask = torch.zeros_like(graph.exists)
        mask[graph.writers.index(writer)] = graph.exists[graph.writers.index(writer)]
        layer = 0 if writer == "input" else 1
        source = {"z": other.z, "mlp_out": other.mlp, "resid_pre": {0: other.input}}[site][layer]

        def patch(now: Tensor, source: Tensor = source, unit: int | None = unit) -> Tensor:
            if unit is None:
                return source
            return torch.where((torch.arange(now.shape[2]) == unit)[:, None], source, now)

        with hooks.interventions(bridge, {hooks.hook_name(site, layer): patch}):  # type: ignore[arg-type]
            expected = bridge(P.clean)
        assert torch.allclose(run(bridge, other, mask[None])[0], expected, atol=1e-11)


def test_only_at_some_positions() -> None:
    """Replaced at some positions, then at the others too: with edges into the logits alone the two add up."""
    bridge = tiny_bridge("gpt2", dtype=torch.float64)
    graph = wiring(bridge).graph
    other = written(bridge, wiring(bridge), P.corrupted)
    mask = torch.zeros_like(graph.exists)
    mask[:, -1] = True
    positions = torch.zeros(P.clean.shape, dtype=torch.bool)
    positions[:, 4:6] = True
    found = run(bridge, other, mask[None], positions)[0]
    assert torch.allclose(found[positions], run(bridge, other, mask[None])[0][positions])
    assert torch.equal(found[~positions], bridge(P.clean)[~positions])


@pytest.mark.parametrize("positions", [None, torch.tensor([[True] * 5 + [False] * 3] * 4)])
def test_zero_and_selected_rows(positions: Tensor | None) -> None:
    """`zeros` removes what was written, `[rows]` takes rows; a post-norm model, where both go through a norm."""
    bridge = tiny_bridge("gemma2", dtype=torch.float64)
    wired = wiring(bridge)
    mask = random_masks(wired.graph.exists, 0.4)
    zeros = written(bridge, wired, P.clean).zeros()
    assert all(not part.any() for part in (zeros.input, *zeros.z.values(), *zeros.mlp.values()))
    whole = run(bridge, zeros, mask, positions)[0]
    rows = torch.tensor([2, 0])
    with torch.no_grad(), replacing(bridge, wired, zeros[rows], mask, None if positions is None else positions[rows]):
        assert torch.allclose(bridge(P.clean[rows]), whole[rows], atol=1e-11)


def test_folded_weights_and_half_precision() -> None:
    bridge = fresh_bridge("gpt2")
    bridge.enable_compatibility_mode()
    exists = wiring(bridge).graph.exists
    found = run(bridge, written(bridge, wiring(bridge), P.corrupted), torch.stack([torch.zeros_like(exists), exists]))
    assert torch.allclose(found[0], bridge(P.clean), atol=1e-5)
    assert torch.allclose(found[1], bridge(P.corrupted), atol=1e-5)
    half = tiny_bridge("llama", dtype=torch.bfloat16)
    every = run(half, written(half, wiring(half), P.corrupted), exists_of(half)[None])[0]
    # eight bits of mantissa, rounded at every reader
    assert (every - half(P.corrupted)).abs().max() < 0.05 * half(P.corrupted).abs().max()


def exists_of(bridge: Any) -> Tensor:
    return wiring(bridge).graph.exists


def test_recording_is_what_was_written() -> None:
    bridge = tiny_bridge("llama")
    with recording(bridge, wiring(bridge)) as record:
        bridge(P.corrupted)
        bridge(P.clean)
    found = record()
    assert torch.equal(found.input, written(bridge, wiring(bridge), P.clean).input)
    w_o = torch.stack([block.attn.W_O for block in bridge.blocks])
    stream = found.input + sum(
        torch.einsum("bphe,hed->bpd", found.z[layer], w_o[layer]) + found.mlp[layer] for layer in found.z
    )
    with hooks.reads(bridge, "blocks.2.hook_resid_post") as reads:
        bridge(P.clean)
    assert torch.allclose(stream, reads["blocks.2.hook_resid_post"], atol=1e-5)


def test_hooks_are_gone_also_after_an_exception() -> None:
    bridge = fresh_bridge("llama")
    before = bridge(P.clean)
    other = written(bridge, wiring(bridge), P.corrupted)
    with pytest.raises(ZeroDivisionError), replacing(bridge, wiring(bridge), other, exists_of(bridge)[None]):
        raise ZeroDivisionError
    assert torch.equal(bridge(P.clean), before)
    assert not any(point.fwd_hooks for point in bridge.hook_points())


def test_a_model_that_does_not_add_up_is_refused() -> None:
    bridge = fresh_bridge("llama")

    def scale(tensor: Tensor, *, hook: Any) -> Tensor:
        return 1.5 * tensor

    bridge.blocks[1].attn.hook_out.add_hook(scale, is_permanent=True)
    with pytest.raises(ValueError, match=r"in block 1, attention's output is not a sum over its heads"):
        wiring(bridge)
    bridge = fresh_bridge("gpt2")
    bridge.blocks[2].attn.q.hook_out.add_hook(lambda x, hook: x**2, is_permanent=True)
    with pytest.raises(ValueError, match=r"in block 2, queries, keys and values are not linear"):
        wiring(bridge)
    bridge = fresh_bridge("neox")
    bridge.blocks[0].mlp.hook_in.add_hook(lambda x, hook: x + x.roll(1, 1), is_permanent=True)
    with pytest.raises(ValueError, match=r"in block 0, the MLP's input is not a norm of the stream"):
        wiring(bridge)


def test_flags_that_split_inputs_change_nothing() -> None:
    bridge = fresh_bridge("gpt2", dtype=torch.float64)
    masks = random_masks(exists_of(bridge), 0.3)
    before = run(bridge, written(bridge, wiring(bridge), P.corrupted), masks)
    bridge.set_use_split_qkv_input(True)
    bridge.set_use_hook_mlp_in(True)
    after = run(bridge, written(bridge, wiring(bridge), P.corrupted), masks)
    assert torch.allclose(before, after, atol=1e-11)


def test_a_second_forward_starts_anew() -> None:
    bridge = tiny_bridge("gpt2", dtype=torch.float64)
    other = written(bridge, wiring(bridge), P.corrupted)
    mask = random_masks(exists_of(bridge), 0.3)
    second = tiny_tokens(*P.clean.shape, seed=5)
    with torch.no_grad(), replacing(bridge, wiring(bridge), other, mask):
        bridge(P.clean)
        found = bridge(second)
    with torch.no_grad(), replacing(bridge, wiring(bridge), other, mask):
        assert torch.equal(found, bridge(second))
