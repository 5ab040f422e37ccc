"""Choosing latents and thresholds for labels on some tokens, and scoring them on others, with their controls."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.dictionaries.detection import assign_features

SCORES = ("precision", "recall", "f1")


def best_thresholds(
    scores: Float[Tensor, "token unit"],
    truth: Bool[Tensor, "token label"],
    covered: Bool[Tensor, "token label"] | None = None,
) -> tuple[Float[Tensor, "label unit"], Float[Tensor, "label unit"]]:
    """The best F1 of every unit for every label, and its threshold; together with tokens that are covered already."""
    labels = truth.double()
    before = torch.zeros_like(truth) if covered is None else covered
    hits_before, said_before, positives = (before & truth).sum(0), before.sum(0), labels.sum(0)
    best = scores.new_zeros(truth.shape[1], scores.shape[1], dtype=torch.float64)
    limits = scores.new_full((truth.shape[1], scores.shape[1]), torch.inf)
    for unit, column in enumerate(scores.T):
        low = column.min()
        on = (column > low).nonzero()[:, 0]  # the rest cannot be told apart
        if not len(on):
            continue
        on = on[column[on].argsort(descending=True, stable=True)]
        values = torch.cat([column[on], low[None]])
        fresh = ~before[on]
        hits = hits_before + (labels[on] * fresh).cumsum(0)
        f1 = 2 * hits / (said_before + fresh.double().cumsum(0) + positives)
        f1[values[:-1] == values[1:]] = -1.0  # no threshold lies between equal activations
        best[:, unit], at = f1.max(0)
        upper, lower = values[at], values[at + 1]
        middle = (upper + lower) / 2
        limits[:, unit] = torch.where(middle < upper, middle, lower)
    return best, limits


def choose_latents(scores: Tensor, truth: Tensor, k: int, unique: bool) -> tuple[Tensor, Tensor]:
    """Members and thresholds, [label, k]; -1 and NaN where no further latent helps."""
    members = torch.full((truth.shape[1], k), -1)
    limits = torch.full((truth.shape[1], k), torch.nan)
    covered, reached = torch.zeros_like(truth), torch.zeros(truth.shape[1], dtype=torch.float64)
    for rank in range(k):
        f1, at = best_thresholds(scores, truth, covered)
        chosen = assign_features(f1) if unique else f1.argmax(1)
        value = f1.gather(1, chosen[:, None])[:, 0]
        better = (value > reached) | (rank == 0)
        if not bool(better.any()):
            break
        limit = at.gather(1, chosen[:, None])[:, 0]
        members[:, rank] = torch.where(better, chosen, -1)
        limits[:, rank] = torch.where(better, limit.float(), torch.nan)
        covered |= (scores[:, chosen] > limit) & better
        reached = torch.where(better, value, reached)
    return members, limits


def said(scores: Tensor, members: Tensor, limits: Tensor) -> Bool[Tensor, "token label"]:
    return (scores[:, members.clamp(min=0)] > limits.nan_to_num(torch.inf)).any(-1)


def scored(held: Tensor, truth: Tensor) -> np.ndarray:
    """Precision, recall and F1 by label, [label, score]."""
    hits, n, positives = (held & truth).sum(0).double(), held.sum(0).double(), truth.sum(0).double()
    return torch.stack([hits / n, hits / positives, 2 * hits / (n + positives)], 1).numpy()


def diff_means_scores(seen: Tensor, unseen: Tensor, known: Tensor, asked: Tensor) -> np.ndarray:
    rows, weight = seen.double().cpu(), known.double()
    means, rest = (w.T @ rows / w.sum(0)[:, None] for w in (weight, 1 - weight))
    out = []
    for i, direction in enumerate(means - rest):
        _, limit = best_thresholds((rows @ direction)[:, None], known[:, i : i + 1])
        held = (unseen.double().cpu() @ direction)[:, None] > limit[0]
        out.append(scored(held, asked[:, i : i + 1])[0])
    return np.stack(out)


def random_scores(
    seen: Tensor, unseen: Tensor, known: Tensor, asked: Tensor, n: int, draws: torch.Generator
) -> np.ndarray:
    alive = (seen.amax(0) > seen.amin(0)).nonzero()[:, 0]
    found = []
    _, limits = best_thresholds(seen, known)
    for _ in range(n):
        drawn = alive[torch.randint(len(alive), (known.shape[1], 1), generator=draws)]
        found.append(scored(said(unseen, drawn, limits.gather(1, drawn)), asked))
    return mean_of_draws(found) if found else np.full((known.shape[1], len(SCORES)), np.nan)


def mean_of_draws(parts: list[np.ndarray]) -> np.ndarray:
    """Mean over draws; precision over those in which something was said to hold."""
    stacked = np.stack(parts)
    counts = (~np.isnan(stacked)).sum(0)
    return np.where(counts > 0, np.nansum(stacked, 0) / np.maximum(counts, 1), np.nan)


def document_halves(documents: Tensor, draws: torch.Generator) -> Bool[Tensor, " token"]:
    """Which tokens are to choose on: those of half of the documents, drawn at random."""
    kinds, place = torch.unique(documents.cpu(), return_inverse=True)
    return (torch.randperm(len(kinds), generator=draws) < len(kinds) / 2)[place]
