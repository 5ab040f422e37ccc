"""How likely a random direction is to be read as strongly as an observed one: exact up to a saddlepoint."""

from __future__ import annotations

import numpy as np
from scipy import stats


def direction_tail(shares: np.ndarray, weights: np.ndarray, d_model: int) -> np.ndarray:
    """P(X >= share) for X = sum_j weights_j v_j^2, with v uniform on the unit sphere of `d_model` dimensions.

    With v = g / |g| and g normal, X >= x is sum_j (weights_j - x) g_j^2 - x sum_rest g^2 >= 0: the tail of a weighted
    sum of chi-squares, by Lugannani and Rice's saddlepoint formula. Relative error of a few per cent, also far in
    the tail, where no number of random draws would reach.

    Args:
        shares: Observed values, any shape, each in [0, 1]; NaN stays NaN.
        weights: Squared singular values of the reader over their sum, at most `d_model` of them.
    """
    x = np.asarray(shares, dtype=np.float64).ravel()
    weights = np.asarray(weights, dtype=np.float64)
    rest = d_model - len(weights)
    times = np.append(np.ones(len(weights)), rest) if rest else np.ones(len(weights))
    every = np.append(weights, 0.0) if rest else weights
    p = np.where(np.isnan(x), np.nan, (x <= every.min()).astype(float))  # beyond the range: impossible or certain
    inside = (x < every.max()) & (x > every.min())
    if inside.any():
        p[inside] = _tail_at_zero(every - x[inside, None], times)
    return p.reshape(np.shape(shares))


def _tail_at_zero(a: np.ndarray, times: np.ndarray) -> np.ndarray:
    """P(sum_k a_k chi2(times_k) >= 0), for every row of `a`."""
    low, high = 0.5 / a.min(1), 0.5 / a.max(1)  # the cumulant generating function lives between these
    for _ in range(100):  # bisection for the saddlepoint, where its slope is zero
        t = 0.5 * (low + high)
        upwards = (times * a / (1 - 2 * a * t[:, None])).sum(1) > 0
        low, high = np.where(upwards, low, t), np.where(upwards, t, high)
    t = 0.5 * (low + high)
    spread = 1 - 2 * a * t[:, None]
    cumulant = -0.5 * (times * np.log(spread)).sum(1)
    curvature = 2 * (times * (a / spread) ** 2).sum(1)
    w = np.sign(t) * np.sqrt(np.maximum(-2 * cumulant, 0))
    u = t * np.sqrt(curvature)
    second, third = 2 * (times * a**2).sum(1), 8 * (times * a**3).sum(1)
    near_mean = np.abs(w) < 1e-4  # both corrections blow up there and their difference has this limit
    safe_w, safe_u = np.where(near_mean, 1.0, w), np.where(near_mean, 1.0, u)
    tail = stats.norm.sf(safe_w) + stats.norm.pdf(safe_w) * (1 / safe_u - 1 / safe_w)
    return np.clip(np.where(near_mean, 0.5 - third / (6 * np.sqrt(2 * np.pi) * second**1.5), tail), 0.0, 1.0)
