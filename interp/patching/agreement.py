"""How well an approximation of patching agrees with exact patching, over all cells, with intervals over examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import xarray as xr

from interp.patching._cells import choice
from interp.patching._comparing import constant, overlaps, quantiles, statistics, top
from interp.patching.effects import Effects
from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd

Statistic = Literal["pearson", "spearman", "precision", "sign", "stability"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
BOUNDS: tuple[str, ...] = ("estimate", "low", "high")
_BLOCK = 2_000_000  # numbers in one block of resamples, which bounds the memory


@dataclass(frozen=True, eq=False, repr=False)
class Agreement(Result):
    """Statistics of an approximation against exact effects; `values` has dimensions `(statistic, bound)`.

    Cells are means over examples. The bounds are those of the percentile bootstrap over examples, drawn jointly for
    both results, so they say what other prompts of the kind would have given for this model and these cells.

    - `pearson`: over all cells, exact zeros included, as the papers report it.
    - `spearman`: over the cells that are not exactly 0 in both results for every example. Those cannot matter, both
      methods know it, and as one large tie in both they would raise the correlation of ranks without any merit. Ties
      among the others get their mean rank.
    - `precision`: share of the exact top k (by magnitude) that is in the approximation's top k.
    - `sign`: share of the exact top k whose sign the approximation has right; a score of 0 has none.
    - `stability`: Jaccard overlap of the approximation's top k on two resamples of the examples: mean over all pairs of
      resamples, with the percentiles of these pairs. Says nothing about the exact effects.

    Attributes:
        reference: Mean exact effect of every cell.
        approximation: Mean score of every cell.
        k: Size of the top sets.
    """

    reference: xr.DataArray
    approximation: xr.DataArray
    k: int

    @property
    def pearson(self) -> float:
        return self._estimate("pearson")

    @property
    def spearman(self) -> float:
        return self._estimate("spearman")

    @property
    def precision(self) -> float:
        return self._estimate("precision")

    @property
    def sign(self) -> float:
        return self._estimate("sign")

    @property
    def stability(self) -> float:
        return self._estimate("stability")

    def interval(self, statistic: Statistic) -> tuple[float, float]:
        """The bounds of a statistic."""
        choice("statistic", statistic, STATISTICS)
        low, high = self.values.sel(statistic=statistic, bound=["low", "high"]).values
        return float(low), float(high)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per statistic: `estimate`, `low`, `high`."""
        frame = self.values.to_pandas()
        frame.columns.name = None
        return frame.reset_index()

    def cells(self) -> pd.DataFrame:
        """One row per cell: its coordinates, `exact` and `approximation` (means over examples)."""
        frame = self.reference.rename("exact").to_dataframe().reset_index()
        return frame.assign(approximation=self.approximation.values.ravel())

    def plot(self) -> Any:
        """Scatter of the approximation (y) against exact effects (x), one point per cell, with the line of equality.

        Points are coloured by layer; their coordinates are in the hover text, Pearson's r with its interval in the
        title.
        """
        from interp.plotting import scatter

        p, frame = self.provenance, self.cells()
        low, high = self.interval("pearson")
        r = f"r = {self.pearson:.3f} [{low:.3f}, {high:.3f}]" if np.isfinite(self.pearson) else "r undefined"
        exact = "|exact effect|" if p["unsigned"] else "Exact effect"
        return scatter(
            frame,
            x="exact",
            y="approximation",
            colour="layer" if "layer" in frame else None,
            hover=[str(name) for name in frame.columns if name not in ("exact", "approximation")],
            title=f"{p['method']} against exact {p['site']}: {r}",
            x_title=f"{exact} ({p['direction']}; {p['metric']}, {p['unit']})",
            y_title=f"{p['method']} score ({p['unit']})",
        )

    def __repr__(self) -> str:
        p = self.provenance
        parts = []
        for name in STATISTICS:
            low, high = self.interval(name)
            label = f"{name}@{self.k}" if name in ("precision", "stability", "sign") else name
            parts.append(f"{label} {self._estimate(name):.3f} [{low:.3f}, {high:.3f}]")
        head = f"Agreement({p['method']} with exact {p['site']}, {p['direction']}: " + ", ".join(parts)
        counts = f"{p['n_cells']} cells, {p['n_zero']} of them exactly 0 in both, {p['n_examples']} examples"
        return f"{head}; {counts}{''.join('; ' + note for note in p['notes'])})"

    def _estimate(self, statistic: str) -> float:
        return float(self.values.sel(statistic=statistic, bound="estimate"))


def agreement(
    reference: Effects,
    approximation: Effects,
    *,
    k: int = 10,
    level: float | int = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Agreement of approximate scores with exact effects on the same cells and examples; costs no forward.

    Cells are means over examples, as in the RelP paper's correlation over (layer, position). Agreement of the largest
    cells is what precision and sign say; Pearson is dominated by those too, Spearman by the many small ones. Scores
    without a sign (GradDrop) are compared with the magnitude of the exact effects.

    Args:
        reference: From `activation_patch`.
        approximation: From `attribution_patch`, with the same site, axes, positions and direction.
        k: Size of the top sets, below the number of cells that can matter.
        level: Of the intervals.
        n_resamples: Resamples of the examples, at least 100.

    Raises:
        ValueError: If the two results differ in cells, examples, site, direction, value or metric; a cell was not
            measured; there are fewer than 2 examples; the exact effects are constant; or `k` is too large. If the
            approximation is constant (a saturated or dead path) its correlations, precision and stability are NaN, and
            the result says so: that is a finding, not a mistake of the call.

    Source:
        Pearson over cells: Rezaei Jafari et al. 2025 (arXiv:2508.21258), table 1, without intervals there. Overlap of
        top sets across bootstrap resamples: proposed for circuits in arXiv:2510.00845; here of node rankings.

    Example:
        >>> exact = interp.patching.activation_patch(bridge, p, m, site="mlp_out")
        >>> relp = interp.patching.attribution_patch(bridge, p, m, sites=["mlp_out"], method="relp")["mlp_out"]
        >>> interp.patching.agreement(exact, relp).plot()
    """
    check_comparable(reference, approximation)
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1; a 95 % interval is level=0.95")
    if n_resamples < 100:
        raise ValueError(f"n_resamples={n_resamples} is too few for an interval or a stability; expected at least 100")
    dims = reference.cells
    exact, scores = (flat(effects, dims) for effects in (reference, approximation))
    n = exact.shape[1]
    if n < 2:
        raise ValueError(f"the results hold {n} example, of which nothing can be resampled; expected at least 2")
    no_sign = unsigned(approximation)
    zero = (exact == 0).all(1) & (scores == 0).all(1)
    matter = int((~zero).sum())
    if constant(exact.mean(1)[None])[0]:
        raise ValueError(
            f"all {len(exact)} exact mean effects are {exact[0].mean():.4g}: there is nothing that scores could agree "
            "with; patch other positions, or check that clean and corrupted prompts differ"
        )
    if not 1 <= k < matter:
        raise ValueError(
            f"k={k}, but {matter} of {len(exact)} cells are not exactly 0 in both results; expected k from 1 to "
            f"{matter - 1}, since k of k always agree"
        )

    found = statistics(exact.mean(1)[None], scores.mean(1)[None], ~zero, k, no_sign)
    draws = {name: np.empty(n_resamples) for name in found}
    tops = np.empty((n_resamples, k), dtype=np.int64)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples) / n
    step = max(1, _BLOCK // len(exact))
    for start in range(0, n_resamples, step):
        weights = counts[start : start + step].T
        a, b = (exact @ weights).T, (scores @ weights).T  # [resample, cell]
        for name, value in statistics(a, b, ~zero, k, no_sign).items():
            draws[name][start : start + step] = value
        tops[start : start + step] = top(b, k)
    tail = [(1 - level) / 2, (1 + level) / 2]
    notes = []
    if no_sign:
        notes.append("the scores have no sign: compared with the magnitude of the exact effects")
    if constant(scores.mean(1)[None])[0]:
        notes.append(f"all scores are {scores[0].mean():.4g}, so they rank nothing and correlate with nothing")
        overlap = np.full(3, np.nan)
    else:
        pairs = overlaps(tops)
        overlap = np.array([pairs.mean(), *np.quantile(pairs, tail)])
    rows = [[found[name][0], *quantiles(draws[name], tail)] for name in STATISTICS[:-1]] + [overlap]
    provenance = {
        "model": reference.provenance.get("model"),
        "method": str(approximation.provenance.get("method", "approximation")),
        "site": reference.site,
        "direction": reference.direction,
        "value": reference.value,
        "metric": reference.metric,
        "unit": str(reference.values.attrs.get("unit", "")),
        "unsigned": no_sign,
        "level": level,
        "n_resamples": n_resamples,
        "seed": seed,
        "n_cells": len(exact),
        "n_zero": len(exact) - matter,
        "n_examples": n,
        "notes": notes,
        "reference": reference.provenance,
        "approximation": approximation.provenance,
    }
    values = labelled(np.array(rows), ["statistic", "bound"], {"statistic": list(STATISTICS), "bound": list(BOUNDS)})
    means = reference.mean(), approximation.mean().transpose(*dims)
    return Agreement(values, provenance, abs(means[0]) if no_sign else means[0], means[1], k)


def unsigned(effects: Effects) -> bool:
    """Whether scores are magnitudes (`grad_drop`)."""
    return bool(effects.provenance.get("grad_drop", False))


def flat(effects: Effects, dims: tuple[str, ...]) -> np.ndarray:
    """The values as `[cell, example]`, float64, cells in the order of these dimensions."""
    values = effects.values.transpose(*dims, "example").values.astype(np.float64)
    return values.reshape(-1, values.shape[-1])


def check_comparable(reference: Effects, approximation: Effects) -> None:
    """Raise unless both results are of the same cells and examples of the same experiment."""
    for name, effects in (("reference", reference), ("approximation", approximation)):
        if not isinstance(effects, Effects):
            hint = "; attribution_patch gives one per site, pass scores['z']" if isinstance(effects, dict) else ""
            raise ValueError(f"{name} is {type(effects).__name__}, expected Effects{hint}")
    for name in ("site", "direction", "value", "metric"):
        mine, other = getattr(reference, name), getattr(approximation, name)
        if mine != other:
            raise ValueError(
                f"the reference has {name}={mine!r} and the approximation {name}={other!r}: two different experiments; "
                f"run both with the same {name}"
            )
    a, b = reference.values, approximation.values
    if set(a.dims) != set(b.dims):
        raise ValueError(
            f"the reference has dimensions {tuple(a.dims)} and the approximation {tuple(b.dims)}; run both with the "
            "same axes"
        )
    for dim in a.dims:
        mine, other = (
            list(array.coords[dim].values if dim in array.coords else range(array.sizes[dim])) for array in (a, b)
        )
        if mine != other:
            raise ValueError(
                f"the two results differ in the coordinate {str(dim)!r}: {_some(mine)} in the reference and "
                f"{_some(other)} in the approximation; run both on the same layers, positions, units and prompts"
            )
    together = () if "latent" in a.dims else ("latents",)  # which were patched together
    for key in ("model", "revision", "prompts", "dictionary", *together):
        mine, other = reference.provenance.get(key), approximation.provenance.get(key)
        if mine is not None and other is not None and mine != other:
            raise ValueError(
                f"the reference is of {key} {mine!r} and the approximation of {other!r}: two different experiments"
            )
    for name, array in (("reference", a), ("approximation", b)):
        bad = int((~np.isfinite(array.values)).sum())
        if bad:
            raise ValueError(
                f"the {name} holds {bad} of {array.size} values that are NaN or infinite: cells that were not "
                "measured cannot be compared; select the others with "
                "dataclasses.replace(effects, values=effects.values.sel(...))"
            )


def _some(labels: list[Any]) -> str:
    shown = ", ".join(map(str, labels[:6]))
    return f"{len(labels)} ({shown}{', ...' if len(labels) > 6 else ''})"
