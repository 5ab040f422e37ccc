"""Activations with known features: what a dictionary should find is written down beforehand.

x = sum_i f_i a_i d_i + noise, with unit directions d_i, independent firing f_i and amplitudes a_i. The default is the
small planted problem on which SAELens' architectures were measured (see `experiments/bench/planted.py`). For
transcoders, a sparse MLP whose units are known.
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
        scales: Factors on the amplitudes of each feature; 1 for all by default.
        sensitivities: Of a downstream loss, the sum over features of sensitivity * relu(<direction, x> - floor), where
            floor is half the feature's smallest strength: it depends on a feature where that is on. Batches then have
            the loss's gradient too, for gradient dictionaries. Features whose sensitivity is 0 are made orthogonal to
            the others, so that the loss does not depend on them.
    """

    width: int = 64
    n_features: int = 128
    density: float | tuple[float, ...] = 0.03
    amplitudes: tuple[float, float] = (0.5, 1.5)
    noise: float = 0.0
    seed: int = 0
    hook: str = ""
    scales: tuple[float, ...] | None = None
    sensitivities: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("scales", "sensitivities"):
            if (values := getattr(self, name)) is not None and len(values) != self.n_features:
                raise ValueError(
                    f"{name} has {len(values)} values; expected one for each of {self.n_features} features"
                )
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
    def gradient_of(self) -> str | None:
        return None if self.sensitivities is None else self.hook

    @property
    def features(self) -> Float[Tensor, "feature width"]:
        """The planted directions, of norm 1."""
        rows = _unit_rows(self.n_features, self.width, self.seed, 0)
        if self.sensitivities is None:
            return rows
        matter = torch.tensor(self.sensitivities) != 0
        basis = torch.linalg.qr(rows[matter].double().T).Q  # [width, sensitive]
        rest = rows.double() - rows.double() @ basis @ basis.T
        return torch.where(matter[:, None], rows, (rest / rest.norm(dim=1, keepdim=True)).float())

    def describe(self) -> dict[str, Any]:
        density = list(self.density) if isinstance(self.density, tuple) else self.density
        rest: dict[str, Any] = {
            "width": self.width,
            "n_features": self.n_features,
            "noise": self.noise,
            "seed": self.seed,
        }
        for name in ("scales", "sensitivities"):
            if (values := getattr(self, name)) is not None:
                rest[name] = list(values)
        return {"kind": "planted", "density": density, "amplitudes": list(self.amplitudes), **rest}

    def sample(self, n: int, *, seed: int = 0, number: int = 0) -> tuple[Tensor, Tensor]:
        """Activations [n, width] and the true strengths [n, n_features] they were made of."""
        draws = _draws(self.seed, seed, number, 1)
        density = torch.tensor(self.density)
        fires = torch.rand(n, self.n_features, generator=draws) < density
        low, high = self.amplitudes
        strengths = fires * (low + (high - low) * torch.rand(n, self.n_features, generator=draws))
        if self.scales is not None:
            strengths = strengths * torch.tensor(self.scales)
        noise = self.noise * torch.randn(n, self.width, generator=draws) if self.noise else 0.0
        return strengths @ self.features + noise, strengths

    def gradient(self, x: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
        """Of the downstream loss at `x`."""
        if self.sensitivities is None:
            raise ValueError("this source has no downstream loss: give it sensitivities")
        weights, directions = torch.tensor(self.sensitivities), self.features
        floors = 0.5 * self.amplitudes[0] * (1.0 if self.scales is None else torch.tensor(self.scales))
        return ((x @ directions.T > floors) * weights) @ directions

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        number = start
        while True:
            x = self.sample(batch_size, seed=seed, number=number)[0]
            yield {self.hook: x} if self.sensitivities is None else {self.hook: x, "gradient": self.gradient(x)}
            number += 1


@dataclass(frozen=True)
class PlantedMLP:
    """Inputs and outputs of a sparse MLP with known units, for transcoders; the same for the same seeds.

    y = relu(x W_in - threshold) W_out (+ x linear), x standard normal, columns of W_in and rows of W_out of norm 1.

    Attributes:
        width: Of inputs and outputs.
        n_units: Hidden units.
        density: Chance that a unit is on, which fixes the threshold.
        linear: Root mean square gain of a planted linear map past the units; 0 for none.
        seed: Of the weights.
        hook, target_hook: Names of inputs and outputs.
    """

    width: int = 64
    n_units: int = 128
    density: float = 0.03
    linear: float = 0.0
    seed: int = 0
    hook: str = "in"
    target_hook: str = "out"

    def __post_init__(self) -> None:
        if not 0 < self.density < 1 or self.linear < 0 or self.hook == self.target_hook:
            raise ValueError(
                f"density={self.density} must lie between 0 and 1, linear={self.linear} be at least 0, and the hooks "
                f"{self.hook!r} and {self.target_hook!r} differ"
            )

    @property
    def hooks(self) -> list[str]:
        return [self.hook, self.target_hook]

    @property
    def threshold(self) -> float:
        """What a unit's input must exceed: a quantile of the standard normal distribution."""
        return float(torch.special.ndtri(torch.tensor(1 - self.density, dtype=torch.float64)))

    @property
    def W_in(self) -> Float[Tensor, "width unit"]:
        """What each unit reads, a column of norm 1."""
        return _unit_rows(self.n_units, self.width, self.seed, 0).T

    @property
    def W_out(self) -> Float[Tensor, "unit width"]:
        """What each unit writes, a row of norm 1."""
        return _unit_rows(self.n_units, self.width, self.seed, 1)

    @property
    def linear_map(self) -> Float[Tensor, "width_in width_out"]:
        """The planted linear map: y has `x @ linear_map` in it."""
        draws = torch.randn(self.width, self.width, generator=_draws(self.seed, 2), dtype=torch.float64)
        return (self.linear * draws / self.width**0.5).float()

    def describe(self) -> dict[str, Any]:
        sizes = {"width": self.width, "n_units": self.n_units, "density": self.density}
        return {"kind": "planted MLP", **sizes, "linear": self.linear, "seed": self.seed, "hooks": self.hooks}

    def sample(self, n: int, *, seed: int = 0, number: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and outputs [n, width], and how strongly each unit was on, [n, n_units]."""
        x = torch.randn(n, self.width, generator=_draws(self.seed, seed, number, 1))
        on = (x @ self.W_in - self.threshold).relu()
        return x, on @ self.W_out + x @ self.linear_map, on

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        number = start
        while True:
            x, y, _ = self.sample(batch_size, seed=seed, number=number)
            yield {self.hook: x, self.target_hook: y}
            number += 1


def _unit_rows(n: int, width: int, *seeds: int) -> Tensor:
    rows = torch.randn(n, width, generator=_draws(*seeds), dtype=torch.float64)
    return (rows / rows.norm(dim=1, keepdim=True)).float()


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
