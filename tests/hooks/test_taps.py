"""Taps: tensors that the model goes on with, so that autograd is right with respect to every one of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp import hooks
from interp.types import SITES
from tests.helpers import FAMILIES, N_LAYERS, fresh_bridge, tiny_bridge, tiny_tokens

START = "blocks.0.hook_resid_pre"


def site_names(bridge: Any) -> list[str]:
    every = [hooks.hook_name(site, layer) for site in SITES if site != "resid_mid" for layer in range(N_LAYERS)]
    return [name for name in every if hooks.names(bridge, name)]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_at_taps_are_those_of_backward_hooks_and_the_forward_is_unchanged(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    names = site_names(bridge)
    with torch.no_grad():
        plain = bridge(tokens)
    with hooks.no_retained_graph(bridge):
        with hooks.taps(bridge, names) as taps:
            logits = bridge(tokens)
        assert torch.equal(logits, plain)
        found = torch.autograd.grad(logits[:, -1, 5].sum(), [taps[name] for name in names])
        start = {START: lambda tensor: tensor.detach().requires_grad_()}
        with hooks.interventions(bridge, start), hooks.gradients(bridge, names) as expected:
            bridge(tokens)[:, -1, 5].sum().backward()
    for name, gradient in zip(names, found, strict=True):
        assert torch.allclose(gradient, expected[name], atol=1e-6), name
        assert gradient.abs().max() > 1e-7, name


@pytest.mark.parametrize("family", ["gpt_neo", "gptj", "opt"])
def test_delegated_attention_has_gradients_at_queries_keys_and_values(family: str) -> None:
    bridge, tokens = tiny_bridge(family, dtype=torch.float64), tiny_tokens()
    with hooks.no_retained_graph(bridge):
        for site in ("q", "k", "v", "z"):
            name = hooks.hook_name(site, 1)  # type: ignore[arg-type]
            with hooks.taps(bridge, [START, name]) as taps:
                logits = bridge(tokens)
            (gradient,) = torch.autograd.grad(logits[:, -1, 5].sum(), [taps[name]])
            direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0)).double()
            ends = []
            for sign in (1, -1):
                with torch.no_grad(), hooks.interventions(bridge, {name: lambda t, _d=sign * direction: t + 1e-3 * _d}):
                    ends.append(bridge(tokens)[:, -1, 5].sum())
            slope = float(ends[0] - ends[1]) / 2e-3
            # these models' softmax is in float32, whose rounding a difference quotient divides by its step
            assert float((gradient * direction).sum()) == pytest.approx(slope, rel=5e-3, abs=5e-4)
        pattern = hooks.hook_name("pattern", 1)
        with hooks.taps(bridge, [START, pattern]) as taps:
            logits = bridge(tokens)
        assert torch.autograd.grad(logits.sum(), [taps[pattern]], allow_unused=True) == (None,)


def test_contexts_entered_before_are_upstream_and_those_entered_after_are_downstream() -> None:
    bridge, tokens, name = tiny_bridge("gpt2"), tiny_tokens(), "blocks.1.hook_mlp_out"
    doubled = {name: lambda tensor: 2 * tensor}

    with hooks.no_retained_graph(bridge), hooks.taps(bridge, START):
        with hooks.interventions(bridge, doubled), hooks.taps(bridge, name) as after:
            logits = bridge(tokens)
        (behind,) = torch.autograd.grad(logits[:, -1, 5].sum(), [after[name]])
        with hooks.taps(bridge, name) as before, hooks.interventions(bridge, doubled):
            logits = bridge(tokens)
        (ahead,) = torch.autograd.grad(logits[:, -1, 5].sum(), [before[name]])
    assert torch.allclose(ahead, 2 * behind)
    assert torch.allclose(after[name], 2 * before[name])


def test_a_tap_starts_a_graph_where_none_arrives_and_none_without_gradients() -> None:
    bridge, tokens, name = tiny_bridge("llama"), tiny_tokens(), "blocks.2.hook_resid_pre"
    with hooks.no_retained_graph(bridge), hooks.taps(bridge, name) as taps:
        logits = bridge(tokens)
        assert taps[name].is_leaf and taps[name].requires_grad and logits.requires_grad
        with torch.no_grad():
            assert not bridge(tokens).requires_grad
        assert not taps[name].requires_grad


def test_refusals_and_everything_restored() -> None:
    bridge = fresh_bridge("gpt2")
    before = [len(point.fwd_hooks) for point in bridge.hook_points()]
    with pytest.raises(ValueError, match=r"gradient of the stream is that at 'blocks.1.hook_attn_out'"):  # noqa: SIM117
        with hooks.taps(bridge, "blocks.1.hook_resid_mid"):
            pass
    with (
        pytest.raises(KeyError, match="no hook point 'blocks.7.hook_mlp_out'"),
        hooks.taps(bridge, "blocks.7.hook_mlp_out"),
    ):
        pass
    with (
        pytest.raises(KeyError, match="no forward inside the context reached 'blocks.0.hook_mlp_out'"),
        hooks.taps(bridge, "blocks.0.hook_mlp_out") as taps,
    ):
        taps["blocks.0.hook_mlp_out"]
    with pytest.raises(ValueError, match=r"'embed.hook_in' holds torch.int64"), hooks.taps(bridge, "embed.hook_in"):
        bridge(tiny_tokens())
    assert [len(point.fwd_hooks) for point in bridge.hook_points()] == before
