"""Bootstrap intervals where concepts, seeds and prompts are crossed: each is a sample of its own."""

from __future__ import annotations

import numpy as np

from interp.stats import Interval


def crossed_interval(
    values: np.ndarray, *, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean and percentile interval over the last three axes, [..., concept, draw, example], resampled independently.

    Resampling single cells would take the prompts of one concept for independent evidence about methods. Cells that
    are NaN are left out; a factor with one level is not resampled, and nothing is said of its spread.

    Source:
        The pigeonhole bootstrap of Owen 2007 (Annals of Applied Statistics 1:386), here with three factors. It errs
        to the wide side.
    """
    draws = np.random.default_rng(seed)
    there = np.isfinite(values)
    filled = np.where(there, values, 0.0)
    counts = [
        draws.multinomial(size, np.full(size, 1 / size), size=n_resamples).astype(float)
        for size in values.shape[-3:]
    ]  # fmt: skip

    def total(cells: np.ndarray) -> np.ndarray:
        summed = np.tensordot(cells, counts[2], axes=([-1], [1]))  # [..., concept, draw, resample]
        summed = (summed * counts[1].T).sum(-2)
        return (summed * counts[0].T).sum(-2)

    with np.errstate(invalid="ignore", divide="ignore"):
        estimate = filled.sum((-3, -2, -1)) / there.sum((-3, -2, -1))
        means = total(filled) / total(there.astype(float))
    if max(values.shape[-3:]) == 1:
        nothing = np.full(estimate.shape, np.nan)
        return Interval(estimate, nothing, nothing.copy())
    tail = (1 - confidence) / 2
    low, high = _quantiles(means, tail), _quantiles(means, 1 - tail)
    return Interval(estimate, low, high)


def _quantiles(means: np.ndarray, share: float) -> np.ndarray:
    out = np.full(means.shape[:-1], np.nan)
    known = np.isfinite(means).any(-1)  # a resample may hold none of the measured concepts
    if known.any():
        out[known] = np.nanquantile(means[known], share, axis=-1)
    return out
