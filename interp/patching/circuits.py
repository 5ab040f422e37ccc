"""Circuits: sets of edges of a model's graph, made by hand or chosen by their scores."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from interp.patching._cells import choice
from interp.patching.edge_scores import EdgeScores
from interp.patching.graph import Graph

if TYPE_CHECKING:
    import pandas as pd

Selection: TypeAlias = Literal["top", "greedy"]
"""`"top"`: the best edges wherever they are. `"greedy"`: from the logits up, the best edge into what is in already."""


@dataclass(frozen=True, eq=False, repr=False)
class Circuit:
    """A set of edges. Everything outside of it is ablated when it is evaluated.

    Sets combine as Python's do: `a | b`, `a & b`, `a - b`; `edge in circuit`, `len(circuit)` and iteration are about
    its edges, by name.

    Attributes:
        graph: The graph that the edges are from.
        mask: Whether each edge is in, Bool[writer, reader], false where there is no edge. Not to be changed in place.

    Example:
        >>> circuit = Circuit.of(graph_of(bridge), ["input->a0.h1<v>", "a0.h1->logits"])
    """

    graph: Graph
    mask: Bool[Tensor, "writer reader"]

    def __post_init__(self) -> None:
        self.graph.check(self.mask)
        object.__setattr__(self, "mask", self.mask.detach().cpu().clone())

    @classmethod
    def of(cls, graph: Graph, edges: Iterable[str] = ()) -> Circuit:
        """The circuit of these edges; none by default."""
        return cls(graph, graph.mask(edges))

    @classmethod
    def full(cls, graph: Graph) -> Circuit:
        """The whole model."""
        return cls(graph, graph.exists)

    @property
    def edges(self) -> list[str]:
        """Names of the edges, in the order in which the model computes their writers."""
        return self.graph.edges(self.mask)

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that an edge goes into or out of, in the order of computation: `input`, heads, MLPs,
        `logits`.

        Edges into a key or value that several heads share are of all of them: they do not put a head in by themselves.
        """
        g, out, into = self.graph, self.mask.any(1), self.mask.any(0)
        fed = {reader for reader, fed in zip(g.readers, into.tolist(), strict=True) if fed}
        named = []
        for i, writer in enumerate(g.writers):
            own = [reader for reader in g.inputs_of(writer) if len(g.feeds(reader)) == 1]
            if out[i] or fed.intersection(own):
                named.append(writer)
        return [*named, *(["logits"] if "logits" in fed else [])]

    @property
    def share(self) -> float:
        """Edges in the circuit, as a share of those of the graph."""
        return len(self) / self.graph.n_edges

    def complement(self) -> Circuit:
        """All the other edges."""
        return Circuit(self.graph, self.graph.exists & ~self.mask)

    def pruned(self) -> Circuit:
        """Without the edges that are on no path from `input` to `logits` through edges of the circuit.

        A head is reached by an edge into its query, or into the key or value of its group. Under `"swap"` ablation what
        is pruned has no effect: a node with no edge in writes what it writes in the other run.
        """
        reads = inputs(self.graph).float()
        mask = self.mask.clone()
        while True:
            fed = (reads @ mask.any(0).float()) > 0
            fed[0] = True  # the input
            alive = fed & mask.any(1)
            heard = (alive.float() @ reads) > 0
            heard[-1] = True  # the logits
            kept = mask & alive[:, None] & heard[None]
            if torch.equal(kept, mask):
                return Circuit(self.graph, kept)
            mask = kept

    def jaccard(self, other: Circuit) -> float:
        """Edges in both over edges in either: 1 for equal circuits (two empty ones included), 0 for disjoint ones."""
        self._same(other)
        either = int((self.mask | other.mask).sum())
        return int((self.mask & other.mask).sum()) / either if either else 1.0

    def to_dataframe(self) -> pd.DataFrame:
        """One row per edge: `edge`, `writer`, `reader`."""
        import pandas as pd

        rows = [(edge, *edge.split("->")) for edge in self.edges]
        return pd.DataFrame(rows, columns=["edge", "writer", "reader"])

    def plot(
        self, scores: EdgeScores | xr.DataArray | None = None, *, max_edges: int = 60, title: str | None = None
    ) -> Any:
        """Figure of the circuit, its nodes in their layers.

        Args:
            scores: Of `edge_attribution`, or an array (writer, reader): colours edges by their sign and widens them by
                their magnitude.
            max_edges: Draw this many, the strongest; the figure says how many it leaves out. A circuit of more needs
                scores.
            title: By default what the scores are.
        """
        from interp.patching._drawing import draw_edges

        table, unit, about = scores, "", f"Circuit of {len(self)} edges"
        if isinstance(scores, EdgeScores):
            if scores.graph != self.graph:
                raise ValueError(f"the scores are of {scores.graph}, but the circuit of {self.graph}")
            table, unit = scores.summed(), str(scores.values.attrs.get("unit", ""))
            about += f": {scores.method} scores ({scores.direction}, {scores.value})"
        assert table is None or isinstance(table, xr.DataArray)
        return draw_edges(self.graph, self.mask, table, max_edges=max_edges, title=title or about, unit=unit)

    def __len__(self) -> int:
        return int(self.mask.sum())

    def __iter__(self) -> Iterator[str]:
        return iter(self.edges)

    def __contains__(self, edge: str) -> bool:
        return bool(self.mask[self.graph.place(edge)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Circuit) and self.graph == other.graph and torch.equal(self.mask, other.mask)

    def __hash__(self) -> int:
        return hash((self.graph, self.mask.numpy().tobytes()))

    def __or__(self, other: Circuit) -> Circuit:
        self._same(other)
        return Circuit(self.graph, self.mask | other.mask)

    def __and__(self, other: Circuit) -> Circuit:
        self._same(other)
        return Circuit(self.graph, self.mask & other.mask)

    def __sub__(self, other: Circuit) -> Circuit:
        self._same(other)
        return Circuit(self.graph, self.mask & ~other.mask)

    def __repr__(self) -> str:
        edges = self.edges
        named = ", ".join(edges[:4]) + (", ..." if len(edges) > 4 else "")
        return f"Circuit({len(edges)} of {self.graph.n_edges} edges, {len(self.nodes)} nodes: {named})"

    def _same(self, other: Circuit) -> None:
        if not isinstance(other, Circuit):
            raise TypeError(f"a circuit is compared with circuits, not with {type(other).__name__}")
        if self.graph != other.graph:
            raise ValueError(f"circuits of different graphs: {self.graph} and {other.graph}")


def select_circuit(
    scores: EdgeScores | xr.DataArray,
    size: float | int | None = None,
    *,
    threshold: float | int | None = None,
    how: Selection = "top",
    absolute: bool = True,
    prune: bool = True,
    graph: Graph | None = None,
) -> Circuit:
    """The circuit of the edges with the best scores.

    Args:
        scores: Of `edge_attribution`, averaged over examples and summed over positions; or an array with dimensions
            (writer, reader), for which `graph` is needed, where larger is better.
        size: How many edges (an integer), or what share of all (a fraction, rounded down as MIB does; 1.0 is all).
        threshold: Instead of `size`: all edges whose (absolute) score is at least this.
        how: `"top"` takes the best edges wherever they are. `"greedy"` begins at the logits and always adds the best
            edge into something that is in the circuit, so that every edge has a way to the logits.
        absolute: Rank by magnitude; else by how much an edge supports the metric: the score itself for `"denoise"`, its
            negative for `"noise"`, where the answer is lost with the edge.
        prune: Leave out edges on no path from the input to the logits; the circuit is then smaller than asked for.
        graph: For scores that are a plain array.

    Raises:
        ValueError: If not exactly one of `size` and `threshold` is given or it is out of range, if `"greedy"` is given
            a threshold, or if an edge has no score.

    Source:
        Top and threshold: Syed et al. 2023 (arXiv:2310.10348). Greedy: Hanna et al. 2024 (arXiv:2403.17806). Where
        keys and values are shared by a group of heads, one head in the circuit brings in its group's edges.
    """
    choice("how", how, ("top", "greedy"))
    graph, support = supports(scores, absolute=absolute, graph=graph)
    if (size is None) == (threshold is None):
        raise ValueError(f"pass one of size (got {size}) and threshold (got {threshold})")
    if threshold is not None:
        if how == "greedy":
            raise ValueError("how='greedy' needs a size; a threshold takes edges wherever they are: use how='top'")
        mask = graph.exists & (support >= threshold)
    else:
        assert size is not None
        mask = torch.zeros_like(graph.exists).flatten()
        mask[ranking(graph, support, how)[: edges_of(size, graph)]] = True
        mask = mask.view(graph.exists.shape)
    circuit = Circuit(graph, mask)
    return circuit.pruned() if prune else circuit


def edges_of(size: float | int, graph: Graph) -> int:
    """How many edges a size stands for."""
    n = graph.n_edges
    if isinstance(size, bool) or not np.isfinite(size) or (isinstance(size, float) and not 0 <= size <= 1):
        raise ValueError(f"size={size} must be a number of edges, or a share between 0.0 and 1.0")
    if not 0 <= size <= n:
        raise ValueError(f"size={size} is not between 0 and {n}, the number of edges of this graph")
    return int(size * n + 1e-9) if isinstance(size, float) else int(size)


def supports(
    scores: EdgeScores | xr.DataArray, *, absolute: bool, graph: Graph | None = None
) -> tuple[Graph, Float[Tensor, "writer reader"]]:
    """The graph and what edges are ranked by, larger being better; -inf where there is no edge."""
    if isinstance(scores, EdgeScores):
        graph, values = scores.graph, scores.summed()
        values = values * (-1 if scores.direction == "noise" else 1)
    elif isinstance(scores, xr.DataArray):
        if graph is None or set(scores.dims) != {"writer", "reader"}:
            raise ValueError(
                f"scores with dimensions {scores.dims} need (writer, reader), and graph= to say which edges exist"
            )
        values = scores
    else:
        raise ValueError(f"scores must be EdgeScores or an array (writer, reader), got {type(scores).__name__}")
    table = torch.tensor(values.transpose("writer", "reader").values)
    if table.shape != graph.exists.shape:
        raise ValueError(f"scores of shape {list(table.shape)} do not fit a graph of {list(graph.exists.shape)}")
    if missing := graph.edges(graph.exists & ~torch.isfinite(table)):
        raise ValueError(f"{len(missing)} edges have no finite score, for instance {missing[0]}")
    table = table.abs() if absolute else table
    return graph, torch.where(graph.exists, table, -torch.inf)


def ranking(graph: Graph, support: Float[Tensor, "writer reader"], how: Selection) -> list[int]:
    """Places of all edges in the flattened mask, in the order in which they are taken; ties by place."""
    if how == "top":
        order = support.flatten().argsort(descending=True, stable=True)
        return order[: graph.n_edges].tolist()
    keys, n_readers = (-support).tolist(), len(graph.readers)
    sources = [readers.nonzero().flatten().tolist() for readers in inputs(graph)]  # of every writer
    heap: list[tuple[float, int]] = []
    opened: set[int] = set()

    def open_reader(reader: int) -> None:
        if reader in opened:
            return
        opened.add(reader)
        for writer in range(len(graph.writers)):
            if keys[writer][reader] != torch.inf:
                heapq.heappush(heap, (keys[writer][reader], writer * n_readers + reader))

    open_reader(n_readers - 1)
    order = []
    while heap:
        _, place = heapq.heappop(heap)
        order.append(place)
        for reader in sources[place // n_readers]:
            open_reader(reader)
    return order


@functools.lru_cache(maxsize=16)
def inputs(graph: Graph) -> Bool[Tensor, "writer reader"]:
    """Which readers each writer is computed from. Not to be changed in place."""
    places = {name: i for i, name in enumerate(graph.readers)}
    found = torch.zeros_like(graph.exists)
    for i, writer in enumerate(graph.writers):
        for reader in graph.inputs_of(writer):
            found[i, places[reader]] = True
    return found
