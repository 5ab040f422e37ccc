"""The models that come with the package: ordinary Hugging Face directories, found by name. Imports no torch."""

from __future__ import annotations

import difflib
import json
import math
import struct
from pathlib import Path

import pandas as pd


def data_dir() -> Path:
    """The directory that holds `models/`: inside an installed package, or `data/` of the checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "_data", package.parent / "data"):
        if (candidate / "models").is_dir():
            return candidate
    raise FileNotFoundError(
        f"the embedded models are neither in {package / '_data'} nor in {package.parent / 'data'}; "
        f"reinstall the package, or train them with experiments/train_tinyworld.py"
    )


def list_models() -> pd.DataFrame:
    """One row per embedded model: name, architecture, sizes, and the training checkpoints that were kept.

    A checkpoint is loaded as `load_model("name@step-01000")`.
    """
    columns = [
        "name", "architecture", "layers", "d_model", "heads", "kv_heads", "vocabulary", "context", "parameters",
        "megabytes", "checkpoints",
    ]  # fmt: skip
    return pd.DataFrame([_describe(directory) for directory in _directories()], columns=columns)


def embedded_directory(name: str) -> Path | None:
    """The directory of `"name"` or `"name@checkpoint"`, None if no embedded model is called so.

    Raises:
        FileNotFoundError: If the model exists but not that checkpoint; lists those there are.
    """
    model, _, checkpoint = name.partition("@")
    found = next((directory for directory in _directories() if directory.name == model), None)
    if found is None or not checkpoint:
        return found
    steps = _checkpoints(found)
    if checkpoint not in steps:
        raise FileNotFoundError(
            f"{model} has no training checkpoint {checkpoint!r}; it has {', '.join(steps) if steps else 'none'}"
        )
    return found / "checkpoints" / checkpoint


def near_names(name: str) -> list[str]:
    """Embedded names that resemble a mistyped one."""
    known = [directory.name for directory in _directories()]
    return difflib.get_close_matches(name.partition("@")[0].lower(), known, n=3, cutoff=0.6)


def _directories() -> list[Path]:
    try:
        models = data_dir() / "models"
    except FileNotFoundError:
        return []
    return sorted(path.parent for path in models.glob("*/config.json"))


def _checkpoints(directory: Path) -> list[str]:
    return sorted(path.parent.name for path in directory.glob("checkpoints/*/config.json"))


def _describe(directory: Path) -> list[object]:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))

    def setting(*names: str) -> int | None:
        return next((config[name] for name in names if config.get(name) is not None), None)

    heads = setting("num_attention_heads", "n_head")
    weights = sorted(directory.glob("*.safetensors"))
    return [
        directory.name,
        (config.get("architectures") or [config.get("model_type")])[0],
        setting("num_hidden_layers", "n_layer"),
        setting("hidden_size", "n_embd"),
        heads,
        setting("num_key_value_heads") or heads,
        setting("vocab_size"),
        setting("max_position_embeddings", "n_positions"),
        sum(_count_parameters(path) for path in weights),
        round(sum(path.stat().st_size for path in weights) / 1e6, 2),
        ", ".join(_checkpoints(directory)),
    ]


def _count_parameters(path: Path) -> int:
    """From the header of a safetensors file: eight bytes of length, then JSON with the shape of each tensor."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
