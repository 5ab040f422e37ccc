"""Many clamps in one forward, and of the forward only what they can change. Exact: nothing is linearised.

The rows of a batch are (case, example) pairs. A clamp of post-activations in layer l changes the stream leaving block l
by (new - old) @ W_out, so its row enters at block l + 1, with that stream; positions before the first clamped one come
from the cached keys and values of the unclamped run, and only the positions that are read are unembedded. Where the
MLP's output is not simply added (post-norm), in half precision (where the sum would be rounded once more) and at the
sites before the nonlinearity the row enters at block l itself, with its activations edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import hooks
from interp.models import Geometry
from interp.neurons._clamp_edits import Clamps, Mode, new_activation, site_hook
from interp.neurons._clamp_edits import Site as ClampSite
from interp.types import Site

_CPU_TOKENS = 2048  # a CPU is fastest while the activations of a batch stay in its cache; more rows gain nothing
_FINAL = "ln_final.hook_in"
_KEPT: tuple[Site, ...] = ("resid_pre", "resid_post", "attn_out", "mlp_out", "neuron")


@dataclass
class Work:
    """What was run: forwards, and tokens through blocks, in all of them."""

    forwards: int = 0
    rows: int = 0
    token_blocks: int = 0

    def summary(self, tokens: Tensor, n_layers: int) -> dict[str, Any]:
        """For provenance; `forward_equivalents` are in forwards of all examples through all blocks."""
        return {
            "forwards": self.forwards,
            "rows": self.rows,
            "forward_equivalents": round(self.token_blocks / (tokens.numel() * n_layers), 4),
        }


class ClampRuns:
    """The unclamped run of some examples, and clamped ones that continue from it.

    Attributes:
        start: The first position that clamped runs compute.
        logits: Of the unclamped run, `[example, kept, d_vocab]`.
        active: Its post-activations by layer, `[example, pos from start, d_mlp]`.
        adds: Layers in which a clamped row enters above its block.
    """

    def __init__(
        self,
        bridge: Any,
        tokens: Int[Tensor, "example pos"],
        where: Bool[Tensor, "example pos"],
        kept: Int[Tensor, "example kept"] | None,
        layers: Sequence[int],
        shape: Geometry,
        *,
        mode: Mode,
        site: ClampSite,
        work: Work,
    ) -> None:
        """
        Args:
            where: Positions that are clamped.
            kept: Positions whose logits are wanted; None wants all.
            layers: The lowest layer of every clamp to come.
        """
        self.bridge, self.shape, self.work = bridge, shape, work
        self.mode: Mode = mode
        self.site: ClampSite = site
        self.n, n_pos = tokens.shape
        first = int(where.any(0).int().argmax())  # of equal values argmax gives the first
        self.start = 0 if kept is None else min(first, int(kept.min()))
        if self.start and not hooks.supports_prefix_reuse(bridge):
            self.start = 0
        self.tokens, self.cache = tokens, None
        names = {hooks.hook_name("resid_post", shape.n_layers - 1)}
        for layer in set(layers):
            names |= {hooks.hook_name(kind, layer) for kind in _KEPT}
        found: dict[str, Tensor] = {}
        with torch.no_grad(), ExitStack() as stack:
            for name in names:

                def keep(tensor: Tensor, *, hook: Any, _name: str = name) -> None:
                    found[_name] = tensor[:, self.start :].clone() if self.start else tensor

                hooks.attach(stack, bridge, name, keep, "fwd")
            if self.start:
                self.cache = hooks.prefix_cache(bridge, tokens).crop(self.start)
            else:
                bridge(tokens, use_cache=False, logits_to_keep=1)
        self._count(self.n, n_pos, shape.n_layers)
        self.where = where[:, self.start :].to(tokens.device)
        kept = None if kept is None else (kept - self.start).to(tokens.device)
        self.keep, self.kept = (None, None) if kept is None else kept.unique(return_inverse=True)
        self.leaving, self.entering, self.active = (
            {layer: found[hooks.hook_name(kind, layer)] for layer in set(layers)}
            for kind in ("resid_post", "resid_pre", "neuron")
        )
        self.adds = {layer for layer in set(layers) if site == "post" and self._adds(layer, found)}
        last = found[hooks.hook_name("resid_post", shape.n_layers - 1)]
        with torch.no_grad():
            self.logits = self._forward(last, shape.n_layers, {}, 1)[0]

    def _adds(self, layer: int, found: dict[str, Tensor]) -> bool:
        """Whether the stream leaving a block is what enters it plus attention's output plus post @ W_out + b_out."""
        pre, post, attn, mlp, active = (found[hooks.hook_name(kind, layer)] for kind in _KEPT)
        W_out, b_out = self.bridge.blocks[layer].mlp.W_out, getattr(self.bridge.blocks[layer].mlp, "b_out", None)
        if pre.element_size() < 4:
            return False
        made = active @ W_out.to(active.dtype) + (0 if b_out is None else b_out)
        return _close(made, mlp) and _close(pre + attn + mlp, post)

    @torch.no_grad()
    def clamp(
        self, layer: int, cases: Sequence[Clamps], *, changes: bool = False
    ) -> tuple[Float[Tensor, "case example kept d_vocab"], Float[Tensor, "case example pos d_model"] | None]:
        """Logits of cases whose lowest layer is `layer`; with `changes`, how the stream leaving it changes."""
        edits = {
            site_hook(self.bridge, self.site, upper): self._edit(upper, cases)
            for upper in sorted({upper for case in cases for upper in case.layers})
            if upper > layer or layer not in self.adds
        }
        if layer in self.adds:
            moved = torch.stack([self._moved(layer, case) for case in cases])
            resid = (self.leaving[layer] + moved).flatten(0, 1)
            return self._forward(resid, layer + 1, edits, len(cases)), moved if changes else None
        resid = self.entering[layer].repeat(len(cases), 1, 1)
        if not changes:
            return self._forward(resid, layer, edits, len(cases)), None
        name = hooks.hook_name("resid_post", layer)
        with hooks.reads(self.bridge, name) as found:
            logits = self._forward(resid, layer, edits, len(cases))
        return logits, found[name].unflatten(0, (len(cases), self.n)) - self.leaving[layer]

    @torch.no_grad()
    def push(
        self, layer: int, changes: Float[Tensor, "case example pos d_model"]
    ) -> Float[Tensor, "case example kept d_vocab"]:
        """Logits when these vectors are added to the stream that leaves block `layer`."""
        resid = (self.leaving[layer] + changes.to(self.leaving[layer].dtype)).flatten(0, 1)
        return self._forward(resid, layer + 1, {}, len(changes))

    def _moved(self, layer: int, case: Clamps) -> Tensor:
        """(new - old) @ W_out at the clamped positions, `[example, pos, d_model]`."""
        columns, numbers = (part.to(self.tokens.device) for part in case.layers[layer])
        old = self.active[layer][..., columns]
        change = new_activation(self.mode, old, numbers.to(old.dtype)) - old
        W_out = self.bridge.blocks[layer].mlp.W_out[columns].detach().to(old.dtype)
        return (change * self.where[..., None]) @ W_out

    def _edit(self, layer: int, cases: Sequence[Clamps]) -> hooks.Edit:
        def edit(tensor: Tensor) -> Tensor:
            new = tensor.clone().unflatten(0, (len(cases), self.n))
            for row, case in zip(new, cases, strict=True):
                if layer in case.layers:
                    columns, numbers = (part.to(tensor.device) for part in case.layers[layer])
                    old = row[..., columns]
                    clamped = new_activation(self.mode, old, numbers.to(old.dtype))
                    row[..., columns] = torch.where(self.where[..., None], clamped, old)
            return new.flatten(0, 1)

        return edit

    def _forward(self, resid: Tensor, layer: int, edits: dict[str, hooks.Edit], n_cases: int) -> Tensor:
        """Logits `[case, example, kept, d_vocab]` of rows that enter block `layer` (`n_layers`: the final norm)."""
        options: dict[str, Any] = {} if self.keep is None else {"logits_to_keep": self.keep}
        n_layers = self.shape.n_layers
        with ExitStack() as stack:
            stack.enter_context(hooks.no_retained_graph(self.bridge))
            if layer == n_layers:
                stack.enter_context(hooks.skip_below(self.bridge, n_layers))
                stack.enter_context(hooks.interventions(self.bridge, {_FINAL: lambda _: resid}))
                logits = self.bridge(resid, start_at_layer=n_layers - 1, use_cache=False, **options)
            else:
                stack.enter_context(hooks.interventions(self.bridge, edits))
                if self.cache is not None:
                    rows = torch.arange(self.n, device=resid.device).repeat(n_cases)
                    logits = hooks.run_suffix(self.bridge, resid, self.cache, rows=rows, start_layer=layer, **options)
                else:
                    logits = hooks.run_from(self.bridge, resid, layer, use_cache=False, **options)
        self._count(len(resid), resid.shape[1], n_layers - layer)
        logits = logits.unflatten(0, (n_cases, self.n))
        if self.kept is not None:
            index = self.kept[None, :, :, None].expand(n_cases, -1, -1, logits.shape[-1])
            logits = logits.gather(2, index)
        return logits

    def _count(self, rows: int, positions: int, blocks: int) -> None:
        self.work.forwards += 1
        self.work.rows += rows
        self.work.token_blocks += rows * positions * blocks


def examples_at_once(shape: Geometry, n_layers: int, n_pos: int, computed: int, item: int, budget: int) -> int:
    """How many unclamped runs fit that keep what clamps in so many layers continue from."""
    kept = n_layers * computed * (4 * shape.d_model + shape.d_mlp)
    prefix = 2 * shape.n_layers * n_pos * shape.n_kv_heads * shape.d_head
    forward = n_pos * (8 * shape.d_model + 4 * shape.d_mlp + 2 * shape.n_heads * n_pos)
    return max(1, budget // (item * (kept + prefix + forward)))


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def rows_at_once(shape: Geometry, n_pos: int, computed: int, kept: int, item: int, budget: int, device: Any) -> int:
    """How many rows fit into a forward of `computed` positions with the logits of `kept` of them in a few copies."""
    stream = computed * (8 * shape.d_model + 4 * shape.d_mlp + 2 * shape.n_heads * n_pos)
    prefix = 2 * n_pos * shape.n_kv_heads * shape.d_head
    rows = budget // (item * (stream + prefix) + 20 * kept * shape.d_vocab)
    if device.type == "cpu":
        rows = min(rows, -(-_CPU_TOKENS // computed))
    return max(1, rows)
