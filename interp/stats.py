"""Statistics over examples: intervals, paired tests and correlations.

Arrays, tensors or DataArrays in, NumPy out. Examples lie along the last axis; leading axes are cells, such as `(layer,
pos)`, and all cells share one set of resamples, so a sweep costs one matrix product. A cell that holds a NaN
(unmeasured) gives NaN. Randomness comes from `seed` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as _scipy

__all__ = [
    "Correlation",
    "Interval",
    "MaxStatistic",
    "adjust_p_values",
    "bootstrap_interval",
    "correlation",
    "max_statistic",
    "paired_test",
    "proportion_interval",
    "ratio_interval",
]

Alternative = Literal["two-sided", "greater", "less"]


class Interval(NamedTuple):
    """A point estimate and its confidence bounds; each has the shape of the cells."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray


class MaxStatistic(NamedTuple):
    """Tests of all cells of a grid at once.

    Attributes:
        statistic: What was compared, for every cell: the mean over examples, or its t value; NaN where unmeasured.
        p_value: Corrected for the search over the grid; NaN where unmeasured.
        threshold: A cell is significant where its statistic exceeds this (its absolute value for `"two-sided"`; its
            negative for `"less"`); infinite if there are too few examples or groups for any cell to be.
        n_groups: How many signs were free.
    """

    statistic: np.ndarray
    p_value: np.ndarray
    threshold: float
    n_groups: int


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
    values = _samples(values, "values")
    _check_options(confidence, n_resamples)
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
    numerator, denominator = _samples(numerator, "numerator"), _samples(denominator, "denominator")
    _check_options(confidence, n_resamples)
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


def paired_test(
    differences: ArrayLike | Any,
    *,
    method: Literal["sign_flip", "wilcoxon"] = "sign_flip",
    alternative: Alternative = "two-sided",
    n_permutations: int = 10_000,
    seed: int = 0,
) -> np.ndarray:
    """p-value that paired differences are symmetric about zero, for every cell.

    `"sign_flip"` asks how often randomly flipped signs give a mean as extreme; with 14 examples or fewer every pattern
    of signs is tried and the value is exact, else it is `(hits + 1) / (n_permutations + 1)`. `"wilcoxon"` is SciPy's
    signed-rank test, which outliers move less. Correct the values of a sweep with `adjust_p_values`.

    Args:
        differences: `[..., example]`, one condition minus the other.
        alternative: `"greater"` asks whether the mean is above zero.

    Source:
        Fisher 1935 randomisation. Equal in method to TransformerLens' `sign_flip_permutation_pvalue`, which is exact up
        to 12.
    """
    values = _samples(differences, "differences")
    _check_alternative(alternative)
    if method == "wilcoxon":
        return _wilcoxon(values, alternative)
    if method != "sign_flip":
        raise ValueError(f"method must be 'sign_flip' or 'wilcoxon', got {method!r}")
    n = values.shape[-1]
    signs, exact = _sign_patterns(n, n_permutations, seed)
    observed = values.mean(-1)
    # a relative tolerance absorbs summation order, so that a pattern equal to the observed one counts as a tie
    tolerance = 1e-9 * np.abs(values).mean(-1)
    hits = np.zeros(observed.shape)
    for block in np.array_split(signs, max(1, len(signs) // 1024)):
        null = np.moveaxis(values @ (block.T / n), -1, 0)  # [permutation, ...]
        if alternative == "two-sided":
            extreme = np.abs(null) >= np.abs(observed) - tolerance
        elif alternative == "greater":
            extreme = null >= observed - tolerance
        else:
            extreme = null <= observed + tolerance
        hits += extreme.sum(0)
    p = hits / len(signs) if exact else (hits + 1) / (len(signs) + 1)
    return np.where(np.isnan(observed), np.nan, p)


def max_statistic(
    differences: ArrayLike | Any,
    *,
    statistic: Literal["mean", "t"] = "mean",
    alternative: Alternative = "two-sided",
    groups: Sequence[Any] | np.ndarray | None = None,
    confidence: float = 0.95,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> MaxStatistic:
    """p-values corrected for having searched a grid: how often would the *best* cell be this good if none were?

    Signs of examples are flipped, the same flips in every cell, and each cell's statistic is held against the largest
    of the whole flipped grid. The chance that any cell of an empty grid is reported is at most `1 - confidence`, and
    since cells are flipped together their correlation costs nothing, unlike with Holm or Bonferroni
    (`adjust_p_values`).

    Args:
        differences: `[..., example]`, one condition minus the other, symmetric about zero where there is no effect. All
            leading axes are one grid; cells with NaN (unmeasured) are left out.
        statistic: `"mean"`, whose threshold is in the unit of the values and which noisy cells set; or `"t"` (mean over
            its standard error), which gives every cell the same say, those of tiny effects too.
        alternative: `"greater"` asks whether the mean is above zero.
        groups: For each example the name of its group, such as its subject. Examples of one group keep their signs
            together: where they share what makes the difference, they are one observation and not many.
        confidence: For the threshold.
        n_permutations: Random patterns of signs; with 14 groups or fewer every pattern is tried and the result is
            exact.
        seed: For the patterns.

    Raises:
        ValueError: If there is nothing to test, or `groups` is not one per example.

    Source:
        Single-step max-T of Westfall & Young 1993; sign flips over a grid as in Nichols & Holmes 2002.
    """
    values = _samples(differences, "differences")
    _check_options(confidence, n_permutations)
    _check_alternative(alternative)
    n = values.shape[-1]
    if statistic not in ("mean", "t") or (statistic == "t" and n < 2):
        raise ValueError(f"statistic must be 'mean' or, for 2 examples or more, 't'; got {statistic!r} for {n}")
    if groups is not None and len(groups) != n:
        raise ValueError(f"groups has {len(groups)} entries for {n} examples; expected one for each")
    cells = values.reshape(-1, n)
    measured = np.isfinite(cells.sum(1))
    if not measured.any():
        raise ValueError("every cell holds a NaN, so there is nothing to test")
    cells = cells[measured]
    member = np.arange(n) if groups is None else np.unique([str(name) for name in groups], return_inverse=True)[1]
    n_groups = int(member.max()) + 1
    signs, exact = _sign_patterns(n_groups, n_permutations, seed)
    squares = (cells**2).mean(1, keepdims=True)  # flips leave the sum of squares alone

    def signed(means: np.ndarray) -> np.ndarray:
        if statistic == "mean":
            return means
        spread = np.sqrt(np.maximum(squares - means**2, 1e-18 * squares) / (n - 1))
        return np.divide(means, spread, out=np.zeros_like(means), where=spread > 0)

    size = {"two-sided": np.abs, "greater": lambda means: means, "less": lambda means: -means}[alternative]
    observed = signed(cells.mean(1, keepdims=True))[:, 0]
    blocks = np.array_split(signs, max(1, len(signs) * len(cells) // 2_000_000))
    null = np.sort(np.concatenate([size(signed(cells @ (block.T[member] / n))).max(0) for block in blocks]))
    # a relative tolerance absorbs summation order, so that a pattern equal to the observed one counts as a tie
    tolerance = 1e-9 * np.abs(null).max()
    own = 0 if exact else 1  # the observed pattern is among all patterns, but not among those drawn
    hits = len(null) - np.searchsorted(null, size(observed) - tolerance, side="left") + own
    most = (
        int((1 - confidence) * (len(null) + own) + 1e-9) - own
    )  # patterns of the null that p <= 1 - confidence allows
    threshold = float(null[-1 - most] + tolerance) if most + own > 0 else np.inf
    found, p = np.full(len(measured), np.nan), np.full(len(measured), np.nan)
    found[measured], p[measured] = observed, hits / (len(null) + own)
    return MaxStatistic(found.reshape(values.shape[:-1]), p.reshape(values.shape[:-1]), threshold, n_groups)


def proportion_interval(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a rate, sensible also when none or all of the trials succeed.

    Source:
        Wilson 1927, through `scipy.stats.binomtest`. Narrower than the exact interval of TransformerLens'
        `success_rate_ci`.
    """
    _check_options(confidence, 1)
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
    a, b = _array(x), _array(y)
    _check_options(confidence, n_resamples)
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


def adjust_p_values(p_values: ArrayLike | Any, *, method: Literal["holm", "bh"] = "holm") -> np.ndarray:
    """p-values corrected for the number of tests, same shape; NaN (unmeasured) stays NaN and is not counted.

    `"holm"` bounds the chance of any false finding (Holm 1979); `"bh"` bounds the share of false findings among those
    reported (Benjamini & Hochberg 1995).
    """
    p = _array(p_values)
    measured = ~np.isnan(p)
    if np.any((p[measured] < 0) | (p[measured] > 1)):
        raise ValueError(f"p-values must lie in [0, 1]; they run from {np.nanmin(p)} to {np.nanmax(p)}")
    out = np.full(p.shape, np.nan)
    if not measured.any():
        return out
    values = p[measured]
    if method == "bh":
        out[measured] = _scipy.false_discovery_control(values, method="bh")
    elif method == "holm":
        order = np.argsort(values, kind="stable")
        steps = values[order] * np.arange(len(values), 0, -1)
        adjusted = np.empty(len(values))
        adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
        out[measured] = adjusted
    else:
        raise ValueError(f"method must be 'holm' or 'bh', got {method!r}")
    return out


def _array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):  # a tensor: bfloat16 and CUDA ones have no NumPy form of their own
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _samples(values: Any, name: str) -> np.ndarray:
    array = _array(values)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"{name} has shape {array.shape}; expected [..., example] with at least one example")
    if np.isinf(array).any():
        raise ValueError(f"{name} has {int(np.isinf(array).sum())} infinite values; a mean over them says nothing")
    return array


def _check_options(confidence: float, n_resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}; a 95 % interval is confidence=0.95")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")


def _check_alternative(alternative: str) -> None:
    if alternative not in ("two-sided", "greater", "less"):
        raise ValueError(f"alternative must be 'two-sided', 'greater' or 'less', got {alternative!r}")


def _sign_patterns(n: int, n_permutations: int, seed: int) -> tuple[np.ndarray, bool]:
    """Signs `[pattern, n]`, and whether these are all patterns there are."""
    if n <= 14:
        return 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1), True
    if n_permutations < 1:
        raise ValueError(f"n_permutations must be at least 1, got {n_permutations}")
    return np.random.default_rng(seed).choice((-1.0, 1.0), size=(n_permutations, n)), False


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


def _wilcoxon(values: np.ndarray, alternative: str) -> np.ndarray:
    cells = values.reshape(-1, values.shape[-1])
    p = np.full(len(cells), np.nan)
    for i, cell in enumerate(cells):
        if np.isnan(cell).any():
            continue
        nonzero = cell[cell != 0]  # SciPy drops zero differences too, but warns when none is left
        result: Any = _scipy.wilcoxon(nonzero, alternative=alternative) if len(nonzero) else None
        p[i] = 1.0 if result is None else result.pvalue
    return p.reshape(values.shape[:-1])


def _row_correlation(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = u - u.mean(-1, keepdims=True), v - v.mean(-1, keepdims=True)
    scale = np.sqrt((u**2).sum(-1) * (v**2).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (u * v).sum(-1) / scale, np.nan)
