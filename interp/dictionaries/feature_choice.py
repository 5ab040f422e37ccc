"""Feature Choice: every latent chooses the tokens it serves, a fixed number of them per batch.

No latent can die, since each has its quota. Quotas follow a Zipf curve of the latent's index, flat by default;
`fit_quotas` sets them from densities that were seen, such as those of a Mutual Choice dictionary. At inference each
latent has a threshold of its own: the average of the smallest value it took.

Source: Ayonrinde 2024 (arXiv 2411.02124). Which thresholds it uses is not known here: ours are per latent.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries.allocation import Active, density_quotas
from interp.dictionaries.mutual_choice import MutualChoiceSAE, zipf_fit


class FeatureChoiceSAE(MutualChoiceSAE):
    """Mutual Choice with quotas: k times n entries of a batch of n tokens, shared among the latents beforehand.

    Args:
        exponent: Of the Zipf curve of quotas, by index of the latent; 0 for equal quotas.
    """

    architecture = "feature_choice"
    shares: Tensor

    def __init__(self, d_in: int, n_latents: int, *, exponent: float | int = 0.0, **options: Any) -> None:
        if exponent < 0:
            raise ValueError(f"exponent={exponent}; expected 0 or more")
        super().__init__(d_in, n_latents, **options)
        self.exponent = float(exponent)
        shares = torch.arange(1, n_latents + 1, dtype=torch.float64) ** -self.exponent
        self.register_buffer("shares", shares.to(self.W_dec.device))

    def _no_threshold(self) -> Tensor:
        return torch.full((self.n_latents,), float("nan"), dtype=torch.float64)

    def quotas(self, n_tokens: int) -> Int[Tensor, " latent"]:
        """How many of `n_tokens` tokens each latent chooses; they add up to k times n_tokens."""
        return density_quotas(self.shares, int(self.k * n_tokens), n_tokens)

    def fit_quotas(self, density: Float[Tensor, " latent"]) -> None:
        """Share out by the Zipf curve fitted to these densities, each latent at its rank."""
        if density.shape != (self.n_latents,):
            raise ValueError(f"density has shape {tuple(density.shape)}; expected [{self.n_latents}]")
        self.shares.copy_(zipf_fit(density.double()))

    def choose(self, scores: Tensor) -> Active:
        return self.peers.per_latent(scores, self.quotas(self.peers.size * len(scores)))

    @torch.no_grad()
    def _update_threshold(self, positive: Tensor, latents: Tensor) -> None:
        lowest = torch.full_like(self.threshold, float("inf")).scatter_reduce(0, latents, positive.double(), "amin")
        lowest = self.peers.lowest(lowest)
        if not bool(lowest.isfinite().any()):
            return
        moved = self.threshold + self.threshold_rate * (lowest - self.threshold)
        moved = torch.where(self.threshold.isfinite(), moved, lowest)  # the first value it takes
        # a latent that has never been on stays off
        kept = torch.where(self.threshold.isnan(), float("inf"), self.threshold)
        self.threshold.copy_(torch.where(lowest.isfinite(), moved, kept))
