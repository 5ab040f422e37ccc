"""Files of other libraries, made for a test: those that SAELens read (see data/foreign), and others."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

DATA = Path(__file__).parent / "data" / "foreign"
CASES: dict[str, Any] = json.loads((DATA / "files.json").read_text(encoding="utf-8"))["cases"]
D_IN, N_LATENTS = 8, 20


@functools.cache
def arrays(case: str) -> dict[str, Tensor]:
    """Of every file `file/name`, and `expected/inputs` and what SAELens 6.54.12 made of them."""
    with safe_open(DATA / "arrays.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{case}/")]  # noqa: SIM118 (not a mapping)
        return {name.removeprefix(f"{case}/"): file.get_tensor(name) for name in names}


def contents(case: str) -> dict[str, Any]:
    """Settings, text or arrays of a case, by file."""
    found = {}
    for file, entry in CASES[case]["files"].items():
        found[file] = {name: arrays(case)[f"{file}/{name}"] for name in entry.get("arrays", [])} or copy.deepcopy(
            entry["content"]
        )
    return found


def place(case: str, root: Path) -> Path:
    """The files of a case, and what of them is to be loaded."""
    write(root, contents(case))
    return root / CASES[case]["loads"]


def write(root: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".json", ".yaml"):
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        elif path.suffix == ".npz":
            np.savez(path, **{key: np.asarray(value) for key, value in content.items()})
        elif path.suffix == ".safetensors":
            save_file({key: value.clone().contiguous() for key, value in content.items()}, path)
        else:
            torch.save(content, path)


def draws(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name.replace("__", "."): 0.5 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
