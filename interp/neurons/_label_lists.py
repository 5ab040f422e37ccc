"""The best tokens of vectors, how far two lists of tokens agree, and meaningless changes as large as a given one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.models import geometry
from interp.neurons._readout import _SHORT
from interp.neurons._sides import Side, check_sides
from interp.neurons._tiling import extremes, plan, scan
from interp.neurons.nulls import MIN_NULL_PEAKS, peak_statistics, rotation_null
from interp.stats import adjust_p_values

Score = Literal["centred_cosine", "cosine", "dot"]
SCORES: tuple[Score, ...] = ("centred_cosine", "cosine", "dot")
Noise = Literal["norm", "angle", "shuffle"]
NOISES: tuple[Noise, ...] = ("norm", "angle", "shuffle")
_NULL_PEAKS = 1000
STATISTICS = ("top", "jaccard", "rbo")

PERSISTENCE = 0.9
"""Of rank-biased overlap: the first ten ranks have 86 % of the weight."""


def prepared(head: Float[Tensor, "d_model d_vocab"], score: Score) -> Float[Tensor, "d_model d_vocab"]:
    """Token directions such that their products with unit (or, for "dot", with bare) vectors are the scores."""
    if score == "dot":
        return head
    if score == "centred_cosine":
        head = head - head.mean(1, keepdim=True)
    return torch.nn.functional.normalize(head, dim=0)


def scored(vectors: Float[Tensor, "neuron d_model"], score: Score) -> Float[Tensor, "neuron d_model"]:
    return vectors if score == "dot" else torch.nn.functional.normalize(vectors, dim=1)


def label_lists(
    vectors: Float[Tensor, "neuron d_model"], head: Float[Tensor, "d_model d_vocab"], k: int, score: Score, budget: int
) -> tuple[Float[Tensor, "neuron k"], Int[Tensor, "neuron k"]]:
    """Scores and ids of the `k` best tokens of each vector, best first, equal ones by id; `head` is `prepared`.

    NaN and -1 for vectors that are `too_short`: all tokens tie there, and the first of them would be kept for ever.
    """
    rows = scored(vectors, score).to(head)
    tiling = plan(head.shape[0], len(rows), head.shape[1], k, budget=budget, device=head.device)
    top = scan(rows, lambda start, stop: head[:, start:stop], head.shape[1], k, tiling=tiling).top
    dead = too_short(vectors)[:, None].cpu()
    return top.values.cpu().masked_fill(dead, torch.nan), top.columns.cpu().masked_fill(dead, -1)


def too_short(vectors: Float[Tensor, "neuron d_model"]) -> Bool[Tensor, " neuron"]:
    """Which vectors have no direction, so no label: the rule of `decode`."""
    norms = vectors.double().norm(dim=1)
    return norms <= _SHORT * norms.max()


def null_tops(
    vectors: Float[Tensor, "neuron d_model"],
    head: Float[Tensor, "d_model d_vocab"],
    score: Score,
    seed: int,
    draws: int,
    budget: int,
) -> Float[Tensor, " draw_neuron"]:
    """Best score of each vector after a random rotation of all, for several rotations one after the other; NaN for
    those that are `too_short`."""
    found, dead = [], too_short(vectors).cpu()
    for draw in range(draws):
        rows = scored(rotation_null(vectors, seed + draw), score).to(head)
        tiling = plan(head.shape[0], len(rows), head.shape[1], 1, budget=budget, device=head.device)
        best = extremes(rows, lambda start, stop: head[:, start:stop], head.shape[1], tiling=tiling)[0].cpu()
        found.append(best.masked_fill(dead, torch.nan))
    return torch.cat(found)


def null_draws(n_layers: int, d_mlp: int, score: Score) -> int:
    """Rotations of each layer such that a peak is compared with a thousand null peaks or more."""
    return math.ceil(_NULL_PEAKS / (d_mlp if score == "dot" else n_layers * d_mlp))


def specificity(tops: Float[Tensor, "layer neuron"], null: Float[Tensor, "layer draw"], score: Score) -> np.ndarray:
    """q values (Benjamini-Hochberg over all neurons of the side) of the best scores against rotated ones; NaN where
    there is no score, and in a layer with too few null scores."""
    every = list(range(len(tops)))
    # a product grows with the norm, so every layer is compared with itself; else each rotated vector is a uniform
    # direction, whatever the layer
    groups = [[layer] for layer in every] if score == "dot" else [every]
    p = np.full(tops.shape, np.nan)
    for group in groups:
        alive, against = ~tops[group].isnan(), null[group][~null[group].isnan()]
        if bool(alive.any()) and len(against) >= MIN_NULL_PEAKS:
            found = np.full(alive.shape, np.nan)
            found[alive.numpy()] = peak_statistics(tops[group][alive], against).p
            p[group] = found
    return adjust_p_values(p, method="bh")


def agreement(a: Int[Tensor, "neuron k"], b: Int[Tensor, "neuron k"]) -> Float[Tensor, "3 neuron"]:
    """Same first token (0 or 1), Jaccard index of the sets, and rank-biased overlap of the lists. NaN where either list
    is of a neuron without a label (-1).

    Source:
        Webber et al. 2010 (doi:10.1145/1852102.1852106), equation 32: rank-biased overlap extrapolated from the first
        `k` ranks, with `PERSISTENCE` 0.9; 1 for equal lists, 0 for disjoint ones.
    """
    k = a.shape[1]
    found = a[:, :, None] == b[:, None, :]
    depth = torch.maximum(torch.arange(k)[:, None], torch.arange(k)[None])  # where both lists have reached the token
    hits = torch.stack([(found & (depth == d)).sum((1, 2)) for d in range(k)], 1).cumsum(1).double()  # [neuron, depth]
    ranks = torch.arange(1, k + 1, dtype=torch.float64)
    weights = PERSISTENCE**ranks
    shared = hits[:, -1]
    rbo = shared / k * weights[-1] + (1 - PERSISTENCE) / PERSISTENCE * (hits / ranks * weights).sum(1)
    missing = (a[:, 0] < 0) | (b[:, 0] < 0)
    alike = torch.stack([(a[:, 0] == b[:, 0]).double(), shared / (2 * k - shared), rbo]).float()
    return alike.masked_fill(missing, torch.nan)


def displaced(
    base: Float[Tensor, "row d"], changed: Float[Tensor, "row d"], seed: int, noise: Noise = "norm"
) -> Float[Tensor, "row d"]:
    """`base`, every row moved as far as in `changed` but in another direction.

    `"norm"`: by a Gaussian vector of the norm of the change. `"angle"`: turned by the angle of the change, and given
    its length; unlike the first it does not count a mere rescaling as a movement. `"shuffle"`: by the change of another
    row, brought to the norm of its own; so changes keep the directions they prefer and lose the rows they were meant
    for.
    """
    generator = torch.Generator().manual_seed(seed)
    if noise == "shuffle":
        change, order = changed - base, torch.randperm(len(base), generator=generator)
        other = torch.empty_like(order)
        other[order] = order.roll(1)  # one cycle through all rows: none keeps its own change
        foreign = torch.nn.functional.normalize(change[other.to(base.device)], dim=1)
        return base + foreign * change.norm(dim=1, keepdim=True)
    draw = torch.randn(base.shape, generator=generator, dtype=torch.float32).to(base)
    if noise == "norm":
        size = (changed - base).norm(dim=1, keepdim=True)
        return base + draw * (size / draw.norm(dim=1, keepdim=True))
    unit = torch.nn.functional.normalize(base, dim=1)
    aside = torch.nn.functional.normalize(draw - (draw * unit).sum(1, keepdim=True) * unit, dim=1)
    along = (changed * unit).sum(1, keepdim=True)
    across = (changed - along * unit).norm(dim=1, keepdim=True)
    return along * unit + across * aside


def require_alike(models: Sequence[Any], names: Sequence[str]) -> None:
    """Refuse models whose neurons or tokens do not correspond."""
    first, tokens = geometry(models[0]), _vocabulary(models[0])
    for bridge, name in zip(models[1:], names[1:], strict=True):
        other = geometry(bridge)
        for what in ("n_layers", "d_mlp", "d_model", "d_vocab", "gated"):
            a, b = getattr(first, what), getattr(other, what)
            if a != b:
                raise ValueError(
                    f"{names[0]} has {what} {a} and {name} {b}; neurons are compared one by one, which needs models of "
                    "one shape, such as a base model and what it was tuned into"
                )
        theirs = _vocabulary(bridge)
        if tokens is not None and theirs is not None and tokens != theirs:
            differ = sum(tokens.get(token) != place for token, place in theirs.items())
            raise ValueError(
                f"{differ} of {len(theirs)} tokens of {name} have another id in {names[0]}, so labels cannot be "
                "compared by id; load both with one tokenizer (load_model(..., tokenizer=...)) if that is what you mean"
            )


def sides_of(bridge: Any, weights: Side | Sequence[Side] | None) -> list[Side]:
    """The sides asked for, or all that the model has."""
    if weights is None:
        return ["in", "gate", "out"] if geometry(bridge).gated else ["in", "out"]
    sides: list[Side] = [weights] if isinstance(weights, str) else list(weights)
    if not sides or len(set(sides)) < len(sides):
        raise ValueError(f"weights are {sides}; name each side once, or None for all that the model has")
    check_sides(bridge, sides)
    return sides


def label_texts(ids: np.ndarray, tokens: Sequence[str]) -> list[Any]:
    """Strings of labels (ids where there are no strings); empty for neurons without a label."""
    return [tokens[token] if token >= 0 else "" for token in ids] if tokens else list(ids)


def token_strings(bridge: Any) -> list[str]:
    """Strings by id; empty without a tokenizer."""
    if bridge.tokenizer is None:
        return []
    return [bridge.tokenizer.decode([token]) for token in range(geometry(bridge).d_vocab)]


def check_options(score: str, k: int, d_vocab: int) -> None:
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(map(repr, SCORES))}, got {score!r}")
    if not 1 <= k <= d_vocab:
        raise ValueError(f"k must lie between 1 and the {d_vocab} tokens of the vocabulary, got {k}")


def _vocabulary(bridge: Any) -> dict[str, int] | None:
    return None if bridge.tokenizer is None else bridge.tokenizer.get_vocab()
