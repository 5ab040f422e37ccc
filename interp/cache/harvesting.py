"""Activations to disk: any number of tokens, several hooks in one pass, resumable, the same bytes however it was
run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.cache._assembly import Piece, Shard, Writer, compare, fill
from interp.cache._manifest import (
    FORMAT,
    MANIFEST,
    PARTIAL,
    SHARDS,
    VERSION,
    StoreError,
    dtype_name,
    hook_kind,
    is_intact,
    read_manifest,
    read_records,
    write_json,
)
from interp.cache._reading import layouts
from interp.cache._rows import Stream, make_stream
from interp.cache.store import ActivationStore
from interp.hooks import resolve_many
from interp.hooks.names import device_of
from interp.models import provenance, require_eval

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def harvest(
    bridge: Any,
    tokens: Tensor | Iterable[Any],
    hooks: str | Sequence[str] | Callable[[str], bool],
    path: str | Path,
    *,
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
    shard_tokens: int = 65536,
    resume: bool = True,
    labels: Mapping[str, Any] | None = None,
    positions: Sequence[int] | None = None,
    skip_tokens: Sequence[int] = (),
    progress: bool = False,
) -> ActivationStore:
    """Write the activations of some hooks, one row per token, to a store on disk, and open it.

    Call it again with the same arguments after any interruption (a kill, a full disk, a lost machine): finished
    shards are kept and not computed again, and the store ends byte for byte as if nothing had happened. On a
    finished store it only compares tokens, and rebuilds shards whose files are missing or of the wrong size: to
    repair what `ActivationStore.verify` reports, delete the files it names and call this again. Under `torchrun` the
    processes share the shards (a shared file system is needed between machines, and the model on
    `accelerate.PartialState().device`); any number of them gives the same store, provided that each uses as many
    threads (torchrun sets one) and the same kind of device.

    Costs one forward per batch without the layers above the last hook. A batch that crosses from one shard to the
    next is run again by a process that has to make only the second, always with the same examples in it, since
    values change in the last bit with the size of a batch. Memory: two shards of all hooks, for a moment three,
    whatever the number of tokens.

    Args:
        tokens: Ids [example, pos], or an iterable of such tensors or of (tensor, labels) pairs, for streams of any
            length. A stream is read once, from its start; to resume, or in several processes, give it again from the
            start: rows of finished shards are compared with it, and not run. Each item is cut into batches on its own.
        hooks: A name, a glob, a list of either or a predicate; see `interp.hooks.resolve_many`. They must have one
            row per token (not attention patterns).
        dtype: Stored type: float32, bfloat16 or float16; the model's own by default.
        shard_tokens: Rows per file.
        resume: False refuses a path that holds a store.
        labels: For tokens in one tensor: name to numbers or text, [example, pos] or one per example. Kept aligned
            with rows.
        positions: Keep these positions only, the same in every example; negative ones count from the end.
        skip_tokens: Keep no rows of these token ids (BOS, padding). Padded rows are otherwise stored like any other;
            padding on the left moves the positions of what follows, as in any plain forward.
        progress: Show a bar with the time left.

    Raises:
        FloatingPointError: At a NaN or an infinity, or a value outside the range of `dtype`; names hook, example and
            token. Earlier shards are kept.
        OSError: If a shard cannot be written, e.g. because the disk is full. Finished shards are kept.
        StoreError: If the path holds a store of something else; names what differs.
        ValueError: If tokens, labels or hooks do not fit, before any forward.

    Example:
        >>> store = harvest(bridge, tokens, "blocks.1.hook_resid_post", "acts", dtype=torch.bfloat16)   # doctest: +SKIP
        >>> store["blocks.1.hook_resid_post"][:3].shape                                                # doctest: +SKIP
        torch.Size([3, 128])
    """
    path = Path(path)
    require_eval(bridge)
    stream = make_stream(
        bridge, tokens, labels=labels, batch_size=batch_size, positions=positions, skip_tokens=skip_tokens
    )
    names, shapes, dtype = check_hooks(bridge, hooks, dtype)
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens}; expected at least 1")
    origin = provenance(bridge)
    settings = {
        "revision": origin["revision"], "weights_state": origin["weights_state"], "model_dtype": origin["dtype"],
        "device": origin["device"],
        "versions": {name: origin["versions"][name] for name in ("torch", "transformers", "transformer-lens")},
        "hooks": [{"name": name, "shape": list(shapes[name])} for name in names],
        "dtype": dtype_name(dtype), "shard_tokens": shard_tokens, "batch_size": batch_size,
        "positions": list(stream.positions) if stream.positions is not None else None,
        "skip_tokens": list(stream.skip_tokens), "label_names": stream.label_names,
    }  # fmt: skip
    n_rows = stream.n_rows
    if n_rows == 0:
        raise ValueError("positions= and skip_tokens= leave no row of these tokens")
    process = _process(bridge)
    if process.rank == 0:
        _prepare(path, settings, origin, n_rows, resume)
    process.wait()
    manifest = read_manifest(path)
    if process.rank != 0:
        _check_same(path, manifest, settings, n_rows)
    bar = tqdm(
        total=n_rows, unit="token", unit_scale=True, desc="harvest",
        disable=not progress or process.rank != 0 or os.environ.get("INTERP_PROGRESS") == "0",
    )  # fmt: skip
    kinds = {name: hook_kind(name, settings["dtype"], settings["revision"]) for name in names}
    with bar, Writer(path, kinds) as writer:
        total = _run(bridge, stream, shapes, dtype, path, manifest, process, writer, bar)
    process.wait()
    if process.rank == 0:
        _finish(path, manifest, total)
    process.wait()
    return ActivationStore(path)


def check_hooks(
    bridge: Any, hooks: Any, dtype: torch.dtype | None
) -> tuple[list[str], dict[str, tuple[int, ...]], torch.dtype]:
    """Hook names, their shapes at one token, and the stored type; raises where a hook has no row per token."""
    names = resolve_many(bridge, hooks)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layout in layouts(bridge, names).items():
        row = layout.row_shape
        if row is None or not layout.floating:
            why = f"is [batch, {', '.join('pos' if size is None else str(size) for size in layout.sizes)}]"
            why = why if layout.floating else "holds integers (token ids are stored anyway)"
            raise ValueError(f"{name!r} {why}: it has no row of numbers per token; use interp.cache.capture for it")
        shapes[name] = row
    dtype = dtype or next(iter(bridge.original_model.parameters())).dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}; expected one of {', '.join(map(str, DTYPES))}")
    return names, shapes, dtype


class _Process(NamedTuple):
    rank: int
    world: int
    wait: Callable[[], None]


def _run(
    bridge: Any,
    stream: Stream,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    path: Path,
    manifest: dict[str, Any],
    process: _Process,
    writer: Writer,
    bar: Any,
) -> int:
    """Go through the stream once, running the batches that this process's missing shards need. Returns the number of
    rows."""
    size = manifest["settings"]["shard_tokens"]
    done = {index: record for index, record in read_records(path, manifest).items() if is_intact(path, record)}
    current: Shard | None = None
    row = 0

    def allocate() -> dict[str, Tensor]:
        room = size if stream.n_rows is None else min(size, stream.n_rows)
        return {name: torch.empty((room, *shape), dtype=dtype) for name, shape in shapes.items()}

    def shard_at(index: int) -> Shard:
        nonlocal current
        if current is None or current.index != index:
            current = Shard(index, index * size, done.get(index))
            if current.record is None:
                current.activations = writer.spare.pop() if writer.spare else allocate()
        return current

    def close(shard: Shard) -> None:
        if shard.record is None:
            writer.submit(shard)
        else:
            compare(path, shard)

    for batch in stream.batches():
        writer.poll()
        pieces = []
        for index in range(row // size, -(-(row + batch.n_rows) // size)):
            if index % process.world != process.rank:
                continue
            low, high = max(0, index * size - row), min(batch.n_rows, (index + 1) * size - row)
            pieces.append((index, low, high))
        row += batch.n_rows
        bar.update(batch.n_rows)
        shards = []
        for index, low, high in pieces:
            shard = shard_at(index)
            shards.append(Piece(shard, low, high, shard.n_rows))
            shard.columns.append({name: column[low:high] for name, column in batch.columns.items()})
            shard.n_rows += high - low
        if missing := [piece for piece in shards if piece.shard.record is None]:
            fill(bridge, batch, list(shapes), missing, dtype)
        for piece in shards:
            if piece.shard.n_rows == size:
                close(piece.shard)
    if current is not None and current.n_rows < size:
        close(current)
    beyond = [record for index, record in done.items() if index * size >= row]
    if beyond or not row:
        raise StoreError(
            f"the tokens given now have {row} rows; the store {path} has rows up to "
            f"{max((r['stop'] for r in beyond), default=0)}. Pass the same tokens from the start, or another path"
        )
    return row


def _process(bridge: Any) -> _Process:
    """This process among those that torchrun started; alone where it did not."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return _Process(0, 1, lambda: None)
    from accelerate import PartialState  # not needed, and slow to import, in a single process

    state = PartialState(cpu=device_of(bridge).type == "cpu")
    return _Process(state.process_index, state.num_processes, state.wait_for_everyone)


def _prepare(path: Path, settings: dict[str, Any], origin: dict[str, Any], n_rows: int | None, resume: bool) -> None:
    """Make a new store, or check that the one that is there is of the same harvest."""
    if (path / MANIFEST).exists():
        if not resume:
            raise FileExistsError(f"{path} holds a store already; choose another path, delete it, or pass resume=True")
        _check_same(path, read_manifest(path), settings, n_rows)
    elif path.exists() and any(entry.suffix != ".tmp" for entry in path.iterdir()):
        raise FileExistsError(f"{path} is not empty and not an activation store; choose another path")
    path.mkdir(parents=True, exist_ok=True)
    for folder in (path, path / SHARDS, path / PARTIAL):  # what a killed run was writing
        for file in folder.glob("*.tmp"):
            file.unlink()
    if not (path / MANIFEST).exists():
        manifest = {"format": FORMAT, "version": VERSION, "complete": False, "n_tokens": n_rows, "settings": settings}
        write_json(path / MANIFEST, {**manifest, "provenance": origin, "shards": []})
    (path / SHARDS).mkdir(exist_ok=True)  # after the manifest, which marks the path as a store
    (path / PARTIAL).mkdir(exist_ok=True)


def _check_same(path: Path, manifest: dict[str, Any], settings: dict[str, Any], n_rows: int | None) -> None:
    stored = {**manifest["settings"], "rows": manifest["n_tokens"]}
    given = {**settings, "rows": n_rows if None not in (n_rows, manifest["n_tokens"]) else manifest["n_tokens"]}
    differing = [
        f"{key}: {stored.get(key)!r} there, {given[key]!r} now" for key in given if stored.get(key) != given[key]
    ]
    if differing:
        raise StoreError(
            f"{path} holds another harvest, so it cannot be resumed with these arguments. Different are "
            f"{'; '.join(differing)}. Pass what it was made with, or another path"
        )


def _finish(path: Path, manifest: dict[str, Any], total: int) -> None:
    """Fold the commit records into the manifest. A kill in here leaves a store that the next call finishes."""
    size = manifest["settings"]["shard_tokens"]
    records = read_records(path, manifest)
    missing = [index for index in range(-(-total // size)) if index not in records]
    if missing or records[max(records)]["stop"] != total:
        raise StoreError(
            f"after {total} rows the store {path} lacks shards {missing}: were all processes given the same tokens?"
        )
    shards = [records[index] for index in sorted(records)]
    write_json(path / MANIFEST, {**manifest, "complete": True, "n_tokens": total, "shards": shards})
    for file in (path / PARTIAL).glob("*"):
        file.unlink()
    (path / PARTIAL).rmdir()
