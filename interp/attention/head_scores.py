"""Scores of heads: what the detectors of this package return, with intervals over examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.models import provenance
from interp.results import Result, labelled
from interp.stats import bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores(Result):
    """One or more scores of every head.

    `values` has the dimensions (score, layer, head, example); scores that come from weights alone have no `example`.
    Layers that were not visited, and examples in which a score has nothing to measure, are NaN.
    """

    def mean(self, score: str | None = None) -> xr.DataArray:
        """Mean over the examples that were measured, (score, layer, head); (layer, head) for one score."""
        values = self.values.mean("example", keep_attrs=True) if "example" in self.values.dims else self.values
        return values if score is None else select(values, score)

    def interval(self, level: float = 0.95, *, n_resamples: int = 2000, seed: int = 0) -> xr.Dataset:
        """Mean of every score with its bootstrap interval over examples: `estimate`, `low` and `high`, (score, layer,
        head).

        The bounds of scores without examples are NaN: weights have no sampling error. Examples in which a head has
        nothing to measure are left out of its mean; a head with fewer than two of them has no bounds.
        """
        mean = self.mean()
        bounds = {name: np.full(mean.shape, np.nan, dtype=np.float32) for name in ("low", "high")}
        if "example" in self.values.dims:
            ordered = self.values.transpose("score", "layer", "head", "example").values
            for i, cells in enumerate(ordered):
                present = ~np.isnan(cells)
                for kept in np.unique(present.reshape(-1, cells.shape[-1]), axis=0):
                    if kept.sum() < 2:
                        continue
                    heads = (present == kept).all(-1)  # those measured in these examples
                    found = bootstrap_interval(
                        cells[heads][:, kept], confidence=level, n_resamples=n_resamples, seed=seed
                    )
                    bounds["low"][i][heads], bounds["high"][i][heads] = found.low, found.high
        return xr.Dataset({"estimate": mean, **{name: mean.copy(data=data) for name, data in bounds.items()}})

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """One row per score and head: `score`, `layer`, `head`, `name` (L1H4), `estimate`, `low`, `high`; best first
        within a score."""
        frame = self.interval(level).to_dataframe().reset_index().dropna(subset=["estimate"])
        frame.insert(3, "name", [f"L{layer}H{head}" for layer, head in zip(frame["layer"], frame["head"], strict=True)])
        order = {str(name): i for i, name in enumerate(self.values["score"].values)}
        frame = frame.assign(_order=frame["score"].map(order))
        frame = frame.sort_values(["_order", "estimate"], ascending=[True, False], kind="stable")
        return frame.drop(columns="_order").reset_index(drop=True)

    def best(self, score: str, k: int = 5) -> list[str]:
        """Names of the `k` heads with the highest mean of a score, best first."""
        select(self.values, score)
        frame = self.table()
        return list(frame.loc[frame["score"] == score, "name"].head(k))

    def plot(self, score: str | None = None) -> Any:
        """Figure: a layer by head map of one score, or one panel for each."""
        from interp.plotting import heatmaps, layer_head

        found, unit = self.interval(), str(self.values.attrs.get("unit", "score"))
        names = [str(name) for name in self.values["score"].values]
        if score is not None or len(names) == 1:
            name = score or names[0]
            values = select(found["estimate"], name)
            hover = {bound: select(found[bound], name) for bound in ("low", "high")}
            hover = hover if "example" in self.values.dims else None
            signed = bool((values < 0).any())
            return layer_head(values, title=_title(name), unit=unit, signed=signed, hover=hover, label_top=3)
        panels = {_title(name): select(found["estimate"], name) for name in names}
        return heatmaps(panels, title="Head scores", unit=unit, signed=bool((found["estimate"] < 0).any()))


def collect(
    bridge: Any,
    found: Mapping[int, Mapping[str, Tensor]],
    unit: str,
    *,
    method: str,
    tokens: Tensor | None = None,
    **options: Any,
) -> HeadScores:
    """HeadScores from `{layer: {score: [batch, head] or [head]}}`; layers that are missing are NaN."""
    first = next(iter(found.values()))
    names = list(first)
    n_layers, n_heads = int(bridge.cfg.n_layers), int(bridge.cfg.n_heads)
    one = first[names[0]]
    values = torch.full((len(names), n_layers, n_heads, *([len(one)] if one.ndim == 2 else [])), torch.nan)
    for layer, scores in found.items():
        for i, name in enumerate(names):
            score = scores[name].float().cpu()
            values[i, layer] = score.T if score.ndim == 2 else score
    dims = ("score", "layer", "head", "example")[: values.ndim]
    coords: dict[str, Any] = {"score": names, "layer": range(n_layers), "head": range(n_heads)}
    if values.ndim == 4:
        coords["example"] = range(values.shape[-1])
    sizes = {} if tokens is None else {"n_examples": int(tokens.shape[0]), "n_positions": int(tokens.shape[1])}
    record = provenance(bridge, method=method, scores=names, **sizes, **options)
    return HeadScores(labelled(values, dims, coords, unit=unit), record)


def joined(parts: Mapping[str, xr.DataArray], record: dict[str, Any], unit: str) -> HeadScores:
    """HeadScores from arrays (layer, head, example) by score."""
    values = xr.concat([part.reset_coords(drop=True) for part in parts.values()], "score")
    values = values.assign_coords(score=list(parts)).transpose("score", "layer", "head", ...)
    return HeadScores(values.astype(np.float32).assign_attrs(unit=unit), {**record, "scores": list(parts)})


def select(values: xr.DataArray, score: str) -> xr.DataArray:
    """One score of several, by name."""
    names = [str(name) for name in values["score"].values]
    if score not in names:
        raise KeyError(f"no score {score!r}; there is {', '.join(map(repr, names))}")
    return values.sel(score=score, drop=True)


def _title(score: str) -> str:
    return score.replace("_", " ").capitalize()
