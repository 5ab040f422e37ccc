"""Filling shards from batches: rows are cast, checked and copied inside the forward, then written in the background."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from interp.cache._manifest import (
    PARTIAL,
    ROW_COLUMNS,
    SHARDS,
    StoreError,
    dtype_name,
    serialise,
    shard_name,
    write_atomic,
    write_json,
)
from interp.cache._reading import forward
from interp.cache._rows import Batch


@dataclass(eq=False)
class Shard:
    """Consecutive rows on their way to disk. One that is there already only collects its columns, to be compared."""

    index: int
    start: int
    record: dict[str, Any] | None
    activations: dict[str, Tensor] = field(default_factory=dict)  # [capacity, ...] each; empty where `record` is known
    columns: list[dict[str, Tensor]] = field(default_factory=list)
    n_rows: int = 0

    @property
    def stop(self) -> int:
        return self.start + self.n_rows

    def joined(self) -> dict[str, Tensor]:
        return {name: torch.cat([part[name] for part in self.columns]) for name in self.columns[0]}


@dataclass(frozen=True)
class Piece:
    """Rows `low` to `high` of a batch belong to this shard from row `at` on."""

    shard: Shard
    low: int
    high: int
    at: int


def fill(bridge: Any, batch: Batch, hooks: Sequence[str], pieces: Sequence[Piece], dtype: torch.dtype) -> None:
    """One forward whose activations go into the shards.

    Raises:
        FloatingPointError: If a value is not finite, or not in the range of `dtype`; names the hook and the token.
    """

    def reader(name: str) -> Callable[[Tensor], None]:
        def read(activation: Tensor) -> None:
            rows = batch.rows(activation)
            cast = rows.to(dtype)
            low, high = torch.aminmax(cast)  # one pass; not-a-numbers come through
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise FloatingPointError(_describe(bridge, name, batch, rows, cast))
            for piece in pieces:
                target = piece.shard.activations[name]
                target[piece.at : piece.at + piece.high - piece.low].copy_(cast[piece.low : piece.high])

        return read

    forward(bridge, batch.tokens, {name: reader(name) for name in hooks})


def _describe(bridge: Any, name: str, batch: Batch, rows: Tensor, cast: Tensor) -> str:
    bad = ~torch.isfinite(cast.flatten(1))
    row = int(bad.any(1).nonzero()[0])
    value = float(rows.flatten(1)[row][bad[row]][0])
    example, position, token = (int(batch.columns[column][row]) for column in ("example", "position", "tokens"))
    text = f" {bridge.tokenizer.decode([token])!r}" if getattr(bridge, "tokenizer", None) is not None else ""
    where = f"{name!r} at example {example}, position {position}, token {token}{text}"
    if torch.isfinite(torch.tensor(value)):
        limit = torch.finfo(cast.dtype).max
        return (
            f"{where} has the value {value:.6g}, beyond the range of {dtype_name(cast.dtype)} ({limit:.6g}); "
            f"harvest with dtype=torch.bfloat16 or torch.float32 into another path. No row of this shard was "
            f"written; earlier shards are kept"
        )
    return (
        f"{where} is {value}: the model itself computes it (in {dtype_name(rows.dtype)}). No row of this shard was "
        f"written; earlier shards are kept. Leave the example out, or load the model in a wider dtype"
    )


class Writer:
    """Writes one finished shard in the background while the next is filled, so at most two are in memory.

    Leaving the context waits for the write in progress: an error in the forward keeps every shard that was finished.
    """

    def __init__(self, path: Path, kinds: dict[str, str]) -> None:
        self.path, self.kinds = path, kinds
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="interp-harvest")
        self._pending: Future[None] | None = None
        self.written = 0
        self.spare: list[
            dict[str, Tensor]
        ] = []  # of shards on disk, to be filled again: memory would fragment otherwise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(wait=True)

    def submit(self, shard: Shard) -> None:
        self.wait()
        self._pending = self._pool.submit(self._write, shard)

    def poll(self) -> None:
        """Raise now if the write in the background has failed."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror or error}; could not write {error.filename or 'a shard'}. Finished shards are "
                f"kept in {self.path} ({self.written} written by this process now) and stay usable: make room and "
                f"call harvest again with the same arguments, it goes on from there. interp.cache.estimate says how "
                f"much room is needed",
            ) from error

    def _write(self, shard: Shard) -> None:
        columns = shard.joined()
        record: dict[str, Any] = {
            "start": shard.start,
            "stop": shard.stop,
            "labels": {name: dtype_name(column.dtype) for name, column in columns.items() if name not in ROW_COLUMNS},
            "tokens": self._write_file("tokens", shard, columns),
            "hooks": {
                name: self._write_file(self.kinds[name], shard, {"activations": rows[: shard.n_rows]})
                for name, rows in shard.activations.items()
            },
        }
        write_json(self.path / PARTIAL / f"{shard.index:012d}.json", record)  # the shard counts from here on
        self.written += 1
        self.spare.append(shard.activations)

    def _write_file(self, kind: str, shard: Shard, tensors: dict[str, Tensor]) -> dict[str, Any]:
        return write_atomic(self.path / SHARDS / shard_name(kind, shard.start, shard.stop), serialise(tensors))


def compare(path: Path, shard: Shard) -> None:
    """Check that the rows of a finished shard are those of the stream given now.

    Raises:
        StoreError: Naming the first column and row that differ.
    """
    assert shard.record is not None
    stop = shard.record["stop"]
    if stop != shard.stop:
        raise StoreError(
            f"the tokens given now end a shard at row {shard.stop}, the store {path} has it end at row {stop}: they "
            f"are not the tokens it was made from. Pass the same tokens from the start, or another path"
        )
    file = path / SHARDS / shard.record["tokens"]["name"]
    stored, given = safetensors.torch.load_file(file), shard.joined()
    if stored.keys() != given.keys():
        raise StoreError(
            f"the store {path} has the columns {sorted(stored)}, the tokens given now bring {sorted(given)}"
        )
    for name in _in_order(given):
        a, b = stored[name], given[name]
        differs = (a != b) & ~((a != a) & (b != b))  # a label may be not-a-number
        if stored[name].dtype != given[name].dtype or bool(differs.any()):
            row = int(differs.nonzero()[0]) if bool(differs.any()) else 0
            raise StoreError(
                f"{name!r} differs from the store {path}: row {shard.start + row} (example "
                f"{int(given['example'][row])}, position {int(given['position'][row])}) has "
                f"{stored[name][row].item()} ({dtype_name(stored[name].dtype)}) there and {given[name][row].item()} "
                f"({dtype_name(given[name].dtype)}) now. Pass the same tokens and labels from the start, or another "
                f"path"
            )


def _in_order(names: Mapping[str, Tensor]) -> list[str]:
    fixed = [name for name in ROW_COLUMNS if name in names]
    return fixed + sorted(set(names) - set(fixed))
