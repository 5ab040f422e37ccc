"""Intervals over examples: of means, medians, ratios, rates and correlations."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as _scipy

from interp.stats._samples import as_array, check_options, samples


class Interval(NamedTuple):
    """A point estimate and its confidence bounds; each has the shape of the cells."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Correlation(NamedTuple):
    """A correlation, its bootstrap bounds, the p-value of no association, and the number of pairs it rests on."""

    estimate: float
    low: float
    high: float
    p_value: float
    n: int


def bootstrap_interval(
    values: ArrayLike | Any,
    *,
    statistic: Literal["mean", "median"] = "mean",
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of the mean (or median) over examples, for every cell.

    With a single example the bounds are NaN, since one value says nothing of the spread; with a constant sample they
    collapse to a point, and below about eight examples they are too narrow. For rates of success use
    `proportion_interval`.

    Args:
        values: `[..., example]`.

    Source:
        Efron & Tibshirani 1993, chapter 13. Equal in method to TransformerLens' `bootstrap_ci` and to
        `scipy.stats.bootstrap` with `method="percentile"`; differs in that means are one product with a matrix of
        resample counts.
    """
    values = samples(values, "values")
    check_options(confidence, n_resamples)
    n = values.shape[-1]
    if statistic == "mean":
        estimate = values.mean(-1)
        draws = values @ (_resample_counts(n, n_resamples, seed).T / n)  # [..., resample]
    elif statistic == "median":
        estimate = np.median(values, axis=-1)
        index = np.random.default_rng(seed).integers(0, n, (n_resamples, n))
        draws = np.stack([np.median(values[..., rows], axis=-1) for rows in index], axis=-1)
    else:
        raise ValueError(f"statistic must be 'mean' or 'median', got {statistic!r}")
    return _percentiles(estimate, draws, confidence, n)


def ratio_interval(
    numerator: ArrayLike | Any,
    denominator: ArrayLike | Any,
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of mean(numerator) / mean(denominator), examples resampled jointly.

    This is how recovery is averaged: the ratio of means, (patched - corrupted) over (clean - corrupted). It differs
    from the mean of per-example ratios, which one example with a small denominator can carry to any value. If resampled
    denominators come near zero or change sign the bounds are very wide; that is the honest answer.

    Args:
        numerator: `[..., example]`.
        denominator: `[..., example]`, or `[example]` shared by all cells.

    Raises:
        ValueError: If the mean denominator of any cell is zero.
    """
    numerator, denominator = samples(numerator, "numerator"), samples(denominator, "denominator")
    check_options(confidence, n_resamples)
    n = numerator.shape[-1]
    if denominator.shape[-1] != n:
        raise ValueError(
            f"numerator has {n} examples and denominator {denominator.shape[-1]}; they are paired, so must be equal"
        )
    if np.any(denominator.mean(-1) == 0):
        raise ValueError(
            "the mean of the denominator is 0, so the ratio is undefined; clean and corrupted do not differ"
        )
    weights = _resample_counts(n, n_resamples, seed).T / n
    below = denominator @ weights
    below = np.where(below == 0, np.nan, below)
    with np.errstate(invalid="ignore"):
        draws = (numerator @ weights) / below
    return _percentiles(numerator.mean(-1) / denominator.mean(-1), draws, confidence, n)


def proportion_interval(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a rate, sensible also when none or all of the trials succeed.

    Source:
        Wilson 1927, through `scipy.stats.binomtest`. Narrower than the exact interval of TransformerLens'
        `success_rate_ci`.
    """
    check_options(confidence, 1)
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n} trials: expected 0 <= successes <= n and n >= 1")
    bounds = _scipy.binomtest(int(successes), int(n)).proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(np.asarray(successes / n), np.asarray(bounds.low), np.asarray(bounds.high))


def correlation(
    x: ArrayLike | Any,
    y: ArrayLike | Any,
    *,
    kind: Literal["pearson", "spearman"] = "pearson",
    confidence: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Correlation:
    """Correlation of two arrays of equal shape, cell by cell, with a bootstrap interval over the pairs.

    Pairs in which either side is NaN (unmeasured) are left out and `n` says how many remain. Constant input has no
    correlation: the estimate is NaN. The interval treats pairs as independent; cells of one sweep are not quite, so it
    is a lower bound on the uncertainty.

    Raises:
        ValueError: If the shapes differ, a value is infinite, or fewer than 3 pairs remain.
    """
    a, b = as_array(x), as_array(y)
    check_options(confidence, n_resamples)
    if a.shape != b.shape:
        raise ValueError(f"x has shape {a.shape} and y {b.shape}; they are compared cell by cell, so must be equal")
    if kind not in ("pearson", "spearman"):
        raise ValueError(f"kind must be 'pearson' or 'spearman', got {kind!r}")
    keep = ~(np.isnan(a) | np.isnan(b))
    a, b = a[keep], b[keep]
    if np.isinf(a).any() or np.isinf(b).any():
        raise ValueError(f"x has {int(np.isinf(a).sum())} and y {int(np.isinf(b).sum())} infinite values")
    if len(a) < 3:
        raise ValueError(f"only {len(a)} pairs are measured on both sides; a correlation needs at least 3")
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(np.nan, np.nan, np.nan, np.nan, len(a))
    result: Any = _scipy.pearsonr(a, b) if kind == "pearson" else _scipy.spearmanr(a, b)
    rng = np.random.default_rng(seed)
    draws = np.empty(n_resamples)
    step = max(1, 2_000_000 // len(a))  # bounds the memory of a block of resamples
    for start in range(0, n_resamples, step):
        rows = rng.integers(0, len(a), (min(step, n_resamples - start), len(a)))
        u, v = a[rows], b[rows]
        if kind == "spearman":
            u, v = _scipy.rankdata(u, axis=-1), _scipy.rankdata(v, axis=-1)
        draws[start : start + len(rows)] = _row_correlation(u, v)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return Correlation(float(result.statistic), float(low), float(high), float(result.pvalue), len(a))


def _resample_counts(n: int, n_resamples: int, seed: int) -> np.ndarray:
    """How often each example occurs in each resample, `[resample, example]`; rows sum to `n`."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(np.float64)


def _percentiles(estimate: Any, draws: np.ndarray, confidence: float, n: int) -> Interval:
    estimate = np.asarray(estimate)  # the mean of a single cell is a NumPy scalar
    if n == 1:
        nothing = np.full(estimate.shape, np.nan)
        return Interval(estimate, nothing, nothing.copy())
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=-1)
    return Interval(estimate, np.asarray(low), np.asarray(high))


def _row_correlation(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = u - u.mean(-1, keepdims=True), v - v.mean(-1, keepdims=True)
    scale = np.sqrt((u**2).sum(-1) * (v**2).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (u * v).sum(-1) / scale, np.nan)
