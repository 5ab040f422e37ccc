"""The result of attention knockout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from interp.results import Result, interval_arrays
from interp.stats import bootstrap_interval, ratio_interval

if TYPE_CHECKING:
    import pandas as pd

Quantity = Literal["change", "relative"]


@dataclass(frozen=True, eq=False, repr=False)
class Knockout(Result):
    """Change of a metric when attention along an edge is blocked around a layer: `values (edge, layer, example)`.

    Knocked out minus intact, in the metric's own unit: negative where the answer needs the edge. 0 in examples that
    have no such pair of tokens (`pairs` counts them).

    Attributes:
        intact: The metric with nothing blocked, by example.
        pairs: (reader, source) pairs of positions that an edge blocks in each example, `(edge, example)`.
        window: Layers blocked together.
        metric: Name of the metric; its unit is `values.attrs["unit"]`.
    """

    intact: xr.DataArray
    pairs: xr.DataArray
    window: int
    metric: str

    def interval(
        self, level: float = 0.95, *, of: Quantity = "change", n_resamples: int = 2000, seed: int = 0
    ) -> xr.Dataset:
        """Mean over examples with its bootstrap interval: `estimate`, `low` and `high`, each `(edge, layer)`.

        `of="relative"` is the change over the intact metric, a ratio of means resampled together: -1 means that a
        probability is lost altogether.

        Raises:
            ValueError: If `of` is unknown, or the intact metric is 0 on average.
        """
        options: dict[str, Any] = {"confidence": level, "n_resamples": n_resamples, "seed": seed}
        values = self.values.transpose("edge", "layer", "example")
        if of == "change":
            found = bootstrap_interval(values.values, **options)
        elif of == "relative":
            if float(self.intact.mean()) == 0:
                raise ValueError(
                    "the intact metric is 0 on average, so a relative change is undefined; use of='change'"
                )
            found = ratio_interval(values.values, self.intact.values, **options)
        else:
            raise ValueError(f"of must be 'change' or 'relative', got {of!r}")
        template = values.isel(example=0, drop=True)
        unit = self.values.attrs.get("unit", "") if of == "change" else "share of the intact metric"
        return interval_arrays(found, template, unit=unit, level=level, of=of)

    def summary(self, level: float = 0.95) -> pd.DataFrame:
        """One row per edge and layer: mean `change` with `low` and `high`, and `relative` (NaN where undefined)."""
        frame = self.interval(level).rename(estimate="change").to_dataframe().reset_index()
        base = float(self.intact.mean())
        relative = self.values.mean("example").transpose("edge", "layer").values.ravel() / (base or np.nan)
        return frame.assign(relative=relative)

    def plot(self, of: Quantity = "change") -> Any:
        """A line per edge over layers, with its interval."""
        from interp.plotting import lines

        found = self.interval(of=of)
        what, unit = "Change", f"{self.metric}, {found['estimate'].attrs['unit']}"
        if of == "relative":
            what, unit = "Relative change", f"share of {self.metric}"
        return lines(
            found, x="layer", y="estimate", group="edge", interval=("low", "high"), reference=0, unit=unit,
            title=f"{what} when attention is blocked (source -> reader; {self._windows()})",
        )  # fmt: skip

    def _windows(self) -> str:
        return "one layer at a time" if self.window == 1 else f"{self.window} layers around the one named"
