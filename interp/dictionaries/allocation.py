"""Which latents may be active: a budget over a matrix of scores [token, latent], with or without constraints.

TopK, BatchTopK, Mutual Choice and Feature Choice differ in nothing else. TopK spends k per token; BatchTopK and Mutual
Choice spend k times the number of tokens anywhere in the batch; Feature Choice spends a quota per latent.

Sources: Gao et al. 2024 (arXiv 2406.04093), Bussmann et al. 2024 (arXiv 2412.06410), Ayonrinde 2024 (arXiv 2411.02124).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Axis = Literal["token", "batch", "latent"]


class Active(NamedTuple):
    """Chosen entries of a matrix [token, latent], by token and, if `sorted`, by latent within it."""

    tokens: Int[Tensor, " active"]
    latents: Int[Tensor, " active"]


def per_token(scores: Float[Tensor, "token latent"], k: int) -> Active:
    """The k best latents of every token."""
    n, n_latents = scores.shape
    if not 1 <= k <= n_latents:
        raise ValueError(f"k={k}; expected 1 to {n_latents}, the number of latents")
    latents = scores.topk(k, dim=1, sorted=False).indices
    tokens = torch.arange(n, device=scores.device)[:, None].expand(-1, k)
    return Active(tokens.reshape(-1), latents.reshape(-1))


def per_batch(scores: Float[Tensor, "token latent"], budget: int) -> Active:
    """The `budget` best entries of the whole batch, wherever they are; in order of token, then latent."""
    n, n_latents = scores.shape
    if not 0 <= budget <= n * n_latents:
        raise ValueError(f"budget={budget}; expected 0 to {n * n_latents}, the number of scores")
    flat = scores.reshape(-1).topk(budget, sorted=False).indices.sort().values
    return Active(flat // n_latents, flat % n_latents)


def per_latent(scores: Float[Tensor, "token latent"], quotas: Int[Tensor, " latent"]) -> Active:
    """For every latent its `quotas[latent]` best tokens; in order of token, then latent."""
    n, n_latents = scores.shape
    if quotas.shape != (n_latents,) or int(quotas.min()) < 0 or int(quotas.max()) > n:
        raise ValueError(
            f"quotas of shape {tuple(quotas.shape)} from {int(quotas.min())} to {int(quotas.max())}; expected one per "
            f"latent ({n_latents}), between 0 and the number of tokens ({n})"
        )
    most = int(quotas.max())
    if most == 0:
        empty = torch.empty(0, dtype=torch.long, device=scores.device)
        return Active(empty, empty)
    tokens = scores.topk(most, dim=0).indices  # [most, latent], best first
    kept = torch.arange(most, device=scores.device)[:, None] < quotas.to(scores.device)
    latents = torch.arange(n_latents, device=scores.device).expand(most, -1)
    flat = (tokens * n_latents + latents)[kept].sort().values
    return Active(flat // n_latents, flat % n_latents)


def density_quotas(densities: Float[Tensor, " latent"], budget: int, n_tokens: int) -> Int[Tensor, " latent"]:
    """Quotas proportional to how often each latent is to fire, with sum `budget`, between 1 (if affordable) and
    `n_tokens`."""
    n_latents = len(densities)
    if not 0 <= budget <= n_latents * n_tokens:
        raise ValueError(f"budget={budget}; {n_latents} latents on {n_tokens} tokens hold 0 to {n_latents * n_tokens}")
    return _apportion(densities.double().clamp(min=1e-12), budget, 1 if budget >= n_latents else 0, n_tokens)


def _apportion(weights: Tensor, budget: int, lowest: int, highest: int) -> Tensor:
    """Whole numbers near budget * weights / sum, within bounds, that add up to the budget exactly."""
    low, high = 0.0, float(highest) / float(weights.min())
    for _ in range(200):  # the scale at which the clamped shares add up to the budget
        middle = (low + high) / 2
        if float((weights * middle).clamp(lowest, highest).sum()) < budget:
            low = middle
        else:
            high = middle
    shares = (weights * high).clamp(lowest, highest)
    quotas = shares.floor()
    missing = budget - int(quotas.sum())
    order = torch.argsort(shares - quotas, descending=missing > 0, stable=True)
    room = (quotas < highest) if missing > 0 else (quotas > lowest)
    step = 1 if missing > 0 else -1
    chosen = order[room[order]][: abs(missing)]
    quotas[chosen] += step
    return quotas.long()
