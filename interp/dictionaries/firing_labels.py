"""What sparse latents fire on: the label of each, chosen on half of the documents and scored on the other; labels that
belong together; and random latents that fire as often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.dictionaries.reading import _correlations
from interp.dictionaries.rows import mask_matrix

if TYPE_CHECKING:
    import pandas as pd


def label_latents(
    activations: Float[Tensor, "token latent"],
    labels: Mapping[str, Tensor],
    documents: Int[Tensor, " token"],
    *,
    precision: float | int = 0.5,
    lift: float | int = 2.0,
    min_fires: int = 10,
) -> pd.DataFrame:
    """The label that each latent fires on, and whether it fires on it often enough to be called that.

    Chosen is the label with the largest correlation with the latent on even documents; everything reported is of odd
    ones. Unlike `label_features` this asks nothing of tokens on which a latent is silent: a latent that fires on a few
    of the tokens of a label, and on nothing else, has a poor AUROC and a perfect precision.

    Columns: `latent`; `label`, missing for latents that never fire on even documents; `precision`, the share of the
    label among the tokens on which the latent is not zero; `base_rate`, its share among all; `recall`, the share of the
    label's tokens that the latent fires on; `fires`, on how many tokens it does; `found`, whether all three thresholds
    are met.

    Args:
        labels: `{name: [token] bool}`, see `label_masks`.
        documents: [token], the document of each token.
        precision: Least share of the label among the tokens fired on.
        lift: Least ratio of precision to base rate.
        min_fires: Least number of tokens fired on, in either half.

    Raises:
        ValueError: If sizes do not fit or there are fewer than four documents.
    """
    import pandas as pd

    scored = FiringLabels(activations, labels, documents, precision=precision, lift=lift, min_fires=min_fires)
    return pd.DataFrame(scored.columns())


class FiringLabels:
    """The numbers behind `label_latents`, kept by document so that documents can be resampled.

    Attributes:
        names: The labels.
        label: [latent], number of the chosen label, -1 for none.
        hits, fires: [document, latent], tokens fired on with the label, and all, in scoring documents.
        carried, tokens: [document, label] and [document], tokens with the label, and all.
    """

    def __init__(
        self,
        activations: Tensor,
        labels: Mapping[str, Tensor],
        documents: Tensor,
        *,
        precision: float,
        lift: float,
        min_fires: int,
    ) -> None:
        truth = mask_matrix(labels, len(activations)).double()
        _, order = torch.unique(documents.cpu(), return_inverse=True)
        if len(order) != len(activations) or int(order.max()) < 3:
            raise ValueError(f"documents has {len(order)} entries, {int(order.max()) + 1} different; expected one for "
                             f"each of {len(activations)} tokens, of at least 4 documents")  # fmt: skip
        scores = activations.detach().cpu().double()
        self.names, self.floor, self.lift, self.min_fires = list(labels), float(precision), float(lift), min_fires
        choosing = order % 2 == 0
        on = (scores != 0).double()
        self.seen = on[choosing].sum(0)
        related = _correlations(scores[choosing], truth[choosing]).nan_to_num(-2.0)
        self.label = torch.where(related.amax(0) > -2, related.argmax(0), -1)
        of = torch.unique(order[~choosing], return_inverse=True)[1]
        n = int(of.max()) + 1
        on, truth = on[~choosing], truth[~choosing]
        chosen = truth[:, self.label.clamp(min=0)]
        self.hits, self.fires, self.carried = (
            torch.zeros(n, part.shape[1], dtype=torch.float64).index_add_(0, of, part).numpy()
            for part in (on * chosen, on, truth)
        )
        self.tokens = np.bincount(of.numpy(), minlength=n).astype(np.float64)

    def found(self, weights: np.ndarray | None = None) -> Bool[np.ndarray, " latent"]:
        """Which latents have their label, with every document counted once or as `weights` say."""
        w = np.ones(len(self.tokens)) if weights is None else weights
        hits, fires = w @ self.hits, w @ self.fires
        base = (w @ self.carried)[self.label.clamp(min=0).numpy()] / (w @ self.tokens)
        share = hits / np.maximum(fires, 1)
        enough = (fires >= self.min_fires) & (self.seen.numpy() >= self.min_fires)
        return enough & (share >= self.floor) & (share >= self.lift * base) & (self.label.numpy() >= 0)

    def draws(self, n: int, seed: int) -> Bool[np.ndarray, "draw latent"]:
        """`found` under resamples of the scoring documents; the chosen labels stay."""
        size = len(self.tokens)
        counts = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=n).astype(np.float64)
        return np.stack([self.found(weights) for weights in counts])

    def columns(self) -> dict[str, Any]:
        at = self.label.clamp(min=0).numpy()
        hits, fires, carried = self.hits.sum(0), self.fires.sum(0), self.carried.sum(0)[at]
        with np.errstate(invalid="ignore", divide="ignore"):
            share, recall = np.where(fires > 0, hits / fires, np.nan), np.where(carried > 0, hits / carried, np.nan)
        return {
            "latent": np.arange(len(at)),
            "label": [self.names[i] if i >= 0 else None for i in self.label.tolist()],
            "precision": share,
            "base_rate": carried / self.tokens.sum(),
            "recall": recall,
            "fires": fires.astype(int),
            "found": self.found(),
        }


def label_groups(
    labels: Mapping[str, Tensor], *, containment: float | int = 0.8, widest: float | int = 0.25
) -> dict[str, str]:
    """Which labels belong together: `{label: name of its group}`.

    A label belongs to the smallest other label that holds at least `containment` of its tokens, that one to its own,
    and so on; the last one names the group. So the roles of one family of documents are in the group of the family,
    and two labels that merely overlap, or a word class that is found everywhere, are not joined.

    Args:
        containment: Least share of a label's tokens that lie in the other.
        widest: Labels on more than this share of all tokens take no others in: half of a text says nothing of what it
            is about.

    Raises:
        ValueError: If a threshold is not a share above one half, or labels do not fit.
    """
    if not 0.5 < containment <= 1 or not 0 < widest <= 1:
        raise ValueError(
            f"containment={containment}, widest={widest}; expected 0.5 < containment <= 1, 0 < widest <= 1"
        )
    names = list(labels)
    truth = mask_matrix(labels, len(next(iter(labels.values()), torch.empty(0)))).double()
    size, shared = truth.sum(0), truth.T @ truth
    narrow = size <= widest * len(truth)
    parent = list(range(len(names)))
    for i in range(len(names)):
        larger = [
            j for j in range(len(names))
            if (size[j], -j) > (size[i], -i) and narrow[j] and shared[i, j] >= containment * size[i]
        ]  # fmt: skip
        if larger and size[i] > 0:
            parent[i] = min(larger, key=lambda j: (float(size[j]), j))
    groups = {}
    for i, name in enumerate(names):
        while parent[i] != i:
            i = parent[i]
        groups[name] = names[i]
    return groups


def random_latents(
    values: Float[Tensor, "token unit"], activations: Float[Tensor, "token latent"], *, seed: int = 0
) -> Float[Tensor, "token latent"]:
    """As many latents along random directions, each with the threshold that makes it fire on as many of these tokens.

    A baseline for whatever is said of single latents, since a latent that fires rarely needs little luck.

    Args:
        values: What the dictionary reads, `TokenRows.values`.
        activations: The dictionary's latents there.

    Raises:
        ValueError: If the numbers of tokens differ.
    """
    if len(values) != len(activations) or not len(values):
        raise ValueError(f"values are of {len(values)} tokens and activations of {len(activations)}; expected one each")
    draws = torch.Generator().manual_seed(seed)
    directions = torch.randn(values.shape[1], activations.shape[1], generator=draws).to(values)
    scores = (values - values.mean(0)).float() @ directions.float()
    ordered = scores.sort(0, descending=True).values
    ordered = torch.cat([ordered, ordered[-1:] - 1])  # below all of them, for latents that always fire
    fires = (activations != 0).sum(0)
    return (scores - ordered.gather(0, fires[None].to(scores.device))).clamp(min=0)


def groups_of(labels: Sequence[str], groups: Mapping[str, str] | None, masks: Mapping[str, Tensor]) -> list[str]:
    """The group of each label: as given, by `label_groups` where not; labels that a mapping lacks stand alone."""
    known = label_groups(masks) if groups is None else groups
    return [known.get(label, label) for label in labels]
