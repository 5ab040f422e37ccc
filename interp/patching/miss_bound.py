"""How large an effect an approximation may have missed: a confidence bound from patching random sets of cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from scipy import stats as _scipy

from interp.patching._joint import patch_sets
from interp.patching._rerun import rerun
from interp.patching.agreement import unsigned
from interp.patching.effects import Effects
from interp.results import Result
from interp.types import Metric

if TYPE_CHECKING:
    import pandas as pd

_LEAST = 8  # sets that a cell must be in, and not be in, for a t-interval of its mean to hold


@dataclass(frozen=True, eq=False, repr=False)
class MissBound(Result):
    """Effects outside the top k of an approximation, estimated from random sets of cells, with upper bounds.

    `values` is the estimated effect of each cell (mean over examples, the sign of `Effects`); NaN in the top k, exactly
    0 where a cell cannot matter. `bound` is the result: at `level`, no cell outside the top k has a larger effect, for
    these prompts and if effects add up (see `miss_bound`).

    Attributes:
        upper: Upper bound on the magnitude of each cell's effect, at `level` for each cell by itself.
        scores: Mean score of every cell.
        level: Confidence.
        k: Number of top cells, which are left out.
    """

    upper: xr.DataArray
    scores: xr.DataArray
    level: float
    k: int

    @property
    def bound(self) -> float:
        """Upper bound on the largest magnitude of effect that the top k lacks; 0 if no other cell can matter."""
        return float(self.upper.max()) if bool(self.upper.notnull().any()) else 0.0

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell outside the top k, largest upper bound first: coordinates, `score`, `estimate`, `upper`."""
        frame = self.scores.rename("score").to_dataframe().reset_index()
        frame = frame.assign(estimate=self.values.values.ravel(), upper=self.upper.values.ravel())
        frame = frame.dropna(subset=["upper"])
        return frame.sort_values("upper", ascending=False, kind="stable").reset_index(drop=True)

    def plot(self) -> Any:
        """Scatter of each cell's upper bound (y) against the magnitude of its score (x).

        A missed cell stands high at the left.
        """
        from interp.plotting import scatter

        p, unit = self.provenance, self.values.attrs.get("unit", "")
        frame = self.to_dataframe()
        frame = frame.assign(score=frame["score"].abs())
        return scatter(
            frame,
            x="score",
            y="upper",
            colour="layer" if "layer" in frame else None,
            hover=[str(name) for name in frame.columns if name not in ("score", "upper")],
            title=f"What the top {self.k} of {p['method']} may lack in {p['site']}: at most {self.bound:.3g}",
            x_title=f"|{p['method']} score| ({unit})",
            y_title=f"Upper bound on |effect| ({self.level:.0%}, {unit})",
        )

    def __repr__(self) -> str:
        p = self.provenance
        if not p["n_cells_bounded"]:
            head = f"MissBound({p['method']}, {p['site']}, {p['direction']}"
            return f"{head}: no cell outside the top {self.k} can matter)"
        worst = self.to_dataframe().head(1).to_dict("records")
        where = (
            ", ".join(f"{key} {value}" for key, value in worst[0].items() if key in self.upper.dims) if worst else ""
        )
        return (
            f"MissBound({p['method']}, {p['site']}, {p['direction']}: outside the top {self.k} no |effect| above "
            f"{self.bound:.3g} at {self.level:.0%} confidence if effects add up; smallest top score "
            f"{p['smallest_top_score']:.3g}; {p['n_cells_bounded']} cells, {p['n_subsets']} sets of about "
            f"{p['mean_set_size']:.1f} cells{f'; least certain: {where}' if where else ''})"
        )


def miss_bound(
    bridge: Any,
    prompts: Any,
    metric: Metric,
    scores: Effects,
    *,
    k: int = 20,
    n_subsets: int = 256,
    share: float | int = 0.1,
    level: float | int = 0.95,
    use_scores: bool = True,
    seed: int = 0,
    dictionary: Any = None,
    memory_budget: int = 2**30,
    batch_size: int | None = None,
    progress: bool = False,
) -> MissBound:
    """Upper confidence bound on the largest effect outside the top k of an approximation.

    Random sets of the other cells are patched jointly, one forward of all examples for each set. The effect of a cell
    is estimated by the mean outcome of the sets that hold it minus that of the sets that do not, with Welch's
    t-interval, whose far end bounds its magnitude. The bound on the largest effect is the largest of these bounds: it
    holds wherever that of the truly largest cell does, so many cells need no correction, and the result errs on the
    safe side. It comes down to the largest effect as `n_subsets ** -0.5`.

    Three things it does not cover. Effects must add up: of cells that matter only together, or only while the others
    are intact, the joint patch shows another effect than patching one cell (a small `share` keeps sets closer to single
    cells; `activation_patch` on the suspects of `to_dataframe` decides). Examples are taken as they are, not as a
    sample. And a t-bound needs sets enough: it can fail where a few effects are much larger than all others and each is
    in a handful of sets only.

    Cost: `n_subsets` forwards of all examples and 5 more. Where fewer cells than that can matter, `activation_patch` of
    them all is cheaper and exact.

    Args:
        scores: From `attribution_patch`, one site that is not a residual stream.
        k: Top cells, by magnitude of the mean score, that are not patched.
        n_subsets: Number of sets.
        share: Share of the sets that each cell is in, the same number of sets for every cell; equally the mean share
            of the cells that a set holds. If effects add up it does not change the width of the bound.
        level: Confidence.
        use_scores: Take out of each outcome what the scores predict of it (times a fitted factor) and add each
            cell's share back. Does not bias the estimates, and narrows the bound as far as the scores are good.
        seed: For the sets.
        dictionary: The one whose latents the scores are of; its error is in no set.
        memory_budget, batch_size, progress: As for `activation_patch`.

    Raises:
        ValueError: For residual streams, whose later states overwrite the earlier ones of a set; if a cell would be in
            fewer than 8 sets or absent from fewer; if `k` leaves no cell; or as `verify`.

    Source:
        Kramár, Lieberum, Shah & Nanda 2024 (arXiv:2403.00745), diagnostics by subset sampling with Welch's test, where
        too the largest p-value over cells is the combined one. Different here: every cell is in the same number of
        sets, where theirs are drawn cell by cell; sets come from outside the top k alone; cells that cannot matter are
        left out; the scores reduce the variance; and the t-quantile is the two-sided one. Simulated with 150 additive
        effects and 256 sets, the one-sided quantile of the paper covered the largest effect in 92 % of 200 draws where
        one cell dominates, ours in 94.5 % (the worst of normal, heavy-tailed, sparse and one-sided effects) to 100 %.

    Example:
        >>> scores = interp.patching.attribution_patch(bridge, p, m, sites=["z"])["z"]
        >>> interp.patching.miss_bound(bridge, p, m, scores, k=10)
    """
    held = round(share * n_subsets)
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1; 95 % confidence is level=0.95")
    if held < _LEAST or n_subsets - held < _LEAST:
        raise ValueError(
            f"n_subsets={n_subsets} and share={share} put each cell in {held} sets and leave it out of "
            f"{n_subsets - held}; expected at least {_LEAST} of both, for instance n_subsets=256 and share=0.1"
        )
    if isinstance(scores, Effects):
        if scores.site.startswith("resid"):
            raise ValueError(
                f"site={scores.site!r} is the residual stream: patched in several layers, the last state overwrites "
                "the others, so sets of cells say nothing of each; use 'attn_out', 'mlp_out', 'z' or 'neuron', or "
                "verify()"
            )
        if not 1 <= k < (size := scores.values.isel(example=0).size):
            raise ValueError(f"k={k} of {size} cells leaves nothing that could be missed; expected 1 to {size - 1}")
    again = rerun(
        bridge, prompts, metric, scores, dictionary=dictionary, memory_budget=memory_budget, batch_size=batch_size
    )
    mean = scores.mean().values.astype(np.float64)
    order = np.argsort(-abs(mean).ravel(), kind="stable")
    outside = np.ones(mean.size, dtype=bool)
    outside[order[:k]] = False
    able = again.to_cells(again.matter(bridge)).ravel() & outside
    pool = np.flatnonzero(able)

    members = _sets(len(pool), n_subsets, held, seed)
    everywhere = np.zeros((*mean.shape, n_subsets), dtype=bool)
    everywhere.reshape(mean.size, n_subsets)[pool] = members.T
    grids = torch.stack([again.to_grid(everywhere[..., i]) for i in range(n_subsets)])
    outcomes, forwards = patch_sets(bridge, again, grids, progress=progress)
    predicted = use_scores and not unsigned(scores)
    found = bounds(members, outcomes.double().mean(1).numpy(), mean.ravel()[pool] if predicted else None, level)

    values, upper = (np.where(outside, 0.0, np.nan) for _ in range(2))
    values[pool], upper[pool] = found.estimate, found.upper
    draws = len(again.plan.tokens) // len(prompts)
    record = {key: scores.provenance[key] for key in ("model", "revision", "prompts") if key in scores.provenance}
    record |= {
        "method": str(scores.provenance.get("method", "approximation")),
        "site": scores.site,
        "direction": scores.direction,
        "value": scores.value,
        "metric": scores.metric,
        "k": k,
        "n_subsets": n_subsets,
        "share": held / n_subsets,
        "seed": seed,
        "n_cells": mean.size,
        "n_cells_bounded": len(pool),
        "mean_set_size": float(members.sum(1).mean()),
        "smallest_top_score": float(abs(mean.ravel()[order[k - 1]])),
        "use_scores": predicted,
        "factor": found.factor,
        "cost": {"forwards": round(forwards + 5 * draws, 3), "forwards_full_sweep": mean.size * draws + 2 * draws},
        "scores": scores.provenance,
    }
    template = scores.mean().transpose(*again.dims)
    value_array, upper_array = (
        template.copy(data=array.reshape(mean.shape).astype(np.float32)) for array in (values, upper)
    )
    return MissBound(value_array, record, upper_array, template, float(level), k)


class Bounds(NamedTuple):
    """Estimate and upper bound on the magnitude of each cell's effect, and the factor on the scores."""

    estimate: np.ndarray
    upper: np.ndarray
    factor: float


def bounds(members: np.ndarray, outcomes: np.ndarray, scores: np.ndarray | None, level: float) -> Bounds:
    """From sets `[set, cell]` and their outcomes `[set]`; `scores` [cell] take out what they predict."""
    factor, own = 0.0, np.zeros(members.shape[1])
    with_, without = members.T.astype(np.float64), (~members.T).astype(np.float64)  # [cell, set]
    if scores is not None and len(scores):
        expected = members @ scores
        spread = expected - expected.mean()
        if (spread**2).sum() > 0:
            factor = float(spread @ outcomes / (spread**2).sum())
            outcomes, own = outcomes - factor * expected, factor * scores
    outcomes = outcomes - outcomes.mean()
    means, errors, counts = [], [], []
    for group in (with_, without):
        count = group.sum(1)
        mean = group @ outcomes / count
        variance = (group @ outcomes**2 - count * mean**2).clip(min=0) / (count - 1)
        means.append(mean)
        errors.append(variance / count)
        counts.append(count)
    estimate = own + means[0] - means[1]
    error = errors[0] + errors[1]
    certain = error <= 0
    below = sum(part**2 / (count - 1) for part, count in zip(errors, counts, strict=True))
    freedom = np.where(certain, 1.0, error**2 / np.where(certain, 1.0, below))  # Welch and Satterthwaite
    return Bounds(estimate, abs(estimate) + _scipy.t.ppf((1 + level) / 2, freedom) * np.sqrt(error), factor)


def _sets(n_cells: int, n_subsets: int, held: int, seed: int) -> np.ndarray:
    """`[set, cell]`: each cell in `held` sets, drawn without regard to the other cells."""
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.broadcast_to(np.arange(n_subsets), (n_cells, n_subsets)), axis=1)
    return (order < held).T
