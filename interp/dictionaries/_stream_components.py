"""What the residual stream that a layer's attention reads is a sum of, and how each part of it reaches the values.

With the scales of the norms held, everything from a part of the stream to a value is linear: a part x at a source adds
(x . rho_h) / sigma to v_h . w_h, with rho_h the direction w_h taken back through W_V and the norm's gain and centring.
Directions of one latent are taken back once, and never a matrix over positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks import hook_name
from interp.hooks.names import without_hooks
from interp.models import geometry
from interp.neurons._sides import _gain

Pull = Callable[[Float[Tensor, "*batch d_model"]], Float[Tensor, "*batch width"]]


@dataclass(frozen=True)
class HeldNorm:
    """A norm whose scale is held at what it was: x -> gain * (x, centred if LayerNorm) * inverse + bias.

    Attributes:
        inverse: One over the scale of every token, [example, pos].
    """

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool
    inverse: Float[Tensor, "example pos"]

    def pull(self, directions: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Directions behind the norm as directions before it, but for the scale."""
        directions = directions * self.gain
        return directions - directions.mean(-1, keepdim=True) if self.centred else directions

    def linear(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Gain and centring alone."""
        return self.gain * (x - x.mean(-1, keepdim=True) if self.centred else x)


def held_norm(bridge: Any, norm: Any, x: Float[Tensor, "example pos d_model"], y: Tensor | None = None) -> HeldNorm:
    """The norm (None: there is none) on inputs `x`, whose outputs are `y` or those of the module itself."""
    d_model = x.shape[-1]
    if norm is None:
        return HeldNorm(
            x.new_ones(d_model).double(), x.new_zeros(d_model).double(), False, x.new_ones(x.shape[:2]).double()
        )
    like = next(iter(bridge.original_model.parameters()))
    with without_hooks(bridge), torch.no_grad():
        gain = _gain(bridge, norm).to(x.device)
        probe = torch.where(torch.arange(d_model) % 2 == 0, 1.0, -1.0).to(like).reshape(1, 1, -1)
        bias = ((norm(probe).double() + norm(-probe).double()) / 2).flatten()
        given: Tensor = norm(x.to(like)) if y is None else y
    centred = geometry(bridge).norm == "LayerNorm"
    held = HeldNorm(gain, bias, centred, x.new_ones(x.shape[:2]).double())
    lin = held.linear(x.double())
    inverse = ((given.double() - bias) * lin).sum(-1) / lin.square().sum(-1).clamp_min(1e-30)
    return HeldNorm(gain, bias, centred, inverse)


@dataclass(frozen=True)
class Part:
    """A term of the stream at every source position.

    Attributes:
        label, kind, hook: What it is, for the table.
        values: In the space of its own hook.
        pull: Directions in the stream as directions in that space.
        factor: What products are multiplied by, [example, pos]: the inverse scale of a post-norm; None for 1.
    """

    label: str
    kind: str
    hook: str
    values: Float[Tensor, "example pos width"]
    pull: Pull
    factor: Float[Tensor, "example pos"] | None = None

    def scores(self, rho: Float[Tensor, "*reader d_model"]) -> Float[Tensor, "example pos *reader"]:
        """Products with directions in the stream."""
        directions = self.pull(rho)
        found = (self.values @ directions.flatten(0, -2).T).unflatten(-1, directions.shape[:-1])
        if self.factor is None:
            return found
        return found * self.factor.reshape(*self.factor.shape, *[1] * (found.ndim - 2))


@dataclass(frozen=True)
class Writer:
    """How the heads of a layer reach the stream: z @ W_O, then the post-norm with its scale held, plus a bias."""

    weight: Float[Tensor, "d_in d_model"]
    norm: HeldNorm | None
    bias: Part

    def pull(self, rho: Float[Tensor, "*reader d_model"]) -> Float[Tensor, "*reader d_in"]:
        """Directions in the stream as directions in the flattened z."""
        return (rho if self.norm is None else self.norm.pull(rho)) @ self.weight.T

    def head_parts(self, layer: int, z: Float[Tensor, "example pos head d_head"]) -> list[Part]:
        """A term per head, and the bias."""
        n_heads, hook = z.shape[2], hook_name("z", layer)

        def pull(rho: Tensor, *, head: int) -> Tensor:
            return self.pull(rho).unflatten(-1, z.shape[2:])[..., head, :]

        pulls = [functools.partial(pull, head=head) for head in range(n_heads)]
        heads = [Part(f"L{layer}H{h}", "head", hook, z[:, :, h], pulls[h], self.factor) for h in range(n_heads)]
        return [*heads, self.bias]

    @property
    def factor(self) -> Tensor | None:
        return None if self.norm is None else self.norm.inverse


def head_writer(bridge: Any, layer: int, z: Tensor, attn_out: Tensor) -> Writer:
    """The writer of a layer, checked against what its attention added.

    Raises:
        ValueError: If the heads do not add up to it.
    """
    attention, norm = bridge.blocks[layer].attn, bridge.blocks[layer]._modules.get("ln1_post")
    weight = attention.W_O.detach().double().flatten(0, 1).to(z.device)
    b_O = getattr(attention, "b_O", None)
    constant = weight.new_zeros(weight.shape[1]) if b_O is None else b_O.detach().double().to(z.device)
    before = z.double().flatten(2) @ weight + constant
    held = None if norm is None else held_norm(bridge, norm, before, attn_out)
    bias = constant.expand(*before.shape)
    if held is not None:
        bias = held.linear(bias) * held.inverse[..., None] + held.bias
    heads = z.double().flatten(2) @ weight
    after = heads if held is None else held.linear(heads) * held.inverse[..., None]
    check_equal(bridge, after + bias, attn_out, f"the heads of layer {layer} do not add up to what attention adds")
    hook = hook_name("attn_out", layer)
    return Writer(weight, held, Part(f"b_O {layer}", "bias", hook, bias, lambda rho: rho))


def check_equal(bridge: Any, found: Tensor, expected: Tensor, what: str) -> None:
    """Raise unless two ways to compute an activation agree to the precision of the model."""
    gap = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
    if not gap <= (1e-4 if expected.dtype in (torch.float32, torch.float64) else 0.05):
        raise ValueError(
            f"on {bridge.cfg.model_name} {what} (they differ by {gap:.2g} of the largest), so that attribution through "
            "the stream would not be complete; direct_feature_attribution stops at the heads"
        )


def stream_parts(
    bridge: Any,
    layer: int,
    found: Mapping[str, Tensor],
    writers: Mapping[int, Writer],
    split: Collection[tuple[str, int]],
    *,
    heads: bool,
) -> list[Part]:
    """What resid_pre of a layer is the sum of: embeddings, and what attention and MLP of every earlier layer added.

    Attention of a layer is one part, or with `heads` one per head and a bias. Terms in `split`, (`"attention"` or
    `"mlp_out"`, layer), are left out: dictionaries have them.
    """

    def same(rho: Tensor) -> Tensor:
        return rho

    start, position = found[hook_name("resid_pre", 0)], found.get("hook_pos_embed")
    parts = [Part("embedding", "embedding", hook_name("resid_pre", 0), start.double(), same)]
    if position is not None:
        position = position.double().expand(start.shape)
        parts = [
            Part("embedding", "embedding", "hook_embed", start.double() - position, same),
            Part("position embedding", "embedding", "hook_pos_embed", position, same),
        ]
    for below in range(layer):
        attn, mlp = (hook_name(site, below) for site in ("attn_out", "mlp_out"))
        if ("attention", below) in split:
            pass
        elif heads:
            parts += writers[below].head_parts(below, found[hook_name("z", below)].double())
        else:
            parts.append(Part(f"attn_out {below}", "attention", attn, found[attn].double(), same))
        if mlp in found and ("mlp_out", below) not in split:
            parts.append(Part(f"mlp_out {below}", "mlp", mlp, found[mlp].double(), same))
    return parts
