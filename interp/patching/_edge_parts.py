"""Norms and matrices between the stream and its readers and writers, differentiated as backward rules have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp import hooks
from interp.patching._backward import wide
from interp.patching._parts import Norm
from interp.patching._wiring import Wiring, wiring
from interp.patching.coverage import covered_parts
from interp.patching.rules import Rules

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """What one block reads and writes the stream with.

    Attributes:
        wiring: Of the model, checked.
        layer: The block.
        attn_norm, mlp_norm: From the stream to the input of attention and of the MLP; their derivatives obey the rules.
            `mlp_norm` is None where there is no MLP.
        post_norm: From the sum of the heads to what attention adds to the stream; None if that is the sum itself.
        attn_in, mlp_in: Hooks of the stream that attention and the MLP read.
        mlp_input: Hook of the MLP's input, after the norm.
        post_in: Hook of the post-norm's input, if there is one.
    """

    wiring: Wiring
    layer: int
    attn_norm: Map
    mlp_norm: Map | None
    post_norm: Map | None
    attn_in: str
    mlp_in: str
    mlp_input: str
    post_in: str | None

    def weight(self, site: Literal["q", "k", "v", "z"]) -> Float[Tensor, "head a b"]:
        """The weights of a site, [head, d_model, d_head] or for `z` [head, d_head, d_model], in float32 at least."""
        return wide(self.wiring.weight(site, self.layer))


def blocks_of(bridge: Any, rules: Rules) -> list[Block]:
    """The blocks of a model. Raises ValueError where it does not read and write its stream by norms and linear maps,
    or where the rules do not cover it."""
    wired = wiring(bridge)
    ruled: dict[str, Map] = {}
    if rules.norm == "LN":
        ruled = {norm.path: norm for norm in covered_parts(bridge, rules).norms}

    def norm(layer: int, name: str, how: str) -> Map:
        path, module = f"blocks.{layer}.{name}", bridge.blocks[layer]._modules[name]
        if path in ruled:
            return ruled[path]
        return module.original_component if how == "module" else partial(Norm(path, module, False), differentiable=True)

    blocks = []
    for layer, found in enumerate(wired.layers):
        mid = "resid_pre" if wired.graph.parallel else "resid_mid"
        blocks.append(
            Block(
                wiring=wired,
                layer=layer,
                attn_norm=norm(layer, *found.norms["attn"]),
                mlp_norm=norm(layer, *found.norms["mlp"]) if found.has_mlp else None,
                post_norm=norm(layer, "ln1_post", "module") if found.post else None,
                attn_in=hooks.hook_name("resid_pre", layer),
                mlp_in=hooks.hook_name(mid, layer),
                mlp_input=f"blocks.{layer}.mlp.hook_in",
                post_in=wired.raw(layer) if found.post else None,
            )
        )
    return blocks


def pull(norm: Map, stream: Tensor, gradient: Float[Tensor, "row reader pos d_model"]) -> Tensor:
    """Gradients at the stream [row, pos, d_model] that a norm reads, from those of several readers at its output."""
    with torch.inference_mode(False), torch.enable_grad():
        entered = stream.detach().unsqueeze(1).expand_as(gradient).requires_grad_()
        left = norm(entered)
        return wide(torch.autograd.grad(left, entered, gradient.to(left.dtype))[0])


def push(norm: Map, at: Tensor, change: Float[Tensor, "row writer pos d_model"]) -> Tensor:
    """Changes of a norm's output to first order around `at` [row, pos, d_model], from those of several writers."""
    with torch.inference_mode(False), torch.enable_grad():
        entered = at.detach().unsqueeze(1).expand_as(change).requires_grad_()
        left = norm(entered)
        # the transpose of the transpose: forward-mode differentiation of torch warns, and not every norm has it
        probe = torch.zeros_like(left, requires_grad=True)
        back = torch.autograd.grad(left, entered, probe, create_graph=True)[0]
        return wide(torch.autograd.grad(back, probe, change.to(back.dtype))[0])
