"""The passes of attribution: batches of examples, activations of two runs, coefficients, scores of cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.patching._atp_star import (
    Drops,
    check_softmax,
    key_effects,
    patched_scores,
    query_effects,
    scores_name,
)
from interp.patching._backward import Graph, Key, Runner, by_cell, by_unit, wide
from interp.patching._batches import Split
from interp.patching._cells import Cells
from interp.patching._latent_sites import Change, LatentSite
from interp.patching._sites import width
from interp.patching.rules import Rules
from interp.types import SITES, Site

START: Key = ("resid_pre", 0)
LATENTS = "latents"  # with the place of a dictionary, a key of means


@dataclass
class Scores:
    """What the passes found, on the CPU.

    Attributes:
        values: Scores of cells, by site; for a dictionary those of its error are the last unit.
        base: The metric of the run that is patched.
        other: The metric of the other run.
        inputs: Scores at the stream entering block 0, summed over positions.
        slope: Sum of the absolute gradients at the logits, of one-shot methods only.
        spread: Standard deviation of the logits.
    """

    values: dict[Any, Float[Tensor, "layer spot unit example"]]
    base: Float[Tensor, "example"]
    other: Float[Tensor, "example"]
    inputs: Float[Tensor, "example"]
    slope: Float[Tensor, "example"]
    spread: Float[Tensor, "example"]


@dataclass(frozen=True)
class Passes:
    """Everything that is decided before a forward is run.

    Attributes:
        base: Tokens of the run that is patched.
        other: Tokens of the other run.
        value: What goes in.
        where: The cells of every site.
        rules: Backward rules; `Rules()` is the gradient.
        line: Points and weights of integrated gradients, None for one-shot methods.
        qk_fix: The sites, of q and k, whose saturation is repaired.
        grad_drop: Whether layers are dropped from the backward pass one at a time.
        latents: Dictionaries in their places, with the cells of each.
    """

    bridge: Any
    split: Split
    base: Int[Tensor, "example pos"]
    other: Int[Tensor, "example pos"]
    value: str
    where: dict[Site, Cells]
    rules: Rules
    line: tuple[list[float], list[float]] | None
    qk_fix: tuple[Site, ...]
    grad_drop: bool
    latents: tuple[tuple[LatentSite, Cells], ...] = ()

    @property
    def keys(self) -> tuple[Key, ...]:
        """The activations that are needed, in the order of the sites; the start of the graph is always one."""
        wanted: dict[Key, None] = {(site, layer): None for site, where in self.where.items() for layer in where.layers}
        for site in self.qk_fix:
            wanted.update({("pattern", layer): None for layer in self.where[site].layers})
        wanted.update({place.key: None for place, _ in self.latents})
        return tuple({START: None, **wanted})

    @property
    def inputs(self) -> list[str]:
        """What the dictionaries read."""
        return sorted({place.hook for place, _ in self.latents})

    @property
    def cost(self) -> dict[str, int]:
        """Passes of all examples; a forward for a gradient is one forward and one backward."""
        graphs = 1 if self.line is None else 1 + len(self.line[0])  # gradients along a line need the base's own run
        backwards = (len(self.line[0]) if self.line else 1) + (self.split.geometry.n_layers if self.grad_drop else 0)
        return {"forwards": 1 + graphs + len(self.qk_fix), "backwards": backwards}

    def row_bytes(self) -> int:
        """Memory of one row of a pass, estimated from above: the graph, what is kept of three runs, logits."""
        g, n_pos, item = self.split.geometry, self.base.shape[1], self.split.item
        block = 14 * g.d_model + 8 * g.d_mlp + 8 * g.n_heads * g.d_head + 6 * g.n_heads * n_pos
        block *= g.n_layers * (1 if self.rules == Rules() else 2)
        kept = 4 * sum(width(site, g, n_pos) for site, _ in self.keys if site in SITES)  # type: ignore[arg-type]
        kept += sum(6 * int(place.dictionary.n_latents) + 8 * place.width for place, _ in self.latents)
        kept += len(self.qk_fix) * 4 * g.n_layers * g.n_heads * n_pos  # scores; temporaries in float64 are of one layer
        fix = 80 * g.n_heads * n_pos * n_pos if self.qk_fix else 0
        n_logits = n_pos if self.split.reader.read is None else 1
        return item * (n_pos * (block + kept) + 5 * n_logits * g.d_vocab) + fix

    def check(self) -> None:
        """Raise unless the smallest batch fits."""
        self.split.check_backward(self.row_bytes(), "ask for fewer sites or layers, or ")

    def chunks(self) -> tuple[list[Tensor], int]:
        """Examples that are run together, and how many points of a line at a time."""
        return self.split.backward_chunks(len(self.base), self.row_bytes())

    def run(self, done: Callable[[int], Any]) -> Scores:
        """Everything; `done` is told how many examples were finished."""
        n = len(self.base)
        shapes: dict[Any, tuple[int, ...]] = {
            site: (len(w.layers), len(w.spots), _n_units(w), n) for site, w in self.where.items()
        }
        shapes |= {place.dictionary: (1, len(w.spots), _n_units(w) + 1, n) for place, w in self.latents}
        dtype = torch.promote_types(next(iter(self.bridge.original_model.parameters())).dtype, torch.float32)
        one = partial(torch.zeros, dtype=dtype)
        scores = Scores({site: one(shape) for site, shape in shapes.items()}, *(one(n) for _ in range(5)))
        runner = Runner(self.bridge, self.split.reader, self.keys, self.rules, self.split.device)
        chunks, at_once = self.chunks()
        means = self._means(runner, chunks, scores) if self.value == "mean" else {}
        for rows in chunks:
            self._chunk(runner, rows, at_once, means, scores)
            done(len(rows))
        return scores

    def _means(self, runner: Runner, chunks: list[Tensor], scores: Scores) -> dict[Key, Tensor]:
        """Means over examples of the other run, and its metric."""
        totals: dict[Key, Tensor] = {}
        for rows in chunks:
            other = runner.plain(self.other[rows], rows, extra=self.inputs)
            scores.other[rows] = other.scores.to(scores.other)
            latents = {(LATENTS, i): p.encode(other.extra[p.hook]) for i, (p, _) in enumerate(self.latents)}
            for key, tensor in (other.values | latents).items():
                totals[key] = totals.get(key, 0) + wide(tensor).sum(0)
        return {key: total / len(self.other) for key, total in totals.items()}

    def _chunk(self, runner: Runner, rows: Tensor, at_once: int, means: dict[Key, Tensor], scores: Scores) -> None:
        other: Graph | None = None
        if self.value != "mean":
            wanted = (self.keys, self.inputs) if self.value == "swap" else ((), ())
            other = runner.plain(self.other[rows], rows, *wanted)
            scores.other[rows] = other.scores.to(scores.other)
        drops = Drops(self.bridge)
        if self.line is None:
            extra = {scores_name(layer) for site in self.qk_fix for layer in self.where[site].layers}
            extra = sorted(extra | set(self.inputs))
            base = runner.graph(self.base[rows], rows, drops.attached() if self.grad_drop else None, extra)
            gradient, at_logits = base.gradients(keep=self.grad_drop)
            scores.slope[rows] = wide(at_logits).abs().flatten(1).sum(1).to(scores.slope)
            scores.spread[rows] = wide(base.logits.detach()).flatten(1).std(1).to(scores.spread)
        else:
            assert other is not None
            base = runner.plain(self.base[rows], rows, extra=self.inputs)
            gradient = self._along(runner, rows, base.values[START], other.values[START], at_once)
        scores.base[rows] = base.scores.detach().to(scores.base)

        def new(key: Key) -> Tensor:
            if self.value == "zero":
                return torch.zeros_like(base.values[key])
            return means[key].expand_as(base.values[key]) if other is None else other.values[key]

        def change(key: Key) -> Tensor:
            return wide(new(key)) - wide(base.values[key])

        fixed = self._fixed(base, new, rows) if self.qk_fix else {}
        changes = list(self._latent_changes(base, other, means))
        scores.inputs[rows] = by_unit("resid_pre", change(START), gradient[START]).sum((1, 2)).to(scores.inputs)
        if not self.grad_drop:
            for site, layer, found in self._cells(change, changes, gradient, fixed, rows):
                scores.values[site][layer, ..., rows] = found.to(scores.values[site])
            return
        n_layers = self.split.geometry.n_layers
        for dropped in range(n_layers):
            drops.layer = dropped
            gradient, _ = base.gradients(keep=dropped + 1 < n_layers)
            for site, layer, found in self._cells(change, changes, gradient, fixed, rows):
                scores.values[site][layer, ..., rows] += found.abs().to(scores.values[site]) / (n_layers - 1)

    def _cells(
        self,
        change: Callable[[Key], Tensor],
        changes: list[Change],
        gradient: dict[Key, Tensor],
        fixed: dict[Key, Callable[[Tensor], Tensor]],
        rows: Tensor,
    ) -> Iterator[tuple[Any, int, Float[Tensor, "spot unit row"]]]:
        """Scores of every site, and of each of its layers by place in the result."""
        for site, where in self.where.items():
            for index, layer in enumerate(where.layers):
                key: Key = (site, layer)
                if key in fixed:
                    units = fixed[key](gradient["pattern", layer])
                else:
                    units = by_unit(site, change(key), gradient[key])
                yield site, index, by_cell(units, where, rows)
        for (place, where), moved in zip(self.latents, changes, strict=True):
            units = place.scores(moved, wide(gradient[place.key]), together=where.units is None)
            yield place.dictionary, 0, torch.einsum("srp,rpu->sur", where.spots[:, rows].to(units), units)

    def _latent_changes(self, base: Graph, other: Graph | None, means: dict[Key, Tensor]) -> Iterator[Change]:
        """What goes in minus what the run has, for every dictionary."""
        for i, (place, _) in enumerate(self.latents):
            x, own = base.extra[place.hook], base.values[place.key]
            if other is None:
                mean = means[LATENTS, i]
                yield place.change(x, own, mean.expand(len(x), *mean.shape), means[place.key].expand_as(own))
            elif self.value == "zero":
                yield place.change(x, own, torch.zeros_like(place.encode(x)), None)
            else:
                yield place.change(x, own, place.encode(other.extra[place.hook]), other.values[place.key])

    def _along(self, runner: Runner, rows: Tensor, base: Tensor, other: Tensor, at_once: int) -> dict[Key, Tensor]:
        """Weighted mean of the gradients in runs that enter block 0 on the line from `base` to `other`."""
        assert self.line is not None
        total: dict[Key, Tensor] = {}
        points = torch.tensor(self.line[0], dtype=torch.float64).split(at_once)
        weights = torch.tensor(self.line[1], dtype=torch.float64).split(at_once)
        for point, weight in zip(points, weights, strict=True):
            along = point.to(wide(base)).view(-1, 1, 1, 1)
            stream = torch.lerp(wide(base).unsqueeze(0), wide(other).unsqueeze(0), along).to(base.dtype).flatten(0, 1)
            graph = runner.graph(stream, rows.repeat(len(point)))
            found, _ = graph.gradients(weight.repeat_interleave(len(rows)))
            for key, gradient in found.items():
                total[key] = total.get(key, 0) + wide(gradient).unflatten(0, (len(point), -1)).sum(0)
        return total

    def _fixed(self, base: Graph, new: Callable[[Key], Tensor], rows: Tensor) -> dict[Key, Callable[[Tensor], Tensor]]:
        """For queries and keys, their score by position and unit as a function of the gradient at the pattern."""
        found: dict[Key, Callable[[Tensor], Tensor]] = {}
        kv_heads = self.split.geometry.n_kv_heads
        for site in self.qk_fix:
            layers = self.where[site].layers
            patterns = {layer: base.values["pattern", layer] for layer in layers}
            for layer in layers:
                check_softmax(base.extra[scores_name(layer)], patterns[layer], layer)
            replaced = {layer: new((site, layer)) for layer in layers}
            tokens = self.base[rows].to(self.split.device)
            for layer, patched in patched_scores(self.bridge, tokens, site, replaced, patterns).items():
                scores = base.extra[scores_name(layer)]
                effects = query_effects if site == "q" else partial(key_effects, n_kv_heads=kv_heads)
                found[site, layer] = partial(_of_gradient, effects, scores, patched)
        return found


def _n_units(where: Cells) -> int:
    return 1 if where.units is None else len(where.units)


def _of_gradient(effects: Callable[..., Tensor], scores: Tensor, patched: Tensor, gradient: Tensor) -> Tensor:
    return effects(scores, patched, gradient)
