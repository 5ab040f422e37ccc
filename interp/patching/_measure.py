"""What every exact patching method shares: checks before anything runs, unpatched scores, noise, and the labelled
result."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import hooks
from interp.models import Geometry, geometry, provenance, require_eval
from interp.patching._backward import metric_name
from interp.patching._batches import Split
from interp.patching._cells import Cells
from interp.patching._engine import Swept
from interp.patching._resume import Reader, Resume
from interp.patching.effects import Effects
from interp.results import labelled
from interp.types import Direction, Site, Value


def checked(bridge: Any, prompts: Any, metric: Any, site: Site) -> Geometry:
    """The geometry of a model on which this site of these prompts can be patched; raises before anything runs."""
    require_eval(bridge)
    prompts.check(bridge)
    built_for = len(metric) if hasattr(metric, "select") and hasattr(metric, "__len__") else None
    if not callable(metric):
        raise ValueError(
            f"metric is {type(metric).__name__}; pass a function of logits, such as "
            "interp.metrics.logit_difference(prompts)"
        )
    if len(prompts) == 0:
        raise ValueError("there are no prompts")
    if built_for not in (None, len(prompts)):
        raise ValueError(
            f"the metric was built for {built_for} examples, but there are {len(prompts)} prompts; build it from these"
        )
    found = geometry(bridge)
    if site == "pattern" and found.delegated_attention:
        raise ValueError(
            f"the attention of {bridge.cfg.model_name} is computed where its pattern cannot be edited; "
            "patch site='z', 'q' or 'k'"
        )
    try:
        hooks.resolve(bridge, hooks.hook_name(site, 0))
    except KeyError as error:
        raise ValueError(f"site={site!r} cannot be patched: {error.args[0]}") from error
    return found


def score(bridge: Any, tokens: Tensor, reader: Reader, split: Split) -> Tensor:
    """The metric on the first draw of rows, unpatched, by example."""
    parts = []
    for rows in split.chunks(reader.n_examples, 0):
        with torch.no_grad():
            resid = hooks.run_until(bridge, tokens[rows].to(split.device), split.geometry.n_layers - 1)
            parts.append(Resume(bridge, reader, rows, resid, None).baseline)
    return torch.cat(parts)


def embedding_std(bridge: Any) -> float:
    """Standard deviation of all entries of the embedding as it enters the stream (scaled, in models that scale it)."""
    weight = bridge.W_E
    token = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
    with torch.no_grad(), hooks.reads(bridge, "hook_embed") as found:
        hooks.run_until(bridge, token, 0)
    scale = float(found["hook_embed"][0, 0].float().norm() / weight[0].float().norm())
    return scale * float(weight.float().std())


def effects_of(
    bridge: Any,
    prompts: Any,
    metric: Any,
    where: Cells,
    swept: Swept,
    intact: Tensor,
    *,
    site: str,
    direction: Direction,
    value: Value,
    settings: dict[str, Any],
) -> Effects:
    """The labelled result: draws averaged, axes that were not swept dropped."""
    n = len(prompts)
    unit = str(getattr(metric, "unit", "metric"))
    values = swept.values.unflatten(-1, (-1, n)).mean(-2)  # [window, spot, unit, example]
    baseline = swept.baseline.unflatten(-1, (-1, n)).mean(0)
    own = next((axis for axis in where.axes if axis not in ("layer", "pos")), None)
    dims = ["layer", "pos", own or "unit", "example"]
    coords: dict[str, Any] = {"layer": list(where.layers), "example": list(range(n))}
    if "pos" in where.axes:
        coords["pos"] = where.labels
        if where.tokens is not None:
            coords["token"] = ("pos", where.tokens)
    if own is not None and where.units is not None:
        coords[own] = where.units.tolist()
    array = labelled(values, dims, coords, unit=unit)
    array = array.squeeze([dim for dim in dims[:3] if dim not in where.axes]).transpose(*where.axes, "example")
    ends = {"denoise": (intact, baseline), "noise": (baseline, intact)}[direction]
    clean, corrupted = (labelled(end, ["example"], {"example": list(range(n))}, unit=unit) for end in ends)
    record = provenance(
        bridge,
        **settings,
        axes=list(where.axes),
        layers=list(where.layers),
        positions=[str(label) for label in where.labels],
        prompts={"name": prompts.name, "seed": prompts.seed, "n": n, "tokens": int(prompts.clean.shape[1])},
        metric={"name": metric_name(metric), "unit": unit},
        cost=swept.cost,
    )
    return Effects(array, record, clean, corrupted, direction, site, value, metric_name(metric))


def gaussian_rows(rows: Int[Tensor, "row"], n_pos: int, d_model: int, seed: int) -> Float[Tensor, "row pos d_model"]:
    """Standard normal noise that belongs to the row: the same whatever other rows it is drawn with."""
    generator = torch.Generator()
    return torch.stack(
        [torch.randn(n_pos, d_model, generator=generator.manual_seed(seed * 1_000_003 + row)) for row in rows.tolist()]
    )


def derangement(n: int, generator: torch.Generator) -> Tensor:
    """A random order of `n` things in which nothing keeps its place."""
    while True:
        order = torch.randperm(n, generator=generator)
        if not (order == torch.arange(n)).any():  # true of a share 1/e of all orders
            return order
