"""The exact side of a check of edge scores: which edges, patched how."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import xarray as xr

from interp.patching._batches import Split
from interp.patching._cells import cells
from interp.patching._measure import checked, score
from interp.patching._rerun import _position, _same_metric, _same_run
from interp.patching._resume import Reader
from interp.patching.edge_scores import EdgeScores
from interp.patching.effects import Effects
from interp.patching.path_patching import path_patch


@dataclasses.dataclass(frozen=True)
class EdgeRerun:
    """What an exact check of some of the edges needs.

    Attributes:
        scores: Of every edge, positions summed, `(edge, example)`.
        positions: Where edges are replaced.
    """

    scores: Effects
    positions: list[str | int] | None
    options: dict[str, Any]

    def patch(self, bridge: Any, prompts: Any, metric: Any, chosen: np.ndarray, *, progress: bool) -> Effects:
        """Exact effects of the chosen edges `[edge]`, NaN for the others."""
        names = self.scores.values["edge"].values[chosen].tolist()
        found = path_patch(
            bridge, prompts, metric, names, direction=self.scores.direction, value=self.scores.value,  # type: ignore[arg-type]
            positions=self.positions, progress=progress, **self.options,
        )  # fmt: skip
        values: xr.DataArray = self.scores.values.copy(data=np.full(self.scores.values.shape, np.nan, dtype=np.float32))
        values[np.flatnonzero(chosen)] = found.values.values
        return dataclasses.replace(found, values=values)


def rerun_edges(
    bridge: Any, prompts: Any, metric: Any, scores: EdgeScores, *, memory_budget: int, batch_size: int | None
) -> EdgeRerun:
    """Refused where model, prompts or metric are seen to be others; runs one forward, of the intact prompts."""
    flat = scores.effects()
    bad = int((~np.isfinite(flat.values.values)).sum())
    if bad:
        raise ValueError(f"{bad} of {flat.values.size} scores of edges are NaN or infinite and cannot be ranked")
    size = abs(flat.mean().values)
    if size.max() == size.min():
        raise ValueError(f"all {size.size} mean scores are {size.flat[0]:.4g} in magnitude: there is no top among them")
    shape = checked(bridge, prompts, metric, "z")
    _same_run(bridge, prompts, metric, flat)
    labels = [_position(label, prompts) for label in scores.provenance["positions"]]
    positions = None if len(labels) == prompts.clean.shape[1] else labels
    cells(prompts, "mlp_out", shape, axes=None, positions=positions, layers=None, neurons=None)
    reader = Reader(metric, torch.arange(len(prompts)), len(prompts))
    split = Split.of(bridge, shape, reader, prompts.clean.shape[1], memory_budget, batch_size)
    other = prompts.clean if scores.direction == "denoise" else prompts.corrupted
    _same_metric(flat, score(bridge, other, reader, split), half=split.item < 4)
    return EdgeRerun(flat, positions, {"memory_budget": memory_budget, "batch_size": batch_size})
