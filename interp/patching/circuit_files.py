"""Circuits as files: the JSON that the MIB benchmark and EAP-IG read and write."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr

from interp.patching.circuits import Circuit
from interp.patching.graph import Graph
from interp.results import labelled


class StoredCircuit(NamedTuple):
    """A circuit and the scores of all edges (writer, reader), NaN where there is no edge."""

    circuit: Circuit
    scores: xr.DataArray


def save_circuit(
    circuit: Circuit, path: str | os.PathLike[str], *, d_model: int, scores: xr.DataArray | None = None
) -> Path:
    """Write a circuit in the JSON format of the MIB benchmark's circuit track, readable by EAP-IG's `Graph.from_json`.

    The format knows query heads only. An edge into a key or value that a group of heads shares becomes one edge to each
    of them, with an equal part of its score, so that they sum to it; all are in the circuit or none.

    Args:
        path: The file, by convention `NAME.json`. It appears under its name only when it is complete.
        d_model: Width of the stream (`interp.models.geometry(bridge).d_model`), which their reader needs.
        scores: Scores of edges (writer, reader), such as `edge_attribution(...).mean()`. Their code ranks edges by
            them, so give them where circuits of other sizes are to be evaluated; without, edges score 1 or 0.

    Raises:
        ValueError: If the scores do not fit the graph.
    """
    graph = circuit.graph
    table = np.where(circuit.mask.numpy(), 1.0, 0.0)
    if scores is not None:
        if set(scores.dims) != {"writer", "reader"}:
            raise ValueError(f"scores have dimensions {scores.dims}, expected (writer, reader); take their mean first")
        table = scores.transpose("writer", "reader").values.astype(float)
        if table.shape != tuple(graph.exists.shape):
            raise ValueError(f"scores of shape {table.shape} do not fit a graph of {tuple(graph.exists.shape)}")
        if not np.isfinite(table[graph.exists.numpy()]).all():
            raise ValueError("some edges have no finite score, and JSON has no number for that")
    edges: dict[str, dict[str, Any]] = {}
    for writer, reader in graph.exists.nonzero().tolist():
        heads = _query_heads(graph, reader)
        for name in heads:
            edges[f"{graph.writers[writer]}->{name}"] = {
                "score": float(table[writer, reader]) / len(heads),
                "in_graph": bool(circuit.mask[writer, reader]),
            }
    used = set(circuit.nodes)
    config: dict[str, Any] = {"n_layers": graph.n_layers, "n_heads": graph.n_heads}
    config |= {"parallel_attn_mlp": graph.parallel, "d_model": int(d_model)}
    nodes = {name: {"in_graph": name in used or name == "logits"} for name in (*graph.writers, "logits")}
    return _write(Path(path), json.dumps({"cfg": config, "nodes": nodes, "edges": edges}))


def load_circuit(path: str | os.PathLike[str], *, n_kv_heads: int | None = None) -> StoredCircuit:
    """Read a circuit from the JSON format of the MIB benchmark's circuit track or of EAP-IG.

    Args:
        n_kv_heads: Key-value heads of the model, where there are fewer than heads: the format does not say. The edges
            into the keys or values of a group become one, with the sum of their scores, in the circuit if any was.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not of this format, names edges that the model does not have, lacks some, or keeps
            single neurons of nodes, which circuits of edges cannot say.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no circuit file at {path}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        config, edges, nodes = stored["cfg"], stored["edges"], stored["nodes"]
        sizes = int(config["n_layers"]), int(config["n_heads"])
        parallel = bool(config["parallel_attn_mlp"])
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a circuit in the JSON format of EAP-IG, with cfg (n_layers, n_heads, parallel_attn_mlp), "
            f"nodes and edges ({type(error).__name__}: {error}); a .pt file must be saved again with Graph.to_json"
        ) from error
    _check_neurons(path, nodes)
    graph = Graph(*sizes, sizes[1] if n_kv_heads is None else n_kv_heads, parallel)
    mask, scores = torch.zeros_like(graph.exists), np.full(graph.exists.shape, np.nan)
    listed = dict(edges)
    for writer, reader in graph.exists.nonzero().tolist():
        total = 0.0
        for head in _query_heads(graph, reader):
            name = f"{graph.writers[writer]}->{head}"
            if name not in listed:
                raise ValueError(f"{path} has no edge {name!r}, which a model with {graph} has")
            entry = listed.pop(name)
            score = entry.get("score")
            total += math.nan if score is None else float(score)
            mask[writer, reader] |= bool(entry["in_graph"])
        scores[writer, reader] = total
    if listed:
        raise ValueError(
            f"{path} has {len(listed)} edges that {graph} does not have, for instance {next(iter(listed))!r}"
        )
    coords = {"writer": list(graph.writers), "reader": list(graph.readers)}
    return StoredCircuit(Circuit(graph, mask), labelled(scores, ["writer", "reader"], coords))


def _query_heads(graph: Graph, reader: int) -> list[str]:
    """The names that a reader has where every query head has keys and values of its own."""
    node, name = graph.reader_nodes[reader], graph.readers[reader]
    if node.part not in ("k", "v"):
        return [name]
    return [f"{head}<{node.part}>" for head in graph.feeds(name)]


def _check_neurons(path: Path, nodes: dict[str, Any]) -> None:
    for name, node in nodes.items():
        kept = node.get("neurons") if isinstance(node, dict) else None
        if kept is not None and any(kept) and not all(kept):
            raise ValueError(
                f"{path} keeps {sum(map(bool, kept))} of {len(kept)} dimensions of {name}; circuits here are sets of "
                "whole edges"
            )


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path
