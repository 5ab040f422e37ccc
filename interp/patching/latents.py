"""Latents of a dictionary as a site: the result, and exact patching of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr

from interp.patching._batches import Split
from interp.patching._cells import Cells
from interp.patching._engine import Swept
from interp.patching._latent_places import latent_cells, latent_site
from interp.patching._latent_sites import LatentSite
from interp.patching._latent_sweep import incoming, latent_plan, sweep_latents
from interp.patching._measure import checked, derangement, effects_of, score
from interp.patching._resume import Reader
from interp.patching.effects import Effects, Quantity
from interp.types import Direction, Value


@dataclass(frozen=True, eq=False, repr=False)
class LatentEffects(Effects):
    """Effects of a dictionary's latents, with dimensions such as `(latent, pos, example)`, and of its error.

    With f the latents, x^ what they decode to and x the activation that is rebuilt, x = x^(f) + error. A cell is one
    latent at one position: it gets its value of the other run while all other latents and the error stay, so that the
    activation changes by the latent's change times its direction, and a run in which nothing is patched is the model's
    own. The error is a node like a latent.

    Attributes:
        error: The effect of the error, with the dimensions of `values` but `latent`. What is put in are all parts of
            the other run's activation that its latents do not carry: with a skip connection, or normalisation that is
            undone token by token, those too. So latents and error together put in the whole activation.
    """

    error: xr.DataArray

    def total(self) -> xr.DataArray:
        """Latents and error, summed. For scores of `attribution_patch` of all latents it is the score of the whole
        activation at the hook that is rebuilt, to rounding (under `value="zero"`: save the decoder's constant)."""
        values = self.values.sum("latent", keep_attrs=True) if "latent" in self.values.dims else self.values
        return values + self.error

    def plot(self, of: Quantity = "effect", *, k: int = 20) -> Any:
        """Figure of the mean over examples: the `k` latents with the largest effect anywhere, and the error below.

        A map over latent and position, or bars with intervals where one of the two is swept.
        """
        from interp.plotting import bars, heatmap

        if "latent" not in self.values.dims:
            shown = self
        else:
            size = abs(self.values.mean("example"))
            size = size.max([dim for dim in size.dims if dim != "latent"])
            best = self.values.isel(latent=sorted(size.argsort().values[::-1][:k]))
            best = best.assign_coords(latent=[str(latent) for latent in best["latent"].values])
            error = self.error.expand_dims(latent=["error"]).transpose(*best.dims)
            shown = dataclasses.replace(self, values=xr.concat([best, error], "latent").assign_attrs(best.attrs))
        found = shown.interval(of=of)
        values = found["estimate"]
        kind = f"{of.capitalize()} of patching" if "rules" not in self.provenance else f"{self.method} {of} of"
        title = f"{kind} {self.site} ({self.direction}, {self.value})"
        unit = f"{self.metric}, {values.attrs['unit']}" if of == "effect" else "recovery"
        if len(shown.cells) == 1:
            return bars(found, x=shown.cells[0], y="estimate", interval=("low", "high"), title=title, unit=unit)
        hover = {"low": found["low"], "high": found["high"]}
        return heatmap(values.transpose("latent", "pos"), title=title, unit=unit, hover=hover)


def patch_latents(
    bridge: Any,
    prompts: Any,
    metric: Any,
    dictionary: Any,
    *,
    latents: Sequence[int] | None,
    axes: Sequence[str] | None,
    positions: Any,
    layers: Sequence[int] | None,
    neurons: Sequence[int] | None,
    direction: Direction,
    value: Value,
    reference: str,
    n_draws: int,
    seed: int,
    memory_budget: int,
    batch_size: int | None,
    progress: bool,
) -> LatentEffects:
    """What `activation_patch` gives for a dictionary; its options are checked, save those of the dictionary."""
    if value == "gaussian":
        raise ValueError(
            "value='gaussian' is noise in units of the embedding; latents have other units: use 'swap', 'zero', "
            "'mean' or 'resample'"
        )
    shape = checked(bridge, prompts, metric, "resid_pre")
    place = latent_site(bridge, dictionary, latents)
    where = latent_cells(prompts, place, axes=axes, positions=positions, layers=layers, neurons=neurons)
    n = len(prompts)
    base, other = (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
    reader = Reader(metric, torch.arange(n).repeat(n_draws), n)
    split = Split.of(bridge, shape, reader, base.shape[1], memory_budget, batch_size)
    replacement = incoming(bridge, place, other, value, split, donors_of(n, n_draws, seed, value))
    plan = latent_plan(place, base.repeat(n_draws, 1), where, where.spots.repeat(1, n_draws, 1), replacement)
    intact = score(bridge, other, reader, split)
    swept = sweep_latents(bridge, plan, reader, split, progress=progress)
    settings = {
        "method": "activation_patch",
        "direction": direction,
        "value": value,
        "reference": reference,
        "n_draws": n_draws,
        "seed": seed,
    }
    return latent_effects(bridge, prompts, metric, place, where, swept, intact, direction, value, settings)


def donors_of(n: int, n_draws: int, seed: int, value: str) -> torch.Tensor | None:
    """The examples that `"resample"` takes for each row; the same as for named sites."""
    if value != "resample":
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([derangement(n, generator) for _ in range(n_draws)])


def latent_effects(
    bridge: Any,
    prompts: Any,
    metric: Any,
    place: LatentSite,
    where: Cells,
    swept: Swept,
    intact: torch.Tensor,
    direction: Direction,
    value: Value,
    settings: dict[str, Any],
) -> LatentEffects:
    """The labelled result of values `[window, spot, unit, row]` whose last unit is the error."""

    def labelled(cells: Cells, values: torch.Tensor) -> Effects:
        return effects_of(
            bridge, prompts, metric, cells, dataclasses.replace(swept, values=values), intact, site=place.title,
            direction=direction, value=value, settings={**settings, "site": place.title, **place.record},
        )  # fmt: skip

    joined = dataclasses.replace(where, axes=tuple(axis for axis in where.axes if axis != "latent"), units=None)
    found = labelled(where, swept.values[:, :, :-1])
    error = labelled(joined, swept.values[:, :, -1:]).values
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(Effects)}
    return LatentEffects(**fields, error=error)
