"""The largest and smallest entries of every row of a matrix product that is never there as a whole.

The product of vectors [row, d] and columns [d, column] is made in tiles. Of each tile only the maxima over groups of 32
neighbouring columns are looked at. An entry among the k best of its row lies in one of the k groups whose maxima are
best, so these few groups, or later only those that beat the k-th best so far, are opened.

An entry's score and column together are one 64-bit key: the order of the score first, then the lower column. Keys are
all different, so ties go to the lowest column whatever the order of the tiles and however `topk` treats ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

GROUP = 32
_NOTHING = -(2**63)
_LAST = 2**31 - 1  # keys hold _LAST - column in their low half
_MOST_ROWS, _MOST_COLUMNS = 1024, 4096  # larger tiles gain nothing on a CPU: they leave its caches
_DEVICE_ROWS, _DEVICE_COLUMNS = 8192, 8192


class Extremes(NamedTuple):
    """The best entries of each row, best first, and the columns they stand in."""

    values: Float[Tensor, "row k"]
    columns: Int[Tensor, "row k"]


@dataclass(frozen=True)
class Scan:
    """What one pass over the columns found.

    Attributes:
        top: Largest entries of each row.
        bottom: Smallest entries of each row, smallest first.
        logsumexp: Of each row over all columns; None if not asked for.
    """

    top: Extremes
    bottom: Extremes
    logsumexp: Float[Tensor, " row"] | None


@dataclass(frozen=True)
class Tiling:
    """Sizes of a tile."""

    rows: int
    columns: int


def plan(d: int, n_rows: int, n_columns: int, k: int, *, budget: int, device: torch.device) -> Tiling:
    """The largest tiles that stay within `budget` bytes: the tile, its opened groups, and a block of columns with the
    copies that are made while it is prepared.

    Raises:
        ValueError: If not even the smallest tile fits.
    """
    on_cpu = device.type == "cpu"
    columns = _MOST_COLUMNS if on_cpu else _DEVICE_COLUMNS
    columns = min(columns, GROUP * math.ceil(n_columns / GROUP))
    rows = min(_MOST_ROWS if on_cpu else _DEVICE_ROWS, n_rows)

    while sum(needed := _needed(d, rows, columns, k)) > budget and (rows > 16 or columns > GROUP):
        if rows > 16 and (columns <= GROUP or needed[1] > needed[0]):
            rows = max(16, rows // 2)
        else:
            columns = max(GROUP, columns // 2 // GROUP * GROUP)
    if sum(needed) > budget:
        raise ValueError(
            f"memory_budget of {budget:,} bytes is too small: the smallest tile of {rows} x {columns} with k={k} and "
            f"{d} dimensions needs {sum(needed):,}"
        )
    return Tiling(rows, columns)


def scan(
    vectors: Float[Tensor, "row d"],
    columns: Callable[[int, int], Float[Tensor, "d some"]],
    n_columns: int,
    k: int,
    *,
    tiling: Tiling,
    logsumexp: bool = False,
    after: Callable[[], object] = lambda: None,
) -> Scan:
    """The `k` largest and `k` smallest entries of each row of `vectors @ columns`, exact.

    Exact in the sense of the arithmetic: entries are float32 products of the operands as given (bfloat16 operands are
    multiplied exactly and added up in float32), no entry is passed over, and of equal entries the lowest columns win.

    Args:
        columns: `columns(start, stop)` makes these columns, of the dtype of `vectors`; called once for each block.
        k: At most `n_columns`.
        after: Called after each block of columns.
    """
    if not 1 <= k <= n_columns:
        raise ValueError(f"k must lie between 1 and the {n_columns} columns, got {k}")
    blocks = [slice(start, start + tiling.rows) for start in range(0, len(vectors), tiling.rows)]
    highest = [_Running(vectors[block], k, sign=1) for block in blocks]
    lowest = [_Running(vectors[block], k, sign=-1) for block in blocks]
    sums = [_LogSumExp(vectors[block]) for block in blocks] if logsumexp else []
    product = _Product(vectors, tiling)
    rows = product.operand(vectors)
    for start, made in _blocks(columns, n_columns, tiling):
        made = product.operand(made)
        for index, block in enumerate(blocks):
            tile = product(rows[block], made)
            highest[index].update(tile, start)
            lowest[index].update(tile, start)
            if logsumexp:
                sums[index].update(tile)  # last: overwrites the tile
        after()
    return Scan(_joined(highest), _joined(lowest), torch.cat([part.value() for part in sums]) if logsumexp else None)


def extremes(
    vectors: Float[Tensor, "row d"],
    columns: Callable[[int, int], Float[Tensor, "d some"]],
    n_columns: int,
    *,
    tiling: Tiling,
    after: Callable[[], object] = lambda: None,
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Only the largest and the smallest entry of each row: what a null needs."""
    largest = torch.full((len(vectors),), -torch.inf, device=vectors.device)
    smallest = torch.full((len(vectors),), torch.inf, device=vectors.device)
    product = _Product(vectors, tiling)
    rows = product.operand(vectors)
    for _, made in _blocks(columns, n_columns, tiling):
        made = product.operand(made)
        for start in range(0, len(vectors), tiling.rows):
            block = slice(start, start + tiling.rows)
            tile = product(rows[block], made)
            largest[block] = torch.maximum(largest[block], tile.amax(1))
            smallest[block] = torch.minimum(smallest[block], tile.amin(1))
        after()
    return largest, smallest


def moments(
    columns: Callable[[int, int], Float[Tensor, "d some"]], n_columns: int, *, tiling: Tiling
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Mean of the columns and their covariance, in float64: mean and spread of every row of a product follow from them
    without looking at the product."""
    total = sum(made.sum(1, dtype=torch.float64) for _, made in _blocks(columns, n_columns, tiling))
    mean = torch.as_tensor(total) / n_columns
    squares = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=mean.device)
    for _, made in _blocks(columns, n_columns, tiling):
        about = made.float() - mean.float()[:, None]  # so that float32 products lose nothing to a large mean
        squares += (about @ about.T).double()
    off = mean.float().double() - mean
    return mean, squares / n_columns - torch.outer(off, off)


def spread(
    vectors: Float[Tensor, "row d"], mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    """Mean and standard deviation (over all columns, not a sample) of each row of the product, from `moments`."""
    rows = vectors.float()
    variance = ((rows @ covariance.float()) * rows).sum(1, dtype=torch.float64)
    return (rows.double() @ mean).float(), variance.clamp_min(0).sqrt().float()


def _blocks(columns: Callable[[int, int], Tensor], n_columns: int, tiling: Tiling) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, n_columns, tiling.columns):
        yield start, columns(start, min(start + tiling.columns, n_columns))


def _needed(d: int, rows: int, columns: int, k: int) -> tuple[int, int]:
    """Bytes to prepare the columns, and to make the tile and open its groups."""
    return 4 * 4 * d * columns, rows * (6 * columns + 48 * GROUP * min(k, columns // GROUP + 1))


class _Product:
    """Float32 products of rows and columns, into memory that the next one overwrites."""

    def __init__(self, vectors: Tensor, tiling: Tiling) -> None:
        size = min(tiling.rows, len(vectors)) * tiling.columns
        self._native = vectors.dtype != torch.float32 and vectors.device.type == "cuda"
        self._memory = torch.empty(0 if self._native else size, dtype=torch.float32, device=vectors.device)

    def __call__(self, left: Float[Tensor, "row d"], right: Float[Tensor, "d some"]) -> Float[Tensor, "row some"]:
        if self._native:  # bfloat16 units that add up in float32
            return torch.mm(left, right, out_dtype=torch.float32)
        shape = left.shape[0], right.shape[1]
        return torch.mm(left, right, out=self._memory[: shape[0] * shape[1]].view(shape))

    def operand(self, matrix: Tensor) -> Tensor:
        return matrix if self._native else matrix.float()


class _Running:
    """The k best keys of each row so far; with `sign=-1` of the negated entries."""

    def __init__(self, rows: Tensor, k: int, *, sign: int) -> None:
        self.k, self.sign = k, sign
        self.keys = torch.full((len(rows), k), _NOTHING, dtype=torch.int64, device=rows.device)

    def update(self, tile: Float[Tensor, "row some"], start: int) -> None:
        whole = tile.shape[1] // GROUP * GROUP
        if whole:
            groups = tile[:, :whole].unflatten(1, (-1, GROUP))
            best = groups.amax(-1) if self.sign > 0 else -groups.amin(-1)
            self._open(groups, best, start)
        if whole < tile.shape[1]:  # the columns after the last whole group
            rest = torch.arange(start + whole, start + tile.shape[1], device=tile.device)
            self._merge(_keys(self.sign * tile[:, whole:], rest))

    def _open(self, groups: Float[Tensor, "row group 32"], best: Float[Tensor, "row group"], start: int) -> None:
        bound = self._bound()
        row, group = _above(best, bound)  # an entry equal to the k-th best has a higher column and stands behind it
        if not len(row):
            return
        if int(torch.bincount(row).max()) > self.k:  # most often the first tile, which nothing stands against yet
            # k groups reach the k-th best maximum, so what is below it is not among the k best
            bound = torch.maximum(bound, _just_below(best.topk(self.k, dim=1).values[:, -1]))
            row, group = _above(best, bound)
            if int(torch.bincount(row).max()) > self.k:  # many equal maxima, which would all be opened
                self._open_best(groups, best, start)
                return
        found = self.sign * groups[row, group]
        pair, offset = _above(found, bound[row])
        row, column = row[pair], start + group[pair] * GROUP + offset
        counts = torch.bincount(row, minlength=len(groups))
        slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]  # rows come in order
        keys = torch.full((len(groups), int(counts.max())), _NOTHING, dtype=torch.int64, device=row.device)
        keys[row, slot] = _keys(found[pair, offset], column)
        self._merge(keys)

    def _open_best(self, groups: Tensor, best: Tensor, start: int) -> None:
        n_groups = groups.shape[1]
        order = _keys(best, torch.arange(n_groups, device=best.device))
        chosen = order.topk(min(self.k, n_groups), dim=1, sorted=False).indices
        found = groups[torch.arange(len(groups), device=best.device)[:, None], chosen]  # [row, chosen, 32]
        columns = start + chosen[..., None] * GROUP + torch.arange(GROUP, device=best.device)
        self._merge(_keys(self.sign * found, columns).flatten(1))

    def _bound(self) -> Tensor:
        """The k-th best score of each row; minus infinity while there are fewer."""
        last = self.keys[:, -1]
        return torch.where(last == _NOTHING, -torch.inf, _scores(last))

    def _merge(self, keys: Int[Tensor, "row some"]) -> None:
        self.keys = torch.cat([self.keys, keys], 1).topk(self.k, dim=1).values

    def result(self) -> Extremes:
        return Extremes(self.sign * _scores(self.keys), (_LAST - (self.keys & 0xFFFFFFFF)).int())


class _LogSumExp:
    """Running log of the sum of exponentials of each row."""

    def __init__(self, rows: Tensor) -> None:
        self.high = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=rows.device)
        self.sum = torch.zeros_like(self.high)

    def update(self, tile: Float[Tensor, "row some"]) -> None:
        high = torch.maximum(self.high, tile.amax(1).double())
        added = tile.sub_(high.float()[:, None]).exp_().sum(1).double()
        self.sum = self.sum * (self.high - high).exp() + added
        self.high = high

    def value(self) -> Tensor:
        return (self.high + self.sum.log()).float()


def _joined(parts: list[_Running]) -> Extremes:
    found = [part.result() for part in parts]
    return Extremes(torch.cat([part.values for part in found]), torch.cat([part.columns for part in found]))


def _keys(scores: Float[Tensor, "*any"], columns: Int[Tensor, "*some"]) -> Int[Tensor, "*any"]:
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes one zero of the two
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    return (ordered.long() << 32) | (_LAST - columns.long())


def _above(scores: Float[Tensor, "row some"], bound: Float[Tensor, " row"]) -> tuple[Tensor, Tensor]:
    row, place = (scores > bound[:, None]).nonzero(as_tuple=True)
    return row, place


def _just_below(scores: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    return torch.nextafter(scores, torch.full_like(scores, -torch.inf))


def _scores(keys: Int[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
