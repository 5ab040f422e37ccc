"""Activations and a dictionary whose error is known: so much of it linear, so much not.

x = sum_i s_i d_i + dense, where the signed, sparse strengths s_i are independent and symmetric about 0, the d_i are
orthonormal, and `dense` is Gaussian in the directions that no d_i uses. The dictionary has two latents per feature, one
for each sign. It knows nothing of `dense`, which it therefore misses: a linear error. The decoder rows of both signs of
a feature lean to one side, into directions that x never uses, which adds |s_i| minus its mean there: an error of the
dictionary's own, and uncorrelated with every linear map of x because s_i is symmetric.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.jumprelu import JumpReLUSAE
from interp.dictionaries.sources import _draws


@dataclass(frozen=True)
class PlantedError:
    """Activations and their dictionary, the same for the same seeds.

    The dictionary's FVU is linear + nonlinear + shrinkage^2 * (1 - linear).

    Attributes:
        linear: Share of the variance of x that is dense: the linear error.
        nonlinear: Variance of what the dictionary adds, as a share of the variance of x.
        shrinkage: By how much all latents are too small; a further linear error, shrinkage^2 of the sparse variance.
        width: Of the activations: features, dense directions and unused ones, a third of it each or a little more.
        density: Chance that a feature is on.
        amplitudes: Bounds of |s_i| where it is.
        seed: Of the directions.
        hook: Name of the hook that the activations are of.
    """

    linear: float | int = 0.1
    nonlinear: float | int = 0.1
    shrinkage: float | int = 0.0
    width: int = 48
    density: float | int = 0.2
    amplitudes: tuple[float, float] = (0.5, 1.5)
    seed: int = 0
    hook: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.linear < 1 or self.nonlinear < 0 or not 0 <= self.shrinkage < 1:
            raise ValueError(
                f"linear={self.linear} and shrinkage={self.shrinkage} must be shares from 0 to below 1, and "
                f"nonlinear={self.nonlinear} at least 0"
            )
        if self.width < 3 or not 0 < self.density <= 1 or not 0 < self.amplitudes[0] <= self.amplitudes[1]:
            raise ValueError(
                f"width={self.width} must be at least 3, density={self.density} lie in (0, 1] and "
                f"amplitudes={self.amplitudes} rise from above 0"
            )

    @property
    def n_features(self) -> int:
        return self.width // 3

    @property
    def variance(self) -> float:
        """Of x, summed over the width."""
        low, high = self.amplitudes
        square = self.density * (low * low + low * high + high * high) / 3
        return self.n_features * square / (1 - self.linear)

    def sample(self, n: int, *, seed: int = 0, number: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Activations, and the linear and nonlinear parts of the dictionary's error, [n, width] each."""
        draws = _draws(self.seed, seed, number, 1)
        (low, high), shape = self.amplitudes, (n, self.n_features)
        on = torch.rand(shape, generator=draws, dtype=torch.float64) < self.density
        size = on * (low + (high - low) * torch.rand(shape, generator=draws, dtype=torch.float64))
        sign = torch.randint(0, 2, shape, generator=draws) * 2 - 1
        features, others, unused = self._directions()
        dense = torch.randn(n, len(others), generator=draws, dtype=torch.float64) @ others
        dense = dense * (self.linear * self.variance / len(others)) ** 0.5
        sparse = (sign * size) @ features
        added = (size - self.density * (low + high) / 2) @ unused * self._lean
        x = sparse + dense
        return x.float(), (dense + self.shrinkage * sparse).float(), -added.float()

    def dictionary(self) -> JumpReLUSAE:
        """The dictionary that makes these errors: exact where both are 0. Its latents are on where a feature is."""
        features, _, unused = self._directions()
        kept, low = 1 - self.shrinkage, self.amplitudes[0]
        mean = self.density * sum(self.amplitudes) / 2
        sae = JumpReLUSAE(
            self.width, 2 * self.n_features, hook=self.hook, subtract_bias=False, threshold_start=kept * low / 2
        )
        lean = unused * self._lean
        with torch.no_grad():
            sae.W_enc.copy_(kept * torch.cat([features, -features]).T)
            sae.W_dec.copy_(torch.cat([features + lean / kept, -features + lean / kept]))
            sae.b_dec.copy_(-mean * lean.sum(0))
        return sae

    @property
    def hooks(self) -> list[str]:
        return [self.hook]

    def describe(self) -> dict[str, object]:
        sizes = {"width": self.width, "density": self.density, "amplitudes": list(self.amplitudes), "seed": self.seed}
        shares = {"linear": self.linear, "nonlinear": self.nonlinear, "shrinkage": self.shrinkage}
        return {"kind": "planted error", **shares, **sizes}

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        number = start
        while True:
            yield {self.hook: self.sample(batch_size, seed=seed, number=number)[0]}
            number += 1

    @property
    def _lean(self) -> float:
        """How much |s_i| writes into its unused direction, for the variance that was asked for."""
        low, high = self.amplitudes
        square = self.density * (low * low + low * high + high * high) / 3
        spread = square - (self.density * (low + high) / 2) ** 2
        return (self.nonlinear * self.variance / (self.n_features * spread)) ** 0.5

    def _directions(self) -> tuple[Float[Tensor, "feature width"], Tensor, Tensor]:
        """Orthonormal rows: features, dense directions, and an unused one per feature."""
        drawn = torch.randn(self.width, self.width, generator=_draws(self.seed, 0), dtype=torch.float64)
        basis = torch.linalg.qr(drawn).Q.T
        n = self.n_features
        return basis[:n], basis[2 * n :], basis[n : 2 * n]
