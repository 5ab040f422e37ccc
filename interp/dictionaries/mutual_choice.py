"""Mutual Choice: tokens and latents choose each other; the batch has a budget and nothing else is fixed.

The allocation is that of BatchTopK. What differs is the auxiliary loss, which looks after every latent that fires less
than it should, and not the dead ones alone: the j-th most frequent latent is expected to fire as a Zipf curve says that
is fitted to the densities seen; the residual is rebuilt from those below the curve, each weighted by how far it is
below, 1 - density / expected. A dead latent has weight 1.

Source: Ayonrinde 2024 (arXiv 2411.02124). No code was published; the weighting above is our reading of its auxiliary
Zipf loss.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.allocation import Active
from interp.dictionaries.batch_topk import BatchTopKSAE
from interp.dictionaries.dictionary import Step, squared_error


class MutualChoiceSAE(BatchTopKSAE):
    """BatchTopK with the auxiliary Zipf loss.

    Args:
        zipf_coefficient: Weight of the auxiliary loss, relative to the residual's variance; 0 for none.
        density_rate: Of the exponential average of how often each latent fires.
    """

    architecture = "mutual_choice"
    density: Tensor

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        *,
        zipf_coefficient: float | int = 1 / 32,
        density_rate: float = 0.01,
        **options: Any,
    ) -> None:
        if zipf_coefficient < 0 or not 0 < density_rate <= 1:
            raise ValueError(f"zipf_coefficient={zipf_coefficient}, density_rate={density_rate} are out of range")
        if options.pop("aux", "none") != "none":
            raise ValueError("the auxiliary loss of this architecture is the Zipf loss: set zipf_coefficient instead")
        super().__init__(d_in, n_latents, aux="none", **options)
        self.zipf_coefficient, self.density_rate = float(zipf_coefficient), density_rate
        start = torch.full((n_latents,), min(1.0, float(self.k) / n_latents), dtype=torch.float64)
        self.register_buffer("density", start.to(self.W_dec.device))

    def _sparse_step(self, z: Tensor, target: Tensor, dense: Tensor, active: Active, dead: Tensor | None) -> Step:
        weights = zipf_shortfall(self.density)
        step = super()._sparse_step(z, target, dense, active, None)
        if not self.zipf_coefficient or not bool((weights > 0).any()):
            return step
        aux = self.zipf_coefficient * self._zipf_aux(self._centred(z), target - step.reconstruction, weights)
        return Step(step.loss + aux, {**step.terms, "aux": aux}, step.reconstruction, step.fired, step.l0)

    def _zipf_aux(self, centred: Tensor, residual: Tensor, weights: Tensor) -> Tensor:
        columns = weights.topk(min(4 * self.k_aux, int((weights > 0).sum()))).indices
        pre = centred @ self.W_enc[:, columns] + self.b_enc[columns]
        scores = pre.relu() * weights[columns].to(pre.dtype)
        best = scores.detach().topk(min(self.k_aux, len(columns)), dim=1, sorted=False).indices
        rebuilt = torch.zeros_like(pre).scatter(1, best, scores.gather(1, best)) @ self.W_dec[columns]
        spread = self.peers.spread(residual)
        return squared_error(rebuilt, residual) / spread.clamp(min=torch.finfo(spread.dtype).tiny)

    @torch.no_grad()
    def _after(self, values: Tensor, active: Active, n_tokens: int) -> None:
        super()._after(values, active, n_tokens)
        seen = torch.bincount(active.latents[values > 0], minlength=self.n_latents).double() / n_tokens
        self.density.add_(self.density_rate * (self.peers.mean(seen) - self.density))


def zipf_fit(density: Float[Tensor, " latent"]) -> Float[Tensor, " latent"]:
    """What every latent's density would be on the Zipf curve exp(a) rank^-b fitted to them, [n_latents].

    Least squares of log density on log rank over latents that fire, ranks by density, and 0 <= b.
    """
    order = density.argsort(descending=True, stable=True)
    ranked = density[order].double()
    rank = torch.arange(1, len(density) + 1, dtype=torch.float64, device=density.device).log()
    alive = ranked > 1e-12
    if int(alive.sum()) < 3:
        return torch.full_like(density, float(density.mean()))
    x, y = rank[alive], ranked[alive].log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    slope = slope.clamp(max=0.0)
    curve = (y.mean() - slope * x.mean() + slope * rank).exp().clamp(max=1.0)
    expected = torch.empty_like(density)
    expected[order] = curve.to(density.dtype)
    return expected


def zipf_shortfall(density: Float[Tensor, " latent"]) -> Float[Tensor, " latent"]:
    """How far each latent's density falls below the fitted curve: 0 at or above it, 1 if it never fires."""
    return (1 - density / zipf_fit(density).clamp(min=1e-12)).clamp(0, 1)
