"""How rows are shared out among passes: by memory, and by where their suffixes start; and the bar that counts them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from interp.patching._resume import Reader

# Seconds: fixed cost of a block in one forward, of a token in a block, of reading a parameter once in a forward, and of
# a parameter on a token. Only their ratios matter, and only to speed. Measured on one CPU core on models of 128 and 768
# dimensions (within 10 % from 1 to 500 tokens); the accelerator's are orders of magnitude.
_SECONDS = {"cpu": (4e-4, 4e-6, 4e-10, 2e-11), "other": (6e-4, 2e-8, 2e-12, 1e-13)}
_CPU_TOKENS = 1024  # a CPU is fastest while the activations of a batch stay in its cache; more rows gain nothing
_BACKWARD_CPU_TOKENS = 4096  # the same of backward passes
_STARTS = 64  # distinct suffix starts that are told apart; coarser ones recompute a few positions


def progress_bar(progress: bool, total: int, what: str) -> Any:
    """A bar over `total` steps, silent unless asked for and not forbidden by the environment."""
    return tqdm(total=total, disable=not progress or os.environ.get("INTERP_PROGRESS") == "0", desc=what)


@dataclass(frozen=True)
class Batch:
    """Rows of one forward, which computes positions `start` to `stop`.

    Row i patches spot `spot[i]` and unit `unit[i]` of the base run's row `row[i]`.
    """

    spot: Tensor
    unit: Tensor
    row: Tensor
    start: int
    stop: int

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Split:
    """Sizes of everything, from the model's geometry and the memory budget.

    Half of the budget is for the runs that are kept, half for a forward.
    """

    geometry: Any
    n_pos: int
    reader: Reader
    memory_budget: int
    batch_size: int | None
    item: int
    device: torch.device

    @property
    def suffixes(self) -> bool:
        """Whether a cell may be run without the positions before it: not if the metric reads those too."""
        return self.reader.read is not None

    @classmethod
    def of(
        cls, bridge: Any, geometry: Any, reader: Reader, n_pos: int, memory_budget: int, batch_size: int | None
    ) -> Split:
        """For this model, checked."""
        parameter = next(iter(bridge.original_model.parameters()))
        split = cls(geometry, n_pos, reader, memory_budget, batch_size, parameter.element_size(), parameter.device)
        split._check()
        return split

    def row_bytes(self, n_tokens: int, n_keys: int) -> int:
        """Working memory of one row of a forward, estimated from above: a block, its pattern, the cache, logits."""
        g = self.geometry
        n_logits = self.n_pos if self.reader.read is None else 1
        block = n_tokens * (12 * g.d_model + 6 * g.d_mlp + 6 * g.n_heads * g.d_head + 4 * g.n_heads * n_keys)
        cache = 2 * g.n_layers * n_keys * g.n_kv_heads * g.d_head
        return self.item * (block + cache + 3 * n_logits * g.d_vocab)

    def _check(self) -> None:
        """Raise if not even the smallest batch fits."""
        least = self.reader.n_examples if self.reader.whole else 1
        needed = 2 * least * self.row_bytes(self.n_pos, self.n_pos)
        why = (
            f"this metric has no .select, so a batch must hold all {least} examples"
            if self.reader.whole
            else "one row needs it"
        )
        if needed > self.memory_budget:
            raise ValueError(
                f"memory_budget={self.memory_budget:,} bytes is too small: about {needed:,} are needed ({why}); "
                "raise it, or pass shorter or fewer prompts, or a metric of interp.metrics"
            )
        if self.batch_size is not None and self.batch_size < least:
            raise ValueError(f"batch_size={self.batch_size} is below {least}: {why}")

    def chunks(self, n_rows: int, stored_width: int) -> list[Tensor]:
        """Base rows that are run and kept together.

        `stored_width` is how many numbers per position are kept besides the stream, keys and values.
        """
        if self.reader.whole:
            return list(torch.arange(n_rows).split(self.reader.n_examples))
        g = self.geometry
        stored = self.n_pos * self.item * (stored_width + g.n_layers * (g.d_model + 2 * g.n_kv_heads * g.d_head))
        each = max(stored, self.row_bytes(self.n_pos, self.n_pos))
        rows = max(1, self.memory_budget // 2 // each)
        return list(torch.arange(n_rows).split(min(rows, self.batch_size or rows)))

    def rows_at_once(self, row_bytes: int, what: str, fewer: str) -> int:
        """Most rows (circuits x examples) of a pass, of which half of the budget holds the activations.

        Raises ValueError, with `what` is done and `fewer` of what to pass, if it does not hold the smallest pass.
        """
        least = self.reader.n_examples if self.reader.whole else 1
        if (needed := 2 * least * row_bytes) > self.memory_budget:
            raise ValueError(
                f"memory_budget={self.memory_budget:,} bytes is too small to {what}: about {needed:,} are needed for "
                f"{least} example{'s, as this metric has no .select' if least > 1 else ''}; raise it, or pass {fewer}"
            )
        rows = self.memory_budget // 2 // row_bytes
        if self.device.type == "cpu":
            rows = min(rows, -(-_CPU_TOKENS // self.n_pos))
        return max(least, min(rows, self.batch_size or rows))

    def check_backward(self, row_bytes: int, advice: str = "") -> None:
        """Raise unless the smallest batch of a backward pass fits."""
        least = self.reader.n_examples if self.reader.whole else 1
        if (needed := least * row_bytes) > self.memory_budget:
            why = f"this metric has no .select, so a batch must hold all {least} examples" if least > 1 else "one row"
            raise ValueError(
                f"memory_budget={self.memory_budget:,} bytes is too small: a backward pass needs about {needed:,} "
                f"({why}); raise it, {advice}pass shorter or fewer prompts, or a metric of interp.metrics"
            )

    def backward_chunks(self, n: int, row_bytes: int) -> tuple[list[Tensor], int]:
        """Examples of `n` whose backward passes are run together, and how many points of a line at a time."""
        rows = self.memory_budget // row_bytes
        if self.device.type == "cpu":
            rows = min(rows, -(-_BACKWARD_CPU_TOKENS // self.n_pos))
        rows = max(1, min(rows, self.batch_size or rows))
        examples = n if self.reader.whole else min(rows, n)
        return list(torch.arange(n).split(examples)), max(1, rows // examples)

    def batches(self, starts: Tensor, rows: Tensor, layer: int, *, suffixes: bool) -> Iterator[Batch]:
        """Batches that cover every cell and row of a chunk in which anything is changed.

        `starts[spot, unit, row]` is the first position changed there, and the number of positions where none is.
        """
        live = starts < self.n_pos
        if self.reader.whole:
            cells = live.any(-1).nonzero()
            if not len(cells):
                return
            n = starts.shape[-1]
            for part in cells.split(max(1, self._most_rows(self.n_pos) // n)):
                spot, unit = part.repeat_interleave(n, 0).unbind(1)
                yield Batch(spot, unit, torch.arange(n).repeat(len(part)), 0, self.n_pos)
            return
        spot, unit, row = live.nonzero().unbind(1)
        if not len(row):
            return
        start = starts[spot, unit, row] if suffixes else torch.zeros_like(row)
        order = start.argsort(stable=True)
        step = -(-self.n_pos // _STARTS)
        distinct, counts = (start[order] // step * step).unique_consecutive(return_counts=True)
        done = 0
        for first, size in self._groups(distinct.tolist(), counts.tolist(), layer):
            for part in order[done : done + size].split(self._most_rows(self.n_pos - first)):
                stop = self.n_pos if self.reader.read is None else int(self.reader.read_of(rows[row[part]]).max()) + 1
                yield Batch(spot[part], unit[part], row[part], first, stop)
            done += size

    def _most_rows(self, n_tokens: int) -> int:
        rows = self.memory_budget // 2 // self.row_bytes(n_tokens, self.n_pos)
        if self.device.type == "cpu":
            rows = min(rows, -(-_CPU_TOKENS // n_tokens))
        return max(1, min(rows, self.batch_size or rows))

    def _groups(self, starts: list[int], counts: list[int], layer: int) -> list[tuple[int, int]]:
        """Neighbouring starts run together, as `(start, rows)`: the cheapest partition, by dynamic programming.

        A group runs from its smallest start. One group for each start computes fewest tokens; fewer groups have less
        overhead.
        """
        g = self.geometry
        fixed, token, read, parameter = _SECONDS["cpu" if self.device.type == "cpu" else "other"]
        size = g.d_model * (2 * g.n_heads * g.d_head + 2 * g.n_kv_heads * g.d_head + (3 if g.gated else 2) * g.d_mlp)
        above = g.n_layers - layer
        per_forward = (above + 1) * fixed + read * (above * size + g.d_model * g.d_vocab)
        per_token = above * (token + parameter * size)
        best: list[tuple[float, int]] = [(0.0, 0)]
        for j in range(1, len(starts) + 1):
            options = []
            rows = 0
            for i in range(j - 1, -1, -1):
                rows += counts[i]
                tokens = self.n_pos - 0.9 * starts[i]  # copying a prefix costs about a tenth of computing it
                forwards = -(-rows // self._most_rows(self.n_pos - starts[i]))
                options.append((best[i][0] + forwards * per_forward + rows * tokens * per_token, i))
            best.append(min(options))
        groups: list[tuple[int, int]] = []
        j = len(starts)
        while j:
            i = best[j][1]
            groups.append((starts[i], sum(counts[i:j])))
            j = i
        return groups[::-1]
