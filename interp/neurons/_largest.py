"""The largest entries of many columns at once, exactly: ties go to the earliest row, whatever the chunking."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Once = Literal["token", "row", "context"]
Side = Literal["max", "min", "abs"]

NONE = float("-inf")
"""The key of an entry that may not be chosen."""


def keyed(scores: Tensor, side: Side) -> Tensor:
    """What is ranked: the score, its negative, or its magnitude."""
    return {"max": scores, "min": -scores, "abs": scores.abs()}[side]


def chosen(keys: Tensor, n: int) -> Tensor:
    """Mask of the `n` largest along the last axis but one, `[..., rows, unit]`; of equal ones the earliest.

    `torch.topk` promises no order among equals, and a neuron that is off at most tokens has little but equals.
    """
    n = min(n, keys.shape[-2])
    least = keys.topk(n, dim=-2).values[..., -1:, :]
    above = keys > least
    equal = keys == least
    room = n - above.sum(-2, keepdim=True)
    return (above | (equal & (equal.cumsum(-2) <= room))) & (keys > NONE)


def first_of_each(keys: Tensor, groups: Tensor) -> Tensor:
    """`keys` with all but the largest (the earliest of those) of each group set aside; `groups` holds 0 to G - 1."""
    where = groups[:, None].expand_as(keys)
    size = (int(groups.max()) + 1, keys.shape[1])
    best = torch.full(size, NONE, dtype=keys.dtype).scatter_reduce(0, where, keys, "amax")
    rows = torch.arange(len(keys))[:, None].expand_as(keys)
    candidates = torch.where(keys == best[groups], rows, len(keys))
    first = torch.full(size, len(keys)).scatter_reduce(0, where, candidates, "amin")
    return torch.where(rows == first[groups], keys, NONE)


def ranked(keys: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Rows of the `n` largest of each column and whether they exist: `[unit, n]` each, best first, ties by row."""
    mask = chosen(keys, n)
    found = torch.full((keys.shape[1], n), -1)
    unit, row = mask.T.nonzero(as_tuple=True)  # rows ascend within a unit
    counts = mask.sum(0)
    place = torch.arange(len(unit)) - (counts.cumsum(0) - counts)[unit]
    found[unit, place] = row
    there = found >= 0
    values = torch.where(there, keys.T.gather(1, found.clamp_min(0)), NONE)
    order = values.argsort(dim=1, descending=True, stable=True)
    return found.gather(1, order), there.gather(1, order)
