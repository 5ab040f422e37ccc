"""The exact pass behind circuits and paths: one forward in which any set of edges carries what another run wrote.

A reader's input is the sum of what its writers wrote: in the other run over replaced edges, in this very run over the
rest. Readers are served in the order in which the model computes them, so what a writer makes of a changed input
reaches all that read it, over the edges that are not replaced.

The sum is made anew from its parts. The stream less what is replaced would be the same but for rounding, and rounding
is all that is left where everything a reader sees is replaced by nothing: its norm would blow that up to any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import hooks
from interp.patching._dead_hooks import edited
from interp.patching._wiring import Branch, Wiring


@dataclass(frozen=True)
class Written:
    """What the writers of a run wrote; heads before their output weights.

    Attributes:
        input: The stream entering block 0, [row, pos, d_model].
        z: Outputs of heads by layer, [row, pos, head, d_head].
        mlp: What MLPs add to the stream by layer, [row, pos, d_model]; empty where there are none.
    """

    input: Tensor
    z: dict[int, Tensor]
    mlp: dict[int, Tensor]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Written:
        """The same function of every part."""
        return Written(
            fn(self.input),
            {layer: fn(tensor) for layer, tensor in self.z.items()},
            {layer: fn(tensor) for layer, tensor in self.mlp.items()},
        )

    def plus(self, other: Written) -> Written:
        """The sum, part by part."""
        return Written(
            self.input + other.input,
            {layer: tensor + other.z[layer] for layer, tensor in self.z.items()},
            {layer: tensor + other.mlp[layer] for layer, tensor in self.mlp.items()},
        )

    def zeros(self) -> Written:
        """Nothing written; the biases of attention outputs belong to no writer and stay."""
        return self.map(torch.zeros_like)

    def __getitem__(self, rows: Int[Tensor, "row"]) -> Written:
        """Some of the rows."""
        return self.map(lambda tensor: tensor[rows.to(tensor.device)])


@contextmanager
def recording(bridge: Any, wiring: Wiring) -> Iterator[Callable[[], Written]]:
    """A function that gives what the writers wrote in the last forward inside the context."""
    names = {("z", layer): hooks.hook_name("z", layer) for layer in range(len(wiring.layers))}
    names |= {("mlp", i): hooks.hook_name("mlp_out", i) for i, layer in enumerate(wiring.layers) if layer.has_mlp}
    start = hooks.hook_name("resid_pre", 0)
    with hooks.reads(bridge, [start, *names.values()]) as found:
        yield lambda: Written(
            found[start].detach(),
            {layer: found[name].detach() for (kind, layer), name in names.items() if kind == "z"},
            {layer: found[name].detach() for (kind, layer), name in names.items() if kind == "mlp"},
        )


@torch.no_grad()
def written(bridge: Any, wiring: Wiring, tokens: Int[Tensor, "row pos"]) -> Written:
    """What the writers write on these tokens. One forward."""
    with recording(bridge, wiring) as record:
        bridge(tokens, use_cache=False, logits_to_keep=1)
    return record()


@contextmanager
def replacing(
    bridge: Any,
    wiring: Wiring,
    other: Written,
    masks: Bool[Tensor, "circuit writer reader"],
    positions: Bool[Tensor, "row pos"] | None = None,
) -> Iterator[None]:
    """Every forward inside has the masked edges replaced by what `other` wrote.

    The rows of the forward are circuits x rows of `other`, circuits first: row `c * n + i` is circuit c on row i. With
    `positions`, only what is written there is replaced. A reader with no replaced edge is left alone, bit for bit.
    """
    passing = _Pass(wiring, other, masks, positions)
    with hooks.reads(bridge, passing.reads()) as found:
        passing.found = found
        with torch.no_grad(), edited(bridge, passing.edits()):
            yield


class _Pass:
    """The state of one forward: what writers wrote in it and in the other run, as far as they have run."""

    found: dict[str, Tensor]

    def __init__(self, wiring: Wiring, other: Written, masks: Tensor, positions: Tensor | None) -> None:
        self.wiring, self.other, self.graph = wiring, other, wiring.graph
        device, dtype = other.input.device, other.input.dtype
        self.shape = (masks.shape[0], *other.input.shape)  # circuit, row, pos, d_model
        self.positions = None if positions is None else positions.to(device)[:, :, None]
        self.masked = masks.cpu()
        self.replaced = masks.to(device, dtype)
        self.kept = 1 - self.replaced
        self.post = [layer for layer, found in enumerate(wiring.layers) if found.post]
        self.now = self.wrote = torch.empty(0)  # what writers wrote in this run, and in the other
        self.filled = 0
        self.start: Tensor | None = None
        self.normed: tuple[tuple[Branch, int], Tensor] | None = None

    def reads(self) -> list[str]:
        layers = range(self.graph.n_layers)
        names = [hooks.hook_name(site, layer) for site in ("resid_pre", "z", "attn_out") for layer in layers]  # type: ignore[arg-type]
        return names + [hooks.hook_name("mlp_out", layer) for layer in self.other.mlp]

    def edits(self) -> dict[str, hooks.Edit]:
        edits: dict[str, hooks.Edit] = {}
        for layer in range(self.graph.n_layers):
            for site in ("q", "k", "v"):
                if self._any(site, layer):
                    edits[hooks.hook_name(site, layer)] = lambda x, s=site, i=layer: x + self._projected(s, i)
            if self._any("mlp", layer) and layer in self.other.mlp:
                edits[f"blocks.{layer}.mlp.hook_in"] = lambda x, i=layer: x + self._change("mlp", i, "mlp").view_as(x)
        last = self.graph.n_layers - 1
        if self._any("logits", last):
            edits[hooks.hook_name("resid_post", last)] = lambda x: self._input("logits", last, x).view_as(x)
        return edits

    def _any(self, part: str, layer: int) -> bool:
        return bool(self.masked[:, :, self._readers(part, layer)].any())

    def _readers(self, part: str, layer: int) -> slice:
        """The places of the readers of this kind in this block."""
        g = self.graph
        sizes = {"q": g.n_heads, "k": g.n_kv_heads, "v": g.n_kv_heads, "mlp": 1, "logits": 1}
        if part == "logits":
            return slice(len(g.readers) - 1, len(g.readers))
        start = layer * (g.n_heads + 2 * g.n_kv_heads + 1)
        for name, size in sizes.items():
            if name == part:
                return slice(start, start + size)
            start += size
        raise AssertionError(part)

    def _writers_below(self, part: str, layer: int) -> int:
        """How many writers come before these readers."""
        if part == "logits":
            return len(self.graph.writers)
        between = self.graph.n_heads if part == "mlp" and not self.graph.parallel else 0
        return 1 + layer * (self.graph.n_heads + 1) + between

    def _projected(self, site: Any, layer: int) -> Tensor:
        """What to add to queries, keys or values: [circuit * row, pos, head, d_head]."""
        change = self._change(site, layer, "attn")  # circuit, head, row, pos, d_model
        moved = torch.einsum("chrpd,hde->crphe", change, self.wiring.weight(site, layer).to(change.dtype))
        return moved.flatten(0, 1)

    def _change(self, part: str, layer: int, branch: Branch) -> Float[Tensor, "circuit reader row pos d_model"]:
        """The norm of what these readers see, less the norm of the stream."""
        stream = self.found[hooks.hook_name("resid_pre", layer)]
        if branch == "mlp" and not self.graph.parallel:
            stream = stream + self.found[hooks.hook_name("attn_out", layer)]
        seen = self._input(part, layer, stream)  # may find that a new forward has begun
        if self.normed is None or self.normed[0] != (branch, layer):  # shared by queries, keys and values
            self.normed = ((branch, layer), self.wiring.normed(branch, layer, stream).view(self.shape).unsqueeze(1))
        return self.wiring.normed(branch, layer, seen).sub_(self.normed[1])

    def _input(self, part: str, layer: int, stream: Tensor) -> Float[Tensor, "circuit reader row pos d_model"]:
        """The stream as each of these readers sees it."""
        self._fill(below := self._writers_below(part, layer))
        readers = self._readers(part, layer)
        stream = stream.view(self.shape).unsqueeze(1)
        seen = self._sum(self._added(below), readers)  # circuit, reader, row, pos, d_model
        biases = torch.zeros(self.shape[-1], dtype=seen.dtype, device=seen.device)
        for other in range(self.graph.n_layers):
            heads, bias = self._heads(other), self.wiring.bias(other)
            if heads.stop > below:
                break
            if other not in self.post:
                biases += 0 if bias is None else bias
            elif self.masked[:, heads, readers].any():
                mixed = self._sum(torch.arange(heads.start, heads.stop), readers)
                seen += self.wiring.added(other, mixed if bias is None else mixed.add_(bias))
            else:
                seen += self.found[hooks.hook_name("attn_out", other)].view(self.shape).unsqueeze(1)
        seen += biases
        changed = self.masked[:, :below, readers].any(1)[:, :, None, None, None].to(seen.device)
        if self.positions is not None:
            changed = changed & self.positions
        return torch.where(changed, seen, stream)

    def _heads(self, layer: int) -> slice:
        """The places of a block's heads among writers."""
        first = 1 + layer * (self.graph.n_heads + 1)
        return slice(first, first + self.graph.n_heads)

    def _added(self, below: int) -> Int[Tensor, "writer"]:
        """The writers that are added to the stream as they are: not heads whose sum is normalised before."""
        writers = torch.arange(below)
        for heads in map(self._heads, self.post):
            writers = writers[(writers < heads.start) | (writers >= heads.stop)]
        return writers

    def _sum(self, writers: Int[Tensor, "writer"], readers: slice) -> Float[Tensor, "circuit reader row pos d_model"]:
        """What these writers wrote for each of these readers, in this run or in the other."""
        whole = len(writers) == int(writers[-1] - writers[0]) + 1  # a slice, which is not copied
        at = slice(int(writers[0]), int(writers[-1]) + 1) if whole else writers.to(self.now.device)
        total = torch.bmm(self.kept[:, at, readers].mT, self.now[:, at])
        replaced = self.replaced[:, at, readers].mT.reshape(-1, len(writers))
        total.view(len(replaced), -1).addmm_(replaced, self.wrote[at])
        return total.view(self.shape[0], -1, *self.shape[1:])

    def _fill(self, below: int) -> None:
        """What the first `below` writers wrote: [circuit, writer, row * pos * d_model], and the same of the other."""
        start = self.found[hooks.hook_name("resid_pre", 0)]
        if self.start is not start:  # the first reader of a forward
            self.start, self.filled, self.normed = start, 0, None
            self.wrote = start.new_zeros(len(self.graph.writers), self.other.input.numel())
            self.now = start.new_zeros(self.shape[0], *self.wrote.shape)
        nodes = self.graph.writer_nodes
        while self.filled < below:
            node = nodes[self.filled]
            if node.part == "head":
                heads, weight = self._heads(node.layer), self.wiring.weight("z", node.layer)
                now = self.found[hooks.hook_name("z", node.layer)].unflatten(0, self.shape[:2])
                weight = weight.to(now.dtype)
                self.now[:, heads] = torch.einsum("crphe,hed->chrpd", now, weight).flatten(2)
                self.wrote[heads] = torch.einsum("rphe,hed->hrpd", self.other.z[node.layer], weight).flatten(1)
                self.filled = heads.stop
                continue
            if node.part == "input":
                self.now[:, 0], self.wrote[0] = start.view(self.shape).flatten(1), self.other.input.flatten()
            elif node.layer in self.other.mlp:
                now = self.found[hooks.hook_name("mlp_out", node.layer)]
                self.now[:, self.filled] = now.view(self.shape).flatten(1)
                self.wrote[self.filled] = self.other.mlp[node.layer].flatten()
            self.filled += 1
