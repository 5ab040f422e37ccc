"""Affine maps fitted on some tokens and scored on others, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_SMALLEST = 1e-12  # of the largest variance: below it a direction is the rounding of float32 activations


@dataclass(frozen=True, eq=False)
class AffineMap:
    """x -> x @ weight + bias."""

    weight: Float[Tensor, "width_in width_out"]
    bias: Float[Tensor, " width_out"]

    def __call__(self, x: Float[Tensor, "*batch width_in"]) -> Float[Tensor, "*batch width_out"]:
        return x.double() @ self.weight + self.bias


def fit_affine(
    x: Float[Tensor, "token width_in"], y: Float[Tensor, "token width_out"], ridge: float | int = 0.0
) -> AffineMap:
    """The affine map of `x` closest to `y` in squares, in float64.

    Args:
        ridge: Penalty on the squared weights, as a share of the mean variance of the directions of `x`. With 0,
            directions of `x` without variance get no weight.
    """
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    variances, basis = torch.linalg.eigh(centred.T @ centred / len(x))
    alive = variances > _SMALLEST * variances[-1].clamp(min=0)
    penalised = torch.where(alive, variances + ridge * variances.clamp(min=0).mean(), 1.0)
    weight = basis @ ((basis.T @ (centred.T @ (y - mean_y) / len(x))) * (alive / penalised)[:, None])
    return AffineMap(weight, mean_y - mean_x @ weight)


def held_out(
    n: int, documents: Int[Tensor, " token"] | None, test_fraction: float, seed: int, *, width: int, ridge: float | int
) -> Bool[Tensor, " token"]:
    """Which tokens are scored: those of a share of the documents, drawn at random; of the tokens where none are given.

    Raises:
        ValueError: If either side would be empty, or the fit had fewer tokens than unknowns and no penalty.
    """
    if not 0 < test_fraction < 1 or not ridge >= 0:
        raise ValueError(f"test_fraction={test_fraction} must lie between 0 and 1, and ridge={ridge} be at least 0")
    if documents is not None and len(documents) != n:
        raise ValueError(f"documents has {len(documents)} entries and there are {n} tokens; expected one each")
    unit = torch.arange(n) if documents is None else documents.cpu().long()
    names = unit.unique()
    if len(names) < 2:
        raise ValueError(
            f"{n} tokens of {len(names)} {'documents' if documents is not None else 'in all'}; expected at least 2 "
            f"documents (or tokens, without documents), to fit on some and score on others"
        )
    order = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
    test = torch.isin(unit, order[: min(max(1, round(test_fraction * len(names))), len(names) - 1)])
    if ridge == 0 and int((~test).sum()) <= width + 1:
        raise ValueError(
            f"{int((~test).sum())} tokens to fit {width} inputs and a constant; give more tokens, a smaller "
            f"test_fraction={test_fraction}, or a ridge above 0"
        )
    return test


def r2(y: Float[Tensor, "token width"], predicted: Float[Tensor, "token width"]) -> float:
    """1 - E|y - predicted|^2 / E|y - E y|^2, widths pooled; NaN where `y` does not vary."""
    spread = float((y - y.mean(0)).square().sum())
    return 1 - float((y - predicted).square().sum()) / spread if spread > 0 else float("nan")


def r2_by_width(y: Float[Tensor, "token width"], predicted: Float[Tensor, "token width"]) -> float:
    """The mean of the R2 of each width; those that do not vary are left out."""
    spread = (y - y.mean(0)).square().sum(0)
    varies = spread > _SMALLEST * spread.max()
    if not bool(varies.any()):
        return float("nan")
    return float((1 - (y - predicted).square().sum(0)[varies] / spread[varies]).mean())
