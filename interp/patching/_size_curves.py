"""What curves of faithfulness over the size of circuits share, whatever the circuits are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import xarray as xr

from interp.patching._cells import choice
from interp.results import Result, interval_arrays
from interp.stats import Interval, ratio_interval

if TYPE_CHECKING:
    import pandas as pd

Axis: TypeAlias = Literal["linear", "log"]
Area: TypeAlias = Literal["cpr", "cmd"]

_HEIGHTS: dict[Area, Callable[[np.ndarray], np.ndarray]] = {"cpr": lambda f: f, "cmd": lambda f: np.abs(1 - f)}


@dataclass(frozen=True, eq=False, repr=False)
class SizeCurve(Result):
    """The metric of circuits, `values` (circuit, example), in its own unit, and the faithfulness that follows.

    f(C) = (m(C) - m(empty)) / (m(model) - m(empty)), with means over examples in numerator and denominator: 1 is as
    good as the whole model, 0 as good as no circuit. It is not a share of anything: f is above 1 where what was ablated
    worked against the answer, and below 0 where the circuit does. For a metric that the model makes small, such as a
    divergence, numerator and denominator are both negative. A ratio of means is not the mean of ratios: single examples
    whose denominator is small do not count for more.

    The coordinates of `circuit` are labels; along it lies `share`, the size that was asked for as a share of all.

    Attributes:
        model: The metric of the whole model on the clean prompts, by example.
        empty: The metric with everything ablated, by example.
        metric: Name of the metric; its unit is `values.attrs["unit"]`.
        ablation: What ablated parts carry.
        of: `"circuit"`: what is outside of each circuit was ablated; `"complement"`: what is in it was.
    """

    _size: ClassVar[tuple[str, str, str]] = ("share", "share", "circuits")  # coordinate, its title, what is measured

    model: xr.DataArray
    empty: xr.DataArray
    metric: str
    ablation: str
    of: str

    def faithfulness(self) -> xr.DataArray:
        """f of every circuit. Raises ValueError where the whole model is just as good as the empty circuit."""
        return self.interval(n_resamples=1)["estimate"]

    def interval(self, level: float = 0.95, *, n_resamples: int = 2000, seed: int = 0) -> xr.Dataset:
        """f of every circuit with its bootstrap interval over examples: `estimate`, `low` and `high`."""
        found = ratio_interval(
            *self._gains(), confidence=level, n_resamples=n_resamples, seed=seed
        )  # all circuits share the resamples
        template = self.values.isel(example=0, drop=True)
        return interval_arrays(found, template, unit="f", level=level)

    def cpr(self, axis: Axis = "linear", *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> Interval:
        """Integral of f over size (circuit performance ratio), with its bootstrap interval; larger is better.

        It rewards circuits that do better than the model (f > 1), which says that they leave out what works against the
        answer, not that they explain the model. MIB ranks edges with their sign for it (`absolute=False`) and by
        magnitude for `cmd`: two sets of circuits, of which leaderboards have mixed up the one with the other.

        Args:
            axis: `"linear"` integrates over the share from the smallest circuit to the largest, as MIB does over that
                of edges: all sizes up to a tenth then make up a tenth of it. `"log"` integrates over the logarithm of
                the share and divides by its range, so that every order of magnitude counts alike: a mean of f.

        Source:
            Mueller et al. 2025 (arXiv:2504.13151), trapezoids at the sizes asked for. Intervals and the division on the
            logarithmic axis are ours.
        """
        return self._area("cpr", axis, level, n_resamples, seed)

    def cmd(self, axis: Axis = "linear", *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> Interval:
        """Integral of |1 - f| over size (circuit-model distance), with its bootstrap interval; 0 is best.

        Args and source as for `cpr`. Noise in f can only add to it: with few examples it is too large, and its interval
        can lie above the estimate.
        """
        return self._area("cmd", axis, level, n_resamples, seed)

    def compare(
        self,
        other: SizeCurve,
        statistic: Area = "cmd",
        axis: Axis = "linear",
        *,
        level: float = 0.95,
        n_resamples: int = 2000,
        seed: int = 0,
    ) -> Interval:
        """This curve's `cpr` or `cmd` minus the other's, with its paired bootstrap interval: both are of the same
        examples, which are resampled together, so that what makes an example hard for both does not widen it.

        Raises:
            ValueError: If the curves are not of the same model, examples and ablation, or one has no integral.
        """
        choice("statistic", statistic, _HEIGHTS)
        if self.ablation != other.ablation or not np.array_equal(self.model.values, other.model.values):
            raise ValueError(
                "the curves are compared example by example: both must be of the same model, prompts, metric and "
                f"ablation; here {self.ablation!r} with a model of {float(self.model.mean()):.4g} and "
                f"{other.ablation!r} with {float(other.model.mean()):.4g}"
            )
        mine, draws = self._areas(statistic, axis, n_resamples, seed)
        its, others = other._areas(statistic, axis, n_resamples, seed)
        return _bounds(mine - its, draws - others, level)

    def smallest(self, f: float | int = 0.9) -> float:
        """The smallest share at which a circuit is at least this faithful; NaN if none is.

        f need not rise with size: a larger circuit may fall below it again.
        """
        enough = self.values["share"].values[self.faithfulness().values >= f]
        return float(enough.min()) if len(enough) else float("nan")

    def summary(self, level: float = 0.95) -> pd.DataFrame:
        """One row for each of `cpr`, `cmd`, `cpr_log`, `cmd_log` with `estimate`, `low` and `high`, and one for
        `smallest_at_0.9`. None of them says enough alone."""
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        for name, area in (("cpr", self.cpr), ("cmd", self.cmd)):
            rows += [
                (name, *map(float, area("linear", level=level))),
                (f"{name}_log", *map(float, area("log", level=level))),
            ]
        rows.append(("smallest_at_0.9", self.smallest(0.9), np.nan, np.nan))
        return pd.DataFrame(rows, columns=["statistic", "estimate", "low", "high"])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per circuit: `circuit`, its sizes, the mean `metric`, and `f` with bounds `low`, `high`."""
        frame = self.interval().rename(estimate="f").to_dataframe().reset_index()
        frame.insert(3, "metric", self.values.mean("example").values)
        return frame

    def plot(self) -> Any:
        """Figure of f over the size, on a logarithmic axis, with its interval and a line at 1."""
        from interp.plotting import lines

        (size, x_title, measured), frame = self._size, self.to_dataframe()
        frame = frame.loc[((frame[size] > 0) & ~frame[size].duplicated()).to_numpy()]
        what = f"Faithfulness of {measured}" if self.of == "circuit" else "What is left without each circuit"
        return lines(
            frame, x=size, y="f", interval=("low", "high") if np.isfinite(frame["low"]).all() else None,
            title=f"{what} ({self.ablation} ablation)", unit=f"faithfulness of {self.metric}",
            x_title=x_title, reference=1.0, log_x=True,
        )  # fmt: skip

    def _gains(self) -> tuple[np.ndarray, np.ndarray]:
        """Numerators (circuit, example) and denominators (example) of f."""
        whole = (self.model - self.empty).values.astype(float)
        if whole.mean() == 0:
            raise ValueError(
                f"the metric is {float(self.model.mean()):.4g} on average both for the model and the empty circuit, "
                "so faithfulness is undefined; use prompts or a metric that tell the two apart, or another ablation"
            )
        return (self.values.transpose("circuit", "example") - self.empty).values.astype(float), whole

    def _area(self, statistic: Area, axis: Axis, level: float, n_resamples: int, seed: int) -> Interval:
        return _bounds(*self._areas(statistic, axis, n_resamples, seed), level)

    def _areas(self, statistic: Area, axis: Axis, n_resamples: int, seed: int) -> tuple[float, np.ndarray]:
        """The integral, and what it is in each resample of the examples."""
        choice("axis", axis, ("linear", "log"))
        if self.of != "circuit":
            raise ValueError(
                "CPR and CMD are integrals over circuits of growing size, but these are complements of them"
            )
        x = self.values["share"].values.astype(float)
        if len(x) < 2 or (np.diff(x) <= 0).any() or (axis == "log" and x[0] <= 0):
            raise ValueError(
                f"the circuits have shares {[round(float(s), 4) for s in x[:12]]}; an integral over size needs at "
                "least two, rising, and above 0 for axis='log'"
            )
        if axis == "log":
            x = np.log(x) / np.log(x[-1] / x[0])
        gains, whole = self._gains()
        n, height = len(whole), _HEIGHTS[statistic]
        estimate = float(np.trapezoid(height(gains.mean(1) / whole.mean()), x))
        if n == 1:
            return estimate, np.full(n_resamples, np.nan)
        weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples).T / n
        below = whole @ weights
        return estimate, np.trapezoid(height((gains @ weights) / np.where(below == 0, np.nan, below)).T, x)


def _bounds(estimate: float, draws: np.ndarray, level: float) -> Interval:
    if np.isnan(draws).all():
        return Interval(np.asarray(estimate), np.asarray(np.nan), np.asarray(np.nan))
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(np.asarray(estimate), np.asarray(low), np.asarray(high))
