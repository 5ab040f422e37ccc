"""Setting exact patching up again as a result says it was made, for those who check the result."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool
from torch import Tensor

from interp.models import provenance
from interp.patching._batches import Split
from interp.patching._cells import Cells, cells, choice
from interp.patching._engine import Plan, Swept, _first_changed, sweep
from interp.patching._latent_places import latent_cells, latent_site
from interp.patching._latent_sites import LatentSite
from interp.patching._latent_sweep import LatentPlan, incoming, latent_plan, latents_matter, sweep_latents
from interp.patching._measure import checked, score
from interp.patching._resume import Reader
from interp.patching._sites import n_units, read_site, unit_axis
from interp.patching.activation import _replacement
from interp.patching.effects import Effects
from interp.patching.latents import donors_of
from interp.types import DIRECTIONS, SITES, VALUES


@dataclass(frozen=True)
class Rerun:
    """Everything an exact sweep over the cells of `scores` needs.

    Attributes:
        dims: The dimensions of the scores without `example`, in their order.
        intact: The metric of the run that activations come from, by example.
    """

    plan: Plan
    reader: Reader
    split: Split
    where: Cells
    dims: tuple[str, ...]
    intact: Tensor

    def to_grid(self, array: np.ndarray) -> Tensor:
        """An array over the cells of the scores as `[window, spot, unit]`."""
        own = next((dim for dim in self.dims if dim not in ("layer", "pos")), None)
        order = [dim for dim in ("layer", "pos", own) if dim in self.dims]
        return torch.from_numpy(xr.DataArray(array, dims=self.dims).transpose(*order).values.reshape(self.plan.shape))

    def to_cells(self, grid: Tensor) -> np.ndarray:
        """The inverse of `to_grid`; further axes stay last."""
        own = next((dim for dim in self.dims if dim not in ("layer", "pos")), None)
        present = ["layer" in self.dims, "pos" in self.dims, own is not None]
        names = [name for name, there in zip(("layer", "pos", own), present, strict=True) if there]
        shape = [size for size, there in zip(self.plan.shape, present, strict=True) if there]
        array = xr.DataArray(grid.numpy().reshape(*shape, *grid.shape[3:]), dims=(*names, *_rest(grid.ndim - 3)))
        return array.transpose(*self.dims, *_rest(grid.ndim - 3)).values

    def sweep(self, bridge: Any, only: Bool[Tensor, "window spot unit"], *, progress: bool = False) -> Swept:
        """Patch these cells."""
        plan = dataclasses.replace(self.plan, only=only)
        if isinstance(plan, LatentPlan):
            return sweep_latents(bridge, plan, self.reader, self.split, progress=progress)
        return sweep(bridge, plan, self.reader, self.split, progress=progress)

    @torch.no_grad()
    def matter(self, bridge: Any) -> Bool[Tensor, "window spot unit"]:
        """Which cells can have an effect at all: in some example they change something that the metric can see.

        Costs the forwards that read the site in both runs.
        """
        if isinstance(self.plan, LatentPlan):
            return latents_matter(bridge, self.plan, self.reader, self.split)
        plan, n_layers = self.plan, self.split.geometry.n_layers
        found = torch.zeros(plan.shape, dtype=torch.bool)
        for rows in self.split.chunks(len(plan.tokens), 0):
            own = read_site(bridge, plan.tokens[rows].to(self.split.device), plan.site, plan.layers)
            new = plan.replacement(rows, own)
            for w, (layer,) in enumerate(plan.windows):
                changed = (new[layer] != own[layer]).any(-1).cpu()
                starts = _first_changed(plan, self.reader, rows, [changed], layer == n_layers - 1)
                found[w] |= (starts < plan.tokens.shape[1]).any(-1)
        return found


def _rest(count: int) -> list[str]:
    return [f"rest{i}" for i in range(count)]


def rerun(
    bridge: Any,
    prompts: Any,
    metric: Any,
    scores: Effects,
    *,
    memory_budget: int,
    batch_size: int | None,
    dictionary: Any = None,
) -> Rerun:
    """The exact sweep over the cells of `scores`, refused where model, prompts or metric are seen to be others.

    Scores of latents need the `dictionary` that they are of.

    Runs one forward, of the intact prompts, whose metric must be the recorded one.
    """
    if not isinstance(scores, Effects):
        hint = "; attribution_patch gives one per site, pass scores['z']" if isinstance(scores, dict) else ""
        raise ValueError(f"scores is {type(scores).__name__}, expected Effects{hint}")
    record = scores.provenance
    if (method := record.get("method")) in ("causal_trace", "cross_layer_patch"):
        raise ValueError(f"these are effects of {method}, which are exact already; expected approximate scores")
    latent = "dictionary" in record
    if latent != (dictionary is not None):
        raise ValueError(
            f"the scores are of {scores.site}: pass dictionary=, the one they were computed with"
            if latent
            else f"dictionary= is for scores of latents, and these are of {scores.site!r}"
        )
    if not latent:
        choice("site", scores.site, SITES)
    choice("direction", scores.direction, DIRECTIONS)
    choice("value", scores.value, VALUES)
    bad = int((~np.isfinite(scores.values.values)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {scores.values.size} scores are NaN or infinite and cannot be ranked; select the others with "
            "dataclasses.replace(scores, values=scores.values.sel(...))"
        )
    size = abs(scores.mean().values)
    if size.max() == size.min():
        raise ValueError(f"all {size.size} mean scores are {size.flat[0]:.4g} in magnitude: there is no top among them")
    shape = checked(bridge, prompts, metric, "resid_pre" if latent else scores.site)  # type: ignore[arg-type]
    _same_run(bridge, prompts, metric, scores)
    place = _place_of(bridge, dictionary, scores) if latent else None
    where = _cells_of(prompts, scores, shape) if place is None else _latent_cells_of(prompts, scores, place)
    n, draws = len(prompts), int(record.get("n_draws", 1))
    base, other = prompts.corrupted, prompts.clean
    if scores.direction == "noise":
        base, other = other, base
    reader = Reader(metric, torch.arange(n).repeat(draws), n)
    split = Split.of(bridge, shape, reader, base.shape[1], memory_budget, batch_size)
    if place is not None:
        donors = donors_of(n, draws, int(record.get("seed") or 0), scores.value)
        goes_in = incoming(bridge, place, other, scores.value, split, donors)
        spots = where.spots.repeat(1, draws, 1)
        plan: Plan = latent_plan(place, base.repeat(draws, 1), where, spots, goes_in, error=False)
        return _rerun(bridge, plan, reader, split, where, scores, other)
    replacement = _replacement(
        bridge,
        other,
        scores.site,  # type: ignore[arg-type]
        scores.value,  # type: ignore[arg-type]
        where.layers,
        split,
        n_draws=draws,
        sigma=float(record.get("noise_std", 0.0)),
        seed=int(record.get("seed") or 0),
    )
    plan = Plan(
        base.repeat(draws, 1),
        scores.site,  # type: ignore[arg-type]
        tuple((layer,) for layer in where.layers),
        where.spots.repeat(1, draws, 1),
        where.units,
        replacement,
    )
    return _rerun(bridge, plan, reader, split, where, scores, other)


def _rerun(
    bridge: Any, plan: Plan, reader: Reader, split: Split, where: Cells, scores: Effects, other: Tensor
) -> Rerun:
    """Once the metric of the intact run is the recorded one."""
    intact = score(bridge, other, reader, split)
    _same_metric(scores, intact, half=split.item < 4)
    return Rerun(plan, reader, split, where, scores.cells, intact)


def _place_of(bridge: Any, dictionary: Any, scores: Effects) -> LatentSite:
    """The dictionary in its place, with the latents of the scores; refused where it is seen to be another."""
    record = scores.provenance["dictionary"]
    chosen = None if scores.provenance["latents"] == "all" else scores.provenance["latents"]
    if "latent" in scores.cells:
        chosen = [int(latent) for latent in _coordinate(scores.values, "latent")]
    place = latent_site(bridge, dictionary, chosen)
    for name, mine in place.record["dictionary"].items():
        if mine != record[name]:
            raise ValueError(
                f"the scores were made with another dictionary: their {name} is {record[name]!r}, here it is {mine!r}"
            )
    return place


def _latent_cells_of(prompts: Any, scores: Effects, place: LatentSite) -> Cells:
    at = _coordinate(scores.values, "pos") if "pos" in scores.cells else scores.provenance["positions"]
    positions = [_position(label, prompts) for label in at]
    return latent_cells(prompts, place, axes=scores.cells, positions=positions)


def _same_run(bridge: Any, prompts: Any, metric: Any, scores: Effects) -> None:
    """Raise if the provenance of the scores names another model, other prompts or another metric."""
    record, now = scores.provenance, provenance(bridge)
    n, length = prompts.clean.shape
    mine = {"name": prompts.name, "seed": prompts.seed, "n": n, "tokens": int(length)}
    found = [("model", record.get(key), now[key], key) for key in ("model", "revision") if key in record]
    found += [("prompts", value, mine[key], key) for key, value in record.get("prompts", {}).items() if key in mine]
    if hasattr(metric, "name"):
        found.append(("metric", scores.metric, str(metric.name), "name"))
    for what, theirs, ours, key in found:
        if theirs != ours:
            raise ValueError(
                f"the scores were made with another {what}: their {key} is {theirs!r}, here it is {ours!r}; pass what "
                "the scores were computed from"
            )
    if scores.values.sizes["example"] != n:
        raise ValueError(f"the scores hold {scores.values.sizes['example']} examples, but there are {n} prompts")


def _cells_of(prompts: Any, scores: Effects, shape: Any) -> Cells:
    """The cells of the scores, from their coordinates."""
    values, site = scores.values, scores.site
    if "layer" not in values.dims:
        raise ValueError(f"the scores have dimensions {tuple(values.dims)}; expected 'layer' among them")
    if "pos" in scores.cells:
        labels = [_position(label, prompts) for label in _coordinate(values, "pos")]
    elif "positions" in scores.provenance:
        labels = [_position(label, prompts) for label in scores.provenance["positions"]]
    else:
        raise ValueError(
            "the scores have no axis 'pos' and do not record the positions that were patched together; expected "
            "provenance['positions'], as attribution_patch writes it"
        )
    layers = [int(layer) for layer in _coordinate(values, "layer")]
    where = cells(prompts, site, shape, axes=scores.cells, positions=labels, layers=layers, neurons=None)  # type: ignore[arg-type]
    if where.axes != scores.cells:
        raise ValueError(f"the scores have the axes {scores.cells}, but this model's {site} has {where.axes}")
    axis = unit_axis(site, shape.grouped)  # type: ignore[arg-type]
    if axis in scores.cells:
        units, size = [int(unit) for unit in _coordinate(values, axis)], n_units(site, shape)  # type: ignore[arg-type]
        if wrong := [unit for unit in units if not 0 <= unit < size]:
            raise ValueError(f"the scores are of {axis} {wrong[:8]}, but this model has {size} of them in {site}")
        where = dataclasses.replace(where, units=torch.tensor(units))
    return where


def _coordinate(values: xr.DataArray, dim: str) -> list[Any]:
    return list(values.coords[dim].values.tolist() if dim in values.coords else range(values.sizes[dim]))


def _position(label: Any, prompts: Any) -> str | int:
    """A position as it was asked for: results record indices as text where some positions have names."""
    if isinstance(label, str) and (label in prompts.positions or not label.isdecimal()):
        return label
    return int(label)


def _same_metric(scores: Effects, intact: Tensor, *, half: bool) -> None:
    """Raise if the metric of the intact run is not the recorded one: other prompts of the same name, say."""
    recorded = (scores.clean if scores.direction == "denoise" else scores.corrupted).values.astype(np.float64)
    if not np.isfinite(recorded).all():
        return
    allowed = (5e-2 if half else 1e-3) * (1 + float(abs(recorded).max()))
    gap = abs(recorded - intact.numpy().astype(np.float64))
    if gap.max() > allowed:
        row = int(gap.argmax())
        which = "clean" if scores.direction == "denoise" else "corrupted"
        raise ValueError(
            f"the scores were made with other prompts, another metric or another model: the metric of {which} example "
            f"{row} is {float(intact[row]):.4g} here and was {recorded[row]:.4g} then"
        )
