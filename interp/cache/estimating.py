"""What a harvest will cost, before it is started."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.cache._assembly import Piece, Shard, fill
from interp.cache._rows import make_stream
from interp.cache.harvesting import check_hooks
from interp.models import require_eval


@dataclass(frozen=True)
class Estimate:
    """Size and duration of a harvest.

    Attributes:
        n_tokens: Rows that will be stored; None for a stream, whose end is not known.
        n_shards: Files per hook; None for a stream.
        bytes_per_token: On disk, all hooks, token ids and labels together (headers of a few hundred bytes per file
            excluded).
        tokens_per_second: Rows per second of one batch, run twice and timed the second time. Hashing and writing go
            on in the
            background and are not included: a disk slower than `bytes_per_second` will be what decides.
    """

    n_tokens: int | None
    n_shards: int | None
    bytes_per_token: int
    tokens_per_second: float

    @property
    def bytes(self) -> int | None:
        return None if self.n_tokens is None else self.n_tokens * self.bytes_per_token

    @property
    def seconds(self) -> float | None:
        return None if self.n_tokens is None else self.n_tokens / self.tokens_per_second

    @property
    def bytes_per_second(self) -> float:
        return self.tokens_per_second * self.bytes_per_token

    def __str__(self) -> str:
        pace = f"{self.tokens_per_second:,.0f} tokens/s, {self.bytes_per_token:,} bytes per token"
        if self.n_tokens is None:
            return f"a stream of unknown length at {pace}"
        return (
            f"{self.n_tokens:,} tokens, {_size(self.n_tokens * self.bytes_per_token)} in {self.n_shards} shards per "
            f"hook, about {_duration(self.n_tokens / self.tokens_per_second)} ({pace})"
        )


def estimate(
    bridge: Any,
    tokens: Tensor | Iterable[Any],
    hooks: str | Sequence[str] | Callable[[str], bool],
    *,
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
    shard_tokens: int = 65536,
    labels: Mapping[str, Any] | None = None,
    positions: Sequence[int] | None = None,
    skip_tokens: Sequence[int] = (),
) -> Estimate:
    """Bytes and time of `harvest` with the same arguments, for one process; nothing is written. Costs two batches.

    Raises:
        ValueError: As `harvest` would, and for an iterator that can be read only once: the estimate would use it up.
    """
    require_eval(bridge)
    if isinstance(tokens, Iterator):
        raise ValueError(
            "tokens is an iterator, which an estimate would begin to use up; pass an object that can be iterated "
            "anew, or one batch"
        )
    stream = make_stream(
        bridge, tokens, labels=labels, batch_size=batch_size, positions=positions, skip_tokens=skip_tokens
    )
    names, shapes, dtype = check_hooks(bridge, hooks, dtype)
    batch = next((batch for batch in stream.batches() if batch.n_rows), None)
    if batch is None:
        raise ValueError("positions= and skip_tokens= leave no row of these tokens")
    shard = Shard(
        0, 0, None, {name: torch.empty((batch.n_rows, *shape), dtype=dtype) for name, shape in shapes.items()}
    )
    seconds = 0.0
    for _ in range(2):  # the first run pays for what is set up once
        started = time.perf_counter()
        fill(
            bridge, batch, names, [Piece(shard, 0, batch.n_rows, 0)], dtype
        )  # ends with a copy, so a GPU is waited for
        seconds = time.perf_counter() - started
    per_token = sum(rows[0].numel() * rows.element_size() for rows in shard.activations.values())
    per_token += sum(column.element_size() for column in batch.columns.values())
    total = stream.n_rows
    return Estimate(total, None if total is None else -(-total // shard_tokens), per_token, batch.n_rows / seconds)


def _size(n: int | float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
