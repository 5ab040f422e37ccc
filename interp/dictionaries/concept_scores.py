"""The concept-detection score of the SNMF paper, with what it leaves undefined said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries.detection import auroc
from interp.dictionaries.rows import TokenRows
from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd

CASES = ("defined", "neutral mean not positive", "activating mean not positive", "neither mean positive")
STATISTICS = ("score", "low", "high", "activating", "neutral", "difference", "auroc")


@dataclass(frozen=True, eq=False, repr=False)
class ConceptScores(Result):
    """Concept-detection scores. `values` has the dimensions (feature, statistic).

    Statistics: `score`, log(activating / neutral) in nats, NaN where it is undefined, with its bootstrap bounds `low`
    and `high` over sentences; `activating` and `neutral`, the two means; `difference` between them and `auroc`, the
    probability that an activating sentence has the larger maximum: these two are always defined.

    Attributes:
        case: (feature,), an index into `CASES`: 0 where the score is defined, else why it is not.
    """

    case: xr.DataArray

    def to_dataframe(self) -> pd.DataFrame:
        """One row per feature: every statistic and `case` in words."""
        frame = self.values.to_dataset("statistic").to_dataframe().reset_index()
        return frame.assign(case=[CASES[i] for i in self.case.values])

    def summary(self) -> dict[str, float]:
        """Mean score where defined, share defined, and the share above zero counted in two ways.

        `above_zero_defined` is among features with a defined score. `above_zero` is among all: a neutral mean that is
        not positive under a positive activating mean counts as above zero (the ratio's limit is +inf), the reverse and
        "neither" do not.
        """
        score, case = self.values.sel(statistic="score").values, self.case.values
        defined = case == 0
        above = (score > 0) | (case == 1)
        rate = float((score[defined] > 0).mean()) if defined.any() else float("nan")
        mean = float(score[defined].mean()) if defined.any() else float("nan")
        shares = {"defined": float(defined.mean()), "above_zero_defined": rate, "above_zero": float(above.mean())}
        return {"mean_score": mean, **shares, "features": float(len(case))}

    def plot(self) -> Any:
        """Figure: activating against neutral mean of every feature, coloured by whether the score is defined."""
        from interp.plotting import scatter

        frame = self.to_dataframe()
        return scatter(
            frame, x="neutral", y="activating", colour="case", hover=["feature", "score"],
            title="Concept detection: activating against neutral sentences", x_title="neutral (mean of largest cosine)",
            y_title="activating (mean of largest cosine)",
        )  # fmt: skip


def sentence_maxima(
    features: Float[Tensor, "feature unit"],
    activations: Float[Tensor, "token width"],
    sentence: Int[Tensor, " numbered"],
) -> Float[Tensor, "sentence feature"]:
    """The largest cosine of each feature with the activation of any token of each sentence.

    A zero feature or activation has cosine 0 with everything. Sentences are ordered by their number.

    Raises:
        ValueError: If sizes do not fit.
    """
    if features.shape[1] != activations.shape[1] or len(sentence) != len(activations):
        raise ValueError(
            f"features are {tuple(features.shape)}, activations {tuple(activations.shape)} and sentence has "
            f"{len(sentence)} entries; expected equal widths and one sentence number per token"
        )
    cosine = _unit(activations.double()) @ _unit(features.double().to(activations.device)).T
    groups, place = torch.unique(sentence.to(cosine.device), return_inverse=True)
    out = cosine.new_full((len(groups), len(features)), -torch.inf)
    return out.scatter_reduce(0, place[:, None].expand_as(cosine), cosine, "amax").float()


def concept_score(
    activating: Float[Tensor, "sentence feature"] | Sequence[Tensor],
    neutral: Float[Tensor, "neutral_sentence neutral_feature"] | Sequence[Tensor],
    *,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> ConceptScores:
    """S_CD = log(mean over activating sentences / mean over neutral ones) of each feature's largest cosine.

    Positive: the feature answers its own sentences more. The logarithm is undefined when a mean is not positive; such
    features have a NaN score and the reason in `case`, and are neither dropped nor clipped: clipping a neutral mean at
    a small number would turn the most selective features into whatever that number is. The difference and the AUROC
    over sentences are defined for all. Bounds resample activating and neutral sentences apart; resamples with an
    undefined score are left out, and bounds are NaN where more than one in ten is.

    Args:
        activating: Largest cosine by sentence (see `sentence_maxima`); a sequence of [sentence] tensors, one per
            feature, where each feature has its own sentences.
        neutral: Likewise for sentences that should not activate it.

    Raises:
        ValueError: If numbers of features differ, a feature has fewer than one sentence, or values are no cosines.

    Source:
        Shafran, Geiger & Geva 2025 (arXiv:2506.10920), concept detection: five LLM-written sentences of each kind per
        feature. There sentences come from an LLM's label of the feature; here from whatever labels the caller has. What
        the paper does with a neutral mean of zero or less is not said.
    """
    groups = [_per_feature(activating, "activating"), _per_feature(neutral, "neutral")]
    if len(groups[0]) != len(groups[1]):
        raise ValueError(f"activating is of {len(groups[0])} features and neutral of {len(groups[1])}; expected equal")
    out, cases = np.full((len(groups[0]), len(STATISTICS)), np.nan), np.zeros(len(groups[0]), dtype=np.int64)
    rng, tail = np.random.default_rng(seed), (1 - level) / 2
    for i, (on, off) in enumerate(zip(*groups, strict=True)):
        a, b = on.mean(), off.mean()
        cases[i] = (b <= 0) + 2 * (a <= 0)
        out[i, 3:6] = a, b, a - b
        both = torch.from_numpy(np.concatenate([on, off]))[:, None]
        truth = torch.arange(len(both))[:, None] < len(on)
        out[i, 6] = float(auroc(both, truth))
        if cases[i]:
            continue
        out[i, 0] = np.log(a / b)
        drawn = [v[rng.integers(0, len(v), (n_resamples, len(v)))].mean(1) for v in (on, off)]
        fine = (drawn[0] > 0) & (drawn[1] > 0)
        if min(len(on), len(off)) > 1 and fine.mean() >= 0.9:
            out[i, 1:3] = np.quantile(np.log(drawn[0][fine] / drawn[1][fine]), [tail, 1 - tail])
    coords = {"feature": range(len(out)), "statistic": list(STATISTICS)}
    record = {"method": "concept_score", "level": level, "n_resamples": n_resamples, "seed": seed}
    case = xr.DataArray(cases, dims=("feature",), coords={"feature": coords["feature"]})
    return ConceptScores(labelled(out, tuple(coords), coords, unit="cosine; score in nats"), record, case)


def label_concept_scores(
    features: Float[Tensor, "feature unit"],
    rows: TokenRows,
    masks: Mapping[str, Tensor],
    names: Sequence[str],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> ConceptScores:
    """`concept_score` with the truth in place of an LLM's sentences: a feature's activating sentences are the documents
    in which some token has its label, its neutral ones all others.

    Args:
        rows: Documents that the label was not chosen on, at the hook of the features.
        masks: `{name: [token] bool}`, see `label_masks`.
        names: The label of each feature, see `label_features`.

    Raises:
        KeyError: If a name is not among the masks.
        ValueError: If sizes do not fit, or all or none of the documents have a label.
    """
    if len(names) != len(features):
        raise ValueError(f"{len(names)} names for {len(features)} features; expected one label each")
    if unknown := sorted({str(name) for name in names} - set(masks)):
        raise KeyError(f"no labels {unknown[:5]}; there are {', '.join(masks)}")
    largest = sentence_maxima(features, rows.values, rows.row)
    documents, place = torch.unique(rows.row, return_inverse=True)
    on, off = [], []
    for i, name in enumerate(names):
        has = torch.zeros(len(documents), dtype=torch.bool)
        has[place[masks[name]]] = True
        if not 0 < int(has.sum()) < len(has):
            raise ValueError(f"{int(has.sum())} of {len(has)} documents have {name!r}; expected some and not all")
        column = largest[:, i].cpu()
        on.append(column[has])
        off.append(column[~has])
    found = concept_score(on, off, level=level, seed=seed)
    record = {**rows.provenance, **found.provenance, "labels": [str(name) for name in names]}
    return ConceptScores(found.values, record, found.case)


def _per_feature(values: Tensor | Sequence[Tensor], name: str) -> list[np.ndarray]:
    columns = list(values.T) if isinstance(values, Tensor) else list(values)
    out = [column.detach().cpu().double().numpy() for column in columns]
    for i, column in enumerate(out):
        if column.ndim != 1 or not len(column):
            raise ValueError(f"{name} has shape {column.shape} for feature {i}; expected at least one sentence")
        if not (np.abs(column) <= 1 + 1e-4).all():
            raise ValueError(
                f"{name} of feature {i} runs from {column.min():.3g} to {column.max():.3g}; expected cosines, from "
                f"sentence_maxima"
            )
    return out


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-30)
