"""Where a factorisation starts: codes [component, token], non-negative, of order one whatever the data's scale."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

Init: TypeAlias = Literal["kmeans", "svd", "random"]

START_FLOOR = 1e-6
"""Least code at the start, over the largest: the multiplicative rule could not leave 0."""


def start_codes(
    rows: Float[Tensor, "token neuron"], n_components: int, init: Init, generator: torch.Generator
) -> Float[Tensor, "component token"]:
    """The codes that `init` names; the components follow from them in the first step."""
    if init == "kmeans":
        codes = torch.zeros(n_components, len(rows), dtype=rows.dtype, device=rows.device)
        labels = kmeans_labels(rows, n_components, generator)
        codes[labels, torch.arange(len(rows), device=rows.device)] = 1.0
    elif init == "svd":
        codes = _signed_singular_codes(rows, n_components, generator)
    else:
        codes = torch.rand(n_components, len(rows), generator=generator, dtype=rows.dtype).to(rows.device)
    return codes.clamp_(min=START_FLOOR * float(codes.max()))


def kmeans_labels(
    rows: Float[Tensor, "token neuron"], n_clusters: int, generator: torch.Generator, n_rounds: int = 15
) -> Int[Tensor, "token"]:
    """Lloyd's algorithm from random rows; an empty cluster moves to a random row."""
    n_tokens = len(rows)
    centres = rows[torch.randperm(n_tokens, generator=generator)[:n_clusters].to(rows.device)]
    labels = torch.zeros(n_tokens, dtype=torch.int64, device=rows.device)
    for _ in range(n_rounds):
        sizes = centres.square().sum(1)
        parts = [(sizes - 2.0 * part @ centres.T).argmin(1) for part in rows.split(8192)]
        labels = torch.cat(parts)
        counts = torch.bincount(labels, minlength=n_clusters)
        sums = torch.zeros_like(centres).index_add_(0, labels, rows)
        centres = sums / counts.clamp(min=1)[:, None].to(sums.dtype)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            drawn = torch.randint(0, n_tokens, (len(empty),), generator=generator)
            centres[empty] = rows[drawn.to(rows.device)]
    return labels


def _signed_singular_codes(
    rows: Float[Tensor, "token neuron"], n_components: int, generator: torch.Generator
) -> Float[Tensor, "component token"]:
    """Both signs of the leading singular vectors, the halves with the most energy first.

    A singular pair is the sum of (its positive codes, its direction) and (its negative codes, minus its direction), so
    both halves are admissible components; dropping one of them loses what it explains.
    """
    left, values = leading_singular(rows, n_components, generator)
    halves = torch.cat([left.clamp(min=0.0), left.neg().clamp(min=0.0)], dim=1)
    energy = torch.cat([values, values]).square() * halves.square().sum(0)
    best = energy.topk(n_components).indices
    return (halves[:, best] * torch.cat([values, values])[best].sqrt()).T.contiguous()


def leading_singular(
    rows: Float[Tensor, "token neuron"], n_values: int, generator: torch.Generator, n_rounds: int = 6
) -> tuple[Float[Tensor, "token value"], Float[Tensor, "value"]]:
    """Leading left singular vectors and values, by subspace iteration with ten spare vectors (exact where few)."""
    width = min(n_values + 10, *rows.shape)
    start = torch.randn(rows.shape[1], width, generator=generator, dtype=rows.dtype).to(rows.device)
    span = torch.linalg.qr(rows @ start).Q
    for _ in range(n_rounds):
        span = torch.linalg.qr(rows @ torch.linalg.qr(rows.T @ span).Q).Q
    inner, values, _ = torch.linalg.svd(span.T @ rows, full_matrices=False)
    return (span @ inner)[:, :n_values], values[:n_values]
