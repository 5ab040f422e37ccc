"""The passes of edge attribution: what writers would change in the stream, against the gradients of its readers.

A reader's input is the stream, so the gradient at its input is that at its queries, keys, values or MLP input taken
back through its matrix and norm: no reader needs an input of its own, and no writer an output of its own. Writers and
readers are stacked, and contracted layer by layer for a block of positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import hooks
from interp.patching._backward import Key, Runner, by_unit, key_name, metric_name, no_gradient, wide
from interp.patching._batches import Split
from interp.patching._edge_parts import Block, pull, push
from interp.patching._passes import START, Scores
from interp.patching.graph import Graph
from interp.patching.rules import Rules, backward_rules

ENTRY = hooks.hook_name("resid_pre", 0)
HEADS: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
_CPU_BLOCK = 2**26  # bytes of stacked writers and readers that a CPU still contracts fast


@dataclass(frozen=True)
class Pass:
    """A forward and backward: gradients (summed scores, weighted), activations by hook name, and the metric."""

    gradients: dict[str, Tensor]
    values: dict[str, Tensor]
    scores: Tensor
    logits: Tensor
    at_logits: Tensor


@dataclass(frozen=True)
class EdgeRunner(Runner):
    """Forwards of some rows; with a gradient at the input of every reader. `Runner.keys` are the writers."""

    blocks: list[Block]

    def backward(self, start: Tensor, rows: Tensor, weights: Tensor | None = None) -> Pass:
        """From token ids or streams that enter block 0: gradients of the sum of the scores, each times its weight."""
        early, late = self._taps()
        reads = [name for block in self.blocks for name in (block.attn_in, block.mlp_in, block.post_in) if name]
        with ExitStack() as stack:
            # the factors of the rules on queries, keys and values belong to the reader's coefficient: tapped before
            taps = [stack.enter_context(hooks.taps(self.bridge, early))]
            stack.enter_context(backward_rules(self.bridge, self.rules))
            taps.append(stack.enter_context(hooks.taps(self.bridge, late)))
            writers = [key_name(key) for key in self.keys]
            values = stack.enter_context(hooks.reads(self.bridge, list(dict.fromkeys([*reads, *writers]))))
            logits = self._logits(start.to(self.device), rows)
        scores = self._score(logits, rows)
        if not scores.requires_grad:
            raise ValueError(no_gradient(metric_name(self.reader.metric)))
        tapped = {name: found[name] for names, found in zip((early, late), taps, strict=True) for name in names}
        total = scores.sum() if weights is None else (scores * weights.to(scores)).sum()
        *found, at_logits = torch.autograd.grad(total, [*tapped.values(), logits], allow_unused=True)
        gradients = dict(zip(tapped, found, strict=True))
        if unused := [name for name, gradient in gradients.items() if gradient is None]:
            raise ValueError(
                f"the metric does not depend on {', '.join(unused[:4])} through the computation of "
                f"{self.bridge.cfg.model_name}, so its edges have no scores; use interp.patching.attribution_patch"
            )
        return Pass(gradients, {name: tensor.detach() for name, tensor in values.items()}, scores.detach(),
                    logits.detach(), at_logits)  # fmt: skip

    def _taps(self) -> tuple[list[str], list[str]]:
        """Hooks of the readers' inputs; those of queries and keys are left out where the rules hold the pattern."""
        last = len(self.blocks) - 1
        parts = HEADS[2:] if self.rules.attention == "AH" else HEADS
        early = [hooks.hook_name(part, layer) for layer in range(last + 1) for part in parts]
        inputs = [block.mlp_input for block in self.blocks if block.mlp_norm is not None]
        return early, [ENTRY, *inputs, hooks.hook_name("resid_post", last)]


@dataclass(frozen=True)
class EdgePasses:
    """Everything that is decided before a forward is run.

    Attributes:
        base: Tokens of the run that is patched.
        other: Tokens of the other run.
        value: What goes in.
        spots: Positions by coordinate of `pos`, one in each example.
        per_position: Whether scores are kept by position; else those of the positions in `spots` are summed.
        rules: Backward rules; `Rules()` is the gradient.
        line: Points and weights of integrated gradients, None for one-shot methods.
    """

    bridge: Any
    graph: Graph
    blocks: list[Block]
    split: Split
    base: Int[Tensor, "example pos"]
    other: Int[Tensor, "example pos"]
    value: str
    spots: Bool[Tensor, "spot example pos"]
    per_position: bool
    rules: Rules
    line: tuple[list[float], list[float]] | None

    @property
    def keys(self) -> tuple[Key, ...]:
        """Outputs of the writers; the start of the graph is the first."""
        heads: list[Key] = [("z", layer) for layer in range(len(self.blocks))]
        mlps: list[Key] = [("mlp_out", i) for i, block in enumerate(self.blocks) if block.mlp_norm is not None]
        return (START, *heads, *mlps)

    @property
    def cost(self) -> dict[str, int]:
        """Passes of all examples; a forward for a gradient is one forward and one backward."""
        points = 0 if self.line is None else len(self.line[0])
        return {"forwards": 2 + points, "backwards": points or 1}

    def row_bytes(self) -> int:
        """Memory of one row of a pass, estimated from above: the graph, what is kept of three runs, logits."""
        g, n_pos, item = self.split.geometry, self.base.shape[1], self.split.item
        block = 14 * g.d_model + 8 * g.d_mlp + 8 * g.n_heads * g.d_head + 6 * g.n_heads * n_pos
        block *= g.n_layers * (1 if self.rules == Rules() else 2)
        kept = 4 * g.n_layers * (4 * g.d_model + 4 * g.n_heads * g.d_head)
        n_logits = n_pos if self.split.reader.read is None else 1
        scores = len(self.graph.writers) * 4 * (3 * g.n_heads + 1) * (len(self.spots) if self.per_position else 1)
        return item * (n_pos * (block + kept) + 5 * n_logits * g.d_vocab) + 4 * scores

    def check(self) -> None:
        """Raise unless the smallest batch fits."""
        self.split.check_backward(self.row_bytes() + self._position_bytes())

    def chunks(self) -> tuple[list[Tensor], int]:
        """Examples that are run together, and how many points of a line at a time."""
        return self.split.backward_chunks(len(self.base), 2 * self.row_bytes())

    def run(self, done: Callable[[int], Any]) -> tuple[Float[Tensor, "writer reader spot example"], Scores]:
        """Scores of edges (NaN where there is none) and what is known of the runs, on the CPU."""
        n, parameter = len(self.base), next(iter(self.bridge.original_model.parameters()))
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        scores = Scores({}, *(torch.zeros(n, dtype=dtype) for _ in range(5)))
        spots = len(self.spots) if self.per_position else 1
        edges = torch.zeros(len(self.graph.writers), len(self.graph.readers), spots, n, dtype=dtype)
        runner = EdgeRunner(self.bridge, self.split.reader, self.keys, self.rules, self.split.device, self.blocks)
        chunks, at_once = self.chunks()
        means = self._means(runner, chunks, scores) if self.value == "mean" else {}
        for rows in chunks:
            self._chunk(runner, rows, at_once, means, scores, edges)
            done(len(rows))
        edges[~self.graph.exists] = torch.nan
        return edges, scores

    def _means(self, runner: EdgeRunner, chunks: list[Tensor], scores: Scores) -> dict[Key, Tensor]:
        """Means over examples of the other run, and its metric."""
        totals: dict[Key, Tensor] = {}
        for rows in chunks:
            other = runner.plain(self.other[rows], rows)
            scores.other[rows] = other.scores.to(scores.other)
            for key, tensor in other.values.items():
                totals[key] = totals.get(key, 0) + wide(tensor).sum(0)
        return {key: total / len(self.other) for key, total in totals.items()}

    def _chunk(
        self, runner: EdgeRunner, rows: Tensor, at_once: int, means: dict[Key, Tensor], scores: Scores, edges: Tensor
    ) -> None:
        new: dict[Key, Tensor] = means
        if self.value != "mean":
            other = runner.plain(self.other[rows], rows, self.keys if self.value == "swap" else ())
            scores.other[rows] = other.scores.to(scores.other)
            new = other.values

        def changes(base: dict[Key, Tensor]) -> dict[Key, Tensor]:
            return {key: (wide(new[key]) if new else 0) - wide(base[key]) for key in self.keys}

        if self.line is None:
            found = runner.backward(self.base[rows], rows)
            change = changes({key: found.values[key_name(key)] for key in self.keys})
            scores.base[rows] = found.scores.to(scores.base)
            scores.slope[rows] = wide(found.at_logits).abs().flatten(1).sum(1).to(scores.slope)
            scores.spread[rows] = wide(found.logits).flatten(1).std(1).to(scores.spread)
            self._add(found, change, rows, scores, edges)
            return
        base = runner.plain(self.base[rows], rows)
        scores.base[rows] = base.scores.detach().to(scores.base)
        change = changes(base.values)
        entered, end = wide(base.values[START]), wide(new[START])
        points = torch.tensor(self.line[0], dtype=torch.float64).split(at_once)
        weights = torch.tensor(self.line[1], dtype=torch.float64).split(at_once)
        for point, weight in zip(points, weights, strict=True):
            along = torch.lerp(entered.unsqueeze(0), end.unsqueeze(0), point.to(entered).view(-1, 1, 1, 1))
            stream = along.to(base.values[START].dtype).flatten(0, 1)
            found = runner.backward(stream, rows.repeat(len(point)), weight.repeat_interleave(len(rows)))
            self._add(found, change, rows, scores, edges)

    def _add(self, found: Pass, change: dict[Key, Tensor], rows: Tensor, scores: Scores, edges: Tensor) -> None:
        """Add the scores of these rows, whose gradients may be of several points of a line."""
        n = len(rows)
        start = found.gradients[ENTRY]
        summed = wide(start).unflatten(0, (-1, n)).sum(0)
        scores.inputs[rows] += by_unit("resid_pre", change[START], summed).sum((1, 2)).to(scores.inputs)
        used = self.spots[:, rows].any(1).any(0).nonzero().squeeze(-1)  # positions that some spot has in some example
        budget = self.split.memory_budget // 2
        if self.split.device.type == "cpu":
            budget = min(budget, _CPU_BLOCK)
        for where in used.split(max(1, budget // max(1, len(start) * self._position_bytes()))):
            at = where.to(start.device)
            spots = self.spots[:, rows][:, :, where].to(summed)  # [spot, row, pos]
            for first, writers, scored in self._contracted(found, change, at, spots, n):
                edges[:writers, first : first + scored.shape[2], :, rows] += scored.permute(1, 2, 3, 0).to(edges)

    def _position_bytes(self) -> int:
        """Memory of the stacked writers and one layer's readers, of one position of one row."""
        g = self.split.geometry
        readers = 4 * (g.n_heads + 2 * g.n_kv_heads + 1)  # with what taking a norm back needs
        return max(4, self.split.item) * g.d_model * (len(self.graph.writers) + readers)

    def _contracted(
        self, found: Pass, change: dict[Key, Tensor], at: Tensor, spots: Tensor, n: int
    ) -> Iterator[tuple[int, int, Float[Tensor, "row writer reader spot"]]]:
        """Scores [row, writer, reader, spot] for readers from a place on, and how many writers they read."""
        written = self._written(found, change, at)
        counts = self.graph.exists.sum(0).tolist()
        place = 0
        for gradients in self._read(found, at):
            gradients = gradients.unflatten(0, (-1, n))
            if len(written) == n:
                gradients = gradients.sum(0, keepdim=True)
            writers = counts[place]
            stacked = written[:, :writers].unflatten(0, (-1, n))
            if self.per_position:
                by_pos = torch.einsum("xnwpd,xnrpd->npwr", stacked, gradients)
                scored = torch.einsum("npwr,snp->nwrs", by_pos, spots)
            else:
                gradients = gradients * spots.amax(0).view(n, 1, -1, 1)
                scored = torch.einsum("xnwpd,xnrpd->nwr", stacked, gradients).unsqueeze(-1)
            yield place, writers, scored.cpu()
            place += gradients.shape[2]

    def _written(self, found: Pass, change: dict[Key, Tensor], at: Tensor) -> Float[Tensor, "row writer pos d_model"]:
        """What each writer would change in the stream, at some positions.

        Of each run that has a gradient in models with post-norms, which are linearised there; else of each example.
        """
        post = any(block.post_norm is not None for block in self.blocks)
        repeats = len(found.gradients[ENTRY]) // len(change[START]) if post else 1
        parts = [change[START][:, at].unsqueeze(1).repeat(repeats, 1, 1, 1)]
        for layer, block in enumerate(self.blocks):
            heads = torch.einsum("nphe,hed->nhpd", change["z", layer][:, at], block.weight("z"))
            heads = heads.repeat(repeats, 1, 1, 1)
            if block.post_norm is not None and block.post_in is not None:
                heads = push(block.post_norm, found.values[block.post_in][:, at], heads)
            mlp = change[("mlp_out", layer)] if block.mlp_norm is not None else torch.zeros_like(change[START])
            parts += [heads, mlp[:, at].unsqueeze(1).repeat(repeats, 1, 1, 1)]
        return torch.cat(parts, 1)

    def _read(self, found: Pass, at: Tensor) -> Iterator[Float[Tensor, "run reader pos d_model"]]:
        """Gradients [run, reader, pos, d_model] at the stream, by attention, MLP and logits, in the graph's order."""
        for layer, block in enumerate(self.blocks):
            parts = []
            for name in HEADS:
                gradient = found.gradients.get(hooks.hook_name(name, layer))
                matrix = block.weight(name)
                if gradient is None:  # the pattern is held: nothing flows back to queries and keys
                    values = found.gradients[hooks.hook_name("v", layer)]
                    gradient = values.new_zeros(*values.shape[:2], len(matrix), values.shape[-1])
                parts.append(torch.einsum("nphe,hde->nhpd", wide(gradient)[:, at], matrix))
            yield pull(block.attn_norm, found.values[block.attn_in][:, at], torch.cat(parts, 1))
            stream = found.values[block.mlp_in][:, at]
            if block.mlp_norm is None:
                yield torch.zeros_like(wide(stream)).unsqueeze(1)
            else:
                yield pull(block.mlp_norm, stream, wide(found.gradients[block.mlp_input])[:, at].unsqueeze(1))
        yield wide(found.gradients[hooks.hook_name("resid_post", len(self.blocks) - 1)])[:, at].unsqueeze(1)
