"""Average precision of many units at once, exact with ties, and what it is when labels mean nothing.

Pure maths on tensors. A unit ranks the examples by its value, largest first; examples of equal value form one step of
the precision-recall curve, so that the order of the rows never matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_TOLERANCE = 1e-12  # sums of the same terms in another order
_ENOUGH = 10  # draws at least as large as the observed value after which a p-value needs no more of them
_TIED_DRAWS = 1000  # at most so many for a unit with ties: each costs a pass over its examples
_CELLS = 2**24  # elements of one block of work


@dataclass(frozen=True)
class Ranking:
    """How units order examples.

    Attributes:
        order: The examples of each unit, largest value first.
        end: How many examples are at least as large as the one in this row: the last rank of its ties.
    """

    order: Int[Tensor, "example unit"]
    end: Int[Tensor, "example unit"]

    @classmethod
    def of(cls, scores: Float[Tensor, "example unit"]) -> Ranking:
        """Rank the examples of every unit."""
        values, order = scores.sort(0, descending=True)
        n = len(scores)
        last = torch.ones_like(order, dtype=torch.bool)
        last[:-1] = values[1:] != values[:-1]
        place = torch.arange(1, n + 1, device=order.device)[:, None]
        end = torch.where(last, place, n + 1)
        return cls(order, end.flip(0).cummin(0).values.flip(0))

    @property
    def tied(self) -> Bool[Tensor, " unit"]:
        """Whether a unit gives any two examples the same value."""
        place = torch.arange(1, len(self.end) + 1, device=self.end.device)[:, None]
        return (self.end != place).any(0)

    def units(self, which: Tensor) -> Ranking:
        """The ranking of some units."""
        return Ranking(self.order[:, which], self.end[:, which])

    def precision(self, positive: Bool[Tensor, " example"]) -> Float[Tensor, " unit"]:
        """Average precision of every unit: sum over steps of (recall gained) x (precision at the step's end)."""
        hits = positive[self.order].double()
        found = hits.cumsum(0).gather(0, self.end - 1)
        return (hits * found / self.end).sum(0) / positive.sum()


def chance(n: int, n_positive: int, *, draws: int, seed: int) -> np.ndarray:
    """Average precision of `draws` random orders of `n` examples without ties, ascending: the same for every unit."""
    rng = np.random.default_rng(seed)
    place = np.arange(1, n + 1)
    found = []
    step = max(1, _CELLS // n)
    for start in range(0, draws, step):
        hits = rng.random((min(step, draws - start), n)).argsort(1) < n_positive
        found.append((hits * hits.cumsum(1) / place).sum(1) / n_positive)
    return np.sort(np.concatenate(found))


def chance_p(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """(draws at least as large + 1) / (draws + 1), for a null that all units share."""
    at_least = len(null) - np.searchsorted(null, observed - _TOLERANCE, side="left")
    return (at_least + 1) / (len(null) + 1)


def tied_p(ranking: Ranking, positive: Bool[Tensor, " example"], *, draws: int, seed: int) -> np.ndarray:
    """p-values of units that have ties, whose null depends on them: labels are permuted for these units themselves.

    Units that 10 draws have reached are done with (Besag & Clifford 1991), so that only striking ones cost all draws,
    which are at most 1,000.
    """
    n_units, draws = ranking.order.shape[1], min(draws, _TIED_DRAWS)
    rng = np.random.default_rng(seed)
    p = np.full(n_units, np.nan)
    observed = ranking.precision(positive) - _TOLERANCE
    left = torch.arange(n_units)
    hits = torch.zeros(n_units)
    done = 0
    labels = positive.cpu().numpy()
    while done < draws and len(left):
        block = min(16, draws - done)
        some = ranking.units(left.to(ranking.order.device))
        for _ in range(block):
            shuffled = torch.from_numpy(rng.permutation(labels)).to(positive.device)
            hits[left] += (some.precision(shuffled) >= observed[left]).cpu()
        done += block
        enough = hits[left] >= (_ENOUGH if done < draws else 0)
        p[left[enough].numpy()] = (hits[left[enough]].numpy() + 1) / (done + 1)
        left = left[~enough]
    return p


def grouped_p(
    ranking: Ranking,
    positives: Sequence[Bool[Tensor, " example"]],
    groups: Int[Tensor, " example"],
    *,
    draws: int,
    seed: int,
) -> Float[np.ndarray, "label unit"]:
    """p-values where labels belong to whole groups of examples: which groups are positive is permuted, nothing else.

    With K[a, b] = sum over examples of group b of (examples of group a ranked no lower) / rank, average precision is
    the sum of K over the positive groups, over their size: each permutation costs a product of groups x groups numbers.
    Permutations are taken some at a time, so that none of the blocks has more than `_CELLS` numbers.
    """
    n, n_units = ranking.order.shape
    n_groups = int(groups.max()) + 1
    sizes = torch.bincount(groups, minlength=n_groups).double()
    rng = np.random.default_rng(seed)
    nulls = []  # per label: which groups are positive [draw, group], and how many examples these have
    for positive in positives:
        labels = np.zeros(n_groups, dtype=bool)
        labels[groups[positive].unique().cpu().numpy()] = True
        assigned = torch.from_numpy(np.stack([rng.permutation(labels) for _ in range(draws)])).to(sizes)
        nulls.append((assigned, assigned @ sizes))
    p = np.full((len(positives), n_units), np.nan)
    step = max(1, _CELLS // (n * n_groups))
    for start in range(0, n_units, step):
        which = torch.arange(start, min(start + step, n_units), device=ranking.order.device)
        some = ranking.units(which)
        member = torch.nn.functional.one_hot(groups[some.order].T, n_groups).double()  # [unit, example, group]
        above = member.cumsum(1).gather(1, (some.end.T - 1)[:, :, None].expand_as(member))
        table = above.transpose(1, 2) @ (member / some.end.T[:, :, None])  # [unit, group, group]
        size = max(1, _CELLS // (len(which) * n_groups))
        for label, (assigned, weight) in enumerate(nulls):
            least = some.precision(positives[label])[:, None] - _TOLERANCE
            reached = torch.zeros(len(which), dtype=torch.long, device=least.device)
            for drawn, total in zip(assigned.split(size), weight.split(size), strict=True):
                null = ((drawn @ table) * drawn).sum(2) / total  # [unit, draw]
                reached += (null >= least).sum(1)
            p[label, which.cpu().numpy()] = (reached.cpu().numpy() + 1) / (draws + 1)
    return p
