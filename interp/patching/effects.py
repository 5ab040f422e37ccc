"""The result of patching: what every patched cell did to the metric, example by example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from interp.results import Result, interval_arrays
from interp.stats import bootstrap_interval, ratio_interval

if TYPE_CHECKING:
    import pandas as pd

Quantity = Literal["effect", "recovery"]


@dataclass(frozen=True, eq=False, repr=False)
class Effects(Result):
    """Change of a metric when one cell of a model is patched, for every cell and example.

    `values` is patched minus baseline, in the metric's own unit, with dimensions such as `(layer, pos, example)`. The
    baseline is
    the run that was patched: the corrupted prompts for `"denoise"`, the clean ones for `"noise"`. So a cell that
    carries the answer has a positive effect under denoising and a negative one under noising; exactly 0 means that it
    cannot matter.

    Attributes:
        clean: The metric on the clean prompts, by example.
        corrupted: The metric on the corrupted prompts (for causal tracing: on the noised ones), by example.
        direction: `"denoise"` (sufficiency: clean activations into the corrupted run) or `"noise"` (necessity: the
            reverse).
        site: The kind of activation that was patched.
        value: What it was replaced by.
        metric: Name of the metric; its unit is `values.attrs["unit"]`.
    """

    clean: xr.DataArray
    corrupted: xr.DataArray
    direction: str
    site: str
    value: str
    metric: str

    @property
    def method(self) -> str:
        """`"activation_patch"` for exact effects, else how they were estimated, such as `"gradient"` or `"relp"`."""
        return str(self.provenance.get("method", "activation_patch"))

    @property
    def baseline(self) -> xr.DataArray:
        """The metric of the run that was patched, by example."""
        return self.corrupted if self.direction == "denoise" else self.clean

    @property
    def cells(self) -> tuple[str, ...]:
        """The dimensions of `values` without `example`."""
        return tuple(str(name) for name in self.values.dims if name != "example")

    def mean(self) -> xr.DataArray:
        """Mean effect over examples, for every cell."""
        return self.values.mean("example", keep_attrs=True)

    def recovery(self) -> xr.DataArray:
        """(patched - corrupted) / (clean - corrupted) as a ratio of means over examples, for every cell.

        Under denoising 0 is no effect and 1 full restoration; under noising 1 is no effect and 0 full loss. Values
        below 0 or above 1 are real. The ratio of means is not the mean of ratios, which examples with a small
        denominator dominate (`recovery_per_example` gives those).

        Raises:
            ValueError: If clean and corrupted do not differ on average.
        """
        patched, gap = self._patched_and_gap()
        if float(gap.mean()) == 0:
            raise ValueError("clean and corrupted have the same mean metric, so recovery is undefined; use .mean()")
        return (patched.mean("example") / float(gap.mean())).assign_attrs(unit="recovery")

    def recovery_per_example(self) -> xr.DataArray:
        """(patched - corrupted) / (clean - corrupted) for every cell and example; NaN where the two prompts score
        alike."""
        patched, gap = self._patched_and_gap()
        return (patched / gap.where(gap != 0)).assign_attrs(unit="recovery")

    def interval(
        self, level: float = 0.95, *, of: Quantity = "effect", n_resamples: int = 2000, seed: int = 0
    ) -> xr.Dataset:
        """Mean effect or recovery of every cell with its bootstrap interval over examples: `estimate`, `low` and
        `high`.

        Recovery resamples numerator and denominator together. All cells share the resamples.
        """
        cells = self.values.transpose(*self.cells, "example")
        options: dict[str, Any] = {"confidence": level, "n_resamples": n_resamples, "seed": seed}
        if of == "effect":
            found = bootstrap_interval(cells.values, **options)
        elif of == "recovery":
            patched, gap = self._patched_and_gap()
            found = ratio_interval(patched.transpose(*self.cells, "example").values, gap.values, **options)
        else:
            raise ValueError(f"of must be 'effect' or 'recovery', got {of!r}")
        template = cells.isel(example=0, drop=True)
        unit = self.values.attrs.get("unit", "") if of == "effect" else "recovery"
        return interval_arrays(found, template, unit=unit, level=level, of=of)

    def summary(self, level: float = 0.95) -> pd.DataFrame:
        """One row per cell: mean `effect` with its bounds `low` and `high`, and `recovery` (NaN where undefined)."""
        frame = self.interval(level).rename(estimate="effect").to_dataframe().reset_index()
        gap = float((self.clean - self.corrupted).mean())
        recovery = self.recovery() if gap else self.mean() * np.nan
        return frame.assign(recovery=recovery.values.ravel())

    def plot(self, of: Quantity = "effect") -> Any:
        """Figure of the mean over examples: a map over layer and position or head, or a bar with its interval per
        layer.

        The bounds of the interval are in the hover text. Three swept axes do not fit one map: plot a slice.
        """
        from interp.plotting import bars, heatmap, layer_head, layer_position

        found = self.interval(of=of)
        values = found["estimate"]
        what = f"{of.capitalize()} of patching" if "rules" not in self.provenance else f"{self.method} {of} of"
        title = f"{what} {self.site} ({self.direction}, {self.value})"
        unit = f"{self.metric}, {values.attrs['unit']}" if of == "effect" else "recovery"
        hover = {"low": found["low"], "high": found["high"]}
        if self.cells == ("layer",):
            return bars(found, x="layer", y="estimate", interval=("low", "high"), title=title, unit=unit)
        if set(self.cells) == {"layer", "pos"}:
            return layer_position(values, title=title, unit=unit, hover=hover)
        if set(self.cells) in ({"layer", "head"}, {"layer", "kv_head"}):
            return layer_head(values, title=title, unit=unit, hover=hover)
        if len(self.cells) == 2:
            return heatmap(values, title=title, unit=unit, hover=hover)
        raise ValueError(
            f"these effects have the axes {self.cells}; plot a slice of two, for instance "
            f"dataclasses.replace(effects, values=effects.values.isel({self.cells[-1]}=0, drop=True)).plot()"
        )

    def __repr__(self) -> str:
        """The whole protocol: what was patched or estimated how, on what, and how it was measured."""
        p, sizes = self.provenance, " x ".join(f"{name} {size}" for name, size in self.values.sizes.items())
        rules = {name: rule for name, rule in p.get("rules", {}).items() if rule not in ("gradient", [1.0, 1.0, 1.0])}
        parts = [
            self.method + (f" ({', '.join(f'{name}={rule}' for name, rule in rules.items())})" if rules else ""),
            f"{self.direction}, {self.value}",
            f"site {self.site}",
            f"metric {self.metric} in {self.values.attrs.get('unit', '?')}",
        ]
        if p.get("points"):
            parts.append(f"{p['steps']} {p['points']} points")
        if positions := p.get("positions"):
            named = ", ".join(positions) if len(positions) <= 6 else f"{len(positions)} of them"
            parts.append(f"positions {named}{'' if 'pos' in self.cells else ' together'}")
        if prompts := p.get("prompts"):
            parts.append(f"{prompts['n']} prompts of {prompts['name'] or 'no name'}")
        return f"{type(self).__name__}({sizes}; {'; '.join([*parts, str(p.get('model', 'unknown model'))])})"

    def _patched_and_gap(self) -> tuple[xr.DataArray, xr.DataArray]:
        return self.values + (self.baseline - self.corrupted), self.clean - self.corrupted
