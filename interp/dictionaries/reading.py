"""One reading of a dictionary: for every feature its contexts, neurons, output tokens and, where tokens have labels,
the label it tells best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.detection import auroc
from interp.dictionaries.features import GroupOverlaps, OutputTokens, group_overlaps, neuron_groups, output_tokens
from interp.dictionaries.rows import TokenRows, mask_matrix
from interp.neurons.contexts import TopContexts, contexts_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class FeatureReading:
    """What is known of each feature of a dictionary of one layer's MLP activations.

    Attributes:
        contexts: The tokens where each feature is strongest, with the text around them; `.show(feature)`.
        outputs: Tokens that each feature promotes and suppresses, directly.
        overlaps: Neurons that features share.
        frequency: [feature], share of tokens with an activation above a tenth of the feature's largest.
        neurons: Per feature its neurons and their entries, largest first.
        labels: One row per feature, see `label_features`; None without labels.
    """

    contexts: TopContexts
    outputs: OutputTokens
    overlaps: GroupOverlaps
    frequency: Float[Tensor, " feature"]
    neurons: list[list[tuple[int, float]]]
    labels: pd.DataFrame | None

    def __repr__(self) -> str:
        return f"FeatureReading({len(self.neurons)} features)"

    def to_dataframe(self, k: int = 5) -> pd.DataFrame:
        """One row per feature: frequency, strongest tokens, promoted and suppressed tokens, neurons, and the label."""
        import pandas as pd

        rows = []
        for i, neurons in enumerate(self.neurons):
            row: dict[str, Any] = {"feature": i, "frequency": float(self.frequency[i]), "neurons": len(neurons)}
            ids = self.contexts.tokens.sel(offset=0).isel(unit=i).values
            seen = dict.fromkeys(self.contexts.text(int(t)) for t in ids if t >= 0)
            row["strongest_on"] = " ".join(list(seen)[:k])
            row["promotes"] = " ".join(self.outputs.words(i, "promoted", k))
            row["suppresses"] = " ".join(self.outputs.words(i, "suppressed", k))
            rows.append({**row, "largest_neurons": " ".join(f"{n:d}{'+' if v > 0 else '-'}" for n, v in neurons[:k])})
        frame = pd.DataFrame(rows)
        return frame if self.labels is None else frame.merge(self.labels, on="feature")

    def show(self, feature: int, k: int = 10) -> Any:
        """The best `k` contexts of one feature as coloured text."""
        return self.contexts.show(feature, k)


def read_features(
    bridge: Any,
    layer: int,
    components: Float[Tensor, "feature d_mlp"],
    rows: TokenRows,
    activations: Float[Tensor, "token kind"],
    *,
    labels: Mapping[str, Tensor] | None = None,
    n_contexts: int = 10,
    n_tokens: int = 10,
    window: tuple[int, int] = (8, 3),
    once: Literal["token", "row", "context"] = "row",
) -> FeatureReading:
    """Contexts, neurons, output tokens and labels of every feature. No forward: activations are given.

    Args:
        rows: The tokens that were factorised, or others (see `token_rows`).
        activations: Each feature on these rows, such as `SNMF.transform(rows.values)`.
        labels: Truth about the rows, see `label_masks`.
        once: At most one context per document (`"row"`), per context up to the token, or no limit (`"token"`); see
            `interp.neurons.contexts_of`.

    Raises:
        ValueError: If sizes do not fit.
    """
    if activations.shape != (len(rows), len(components)):
        raise ValueError(
            f"activations are {tuple(activations.shape)} for {len(rows)} rows and {len(components)} features; expected "
            f"[token, feature], such as transform(rows.values)"
        )
    scores = activations.detach().float().cpu()
    found = contexts_of(
        scores, rows.tokens, n=n_contexts, window=window, once=once, keep=rows.keep, bridge=bridge,
        names=[f"feature {i}" for i in range(len(components))],
    )  # fmt: skip
    outputs = output_tokens(bridge, layer, components, k=n_tokens)
    groups, entries = neuron_groups(components).cpu(), components.detach().float().cpu()
    neurons = []
    for group, entry in zip(groups, entries, strict=True):
        index = group.nonzero()[:, 0]
        index = index[entry[index].abs().argsort(descending=True, stable=True)]
        neurons.append([(int(i), float(entry[i])) for i in index])
    firing = (scores > 0.1 * scores.amax(0, keepdim=True)) & (scores > 0)
    table = None if labels is None else label_features(scores, labels, rows.row)
    return FeatureReading(found, outputs, group_overlaps(components), firing.float().mean(0), neurons, table)


def label_features(
    activations: Float[Tensor, "token feature"],
    labels: Mapping[str, Tensor],
    documents: Tensor,
    *,
    level: float = 0.95,
    n_resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """The label that goes best with each feature, chosen on half of the documents and scored on the other half.

    Chosen is the label with the largest correlation with the feature. (The largest AUROC would go to rare labels: a
    feature of all nouns has a high AUROC for any rare kind of noun.)

    Columns: `feature`, `label`, `auroc` (on documents that had no part in the choice) with `low` and `high`, which
    resample those documents, and `precision`: the share of the label among the tokens there where the feature is
    strongest, as many as carry the label, beside `base_rate`. Features that are constant, or whose label no token of
    the second half has, are NaN. Some label is best for every feature: an interval that reaches 0.5 says that none was
    found.

    Args:
        labels: `{name: [token] bool}`.
        documents: [token], the document of each token; even ones choose, odd ones score.

    Raises:
        ValueError: If sizes do not fit or one half is empty.
    """
    import pandas as pd

    truth = mask_matrix(labels, len(activations))
    _, order = torch.unique(documents.cpu(), return_inverse=True)
    if len(order) != len(activations) or int(order.max()) < 3:
        raise ValueError(f"documents has {len(order)} entries, {int(order.max()) + 1} different; expected one for each "
                         f"of {len(activations)} tokens, of at least 4 documents")  # fmt: skip
    choosing = order % 2 == 0
    scores = activations.detach().double().cpu()
    scored = auroc(scores[~choosing], truth[~choosing])  # [label, feature]
    best = _correlations(scores[choosing], truth[choosing].double()).nan_to_num(-1.0).argmax(0)
    names, rows = list(labels), []
    draws = _document_draws(order[~choosing], n_resamples, seed)
    constant = scores.amax(0) == scores.amin(0)
    for i, label in enumerate(best.tolist()):
        score, mask = scores[~choosing, i], truth[~choosing, label]
        row: dict[str, Any] = {"feature": i, "label": names[label], "auroc": float(scored[label, i])}
        n = int(mask.sum())
        if bool(constant[i]) or n in (0, len(mask)):
            rows.append({"feature": i, "label": None if bool(constant[i]) else names[label], "auroc": np.nan})
            continue
        drawn = _weighted_auroc(score.numpy(), mask.numpy(), draws)
        row["low"], row["high"] = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        top = score.argsort(descending=True, stable=True)[:n]
        rows.append({**row, "precision": float(mask[top].double().mean()), "base_rate": n / len(mask)})
    columns = ["feature", "label", "auroc", "low", "high", "precision", "base_rate"]
    return pd.DataFrame(rows, columns=pd.Index(columns))


def _correlations(scores: Tensor, truth: Tensor) -> Float[Tensor, "label feature"]:
    scores, truth = scores - scores.mean(0), truth - truth.mean(0)
    return truth.T @ scores / (truth.norm(dim=0)[:, None] * scores.norm(dim=0))


def _document_draws(documents: Tensor, n_resamples: int, seed: int) -> np.ndarray:
    """How often each token counts in each resample of whole documents, [resample, token]."""
    _, place = np.unique(documents.numpy(), return_inverse=True)
    n = int(place.max()) + 1
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)[:, place].astype(np.float64)


def _weighted_auroc(score: np.ndarray, mask: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC under each row of token weights, ties counted half; NaN where a draw has one kind only."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])
    positive = np.add.reduceat(weights[:, order] * mask[order], starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * ~mask[order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, (positive * below).sum(1) / pairs, np.nan)
