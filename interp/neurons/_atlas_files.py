"""Where the numbers of an atlas are while they are made and after: in memory, or in a directory that is mapped.

    PATH/manifest.json       settings, provenance, which layers are done; written last after each layer
    PATH/top_ids.npy, ...    one array each, [side, layer, neuron, ...], in NumPy's own format
    PATH/tokens.json         the strings of the tokens by id
    PATH/index_*.npy         where each token stands in the lists

A layer's numbers are written and synced before the manifest says so; a killed run leaves whole layers and one to redo.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from interp.cache._manifest import write_json

FORMAT, VERSION, MANIFEST = "interp-neuron-atlas", 1, "manifest.json"
LISTS = ("top_values", "top_ids", "bottom_values", "bottom_ids")
COLUMNS = ("values", "logsumexp", "mean", "std", "norm", "z", "p", "q")


def shapes(n_sides: int, n_layers: int, d_mlp: int, k: int, n_null: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every array."""
    cells = (n_sides, n_layers, d_mlp)
    found = {name: ((*cells, k), "int32" if name.endswith("ids") else "float32") for name in LISTS}
    found |= dict.fromkeys(COLUMNS, (cells, "float32"))
    return found | ({"null_peaks": ((n_sides, n_layers, n_null), "float32")} if n_null else {})


class Arrays:
    """The arrays of one atlas, NaN (ids: -1) where nothing was decoded, and the layers that are done."""

    def __init__(
        self, wanted: Mapping[str, tuple[tuple[int, ...], str]], path: Path | None, settings: dict[str, Any]
    ) -> None:
        self.path, self.done, self.complete = path, set[tuple[str, int]](), False
        self._settings = settings
        if path is None:
            self.arrays = {name: np.full(shape, _empty(kind), kind) for name, (shape, kind) in wanted.items()}
            return
        path.mkdir(parents=True, exist_ok=True)
        if (path / MANIFEST).is_file():
            manifest = read_manifest(path)
            _require_same(path, manifest["settings"], settings)
            self.done = {(side, layer) for side, layer in manifest["done"]}
            self.complete = bool(manifest["complete"])
            if self.complete:
                return
        elif any(path.iterdir()):
            raise ValueError(f"{path} is not empty and holds no {MANIFEST} of an atlas; give an empty or new directory")
        else:
            self._note(complete=False)
        self.arrays = {name: _mapped(path / f"{name}.npy", shape, kind) for name, (shape, kind) in wanted.items()}

    def put(self, side: str, place: int, layer: int, found: Mapping[str, np.ndarray]) -> None:
        """Everything of one layer and side."""
        for name, values in found.items():
            self.arrays[name][place, layer] = values
        self._sync(found)
        self.done.add((side, layer))
        if self.path is not None:
            self._note(complete=False)

    def finish(self, strings: Sequence[str], index: Mapping[str, np.ndarray], provenance: dict[str, Any]) -> None:
        """z, p and q, the index and the strings are there: nothing more will be written."""
        if self.path is None:
            return
        self._sync(self.arrays)
        write_json(self.path / "tokens.json", list(strings))
        for name, values in index.items():
            with (self.path / f"index_{name}.npy").open("wb") as file:
                np.save(file, values, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        self._note(complete=True, provenance=provenance)

    def _sync(self, names: Iterable[str]) -> None:
        for name in names:
            array = self.arrays[name]
            if isinstance(array, np.memmap):
                array.flush()

    def _note(self, *, complete: bool, **more: Any) -> None:
        assert self.path is not None
        write_json(
            self.path / MANIFEST,
            {"format": FORMAT, "version": VERSION, "settings": self._settings, "complete": complete,
             "done": sorted(self.done), **more},
        )  # fmt: skip


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an atlas directory.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not one that this version can read.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is not an atlas: it has no {MANIFEST}. interp.neurons.decode(..., path=) makes one"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON ({error}); decode into another directory") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise ValueError(f"{file} is not the manifest of an atlas of version {VERSION}")
    return manifest


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], list[str], dict[str, Any]]:
    """Mapped arrays by name (those of the index as `index_...`), token strings and manifest of a finished atlas."""
    manifest = read_manifest(path)
    if not manifest["complete"]:
        wanted = manifest["settings"]
        total = len(wanted["sides"]) * len(wanted["layers"])
        raise ValueError(f"the atlas in {path} is not finished: {len(manifest['done'])} of {total} layers are there. "
                         "Call interp.neurons.decode again with the same arguments and path")  # fmt: skip
    arrays = {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in sorted(path.glob("*.npy"))}
    return arrays, json.loads((path / "tokens.json").read_text(encoding="utf-8")), manifest


def inverted(top_ids: np.ndarray, bottom_ids: np.ndarray, d_vocab: int) -> dict[str, np.ndarray]:
    """For every token the places where it stands in the lists.

    `entries[offsets[t] : offsets[t + 1]]` are the flat places of token t in the array [sign, side, layer, neuron, rank]
    (sign 0: top, 1: bottom), ascending.
    """
    ids = np.concatenate([top_ids.reshape(-1), bottom_ids.reshape(-1)])
    order = np.argsort(ids, kind="stable")
    offsets = np.searchsorted(ids[order], np.arange(d_vocab + 1))
    return {"entries": order, "offsets": offsets}


def _mapped(file: Path, shape: tuple[int, ...], kind: str) -> np.memmap:
    if not file.is_file():
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        fresh = np.lib.format.open_memmap(temporary, mode="w+", dtype=kind, shape=shape)
        fresh[...] = _empty(kind)
        fresh.flush()
        temporary.replace(file)
    return np.lib.format.open_memmap(file, mode="r+")


def _require_same(path: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    now = json.loads(json.dumps(asked))
    differ = [
        f"{name} {there.get(name)!r} there, {now.get(name)!r} asked" for name in now if there.get(name) != now[name]
    ]
    if differ:
        raise ValueError(f"{path} holds an atlas made otherwise ({'; '.join(differ)}); give another directory")


def _empty(kind: str) -> float | int:
    return -1 if kind == "int32" else np.nan
