"""The ReLU dictionary with an L1 penalty: the original sparse autoencoder.

Loss = |x - x^|^2 + coefficient * sum_i f_i |d_i|. Weighting by the decoder's norms keeps the model from cheating the
penalty by small latents and a large decoder (Anthropic, Circuits Updates April 2024; SAELens does the same). With
`decoder="unit"` it is the form of Bricken et al. 2023, whose rows have norm 1. L1 also shrinks the latents that it
should only select: compare the shrinkage in `interp.dictionaries.evaluate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.dictionaries.dictionary import Dictionary, Step, dense_step


class ReLUSAE(Dictionary):
    """Latents are the positive parts of the pre-activations. `coefficient` weights the L1 penalty."""

    architecture = "relu"

    def __init__(self, d_in: int, n_latents: int, *, coefficient: float | int = 1.0, **options: Any) -> None:
        if coefficient < 0:
            raise ValueError(f"coefficient={coefficient}; expected 0 or more")
        super().__init__(d_in, n_latents, **options)
        self.coefficient = float(coefficient)

    def activate(self, preactivations: Tensor) -> Tensor:
        return preactivations.relu()

    def step(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        *,
        coefficient: float | int | None = None,
        dead: Tensor | None = None,
    ) -> Step:
        z, target = self._batch(inputs, targets)
        latents = self.activate(self._preactivations(z))
        weight = self.coefficient if coefficient is None else coefficient
        penalty = weight * (latents * self._rows().norm(dim=1)).sum(1).mean()
        return dense_step(self, latents, z, target, sparsity=torch.as_tensor(penalty))
