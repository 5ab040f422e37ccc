"""Factors on disk: one safetensors file, with everything that is not a tensor as JSON in its header."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FORMAT, _VERSION = "interp-factors", 1


def write_factors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], kind: str, facts: dict[str, Any]
) -> Path:
    """Write under a temporary name, sync, rename: a process killed at any moment leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": _FORMAT, "version": str(_VERSION), "kind": kind, "facts": json.dumps(facts)}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=header)
        with Path(temporary).open("rb+") as file:
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def read_factors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a file that `write_factors` wrote for this kind."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no factors at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error
    found = (header.get("format"), header.get("kind"), header.get("version"))
    if found != (_FORMAT, kind, str(_VERSION)):
        raise ValueError(f"{path} does not hold the factors of {kind} version {_VERSION}: its header says {found}")
    return tensors, json.loads(header["facts"])
