"""The backward rules as forward hooks: the model's own value goes on, with the gradient of a surrogate.

A surrogate is linear in what flows back: all else in it is detached, so that input times gradient is its value.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp import hooks

if TYPE_CHECKING:
    from interp.patching._parts import Attention, Mlp, Norm, Parts
    from interp.patching.rules import Rules

_TEMPERATURE = 2.0  # of the softmax in the backward pass of GIM, which leaves out the 1/2 of the chain rule


class _Through(torch.autograd.Function):
    """The first argument's value with the second argument's gradient: bit-exact in every dtype, infinities included."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, whose backward pass is that of `surrogate` (same shape and dtype)."""
    return _Through.apply(value.detach(), surrogate)  # type: ignore[no-any-return]


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def attach_rules(stack: ExitStack, bridge: Any, rules: Rules, parts: Parts) -> None:
    """Add the hooks of these rules for as long as the stack is open."""
    if rules.norm == "LN":
        for norm in parts.norms:
            if not (norm.query_key and rules.attention == "AH"):
                _norm(stack, bridge, norm)
    for attention in parts.attentions:
        _attention(stack, bridge, attention, rules)
    for mlp in parts.mlps:
        _mlp(stack, bridge, mlp, rules)
    if parts.soft_cap is not None and rules.activation == "Identity":
        _soft_cap(stack, bridge)


def _norm(stack: ExitStack, bridge: Any, norm: Norm) -> None:
    entered: list[Tensor] = []

    def enter(tensor: Tensor, *, hook: Any) -> None:
        entered[:] = [tensor]

    def leave(tensor: Tensor, *, hook: Any) -> Tensor:
        return through(tensor, norm(entered.pop()))

    hooks.attach(stack, bridge, f"{norm.path}.hook_in", enter, "fwd")
    hooks.attach(stack, bridge, f"{norm.path}.hook_out", leave, "fwd")


def _attention(stack: ExitStack, bridge: Any, attention: Attention, rules: Rules) -> None:
    for name, factor in zip("qkv", rules.qkv, strict=True):
        site = f"{attention.path}.hook_{name}"
        if rules.attention == "AH" and name != "v":
            hooks.attach(stack, bridge, site, lambda tensor, *, hook: tensor.detach(), "fwd")
        elif factor != 1:
            hooks.attach(stack, bridge, site, _scale(float(factor)), "fwd")
    if rules.attention != "temperature":
        return
    entered: list[Tensor] = []

    def enter(scores: Tensor, *, hook: Any) -> None:
        entered[:] = [scores]

    def leave(pattern: Tensor, *, hook: Any) -> Tensor:
        return through(pattern, _TEMPERATURE * (entered.pop() / _TEMPERATURE).softmax(-1).to(pattern.dtype))

    hooks.attach(stack, bridge, f"{attention.path}.hook_attn_scores", enter, "fwd")
    hooks.attach(stack, bridge, f"{attention.path}.hook_pattern", leave, "fwd")


def _scale(factor: float) -> Callable[..., Tensor]:
    return lambda tensor, *, hook: _Scaled.apply(tensor, factor)  # type: ignore[no-any-return]


def _mlp(stack: ExitStack, bridge: Any, mlp: Mlp, rules: Rules) -> None:
    if rules.activation == "gradient" and (rules.gate == "gradient" or not mlp.gated):
        return
    entered: dict[str, Tensor] = {}

    def enter(name: str) -> Callable[..., None]:
        def keep(tensor: Tensor, *, hook: Any) -> None:
            entered[name] = tensor

        return keep

    def leave(post: Tensor, *, hook: Any) -> Tensor:
        pre = entered.pop("pre")
        if not mlp.gated:
            return through(post, pre * mlp.coefficient(pre))
        return through(post, _gated(mlp, rules, pre, entered.pop("linear")))

    hooks.attach(stack, bridge, f"{mlp.path}.hook_pre", enter("pre"), "fwd")
    if mlp.gated:
        hooks.attach(stack, bridge, f"{mlp.path}.hook_pre_linear", enter("linear"), "fwd")
    hooks.attach(stack, bridge, f"{mlp.path}.hook_post", leave, "fwd")


def _gated(mlp: Mlp, rules: Rules, gate: Tensor, linear: Tensor) -> Tensor:
    coefficient = mlp.coefficient(gate)
    active = gate.detach() * coefficient
    if rules.gate == "detach":
        return active * linear
    if rules.activation == "Identity":
        branch = gate * (coefficient * linear.detach())
    else:  # the derivative of the activation, by autograd
        branch = gate * mlp.coefficient(gate, differentiable=True) * linear.detach()
    half = 0.5 if rules.gate == "Half" else 1.0
    return half * (branch + active * linear)


def _soft_cap(stack: ExitStack, bridge: Any) -> None:
    """Logits after a cap, `cap * tanh(x / cap)`: x times a constant. No hook point follows the cap, the model's output
    does."""
    entered: list[Tensor] = []

    def enter(logits: Tensor, *, hook: Any) -> None:
        entered[:] = [logits]

    def leave(_model: Any, _inputs: Any, output: Any) -> Any:
        raw, capped = entered.pop(), output.logits.detach()
        ratio = torch.where(raw == 0, 1.0, capped / raw.detach())  # tanh(x) / x is 1 at 0
        output.logits = through(output.logits, raw * ratio.to(raw.dtype))
        return output

    hooks.attach(stack, bridge, "unembed.hook_out", enter, "fwd")
    stack.callback(bridge.original_model.register_forward_hook(leave).remove)
