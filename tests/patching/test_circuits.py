"""Circuits as sets, pruning and selection against brute force."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from interp.patching import Circuit, select_circuit
from interp.patching.circuits import edges_of
from interp.patching.edge_scores import EdgeScores
from interp.patching.graph import Graph
from interp.results import labelled

PLAIN = Graph(2, 2, 2, False)
GROUPED = Graph(2, 4, 2, False)
PARALLEL = Graph(2, 2, 2, True)
GRAPHS = (PLAIN, GROUPED, PARALLEL)


def scores(graph: Graph, values: Tensor, direction: str = "denoise") -> EdgeScores:
    """Edge scores [writer, reader, example] made by hand."""
    n = values.shape[-1]
    values = torch.where(graph.exists.unsqueeze(-1), values, torch.nan)
    coords = {"writer": list(graph.writers), "reader": list(graph.readers), "example": list(range(n))}
    sizes = {"n_layers": graph.n_layers, "n_heads": graph.n_heads}
    about = {"graph": {**sizes, "n_kv_heads": graph.n_kv_heads, "parallel": graph.parallel}, "method": "gradient"}
    ends = [labelled(torch.zeros(n), ["example"], {"example": list(range(n))}) for _ in range(2)]
    array = labelled(values, ["writer", "reader", "example"], coords, unit="logits")
    return EdgeScores(array, about, *ends, direction, "swap", "logit_difference")


def random_scores(graph: Graph, n: int = 3, seed: int = 0) -> EdgeScores:
    generator = torch.Generator().manual_seed(seed)
    return scores(graph, torch.randn(*graph.exists.shape, n, generator=generator))


def test_sets_of_edges() -> None:
    a = Circuit.of(PLAIN, ["input->m0", "m0->logits"])
    b = Circuit.of(PLAIN, ["m0->logits", "input->a1.h1<q>"])
    assert a.edges == ["input->m0", "m0->logits"] == list(a)
    assert (a | b).edges == ["input->m0", "input->a1.h1<q>", "m0->logits"]
    assert (a & b).edges == ["m0->logits"]
    assert (a - b).edges == ["input->m0"]
    assert a.jaccard(b) == pytest.approx(1 / 3)
    assert Circuit.of(PLAIN).jaccard(Circuit.of(PLAIN)) == 1
    assert "input->m0" in a
    assert "m1->logits" not in a
    assert len(a) == 2
    assert a.share == 2 / PLAIN.n_edges
    assert a.complement() | a == Circuit.full(PLAIN)
    assert len(a.complement() & a) == 0
    assert len({a, Circuit.of(PLAIN, reversed(a.edges))}) == 1
    assert a.to_dataframe().to_numpy().tolist() == [["input->m0", "input", "m0"], ["m0->logits", "m0", "logits"]]
    assert repr(a).startswith(f"Circuit(2 of {PLAIN.n_edges} edges, 3 nodes: input->m0, m0->logits")


def test_a_circuit_keeps_its_own_mask() -> None:
    mask = PLAIN.mask(["input->m0"])
    circuit = Circuit(PLAIN, mask)
    mask[:] = False
    assert circuit.edges == ["input->m0"]


def test_nodes() -> None:
    assert Circuit.of(PLAIN, ["input->a0.h1<k>", "a0.h1->m1"]).nodes == ["input", "a0.h1", "m1"]
    shared = ["input->a0.h1<k>", "a0.h2->logits"]  # keys of heads 2 and 3, of which only head 2 writes anything
    assert Circuit.of(GROUPED, shared).nodes == ["input", "a0.h2", "logits"]


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no edge m0->m0"):
        Circuit.of(PLAIN, ["m0->m0"])
    with pytest.raises(ValueError, match="there is no edge"):
        Circuit(PLAIN, torch.ones_like(PLAIN.exists))
    with pytest.raises(ValueError, match="different graphs"):
        _ = Circuit.of(PLAIN) | Circuit.of(PARALLEL)
    with pytest.raises(TypeError, match="not with list"):
        Circuit.of(PLAIN).jaccard(["input->m0"])  # type: ignore[arg-type]


def on_a_path(circuit: Circuit) -> set[str]:
    """The edges on any walk from input to logits, by following every one of them."""
    graph, found = circuit.graph, set()
    edges = [tuple(edge.split("->")) for edge in circuit.edges]

    def walk(writer: str, walked: tuple[str, ...]) -> None:
        for source, reader in edges:
            if source != writer:
                continue
            here = (*walked, f"{source}->{reader}")
            if reader == "logits":
                found.update(here)
            for follower in graph.feeds(reader):
                walk(follower, here)

    walk("input", ())
    return found


@pytest.mark.parametrize("graph", GRAPHS)
def test_pruning_keeps_the_edges_on_paths(graph: Graph) -> None:
    generator = torch.Generator().manual_seed(0)
    pruned = 0
    for _ in range(12):
        circuit = Circuit(graph, (torch.rand(graph.exists.shape, generator=generator) < 0.12) & graph.exists)
        kept = circuit.pruned()
        assert set(kept.edges) == on_a_path(circuit)
        assert kept.pruned() == kept
        pruned += len(circuit) - len(kept)
    assert pruned > 20
    assert Circuit.full(graph).pruned() == Circuit.full(graph)


def greedily(graph: Graph, support: dict[str, float], n: int) -> set[str]:
    """Add the best edge into what is in, n times, looking at all of them each time."""
    chosen: set[str] = set()
    while len(chosen) < n:
        writers = {edge.split("->")[0] for edge in chosen}
        readers = {"logits", *itertools.chain.from_iterable(graph.inputs_of(writer) for writer in writers)}
        candidates = [edge for edge in support if edge not in chosen and edge.split("->")[1] in readers]
        chosen.add(max(candidates, key=lambda edge: support[edge]))
    return chosen


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_selection_against_brute_force(graph: Graph, absolute: bool, direction: str) -> None:
    found = random_scores(graph)
    found = scores(graph, torch.tensor(found.values.values), direction)
    mean = torch.tensor(found.mean().values) * (-1 if direction == "noise" else 1)
    support = {edge: float(mean[graph.place(edge)]) for edge in graph.edges()}
    support = {edge: abs(value) if absolute else value for edge, value in support.items()}
    best = sorted(support, key=lambda edge: -support[edge])
    for n in (0, 1, 6, 20):
        top = select_circuit(found, n, absolute=absolute, prune=False)
        assert set(top.edges) == set(best[:n])
        assert select_circuit(found, n, absolute=absolute) == top.pruned()
        greedy = select_circuit(found, n, how="greedy", absolute=absolute, prune=False)
        assert set(greedy.edges) == greedily(graph, support, n)
    level = support[best[7]]
    assert set(select_circuit(found, threshold=level, absolute=absolute, prune=False).edges) == set(best[:8])


def test_positions_are_summed_and_plain_arrays_taken() -> None:
    found = random_scores(PLAIN)
    halves = (found.values * xr.DataArray(np.float32([0.25, 0.75]), dims="pos")).transpose(..., "pos", "example")
    split = EdgeScores(halves, found.provenance, found.clean, found.corrupted, "denoise", "swap", "m")
    assert select_circuit(split, 9) == select_circuit(found, 9)
    assert select_circuit(found.mean(), 9, graph=PLAIN) == select_circuit(found, 9)
    with pytest.raises(ValueError, match="graph="):
        select_circuit(found.mean(), 9)


def test_sizes() -> None:
    assert edges_of(0.1, PLAIN) == int(0.1 * PLAIN.n_edges)
    assert edges_of(1.0, PLAIN) == PLAIN.n_edges
    assert edges_of(1, PLAIN) == 1
    for wrong in (1.5, -1, PLAIN.n_edges + 1, float("nan"), True):
        with pytest.raises(ValueError, match="size="):
            edges_of(wrong, PLAIN)


@pytest.mark.usefixtures("unchecked")
def test_wrong_requests() -> None:
    found = random_scores(PLAIN)
    with pytest.raises(ValueError, match="pass one of size"):
        select_circuit(found)
    with pytest.raises(ValueError, match="pass one of size"):
        select_circuit(found, 3, threshold=0.1)
    with pytest.raises(ValueError, match="greedy"):
        select_circuit(found, threshold=0.1, how="greedy")
    with pytest.raises(ValueError, match="did you mean 'greedy'"):
        select_circuit(found, 3, how="gredy")  # type: ignore[arg-type]
    holes = found.values.copy()
    holes[0, 0] = np.nan
    with pytest.raises(ValueError, match=r"1 edges have no finite score, for instance input->a0.h0<q>"):
        select_circuit(holes.mean("example"), 3, graph=PLAIN)
    with pytest.raises(ValueError, match="do not fit a graph"):
        select_circuit(found.mean(), 3, graph=GROUPED)


def drawn(figure: Any) -> list[str]:
    """Names of the edges that are drawn."""
    names = [trace.name for trace in figure.data if trace.legendgroup and not trace.showlegend]
    return sorted(name.replace("&lt;", "<").replace("&gt;", ">") for name in names)


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_edge_of_a_circuit_is_drawn(graph: Graph) -> None:
    found = random_scores(graph)
    circuit = select_circuit(found, 12, prune=False)
    for figure in (circuit.plot(), circuit.plot(found), circuit.plot(found.summed())):
        assert drawn(figure) == sorted(circuit.edges)
    signs = {edge: float(found.summed().values[graph.place(edge)]) > 0 for edge in circuit}
    for trace in circuit.plot(found).data:
        if trace.legendgroup and not trace.showlegend:
            edge = trace.name.replace("&lt;", "<").replace("&gt;", ">")
            assert trace.legendgroup.startswith("positive" if signs[edge] else "negative")
    figure = circuit.plot(found, max_edges=5, title="Five")
    assert figure.layout.title.text == "Five" and drawn(figure) == sorted(select_circuit(found, 5, prune=False).edges)
    assert any("the 5 strongest of 12 edges" in note.text for note in figure.layout.annotations)
    with pytest.raises(ValueError, match="the scores are of"):
        Circuit.full(Graph(1, 1, 1, False)).plot(found)
    with pytest.raises(ValueError, match="no edges"):
        Circuit.of(graph).plot()


def test_scores_of_a_large_model_are_drawn_and_of_a_small_one_mapped() -> None:
    """GPT-2 small has more pairs of a writer and a reader than a map may hold."""
    small, large = random_scores(PLAIN), random_scores(Graph(12, 12, 12, False), n=1)
    assert small.plot().data[0].type == "heatmap" and drawn(small.draw(3)) == sorted(small.top(3)["edge"])
    figure = large.plot()
    assert drawn(figure) == sorted(large.top(60)["edge"])
    assert any("the 60 strongest of 32491 edges; 32431 are not" in note.text for note in figure.layout.annotations)
