"""Do features stand for concepts? AUROC of features against labels, beside neurons, random directions and supervised
ones, chosen on some documents and scored on others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from torch import Tensor

from interp.dictionaries.rows import TokenRows, mask_matrix
from interp.results import Result, labelled
from interp.stats import bootstrap_interval, paired_test

if TYPE_CHECKING:
    import pandas as pd

Encoder = Callable[[Tensor], Tensor] | Tensor
"""Rows [token, unit] to scores [token, feature]: a fitted dictionary's `transform`, or directions [feature, unit]."""

BASELINES = ("neurons", "PCA", "random", "DiffMeans", "probe")


def auroc(scores: Float[Tensor, "token unit"], labels: Bool[Tensor, "labelled label"]) -> Float[Tensor, "label unit"]:
    """Probability that a token with the label scores above one without it, ties counted half; all pairs at once.

    Exact, from average ranks in float64. Labels that every token or no token has are NaN. One sort per unit.

    Raises:
        ValueError: If the numbers of tokens differ or a score is NaN.
    """
    if len(scores) != len(labels) or not len(scores):
        raise ValueError(
            f"scores are of {len(scores)} tokens and labels of {len(labels)}; expected one each, at least 1"
        )
    if bool(torch.isnan(scores).any()):
        raise ValueError(f"{int(torch.isnan(scores).sum())} scores are NaN; a token without a score has no rank")
    ranks = torch.tensor(rankdata(scores.detach().cpu().double().numpy(), axis=0))  # average ranks, from 1
    truth = labels.cpu().double()
    positive = truth.sum(0)[:, None]
    negative = len(truth) - positive
    above = truth.T @ ranks - positive * (positive + 1) / 2
    return torch.where(positive * negative > 0, above / (positive * negative), torch.nan)


def assign_features(scores: Float[Tensor, "label feature"]) -> Int[Tensor, " label"]:
    """One feature for each label, no feature twice, so that the sum of scores (`auroc`, say) is largest.

    Raises:
        ValueError: If there are fewer features than labels, or a score is NaN.
    """
    if len(scores) > scores.shape[1] or bool(scores.isnan().any()):
        raise ValueError(
            f"scores are {tuple(scores.shape)}, {int(scores.isnan().sum())} of them NaN; expected at least as many "
            f"features as labels, and no NaN"
        )
    return torch.tensor(linear_sum_assignment(scores.detach().cpu().numpy(), maximize=True)[1])


@dataclass(frozen=True, eq=False, repr=False)
class Detection(Result):
    """How well each method tells tokens with a label from tokens without, on documents it was not chosen on.

    `values` has the dimensions (detector, k, seed, label): AUROC on the test rows of the best `k` features. Supervised
    methods have one direction per label and stand at the smallest k; what has no seed stands at seed 0. NaN elsewhere.

    Attributes:
        chosen: (detector, seed, label): the feature that was best on the training rows, -1 where there is none.
    """

    chosen: xr.DataArray

    def mean(self) -> xr.DataArray:
        """Mean over seeds, (detector, k, label)."""
        return self.values.mean("seed", keep_attrs=True)

    def summary(self, reference: str | None = None, *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """One row per k and method: mean AUROC over labels, its interval over labels, the lowest and highest mean of a
        seed, and the paired difference to a method with its interval and sign-flip p-value.

        Args:
            reference: The method that others are compared with; the first by default. A supervised method is compared
                with the best k features of others as it stands.
        """
        import pandas as pd

        means, base = self.mean(), reference or str(self.values["detector"].values[0])
        if base not in means["detector"].values:
            raise KeyError(f"no detector {base!r}; there are {', '.join(map(str, means['detector'].values))}")
        rows = []
        for k in map(int, means["k"].values):
            against = self._at(means, base, k)
            for method in map(str, means["detector"].values):
                here = means.sel(detector=method, k=k)
                if bool(here.isnull().all()):
                    continue
                both = ~np.isnan(here.values) & ~np.isnan(against)
                found = bootstrap_interval(here.values[both], confidence=level, seed=seed)
                gap = bootstrap_interval((here.values - against)[both], confidence=level, seed=seed)
                per_seed = self.values.sel(detector=method, k=k).mean("label").values
                row = {"k": k, "detector": method, "auroc": float(found.estimate), "low": float(found.low)}
                row |= {"high": float(found.high), "seed_low": np.nanmin(per_seed), "seed_high": np.nanmax(per_seed)}
                row |= {"minus_reference": float(gap.estimate), "gap_low": float(gap.low), "gap_high": float(gap.high)}
                p = np.nan if method == base else float(paired_test((here.values - against)[both], seed=seed))
                rows.append({**row, "p_value": p, "labels": int(both.sum())})
        return pd.DataFrame(rows)

    def plot(self, *, level: float = 0.95) -> Any:
        """Figure: mean AUROC by method with intervals over labels, a colour per k."""
        from interp.plotting import bars

        frame = self.summary(level=level).assign(features=lambda f: "best " + f["k"].astype(str))
        return bars(
            frame, x="detector", y="auroc", group="features", interval=("low", "high"), reference=0.5,
            title="Concept detection by method", unit="AUROC on held-out documents",
        )  # fmt: skip

    @staticmethod
    def _at(means: xr.DataArray, method: str, k: int) -> np.ndarray:
        here = means.sel(detector=method, k=k)
        return means.sel(detector=method).isel(k=0).values if bool(here.isnull().all()) else here.values


def detect_concepts(
    train: TokenRows,
    test: TokenRows,
    train_labels: Mapping[str, Tensor],
    test_labels: Mapping[str, Tensor],
    encoders: Mapping[str, Sequence[Encoder]],
    *,
    k: Sequence[int] = (1, 5),
    baselines: Sequence[str] = BASELINES,
    n_random: int | None = None,
    ridge: float = 1e-2,
) -> Detection:
    """AUROC of the best `k` features of every dictionary for every label, beside baselines that see the same rows.

    On the training rows the `k` features farthest from an AUROC of one half are chosen, either sign; the test rows are
    scored by that one feature (k = 1) or by a ridge regression on the k (k-sparse probing). Baselines:
    `"neurons"` (the units themselves), `"PCA"` (as many components as the largest dictionary), `"random"` (as many
    random directions, one set per seed: what choosing among that many is worth), `"DiffMeans"` (mean with the label
    minus mean without: supervised, one direction), `"probe"` (ridge on all units: supervised, the ceiling). No forward.

    Args:
        train_labels, test_labels: `{name: [token] bool}` (see `label_masks`); labels in both are used, those without
            a positive or a negative test row are NaN.
        encoders: By method one encoder per seed. All methods need not have as many.
        n_random: Random directions; by default as many as the largest dictionary has features.
        ridge: Penalty of the regressions, as a share of the mean variance of their inputs.

    Raises:
        ValueError: If rows, labels or encoders do not fit.

    Source:
        Feature selection and k-sparse probing follow SAEBench's sparse probing (Karvonen et al. 2025); DiffMeans as the
        baseline to beat is that of AxBench (Wu et al. 2025) and of Shafran, Geiger & Geva 2025 (arXiv:2506.10920).
        There labels are an LLM's sentences; here they are the truth about each token.
    """
    names = [name for name in train_labels if name in test_labels]
    if not names:
        raise ValueError("no label is in both train_labels and test_labels; give label_masks a smaller min_tokens")
    if train.values.shape[1] != test.values.shape[1] or train.hook != test.hook:
        raise ValueError(f"train is {train!r} and test {test!r}; expected rows of one hook")
    if unknown := sorted(set(baselines) - set(BASELINES)):
        raise ValueError(f"no baselines {unknown}; there are {', '.join(BASELINES)}")
    if clash := sorted(set(encoders) & set(baselines)):
        raise ValueError(f"encoders {clash} have the names of baselines; call them otherwise")
    if not k or min(k) < 1:
        raise ValueError(f"k={tuple(k)}; expected numbers of features, at least 1")
    seen, unseen = train.values.float(), test.values.float()
    truth = mask_matrix({name: train_labels[name] for name in names}, len(train))
    check = mask_matrix({name: test_labels[name] for name in names}, len(test))
    scored: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, members in encoders.items():
        if not members:
            raise ValueError(f"encoders[{name!r}] is empty; expected one encoder per seed")
        scored[name] = [(_encode(name, member, seen), _encode(name, member, unseen)) for member in members]
    n_seeds = max((len(members) for members in scored.values()), default=1)
    sizes = [member[0].shape[1] for members in scored.values() for member in members]
    capacity = n_random or max(sizes, default=seen.shape[1])
    ks = sorted(set(map(int, k)))
    methods = [*scored, *[name for name in BASELINES if name in baselines]]
    values = np.full((len(methods), len(ks), n_seeds, len(names)), np.nan)
    chosen = np.full((len(methods), n_seeds, len(names)), -1, dtype=np.int64)
    for m, method in enumerate(methods):
        if method in ("DiffMeans", "probe"):
            fit = _mean_differences(seen, truth) if method == "DiffMeans" else _regress(seen, truth, ridge)
            values[m, 0, 0] = np.diagonal(auroc(unseen.double().cpu() @ fit.T, check).numpy())
            continue
        members = scored.get(method) or _baseline(method, seen, unseen, capacity, n_seeds)
        for s, (a, b) in enumerate(members):
            values[m, :, s], chosen[m, s] = _best(a, b, truth, check, ks, ridge)
    coords = {"detector": methods, "k": ks, "seed": range(n_seeds), "label": names}
    record = {**train.provenance, "method": "detect_concepts", "k": ks, "train_tokens": len(train), "ridge": ridge}
    record |= {
        "test_tokens": len(test),
        "n_random": capacity,
        "positives": dict(zip(names, check.sum(0).tolist(), strict=True)),
    }
    picked = xr.DataArray(chosen, dims=("detector", "seed", "label"), coords={n: coords[n] for n in coords if n != "k"})
    return Detection(labelled(values, tuple(coords), coords, unit="AUROC"), record, picked)


def _encode(name: str, encoder: Encoder, rows: Tensor) -> Tensor:
    if isinstance(encoder, Tensor):
        if encoder.ndim != 2 or encoder.shape[1] != rows.shape[1]:
            raise ValueError(
                f"encoders[{name!r}] has directions {tuple(encoder.shape)}; expected [feature, {rows.shape[1]}]"
            )
        return rows @ encoder.to(rows).T
    scores = encoder(rows)
    if scores.ndim != 2 or len(scores) != len(rows):
        raise ValueError(
            f"encoders[{name!r}] gave {tuple(scores.shape)} for {len(rows)} rows; expected [{len(rows)}, feature]"
        )
    return scores.detach().float()


def _baseline(method: str, seen: Tensor, unseen: Tensor, capacity: int, n_seeds: int) -> list[tuple[Tensor, Tensor]]:
    if method == "neurons":
        return [(seen, unseen)]
    if method == "PCA":
        centre = seen.mean(0)
        axes = torch.linalg.svd(seen - centre, full_matrices=False)[2][:capacity]
        return [((seen - centre) @ axes.T, (unseen - centre) @ axes.T)]
    drawn = []
    for seed in range(n_seeds):
        noise = torch.randn(capacity, seen.shape[1], generator=torch.Generator().manual_seed(seed)).to(seen)
        drawn.append((seen @ noise.T, unseen @ noise.T))
    return drawn


def _best(
    seen: Tensor, unseen: Tensor, truth: Tensor, check: Tensor, ks: Sequence[int], ridge: float
) -> tuple[np.ndarray, np.ndarray]:
    """AUROC on the unseen rows (k, label), and the best feature by label: -1 for a label without a rank."""
    apart = auroc(seen, truth) - 0.5  # [label, feature]
    order = apart.abs().nan_to_num(-1.0).argsort(dim=1, descending=True, stable=True)
    held = auroc(unseen, check)
    out = np.full((len(ks), truth.shape[1]), np.nan)
    for i in range(truth.shape[1]):
        if bool(apart[i].isnan().any()) or bool(held[i].isnan().any()):
            continue
        for j, k in enumerate(ks):
            top = order[i, :k]
            if k == 1:
                value = held[i, top[0]]
                out[j, i] = float(value if apart[i, top[0]] >= 0 else 1 - value)
            else:
                fit = _regress(seen[:, top], truth[:, i : i + 1], ridge)
                out[j, i] = float(auroc(unseen[:, top].double().cpu() @ fit.T, check[:, i : i + 1]))
    return out, order[:, 0].numpy()


def _mean_differences(rows: Tensor, truth: Tensor) -> Float[Tensor, "label unit"]:
    """Mean with the label minus mean without, in float64; NaN free: a label without either is a zero direction."""
    rows, weight = rows.double().cpu(), truth.double()
    with_it, without = weight.sum(0), (1 - weight).sum(0)
    means = weight.T @ rows / with_it.clamp(min=1)[:, None]
    return means - (1 - weight).T @ rows / without.clamp(min=1)[:, None]


def _regress(rows: Tensor, truth: Tensor, ridge: float) -> Float[Tensor, "label unit"]:
    """Ridge regression of the centred label on the centred rows, in float64: the weights of every label."""
    rows, target = rows.double().cpu(), truth.double()
    rows, target = rows - rows.mean(0), target - target.mean(0)
    scale = rows.std(0).clamp(min=1e-12)  # features differ in scale by orders of magnitude
    rows = rows / scale
    gram = rows.T @ rows + ridge * len(rows) * torch.eye(rows.shape[1], dtype=rows.dtype)
    return (torch.linalg.solve(gram, rows.T @ target) / scale[:, None]).T
