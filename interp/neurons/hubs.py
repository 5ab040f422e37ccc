"""Do a few tokens label most neurons? Hub tokens, and how evenly labels are spread over the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from scipy import stats as _scipy
from torch import Tensor

from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd

    from interp.neurons.atlas import NeuronAtlas

_UNIFORM_DRAWS = 20


@dataclass(frozen=True, eq=False, repr=False)
class Hubness(Result):
    """How often each token is a label.

    `values` (side, token): number of neurons that have the token as their label. `is_hub` (side, token): tokens with
    more neurons than chance would give any of them.

    Attributes:
        is_hub: True for hub tokens.
        null_counts: (side, token) labels of the null neurons; NaN if none were given.
        share: Which share of the vocabulary, its most frequent labels, `table` is about.
        tokens: The strings of the tokens, if they are known.
    """

    is_hub: xr.DataArray
    null_counts: xr.DataArray
    share: float
    tokens: list[str]

    def table(self) -> pd.DataFrame:
        """One row per side.

        Columns: `neurons`; `labels`, how many different ones there are; `top_share`, the share of neurons that the most
        frequent labels (1 % of the vocabulary) cover; `entropy` of the label distribution in bits; the same two for
        labels drawn evenly (`top_share_even`, `entropy_even`: with few neurons these too are far from 1 % and
        log2 d_vocab) and for the null neurons if given (`_null`); `hubs`, the number of hub tokens, and `hub_share`,
        the share of neurons they label.
        """
        import pandas as pd

        rows = []
        for place, side in enumerate(self.values["side"].values):
            counts = self.values.values[place].astype(int)
            n, d_vocab = int(counts.sum()), len(counts)
            rng = np.random.default_rng(0)
            even = rng.multinomial(n, np.full(d_vocab, 1 / d_vocab), size=_UNIFORM_DRAWS)
            row = {
                "side": str(side),
                "neurons": n,
                "labels": int((counts > 0).sum()),
                "top_share": _top_share(counts, self.share),
                "top_share_even": float(np.mean([_top_share(draw, self.share) for draw in even])),
                "entropy": _entropy(counts),
                "entropy_even": float(np.mean([_entropy(draw) for draw in even])),
            }
            if self._has_null():
                null = self.null_counts.values[place].astype(int)
                row |= {"top_share_null": _top_share(null, self.share), "entropy_null": _entropy(null)}
            hubs = self.is_hub.values[place]
            row |= {"hubs": int(hubs.sum()), "hub_share": float(counts[hubs].sum() / n)}
            rows.append(row)
        return pd.DataFrame(rows)

    def hubs(self, side: str | None = None) -> pd.DataFrame:
        """Hub tokens, those with most neurons first: `side`, `token` (its id), `string`, `neurons`, `share`, and
        `share_null` if null neurons were given. A token that is a hub among null neurons as well owes it to where it
        stands in the vocabulary; one that is a hub among real neurons only has neurons."""
        import pandas as pd

        sides = [str(name) for name in self.values["side"].values]
        if side is not None and side not in sides:
            raise ValueError(f"no side {side!r} here; there are {', '.join(map(repr, sides))}")
        rows = []
        for place, name in enumerate(sides):
            if side not in (None, name):
                continue
            counts = self.values.values[place]
            found = np.flatnonzero(self.is_hub.values[place])
            for token in found[np.argsort(-counts[found], kind="stable")]:
                row = {"side": name, "token": int(token), "string": self.tokens[token] if self.tokens else ""}
                row |= {"neurons": int(counts[token]), "share": float(counts[token] / counts.sum())}
                if self._has_null():
                    null = self.null_counts.values[place]
                    row["share_null"] = float(null[token] / null.sum())
                rows.append(row)
        columns = ["side", "token", "string", "neurons", "share"]
        return pd.DataFrame(rows, columns=None if rows else columns)

    def plot(self) -> Any:
        """Figure: share of neurons covered by the n most frequent labels, a line per side, with that of labels drawn
        evenly."""
        from interp.plotting import lines

        return lines(
            self._curves(),
            x="labels",
            y="share",
            group="side",
            title="Neurons covered by the most frequent labels",
            unit="share of neurons",
            x_title="most frequent labels",
            log_x=True,
        )

    def _has_null(self) -> bool:
        return not bool(np.isnan(self.null_counts.values).any())

    def _curves(self) -> pd.DataFrame:
        import pandas as pd

        curves = {str(side): self.values.sel(side=side).values for side in self.values["side"].values}
        n, d_vocab = int(next(iter(curves.values())).sum()), self.values.sizes["token"]
        curves["drawn evenly"] = np.random.default_rng(0).multinomial(n, np.full(d_vocab, 1 / d_vocab))
        places = np.unique(np.geomspace(1, d_vocab, 60).round().astype(int))
        frames = []
        for name, counts in curves.items():
            covered = np.sort(counts)[::-1].cumsum() / counts.sum()
            frames.append(pd.DataFrame({"side": name, "labels": places, "share": covered[places - 1]}))
        return pd.concat(frames, ignore_index=True)


def hubness(
    labels: NeuronAtlas | Tensor | np.ndarray,
    d_vocab: int | None = None,
    *,
    null_labels: Tensor | np.ndarray | None = None,
    share: float = 0.01,
    level: float = 0.01,
) -> Hubness:
    """How labels are spread over the vocabulary. No forward.

    A token is a hub if more neurons have it as their label than chance explains: the upper tail of the binomial with
    probability 1 / d_vocab, or with the token's share among null neurons if that is larger, Bonferroni-corrected over
    the vocabulary at `level`.

    Args:
        labels: An atlas, or token ids `[..., neuron]` (an array is one side). Negative ids, which mark neurons that
            were not decoded, are left out.
        d_vocab: Size of the vocabulary; an atlas knows it.
        null_labels: Labels of null neurons (`rotation_null`), `[..., neuron]` for an array, `[side, ...]` for an atlas.
            Then only tokens that exceed their share among these are hubs.
        share: The share of the vocabulary whose coverage `table` gives, at least one token.
        level: Chance that any token at all is called a hub when labels are drawn evenly.

    Raises:
        ValueError: If there are no labels, ids are not below `d_vocab`, or a share is not between 0 and 1.

    Source:
        Hubs in nearest-neighbour search: Radovanovic et al. 2010 (JMLR 11). With scores that grow with the norm of a
        token's direction ("dot", "logit"), rare tokens with large directions become hubs; compare the table for
        "dot" and "centred_cosine".
    """
    for name, value in (("share", share), ("level", level)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    if isinstance(labels, Tensor | np.ndarray):
        if d_vocab is None:
            raise ValueError("labels given as an array need d_vocab, the size of the vocabulary they are ids of")
        ids, sides, tokens, record = _flat(labels)[None], ["labels"], [], {}
        null = None if null_labels is None else _flat(null_labels)[None]
    else:
        array = labels.label_ids
        sides = [str(side) for side in array["side"].values]
        ids = array.values.reshape(len(sides), -1)
        tokens, record = list(labels.token_strings), dict(labels.provenance)
        d_vocab = len(tokens) if d_vocab is None else d_vocab
        null = None if null_labels is None else np.asarray(_flat(null_labels)).reshape(len(sides), -1)
    counts = np.stack([_counts(row, d_vocab) for row in ids])
    rate, null_counts = np.full(counts.shape, 1 / d_vocab), np.full(counts.shape, np.nan)
    if null is not None:
        null_counts = np.stack([_counts(row, d_vocab) for row in null])
        rate = np.maximum(rate, null_counts / null_counts.sum(1, keepdims=True))
    chance = _scipy.binom.sf(counts - 1, counts.sum(1, keepdims=True), rate)
    coords = {"side": sides, "token": np.arange(d_vocab)}
    return Hubness(
        labelled(counts, ("side", "token"), coords, unit="neurons"),
        {**record, "hubness": {"share": share, "level": level, "null": null is not None}},
        is_hub=xr.DataArray((chance < level / d_vocab) & (counts > 1), dims=("side", "token"), coords=coords),
        null_counts=labelled(null_counts, ("side", "token"), coords, unit="neurons"),
        share=share,
        tokens=tokens,
    )


def _flat(labels: Any) -> np.ndarray:
    return (labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)).reshape(-1)


def _counts(ids: np.ndarray, d_vocab: int) -> np.ndarray:
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"labels are {ids.dtype}; expected token ids, which are integers")
    ids = ids[ids >= 0]
    if len(ids) == 0:
        raise ValueError("there are no labels: every id is negative, which marks neurons that were not decoded")
    if ids.max() >= d_vocab:
        raise ValueError(f"label {int(ids.max())} is not below d_vocab {d_vocab}")
    return np.bincount(ids, minlength=d_vocab)


def _top_share(counts: Sequence[int] | np.ndarray, share: float) -> float:
    n_top = max(1, math.ceil(share * len(counts)))
    return float(np.sort(counts)[::-1][:n_top].sum() / np.sum(counts))


def _entropy(counts: Sequence[int] | np.ndarray) -> float:
    p = np.asarray(counts)[np.asarray(counts) > 0] / np.sum(counts)
    return float(-(p * np.log2(p)).sum())
