"""Level by level from one latent back through the stream: what is read of the model, which latents are split next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries._head_runs import read_hooks
from interp.dictionaries._recursion import Candidates, Nodes, Reader, Table
from interp.dictionaries._stream_components import head_writer
from interp.dictionaries._upstream import Upstream, coded
from interp.dictionaries.dictionary import Dictionary
from interp.hooks import hook_name, names
from interp.types import Site

EMBEDDINGS = ("hook_embed", "hook_pos_embed")


@dataclass
class Walk:
    """One attribution, filled batch by batch.

    Attributes:
        nodes: [node, field] per batch: example, parent, dictionary, latent, position.
        weights: What goes through each.
    """

    bridge: Any
    dictionary: Dictionary
    latent: int
    layer: int
    upstream: list[Upstream]
    depth: int
    heads: bool
    branches: int | None
    table: Table
    nodes: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    @property
    def reading_layers(self) -> list[int]:
        """Layers whose attention is taken apart."""
        onward = {one.reads for one in self.upstream if one.onward} if self.depth > 1 else set()
        return sorted({self.layer} | {layer for layer in onward if layer < self.layer})

    def hooks(self) -> list[str]:
        """Everything that is read, in one forward."""
        wanted = [hook_name(site, layer) for layer in self.reading_layers for site in ("z", "v", "pattern")]
        wanted += [hook_name("resid_pre", layer) for layer in (0, *self.reading_layers)]
        wanted += [name for name in EMBEDDINGS if name in names(self.bridge, name)]
        for below in range(self.layer):
            sites: list[Site] = ["attn_out", "mlp_out", *(["z"] if below in self._written else [])]
            here = [hook_name(site, below) for site in sites]
            wanted += [name for name in here if name in names(self.bridge, name)]  # there are models without MLPs
        wanted += [name for one in self.upstream for name in (one.hook, one.target)]
        return list(dict.fromkeys(wanted))

    @property
    def _written(self) -> set[int]:
        """Layers whose heads are followed to the stream."""
        split = {one.layer for one in self.upstream if one.role == "z"}
        return set(range(self.layer)) if self.heads else split

    @torch.no_grad()
    def run(
        self, tokens: Int[Tensor, "example pos"], position: Int[Tensor, " example"], first: int
    ) -> Float[Tensor, "example latent"]:
        """Fill the table for some examples, the first of which has this number; their pre-activations."""
        found = read_hooks(self.bridge, tokens, self.hooks())
        start = found[hook_name("resid_pre", 0)]
        if all(name in found for name in EMBEDDINGS):
            both = found["hook_embed"] + found["hook_pos_embed"]
            if not torch.allclose(both, start, atol=1e-4 * float(start.abs().max())):
                del found["hook_pos_embed"]  # a norm or a projection follows: one term
        else:
            found.pop("hook_pos_embed", None)
        writers = {
            layer: head_writer(self.bridge, layer, found[hook_name("z", layer)], found[hook_name("attn_out", layer)])
            for layer in sorted(self._written)
        }
        codes = [coded(one, found, writers[one.layer] if one.role == "z" else None) for one in self.upstream]
        readers = {
            layer: Reader(self.bridge, layer, found, writers, codes, heads=self.heads) for layer in self.reading_layers
        }
        self.table.first = first
        at = position.to(start.device)
        example = torch.arange(len(tokens), device=at.device)
        z = found[hook_name("z", self.layer)][example, at].flatten(1)
        pre = self.dictionary.preactivations(z)
        number = self._note(example + first, -1, -1, self.latent, at, pre[:, self.latent].double())
        level: list[tuple[int, Nodes]] = [(-1, Nodes(number, example, at, torch.full_like(at, self.latent), None))]
        for depth in range(self.depth):
            candidates: list[Candidates] = []
            for which, nodes in level:
                one = self.upstream[which] if which >= 0 else None
                dictionary, layer = (one.dictionary, one.reads) if one else (self.dictionary, self.layer)
                candidates += readers[layer].split(
                    dictionary, nodes, self.table, self.upstream, one.target if one else dictionary.hook
                )
            level = self._next(candidates, first) if depth + 1 < self.depth else []
        return pre

    def _next(self, candidates: Sequence[Candidates], first: int) -> list[tuple[int, Nodes]]:
        """The latents of the next level, by dictionary: those through which most goes in each example."""
        chosen = [torch.ones(len(one.weight), dtype=torch.bool, device=one.weight.device) for one in candidates]
        if self.branches is not None and candidates:
            size = torch.cat([one.weight.abs() for one in candidates])
            example = torch.cat([one.example for one in candidates])
            order = size.argsort(descending=True, stable=True)
            order = order[example[order].argsort(stable=True)]  # by example, and by size within each
            counts = example.bincount()
            rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[example[order]]
            kept = torch.empty_like(size, dtype=torch.bool)
            kept[order] = rank < self.branches
            chosen = list(kept.split([len(one.weight) for one in candidates]))
        level: dict[int, list[Nodes]] = {}
        for one, mask in zip(candidates, chosen, strict=True):
            if bool(mask.any()):
                example, at, latent, weight = (
                    tensor[mask] for tensor in (one.example, one.position, one.latent, one.weight)
                )
                number = self._note(example + first, one.parent[mask], one.upstream, latent, at, weight)
                level.setdefault(one.upstream, []).append(Nodes(number, example, at, latent, weight))
        return [(which, joined(parts)) for which, parts in level.items()]

    def _note(
        self, example: Tensor, parent: Tensor | int, which: int, latent: Tensor | int, at: Tensor, weight: Tensor
    ) -> Tensor:
        """Enter nodes into the table of nodes; their numbers."""
        before = sum(len(part) for part in self.nodes)
        columns = [example, parent, which, latent, at]
        wide = [torch.as_tensor(column, device=at.device).expand(at.shape) for column in columns]
        self.nodes.append(torch.stack(wide, -1).cpu())
        self.weights.append(weight.cpu())
        return torch.arange(before, before + len(at), device=at.device)


def joined(parts: Sequence[Nodes]) -> Nodes:
    """Nodes of one dictionary in one table."""
    weights = [part.weight for part in parts if part.weight is not None]
    return Nodes(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("number", "example", "position", "latent")),
        weight=torch.cat(weights) if weights else None,
    )
