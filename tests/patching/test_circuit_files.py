"""Circuits in the MIB benchmark's JSON: written as its reader expects, read back, grouped heads unfolded and folded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from interp.patching import Circuit, load_circuit, save_circuit
from interp.patching.graph import Graph
from tests.patching.test_circuits import GRAPHS, GROUPED, PARALLEL, PLAIN, random_scores


@pytest.mark.parametrize("graph", GRAPHS)
def test_what_is_written_is_read(graph: Any, tmp_path: Path) -> None:
    scores = random_scores(graph).mean()
    circuit = Circuit.of(graph, graph.edges()[::3])
    path = save_circuit(circuit, tmp_path / "circuit.json", d_model=8, scores=scores)
    found = load_circuit(path, n_kv_heads=graph.n_kv_heads)
    assert found.circuit == circuit
    assert np.allclose(found.scores.values, scores.values, atol=1e-6, equal_nan=True)
    assert found.scores.coords["writer"].values.tolist() == list(graph.writers)


def test_the_file(tmp_path: Path) -> None:
    """Names and keys as EAP-IG's `Graph.from_json` reads them, by hand for one layer with two heads of one group."""
    graph = Graph(1, 2, 1, False)
    circuit = Circuit.of(graph, ["input->a0.h0<v>", "a0.h1->m0", "m0->logits"])
    scores = random_scores(graph).mean()
    stored = json.loads(save_circuit(circuit, tmp_path / "c.json", d_model=6, scores=scores).read_text())
    assert stored["cfg"] == {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 6}
    assert stored["nodes"] == {
        "input": {"in_graph": True}, "a0.h0": {"in_graph": False}, "a0.h1": {"in_graph": True},
        "m0": {"in_graph": True}, "logits": {"in_graph": True},
    }  # fmt: skip
    heads = [f"input->a0.h{head}<{part}>" for part in "qkv" for head in (0, 1)]
    assert set(stored["edges"]) == {
        *heads, "input->m0", "a0.h0->m0", "a0.h1->m0",
        "input->logits", "a0.h0->logits", "a0.h1->logits", "m0->logits",
    }  # fmt: skip
    inside = {name for name, edge in stored["edges"].items() if edge["in_graph"]}
    assert inside == {"input->a0.h0<v>", "input->a0.h1<v>", "a0.h1->m0", "m0->logits"}  # the value is of both heads
    parts = [stored["edges"][f"input->a0.h{head}<k>"]["score"] for head in (0, 1)]
    assert sum(parts) == pytest.approx(float(scores.sel(writer="input", reader="a0.h0<k>")), rel=1e-6)
    assert parts[0] == parts[1]
    bare = json.loads(save_circuit(circuit, tmp_path / "b.json", d_model=6).read_text())
    assert bare["edges"]["m0->logits"] == {"score": 1.0, "in_graph": True}
    assert bare["edges"]["input->m0"] == {"score": 0.0, "in_graph": False}


def test_a_group_is_in_where_one_of_its_heads_is(tmp_path: Path) -> None:
    path = save_circuit(Circuit.of(GROUPED), tmp_path / "c.json", d_model=8)
    stored = json.loads(path.read_text())
    stored["edges"]["input->a1.h3<k>"]["in_graph"] = True
    path.write_text(json.dumps(stored))
    assert load_circuit(path, n_kv_heads=2).circuit.edges == ["input->a1.h1<k>"]
    assert load_circuit(path).circuit.edges == ["input->a1.h3<k>"]  # every head with keys of its own


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.json"):
        load_circuit(tmp_path / "none.json")
    wrong = tmp_path / "wrong.json"
    for text, message in (
        ("[1", "is not a circuit in the JSON format"),
        ('{"cfg": {"n_layers": 1}, "nodes": {}, "edges": {}}', "KeyError: 'n_heads'"),
    ):
        wrong.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_circuit(wrong)
    wrong.write_bytes(b"\x80\x02PK")
    with pytest.raises(ValueError, match="Graph.to_json"):
        load_circuit(wrong)
    path = save_circuit(Circuit.of(PLAIN), tmp_path / "c.json", d_model=8)
    stored = json.loads(path.read_text())
    for change, message in (
        (lambda s: s["edges"].pop("input->m0"), "has no edge 'input->m0'"),
        (lambda s: s["edges"].update({"m0->m0": {"score": 0, "in_graph": True}}), "1 edges .* for instance 'm0->m0'"),
        (lambda s: s["cfg"].update(parallel_attn_mlp=True), "edges that .* does not have"),
        (lambda s: s["nodes"]["m0"].update(neurons=[True, False]), "keeps 1 of 2 dimensions of m0"),
    ):
        changed = json.loads(json.dumps(stored))
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            load_circuit(path)


def test_scores_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    circuit, path = Circuit.of(PLAIN), tmp_path / "c.json"
    with pytest.raises(ValueError, match="do not fit a graph"):
        save_circuit(circuit, path, d_model=8, scores=random_scores(GROUPED).mean())
    with pytest.raises(ValueError, match="take their mean first"):
        save_circuit(circuit, path, d_model=8, scores=random_scores(PLAIN).values)
    holes = random_scores(PLAIN).mean().copy()
    holes.loc[{"writer": "m0", "reader": "logits"}] = np.nan
    with pytest.raises(ValueError, match="no finite score"):
        save_circuit(circuit, path, d_model=8, scores=holes)
    assert not path.exists()
    assert save_circuit(Circuit.of(PARALLEL), path, d_model=8).is_file()
