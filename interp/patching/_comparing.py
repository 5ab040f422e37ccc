"""Statistics of approximate against exact effects: over all cells, and estimated from a sample of them."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from scipy import stats as _scipy

Group = Literal["top", "random", "all"]
Checked = Literal["pearson", "spearman", "sign", "precision"]
GROUPS: tuple[Group, ...] = get_args(Group)
CHECKED: tuple[Checked, ...] = get_args(Checked)


def statistics(a: np.ndarray, b: np.ndarray, matter: np.ndarray, k: int, no_sign: bool) -> dict[str, np.ndarray]:
    """Pearson, Spearman, precision and sign of each row of `[row, cell]` exact means `a` and scores `b`."""
    if no_sign:
        a = abs(a)
    flat_scores = constant(b)
    best = top(a, k)
    hits = np.zeros(a.shape, dtype=bool)
    np.put_along_axis(hits, top(b, k), True, axis=1)
    signs = [np.sign(np.take_along_axis(m, best, axis=1)) for m in (a, b)]
    ranks = [_scipy.rankdata(m[:, matter], axis=1) for m in (a, b)]
    precision = np.take_along_axis(hits, best, axis=1).mean(1)
    return {
        "pearson": row_correlation(a, b),
        "spearman": row_correlation(*ranks),
        "precision": np.where(flat_scores, np.nan, precision),
        "sign": np.full(len(a), np.nan) if no_sign else (signs[0] == signs[1]).mean(1),
    }


def top(values: np.ndarray, k: int) -> np.ndarray:
    """Indices `[row, k]` of the k largest magnitudes of each row; among equal ones the first."""
    return np.argsort(-abs(values), axis=1, kind="stable")[:, :k]


def constant(values: np.ndarray) -> np.ndarray:
    """Whether each row is one number throughout, to the rounding of a mean."""
    return np.ptp(values, axis=1) <= 1e-12 * abs(values).max(1)


def row_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson of each row; NaN where a row is constant."""
    moving = ~constant(a) & ~constant(b)
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.where(moving, (a * b).sum(1) / np.where(moving, scale, 1.0), np.nan)


def overlaps(tops: np.ndarray) -> np.ndarray:
    """Jaccard overlap of every pair of top sets `[resample, k]`."""
    seen, column = np.unique(tops, return_inverse=True)
    member = np.zeros((len(tops), len(seen)), dtype=np.float32)
    member[np.arange(len(tops))[:, None], column.reshape(tops.shape)] = 1
    shared = (member @ member.T)[np.triu_indices(len(tops), 1)]
    return shared / (2 * tops.shape[1] - shared)


def quantiles(draws: np.ndarray, tail: list[float]) -> np.ndarray:
    """Of the draws in which the statistic is defined."""
    defined = draws[np.isfinite(draws)]
    return np.quantile(defined, tail) if len(defined) else np.full(2, np.nan)


def weighted_statistics(
    exact: np.ndarray,
    scores: np.ndarray,
    group: np.ndarray,
    n_others: int,
    *,
    no_sign: bool,
    level: float,
    n_resamples: int,
    seed: int,
) -> np.ndarray:
    """`[group, statistic, bound]` from `[cell, example]` arrays. The random cells stand for `n_others` cells."""
    top, random = np.flatnonzero(group == 2), np.flatnonzero(group == 1)
    whole = len(random) == n_others

    def at(exact_means: np.ndarray, means: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        each = np.full(len(drawn), n_others / max(1, len(drawn)))
        weights = {"top": np.ones(len(top)), "random": each, "all": np.concatenate([np.ones(len(top)), each])}
        members = {"top": top, "random": drawn, "all": np.concatenate([top, drawn])}
        table = []
        for name in GROUPS:
            x, y, w = exact_means[members[name]], means[members[name]], weights[name]
            x = abs(x) if no_sign else x
            sign = np.average(np.sign(x) == np.sign(y), weights=w) if len(x) and not no_sign else np.nan
            precision = _precision(abs(x), w, len(top)) if name == "all" and n_others else np.nan
            table.append([_pearson(x, y, w), _pearson(_ranks(x, w), _ranks(y, w), w), sign, precision])
        return np.array(table)

    n = exact.shape[1]
    estimate = at(exact.mean(1), scores.mean(1), random)
    if n < 2:
        return np.stack([estimate, np.full_like(estimate, np.nan), np.full_like(estimate, np.nan)], axis=-1)
    rng = np.random.default_rng(seed)
    draws = []
    for weights in rng.multinomial(n, np.full(n, 1 / n), size=n_resamples) / n:
        drawn = random if whole or not len(random) else rng.choice(random, len(random))
        draws.append(at(exact @ weights, scores @ weights, drawn))
    stacked = np.stack(draws)
    empty = np.isnan(stacked).all(0)
    stacked[:, empty] = 0  # numpy warns of quantiles of nothing
    low, high = np.nanquantile(stacked, [(1 - level) / 2, (1 + level) / 2], axis=0)
    low[empty] = high[empty] = np.nan
    return np.stack([estimate, low, high], axis=-1)


def _pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> float:
    """Weighted correlation; NaN for fewer than 3 cells or where a side is constant."""
    if len(x) < 3:
        return np.nan
    w = weights / weights.sum()
    x, y = x - w @ x, y - w @ y
    x_size, y_size = w @ x**2, w @ y**2
    if min(x_size, y_size) <= 0 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    return float(w @ (x * y) / np.sqrt(x_size * y_size))


def _ranks(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The rank each cell would have among all cells, where cells stand for several; the mean rank of equal ones."""
    order = np.argsort(x, kind="stable")
    below = np.concatenate([[0.0], np.cumsum(weights[order])])
    first, last = (np.searchsorted(x[order], x, side=side) for side in ("left", "right"))
    return (below[first] + below[last]) / 2


def _precision(size: np.ndarray, weights: np.ndarray, k: int) -> float:
    """Estimated share of the exact top k that is among the first k cells given.

    The largest cells are counted, each as often as the cells it stands for, until there are k.
    """
    order = np.argsort(-size, kind="stable")
    counted = np.minimum(np.cumsum(weights[order]), k)
    share = np.diff(counted, prepend=0.0)
    return float(share[order < k].sum() / k)
