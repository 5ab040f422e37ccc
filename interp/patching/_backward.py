"""Forwards that keep activations, the backward passes that give their coefficients, and the product of the two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import hooks
from interp.hooks import SITE_HOOKS
from interp.patching._cells import Cells
from interp.patching._resume import Reader
from interp.patching._sites import canonical
from interp.patching.rules import Rules, backward_rules
from interp.types import Site

Key: TypeAlias = tuple[str, int]
"""A site and a layer; or the name of a hook that is no site, and its layer."""


@dataclass(frozen=True)
class Graph:
    """A forward that can be differentiated, any number of times.

    Attributes:
        taps: What each key's gradient is taken with respect to.
        values: The activations, detached.
        logits: Those the metric read.
        scores: The metric, by row.
        extra: Further activations by name, detached.
    """

    taps: dict[Key, Tensor]
    values: dict[Key, Tensor]
    logits: Tensor
    scores: Float[Tensor, "row"]
    extra: dict[str, Tensor] = field(default_factory=dict)

    def gradients(self, weights: Tensor | None = None, *, keep: bool = False) -> tuple[dict[Key, Tensor], Tensor]:
        """Gradients of the sum of the scores (each times its weight) at every key, and at the logits.

        Rows do not see each other, so row i of a gradient is that of score i. `keep` leaves the graph for another call.
        """
        total = self.scores.sum() if weights is None else (self.scores * weights.to(self.scores)).sum()
        inputs = [*self.taps.values(), self.logits]
        *found, logits = torch.autograd.grad(total, inputs, retain_graph=keep, allow_unused=True)
        if unused := [
            f"{site} of layer {layer}" for (site, layer), g in zip(self.taps, found, strict=True) if g is None
        ]:
            raise ValueError(
                f"the metric does not depend on {', '.join(unused)} through this model's computation; leave these out"
            )
        return dict(zip(self.taps, found, strict=True)), logits


@dataclass(frozen=True)
class Runner:
    """Forwards of some rows of the prompts, which keep the activations of `keys`."""

    bridge: Any
    reader: Reader
    keys: tuple[Key, ...]
    rules: Rules
    device: torch.device

    @torch.no_grad()
    def plain(
        self,
        tokens: Int[Tensor, "row pos"],
        rows: Tensor,
        keys: Sequence[Key] | None = None,
        extra: Sequence[str] = (),
    ) -> Graph:
        """Without a graph and without rules: activations of `keys` (all by default), logits and scores."""
        names = {key: key_name(key) for key in (self.keys if keys is None else keys)}
        with hooks.reads(self.bridge, list(names.values())) as found, hooks.reads(self.bridge, extra) as also:
            logits = self._logits(tokens.to(self.device), rows)
        values = {key: found[name] for key, name in names.items()}
        return Graph({}, values, logits, self._score(logits, rows), dict(also))

    def graph(
        self,
        start: Tensor,
        rows: Tensor,
        drops: AbstractContextManager[Any] | None = None,
        extra: Sequence[str] = (),
        layer: int = 0,
    ) -> Graph:
        """With a graph that begins at the first of the keys: of token ids, or of streams that enter block `layer`."""
        with self._watched(drops or nullcontext()) as (taps, reads), hooks.reads(self.bridge, extra) as also:
            logits = self._logits(start.to(self.device), rows, layer)
        kept = {key: reads.get(key, tap).detach() for key, tap in taps.items()}
        scores = self._score(logits, rows)
        if not scores.requires_grad:
            raise ValueError(no_gradient(metric_name(self.reader.metric)))
        return Graph(taps, kept, logits, scores, {name: tensor.detach() for name, tensor in also.items()})

    def _logits(self, start: Tensor, rows: Tensor, layer: int = 0) -> Tensor:
        options: dict[str, Any] = {"use_cache": False}
        where = torch.empty(0)
        if self.reader.read is not None:  # unembed only what is read
            options["logits_to_keep"], where = self.reader.read_of(rows).to(self.device).unique(return_inverse=True)
        if start.is_floating_point():
            logits = hooks.run_from(self.bridge, start, layer, **options)
        else:
            logits = self.bridge(start, **options)
        return logits if self.reader.read is None else logits[torch.arange(len(logits), device=self.device), where]

    def _score(self, logits: Tensor, rows: Tensor) -> Tensor:
        scores = self.reader.differentiable(logits, rows)
        if not torch.isfinite(scores).all():
            bad = rows[~torch.isfinite(scores).cpu()].tolist()
            raise ValueError(f"the metric is not finite on the run to be patched, or the other, in rows {bad[:8]}")
        return scores

    @contextmanager
    def _watched(self, drops: AbstractContextManager[Any]) -> Iterator[tuple[dict[Key, Tensor], dict[Key, Tensor]]]:
        """Taps and reads by key, filled by a forward, available on leaving.

        The factor of a rule on queries, keys and values belongs to the coefficient of the node, so these are tapped
        before it; elsewhere the tap is of what the rule lets through. The stream between attention and MLP is tapped
        after `drops`, at what attention adds to it, since its own hook sits on the branch of the MLP.
        """
        mids = [key for key in self.keys if key[0] == "resid_mid"]
        early = [key for key in self.keys if key[0] in ("q", "k", "v")]
        late = [key for key in self.keys if key not in mids and key not in early]
        taps: dict[Key, Tensor] = {}
        reads: dict[Key, Tensor] = {}
        with ExitStack() as stack:

            def enter(
                to: Callable[..., Any], sink: dict[Key, Tensor], keys: Iterable[Key], site: Site | None = None
            ) -> None:
                names = {key: key_name((site or key[0], key[1])) for key in keys}
                found = stack.enter_context(to(self.bridge, list(names.values())))
                filled.append((sink, names, found))

            filled: list[tuple[dict[Key, Tensor], dict[Key, str], Mapping[str, Tensor]]] = []
            enter(hooks.taps, taps, early)
            stack.enter_context(backward_rules(self.bridge, self.rules))  # also the gradient: it refuses to mix
            enter(hooks.taps, taps, late)
            stack.enter_context(drops)
            enter(hooks.taps, taps, mids, "attn_out")
            enter(hooks.reads, reads, mids)
            yield taps, reads
            for sink, names, found in filled:
                sink.update({key: found[name] for key, name in names.items()})


def key_name(key: Key) -> str:
    """The hook of a key."""
    return SITE_HOOKS[key[0]].format(layer=key[1]) if key[0] in SITE_HOOKS else key[0]


def metric_name(metric: Any) -> str:
    """What messages call a metric."""
    return str(getattr(metric, "name", getattr(metric, "__name__", type(metric).__name__)))


def no_gradient(name: str) -> str:
    """The message for a metric that cannot be differentiated."""
    return (
        f"{name} has no gradient with respect to the logits, so nothing can be attributed to it; use "
        "interp.metrics.logit_difference(prompts), or interp.patching.activation_patch, which needs no gradient"
    )


@contextmanager
def differentiable(bridge: Any) -> Iterator[None]:
    """Gradients on, parameters frozen, and no graph left in the model; all as it was on leaving."""
    every = [*bridge.parameters(), *bridge.original_model.parameters()]
    trained = list({id(parameter): parameter for parameter in every if parameter.requires_grad}.values())
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad(), hooks.no_retained_graph(bridge):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: sums of half-precision products are taken there."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def by_unit(site: Site, change: Tensor, gradient: Tensor) -> Float[Tensor, "row pos unit"]:
    """Change times gradient of a site in one layer, summed over the entries of each unit."""
    product = canonical(site, wide(change) * wide(gradient))
    return product.squeeze(-1) if site == "neuron" else product.sum(-1)


def by_cell(scores: Float[Tensor, "row pos unit"], where: Cells, rows: Tensor) -> Float[Tensor, "spot cell_unit row"]:
    """Scores of cells: sums over the positions and units that a cell joins."""
    if where.units is None:
        scores = scores.sum(-1, keepdim=True)
    elif len(where.units) < scores.shape[-1] or not torch.equal(where.units, torch.arange(len(where.units))):
        scores = scores[..., where.units.to(scores.device)]
    return torch.einsum("srp,rpu->sur", where.spots[:, rows].to(scores), scores)
