"""Encoding and decoding that cost what the active latents cost, forward and backward.

The dense part that is left is one product, inputs by encoder, whose result picks the active latents and is then thrown
away: its backward pass runs over the active pairs only, as does the decoder's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries.allocation import Active


def active_preactivations(
    inputs: Float[Tensor, "token d_in"],
    W_enc: Float[Tensor, "d_in latent"],
    b_enc: Float[Tensor, " latent"],
    dense: Float[Tensor, "token latent"],
    active: Active,
) -> Float[Tensor, " active"]:
    """`(inputs @ W_enc + b_enc)[active]`, given that product as `dense` (without a graph).

    Gradients reach all three; that of W_enc is made of the active pairs alone.
    """
    return _Encode.apply(inputs, W_enc, b_enc, dense[active.tokens, active.latents], active.tokens, active.latents)


def decode_active(
    values: Float[Tensor, " active"], active: Active, n_tokens: int, W_dec: Float[Tensor, "latent d_out"]
) -> Float[Tensor, "token d_out"]:
    """Sum of the active latents' decoder rows, times their values. `active` must be in order of tokens."""
    counts = torch.bincount(active.tokens, minlength=n_tokens)
    offsets = counts.cumsum(0) - counts
    return F.embedding_bag(active.latents, W_dec, offsets, mode="sum", per_sample_weights=values)


def scatter(values: Float[Tensor, " active"], active: Active, shape: tuple[int, int]) -> Float[Tensor, "token latent"]:
    """The dense matrix that holds these values at the active entries and zero elsewhere."""
    dense = values.new_zeros(shape)
    return dense.index_put((active.tokens, active.latents), values)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, W_enc: Tensor, b_enc: Tensor, values: Tensor, tokens: Tensor, latents: Tensor
    ):  # type: ignore[override]
        ctx.save_for_backward(inputs, W_enc, tokens, latents)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        inputs, W_enc, tokens, latents = ctx.saved_tensors
        n, n_latents = inputs.shape[0], W_enc.shape[1]
        by_inputs = by_weights = by_bias = None
        if ctx.needs_input_grad[0]:
            by_inputs = _rows_sum(latents, gradient, tokens, n, W_enc.T)
        if ctx.needs_input_grad[1]:
            by_weights = _rows_sum(tokens, gradient, latents, n_latents, inputs).T
        if ctx.needs_input_grad[2]:
            by_bias = gradient.new_zeros(n_latents).index_add_(0, latents, gradient)
        return by_inputs, by_weights, by_bias, None, None, None


def _rows_sum(
    rows: Int[Tensor, " a"], weights: Float[Tensor, " a"], bags: Int[Tensor, " a"], n_bags: int, table: Tensor
) -> Tensor:
    """Row `bags[i]` of the result collects `weights[i] * table[rows[i]]`."""
    order = torch.argsort(bags, stable=True)
    counts = torch.bincount(bags, minlength=n_bags)
    offsets = counts.cumsum(0) - counts
    with torch.no_grad():
        return F.embedding_bag(rows[order], table, offsets, mode="sum", per_sample_weights=weights[order])
