"""Activations with known features: what a dictionary should find is written down beforehand.

x = sum_i f_i a_i d_i + noise, with unit directions d_i, independent firing f_i and amplitudes a_i. The default is the
small planted problem on which SAELens' architectures were measured (see `experiments/bench/planted.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.sources import _draws


@dataclass(frozen=True)
class PlantedSource:
    """Fresh batches without end, the same for the same seeds.

    Attributes:
        width: Of the activations.
        n_features: Planted directions.
        density: Chance that a feature fires, or one chance per feature.
        amplitudes: Bounds of the uniform distribution of amplitudes.
        noise: Standard deviation of Gaussian noise on every coordinate.
        seed: Of the directions.
    """

    width: int = 64
    n_features: int = 128
    density: float | tuple[float, ...] = 0.03
    amplitudes: tuple[float, float] = (0.5, 1.5)
    noise: float = 0.0
    seed: int = 0
    hook: str = ""

    def __post_init__(self) -> None:
        densities = self.density if isinstance(self.density, tuple) else (self.density,)
        if len(densities) not in (1, self.n_features) or not all(0 < p <= 1 for p in densities):
            raise ValueError(f"density must be one chance in (0, 1], or one for each of {self.n_features} features")
        if not 0 < self.amplitudes[0] <= self.amplitudes[1] or self.noise < 0:
            raise ValueError(
                f"amplitudes={self.amplitudes} must rise from above 0, and noise={self.noise} be at least 0"
            )

    @property
    def hooks(self) -> list[str]:
        return [self.hook]

    @property
    def features(self) -> Float[Tensor, "feature width"]:
        """The planted directions, of norm 1."""
        rows = torch.randn(self.n_features, self.width, generator=_draws(self.seed, 0), dtype=torch.float64)
        return (rows / rows.norm(dim=1, keepdim=True)).float()

    def describe(self) -> dict[str, Any]:
        density = list(self.density) if isinstance(self.density, tuple) else self.density
        rest = {"width": self.width, "n_features": self.n_features, "noise": self.noise, "seed": self.seed}
        return {"kind": "planted", "density": density, "amplitudes": list(self.amplitudes), **rest}

    def sample(self, n: int, *, seed: int = 0, number: int = 0) -> tuple[Tensor, Tensor]:
        """Activations [n, width] and the true strengths [n, n_features] they were made of."""
        draws = _draws(self.seed, seed, number, 1)
        density = torch.tensor(self.density)
        fires = torch.rand(n, self.n_features, generator=draws) < density
        low, high = self.amplitudes
        strengths = fires * (low + (high - low) * torch.rand(n, self.n_features, generator=draws))
        noise = self.noise * torch.randn(n, self.width, generator=draws) if self.noise else 0.0
        return strengths @ self.features + noise, strengths

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        number = start
        while True:
            yield {self.hook: self.sample(batch_size, seed=seed, number=number)[0]}
            number += 1


def recovery(found: Float[Tensor, "latent width"], true: Float[Tensor, "feature width"]) -> dict[str, float]:
    """How well rows of a dictionary match planted directions, by absolute cosine.

    `mmcs`: mean over true features of the best cosine; `recovered`: share of them above 0.9; `mcc`: mean cosine of the
    best one-to-one assignment (Hungarian); `unique`: share of latents that are the best match of some feature among
    min(latents, features).
    """
    from scipy.optimize import linear_sum_assignment

    if found.ndim != 2 or true.ndim != 2 or found.shape[1] != true.shape[1]:
        raise ValueError(f"rows of shapes {tuple(found.shape)} and {tuple(true.shape)} cannot be compared")
    a, b = (rows.detach().double().cpu() for rows in (found, true))
    a, b = (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12) for rows in (a, b))
    cosines = (b @ a.T).abs()  # [feature, latent]
    best = cosines.max(1)
    rows, columns = linear_sum_assignment(cosines.numpy(), maximize=True)
    smaller = min(cosines.shape)
    return {
        "mmcs": float(best.values.mean()),
        "recovered": float((best.values > 0.9).double().mean()),
        "mcc": float(cosines[rows, columns].sum() / smaller),
        "unique": len(set(best.indices.tolist())) / smaller,
    }
