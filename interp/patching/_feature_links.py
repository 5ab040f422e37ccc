"""Passes of feature edges: what a node makes of another along paths that go through no other dictionary.

Every activation with a dictionary is cut: what comes in is kept with its graph, and a copy without one goes on. The
graph of what comes in then reaches back to the copies before it and no further, which is the stop-gradient at all nodes
between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp import hooks
from interp.patching._backward import Graph, Runner, wide
from interp.patching._feature_lines import LinePasses
from interp.patching._latent_sites import Change, LatentSite
from interp.patching._passes import Scores
from interp.patching.rules import backward_rules

ERROR_UNIT = -1
Cell = tuple[int, int, int]
"""Place among the dictionaries, spot, and unit (`ERROR_UNIT` for the error)."""


@dataclass
class Cut:
    """A forward that was cut at every dictionary.

    Attributes:
        came: What came in at each target, with its graph.
        went: The copy that went on, in whose terms everything above is.
        read: What dictionaries that rebuild another hook read, with its graph.
    """

    came: dict[str, Tensor] = field(default_factory=dict)
    went: dict[str, Tensor] = field(default_factory=dict)
    read: Mapping[str, Tensor] = field(default_factory=dict)


@contextmanager
def cutting(runner: Runner, places: list[LatentSite]) -> Iterator[Cut]:
    """Every forward inside is cut at the targets of these dictionaries, and obeys the rules."""
    cut = Cut()

    def edit_of(name: str) -> Callable[[Tensor], Tensor]:
        def edit(tensor: Tensor) -> Tensor:
            cut.came[name] = tensor
            cut.went[name] = tensor.detach().requires_grad_()
            return cut.went[name]

        return edit

    early = {p.target: edit_of(p.target) for p in places if p.site in ("q", "k", "v")}  # before the factors of rules
    late = {p.target: edit_of(p.target) for p in places if p.target not in early}
    with ExitStack() as stack:
        stack.enter_context(hooks.interventions(runner.bridge, early))
        stack.enter_context(backward_rules(runner.bridge, runner.rules))
        stack.enter_context(hooks.interventions(runner.bridge, late))
        cut.read = stack.enter_context(
            hooks.reads(runner.bridge, [place.hook for place in places if place.hook != place.target])
        )
        yield cut


@dataclass(frozen=True)
class LinkPasses(LinePasses):
    """Edges among some nodes; `latents` are all dictionaries with all their latents, in the order of computation.

    Where `line` is set, the coefficients of downstream nodes are mean gradients along lines.

    Attributes:
        nodes: The nodes, in the order of computation.
    """

    nodes: tuple[Cell, ...] = ()

    @property
    def cost(self) -> dict[str, int]:
        """Passes of all examples; forwards of edges stop at the block of the downstream node."""
        points = 1 if self.line is None else len(self.latents) * len(self.line[0])
        plain = 1 if self.line is None else 2
        first = min(k for k, _, _ in self.nodes)
        into = sum(k > first for k, _, _ in self.nodes)
        return {"forwards": plain + points + 1 + into, "backwards": points + 1 + into}

    @property
    def places(self) -> list[LatentSite]:
        return [place for place, _ in self.latents]

    def links(self, done: Callable[[int], Any]) -> tuple[Tensor, Tensor, Scores]:
        """Edges [upstream, downstream, example], those into the metric last, NaN where there is none; the scores of the
        nodes; and the metrics of the runs."""
        n, parameter = len(self.base), next(iter(self.bridge.original_model.parameters()))
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        edges = torch.full((len(self.nodes), len(self.nodes) + 1, n), torch.nan, dtype=dtype)
        own = torch.zeros(len(self.nodes), n, dtype=dtype)
        scores = Scores({}, *(torch.zeros(n, dtype=dtype) for _ in range(5)))
        runner = Runner(self.bridge, self.split.reader, self.keys, self.rules, self.split.device)
        chunks, at_once = self.chunks()
        means = self._means(runner, chunks, scores) if self.value == "mean" else {}
        for rows in chunks:
            self._linked(runner, rows, at_once, means, scores, edges, own)
            done(len(rows))
        return edges, own, scores

    def _linked(
        self, runner: Runner, rows: Tensor, at_once: int, means: Any, scores: Scores, edges: Tensor, own: Tensor
    ) -> None:
        other: Graph | None = None
        if self.value != "mean":
            wanted = (self.keys, self.inputs) if self.value == "swap" else ((), ())
            other = runner.plain(self.other[rows], rows, *wanted)
            scores.other[rows] = other.scores.to(scores.other)
        if self.line is None:
            base = runner.graph(self.base[rows], rows, extra=self.inputs)
            gradient, _ = base.gradients()
            coefficients = [wide(gradient[place.key]) for place in self.places]
        else:
            base = runner.plain(self.base[rows], rows, extra=self.inputs)
            ends = [(place, self._end(place, base, other, means)) for place in self.places]
            coefficients = [self._along_activation(runner, rows, p, base, end, at_once) for p, end in ends]
        scores.base[rows] = base.scores.detach().to(scores.base)
        changes = list(self._latent_changes(base, other, means))
        every = range(len(self.nodes))
        own[:, rows] = self._products(coefficients, changes, rows, every).to(own)
        tokens = self.base[rows].to(self.split.device)
        with cutting(runner, self.places) as cut:
            total = runner._score(runner._logits(tokens, rows), rows).sum()
        found = _back(total, [cut.went[place.target] for place in self.places])
        edges[:, -1, rows] = self._products(found, changes, rows, every).to(edges)
        for k in range(1, len(self.places)):
            before = [j for j in every if self.nodes[j][0] < k]
            mine = torch.tensor([j for j in every if self.nodes[j][0] == k])
            for some in mine.split(at_once) if before and len(mine) else ():
                found = self._into(runner, k, some.tolist(), tokens, rows, coefficients[k], changes[k])
                for i, node in enumerate(some.tolist()):
                    gradients = [gradient.unflatten(0, (len(some), -1))[i] for gradient in found]
                    part = self._products(gradients, changes, rows, before)
                    edges[torch.tensor(before)[:, None], node, rows] = part.to(edges)

    def _into(
        self,
        runner: Runner,
        k: int,
        nodes: list[int],
        tokens: Tensor,
        rows: Tensor,
        coefficient: Tensor,
        change: Change,
    ) -> list[Tensor]:
        """Gradients, at every activation before, of the coefficient of each node times the node: [node x row, ...]."""
        place, copies = self.places[k], len(nodes)
        stop = hooks.stop_layer(self.bridge, place.names)
        options: dict[str, Any] = {"logits_to_keep": 1} if stop is None else {"stop_at_layer": stop}
        with cutting(runner, self.places[: k + 1]) as cut:
            self.bridge(tokens.repeat(copies, 1), use_cache=False, **options)
        came = cut.came[place.target].flatten(2)
        x = came if place.hook == place.target else cut.read[place.hook].flatten(2)
        latents = wide(place.dictionary.encode(x)).unflatten(0, (copies, -1))
        whole = wide(came).unflatten(0, (copies, -1))
        # a latent counts with what it gives to the rebuilt activation, times the coefficient of that
        weights = coefficient.flatten(2) @ place.directions.to(coefficient).T
        weights = weights if change.scale is None else weights * change.scale.to(weights)
        total: Any = 0
        for i, node in enumerate(nodes):
            unit = self.nodes[node][2]
            if unit == ERROR_UNIT:  # all that the latents do not carry
                each = (whole[i] * coefficient.flatten(2)).sum(-1) - (latents[i] * weights).sum(-1)
            else:
                each = latents[i, ..., unit] * weights[..., unit]
            total = total + (each * self._where(node, rows)).sum()
        return _back(total, [cut.went[before.target] for before in self.places[:k]])

    def _products(
        self, gradients: list[Tensor], changes: list[Change], rows: Tensor, nodes: Iterable[int]
    ) -> Float[Tensor, "node row"]:
        """Gradient times change of these nodes."""
        units: dict[int, Tensor] = {}
        found = []
        for node in nodes:
            k, _, unit = self.nodes[node]
            if k not in units:  # [row, pos, unit], the error last
                units[k] = self.places[k].scores(changes[k], gradients[k], together=False)
            found.append((units[k][..., unit] * self._where(node, rows)).sum(-1))
        return torch.stack(found).detach().cpu()

    def _where(self, node: int, rows: Tensor) -> Float[Tensor, "row pos"]:
        k, spot, _ = self.nodes[node]
        return self.latents[k][1].spots[spot, rows].to(self.split.device, torch.float32)


def _back(total: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients at these copies, zero where no path leads."""
    found: Any = [None] * len(leaves)
    if total.requires_grad:
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else wide(g) for leaf, g in zip(leaves, found, strict=True)]
