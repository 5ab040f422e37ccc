"""Patching sets of cells jointly, each in all its layers at once."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp import hooks
from interp.patching._batches import Batch, progress_bar
from interp.patching._engine import Base, _first_changed, _run_base
from interp.patching._latent_sweep import LatentPlan, patch_latent_sets
from interp.patching._rerun import Rerun
from interp.patching._resume import Resume
from interp.patching._sites import canonical, original, width


@torch.no_grad()
def patch_sets(
    bridge: Any, again: Rerun, sets: Bool[Tensor, "set window spot unit"], *, progress: bool
) -> tuple[Float[Tensor, "set example"], float]:
    """Joint effect of each set on each example, averaged over draws; and the forwards of all examples it took."""
    plan, reader, split = again.plan, again.reader, again.split
    if isinstance(plan, LatentPlan):
        return patch_latent_sets(bridge, plan, reader, split, sets)
    n_rows, n_pos = plan.tokens.shape
    n_layers = split.geometry.n_layers
    first, ran = plan.layers[0], 0
    values = torch.zeros(len(sets), n_rows)
    chunks = split.chunks(n_rows, 2 * len(plan.layers) * width(plan.site, split.geometry, n_pos))
    with progress_bar(progress, len(sets) * n_rows, f"sets of {plan.site}") as bar:
        for rows in chunks:
            base = _run_base(bridge, plan, rows, split)
            resume = Resume(bridge, reader, rows, base.resid[n_layers - 1], base.cache)
            new = plan.replacement(rows, base.site)
            starts = torch.full((len(sets), 1, len(rows)), n_pos)
            for w, (layer,) in enumerate(plan.windows):
                changed = (new[layer] != base.site[layer]).any(-1).cpu()
                at = _first_changed(plan, reader, rows, [changed], layer == n_layers - 1)  # [spot, unit, row]
                for i, held in enumerate(sets[:, w]):
                    if held.any():
                        starts[i, 0] = torch.minimum(starts[i, 0], at[held].amin(0))
            for batch in split.batches(starts, rows, first, suffixes=base.cache is not None):
                edits = _edits(again, rows, base, new, batch, sets)
                row = batch.row.to(split.device)
                resid = base.resid[first][row, batch.start : batch.stop]
                inside = plan.site in ("mlp_out", "neuron") and n_layers - 1 in plan.layers
                with hooks.interventions(bridge, edits):
                    scored = resume(resid, first, batch, last_mlp_edited=inside)
                values[batch.spot, rows[batch.row]] = scored - resume.baseline[batch.row]
                ran += len(batch) * (batch.stop - batch.start) * (n_layers - first)
                bar.update(len(batch))
    return values.unflatten(-1, (-1, reader.n_examples)).mean(1), ran / (reader.n_examples * n_pos * n_layers)


def _edits(
    again: Rerun, rows: Tensor, base: Base, new: dict[int, Tensor], batch: Batch, sets: Tensor
) -> dict[str, hooks.Edit]:
    """The replacements of a batch in which row i patches the set `batch.spot[i]`."""
    plan, span = again.plan, slice(batch.start, batch.stop)
    row = batch.row.to(again.split.device)
    spots = plan.spots[:, rows[batch.row], span].float()
    edits: dict[str, hooks.Edit] = {}
    for w, (layer,) in enumerate(plan.windows):
        # positions and units of each row that lie in any cell of its set
        mask = torch.einsum("bsu,sbp->bpu", sets[batch.spot, w].float(), spots) > 0
        if plan.units is not None:
            everywhere = torch.zeros(*mask.shape[:2], base.site[layer].shape[2], dtype=torch.bool)
            everywhere[..., plan.units] = mask
            mask = everywhere
        mask = mask.unsqueeze(-1).to(again.split.device)

        def put(tensor: Tensor, _layer: int = layer, _mask: Tensor = mask) -> Tensor:
            old = canonical(plan.site, tensor)
            patch = new[_layer][row, span]
            if plan.site == "pattern":  # sources end where the batch does, and begin late in windowed attention
                patch = patch[..., batch.stop - old.shape[-1] : batch.stop]
            return original(plan.site, torch.where(_mask, patch, old))

        edits[hooks.hook_name(plan.site, layer)] = put
    return edits
