"""BatchTopK: k active latents per token on average, wherever in the batch they serve best.

At inference the batch must not matter, so a threshold takes the place of the budget: an average, over training steps,
of the smallest latent that was chosen. Saved dictionaries are JumpReLU ones with that threshold.

Source: Bussmann et al. 2024 (arXiv 2412.06410). As in SAELens 6, the average is exponential with rate 0.01 in float64;
unlike there it starts at the first value and not at zero, which would take 500 steps to forget.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.dictionaries.allocation import Active
from interp.dictionaries.topk import TopKSAE


class BatchTopKSAE(TopKSAE):
    """The k times n largest latents of a batch of n tokens, if positive.

    Args:
        k: Active latents per token, on average; need not be a whole number.
        threshold_rate: Of the average that makes the threshold.
    """

    architecture = "batch_topk"
    whole_k = False
    threshold: Tensor

    def __init__(self, d_in: int, n_latents: int, *, threshold_rate: float = 0.01, **options: Any) -> None:
        if not 0 < threshold_rate <= 1:
            raise ValueError(f"threshold_rate={threshold_rate}; expected above 0 and at most 1")
        super().__init__(d_in, n_latents, **options)
        self.threshold_rate = threshold_rate
        self.register_buffer("threshold", self._no_threshold().to(self.W_dec.device))

    def _no_threshold(self) -> Tensor:
        return torch.tensor(float("nan"), dtype=torch.float64)

    def activate(self, preactivations: Tensor) -> Tensor:
        if bool(self.threshold.isnan().any()):
            raise ValueError(
                f"this {self.architecture} dictionary has no threshold yet, which it needs at inference: train it, or "
                f"run step() on batches of activations"
            )
        return preactivations.relu() * (preactivations > self.threshold.to(preactivations.dtype))

    def choose(self, scores: Tensor) -> Active:
        return self.peers.per_batch(scores.relu(), self.k)

    @torch.no_grad()
    def _after(self, values: Tensor, active: Active, n_tokens: int) -> None:
        if self.decoder == "rescaled":  # thresholds are in the units of latents
            values = values * self.W_dec.norm(dim=1)[active.latents]
        on = values > 0
        self._update_threshold(values[on], active.latents[on])

    def _update_threshold(self, positive: Tensor, latents: Tensor) -> None:
        none = torch.full((1,), float("inf"), dtype=torch.float64, device=positive.device)
        lowest = self.peers.lowest(torch.cat([positive.double(), none]).min())
        if not bool(lowest.isfinite()):
            return
        first = bool(self.threshold.isnan())
        self.threshold.copy_(lowest if first else self.threshold + self.threshold_rate * (lowest - self.threshold))
