"""Which library a file or folder comes from, and who reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from interp.dictionaries import (
    _format_circuit_tracer,
    _format_dictionary_learning,
    _format_gemma_scope,
    _format_hook_z,
    _format_llama_scope,
    _format_sparsify,
    _saelens,
)
from interp.dictionaries._foreign import Found

Format = Literal[
    "auto",
    "interp",
    "saelens",
    "gemma_scope",
    "gemma_scope_2",
    "llama_scope",
    "dictionary_learning",
    "sparsify",
    "hook_z",
    "circuit_tracer",
]
FILE = "dictionary.safetensors"
READERS: dict[str, Callable[[Path, str | None, str | None], Found]] = {
    "saelens": _saelens.read,
    "gemma_scope": _format_gemma_scope.read_npz,
    "gemma_scope_2": _format_gemma_scope.read_safetensors,
    "llama_scope": _format_llama_scope.read,
    "dictionary_learning": _format_dictionary_learning.read,
    "sparsify": _format_sparsify.read,
    "hook_z": _format_hook_z.read,
    "circuit_tracer": _format_circuit_tracer.read,
}
"""Path, hook and target hook (None: as the files say) to what was found, by format."""
_FOLDERS: list[tuple[str, tuple[str, ...]]] = [  # the first whose files are all there
    ("interp", (FILE,)),
    ("saelens", ("cfg.json", "sae_weights.safetensors")),
    ("sparsify", ("cfg.json", "sae.safetensors")),
    ("llama_scope", ("hyperparams.json", "checkpoints/final.safetensors")),
    ("llama_scope", ("config.json", "sae_weights.safetensors")),
    ("gemma_scope_2", ("config.json", "params.safetensors")),
    ("gemma_scope", ("params.npz",)),
    ("dictionary_learning", ("ae.pt",)),
    ("circuit_tracer", ("layer_0.safetensors",)),
]


def format_of(path: Path) -> str:
    """The format of what is there, by the names of files and, where these do not tell, of tensors.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If it is of no known format, with what was found.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    kind = _of_folder(path) if path.is_dir() else _of_file(path)
    if kind is None:
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) if path.is_dir() else path.name
        known = "; ".join(f"{', '.join(names)} ({kind})" for kind, names in _FOLDERS)
        raise ValueError(f"{path} is of no known format (found: {found or 'nothing'}); known are {known}")
    return kind


def _of_folder(path: Path) -> str | None:
    for kind, names in _FOLDERS:
        if all((path / name).is_file() for name in names):
            return kind
    return None


def _of_file(path: Path) -> str | None:
    for kind, names in _FOLDERS:
        if path.name in {Path(name).name for name in names} and kind not in ("dictionary_learning", "circuit_tracer"):
            folder = path.parent.parent if "/" in names[-1] else path.parent
            if all((folder / name).is_file() for name in names):
                return kind
    if path.suffix == ".npz":
        return "gemma_scope"
    if path.suffix == ".pt":
        return "hook_z" if _format_hook_z.config_of(path).is_file() else "dictionary_learning"
    return _by_tensors(path) if path.suffix == ".safetensors" else None


def _by_tensors(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if "interp" in metadata:
        return "interp"
    if {"w_enc", "w_dec", "threshold"} <= names:
        return "gemma_scope_2"
    return "circuit_tracer" if any(name.startswith("W_enc") or name.startswith("W_dec") for name in names) else None
