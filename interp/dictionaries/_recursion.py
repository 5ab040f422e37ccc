"""Contributions to pre-activations of latents that read heads, through the values to terms of the stream, and onward.

One level takes nodes (an example, a position, a latent and how much of the target goes through it) and gives rows:
for every term, head and source the part of the node that it brought.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.dictionaries._head_reading import head_reading, head_shape
from interp.dictionaries._head_runs import check_pattern_values
from interp.dictionaries._stream_components import HeldNorm, Part, Writer, check_equal, held_norm, stream_parts
from interp.dictionaries._upstream import Coded, Upstream
from interp.dictionaries.dictionary import Dictionary
from interp.hooks import hook_name

AT_ONCE = 2**24  # products of a term with directions that are held at once, of example, source, head and latent
COLUMNS = ("example", "node", "part", "latent", "head", "src")


@dataclass(frozen=True)
class Nodes:
    """Latents at positions whose pre-activations are split.

    Attributes:
        number: Their places in the table of nodes.
        weight: What of the target's pre-activation goes through each; None for the target itself.
    """

    number: Int[Tensor, " node"]
    example: Int[Tensor, " node"]
    position: Int[Tensor, " node"]
    latent: Int[Tensor, " node"]
    weight: Float[Tensor, " node"] | None

    def only(self, kept: Bool[Tensor, " node"]) -> Nodes:
        """Some of them."""
        columns = (column[kept] for column in (self.number, self.example, self.position, self.latent))
        return Nodes(*columns, weight=None if self.weight is None else self.weight[kept])


@dataclass(frozen=True)
class Candidates:
    """Latents that could be split next: by which dictionary, from which node, and how much goes through them."""

    upstream: int
    parent: Tensor
    example: Tensor
    position: Tensor
    latent: Tensor
    weight: Tensor


@dataclass
class Table:
    """Rows as they come.

    Attributes:
        most: Rows that are allowed.
        first: Number of the first example of the batch that is being added.
        parts: Names of the terms, in order of appearance: label, kind, hook, and the dictionary of latents.
    """

    most: int
    first: int = 0
    parts: dict[tuple[str, str, str, int], int] = field(default_factory=dict)
    index: list[Tensor] = field(default_factory=list)  # [row, column]
    values: list[Tensor] = field(default_factory=list)
    n_rows: int = 0

    def part(self, label: str, kind: str, hook: str, upstream: int = -1) -> int:
        return self.parts.setdefault((label, kind, hook, upstream), len(self.parts))

    def room_for(self, rows: int) -> None:
        self.n_rows += rows
        if self.n_rows > self.most:
            raise ValueError(
                f"the table would have {self.n_rows:,} rows or more, above max_rows={self.most:,}; split fewer latents "
                "with branches=..., take fewer examples or shorter texts, or a smaller depth"
            )

    def add(self, values: Tensor, **columns: Tensor | int) -> None:
        columns = {**columns, "example": columns["example"] + self.first}
        wide = [torch.as_tensor(columns[name], device=values.device).expand(values.shape) for name in COLUMNS]
        self.index.append(torch.stack(wide, -1).to("cpu", torch.int32))
        self.values.append(values.cpu())


class Reader:
    """Attention of one layer on some examples: patterns, values and norm as they are, and the terms of what it reads.

    Raises:
        ValueError: If z is not pattern times values, values are not a product of the normed stream, or the stream is
            not the sum of its terms.
    """

    def __init__(
        self,
        bridge: Any,
        layer: int,
        found: Mapping[str, Tensor],
        writers: Mapping[int, Writer],
        codes: Sequence[Coded],
        *,
        heads: bool,
    ) -> None:
        self.bridge, self.layer = bridge, layer
        self.z, v, pattern = (found[hook_name(site, layer)] for site in ("z", "v", "pattern"))
        check_pattern_values(bridge, layer, self.z, v, pattern)
        self.pattern = pattern.double()
        block, stream = bridge.blocks[layer], found[hook_name("resid_pre", layer)]
        n_heads = head_shape(bridge, layer)[0]
        W_V, b_V = block.attn.W_V.detach().double(), getattr(block.attn, "b_V", None)
        b_V = W_V.new_zeros(W_V.shape[0], W_V.shape[2]) if b_V is None else b_V.detach().double()
        self.norm: HeldNorm = held_norm(bridge, block._modules.get("ln1"), stream)
        normed = self.norm.linear(stream.double()) * self.norm.inverse[..., None] + self.norm.bias
        made = torch.einsum("bsd,hde->bshe", normed, W_V) + b_V
        check_equal(bridge, made, v, f"values of layer {layer} are not its normed stream times W_V")
        repeat = n_heads // W_V.shape[0]
        self.W_V, self.b_V = W_V.repeat_interleave(repeat, 0), b_V.repeat_interleave(repeat, 0)
        self.codes = [code for code in codes if code.upstream.role == "stream" and code.upstream.layer == layer]
        if not self.codes:
            self.codes = [code for code in codes if code.upstream.role != "stream" and code.upstream.layer < layer]
        self.parts = self._parts(found, writers, heads)
        self._check_sum(stream)

    def _parts(self, found: Mapping[str, Tensor], writers: Mapping[int, Writer], heads: bool) -> list[Part]:
        """Terms without latents."""
        rest = [part for code in self.codes for part in code.rest]
        if any(code.upstream.role == "stream" for code in self.codes):
            return rest
        split = {(code.upstream.role if code.upstream.role == "mlp_out" else "attention", code.upstream.layer)
                 for code in self.codes}  # fmt: skip
        parts = stream_parts(self.bridge, self.layer, found, writers, split, heads=heads)
        biases = [writers[code.upstream.layer].bias for code in self.codes if code.upstream.role == "z"]
        return [*parts, *rest, *biases]

    def _check_sum(self, stream: Tensor) -> None:
        """Products with a few random directions instead of the terms themselves, which need not be made."""
        draws = torch.Generator().manual_seed(0)
        rho = torch.randn(4, stream.shape[-1], generator=draws, dtype=torch.float64).to(stream.device)
        total = torch.stack([part.scores(rho) for part in self.parts]).sum(0)
        for code in self.codes:
            scores = (code.directions @ code.pull(rho).T)[code.latent] * code.amount[:, None]
            total = total.index_put((code.example, code.src), scores, accumulate=True)
        expected = (stream.double() @ rho.T).to(stream.dtype)
        check_equal(self.bridge, total, expected, f"the stream read by layer {self.layer} is not the sum of its terms")

    @torch.no_grad()
    def split(
        self, dictionary: Dictionary, nodes: Nodes, table: Table, upstream: Sequence[Upstream], label: str
    ) -> list[Candidates]:
        """Add the rows of these nodes, latents of a dictionary that reads this layer; what could be split next."""
        chosen, which = nodes.latent.unique(return_inverse=True)
        at_once = max(1, AT_ONCE // (self.z.shape[0] * self.z.shape[1] * self.z.shape[2]))
        if len(chosen) > at_once:
            groups = [nodes.only(torch.isin(nodes.latent, group)) for group in chosen.split(at_once)]
            return [found for group in groups for found in self.split(dictionary, group, table, upstream, label)]
        reading = head_reading(self.bridge, dictionary, chosen.tolist(), dtype=torch.float64)
        W, e, at = reading.directions, nodes.example, nodes.position
        z = self.z[e, at]
        scale = reading.scale(z.flatten(1)).double()
        pre = scale * (z.double() * W[which]).sum((1, 2)) + reading.bias[which]
        share = torch.ones_like(pre) if nodes.weight is None else nodes.weight / pre
        values = self.pattern[e, :, at] * (share * scale)[:, None, None]  # [node, head, src]
        stream = values * self.norm.inverse[e][:, None]
        here = values != 0
        counts = here.sum(1)
        entries = [torch.zeros(self.z.shape[:2], device=e.device, dtype=torch.long).index_put(
            (code.example, code.src), torch.ones_like(code.src), accumulate=True) for code in self.codes]  # fmt: skip
        constants = {"b_V": self.b_V, "bias of the norm": self.norm.bias @ self.W_V}
        constants = {name: vectors for name, vectors in constants.items() if bool(vectors.any())}
        table.room_for(
            int(here.sum()) * (len(self.parts) + len(constants))
            + sum(int((counts * entry[e]).sum()) for entry in entries)
            + len(e)
        )
        node, head, src = here.nonzero(as_tuple=True)
        columns = {"example": e[node], "node": nodes.number[node], "head": head, "src": src, "latent": -1}
        for name, vectors in constants.items():
            amount = (W * vectors).sum(-1)[which[node], head]
            hook = hook_name("v", self.layer)
            table.add(values[here] * amount, **columns, part=table.part(f"{name} {self.layer}", "bias", hook))
        rho = self.norm.pull(torch.einsum("hde,uhe->uhd", self.W_V, W))
        for part in self.parts:
            scores = part.scores(rho)[e[node], src, which[node], head]
            table.add(stream[here] * scores, **columns, part=table.part(part.label, part.kind, part.hook))
        if nodes.weight is not None:  # of the target it is the bias that is left out
            bias = share * reading.bias[which]
            own = {"example": e, "node": nodes.number, "head": -1, "src": at, "latent": nodes.latent}
            table.add(bias, **own, part=table.part(f"bias of {label}", "bias", dictionary.hook))
        return [
            found
            for code in self.codes
            for found in self._latents(code, nodes, which, stream, here, rho, table, upstream.index(code.upstream))
        ]

    def _latents(
        self,
        code: Coded,
        nodes: Nodes,
        which: Tensor,
        stream: Tensor,
        here: Tensor,
        rho: Tensor,
        table: Table,
        upstream: int,
    ) -> list[Candidates]:
        """Rows of one dictionary's latents, example by example."""
        part = table.part(f"latent of {code.upstream.target}", "latent", code.upstream.target, upstream)
        back = code.pull(rho)  # [reader, head, width]
        found = []
        for example in nodes.example.unique().tolist():
            mine, entry = (nodes.example == example).nonzero()[:, 0], (code.example == example).nonzero()[:, 0]
            if not len(entry):
                continue
            latents, place = code.latent[entry].unique(return_inverse=True)
            scores = torch.einsum("uhd,ld->uhl", back, code.directions[latents])
            src, amount = code.src[entry], code.amount[entry]
            brought = stream[mine][:, :, src] * scores[which[mine]][:, :, place] * amount  # [node, head, entry]
            kept = here[mine][:, :, src]
            node, head, at = kept.nonzero(as_tuple=True)
            table.add(
                brought[kept], example=example, node=nodes.number[mine[node]], part=part,
                latent=code.latent[entry[at]], head=head, src=src[at],
            )  # fmt: skip
            if code.upstream.onward:
                through = brought.sum(1)
                node, at = (kept.any(1) & (through != 0)).nonzero(as_tuple=True)
                parent = nodes.number[mine[node]]
                found.append(Candidates(upstream, parent, torch.full_like(parent, example), src[at],
                                        code.latent[entry[at]], through[node, at]))  # fmt: skip
        return found
