"""The graph of a model: who writes into the residual stream, who reads it, and which of them are connected.

Everything a transformer computes goes through its stream, so that a reader's input is the sum of what was written
below it. A pair of a writer and a reader is an edge wherever the writer's output is in the stream that the reader
reads.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.models import geometry

Part: TypeAlias = Literal["input", "head", "mlp", "q", "k", "v", "logits"]
"""What a writer (`input`, `head`, `mlp`) or a reader (`q`, `k`, `v`, `mlp`, `logits`) is."""


@dataclass(frozen=True)
class Node:
    """A writer or a reader: its kind, its layer (-1 for the input, `n_layers` for the logits), its head (0 if none)."""

    part: Part
    layer: int
    head: int = 0


@dataclass(frozen=True)
class Graph:
    """Writers, readers and edges of a model, by name and by place.

    Writers are `input` (what enters block 0), `a{layer}.h{head}` (a query head's output) and `m{layer}` (an MLP's).
    Readers are `a{layer}.h{head}<q>`, `a{layer}.h{kv_head}<k>` and `<v>` (one for each key-value head, which the
    queries of its group share), `m{layer}` and `logits`. An edge is called `"a0.h1->m2"` or `"input->a1.h0<q>"`. Both
    are listed in the order in which the model computes them.

    Attributes:
        n_layers, n_heads, n_kv_heads: Sizes of the model; `n_kv_heads` divides `n_heads`.
        parallel: Attention and MLP of a block read the same stream, so that no edge joins them.

    Example:
        >>> graph = interp.patching.graph_of(bridge)
        >>> graph.n_edges, graph.edges()[:2]
        >>> mask = graph.mask(["input->m0", "m0->logits"])  # Bool[writer, reader]
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool

    def __post_init__(self) -> None:
        sizes = (self.n_layers, self.n_heads, self.n_kv_heads)
        if min(sizes) < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_layers, n_heads, n_kv_heads = {sizes} must be at least 1, and n_kv_heads must divide n_heads"
            )

    @property
    def group(self) -> int:
        """Query heads that share a key-value head."""
        return self.n_heads // self.n_kv_heads

    @cached_property
    def writer_nodes(self) -> tuple[Node, ...]:
        """Kind, layer and head of every writer."""
        nodes = [Node("input", -1)]
        for layer in range(self.n_layers):
            nodes += [*(Node("head", layer, head) for head in range(self.n_heads)), Node("mlp", layer)]
        return tuple(nodes)

    @cached_property
    def reader_nodes(self) -> tuple[Node, ...]:
        """Kind, layer and head of every reader."""
        nodes: list[Node] = []
        for layer in range(self.n_layers):
            nodes += [Node("q", layer, head) for head in range(self.n_heads)]
            nodes += [Node("k", layer, head) for head in range(self.n_kv_heads)]
            nodes += [Node("v", layer, head) for head in range(self.n_kv_heads)]
            nodes += [Node("mlp", layer)]
        return (*nodes, Node("logits", self.n_layers))

    @cached_property
    def writers(self) -> tuple[str, ...]:
        """Names of the writers."""
        return tuple(_name(node) for node in self.writer_nodes)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers."""
        return tuple(_name(node) for node in self.reader_nodes)

    @cached_property
    def exists(self) -> Bool[Tensor, "writer reader"]:
        """Whether the writer's output is in the stream that the reader reads. Not to be changed in place."""
        written = torch.tensor([self._depth(node, wrote=True) for node in self.writer_nodes])
        read = torch.tensor([self._depth(node, wrote=False) for node in self.reader_nodes])
        return written.unsqueeze(1) <= read

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return int(self.exists.sum())

    def edges(self, mask: Bool[Tensor, "writer reader"] | None = None) -> list[str]:
        """Names of all edges, or of those in a mask (an edge that does not exist is refused)."""
        if mask is None:
            mask = self.exists
        else:
            self.check(mask)
        return [f"{self.writers[writer]}->{self.readers[reader]}" for writer, reader in mask.nonzero().tolist()]

    def mask(self, edges: Iterable[str]) -> Bool[Tensor, "writer reader"]:
        """A new mask that is true at these edges; `*` stands for anything: `"a0.h1->*"`, `"*->m2"`.

        Raises ValueError for a name that is no edge of this graph, or a pattern that matches none.
        """
        mask = torch.zeros_like(self.exists)
        for edge in [edges] if isinstance(edges, str) else edges:
            if "*" not in edge:
                mask[self.place(edge)] = True
                continue
            matched = [name for name in self.edges() if fnmatch.fnmatchcase(name, edge)]
            if not matched:
                raise ValueError(
                    f"no edge of this graph matches {edge!r}; the edges are called like {self.edges()[0]!r}"
                )
            for name in matched:
                mask[self.place(name)] = True
        return mask

    def check(self, mask: Bool[Tensor, "writer reader"]) -> None:
        """Raise ValueError unless the mask is of this graph's shape and true at existing edges only."""
        if mask.shape != self.exists.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"a mask of edges is Bool{list(self.exists.shape)} [writer, reader] for this graph, got "
                f"{mask.dtype} {list(mask.shape)}; graph.mask(names) makes one"
            )
        if wrong := (mask.cpu() & ~self.exists).nonzero().tolist():
            writer, reader = wrong[0]
            raise ValueError(
                f"{self._absent(self.writers[writer], self.readers[reader])} ({len(wrong)} such in the mask)"
            )

    def place(self, edge: str) -> tuple[int, int]:
        """Places of an edge's writer and reader: `scores[..., writer, reader]` of anything that has these axes."""
        writer, arrow, reader = edge.partition("->")
        if not arrow:
            raise ValueError(f"edge {edge!r} has no '->'; an edge is called like {self.edges()[0]!r}")
        found = self._index("writer", self._writer_places, writer), self._index("reader", self._reader_places, reader)
        if not self.exists[found]:
            raise ValueError(self._absent(writer, reader))
        return found

    def feeds(self, reader: str) -> tuple[str, ...]:
        """The writers whose output is computed from this reader: a head from its queries, the heads of a group from
        their keys and values, an MLP from its input; nothing from the logits."""
        node = self.reader_nodes[self._index("reader", self._reader_places, reader)]
        if node.part == "logits":
            return ()
        if node.part in ("k", "v"):
            first = node.head * self.group
            return tuple(_name(Node("head", node.layer, head)) for head in range(first, first + self.group))
        return (_name(Node("head" if node.part == "q" else "mlp", node.layer, node.head)),)

    def inputs_of(self, writer: str) -> tuple[str, ...]:
        """The readers from which this writer's output is computed: the inverse of `feeds`."""
        node = self.writer_nodes[self._index("writer", self._writer_places, writer)]
        if node.part == "input":
            return ()
        if node.part == "mlp":
            return (writer,)
        kv_head = node.head // self.group
        parts: list[Node] = [Node("q", node.layer, node.head), Node("k", node.layer, kv_head)]
        return tuple(_name(part) for part in [*parts, Node("v", node.layer, kv_head)])

    @cached_property
    def _writer_places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.writers)}

    @cached_property
    def _reader_places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.readers)}

    def _depth(self, node: Node, *, wrote: bool) -> int:
        """Moments at which the stream is written and read: an edge goes from a moment to the same or a later one."""
        if node.part in ("input", "logits"):
            return 0 if wrote else 2 * self.n_layers
        if node.part == "mlp":
            return 2 * node.layer + (2 if wrote else 0 if self.parallel else 1)
        return 2 * node.layer + ((2 if self.parallel else 1) if wrote else 0)

    def _absent(self, writer: str, reader: str) -> str:
        why = " (attention and MLP of a block run in parallel here)" if self.parallel else ""
        return f"there is no edge {writer}->{reader}: the stream that {reader} reads is before {writer}{why}"

    def _index(self, kind: str, places: dict[str, int], name: str) -> int:
        if name not in places:
            near = difflib.get_close_matches(name, places, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            listed = list(places)
            raise ValueError(f"no {kind} {name!r}{hint} The {kind}s are {', '.join(listed[:6])}, ..., {listed[-1]}")
        return places[name]


def graph_of(bridge: Any) -> Graph:
    """The graph of a model. Costs no forward once the model's geometry is known."""
    shape = geometry(bridge)
    return Graph(shape.n_layers, shape.n_heads, shape.n_kv_heads, shape.parallel)


def _name(node: Node) -> str:
    if node.part in ("input", "logits"):
        return node.part
    if node.part == "mlp":
        return f"m{node.layer}"
    return f"a{node.layer}.h{node.head}" + ("" if node.part == "head" else f"<{node.part}>")
