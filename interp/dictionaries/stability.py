"""Do two runs find the same features? Matching of dictionaries, and stability over seeds with intervals and a null."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from interp.results import Result, labelled

if TYPE_CHECKING:
    pass

Sign = Literal["signed", "either"]


class Matching(NamedTuple):
    """Features of one dictionary paired with those of another, one to one, so that the sum of cosines is largest.

    Attributes:
        pairs: [pair, 2]: index in the first and in the second dictionary, ordered by the first.
        cosine: [pair]; of absolute value where either sign counts.
        nearest: [first]: the largest cosine of each feature of the first with any of the second, not one to one.
    """

    pairs: Int[Tensor, "pair two"]
    cosine: Float[Tensor, " pair"]
    nearest: Float[Tensor, " first"]

    @property
    def mean(self) -> float:
        """Mean cosine of the pairs (MCC after Hungarian matching)."""
        return float(self.cosine.mean())

    @property
    def mmcs(self) -> float:
        """Mean of the largest cosine: several features may share one partner, so it is at least `mean`."""
        return float(self.nearest.mean())


def match_features(
    first: Float[Tensor, "first unit"], second: Float[Tensor, "second width"], *, sign: Sign = "signed"
) -> Matching:
    """Pair the rows of two dictionaries one to one (Hungarian method). A zero (dead) row has cosine 0 with all.

    Args:
        sign: `"signed"` takes the cosine itself, right for features with non-negative activations, whose sign is
            fixed; `"either"` takes its absolute value, for directions without one (PCA).

    Raises:
        ValueError: If widths differ or a value is not finite.
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"dictionaries are of {first.shape[1]} and {second.shape[1]} units; expected equal widths")
    for name, rows in (("first", first), ("second", second)):
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"{name} has {int((~torch.isfinite(rows)).sum())} values that are not finite")
    cosine = _unit(first) @ _unit(second).T
    if sign == "either":
        cosine = cosine.abs()
    elif sign != "signed":
        raise ValueError(f"sign must be 'signed' or 'either', got {sign!r}")
    rows, columns = linear_sum_assignment(cosine.numpy(), maximize=True)
    pairs = torch.from_numpy(np.stack([rows, columns], 1)).long()
    return Matching(pairs, cosine[pairs[:, 0], pairs[:, 1]].float(), cosine.max(1).values.float())


@dataclass(frozen=True, eq=False, repr=False)
class Stability(Result):
    """How alike the dictionaries of several runs are. `values` has the dimensions (run, other, feature): the cosine
    of each feature of `run` with its one-to-one partner in `other`; NaN for a run with itself.

    Attributes:
        null: (run, other, feature): the same after the units of every feature of `other` are permuted.
    """

    null: xr.DataArray

    def features(self, run: int = 0) -> np.ndarray:
        """[feature]: mean cosine of each feature of one run with its partners in the others."""
        return self.values.sel(run=run).mean("other").values

    def summary(self, *, threshold: float = 0.9, level: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> Any:
        """Rows `matched` and `null`: mean cosine of partners, its interval, and the share of pairs above `threshold`.

        Runs, not pairs, are resampled, since pairs of one run are not independent: a resample's mean is over pairs of
        distinct runs among those drawn, counted as often as they were. With fewer than four runs it is narrow.
        """
        import pandas as pd

        rng, n, rows = np.random.default_rng(seed), self.values.sizes["run"], []
        for name, array in (("matched", self.values), ("null", self.null)):
            cells = {"cosine": array.mean("feature").values, "share": (array > threshold).mean("feature").values}
            row: dict[str, Any] = {"dictionaries": name}
            for key, cell in cells.items():
                row[key] = float(cell[~np.eye(n, dtype=bool)].mean())
                row[f"{key}_low"], row[f"{key}_high"] = _over_runs(cell, rng, n_resamples, level)
            rows.append({**row, "runs": n, "threshold": threshold})
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """Figure: cosine with partners in the other runs, best first, for the features of the first run, beside the
        null. Sorted for each other run on its own: mean, lowest and highest of these curves."""
        import pandas as pd

        from interp.plotting import lines

        parts = []
        for name, array in (("matched", self.values), ("units permuted", self.null)):
            spread = np.sort(array.isel(run=0).drop_isel(other=0).values, axis=-1)[:, ::-1]
            part = {"rank": np.arange(1, spread.shape[1] + 1), "cosine": spread.mean(0), "dictionaries": name}
            parts.append(pd.DataFrame(part).assign(low=spread.min(0), high=spread.max(0)))
        return lines(
            pd.concat(parts), x="rank", y="cosine", group="dictionaries", interval=("low", "high"),
            title="Stability of features over seeds", unit="cosine with the partner in other runs",
            x_title="feature, most stable first",
        )  # fmt: skip


def seed_stability(
    dictionaries: Sequence[Float[Tensor, "feature unit"]], *, sign: Sign = "signed", seed: int = 0
) -> Stability:
    """Match every pair of runs of one method, one to one, and the same against a null.

    The null permutes the units of every feature of the second run, each on its own: the features keep how sparse they
    are and how large their entries, and lose which neurons they join. What remains is what matching among so many
    sparse features gives by chance.

    Args:
        dictionaries: At least two runs, each [feature, unit], of equal shape.

    Raises:
        ValueError: If there are fewer than two runs or shapes differ.

    Source:
        MCC and MMCS as in SAE evaluation (see `match_features`); Paulo & Belrose 2025 (arXiv:2501.16615) match SAEs of
        different seeds in the same way. The permutation null and resampling of runs are ours.
    """
    if len(dictionaries) < 2:
        raise ValueError(f"stability compares runs with one another; got {len(dictionaries)}, expected at least 2")
    shapes = {tuple(d.shape) for d in dictionaries}
    if len(shapes) > 1:
        raise ValueError(f"dictionaries have shapes {sorted(shapes)}; expected runs of one size")
    n, size = len(dictionaries), len(dictionaries[0])
    values = np.full((2, n, n, size), np.nan)
    rng = torch.Generator().manual_seed(seed)
    for a, b in combinations(range(n), 2):
        first, second = dictionaries[a], dictionaries[b]
        order = torch.rand(second.shape, generator=rng).argsort(1)
        for kind, other in enumerate((second, second.cpu().gather(1, order))):
            found = match_features(first, other, sign=sign)
            values[kind, a, b, found.pairs[:, 0]] = found.cosine
            values[kind, b, a, found.pairs[:, 1]] = found.cosine
    coords = {"run": range(n), "other": range(n), "feature": range(size)}
    matched, null = (labelled(part, tuple(coords), coords, unit="cosine") for part in values)
    return Stability(matched, {"method": "seed_stability", "sign": sign, "seed": seed, "runs": n}, null)


def _over_runs(cell: np.ndarray, rng: np.random.Generator, n_resamples: int, level: float) -> tuple[float, float]:
    n = len(cell)
    if n < 3:  # one pair says nothing of the spread
        return float("nan"), float("nan")
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(float)
    weight = drawn[:, :, None] * drawn[:, None, :] * ~np.eye(n, dtype=bool)
    total = weight.sum((1, 2))
    fine = total > 0  # a resample of one run only has no pair
    means = (weight * np.nan_to_num(cell)).sum((1, 2))[fine] / total[fine]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _unit(rows: Tensor) -> Tensor:
    rows = rows.detach().cpu().double()
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
