"""Checking approximate scores with exact patching, at a fraction of the sweep's cost."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.patching._cells import choice
from interp.patching._comparing import CHECKED, GROUPS, Checked, Group, weighted_statistics
from interp.patching._measure import effects_of
from interp.patching._rerun import Rerun, rerun
from interp.patching._verify_edges import EdgeRerun, rerun_edges
from interp.patching.agreement import BOUNDS, flat, unsigned
from interp.patching.edge_scores import EdgeScores
from interp.patching.effects import Effects
from interp.results import Result, labelled
from interp.types import Metric

if TYPE_CHECKING:
    import pandas as pd


class PoorApproximation(UserWarning):
    """Exact patching does not bear the approximate scores out."""


@dataclass(frozen=True, eq=False, repr=False)
class Verification(Result):
    """Approximate scores beside exact effects on the cells that were patched to check them.

    `values` are exact effects per cell and example, as those of `activation_patch`; NaN where nothing was patched.

    `statistics` has dimensions `(group, statistic, bound)`. The group `"top"` are the k largest scores, `"random"` is a
    uniform sample of the other cells that can matter, `"all"` estimates what the whole sweep over cells that can matter
    would show: top cells count once, each random one for as many cells as it stands for. `pearson`, `spearman` and
    `sign` (share of signs that agree) are given for each group; `precision` (share of the exact top k that is in the
    approximate one) for `"all"` alone. Within a group, cells are alike in size, so correlations there are lower than in
    all. The bounds are from a bootstrap over examples and, unless all cells were patched, over the random cells (which
    is wider than need be where most cells were patched).

    Attributes:
        scores: The scores that were checked, per cell and example.
        group: Of each cell: 2 in the top k, 1 in the random sample, 0 not patched, -1 cannot matter and not patched.
        k: Number of top cells patched.
        n_random: Number of others patched.
        warn_below: Agreement below which the scores are called poor.
    """

    scores: xr.DataArray
    group: xr.DataArray
    statistics: xr.DataArray
    k: int
    n_random: int
    warn_below: float

    @property
    def pearson(self) -> float:
        """Estimated over all cells that can matter."""
        return self.estimate("pearson")

    @property
    def spearman(self) -> float:
        """Estimated over all cells that can matter."""
        return self.estimate("spearman")

    @property
    def precision(self) -> float:
        """Estimated share of the exact top k that is in the approximate top k."""
        return self.estimate("precision")

    @property
    def poor(self) -> list[str]:
        """What speaks against the scores, in words; empty if nothing does."""
        found = []
        trivial = self.provenance["n_matter"] <= self.k  # the top is everything
        for name in ("pearson",) if trivial else ("pearson", "precision"):
            value = self.estimate(name)
            label = f"precision@{self.k}" if name == "precision" else name
            if np.isnan(value):
                found.append(f"{label} is undefined: the exact effects or the scores of the patched cells are constant")
            elif value < self.warn_below:
                low, high = self.interval(name)
                found.append(f"{label} is {value:.2f} [{low:.2f}, {high:.2f}], below {self.warn_below:g}")
        return found

    def estimate(self, statistic: Checked, group: Group = "all") -> float:
        """A statistic of a group of cells."""
        return float(self._at(statistic, group).sel(bound="estimate"))

    def interval(self, statistic: Checked, group: Group = "all") -> tuple[float, float]:
        """Its bounds."""
        low, high = self._at(statistic, group).sel(bound=["low", "high"]).values
        return float(low), float(high)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per patched cell, largest score first: coordinates, `group`, `approximation` and `exact` (means)."""
        names = {2: "top", 1: "random"}
        frame = self.scores.mean("example").rename("approximation").to_dataframe().reset_index()
        frame = frame.assign(exact=self.values.mean("example", skipna=False).values.ravel())
        frame.insert(len(frame.columns) - 2, "group", [names.get(int(g), "") for g in self.group.values.ravel()])
        frame = frame[frame["group"] != ""]
        order = frame["approximation"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order].reset_index(drop=True)

    def plot(self) -> Any:
        """Scatter of the scores (y) against exact effects (x) on the patched cells, coloured by group."""
        from interp.plotting import scatter

        p, frame = self.provenance, self.to_dataframe()
        unit = self.values.attrs.get("unit", "")
        return scatter(
            frame,
            x="exact",
            y="approximation",
            colour="group",
            hover=[str(name) for name in frame.columns if name not in ("exact", "approximation", "group")],
            title=f"{p['method']} checked on {self.k} + {self.n_random} cells of {p['site']}: r = {self.pearson:.3f}",
            x_title=f"Exact effect ({p['direction']}; {p['metric']['name']}, {unit})",
            y_title=f"{p['method']} score ({unit})",
        )

    def __repr__(self) -> str:
        p = self.provenance
        text = [
            f"Verification of {p['method']} scores ({p['site']}, {p['direction']}) on the top {self.k} and "
            f"{self.n_random} random cells of {p['n_matter']} that can matter ({p['n_cells']} in all), "
            f"{p['cost']['forwards']:.1f} forwards instead of {p['cost']['forwards_full_sweep']:.0f}"
        ]
        for group in GROUPS if self.n_random else GROUPS[:1]:
            parts = []
            for name in CHECKED:
                value, (low, high) = self.estimate(name, group), self.interval(name, group)
                if name != "precision" or group == "all":
                    label = f"precision@{self.k}" if name == "precision" else name
                    parts.append(f"{label} {value:.3f} [{low:.3f}, {high:.3f}]")
            text.append(f"  {group + ':':8}" + ", ".join(parts))
        verdict = "poor: " + "; ".join(self.poor) if self.poor else f"holds (nothing below {self.warn_below:g})"
        return "\n".join([*text, *(f"  note:   {note}" for note in p["notes"]), f"  verdict: {verdict}"])

    def _at(self, statistic: str, group: str) -> xr.DataArray:
        choice("statistic", statistic, CHECKED)
        choice("group", group, GROUPS)
        return self.statistics.sel(statistic=statistic, group=group)


def verify(
    bridge: Any,
    prompts: Any,
    metric: Metric,
    scores: Effects | EdgeScores,
    *,
    k: int = 20,
    n_random: int = 20,
    warn_below: float | int = 0.8,
    level: float | int = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
    dictionary: Any = None,
    memory_budget: int = 2**30,
    batch_size: int | None = None,
    progress: bool = False,
) -> Verification:
    """Exact effects of the top k cells of an approximation and of a random sample of the others, and how far they
    agree.

    The cells are patched as the scores say: same site, direction, value, axes, positions and layers, and on the model,
    prompts and metric that are passed, which must be those of the scores. Other cells are not run. Of cells that cannot
    matter (the patch changes nothing that the metric sees) none is drawn, since any method gives those 0.

    Top cells show whether what was found is real, random ones whether something was missed; a few large misses among
    very many cells are found by `miss_bound`, not by a sample. Cost: at most `k + n_random` forwards of all examples
    (about half of that, see `activation_patch`) and 5 more, in `result.provenance["cost"]`.

    Args:
        scores: From `attribution_patch`, one site; or from `edge_attribution`: then edges are the cells, each replaced
            alone by `path_patch`, and all of them are taken to matter.
        k: Top cells to patch, by magnitude of the mean score; all that can matter if there are fewer (precision@k is
            then NaN, since k of k always agree).
        n_random: Others to patch; all others that can matter if there are fewer.
        warn_below: A warning is given if the estimated Pearson correlation or precision@k is below.
        level, n_resamples: Of the intervals.
        seed: For the random cells and the resamples.
        dictionary: The one whose latents the scores are of; its error is not patched.
        memory_budget, batch_size, progress: As for `activation_patch`.

    Warns:
        PoorApproximation: If Pearson or precision@k, estimated over all cells that can matter, is below `warn_below` or
            undefined.

    Raises:
        ValueError: If the scores are not finite, all equal, or seen to be of another model, metric or prompts.

    Source:
        AtP* proposes to check the top of an approximation with exact patching (Kramár et al. 2024, arXiv:2403.00745);
        the random sample, the estimates for the whole sweep and the intervals are ours.

    Example:
        >>> scores = interp.patching.attribution_patch(bridge, p, m, method="relp", sites=["mlp_out"])["mlp_out"]
        >>> interp.patching.verify(bridge, p, m, scores)
    """
    if k < 1 or n_random < 1:
        raise ValueError(
            f"k={k} and n_random={n_random}: expected at least 1 of both; the top alone cannot show what was missed"
        )
    if not 0 < level < 1 or n_resamples < 100:
        raise ValueError(f"level={level} must lie between 0 and 1, and n_resamples={n_resamples} be at least 100")
    again: Rerun | EdgeRerun
    if isinstance(scores, EdgeScores):
        if dictionary is not None:
            raise ValueError("dictionary= is for scores of latents, and these are of edges")
        again = rerun_edges(bridge, prompts, metric, scores, memory_budget=memory_budget, batch_size=batch_size)
        scores = again.scores
        matter = np.ones(scores.values.sizes["edge"], dtype=bool)
    else:
        again = rerun(
            bridge, prompts, metric, scores, dictionary=dictionary, memory_budget=memory_budget, batch_size=batch_size
        )
        matter = again.to_cells(again.matter(bridge)).ravel()
    mean = scores.mean().values.astype(np.float64)
    order = np.argsort(-abs(mean).ravel(), kind="stable")
    group = np.where(matter, 0, -1)
    # a score other than 0 where nothing can matter is an error of the method, and stays in the top
    group[order[(matter | (mean.ravel() != 0))[order]][:k]] = 2
    others = np.flatnonzero(group == 0)
    chosen = np.random.default_rng(seed).permutation(others)[:n_random]
    group[chosen] = 1
    group = group.reshape(mean.shape)

    if isinstance(again, EdgeRerun):
        exact = again.patch(bridge, prompts, metric, group > 0, progress=progress)
        dims, cost = scores.cells, dict(exact.provenance["cost"])
        cost["forwards_full_sweep"] = mean.size + cost["forwards"] - int((group > 0).sum())
        cost["forwards"] += 1  # the intact one
    else:
        swept = again.sweep(bridge, again.to_grid(group > 0), progress=progress)
        exact = effects_of(
            bridge, prompts, metric, again.where, swept, again.intact,
            site=scores.site, direction=scores.direction, value=scores.value, settings={"method": "verify"},  # type: ignore[arg-type]
        )  # fmt: skip
        dims, draws = again.dims, len(again.plan.tokens) // len(prompts)
        runs = 3 * draws  # the two that `matter` reads, and the intact one
        cost = swept.cost | {
            "forwards": round(swept.cost["forward_equivalents"] + runs, 3),
            "forwards_full_sweep": mean.size * draws + 2 * draws,
        }
    counts = {"k": int((group == 2).sum()), "n_random": len(chosen)}
    found = weighted_statistics(
        flat(exact, dims), flat(scores, dims), group.ravel(), len(others),
        no_sign=unsigned(scores), level=level, n_resamples=n_resamples, seed=seed,
    )  # fmt: skip
    notes = []
    if unsigned(scores):
        notes.append("the scores have no sign: compared with the magnitude of the exact effects")
    if len(others) <= n_random:
        notes.append("every cell that can matter was patched: these are the results of the whole sweep")
    elif n_random < 2:
        notes.append("too few random cells to say anything of those outside the top")
    if len(prompts) < 2:
        notes.append("one example: no interval")
    record = exact.provenance | {
        "method": str(scores.provenance.get("method", "approximation")),
        "site": scores.site, "direction": scores.direction, "value": scores.value, "seed": seed, "level": level,
        "n_resamples": n_resamples, "n_cells": mean.size, "n_matter": int(matter.sum()), "notes": notes,
        "cost": cost, "scores": scores.provenance,
    }  # fmt: skip
    names = {"group": list(GROUPS), "statistic": list(CHECKED), "bound": list(BOUNDS)}
    values = exact.values.transpose(*scores.values.dims)
    template = scores.values.isel(example=0, drop=True).transpose(*dims)
    result = Verification(
        values, record, scores.values, template.copy(data=group.astype(np.int8)).assign_attrs({}),
        labelled(found, list(names), names), **counts, warn_below=float(warn_below),
    )  # fmt: skip
    if result.poor:
        warnings.warn(
            f"{record['method']} scores of {scores.site} are not borne out by exact patching: "
            f"{'; '.join(result.poor)}; from the top {result.k} and {result.n_random} random "
            f"cells. Use {'path_patch' if scores.site == 'edge' else 'activation_patch'}, or another method",
            PoorApproximation,
            stacklevel=2,
        )
    return result
