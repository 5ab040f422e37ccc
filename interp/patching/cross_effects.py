"""The result of patching across layers: a grid of pairs of layers, its control, and what remains of its best cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import xarray as xr

from interp.patching.effects import Effects
from interp.stats import bootstrap_interval, max_statistic

if TYPE_CHECKING:
    import pandas as pd

Shown = Literal["effect", "recovery", "control", "difference"]


@dataclass(frozen=True, eq=False, repr=False)
class CrossLayerEffects(Effects):
    """Change of a metric when a vector of one layer is put in at another, by source layer, target layer, position and
    example.

    `values` is patched minus unpatched, `(source_layer, target_layer, pos, example)`; pairs that were not asked for are
    NaN. A grid has many cells, so its largest cell is large by chance too: `test` corrects for the search,
    `held_out` chooses the cell on some examples and scores it on others, `repair` counts the examples that *some* cell
    puts right. All three use the control.

    Attributes:
        control: The same cells with what the control puts in, `(draw, source_layer, target_layer, pos, example)`; None
            if there is none.
    """

    control: xr.DataArray | None = None

    @classmethod
    def pool(cls, results: Sequence[CrossLayerEffects]) -> CrossLayerEffects:
        """Results over the same cells as one, examples after examples: how prompts of several lengths become one grid.

        Groups must have names that mean the same in all of them. The provenance is that of the first, with the prompts
        and costs of all in `pooled`.

        Raises:
            ValueError: If there is nothing to pool, or cells, model, metric, options or control differ.
        """
        if not results:
            raise ValueError("there is nothing to pool; pass at least one result of cross_layer_patch")
        first = results[0]
        own = {"prompts", "cost", "source", "pooled"}
        for result in results[1:]:
            for key in sorted({*first.provenance, *result.provenance} - own):
                a, b = first.provenance.get(key), result.provenance.get(key)
                if a != b:
                    raise ValueError(f"results with different {key} cannot be pooled: {a!r} and {b!r}")
            for dim in first.cells:
                a, b = first.values[dim].values.tolist(), result.values[dim].values.tolist()
                if a != b:
                    raise ValueError(f"results with different {dim} cannot be pooled: {a} and {b}")
            if (result.groups is None) != (first.groups is None):
                raise ValueError("results with and without groups cannot be pooled")

        def joined(arrays: Sequence[xr.DataArray]) -> xr.DataArray:
            # what stands at a position may differ between prompts
            plain = [array.drop_vars(["token", "example"], errors="ignore") for array in arrays]
            whole = xr.concat(
                plain, "example", coords="minimal", compat="override", join="exact", combine_attrs="override"
            )
            return whole.assign_coords(example=np.arange(whole.sizes["example"]))

        control = None
        if first.control is not None:
            control = joined([result._control("pool") for result in results])
        record = {key: value for key, value in first.provenance.items() if key not in ("cost", "source")}
        record["pooled"] = [{key: r.provenance.get(key) for key in ("prompts", "source", "cost")} for r in results]
        return replace(
            first,
            values=joined([result.values for result in results]),
            clean=joined([result.clean for result in results]),
            corrupted=joined([result.corrupted for result in results]),
            control=control,
            provenance=record,
        )

    def select(self, examples: Sequence[int] | np.ndarray) -> CrossLayerEffects:
        """The same effects on some of the examples, by index or by a mask: those that the model gets wrong, say."""
        index = np.asarray(examples)
        n = self.values.sizes["example"]
        if index.dtype == bool and len(index) != n:
            raise ValueError(f"the mask has {len(index)} entries for {n} examples; expected one for each")
        rows = np.flatnonzero(index) if index.dtype == bool else index.astype(int)
        if not len(rows):
            raise ValueError("no example is selected")
        kept = {name: array.isel(example=rows) for name, array in self._arrays().items()}
        return replace(self, **cast("dict[str, Any]", kept), provenance={**self.provenance, "examples": rows.tolist()})

    @property
    def groups(self) -> list[str] | None:
        """The group of each example, if `cross_layer_patch` was given groups."""
        return [str(name) for name in self.values["group"].values] if "group" in self.values.coords else None

    def difference(self) -> xr.DataArray:
        """Effect minus the mean over draws of the control, for every cell and example.

        Raises:
            ValueError: If there is no control.
        """
        return (self.values - self._control("difference()").mean("draw")).assign_attrs(self.values.attrs)

    def test(
        self,
        against: Literal["control", "zero"] = "control",
        *,
        alternative: Literal["two-sided", "greater", "less"] = "two-sided",
        statistic: Literal["mean", "t"] = "mean",
        level: float = 0.95,
        n_permutations: int = 10_000,
        seed: int = 0,
    ) -> xr.Dataset:
        """Which cells do more than the control (or than nothing), corrected for the search over all of them.

        Gives `estimate` (mean over examples of the difference), `p_value` (see `interp.stats.max_statistic`) and
        `significant`; the attribute `threshold` is what the statistic must exceed. Examples of one group flip together.
        """
        if against not in ("control", "zero"):
            raise ValueError(f"against must be 'control' or 'zero', got {against!r}")
        values = self.difference() if against == "control" else self.values
        values = values.transpose(*self.cells, "example")
        found = max_statistic(
            values.values,
            statistic=statistic,
            alternative=alternative,
            groups=self.groups,
            confidence=level,
            n_permutations=n_permutations,
            seed=seed,
        )
        template = values.isel(example=0, drop=True)
        arrays = {
            "estimate": template.copy(data=values.mean("example").values),
            "p_value": template.copy(data=found.p_value.astype(np.float32)).assign_attrs(unit="p"),
            "significant": template.copy(data=found.p_value <= 1 - level + 1e-12).assign_attrs(unit=""),
        }
        attrs = {"threshold": found.threshold, "statistic": statistic, "level": level, "n_groups": found.n_groups}
        return xr.Dataset(arrays, attrs={**attrs, "against": against, "alternative": alternative})

    def held_out(self, *, folds: int = 5, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """Mean effect of the best cell, chosen on all examples (which flatters it) and chosen on others than it is
        scored on.

        Rows: `best cell, same examples`; `best cell, held out` (each fold is scored at the cell that is best on the
        other folds); `control, held out` (the control at those very cells). Columns: the mean effect, its bootstrap
        bounds over groups (examples, where there are none), and the cells chosen. Groups are never split over folds.
        """
        fold = self._folds(folds, seed)
        every, chosen = self._flat(self.values), np.unique(fold)
        best = {f: int(np.argmax(np.nan_to_num(every[:, fold != f].mean(1), nan=-np.inf))) for f in chosen}
        at = np.array([best[f] for f in fold])
        overall = int(np.argmax(np.nan_to_num(every.mean(1), nan=-np.inf)))
        index = np.arange(len(at))
        rows = {
            "best cell, same examples": (every[overall], [overall]),
            "best cell, held out": (every[at, index], sorted(set(at.tolist()))),
        }
        if self.control is not None:
            rows["control, held out"] = (self._flat(self.control.mean("draw"))[at, index], sorted(set(at.tolist())))
        return self._table({name: (values, self._names(cells)) for name, (values, cells) in rows.items()}, level, seed)

    def repair(
        self, threshold: float | int = 0.0, *, folds: int = 5, level: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """Share of wrong examples (metric at or below `threshold`) that patching puts right.

        `some cell` counts an example if any cell of the grid puts it right, the cell chosen in hindsight for each
        example, as in Biran et al.; with many cells this is a maximum over as many tries, so `some cell, control`
        is what it must be held against (the mean over draws of the same maximum). `best cell, held out` and its
        control fix one cell on other examples. `still right` is the share of right examples that stay right at that
        cell (chosen on all wrong ones). Bounds are bootstrap bounds over groups of the examples counted.

        Raises:
            ValueError: If no example is wrong.
        """
        base = self.baseline.values
        wrong = np.asarray(base <= threshold)
        if not wrong.any():
            raise ValueError(
                f"no example is wrong (the smallest {self.metric} is {base.min():.4g}, threshold {threshold}): there "
                "is nothing to repair; choose prompts that the model fails, or another threshold"
            )
        right = np.asarray(self._flat(self.values) + base > threshold)
        fold = self._folds(folds, seed, wrong)
        best = {}
        for f in np.unique(fold):
            others = wrong & (fold != f)
            best[f] = int(np.argmax(right[:, others if others.any() else wrong].mean(1)))
        at, index = np.array([best[f] for f in fold]), np.arange(len(base))
        shares: dict[str, tuple[np.ndarray, np.ndarray, list[int]]] = {
            "some cell": (np.asarray(right.any(0)), wrong, [])
        }
        drawn = None
        if self.control is not None:
            drawn = np.stack([self._flat(draw) + base > threshold for draw in self.control.transpose("draw", ...)])
            shares["some cell, control"] = (drawn.any(1).mean(0), wrong, [])
        used = sorted({int(cell) for cell in at[wrong]})
        shares["best cell, held out"] = (right[at, index], wrong, used)
        if drawn is not None:
            shares["best cell, control"] = (drawn[:, at, index].mean(0), wrong, used)
        if not wrong.all():
            overall = int(np.argmax(right[:, wrong].mean(1)))
            shares["still right"] = (right[overall], ~wrong, [overall])
        frames = {
            name: (np.where(counted, share.astype(float), np.nan), self._names(cells) if cells else "any")
            for name, (share, counted, cells) in shares.items()
        }
        return self._table(frames, level, seed)

    def plot(self, of: Shown = "effect", pos: str | int | None = None) -> Any:  # type: ignore[override]
        """Heat map of the mean over examples, source layer by target layer, at one position.

        Args:
            of: `"effect"`, `"control"` (mean over draws), `"difference"` of the two, or `"recovery"`.
            pos: Which position; may be left out where there is one.
        """
        from interp.plotting import heatmap

        if of not in ("effect", "recovery", "control", "difference"):
            raise ValueError(f"of must be 'effect', 'recovery', 'control' or 'difference', got {of!r}")
        unit = f"{self.metric}, {self.values.attrs.get('unit', '?')}"
        if of == "recovery":
            values, unit = self.recovery(), "recovery"
        elif of == "control":
            values = self._control("plot(of='control')").mean(["draw", "example"])
        else:
            values = (self.difference() if of == "difference" else self.values).mean("example")
        labels = values["pos"].values.tolist()
        if pos is None and len(labels) == 1:
            pos = labels[0]
        if pos not in labels:
            raise ValueError(f"pos={pos!r}: these effects have the positions {labels}; plot one of them")
        kind = {"difference": "Effect minus control", "control": "Control", "effect": "Effect"}.get(of, "Recovery")
        title = f"{kind} of patching {self.site} across layers, position {pos}"
        return heatmap(values.sel(pos=pos, drop=True).drop_vars("token", errors="ignore"), title=title, unit=unit)

    def _control(self, what: str) -> xr.DataArray:
        if self.control is None:
            raise ValueError(f"{what} needs a control, but control=None was asked for; run with control='resample'")
        return self.control

    def _flat(self, values: xr.DataArray) -> np.ndarray:
        """`[cell, example]`; unmeasured cells are NaN."""
        values = values.transpose(*self.cells, "example")
        return values.values.reshape(-1, values.sizes["example"]).astype(np.float64)

    def _names(self, cells: Sequence[int]) -> str:
        sizes = [self.values.sizes[dim] for dim in self.cells]
        found = []
        for cell in cells:
            index = dict(zip(self.cells, np.unravel_index(cell, sizes), strict=True))
            at = {dim: self.values[dim].values[i] for dim, i in index.items()}
            where = f" at {at['pos']}" if self.values.sizes["pos"] > 1 else ""
            found.append(f"{at['source_layer']} -> {at['target_layer']}{where}")
        return "; ".join(found)

    def _units(self) -> np.ndarray:
        """The number of each example's group."""
        names = self.groups
        if names is None:
            return np.arange(self.values.sizes["example"])
        return np.unique(names, return_inverse=True)[1]

    def _folds(self, folds: int, seed: int, counted: np.ndarray | None = None) -> np.ndarray:
        """A fold for every example, groups kept together; groups with counted examples are shared out evenly."""
        units = self._units()
        n_units = len(np.unique(units if counted is None else units[counted]))
        if folds < 2:
            raise ValueError(f"folds={folds}: expected at least 2")
        if n_units < 2:
            raise ValueError(
                f"holding out needs at least 2 groups of examples, but there is {n_units}; measure more examples"
            )
        order = np.random.default_rng(seed).permutation(int(units.max()) + 1)
        has = np.ones(len(order), dtype=bool) if counted is None else np.isin(np.arange(len(order)), units[counted])
        ranked = np.concatenate([order[has[order]], order[~has[order]]])
        fold = np.empty(len(order), dtype=int)
        fold[ranked] = np.arange(len(order)) % min(folds, n_units)
        return fold[units]

    def _table(self, rows: dict[str, tuple[np.ndarray, str]], level: float, seed: int) -> pd.DataFrame:
        """Means over the examples that are not NaN, with bounds from resampling groups."""
        import pandas as pd

        units, lines = self._units(), []
        for name, (values, cells) in rows.items():
            keep = ~np.isnan(values)
            found = _grouped_interval(values[keep], units[keep], level, seed)
            line = {"what": name, "mean": found[0], "low": found[1], "high": found[2], "cells": cells}
            lines.append({**line, "examples": int(keep.sum()), "groups": len(np.unique(units[keep]))})
        return pd.DataFrame(lines)


def _grouped_interval(values: np.ndarray, units: np.ndarray, level: float, seed: int) -> tuple[float, float, float]:
    """Mean over examples with percentile bounds over resampled groups."""
    from interp.stats import ratio_interval

    names = np.unique(units)
    if len(names) == len(values):
        found = bootstrap_interval(values, confidence=level, seed=seed)
    else:
        sums = np.array([values[units == name].sum() for name in names])
        counts = np.array([(units == name).sum() for name in names])
        found = ratio_interval(sums, counts, confidence=level, seed=seed)
    return cast("tuple[float, float, float]", tuple(float(bound) for bound in found))
