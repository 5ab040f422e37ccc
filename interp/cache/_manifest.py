"""Files of an activation store: deterministic safetensors shards, their commit records, and the manifest.

    PATH/manifest.json              what was harvested; once complete, every file with its size and SHA-256
    PATH/partial/000000000003.json  commit record of shard 3, until then
    PATH/shards/tokens.000000000000-000000065536.safetensors
                                    token ids, example, position and labels of rows 0 to 65536
    PATH/shards/blocks.3.hook_resid_post.float32.0f3c9a1b2c3d.000000000000-000000065536.safetensors
                                    activations of a hook, as this type, of this revision of the model

Every file is written under a temporary name, synced and renamed. A shard counts once its commit record is there,
which is written last, so a process killed at any moment leaves whole shards and at most one that will be written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, dtype, uint8

FORMAT, VERSION = "interp-activations", 1
MANIFEST, PARTIAL, SHARDS = "manifest.json", "partial", "shards"
ROW_COLUMNS = ("tokens", "example", "position")
"""Integer columns that every store has beside the activations and labels."""

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
           "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip


class StoreError(RuntimeError):
    """A store on disk that cannot be used as asked: incomplete, damaged, or made from something else."""


def dtype_name(kind: dtype) -> str:
    return str(kind).removeprefix("torch.")


def shard_name(kind: str, start: int, stop: int) -> str:
    """File name by content: `kind` is "tokens", or hook, dtype and model revision; the rest is the range of rows."""
    return f"{kind}.{start:012d}-{stop:012d}.safetensors"


def hook_kind(hook: str, dtype: str, revision: str) -> str:
    revision = revision.split(":")[-1][:12]  # "sha256:0f3c..." or a commit
    return ".".join(re.sub(r"[^A-Za-z0-9_.-]", "_", part) for part in (hook, dtype, revision))


def serialise(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """A safetensors file as parts to be written in order: the tensors' own memory, not copied.

    `safetensors.torch.save` would copy each shard twice in memory. Widest types come first, so that all are aligned.
    """
    header, parts, offset = {}, [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        flat = tensor.detach().contiguous().view(-1)
        end = offset + flat.numel() * flat.element_size()
        header[name] = {
            "dtype": DTYPES[dtype_name(flat.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        parts.append(flat.view(uint8).numpy().data)
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *parts]


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """The one place that writes to disk."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file so that it is there whole or not at all. Returns its name, bytes and SHA-256."""
    parts = list(parts)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write_parts(temporary, parts)
        os.replace(temporary, path)  # noqa: PTH105 (Path.replace is the same; this is the word for it)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return {"name": path.name, "bytes": sum(len(part) for part in parts), "sha256": digest.hexdigest()}


def _sync_directory(path: Path) -> None:
    """Make renames in it survive a power cut, where the system lets directories be synced."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, [(json.dumps(value, indent=1, sort_keys=True) + "\n").encode()])


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        FileNotFoundError: If there is none.
        StoreError: If it is not one that this version can read.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is not an activation store: it has no {MANIFEST}. Make one with interp.cache.harvest"
        )
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise StoreError(f"{file} is not readable JSON ({error}); restore it, or harvest into another path") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{file} is not the manifest of an activation store")
    if manifest["version"] != VERSION:
        raise StoreError(f"{file} has version {manifest['version']}; this interp reads version {VERSION}")
    return manifest


def read_records(path: Path, manifest: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Committed shards by index: those in the manifest and those finished since."""
    size = manifest["settings"]["shard_tokens"]
    records = list(manifest["shards"])
    for file in sorted((path / PARTIAL).glob("*.json")):
        records.append(json.loads(file.read_text()))
    return {record["start"] // size: record for record in records}


def shard_files(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Files of a shard by column: "tokens" (the row columns and labels) and each hook."""
    return {"tokens": record["tokens"], **record["hooks"]}


def is_intact(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether all files of a shard are there with the right sizes; `ActivationStore.verify` checks their contents."""
    for entry in shard_files(record).values():
        file = path / SHARDS / entry["name"]
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            return False
    return True


def file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
