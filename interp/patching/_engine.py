"""The engine of exact patching: many cells in one forward, and only the part of the forward that a patch can change.

A cell is one spot (positions patched together) and one unit (a head, a neuron, or the whole vector) in one window of
layers. The rows of a batch are (cell, example) pairs, resumed from the run that is patched: blocks below the patch do
not run, positions before the first changed one come from its keys and values, and only the position that the metric
reads is unembedded. Pairs in
which the patch changes nothing that the metric can see are not run: their effect is exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import hooks
from interp.patching._batches import Batch, Split, progress_bar
from interp.patching._resume import Reader, Resume
from interp.patching._sites import canonical, original, width
from interp.types import Site

Replacement = Callable[[Tensor, dict[int, Tensor]], dict[int, Tensor]]
"""`(rows, their own activations by layer) -> what goes in, by layer`; all canonical (see `_sites`)."""

# Sites whose change at a position of the last block reaches no other position.
_LOCAL: tuple[Site, ...] = ("resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "pattern", "neuron")


@dataclass(frozen=True)
class Plan:
    """What is patched: every window x spot x unit of a site, in every row.

    Attributes:
        tokens: The runs to patch. There are more rows than examples where noise or donors are drawn several times.
        windows: Layers patched together, one entry for each coordinate of the result.
        spots: Positions patched together, for each coordinate of the result.
        units: Heads or neurons patched one at a time; None patches all of them together.
        replacement: What goes in.
        noise: `rows -> [row, pos, d_model]`, added to the embeddings of these runs before anything is patched.
        only: The cells to patch; None patches all of them. The others are not run and are NaN in the result.
    """

    tokens: Int[Tensor, "row pos"]
    site: Site
    windows: tuple[tuple[int, ...], ...]
    spots: Bool[Tensor, "spot row pos"]
    units: Int[Tensor, "unit"] | None
    replacement: Replacement
    noise: Callable[[Tensor], Tensor] | None = None
    only: Bool[Tensor, "window spot unit"] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Windows, spots and units."""
        return len(self.windows), len(self.spots), 1 if self.units is None else len(self.units)

    @property
    def patched(self) -> list[tuple[int, tuple[int, ...]]]:
        """The windows in which any cell is patched, with their index."""
        return [(w, window) for w, window in enumerate(self.windows) if self.only is None or bool(self.only[w].any())]

    @property
    def layers(self) -> list[int]:
        return sorted({layer for _, window in self.patched for layer in window})


@dataclass(frozen=True)
class Base:
    """What the run of some rows left behind for their patched runs to resume from; activations by layer."""

    resid: dict[int, Tensor]
    site: dict[int, Tensor]
    cache: hooks.PrefixCache | None
    additive: frozenset[int]


@dataclass(frozen=True)
class Swept:
    """Effects (patched minus unpatched metric), the unpatched metric, and the work done."""

    values: Float[Tensor, "window spot unit row"]
    baseline: Float[Tensor, "row"]
    cost: dict[str, Any]


@torch.no_grad()
def sweep(bridge: Any, plan: Plan, reader: Reader, split: Split, *, progress: bool = False) -> Swept:
    """Patch every cell of the plan."""
    n_rows, n_pos = plan.tokens.shape
    n_layers = split.geometry.n_layers
    values, baseline = torch.zeros(*plan.shape, n_rows), torch.zeros(n_rows)
    n_cells = math.prod(plan.shape)
    if plan.only is not None:
        values[~plan.only] = torch.nan
        n_cells = int(plan.only.sum())
    tally: dict[str, int] = {"ran": 0, "least": 0, "rows": 0, "batches": 0, "largest": 0}
    chunks = split.chunks(n_rows, 2 * len(plan.layers) * width(plan.site, split.geometry, n_pos))
    inside = plan.site in ("mlp_out", "neuron", "resid_post")  # at or after the MLP of a block
    with progress_bar(progress, len(chunks) * len(plan.patched), f"patching {plan.site}") as bar:
        for rows in chunks:
            base = _run_base(bridge, plan, rows, split)
            resume = Resume(bridge, reader, rows, base.resid[n_layers - 1], base.cache)
            baseline[rows] = resume.baseline
            new = plan.replacement(rows, base.site)
            changes = {layer: (new[layer] != base.site[layer]).any(-1).cpu() for layer in plan.layers}
            for w, window in plan.patched:
                enter = _entry(plan.site, window, base.additive, n_layers)
                starts = _first_changed(
                    plan, reader, rows, [changes[layer] for layer in window], n_layers - 1 == window[0]
                )
                if plan.only is not None:
                    starts[~plan.only[w]] = n_pos  # as where a patch changes nothing: not run
                for batch in split.batches(starts, rows, enter, suffixes=base.cache is not None):
                    resid, edits = _patched(plan, rows, window, enter, base, new, batch)
                    with hooks.interventions(bridge, edits):
                        scores = resume(resid, enter, batch, last_mlp_edited=inside and n_layers - 1 in window)
                    values[w, batch.spot, batch.unit, rows[batch.row]] = scores - resume.baseline[batch.row]
                    _count(tally, batch, starts, n_layers - enter)
                bar.update()
    return Swept(values, baseline, _cost(tally, n_cells, n_rows, reader.n_examples, n_pos * n_layers))


def _run_base(bridge: Any, plan: Plan, rows: Tensor, split: Split) -> Base:
    """One forward of these rows that keeps the streams, the site, and where suffixes can be run on, keys and values."""
    sites = {layer: hooks.hook_name(plan.site, layer) for layer in plan.layers}
    resid, found, cache, additive = run_base(bridge, plan, rows, split, list(sites.values()))
    return Base(resid, {layer: canonical(plan.site, found[name]) for layer, name in sites.items()}, cache, additive)


def run_base(
    bridge: Any, plan: Plan, rows: Tensor, split: Split, names: Sequence[str]
) -> tuple[dict[int, Tensor], dict[str, Tensor], hooks.PrefixCache | None, frozenset[int]]:
    """That forward: streams by layer, the hooks of these names, keys and values, layers whose outputs only add up."""
    n_layers, device = split.geometry.n_layers, split.device
    first = plan.layers[0]
    streams = {layer: hooks.hook_name("resid_pre", layer) for layer in range(first, n_layers)}
    parts = {
        layer: [hooks.hook_name(part, layer) for part in ("attn_out", "mlp_out")] for layer in _may_add(plan, split)
    }
    wanted = {*streams.values(), *names, *(name for pair in parts.values() for name in pair)}
    embeddings: dict[str, hooks.Edit] = {}
    if plan.noise is not None:
        noise = plan.noise(rows).to(device)
        embeddings[hooks.hook_name("resid_pre", 0)] = lambda resid: resid + noise.to(resid.dtype)
    tokens = plan.tokens[rows].to(device)
    with hooks.interventions(bridge, embeddings), hooks.reads(bridge, sorted(wanted)) as found:
        if split.suffixes and hooks.supports_prefix_reuse(bridge):
            cache = hooks.prefix_cache(bridge, tokens)
        else:
            cache = None
            bridge(tokens, use_cache=False, logits_to_keep=1)
    resid = {layer: found[name] for layer, name in streams.items()}
    additive = frozenset(
        layer
        for layer, (attn, mlp) in parts.items()
        if torch.allclose(resid[layer] + found[attn] + found[mlp], resid[layer + 1], rtol=1e-4, atol=1e-4)
    )
    return resid, found, cache, additive


def _may_add(plan: Plan, split: Split) -> list[int]:
    """Layers in which a changed output may be added to the next block's input instead of running its own block.

    Only where rounding allows: in half precision the sum would be rounded once more than the model rounds it.
    """
    sites = ("attn_out", "mlp_out") if split.geometry.parallel else ("mlp_out",)
    if plan.site not in sites or split.item < 4:
        return []
    return [layer for _, (layer, *others) in plan.patched if not others and layer + 1 < split.geometry.n_layers]


def _entry(site: Site | None, window: tuple[int, ...], additive: frozenset[int], n_layers: int) -> int:
    """The block from which a patched run is computed."""
    skips = len(window) == 1 and window[0] + 1 < n_layers and (site == "resid_post" or window[0] in additive)
    return window[0] + 1 if skips else window[0]


def _first_changed(
    plan: Plan, reader: Reader, rows: Tensor, changes: list[Bool[Tensor, "row pos all_units"]], last_block: bool
) -> Int[Tensor, "spot unit row"]:
    """The first position that each cell changes in each row, as far as the metric can see.

    The number of positions where it changes nothing.
    """
    changed = torch.stack(changes).any(0)
    changed = changed.any(-1, keepdim=True) if plan.units is None else changed[..., plan.units]
    return first_changed(plan, reader, rows, changed, last_block)


def first_changed(
    plan: Plan, reader: Reader, rows: Tensor, changed: Bool[Tensor, "row pos unit"], last_block: bool
) -> Int[Tensor, "spot unit row"]:
    """As above, from what each unit of the result changes."""
    n_pos = changed.shape[1]
    position = torch.arange(n_pos)
    if reader.read is not None:
        read = reader.read_of(rows)[:, None]
        seen = position == read if last_block and plan.site in _LOCAL else position <= read
        changed = changed & seen[..., None]
    starts = []
    for spot in plan.spots[:, rows]:
        here = changed & spot[..., None]
        starts.append(torch.where(here.any(1), here.int().argmax(1), n_pos).T)  # argmax: the first of equal values
    return torch.stack(starts)


def _patched(
    plan: Plan, rows: Tensor, window: tuple[int, ...], enter: int, base: Base, new: dict[int, Tensor], batch: Batch
) -> tuple[Tensor, dict[str, hooks.Edit]]:
    """The stream with which a batch enters its block, and the edits that remain to be made on the way."""
    device = base.resid[enter].device
    row, span = batch.row.to(device), slice(batch.start, batch.stop)
    mask = plan.spots[batch.spot, rows[batch.row], span].unsqueeze(-1)
    if plan.units is not None:
        n_units = base.site[window[0]].shape[2]
        mask = mask & (torch.arange(n_units) == plan.units[batch.unit].unsqueeze(-1)).unsqueeze(1)
    mask = mask.unsqueeze(-1).to(device)

    def put(tensor: Tensor, layer: int) -> Tensor:
        old = canonical(plan.site, tensor)
        patch = new[layer][row, span]
        if plan.site == "pattern":  # sources end where the batch does, and begin late where attention has a window
            patch = patch[..., batch.stop - old.shape[-1] : batch.stop]
        return original(plan.site, torch.where(mask, patch, old))

    resid = base.resid[enter][row, span]
    layer = window[0]
    if len(window) == 1 and plan.site == "resid_pre":
        return put(resid, layer), {}
    if enter == layer + 1:
        if plan.site == "resid_post":
            return put(resid, layer), {}
        change = new[layer][row, span] - base.site[layer][row, span]
        return resid + original(plan.site, torch.where(mask, change, 0.0)), {}
    return resid, {
        hooks.hook_name(plan.site, layer): lambda tensor, _layer=layer: put(tensor, _layer) for layer in window
    }


def _count(tally: dict[str, int], batch: Batch, starts: Tensor, blocks: int) -> None:
    tally["ran"] += blocks * len(batch) * (batch.stop - batch.start)
    tally["least"] += blocks * int((batch.stop - starts[batch.spot, batch.unit, batch.row]).clamp(min=0).sum())
    tally["rows"] += len(batch)
    tally["batches"] += 1
    tally["largest"] = max(tally["largest"], len(batch))


def _cost(tally: dict[str, int], n_cells: int, n_rows: int, n_examples: int, per_row: int) -> dict[str, Any]:
    """The tally in forwards of all examples, to which come the run that is patched and the one patches come from."""
    forward, runs = n_examples * per_row, 2 * n_rows / n_examples
    cells = n_cells * n_rows // n_examples
    return {
        "cells": cells,
        "forwards_one_per_cell": cells + runs,
        "forward_equivalents": round(tally["ran"] / forward + runs, 3),
        "forward_equivalents_minimum": round(tally["least"] / forward + runs, 3),
        "rows": n_cells * n_rows,
        "rows_run": tally["rows"],
        "batches": tally["batches"],
        "largest_batch": tally["largest"],
    }
