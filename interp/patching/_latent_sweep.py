"""Exact patching of latents: one latent (or the error, or all latents) at one spot per row of a batch.

A patch of a latent adds its direction times its change to the activation that the dictionary rebuilds; everything else
of the engine stays as it is for a named site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp import hooks
from interp.patching._batches import Batch, Split, progress_bar
from interp.patching._cells import Cells
from interp.patching._engine import Plan, Swept, _cost, _count, _entry, first_changed, run_base
from interp.patching._latent_sites import Change, LatentSite
from interp.patching._resume import Reader, Resume

Incoming = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""`(rows, their own latents) -> all latents that go in, and the activations they belong to (None: as decoded)`."""


@dataclass(frozen=True)
class LatentPlan(Plan):
    """What is patched: `site` is the one whose reach that of the rebuilt hook does not exceed.

    Attributes:
        replacement: See `Incoming`.
        units: Places in `place.chosen` of the latents patched one at a time; None patches the chosen ones together.
        error: Whether the error is patched too, as a last unit of the result.
    """

    replacement: Callable[..., Any]
    place: LatentSite = field(kw_only=True)
    error: bool = field(default=True, kw_only=True)

    @property
    def n_units(self) -> int:
        """With the error."""
        return self.shape[2] + self.error


def latent_plan(
    place: LatentSite, tokens: Tensor, where: Cells, spots: Tensor, replacement: Incoming, *, error: bool = True
) -> LatentPlan:
    """The plan of these cells."""
    units = None if where.units is None else torch.arange(len(where.units))
    # of a hook that is no site is known only that it lies in its block, as everything behind its entrance does
    reach = "resid_pre" if place.site is None else place.site
    return LatentPlan(tokens, reach, ((place.layer,),), spots, units, replacement, place=place, error=error)


def incoming(
    bridge: Any, place: LatentSite, other: Tensor, value: str, split: Split, donors: Tensor | None = None
) -> Incoming:
    """What goes in. `donors` are the rows of the other run that `"resample"` takes."""
    n = len(other)

    def read(examples: Tensor) -> tuple[Tensor, Tensor]:
        found = read_hooks(bridge, other[examples].to(split.device), place.names)
        return place.encode(found[place.hook]), found[place.target]

    if value == "swap":
        return lambda rows, own: read(rows % n)
    if value == "resample":
        assert donors is not None
        return lambda rows, own: read(donors[rows])
    if value == "zero":
        return lambda rows, own: (torch.zeros_like(own), None)
    latents: Any = 0
    activations: Any = 0
    for rows in split.chunks(n, 0):
        found = read(rows)
        latents, activations = latents + found[0].sum(0), activations + found[1].sum(0)
    means = latents / n, activations / n
    return lambda rows, own: (means[0].expand_as(own), means[1].expand(len(rows), *means[1].shape))


@torch.no_grad()
def read_hooks(bridge: Any, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Activations by name; blocks above them do not run."""
    stop = hooks.stop_layer(bridge, names)
    with hooks.reads(bridge, names) as found:
        bridge(tokens, **({"logits_to_keep": 1} if stop is None else {"stop_at_layer": stop}))
    return found


@torch.no_grad()
def sweep_latents(bridge: Any, plan: LatentPlan, reader: Reader, split: Split, *, progress: bool = False) -> Swept:
    """Patch every cell of the plan; the last unit of the values is the error, if the plan has it."""
    n_rows, n_pos = plan.tokens.shape
    n_layers, place = split.geometry.n_layers, plan.place
    values, baseline = torch.zeros(1, len(plan.spots), plan.n_units, n_rows), torch.zeros(n_rows)
    skipped = torch.zeros(len(plan.spots), plan.n_units, dtype=torch.bool)
    if plan.only is not None:
        skipped[:, : plan.shape[2]] = ~plan.only[0]
        values[0, skipped] = torch.nan
    tally: dict[str, int] = {"ran": 0, "least": 0, "rows": 0, "batches": 0, "largest": 0}
    with progress_bar(progress, n_rows, f"patching {place.title}") as bar:
        for rows in chunks(plan, split):
            chunk = Chunk.of(bridge, plan, rows, split, reader)
            baseline[rows] = chunk.resume.baseline
            starts = first_changed(plan, reader, rows, chunk.moved(), place.layer == n_layers - 1)
            starts[skipped] = n_pos  # as where a patch changes nothing: not run
            for batch in split.batches(starts, rows, chunk.enter, suffixes=chunk.resume.cache is not None):
                mask = plan.spots[batch.spot, rows[batch.row], batch.start : batch.stop]
                scores = chunk.run(batch, chunk.added(batch) * mask.unsqueeze(-1).to(split.device))
                values[0, batch.spot, batch.unit, rows[batch.row]] = scores - chunk.resume.baseline[batch.row]
                _count(tally, batch, starts, n_layers - chunk.enter)
            bar.update(len(rows))
    n_cells = int((~skipped).sum())
    return Swept(values, baseline, _cost(tally, n_cells, n_rows, reader.n_examples, n_pos * n_layers))


@torch.no_grad()
def patch_latent_sets(
    bridge: Any, plan: LatentPlan, reader: Reader, split: Split, sets: Bool[Tensor, "set window spot unit"]
) -> tuple[Float[Tensor, "set example"], float]:
    """Joint effect of each set of latents on each example, averaged over draws; and the forwards it took."""
    n_rows, n_pos = plan.tokens.shape
    n_layers, place = split.geometry.n_layers, plan.place
    values, ran = torch.zeros(len(sets), n_rows), 0
    held = sets[:, 0].float()
    for rows in chunks(plan, split):
        chunk = Chunk.of(bridge, plan, rows, split, reader)
        cells = first_changed(plan, reader, rows, chunk.moved(), place.layer == n_layers - 1)  # [spot, unit, row]
        first = [cells[one].amin(0) if one.any() else torch.full((len(rows),), n_pos) for one in sets[:, 0]]
        starts = torch.stack(first).unsqueeze(1)
        for batch in split.batches(starts, rows, chunk.enter, suffixes=chunk.resume.cache is not None):
            row, span = batch.row.to(split.device), slice(batch.start, batch.stop)
            spots = plan.spots[:, rows[batch.row], span].float()
            mask = (torch.einsum("bsu,sbp->bpu", held[batch.spot], spots) > 0).to(split.device)
            if plan.units is None:  # the chosen latents are one cell
                mask = mask.expand(-1, -1, chunk.change.latents.shape[-1])
            added = torch.where(mask, chunk.change.latents[row, span], 0.0) @ chunk.directions
            scores = chunk.run(batch, added if chunk.change.scale is None else added * chunk.change.scale[row, span])
            values[batch.spot, rows[batch.row]] = scores - chunk.resume.baseline[batch.row]
            ran += len(batch) * (batch.stop - batch.start) * (n_layers - chunk.enter)
    return values.unflatten(-1, (-1, reader.n_examples)).mean(1), ran / (reader.n_examples * n_pos * n_layers)


@torch.no_grad()
def latents_matter(bridge: Any, plan: LatentPlan, reader: Reader, split: Split) -> Bool[Tensor, "window spot unit"]:
    """Which cells change, in some example, something that the metric can see."""
    found = torch.zeros(plan.shape, dtype=torch.bool)
    last = plan.place.layer == split.geometry.n_layers - 1
    for rows in chunks(plan, split):
        read = read_hooks(bridge, plan.tokens[rows].to(split.device), plan.place.names)
        moved = _moved(plan, _change(plan, rows, read))
        found[0] |= (first_changed(plan, reader, rows, moved, last) < plan.tokens.shape[1]).any(-1)
    return found


def chunks(plan: LatentPlan, split: Split) -> list[Tensor]:
    """Rows kept together: their latents in two runs, and the activations."""
    return split.chunks(len(plan.tokens), 4 * int(plan.place.dictionary.n_latents) + 6 * plan.place.width)


@dataclass(frozen=True)
class Chunk:
    """The run of some rows, ready for patched runs to resume from.

    Attributes:
        enter: The block that patched runs enter.
        resid: The stream there.
        together: What the chosen latents add when patched together; None where they are patched one at a time.
    """

    plan: LatentPlan
    resume: Resume
    enter: int
    resid: Tensor
    change: Change
    directions: Tensor
    together: Tensor | None

    @classmethod
    def of(cls, bridge: Any, plan: LatentPlan, rows: Tensor, split: Split, reader: Reader) -> Chunk:
        """Of one forward."""
        place = plan.place
        resid, found, cache, additive = run_base(bridge, plan, rows, split, place.names)
        resume = Resume(bridge, reader, rows, resid[split.geometry.n_layers - 1], cache)
        enter = _entry(place.site, (place.layer,), additive, split.geometry.n_layers)
        change = _change(plan, rows, found)
        together = None
        if plan.units is None:
            together = change.latents @ place.directions
            together = together if change.scale is None else together * change.scale
        return cls(plan, resume, enter, resid[enter], change, place.directions, together)

    def moved(self) -> Bool[Tensor, "row pos unit"]:
        """Whether each unit of the result changes anything."""
        return _moved(self.plan, self.change)

    def added(self, batch: Batch) -> Float[Tensor, "batch pos width"]:
        """What the unit of each row adds to the rebuilt activation, at the positions of the batch."""
        device = self.resid.device
        row, unit, span = batch.row.to(device), batch.unit.to(device), slice(batch.start, batch.stop)
        n = self.plan.shape[2]
        if self.together is not None:
            vectors = self.together[row, span]
        else:
            latent = unit.clamp(max=n - 1)
            size = self.change.latents[row, span].gather(
                -1, latent[:, None, None].expand(-1, batch.stop - batch.start, 1)
            )
            vectors = size * self.directions[latent].unsqueeze(1)
            vectors = vectors if self.change.scale is None else vectors * self.change.scale[row, span]
        if (unit == n).any():
            vectors = torch.where((unit == n)[:, None, None], self.change.error[row, span], vectors)
        return vectors

    def run(self, batch: Batch, added: Tensor) -> Float[Tensor, "batch"]:
        """Scores of the rows with this added to the rebuilt activation."""
        place, last = self.plan.place, self.resume.last
        row = batch.row.to(self.resid.device)
        resid = self.resid[row, batch.start : batch.stop]
        if self.enter == place.layer + 1 or place.site == "resid_pre":
            return self.resume(resid + added.to(resid.dtype), self.enter, batch)
        edits: dict[str, hooks.Edit] = {place.target: lambda own: own + added.to(own.dtype).reshape(own.shape)}
        # at or behind the entrance of the last MLP, as far as is known of a hook that is no site
        inside = place.layer == last and place.site in (None, "mlp_out", "neuron", "resid_post")
        with hooks.interventions(self.resume.bridge, edits):
            return self.resume(resid, self.enter, batch, last_mlp_edited=inside)


def _change(plan: LatentPlan, rows: Tensor, found: dict[str, Tensor]) -> Change:
    x, own = found[plan.place.hook], found[plan.place.target]
    return plan.place.change(x, own, *plan.replacement(rows, plan.place.encode(x)))


def _moved(plan: LatentPlan, change: Change) -> Bool[Tensor, "row pos unit"]:
    moved = change.latents != 0
    parts = [moved.any(-1, keepdim=True) if plan.units is None else moved]
    if plan.error:
        parts.append((change.error != 0).any(-1, keepdim=True))
    return torch.cat(parts, -1).cpu()
