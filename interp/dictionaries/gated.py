"""The gated dictionary: one path decides which latents are on, another how strong they are.

gate = (x - b_dec) W_enc + b_gate, magnitude = (x - b_dec)(W_enc * exp(r_mag)) + b_mag, f = [gate > 0] relu(magnitude).
The L1 penalty acts on the gate only, so that magnitudes are not shrunk; a second reconstruction, from relu(gate), gives
the gate its gradient.

Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), section 3. There, and in dictionary_learning, the decoder is
detached in the second reconstruction and has rows of norm 1, both our defaults. SAELens lets the gradient through and
leaves the rows free (`detach_decoder=False, decoder="free"`). Detached and free is refused: the penalty would shrink
the rows for nothing in return, and training ends with every latent on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interp.dictionaries.dictionary import Dictionary, Step, dense_step, squared_error


class GatedSAE(Dictionary):
    """`coefficient` weights the L1 penalty on the gate; `detach_decoder` see above."""

    architecture = "gated"
    b_gate: Tensor
    r_mag: Tensor
    b_mag: Tensor

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        *,
        coefficient: float | int = 1.0,
        detach_decoder: bool = True,
        **options: Any,
    ) -> None:
        if coefficient < 0:
            raise ValueError(f"coefficient={coefficient}; expected 0 or more")
        decoder = options.pop("decoder", "unit" if detach_decoder else "free")
        if decoder == "rescaled" or (detach_decoder and decoder == "free"):
            raise ValueError(
                f'decoder={decoder!r} with detach_decoder={detach_decoder}: gated dictionaries take "unit", or "free" '
                f"with detach_decoder=False"
            )
        super().__init__(d_in, n_latents, decoder=decoder, **options)
        self.coefficient, self.detach_decoder = float(coefficient), detach_decoder

    def _add_parameters(self, dtype: torch.dtype, device: torch.device) -> None:
        for name in ("b_gate", "r_mag", "b_mag"):
            setattr(self, name, nn.Parameter(torch.zeros(self.n_latents, dtype=dtype, device=device)))

    def _preactivations(self, z: Tensor) -> Tensor:
        return self._centred(z) @ self.W_enc + self.b_gate

    def activate(self, preactivations: Tensor) -> Tensor:
        """Latents of gate pre-activations: magnitudes are the same product with another gain and bias."""
        magnitude = (preactivations - self.b_gate) * self.r_mag.exp() + self.b_mag
        return (preactivations > 0) * magnitude.relu()

    def step(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        *,
        coefficient: float | int | None = None,
        dead: Tensor | None = None,
    ) -> Step:
        z, target = self._batch(inputs, targets)
        gate = self._preactivations(z)
        through = gate.relu()
        rows, bias = self.W_dec, self.b_dec
        if self.detach_decoder:
            rows, bias = rows.detach(), bias.detach()
        by_gate = through @ rows + bias + self._skipped(z)
        weight = self.coefficient if coefficient is None else coefficient
        penalty = weight * (through * self.W_dec.norm(dim=1)).sum(1).mean()
        return dense_step(
            self,
            self.activate(gate),
            z,
            target,
            sparsity=torch.as_tensor(penalty),
            gate_reconstruction=squared_error(by_gate, target),
        )
