"""How many groups some vectors fall into, if any: Ward clustering, silhouettes, and a null of one group.

A heavy tail alone divides: Ward cuts off the outliers, and their silhouette is high. A null without that tail calls
every such cloud several groups, so that the default one has it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist, squareform

Null = Literal["elliptical", "gaussian", "shuffled"]


class Clusters(NamedTuple):
    """Labels from 0 by size, and for every k from 2 the silhouette, that of the null (mean, spread) and their z."""

    labels: np.ndarray
    k: int
    p_value: float
    ks: list[int]
    table: np.ndarray  # [k, (observed, null mean, null sd, z)]


def silhouette(distances: np.ndarray, labels: np.ndarray) -> float:
    """Mean over points of (b - a) / max(a, b): a the mean distance to the own group, b to the nearest other one; 0 for
    a point alone in its group (Rousseeuw 1987)."""
    member = labels[:, None] == np.unique(labels)[None]
    counts = member.sum(0)
    sums = distances @ member
    own = member.argmax(1)
    rows = np.arange(len(labels))
    alone = counts[own] == 1
    a = sums[rows, own] / np.maximum(counts[own] - 1, 1)
    means = sums / counts
    means[rows, own] = np.inf
    b = means.min(1)
    larger = np.maximum(a, b)
    score = np.divide(b - a, larger, out=np.zeros_like(a), where=larger > 0)
    return float(np.where(alone, 0.0, score).mean())


def clusters(
    vectors: np.ndarray, *, max_k: int, null: Null, n_null: int, alpha: float, seed: int, sphere: bool = False
) -> Clusters:
    """The division of vectors `[n, d]` into 2 to `max_k` groups that stands out most from the null, if any does.

    For every k the silhouette of a Ward clustering is compared with that of data of one group, and the largest z over
    k with the largest z of each draw: one test, whatever `max_k`. If it is not significant there is one group. With
    `sphere` the vectors have length 1, and so have those that are drawn.
    """
    ks = list(range(2, min(max_k, len(vectors) - 1) + 1))
    whole = np.zeros(len(vectors), dtype=int)
    if np.ptp(vectors, axis=0).max() == 0:  # all equal: nothing to divide
        return Clusters(whole, 1, 1.0, ks, np.full((len(ks), 4), np.nan))
    rng = np.random.default_rng(seed)
    observed, labels = _silhouettes(vectors, ks)
    drawn = np.array([_silhouettes(_draw(vectors, null, rng, sphere), ks)[0] for _ in range(n_null)])
    mean, spread = drawn.mean(0), np.maximum(drawn.std(0, ddof=1), 1e-6)
    z = (observed - mean) / spread
    extreme = ((drawn - mean) / spread).max(1)
    p = (1 + (extreme >= z.max()).sum()) / (n_null + 1)
    table = np.stack([observed, mean, spread, z], 1)
    if p > alpha:
        return Clusters(whole, 1, float(p), ks, table)
    best = int(z.argmax())
    found = labels[best]
    values, counts = np.unique(found, return_counts=True)
    order = {value: place for place, value in enumerate(values[np.argsort(-counts, kind="stable")])}
    return Clusters(np.array([order[value] for value in found]), len(values), float(p), ks, table)


def _silhouettes(vectors: np.ndarray, ks: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    pairs = pdist(vectors)
    tree = linkage(vectors, "ward")
    distances = squareform(pairs)
    labels = [fcluster(tree, k, "maxclust") for k in ks]
    scores = [silhouette(distances, some) if len(np.unique(some)) > 1 else 0.0 for some in labels]
    return np.array(scores), labels


def _draw(vectors: np.ndarray, null: Null, rng: np.random.Generator, sphere: bool) -> np.ndarray:
    """Vectors of one group like these: a Gaussian cloud, one with their tail, or every coordinate shuffled on its own.

    On the sphere a cloud is drawn in the plane that touches it at the mean direction, and wrapped round it.
    """
    if null == "shuffled":
        drawn = rng.permuted(vectors, axis=0)
        return _unit(drawn) if sphere else drawn
    if not sphere:
        return _cloud(vectors, null, rng)
    pole = _unit(vectors.mean(0, keepdims=True))
    along = np.clip(vectors @ pole.T, -1, 1)
    flat = _cloud(_unit(vectors - along * pole) * np.arccos(along), null, rng)
    angles = np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-30, np.pi)
    return _unit(np.cos(angles) * pole + np.sin(angles) * _unit(flat))


def _cloud(points: np.ndarray, null: Null, rng: np.random.Generator) -> np.ndarray:
    mean = points.mean(0)
    centred = points - mean
    mix = rng.standard_normal((len(points), len(points))) / np.sqrt(len(points))
    if null == "gaussian":
        # random mixtures of the centred rows have exactly their covariance, in the space that they span
        return mix @ centred + mean
    # As in a t distribution, a draw is a Gaussian vector times a factor of its own: the distance from the mean of a
    # row of the data. (Setting the distance itself would turn a Gaussian along one axis into two groups, one at each
    # end.) The covariance is that of rows shrunk to the root of their length: full rows would let outliers decide it,
    # rows of length 1 make an elongated cloud too round.
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    shrunk = centred / np.sqrt(lengths.clip(1e-30))
    return mix @ shrunk * rng.permutation(lengths) / np.sqrt(lengths.mean().clip(1e-30)) + mean


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-30)
