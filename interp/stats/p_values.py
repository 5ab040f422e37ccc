"""Tests of paired differences, one cell or a whole grid at a time, and p-values corrected for their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as _scipy

from interp.stats._samples import as_array, check_options, samples

Alternative = Literal["two-sided", "greater", "less"]


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
    values = samples(differences, "differences")
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
    values = samples(differences, "differences")
    check_options(confidence, n_permutations)
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


def adjust_p_values(p_values: ArrayLike | Any, *, method: Literal["holm", "bh"] = "holm") -> np.ndarray:
    """p-values corrected for the number of tests, same shape; NaN (unmeasured) stays NaN and is not counted.

    `"holm"` bounds the chance of any false finding (Holm 1979); `"bh"` bounds the share of false findings among those
    reported (Benjamini & Hochberg 1995).
    """
    p = as_array(p_values)
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
