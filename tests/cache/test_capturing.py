"""capture: equal to run_with_cache, compact, no more blocks than needed, everything left as found."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.cache import capture
from interp.hooks import interventions, names
from tests.helpers import FAMILIES, N_HEADS, fresh_bridge, tiny_bridge, tiny_tokens

HOOKS = [
    "hook_embed",
    "blocks.0.hook_resid_pre",
    "blocks.1.attn.hook_q",
    "blocks.1.attn.hook_k",
    "blocks.1.attn.hook_z",
    "blocks.1.attn.hook_pattern",
    "blocks.2.mlp.hook_post",
    "blocks.2.hook_resid_post",
]


def reference(bridge: Any, tokens: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(bridge.run_with_cache(tokens)[1])


def n_hooks(bridge: Any) -> tuple[int, int]:
    points = bridge.hook_dict.values()
    return sum(len(point.fwd_hooks) for point in points), sum(len(point._forward_hooks) for point in points)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_run_with_cache_bit_for_bit(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(5, 9)
    expected = reference(bridge, tokens)
    found = capture(bridge, tokens, HOOKS)
    assert set(found) == set(HOOKS)
    for name in HOOKS:
        assert torch.equal(found[name], expected[name]), name


def test_the_final_norm_and_unembedding_can_be_captured() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    found = capture(bridge, tokens, ["ln_final.hook_out", "unembed.hook_out"])
    expected = reference(bridge, tokens)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_names_are_those_given_and_globs_give_one_name_per_hook_point() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens()
    assert list(capture(bridge, tokens, "blocks.1.hook_out")) == ["blocks.1.hook_out"]
    glob = capture(bridge, tokens, "blocks.*.hook_resid_post")
    assert list(glob) == [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    predicate = capture(bridge, tokens, lambda name: name.endswith("attn.hook_z"))
    assert list(predicate) == [f"blocks.{layer}.attn.hook_z" for layer in range(3)]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_are_run_one_by_one_and_joined_in_order(batch_size: int) -> None:
    bridge, tokens = tiny_bridge("neox"), tiny_tokens(5, 7)
    found = capture(bridge, tokens, HOOKS, batch_size=batch_size)
    parts = [reference(bridge, part) for part in tokens.split(batch_size)]
    for name in HOOKS:
        assert torch.equal(found[name], torch.cat([part[name] for part in parts])), name


@pytest.mark.parametrize("pos", [N_HEADS, 9])  # as many positions as heads: sizes alone do not tell the axes
def test_positions(pos: int) -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(3, pos)
    residual, pattern = "blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern"
    z = "blocks.1.attn.hook_z"
    whole = reference(bridge, tokens)
    rows = torch.arange(3)

    last = capture(bridge, tokens, [residual, z, pattern], positions=-1)
    assert torch.equal(last[residual], whole[residual][:, -1])
    assert torch.equal(last[z], whole[z][:, -1])
    assert torch.equal(last[pattern], whole[pattern][:, :, -1])  # [batch, head, src] of the last destination

    some = capture(bridge, tokens, [residual, pattern], positions=[2, 0], batch_size=2)
    parts = [reference(bridge, part) for part in tokens.split(2)]
    assert torch.equal(some[residual], torch.cat([part[residual] for part in parts])[:, [2, 0]])
    assert torch.equal(some[pattern], torch.cat([part[pattern] for part in parts])[:, :, [2, 0]])

    one_each = torch.tensor([0, 3, -2])
    each = capture(bridge, tokens, [residual, pattern], positions=one_each)
    assert torch.equal(each[residual], whole[residual][rows, one_each])
    assert torch.equal(each[pattern], whole[pattern][rows, :, one_each])

    two_each = torch.tensor([[0, 1], [3, 2], [-1, 0]])
    each = capture(bridge, tokens, [residual, z, pattern], positions=two_each)
    assert torch.equal(each[residual], whole[residual][rows[:, None], two_each])
    assert torch.equal(each[z], whole[z][rows[:, None], two_each])
    assert torch.equal(each[pattern], whole[pattern][rows[:, None], :, two_each].transpose(1, 2))


def test_results_are_compact_copies_without_gradient() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(4, 20)
    found = capture(bridge, tokens, ["blocks.0.hook_resid_pre", "blocks.0.attn.hook_q"], positions=3)
    for tensor in found.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert not tensor.requires_grad


@pytest.mark.parametrize(
    ("hooks", "blocks", "unembeds"),
    [
        ("blocks.0.hook_resid_pre", 0, 0),
        ("hook_embed", 0, 0),
        ("blocks.0.hook_resid_post", 1, 0),
        (["blocks.1.attn.hook_z", "blocks.0.mlp.hook_post"], 2, 0),
        ("blocks.2.hook_resid_post", 3, 0),
        ("ln_final.hook_out", 3, 1),
    ],
)
def test_layers_above_the_last_hook_do_not_run(hooks: Any, blocks: int, unembeds: int) -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    capture(bridge, tokens, hooks)  # the first use looks at shapes
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, kind=kind: ran.append(kind))
        for kind, module in [("mlp", block.mlp.original_component) for block in bridge.blocks]
        + [("unembed", bridge.unembed.original_component)]
    ]
    try:
        capture(bridge, tokens, hooks)
    finally:
        for handle in handles:
            handle.remove()
    assert (ran.count("mlp"), ran.count("unembed")) == (blocks, unembeds)


def test_hooks_are_left_as_found_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, tokens = tiny_bridge("gemma2"), tiny_tokens()
    logits = bridge(tokens)
    before = n_hooks(bridge)
    capture(bridge, tokens, HOOKS)
    assert n_hooks(bridge) == before

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("in the middle of a forward")

    monkeypatch.setattr(sys.modules["interp.cache.capturing"], "_select", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        capture(bridge, tokens, HOOKS)
    assert n_hooks(bridge) == before
    assert torch.equal(bridge(tokens), logits)
    assert torch.is_grad_enabled()


def test_active_interventions_are_seen() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    with interventions(bridge, {"blocks.0.hook_mlp_out": torch.zeros_like}):
        found = capture(
            bridge, tokens, ["blocks.0.hook_mlp_out", "blocks.0.hook_resid_post", "blocks.0.hook_resid_mid"]
        )
    assert not found["blocks.0.hook_mlp_out"].any()
    assert torch.equal(found["blocks.0.hook_resid_post"], found["blocks.0.hook_resid_mid"])


def test_bfloat16_is_kept() -> None:
    bridge = tiny_bridge("llama", dtype=torch.bfloat16)
    assert (
        capture(bridge, tiny_tokens(), "blocks.0.hook_resid_post")["blocks.0.hook_resid_post"].dtype == torch.bfloat16
    )


def test_refusals() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(2, 9)
    hook = "blocks.0.hook_resid_post"
    with pytest.raises(KeyError, match="Did you mean"):
        capture(bridge, tokens, "blocks.0.hook_resid_pots")
    with pytest.raises(ValueError, match=r"vocabulary is 0 to 59"):
        capture(bridge, tokens + 57, hook)
    with pytest.raises(ValueError, match="context is 64"):
        capture(bridge, tiny_tokens(1, 65), hook)
    with pytest.raises(ValueError, match=r"positions \[9\] do not exist"):
        capture(bridge, tokens, hook, positions=[0, 9])
    with pytest.raises(ValueError, match="pass a list"):
        capture(bridge, tokens, hook, positions=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="batch_size=0"):
        capture(bridge, tokens, hook, batch_size=0)
    with pytest.raises(ValueError, match=r"2,304 bytes.*max_bytes is 2,303.*harvest"):
        capture(bridge, tokens, hook, max_bytes=2303)
    assert capture(bridge, tokens, hook, max_bytes=2304)[hook].shape == (2, 9, 32)
    rotary = names(bridge, "rotary_emb.hook_cos")[0]
    with pytest.raises(ValueError, match="does not hold examples"):
        capture(bridge, tokens, rotary)
    training = fresh_bridge("gpt2").train()
    with pytest.raises(RuntimeError, match="training mode"):
        capture(training, tokens, hook)
