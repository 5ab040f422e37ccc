"""Patterns reduced inside the forward: the same numbers as a cache of all of them, at the memory of one layer."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from interp import attention
from interp.attention import reduce_patterns
from interp.hooks import hook_name, interventions
from tests.helpers import D_HEAD, FAMILIES, MORE_FAMILIES, N_HEADS, fresh_bridge, tiny_bridge, tiny_tokens

ALL = (*FAMILIES, *MORE_FAMILIES)


def hooks_of(bridge: Any) -> int:
    return sum(len(point.fwd_hooks) + len(point._forward_hooks) for point in bridge.hook_points())


@pytest.mark.parametrize("family", ALL)
def test_equals_the_cached_patterns_of_every_family(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(5, 9)
    before = hooks_of(bridge)
    found = reduce_patterns(bridge, tokens, lambda _layer, pattern: pattern, batch_size=2)
    _, cache = bridge.run_with_cache(tokens)
    assert sorted(found) == list(range(int(bridge.cfg.n_layers)))
    for layer, pattern in found.items():
        assert pattern.shape == (5, N_HEADS, 9, 9)
        torch.testing.assert_close(pattern, cache[hook_name("pattern", layer)].float(), atol=1e-6, rtol=0)
        torch.testing.assert_close(pattern.sum(-1), torch.ones(5, N_HEADS, 9), atol=1e-5, rtol=0)
    assert hooks_of(bridge) == before


def test_several_statistics_with_rows_and_sites_from_one_forward() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(4, 7)
    calls: list[int] = []

    def reduce(layer: int, pattern: Tensor, ids: Tensor, v: Tensor) -> dict[str, Tensor]:
        calls.append(layer)
        assert pattern.dtype == torch.float32
        assert not pattern.requires_grad
        return {"first": pattern[..., 0], "ids": ids, "v": v}

    found = reduce_patterns(bridge, tokens, reduce, layers=[2, 0], batch_size=3, rows=[tokens], sites=["v"])
    assert calls == [0, 2, 0, 2]
    _, cache = bridge.run_with_cache(tokens)
    for layer in (0, 2):
        assert torch.equal(found[layer]["ids"], tokens)
        torch.testing.assert_close(found[layer]["v"], cache[hook_name("v", layer)])
        torch.testing.assert_close(found[layer]["first"], cache[hook_name("pattern", layer)][..., 0])
        assert found[layer]["v"].shape[-1] == D_HEAD


def test_layers_above_the_last_do_not_run() -> None:
    bridge = tiny_bridge("gpt2")
    ran: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_args, _i=i: ran.append(_i)) for i, block in enumerate(bridge.blocks)
    ]
    try:
        reduce_patterns(bridge, tiny_tokens(), lambda _layer, pattern: pattern[:, :, -1], layers=[0])
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_one_pattern_is_alive_at_a_time(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 9)
    alive: list[weakref.ref[Any]] = []

    def reduce(_layer: int, pattern: Tensor) -> Tensor:
        gc.collect()
        assert all(ref() is None for ref in alive), "a pattern of an earlier layer is still in memory"
        alive.append(weakref.ref(pattern.untyped_storage()))
        return pattern[:, :, 0]

    reduce_patterns(bridge, tokens, reduce)
    assert len(alive) == int(bridge.cfg.n_layers)


def test_interventions_are_seen_and_rows_below_one_are_left_alone() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens()
    with interventions(bridge, {hook_name("pattern", 1): lambda pattern: 0.5 * pattern}):
        found = reduce_patterns(bridge, tokens, lambda _layer, pattern: pattern.sum(-1))
    torch.testing.assert_close(found[1], torch.full_like(found[1], 0.5))
    torch.testing.assert_close(found[0], torch.ones_like(found[0]))


def test_half_precision_patterns_are_handed_over_in_float32() -> None:
    bridge = tiny_bridge("llama", dtype=torch.bfloat16)
    found = reduce_patterns(bridge, tiny_tokens(), lambda _layer, pattern: pattern[:, :, 0, 0])
    assert found[0].dtype == torch.float32


def test_hooks_are_removed_when_reduce_raises() -> None:
    bridge = tiny_bridge("neox")
    before = hooks_of(bridge)

    def reduce(_layer: int, _pattern: Tensor) -> Tensor:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        reduce_patterns(bridge, tiny_tokens(), reduce)
    assert hooks_of(bridge) == before


def test_what_is_refused() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens()

    def whole(_layer: int, pattern: Tensor) -> Tensor:
        return pattern

    with pytest.raises(ValueError, match=r"layers=\[3\] are not layers of this model; expected some of 0 to 2"):
        reduce_patterns(bridge, tokens, whole, layers=[3])
    with pytest.raises(ValueError, match="tokens has ids from 0 to 60; this model's vocabulary is 0 to 59"):
        reduce_patterns(bridge, torch.tensor([[0, 60]]), whole)
    with pytest.raises(ValueError, match="tokens has 65 positions; this model's context is 64"):
        reduce_patterns(bridge, torch.zeros(1, 65, dtype=torch.long), whole)
    with pytest.raises(ValueError, match=r"rows\[0\] has 1 rows and tokens 2"):
        reduce_patterns(bridge, tokens, whole, rows=[tokens[:1]])
    with pytest.raises(ValueError, match=r"sites \['z'\] are not known before the pattern"):
        reduce_patterns(bridge, tokens, whole, sites=["z"])
    with pytest.raises(ValueError, match="batch_size=0; expected at least 1"):
        reduce_patterns(bridge, tokens, whole, batch_size=0)
    with pytest.raises(ValueError, match=r"reduce gave a tensor \(4, 9, 9\); expected a tensor \[batch, ...\]"):
        reduce_patterns(bridge, tokens, lambda _layer, pattern: pattern[0])
    training = fresh_bridge("gpt2")
    training.train()
    with pytest.raises(RuntimeError, match="training mode"):
        reduce_patterns(training, tokens, whole)


def test_no_public_name_is_hidden_by_a_module_of_the_same_name() -> None:
    """Importing such a module would put it in the place of the function."""
    for name, home in attention._HOMES.items():
        assert name != home.rsplit(".", 1)[1]
        assert callable(getattr(attention, name)) or not name.islower()
