"""The weights of heads, one matrix per query head whatever is shared, and the gains of the norms around them.

Everything is float64 on the CPU: these products are small, and sums of squares of them are compared to 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks.names import device_of, without_hooks
from interp.models import geometry


@dataclass(frozen=True)
class HeadWeights:
    """Weights of every query head: a row vector times `W_V W_O` is what the head writes, `W_Q W_K^T` what it compares.

    Keys and values shared by a group of heads are repeated, so that all four have a head axis.
    """

    W_Q: Float[Tensor, "layer head d_model d_head"]
    W_K: Float[Tensor, "layer head d_model d_head"]
    W_V: Float[Tensor, "layer head d_model d_head"]
    W_O: Float[Tensor, "layer head d_head d_model"]


@dataclass(frozen=True)
class Gains:
    """What the norms multiply each dimension by; data-dependent scales are left out, since no rank depends on them.

    Attributes:
        before: Of the norm that attention reads through.
        after: Of the norm on attention's output, ones where there is none.
        final: Of the norm before the unembedding.
        centred: Whether these norms subtract the mean over dimensions (LayerNorm).
    """

    before: Float[Tensor, "layer d_model"]
    after: Float[Tensor, "layer d_model"]
    final: Float[Tensor, "d_model"]
    centred: bool


def head_weights(bridge: Any) -> HeadWeights:
    """The four matrices of every head, of the weights as they are (raw or processed)."""
    n_heads = int(bridge.cfg.n_heads)

    def stacked(name: str) -> Tensor:
        per_layer = [getattr(block.attn, name) for block in bridge.blocks]
        if any(weight is None or weight.ndim != 3 for weight in per_layer):
            raise ValueError(f"{bridge.cfg.model_name} has no {name} [head, ., .] in every layer; its heads are not of "
                             f"the kind that composition is defined for")  # fmt: skip
        weight = torch.stack([_double(weight) for weight in per_layer])
        return weight.repeat_interleave(n_heads // weight.shape[1], 1)

    return HeadWeights(stacked("W_Q"), stacked("W_K"), stacked("W_V"), stacked("W_O"))


def gains(bridge: Any) -> Gains:
    """The gains of the norms, measured: families store one less than the gain, or fold it away."""
    before, after = [], []
    with without_hooks(bridge):
        for block in bridge.blocks:
            before.append(_gain(bridge, block._modules.get("ln1")))
            after.append(_gain(bridge, block._modules.get("ln1_post")))
        final = _gain(bridge, bridge.ln_final)
    return Gains(torch.stack(before), torch.stack(after), final, geometry(bridge).norm == "LayerNorm")


def unembedding(bridge: Any) -> Float[Tensor, "d_model d_vocab"]:
    """Head output to direct logits, up to a positive factor per position: final gain (and centring), then W_U."""
    found = gains(bridge)
    return centred(found.final[:, None] * _double(bridge.W_U), 0, found.centred)


def embedding(bridge: Any) -> Float[Tensor, "d_vocab d_model"]:
    """The token embedding; position embeddings are not in it."""
    return _double(bridge.W_E)


def centred(weight: Tensor, axis: int, really: bool = True) -> Tensor:
    """The weight with its mean over the stream's dimensions taken out, where the norm before it does that."""
    return weight - weight.mean(axis, keepdim=True) if really else weight


def eigenvalue_share(matrices: Float[Tensor, "head n n"]) -> Float[Tensor, "head"]:
    """Sum of the eigenvalues over the sum of their sizes, from -1 to 1; 0 for a matrix of zeros."""
    shares = []
    for matrix in matrices:
        size = matrix.abs().max()
        if size < 1e-12:  # rounding of a circuit that is nothing
            shares.append(torch.zeros((), dtype=matrix.dtype))
            continue
        matrix = matrix / size
        try:
            eigenvalues = torch.linalg.eigvals(matrix)
        except RuntimeError:  # LinAlgError: exact structure (a shift, many equal rows) can defeat the iteration
            noise = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
            eigenvalues = torch.linalg.eigvals(matrix + 1e-9 * noise)
        shares.append(matrix.trace() / eigenvalues.abs().sum().clamp_min(1e-30))
    return torch.stack(shares)


def read_norm(bridge: Any, layer: int, stream: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    """What attention of this layer reads of a residual stream: its norm, applied by the model's own module."""
    norm = bridge.blocks[layer]._modules.get("ln1")
    if norm is None:
        return stream
    parameter = next(iter(bridge.original_model.parameters()))
    with without_hooks(bridge), torch.no_grad():
        flat = stream.reshape(1, -1, stream.shape[-1]).to(parameter.device, parameter.dtype)
        return norm(flat).reshape(stream.shape)


def _gain(bridge: Any, norm: Any) -> Tensor:
    d_model = int(bridge.cfg.d_model)
    if norm is None:
        return torch.ones(d_model, dtype=torch.float64)
    parameter = next(iter(bridge.original_model.parameters()))
    # without zeros and of mean zero, so that LayerNorm and RMSNorm normalise it alike; large, so that eps is nothing
    probe = 100.0 * torch.where(torch.arange(d_model) % 2 == 0, 1.0, -1.0)
    probe = probe - probe.mean()
    x = probe.to(device_of(bridge), parameter.dtype).reshape(1, 1, d_model)
    odd = (_double(norm(x)) - _double(norm(-x))).flatten() / 2  # a bias cancels
    return odd / (probe.double() / probe.double().pow(2).mean().sqrt())


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()
