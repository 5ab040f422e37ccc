"""Reading a store of activations: memory-mapped columns, shuffled batches, verification. No model is needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from interp.cache._manifest import (
    MANIFEST,
    ROW_COLUMNS,
    SHARDS,
    StoreError,
    file_sha256,
    is_intact,
    read_manifest,
    read_records,
    shard_files,
)

_OPEN_FILES = 64


@dataclass(frozen=True)
class VerifyReport:
    """What `ActivationStore.verify` found: `problems` is one line per damaged file, empty if all is well."""

    n_files: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        head = f"{self.n_files} files checked, {len(self.problems) or 'no'} problem{'s'[: len(self.problems) != 1]}"
        return "\n  ".join([head, *self.problems])


class ActivationStore:
    """Activations that `interp.cache.harvest` wrote, one row per token.

    Attributes:
        hooks: Names of the stored hooks, in forward order; `store[hook]` is a `Column` of shape [row, ...].
        n_tokens: Number of rows.
        tokens, examples, positions: `Column`s of integers [row]: token id, number of the example in the harvested
            stream, position in the example.
        labels: Name to `Column` [row]; `label_names[name]` lists what the codes stand for, where labels were given
            as text.
        provenance: Model, revision, weights state, dtype, device and versions of the harvest.

    Args:
        path: Directory given to `harvest`.
        partial: Open an unfinished store as well, with the rows up to the first shard that is missing.

    Raises:
        FileNotFoundError: If there is no store at `path`.
        StoreError: If the harvest was not finished and `partial` is False.
    """

    def __init__(self, path: str | Path, *, partial: bool = False) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        records = read_records(self.path, manifest)
        usable = [
            records[index] for index in sorted(records) if manifest["complete"] or is_intact(self.path, records[index])
        ]
        self._shards: list[dict[str, Any]] = []
        size = manifest["settings"]["shard_tokens"]
        for record in usable:
            if record["start"] == len(self._shards) * size:
                self._shards.append(record)
        self.n_tokens: int = self._shards[-1]["stop"] if self._shards else 0
        if not manifest["complete"] and not partial:
            expected = manifest["n_tokens"]
            raise StoreError(
                f"the harvest in {self.path} is not finished: "
                f"{self.n_tokens}{f' of {expected}' if expected else ''} rows are there. Call interp.cache.harvest "
                f"again with the same arguments, or open what there is with partial=True"
            )
        settings = manifest["settings"]
        self.manifest = manifest
        self.complete: bool = manifest["complete"]
        self.provenance: dict[str, Any] = manifest["provenance"]
        self.dtype: torch.dtype = getattr(torch, settings["dtype"])
        self.label_names: dict[str, tuple[str, ...]] = {k: tuple(v) for k, v in settings["label_names"].items()}
        self.shard_tokens: int = size
        self._open: OrderedDict[tuple[int, str, str], Tensor] = OrderedDict()
        self._hooks = {
            entry["name"]: Column(self, entry["name"], "activations", tuple(entry["shape"]), self.dtype)
            for entry in settings["hooks"]
        }
        self.hooks: list[str] = list(self._hooks)
        self.tokens, self.examples, self.positions = (
            Column(self, "tokens", name, (), torch.int64) for name in ROW_COLUMNS
        )
        kinds = self._shards[0]["labels"] if self._shards else {}
        self.labels: dict[str, Column] = {
            name: Column(self, "tokens", name, (), getattr(torch, kind)) for name, kind in kinds.items()
        }

    def __len__(self) -> int:
        return self.n_tokens

    def __getitem__(self, hook: str) -> Column:
        if hook not in self._hooks:
            raise KeyError(f"no activations of {hook!r} in {self.path}; it holds {', '.join(self.hooks)}")
        return self._hooks[hook]

    def __repr__(self) -> str:
        model = f"{self.provenance['model']}, {self.provenance['revision']}"
        state = "" if self.complete else ", unfinished"
        return f"ActivationStore({self.n_tokens:,} tokens of {', '.join(self.hooks)}; {model}{state})"

    def batches(
        self,
        batch_size: int,
        *,
        hooks: str | Sequence[str] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = 1,
        start: int = 0,
        mix_shards: int | None = 16,
        drop_last: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """Batches of aligned rows: each a dict of every hook [batch, ...], "tokens", "example", "position", "row"
        and labels [batch].

        The order depends on `seed`, the epoch and the arguments alone, so `start=k` goes on exactly where a training
        run that had consumed k batches (of all epochs together) stopped, without reading what came before.

        Shuffling is local, so that stores larger than memory are read in order of magnitude of shards and not of
            rows: each
        epoch deals the shards at random into groups of `mix_shards`, and a row is mixed with the rows of its group
        only. A store of up to `mix_shards` shards, or `mix_shards=None`, is a uniform permutation of all rows.

        Args:
            hooks: The hooks to read; all by default.
            epochs: Passes over the store; None goes on for ever.
            drop_last: Leave out the smaller batch at the end of each epoch.
        """
        chosen = [hooks] if isinstance(hooks, str) else list(self.hooks if hooks is None else hooks)
        columns = {hook: self[hook] for hook in chosen}
        columns |= {"tokens": self.tokens, "example": self.examples, "position": self.positions, **self.labels}
        if batch_size < 1 or start < 0 or (mix_shards is not None and mix_shards < 1):
            raise ValueError(
                f"batch_size={batch_size}, start={start}, mix_shards={mix_shards}; expected positive sizes and "
                f"start >= 0"
            )
        per_epoch = self.n_tokens // batch_size if drop_last else -(-self.n_tokens // batch_size)
        if per_epoch == 0:
            raise ValueError(f"{self.n_tokens} rows give no batch of {batch_size}; choose a smaller batch_size")
        return self._batches(columns, batch_size, shuffle, seed, epochs, start, mix_shards, per_epoch)

    def _batches(
        self,
        columns: dict[str, Column],
        batch_size: int,
        shuffle: bool,
        seed: int,
        epochs: int | None,
        start: int,
        mix_shards: int | None,
        per_epoch: int,
    ) -> Iterator[dict[str, Tensor]]:
        epoch, number = divmod(start, per_epoch)
        while epochs is None or epoch < epochs:
            for rows in self._order(batch_size, seed if shuffle else None, epoch, mix_shards, number, per_epoch):
                yield {"row": rows, **{name: column[rows] for name, column in columns.items()}}
            epoch, number = epoch + 1, 0

    def _order(
        self, batch_size: int, seed: int | None, epoch: int, mix_shards: int | None, first: int, stop: int
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Row numbers of batches `first` to `stop` of an epoch; groups of shards before them are passed over by
        their sizes."""
        n_shards = len(self._shards)
        shards = np.arange(n_shards) if seed is None else np.random.default_rng([seed, epoch]).permutation(n_shards)
        width = 1 if seed is None else mix_shards or n_shards
        left, skip = np.empty(0, dtype=np.int64), first * batch_size
        for group in range(-(-n_shards // width)):
            members = [self._shards[index] for index in shards[group * width : (group + 1) * width]]
            size = sum(record["stop"] - record["start"] for record in members)
            if skip >= size:
                skip -= size
                continue
            rows = np.concatenate([np.arange(record["start"], record["stop"]) for record in members])
            if seed is not None:
                rows = np.random.default_rng([seed, epoch, group]).permutation(rows)
            left, skip = np.concatenate([left, rows[skip:]]), 0
            while len(left) >= batch_size and first < stop:
                yield torch.from_numpy(left[:batch_size].copy())
                left, first = left[batch_size:], first + 1
        if first < stop:
            yield torch.from_numpy(left)

    def verify(self) -> VerifyReport:
        """Read every file and compare it with the manifest; finds missing, truncated and altered files and names them.

        To repair a store, delete the files named and call `interp.cache.harvest` with the arguments it was made with.
        """
        problems = [] if self.complete else [f"{MANIFEST}: the harvest is not finished; {self.n_tokens} rows are there"]
        files = [entry for record in self._shards for entry in shard_files(record).values()]
        for entry in files:
            file, name = self.path / SHARDS / entry["name"], entry["name"]
            if not file.is_file():
                problems.append(f"{name}: missing")
            elif (size := file.stat().st_size) < entry["bytes"]:
                problems.append(f"{name}: truncated, {size} of {entry['bytes']} bytes")
            elif size > entry["bytes"]:
                problems.append(f"{name}: altered, {size} bytes where {entry['bytes']} were written")
            elif file_sha256(file) != entry["sha256"]:
                problems.append(f"{name}: altered, its SHA-256 is not the one in the manifest")
        end = 0
        for record in self._shards:
            if record["start"] != end:
                problems.append(f"{MANIFEST}: rows {end} to {record['start']} are in no shard")
            end = record["stop"]
        if self.complete and end != self.manifest["n_tokens"]:
            problems.append(f"{MANIFEST}: lists {end} of {self.manifest['n_tokens']} rows")
        return VerifyReport(len(files), tuple(problems))

    def _mapped(self, shard: int, column: str, name: str) -> Tensor:
        """A column of a shard as a tensor over the mapped file: nothing is read before it is indexed."""
        key = (shard, column, name)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        record = self._shards[shard]
        entry = shard_files(record)[column]
        file = self.path / SHARDS / entry["name"]
        size = file.stat().st_size if file.is_file() else -1
        try:
            if size != entry["bytes"]:
                raise StoreError("it is missing" if size < 0 else f"it has {size} bytes, {entry['bytes']} were written")
            with safe_open(file, "pt") as handle:
                tensor = handle.get_tensor(name)
        except (SafetensorError, StoreError) as error:
            raise StoreError(
                f"rows {record['start']} to {record['stop']} cannot be read: {file} is damaged ({error}). Delete it "
                f"and call interp.cache.harvest again with the same arguments to rebuild it; verify() lists all "
                f"damaged files"
            ) from error
        self._open[key] = tensor
        while len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return tensor


@dataclass(frozen=True, eq=False)
class Column:
    """One stored quantity, [row, ...]. Indexing reads the rows asked for and returns a tensor of its own.

    `column[5]`, `column[10:20]`, `column[[3, 1, 2]]`, `column[row_tensor]`, `column[bool_mask]`.
    """

    store: ActivationStore
    file: str
    name: str
    row_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.store.n_tokens, *self.row_shape)

    def __len__(self) -> int:
        return self.store.n_tokens

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        return f"Column({self.name if self.file == 'tokens' else self.file}, {self.shape}, {self.dtype})"

    def __getitem__(self, index: Any) -> Tensor:
        n = len(self)
        if isinstance(index, slice):
            return self._take(torch.from_numpy(np.arange(*index.indices(n))))
        given = torch.as_tensor(index)
        if given.dtype == torch.bool:
            if given.shape != (n,):
                raise IndexError(f"a mask of shape {tuple(given.shape)} does not fit {n} rows")
            return self._take(given.nonzero()[:, 0])
        if given.is_floating_point() and given.numel():
            raise IndexError(f"rows are numbered by integers, not {given.dtype}")
        rows = given.long().reshape(-1)
        wrong = (rows < -n) | (rows >= n)
        if bool(wrong.any()):
            raise IndexError(f"row {int(rows[wrong][0])} does not exist: the store has {n} rows")
        return self._take(rows % n if n else rows).reshape((*given.shape, *self.row_shape))

    def _take(self, rows: Tensor) -> Tensor:
        """Copies of these rows, shard by shard."""
        out = torch.empty((len(rows), *self.row_shape), dtype=self.dtype)
        shards = rows // self.store.shard_tokens
        for shard in torch.unique(shards).tolist():
            where = (shards == shard).nonzero()[:, 0]
            local = rows[where] - shard * self.store.shard_tokens
            mapped = self.store._mapped(shard, self.file, self.name)
            out[_span(where)] = mapped[_span(local)]
        return out


def _span(rows: Tensor) -> Tensor | slice:
    """Rows as a slice where they follow each other, which is read and written several times as fast as an index."""
    follow = len(rows) < 2 or bool((rows.diff() == 1).all())
    return slice(int(rows[0]), int(rows[-1]) + 1) if follow else rows
