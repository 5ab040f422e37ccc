"""What clamping a neuron does, dose by dose, beside the same done to control neurons and along random directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from interp import stats
from interp.results import Result

_COLUMNS = ("values", "label_log_prob", "label_rank", "kl")


@dataclass(frozen=True, eq=False, repr=False)
class DoseResponse(Result):
    """Effects of clamps and of their controls.

    All arrays but two are `(neuron, arm, level, example)`; the first dimension is `set` where sets were clamped. Arms
    are `clamped`, `matched 1`, ... (control neurons) and `random 1`, ... (a random direction, as long as the change
    that the clamp makes); the coordinate `kind` drops the number. The coordinate `label` is each neuron's token.

    Attributes:
        values: Metric with the clamp minus metric without, in the metric's unit.
        doses: The number applied, `(neuron, arm, level)`, the mean over a set; for random directions that of the clamp.
        label_log_prob: Change of the label's log-probability at the read position, in nats. The label of an arm is that
            of its neuron: a control is asked what it does to the same token.
        label_rank: How many tokens the clamp raises at least as much as the label (0: none, the label is the most
            raised of all). NaN where the clamp changes the logits by no more than rounding.
        kl: KL(unclamped || clamped) at the read position, in nats.
        baseline: The metric without any clamp, `(example)`; NaN where only labels are measured.
        match_quality: How alike the control neurons are, `(control, draw, quantity)` with a row per clamped neuron: see
            `MatchedNeurons`. A neuron like no other has poor controls; None without matched controls.
    """

    doses: xr.DataArray
    label_log_prob: xr.DataArray
    label_rank: xr.DataArray
    kl: xr.DataArray
    baseline: xr.DataArray
    match_quality: xr.DataArray | None = None

    @property
    def unit(self) -> str:
        """`"neuron"` or `"set"`: the name of the first dimension."""
        return str(self.values.dims[0])

    def table(self, *, confidence: float = 0.95) -> pd.DataFrame:
        """One row per neuron, kind of arm and level: dose, mean effect with bootstrap interval over examples, and means
        of the other measures (`label_rank`: the median). Draws of a control are averaged within each example."""
        rows = []
        for kind in self._kinds():
            part = {name: self._of(kind, name) for name in _COLUMNS}  # [neuron, level, example]
            effect, low, high = stats.bootstrap_interval(part["values"].mean(1), confidence=confidence)
            rank, dose = self._of(kind, "label_rank"), self._of(kind, "doses").mean(1)
            for u, name in enumerate(self.values[self.unit].values):
                for level, shown in enumerate(self.values["level"].values):
                    ranks = rank[u, :, level][~np.isnan(rank[u, :, level])]
                    rows.append(
                        {
                            self.unit: name, "kind": kind, "level": shown, "dose": dose[u, level],
                            "effect": effect[u, level], "low": low[u, level], "high": high[u, level],
                            "label_log_prob": part["label_log_prob"][u, :, level].mean(),
                            "label_rank": np.median(ranks) if len(ranks) else np.nan,
                            "kl": part["kl"][u, :, level].mean(),
                        }
                    )  # fmt: skip
        return pd.DataFrame(rows)

    def slopes(self, *, confidence: float = 0.95) -> pd.DataFrame:
        """Metric units per unit of dose: least squares over the levels, per example, then mean and bootstrap interval.

        One row per neuron and kind of arm: `slope, low, high`. Draws of a control are averaged within each example.
        With `mode="set"` and quantile levels each arm's doses are its own neuron's.

        A control that has one dose only (a neuron that is never active, at its own quantiles) has no slope and is left
        out of the average; NaN if none is left.

        Raises:
            ValueError: If a clamped neuron has fewer than two different doses.
        """
        doses = self.doses.values.astype(np.float64)
        centred = doses - doses.mean(-1, keepdims=True)
        spread = np.square(centred).sum(-1)
        if bool((spread[:, 0] == 0).any()):
            name = self.values[self.unit].values[int(np.argmax(spread[:, 0] == 0))]
            raise ValueError(f"{name} has one dose only; a slope needs two different ones. See table() and contrast()")
        spread = np.where(spread > 0, spread, np.nan)
        slopes = np.einsum("ual,uale->uae", centred, self.values.values.astype(np.float64)) / spread[..., None]
        rows = []
        for kind in self._kinds():
            draws = slopes[:, self.values["kind"].values == kind]
            known = ~np.isnan(draws).all(1)  # [neuron, example]
            chosen = np.where(known, np.nansum(draws, axis=1), np.nan) / np.maximum((~np.isnan(draws)).sum(1), 1)
            slope, low, high = stats.bootstrap_interval(chosen, confidence=confidence)
            for u, name in enumerate(self.values[self.unit].values):
                rows.append({self.unit: name, "kind": kind, "slope": slope[u], "low": low[u], "high": high[u]})
        return pd.DataFrame(rows)

    def contrast(
        self, against: str = "matched", *, level: int = -1, quantity: str = "values", confidence: float = 0.95
    ) -> pd.DataFrame:
        """The clamp beside a control at one level, paired by example: a label counts only if it beats its controls.

        One row per neuron: `clamped`, the control's mean over draws, their `difference` with bootstrap interval, and
        the p-value that the difference is symmetric about zero (`interp.stats.paired_test`), over examples. Draws are
        averaged, so the interval is over examples and not over control neurons.

        `n` is the number of examples: those are left out in which the clamp, or every draw of the control, has no value
        (`label_rank` where a clamp changes no more than rounding). NaN if none is left.

        Args:
            against: `"matched"` or `"random"`.
            level: Index of the level; the last by default.
            quantity: `"values"`, `"label_log_prob"`, `"label_rank"` or `"kl"`.
        """
        if quantity not in _COLUMNS:
            raise ValueError(f"quantity={quantity!r}; expected one of {', '.join(map(repr, _COLUMNS))}")
        if against not in self._kinds() or against == "clamped":
            known = ", ".join(map(repr, self._kinds()[1:])) or "no control"
            raise ValueError(f"against={against!r}; this result has {known}")
        pairs = zip(self._of("clamped", quantity)[:, 0, level], self._of(against, quantity)[:, :, level], strict=True)
        rows = []
        for name, (own, draws) in zip(self.values[self.unit].values, pairs, strict=True):
            kept = ~np.isnan(own) & ~np.isnan(draws).all(0)
            row = {self.unit: name, "clamped": np.nan, against: np.nan, "difference": np.nan, "low": np.nan}
            row |= {"high": np.nan, "p_value": np.nan, "n": int(kept.sum())}
            if kept.any():
                own, other = own[kept], np.nanmean(draws[:, kept], 0)
                difference, low, high = stats.bootstrap_interval(own - other, confidence=confidence)
                row |= {"clamped": own.mean(), against: other.mean(), "difference": float(difference)}
                row |= {"low": float(low), "high": float(high), "p_value": float(stats.paired_test(own - other))}
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, which: int | str = 0) -> Any:
        """Effect over dose of one neuron (its place or its name), with its controls; bands are 95 % over examples.

        Controls are drawn at the doses of the neuron: level by level, as they are to be compared.
        """
        from interp.plotting import lines

        names = [str(name) for name in self.values[self.unit].values]
        if which not in names and not (isinstance(which, int) and -len(names) <= which < len(names)):
            raise ValueError(f"no {self.unit} {which!r}; there are {', '.join(names)}, or their places")
        name = which if isinstance(which, str) else names[which]
        table: Any = self.table()
        table = table[table[self.unit] == name]
        levels = list(self.values["level"].values)
        own = self.doses.values[names.index(name), 0]
        table = table.assign(dose=[own[levels.index(level)] for level in table["level"]])
        table = table.drop_duplicates(["kind", "dose"])
        dose = {"set": "activation set to", "add": "added to the activation"}.get(self.provenance["mode"])
        label = str(self.values["label_token"].values[names.index(name)])
        return lines(
            table, x="dose", y="effect", group="kind", interval=("low", "high"), reference=0,
            title=f"{name}{f' ({label!r})' if label else ''}: effect of its clamp by dose",
            unit=f"change of {self.provenance['metric']} ({self.values.attrs['unit']})",
            x_title=dose or "factor on the activation",
        )  # fmt: skip

    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(str(kind) for kind in self.values["kind"].values))

    def _of(self, kind: str, name: str) -> np.ndarray:
        """`[neuron, draw, level(, example)]` of the arms of a kind."""
        array = getattr(self, name)
        return array.values[:, self.values["kind"].values == kind].astype(np.float64)
