"""The gradient dictionary (g-SAE): latents are chosen by what they would do downstream as well as by their size.

Scores are z + beta * z * |W_dec g|, with z the pre-activations and g the gradient of the language model's loss at the
activation that is rebuilt, in normalised units: a first-order estimate of what each latent does to the loss, in nats
per unit. What is rebuilt uses z. Training costs a backward pass of the language model besides the forward
(`LiveSource(..., gradient_of=hook)`); at inference the k largest z are taken, as in TopK. `beta` has to fit the size of
the gradients: |W_dec g| of language models is far below 1, and a latent's score only changes once beta * |W_dec g| is
not.

Source: Olmo et al., Findings of NAACL 2025. Its tables and code were not at hand; the form is that of the summary, and
it is tested on planted data, not against the paper. There it finds a feature that TopK misses in a setting that was
searched for (study 11); in most others it does not, since what is chosen for its effect learns all that its tokens have
left over.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.dictionary import Step
from interp.dictionaries.topk import TopKSAE


class GradientSAE(TopKSAE):
    """TopK whose choice in training is weighted by `beta` times the effect on the loss; 0 is TopK itself."""

    architecture = "gradient"
    needs_gradient = True

    def __init__(self, d_in: int, n_latents: int, *, beta: float | int = 1.0, **options: Any) -> None:
        if beta < 0:
            raise ValueError(f"beta={beta}; expected 0 or more")
        super().__init__(d_in, n_latents, **options)
        self.beta = float(beta)

    def step(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        *,
        coefficient: float | int | None = None,
        dead: Tensor | None = None,
        gradient: Float[Tensor, "token d_out"] | None = None,
    ) -> Step:
        """As for TopK; `gradient` is that of the model's loss at the activations that are rebuilt, as they are."""
        self._refuse_coefficient(coefficient)
        if gradient is None:
            raise ValueError("a gradient dictionary is trained with the loss's gradient at each token: gradient=...")
        z, target = self._batch(inputs, targets)
        if gradient.shape != target.shape:
            raise ValueError(
                f"gradient has shape {tuple(gradient.shape)}; expected that of the target, {tuple(target.shape)}"
            )
        with torch.no_grad():
            dense = self._dense(z)
            scores = self._scores(dense)
            if self.beta:
                effect = (self._gradient_by_units(gradient.to(dense.dtype), inputs) @ self._rows().T).abs()
                scores = scores + self.beta * scores * effect
            active = self.choose(scores)
        return self._sparse_step(z, target, dense, active, dead)

    def _gradient_by_units(self, gradient: Tensor, inputs: Tensor) -> Tensor:
        """The gradient with respect to the target in normalised units."""
        if self.normalisation in ("layer_norm", "constant_norm"):
            return gradient * self._spread(inputs.to(gradient.dtype))
        return gradient / self._scale(self.target_scale, gradient)
