"""TopK: the k largest pre-activations of every token, and what the dictionaries with a budget share.

Only active latents take part in a step (`interp.dictionaries._sparse`). The auxiliary loss lets dead latents rebuild
what the live ones left over; it is passed over when none is dead. `aux="openai"` (Gao et al. 2024, appendix A.2, as in
dictionary_learning): the d_in / 2 largest dead latents, their positive parts, error relative to the residual's
variance, weight 1/32. `aux="saelens"` (SAELens 6): not rectified, absolute error, weight 1, scaled down by
(number of dead) / (d_in / 2) if that is below 1.

Source: Gao et al. 2024 (arXiv 2406.04093), section 2.3 and appendix A.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from interp.dictionaries._sparse import active_preactivations, decode_active
from interp.dictionaries.allocation import Active, per_token
from interp.dictionaries.dictionary import Dictionary, Step, squared_error

Aux = Literal["openai", "saelens", "none"]


class TopKSAE(Dictionary):
    """The k latents of a token with the largest pre-activations, if positive.

    Args:
        k: Active latents per token, at most.
        aux: The auxiliary loss for dead latents, see above.
        aux_coefficient: Its weight; None for 1/32 (`"openai"`) or 1 (`"saelens"`).
        k_aux: Dead latents per token that take part; None for d_in / 2.
    """

    architecture = "topk"

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        *,
        k: float | int = 32,
        aux: Aux = "openai",
        aux_coefficient: float | int | None = None,
        k_aux: int | None = None,
        **options: Any,
    ) -> None:
        if not 0 < k <= n_latents or (self.whole_k and k != int(k)):
            kind = "a whole number" if self.whole_k else "a number"
            raise ValueError(f"k={k}; expected {kind} from 1 to {n_latents}, the number of latents")
        if aux not in ("openai", "saelens", "none"):
            raise ValueError(f'aux={aux!r}; expected "openai", "saelens" or "none"')
        if (k_aux is not None and k_aux < 1) or (aux_coefficient is not None and aux_coefficient < 0):
            raise ValueError(f"k_aux={k_aux} must be at least 1 and aux_coefficient={aux_coefficient} not negative")
        super().__init__(d_in, n_latents, **options)
        self.k = int(k) if self.whole_k else float(k)
        self.aux: Aux = aux
        standard = {"openai": 1 / 32, "saelens": 1.0, "none": 0.0}[aux]
        self.aux_coefficient = standard if aux_coefficient is None else float(aux_coefficient)
        self.k_aux = k_aux or max(1, d_in // 2)

    whole_k = True

    def activate(self, preactivations: Tensor) -> Tensor:
        best = preactivations.topk(int(self.k), dim=-1, sorted=False)
        return torch.zeros_like(preactivations).scatter(-1, best.indices, best.values.relu())

    def choose(self, scores: Tensor) -> Active:
        """The active entries of a batch of scores [token, latent] in training."""
        return per_token(scores, int(self.k))

    def step(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        *,
        coefficient: float | int | None = None,
        dead: Tensor | None = None,
    ) -> Step:
        self._refuse_coefficient(coefficient)
        z, target = self._batch(inputs, targets)
        with torch.no_grad():
            dense = self._dense(z)
            active = self.choose(self._scores(dense))
        return self._sparse_step(z, target, dense, active, dead)

    def _refuse_coefficient(self, coefficient: float | int | None) -> None:
        if coefficient is not None:
            raise ValueError(
                f"coefficient={coefficient}: {self.architecture} has no sparsity penalty; its budget is k={self.k}"
            )

    def _dense(self, z: Tensor) -> Tensor:
        return torch.addmm(self.b_enc, self._centred(z), self.W_enc)

    def _scores(self, dense: Tensor) -> Tensor:
        return dense * self.W_dec.norm(dim=1) if self.decoder == "rescaled" else dense

    def _sparse_step(self, z: Tensor, target: Tensor, dense: Tensor, active: Active, dead: Tensor | None) -> Step:
        """Losses and statistics of a choice of active latents. The decoder's norms of `"rescaled"` cancel here."""
        values = active_preactivations(self._centred(z), self.W_enc, self.b_enc, dense, active).relu()
        parts = self._reconstructions(values, active, z)
        errors = torch.stack([squared_error(part, target) for part in parts])
        terms = {"reconstruction": self._joined(errors)}
        residual = (target - parts[-1]).detach()
        if self.aux_coefficient and self.aux != "none" and dead is not None and bool(dead.any()):
            terms["aux"] = self.aux_coefficient * self._aux(self._centred(z), residual, dead)
        on = values.detach() > 0
        fired = torch.zeros(self.n_latents, dtype=torch.bool, device=z.device)
        fired[active.latents[on]] = True
        self._after(values.detach(), active, len(z))
        loss = torch.stack(list(terms.values())).sum()
        return Step(loss, terms, parts[-1].detach(), fired, float(on.sum()) / len(z))

    def _reconstructions(self, values: Tensor, active: Active, z: Tensor) -> list[Tensor]:
        """What is compared with the target; the last is the whole reconstruction."""
        return [decode_active(values, active, len(z), self.W_dec) + self.b_dec + self._skipped(z)]

    def _joined(self, errors: Tensor) -> Tensor:
        return errors.sum()

    def _after(self, values: Tensor, active: Active, n_tokens: int) -> None:
        """Statistics to keep after a step: thresholds, for those that need one at inference."""

    def _aux(self, centred: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        columns = dead.nonzero()[:, 0]  # a product of the dead latents only
        pre = centred @ self.W_enc[:, columns] + self.b_enc[columns]
        k = min(self.k_aux, len(columns))
        scores = pre * self.W_dec[columns].norm(dim=1) if self.decoder == "rescaled" else pre
        best = scores.detach().topk(k, dim=1, sorted=False).indices
        values = pre.gather(1, best)
        if self.aux == "openai":
            values = values.relu()
        rebuilt = torch.zeros_like(pre).scatter(1, best, values) @ self.W_dec[columns]
        error = squared_error(rebuilt, residual)
        if self.aux == "openai":
            spread = self.peers.spread(residual)
            return error / spread if float(spread) > 0 else error * 0
        return error * min(len(columns) / self.k_aux, 1.0)
