"""The engine of patching across layers: vectors of any layer and position put in at any other, many to a forward.

As in `_engine`, rows of a batch are resumed from the run that is patched: blocks below the target do not run, positions
before it come from keys and values, and the activations that go in are read once for the whole grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import hooks
from interp.patching._batches import Batch, Split, progress_bar
from interp.patching._engine import _LOCAL, Base, Plan, Swept, _cost, _count, _run_base
from interp.patching._measure import gaussian_rows
from interp.patching._resume import Reader, Resume
from interp.patching._sites import read_site
from interp.types import Site

LayerMap = Callable[[Tensor, int, int], Tensor]
"""`(vectors [..., d_model], source layer, target layer) -> vectors` of the same shape."""


@dataclass(frozen=True)
class CrossPlan:
    """What goes where.

    Attributes:
        tokens: The runs to patch.
        source: The runs that vectors come from, row by row those of `tokens`.
        site: The site of both.
        measured: Which pairs of layers are run.
        slots: Where the vectors of a row are read in `source`.
        places: Where they go in `tokens`.
        spots: The slots put in together, for each coordinate of the result.
        donors: For each control draw the row of `source` that each row's vectors come from instead; None for vectors of
            random direction.
        n_controls: Control draws; unit `c * n_source + s` of the sweep is source layer `s` of draw `c`, draw 0 no
            control.
        layer_map: Applied to every vector on its way.
        rescale: Whether vectors get the norm of what they replace.
        seed: For random directions.
    """

    tokens: Int[Tensor, "row pos"]
    source: Int[Tensor, "row source_pos"]
    site: Site
    source_layers: tuple[int, ...]
    target_layers: tuple[int, ...]
    measured: Bool[Tensor, "source target"]
    slots: Int[Tensor, "slot row"]
    places: Int[Tensor, "slot row"]
    spots: tuple[tuple[int, ...], ...]
    donors: Int[Tensor, "draw row"] | None
    n_controls: int
    layer_map: LayerMap | None
    rescale: bool
    seed: int

    @property
    def n_units(self) -> int:
        return (1 + self.n_controls) * len(self.source_layers)


@torch.no_grad()
def cross_sweep(bridge: Any, plan: CrossPlan, reader: Reader, split: Split, *, progress: bool = False) -> Swept:
    """Patch every measured pair; `values` are [target layer, spot, unit, row], NaN where no pair was measured."""
    (n_rows, n_pos), n_layers = plan.tokens.shape, split.geometry.n_layers
    n_targets = len(plan.target_layers)
    measured = plan.measured.T.repeat(1, 1 + plan.n_controls)  # [target, unit]
    values = torch.zeros(n_targets, len(plan.spots), plan.n_units, n_rows)
    values[~measured[:, None].expand(values.shape[:3])] = torch.nan
    baseline = torch.zeros(n_rows)
    where = plan.places.T.unsqueeze(-1) == torch.arange(n_pos)  # [row, slot, pos]
    # a slot goes to one position; a position that two slots of a spot share takes the later one
    origin = torch.stack([_origin(where, spot) for spot in plan.spots])
    base_plan = Plan(
        plan.tokens,
        plan.site,
        tuple((layer,) for layer in plan.target_layers),
        torch.ones(1, n_rows, n_pos, dtype=torch.bool),
        None,
        lambda rows, own: own,
    )
    kept = (n_targets * n_pos + 2 * plan.n_units * len(plan.slots)) * split.geometry.d_model
    chunks = split.chunks(n_rows, -(-kept // n_pos))
    tally: dict[str, int] = {"ran": 0, "least": 0, "rows": 0, "batches": 0, "largest": 0}
    live = [t for t in range(n_targets) if measured[t].any()]
    with progress_bar(progress, len(chunks) * len(live), f"patching {plan.site} across layers") as bar:
        for rows in chunks:
            base = _run_base(bridge, base_plan, rows, split)
            resume = Resume(bridge, reader, rows, base.resid[n_layers - 1], base.cache)
            baseline[rows] = resume.baseline
            vectors = _vectors(bridge, plan, rows, split)
            for t in live:
                layer = plan.target_layers[t]
                put, changed = _put(plan, rows, vectors, base, layer)
                changed &= measured[t][:, None, None]
                starts = _first(plan, reader, rows, changed, n_pos, last_block=layer == n_layers - 1)
                late = plan.site == "resid_post" and layer + 1 < n_layers
                enter = layer + 1 if late else layer
                after_mlp = plan.site in ("resid_post", "mlp_out") and layer == n_layers - 1
                for batch in split.batches(starts, rows, enter, suffixes=base.cache is not None):
                    resid, edits = _patched(plan, rows, layer, enter, base, put, origin, batch)
                    with hooks.interventions(bridge, edits):
                        scores = resume(resid, enter, batch, last_mlp_edited=after_mlp)
                    values[t, batch.spot, batch.unit, rows[batch.row]] = scores - resume.baseline[batch.row]
                    _count(tally, batch, starts, n_layers - enter)
                bar.update()
    n_cells = int(measured.sum()) * len(plan.spots)
    return Swept(values, baseline, _cost(tally, n_cells, n_rows, reader.n_examples, n_pos * n_layers))


def _origin(where: Bool[Tensor, "row slot pos"], spot: tuple[int, ...]) -> Int[Tensor, "row pos"]:
    """The slot that goes to each position, -1 where the spot has none."""
    order = torch.tensor(spot)
    here = where[:, order]
    ranked = torch.where(here, torch.arange(len(spot))[:, None], -1).amax(1)
    return torch.where(ranked >= 0, order[ranked.clamp(min=0)], -1)


def _vectors(bridge: Any, plan: CrossPlan, rows: Tensor, split: Split) -> Float[Tensor, "unit row slot d_model"]:
    """What the source run has at every layer and slot, and what the controls have instead."""

    most = max(1, len(rows) * plan.tokens.shape[1] // plan.source.shape[1])  # rows were sized for the target's length

    def read(examples: Tensor) -> Tensor:
        parts = []
        for some in examples.split(most):
            found = read_site(bridge, plan.source[some].to(split.device), plan.site, plan.source_layers)
            index = plan.slots[:, some].T.to(split.device)  # [row, slot]
            every = torch.arange(len(some), device=split.device)[:, None]
            parts.append(torch.stack([found[layer].squeeze(2)[every, index] for layer in plan.source_layers]))
        return torch.cat(parts, 1)

    own = read(rows)
    parts = [own]
    for draw in range(plan.n_controls):
        if plan.donors is not None:
            parts.append(read(plan.donors[draw][rows]))
            continue
        n_source, n, n_slots, d_model = own.shape
        # noise of a row is the same whatever rows it is drawn with; draws and source layers have directions of their
        # own
        noise = gaussian_rows(rows + draw * len(plan.tokens), n_source * n_slots, d_model, plan.seed)
        noise = noise.view(n, n_source, n_slots, d_model).transpose(0, 1).to(own)
        parts.append(noise * (own.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)))
    return torch.cat(parts)


def _put(
    plan: CrossPlan, rows: Tensor, vectors: Tensor, base: Base, layer: int
) -> tuple[Float[Tensor, "unit row slot d_model"], Bool[Tensor, "unit row slot"]]:
    """The vectors as they go in at this layer, and where they differ from what is there."""
    n = len(rows)
    places = plan.places[:, rows].T.to(vectors.device)
    own = base.site[layer].squeeze(2)[torch.arange(n, device=vectors.device)[:, None], places]  # [row, slot, d_model]
    n_source = len(plan.source_layers)
    put = vectors
    if plan.layer_map is not None:
        mapped = [plan.layer_map(vectors[u], plan.source_layers[u % n_source], layer) for u in range(len(vectors))]
        for new in mapped:
            if not isinstance(new, Tensor) or new.shape != own.shape:
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise ValueError(
                    f"layer_map returned {got} for vectors of shape {tuple(own.shape)}; expected the same shape"
                )
        put = torch.stack(mapped).to(vectors.dtype)
    if plan.rescale:
        norm = put.norm(dim=-1, keepdim=True)
        put = put * torch.where(norm > 0, own.norm(dim=-1, keepdim=True) / norm, 1.0)
    changed = (put != own).any(-1).cpu()
    if layer in plan.source_layers and plan.layer_map is None:
        # a state put where it came from: another batch may round it differently, but it is no patch
        same = (plan.source[rows] == plan.tokens[rows]).all(-1) if plan.source.shape == plan.tokens.shape else None
        if same is not None:
            home = same[:, None] & (plan.slots == plan.places)[:, rows].T
            changed[plan.source_layers.index(layer)] &= ~home
    return put, changed


def _first(
    plan: CrossPlan, reader: Reader, rows: Tensor, changed: Tensor, n_pos: int, *, last_block: bool
) -> Int[Tensor, "spot unit row"]:
    """The first position that each cell changes in each row, as far as the metric can see; `n_pos` where none."""
    places = plan.places[:, rows].T  # [row, slot]
    if reader.read is not None:
        read = reader.read_of(rows)[:, None]
        changed = changed & (places == read if last_block and plan.site in _LOCAL else places <= read)
    starts = torch.where(changed, places, n_pos)  # [unit, row, slot]
    return torch.stack([starts[..., list(spot)].amin(-1) for spot in plan.spots])


def _patched(
    plan: CrossPlan, rows: Tensor, layer: int, enter: int, base: Base, put: Tensor, origin: Tensor, batch: Batch
) -> tuple[Tensor, dict[str, hooks.Edit]]:
    """The stream with which a batch enters its block, and the edit that remains to be made on the way."""
    device = put.device
    row, span = batch.row.to(device), slice(batch.start, batch.stop)
    slot = origin[batch.spot, rows[batch.row], span].to(device)  # [batch, pos]
    every = torch.arange(len(batch), device=device)[:, None]

    def insert(tensor: Tensor) -> Tensor:
        new = put[batch.unit.to(device), row][every, slot.clamp(min=0)]
        return torch.where((slot >= 0).unsqueeze(-1), new.to(tensor.dtype), tensor)

    resid = base.resid[enter][row, span]
    if plan.site == "resid_pre" or enter == layer + 1:
        return insert(resid), {}
    return resid, {hooks.hook_name(plan.site, layer): insert}
