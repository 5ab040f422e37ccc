"""What decoding would find if weights and vocabulary had nothing to do with each other: null vectors and null peaks.

A neuron's *peak* is its largest score over the vocabulary. With tens of thousands of tokens some score is always
large, so a peak says nothing until it is compared with the peaks of vectors of the same kind that mean nothing.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from scipy import special
from torch import Tensor

MIN_NULL_PEAKS = 20
"""Fewer null peaks than this have no tail to speak of."""

_TAIL = 0.1  # share of the null peaks, the largest ones, that the exponential tail is fitted to


class PeakStatistics(NamedTuple):
    """How far peaks stand out, each of the shape of the peaks: standard deviations above the mean null peak, and the
    chance that a null vector has a peak as large."""

    z: np.ndarray
    p: np.ndarray


def rotation_null(vectors: Float[Tensor, "neuron d_model"], seed: int = 0) -> Float[Tensor, "neuron d_model"]:
    """The vectors, all turned by one random rotation.

    Norms and every angle between neurons stay; only what ties them to the vocabulary is lost. One rotation (uniform
    over the orthogonal group) is shared by all rows, so give the vectors of one layer and side at a time, with a seed
    of their own. Each row by itself becomes a direction drawn uniformly from the sphere.

    Source:
        QR of a Gaussian matrix with the signs of R's diagonal taken out: Mezzadri 2007 (arXiv:math-ph/0609050),
        section 5. Without the signs the rotation is not uniform.
    """
    _check_vectors(vectors)
    d_model = vectors.shape[1]
    gaussian = _gaussian((d_model, d_model), seed).to(vectors.device)
    q, r = torch.linalg.qr(gaussian)
    rotation = q * torch.sign(torch.diagonal(r))
    return (vectors.to(rotation.dtype) @ rotation).to(vectors.dtype)


def covariance_null(
    vectors: Float[Tensor, "neuron d_model"], seed: int = 0, *, mean: Literal["keep", "remove"] = "keep"
) -> Float[Tensor, "neuron d_model"]:
    """As many Gaussian vectors with the covariance of these.

    A layer's vectors may all lean towards a few directions, and these may happen to lie near some tokens. A rotation
    destroys that; this null keeps it and loses only what single neurons have. A peak that beats the rotation but not
    this null belongs to the layer, not to the neuron. Norms are those of the Gaussian: with scores that grow with the
    norm ("dot", "logit") the null lacks the spread of the neurons' norms.

    Args:
        mean: `"keep"` adds the mean vector of the layer, `"remove"` centres the null on zero (the covariance is about
            the mean either way): with both one sees what the shared mean alone does.
    """
    _check_vectors(vectors)
    if mean not in ("keep", "remove"):
        raise ValueError(f"mean must be 'keep' or 'remove', got {mean!r}")
    n, d_model = vectors.shape
    if n < 2:
        raise ValueError(f"{n} vector has no covariance; give the vectors of a whole layer")
    exact = vectors.double()
    centre = exact.mean(0)
    values, axes = torch.linalg.eigh((exact - centre).mT @ (exact - centre) / (n - 1))
    noise = _gaussian((n, d_model), seed).to(vectors.device)
    drawn = (noise * values.clamp_min(0).sqrt()) @ axes.mT
    return (drawn + centre if mean == "keep" else drawn).to(vectors.dtype)


def peak_statistics(
    peaks: ArrayLike | Any,
    null_peaks: ArrayLike | Any,
    *,
    tail: Literal["exponential", "empirical"] = "exponential",
) -> PeakStatistics:
    """z and one-sided p of peaks against null peaks. Correct p for the number of neurons with
    `interp.stats.adjust_p_values(p, method="bh")`.

    Up to the 90 % point of the null peaks p is the share of them that is as large, (hits + 1) / (n + 1). Beyond it
    counting has too coarse a resolution to survive a correction over thousands of neurons, and p follows an exponential
    with the mean excess of the largest tenth. Peaks of bounded scores fall off faster than that, so it errs on the
    careful side: z and p of a peak far outside are understated.

    Args:
        peaks: `[..., neuron]`; leading axes are groups, such as layers, each with null peaks of its own.
        null_peaks: `[..., draw]`, the same leading axes. Several rotations may be joined along the last axis, and for
            scores that do not depend on the norm also layers: each rotated neuron is a uniform direction.
        tail: `"empirical"` counts everywhere; no p is then below 1 / (n + 1).

    Raises:
        ValueError: If anything is not finite, groups differ, null peaks are fewer than 20 or all equal.

    Source:
        A fitted tail of permutation values: Knijnenburg et al. 2009 (doi:10.1093/bioinformatics/btp211). They fit a
        generalised Pareto tail, which may end and give p = 0; the exponential is its limit without an end.
    """
    observed, null = _array(peaks, "peaks"), _array(null_peaks, "null_peaks")
    if tail not in ("exponential", "empirical"):
        raise ValueError(f"tail must be 'exponential' or 'empirical', got {tail!r}")
    if observed.shape[:-1] != null.shape[:-1]:
        raise ValueError(
            f"peaks have groups {observed.shape[:-1]} and null_peaks {null.shape[:-1]}; every group needs null peaks "
            "of its own along the last axis"
        )
    n = null.shape[-1]
    if n < MIN_NULL_PEAKS:
        raise ValueError(f"{n} null peaks; at least {MIN_NULL_PEAKS} are needed: join several draws of the null")
    null = np.sort(null, axis=-1)
    spread = null.std(-1, ddof=1)
    if np.any(null[..., 0] == null[..., -1]):
        raise ValueError("all null peaks of a group are equal; the null did not move the vectors (is d_model 1?)")
    z = (observed - null.mean(-1)[..., None]) / spread[..., None]
    p = np.empty(observed.shape)
    for group in np.ndindex(observed.shape[:-1]):
        p[group] = _p_values(observed[group], null[group], tail)
    return PeakStatistics(z, p)


def expected_peak(d_model: int, d_vocab: int, n_vectors: int = 1) -> float:
    """About the largest cosine of `n_vectors` random directions with `d_vocab` independent ones:
    sqrt(2 ln(d_vocab n_vectors) / d_model).

    0.076 for one vector of Llama-3.1-8B and 0.110 for all its 458,752. It is the leading term for large `d_model` and
    lies above the exact value (`peak_quantile`), the more so the smaller the model; at most 1 is returned. Token
    directions are not independent: the rotation null is the honest comparison, this one needs no weights.
    """
    _check_counts(d_model, d_vocab, n_vectors)
    return min(1.0, math.sqrt(2 * math.log(d_vocab * n_vectors) / d_model))


def peak_quantile(q: float | int, d_model: int, d_vocab: int, n_vectors: int = 1, *, absolute: bool = False) -> float:
    """The exact quantile of the largest cosine of random directions with `d_vocab` independent ones.

    The squared cosine of a random direction is Beta(1/2, (d_model - 1)/2), and the largest of N independent cosines is
    below x with the N-th power of the chance that one is.

    Args:
        q: The chance that the largest cosine stays below, between 0 and 1: 0.5 for the median, 0.95 for a bound.
        n_vectors: How many directions the largest cosine is taken over, besides the vocabulary.
        absolute: Of the largest magnitude instead of the largest value.
    """
    _check_counts(d_model, d_vocab, n_vectors)
    if not 0 < q < 1:
        raise ValueError(f"q must lie between 0 and 1, got {q}; the median peak is q=0.5")
    above = -math.expm1(math.log(q) / (d_vocab * n_vectors))  # chance that one cosine is larger
    two_sided = above if absolute else 2 * above
    if two_sided >= 1:  # a quantile at or below zero
        return 0.0 if absolute else -math.sqrt(1 - float(special.betaincinv((d_model - 1) / 2, 0.5, 2 * (1 - above))))
    return math.sqrt(1 - float(special.betaincinv((d_model - 1) / 2, 0.5, two_sided)))


def _p_values(observed: np.ndarray, null: np.ndarray, tail: str) -> np.ndarray:
    """Of one group; `null` ascends."""
    n = len(null)
    hits = n - np.searchsorted(null, observed, side="left")
    p = (hits + 1) / (n + 1)
    if tail == "empirical":
        return p
    largest = null[-math.ceil(_TAIL * n) :]
    start = largest[0]
    scale = float((largest - start).mean())
    beyond = observed > start
    if scale == 0:  # the largest null peaks are all equal: counting is all there is
        return p
    p[beyond] = (len(largest) + 1) / (n + 1) * np.exp(-(observed[beyond] - start) / scale)
    return p


def _gaussian(shape: tuple[int, int], seed: int) -> Tensor:
    """In float64 and drawn on the CPU, so that a seed means the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _check_vectors(vectors: Tensor) -> None:
    if not torch.isfinite(vectors).all():
        bad = int((~torch.isfinite(vectors)).any(1).sum())
        raise ValueError(f"{bad} of {len(vectors)} vectors hold NaN or infinite values; a null of them means nothing")


def _check_counts(d_model: int, d_vocab: int, n_vectors: int) -> None:
    if d_model < 2 or d_vocab < 1 or n_vectors < 1:
        raise ValueError(
            f"d_model {d_model}, d_vocab {d_vocab}, n_vectors {n_vectors}: expected d_model of at least 2 and at least "
            "one token and one vector"
        )


def _array(values: Any, name: str) -> np.ndarray:
    if isinstance(values, Tensor):  # bfloat16 and CUDA tensors have no NumPy form of their own
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"{name} have shape {array.shape}; expected [..., neuron] with at least one neuron")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} hold {int((~np.isfinite(array)).sum())} values that are NaN or infinite")
    return array
