"""Reading features of MLP activations: their neurons, what they share, and the tokens they promote and suppress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from scipy.stats import hypergeom
from torch import Tensor

from interp.models import provenance
from interp.neurons._sides import side_vectors, unembedding
from interp.prompts._tokens import token_strings
from interp.results import Result, labelled
from interp.stats import adjust_p_values

if TYPE_CHECKING:
    import pandas as pd


def feature_directions(
    bridge: Any, layer: int, components: Float[Tensor, "feature d_mlp"], *, fold: bool = True
) -> Float[Tensor, "feature d_model"]:
    """What each neuron group writes to the residual stream: `components @ W_out`, without the MLP's bias.

    With `fold=True` the gain of a norm after the MLP (Gemma 2) is part of it; that norm also divides by a scale that
    depends on the rest of the MLP's output, so there the direction is exact and the size is known up to a positive
    factor per position. No forward, but three tokens on the first call on a bridge.

    Raises:
        ValueError: If the components are not of this layer's neurons, or the model's MLP is built in another way.
    """
    vectors = side_vectors(bridge, layer, "out", fold=fold)
    if components.shape[1] != len(vectors):
        raise ValueError(
            f"components have {components.shape[1]} columns and layer {layer} has {len(vectors)} neurons; expected "
            f"[feature, d_mlp] of activations at hook_name('post', {layer})"
        )
    return components.to(vectors) @ vectors


@dataclass(frozen=True, eq=False, repr=False)
class OutputTokens(Result):
    """Tokens that features raise and lower most. `values` has the dimensions (feature, side, rank), sides `"promoted"`
    and `"suppressed"`: the direct effect on the token's logit, less the mean over the vocabulary, of one unit of the
    feature scaled to norm 1, before the final norm's division.

    Attributes:
        ids: Token ids, as `values`.
        spread: (feature,): standard deviation of the effect over the vocabulary, in the same unit. A first value of
            a few spreads is what any direction gives; see `interp.neurons.decode` for nulls.
        strings: Text of the token ids in `ids`, by id as text.
    """

    ids: xr.DataArray
    spread: xr.DataArray
    strings: dict[str, str]

    def words(self, feature: int, side: str = "promoted", k: int = 5) -> list[str]:
        """Texts of the first `k` tokens of one side."""
        ids = self.ids.sel(feature=feature, side=side).values[:k]
        return [self.strings.get(str(i), f"#{i}") for i in ids]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per feature, side and rank: `value` in logits, `spreads` (value over spread), `id`, `token`."""
        frame = self.values.rename("value").to_dataframe().reset_index()
        frame["spreads"] = (self.values / self.spread).values.ravel()
        frame["id"] = self.ids.values.ravel()
        return frame.assign(token=[self.strings.get(str(i), f"#{i}") for i in frame["id"]])

    def plot(self, feature: int = 0, k: int = 10) -> Any:
        """Figure: bars of the tokens that one feature promotes and suppresses."""
        from interp.plotting import bars

        frame = self.to_dataframe().query("feature == @feature and rank < @k")
        return bars(
            frame, x="token", group="side", title=f"Direct effect of feature {feature} on logits", unit="logits",
            horizontal=True,
        )  # fmt: skip


def output_tokens(
    bridge: Any, layer: int, components: Float[Tensor, "feature d_mlp"], *, k: int = 10, fold: bool = True
) -> OutputTokens:
    """The tokens that adding a feature at `hook_post` of this layer raises and lowers most, directly.

    Features are scaled to unit norm, carried to the stream (`feature_directions`) and multiplied with the unembedding;
    the mean over the vocabulary is taken out, since logits are free up to a constant. Both signs by one convention,
    largest effects first; ties go to the lowest id. What later layers make of the feature is not in it: see
    `amplify_groups` and `interp.neurons.clamp`. No forward.

    Raises:
        ValueError: If components or `k` do not fit, or the model is not one whose unembedding reads the stream
            through a norm (see `interp.neurons.decode`).

    Source:
        Shafran, Geiger & Geva 2025 (arXiv:2506.10920), output-centric labels: the tokens of ln_final(z W_out)
        unembedded, for Gemma after the norm behind the MLP. Their scale is that of the direction alone, and LayerNorm's
        bias adds a constant vector of logits, which is not the feature's; here gains are folded and biases left out.
    """
    columns = unembedding(bridge, fold=fold)
    if not 1 <= k <= columns.shape[1]:
        raise ValueError(f"k={k}; expected 1 to {columns.shape[1]}, the size of the vocabulary")
    effects = feature_directions(bridge, layer, _unit(components), fold=fold) @ columns
    effects = (effects - effects.mean(1, keepdim=True)).cpu()
    order = torch.stack([effects.sort(dim=1, descending=True, stable=True).indices[:, :k],
                         effects.sort(dim=1, stable=True).indices[:, :k]], 1)  # fmt: skip
    values = effects.gather(1, order.flatten(1)).reshape(order.shape)
    coords = {"feature": range(len(effects)), "side": ["promoted", "suppressed"], "rank": range(k)}
    ids = xr.DataArray(order.numpy(), dims=tuple(coords), coords=coords)
    spread = labelled(effects.std(1), ("feature",), {"feature": coords["feature"]}, unit="logits")
    record = provenance(bridge, method="output_tokens", layer=layer, k=k, fold=fold, cost={"forwards": 0})
    shown = token_texts(bridge, np.unique(ids.values))
    return OutputTokens(labelled(values, tuple(coords), coords, unit="logits"), record, ids, spread, shown)


def neuron_groups(
    components: Float[Tensor, "feature unit"], *, share: float | int = 0.0
) -> Bool[Tensor, "feature unit"]:
    """Which units each feature joins: those with an entry above `share` of its largest, in magnitude.

    `share=0` takes every entry that is not zero, right for dictionaries with exact zeros (SNMF); dense ones need a
    share, and the groups then depend on it.

    Raises:
        ValueError: If `share` is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share}; expected 0 <= share < 1 of the largest entry")
    size = components.abs()
    return (size > share * size.amax(1, keepdim=True)) & (size > 0)


@dataclass(frozen=True, eq=False, repr=False)
class GroupOverlaps(Result):
    """Neurons that features share. `values` (feature, other): how many; the diagonal is the size of the group.

    Attributes:
        expected: What two groups of these sizes share by chance, if every neuron is as likely as any other.
        q_value: Chance of sharing as many or more (hypergeometric), adjusted for all pairs (Benjamini-Hochberg); NaN
            on the diagonal. Neurons that many features use raise overlaps everywhere, so this null is lenient.
        agreement: Of the shared neurons, the share with the same sign in both; NaN where none is shared.
    """

    expected: xr.DataArray
    q_value: xr.DataArray
    agreement: xr.DataArray

    def pairs(self, k: int = 10) -> pd.DataFrame:
        """The `k` pairs of features that share most in excess of chance: `feature, other, shared, expected, q_value,
        agreement`."""
        import pandas as pd

        a, b = np.triu_indices(len(self.values), 1)
        parts = {"shared": self.values, "expected": self.expected, "q_value": self.q_value, "agreement": self.agreement}
        frame = pd.DataFrame({"feature": a, "other": b, **{name: part.values[a, b] for name, part in parts.items()}})
        order = (frame["shared"] - frame["expected"]).sort_values(ascending=False, kind="stable").index
        return frame.loc[order[:k]].reset_index(drop=True)

    def plot(self) -> Any:
        """Figure: shared neurons of every pair, the diagonal left out."""
        from interp.plotting import heatmap

        off = self.values.where(~np.eye(len(self.values), dtype=bool))
        return heatmap(off, title="Neurons shared by features", unit="neurons", signed=False, origin="top")


def group_overlaps(components: Float[Tensor, "feature unit"], *, share: float | int = 0.0) -> GroupOverlaps:
    """How many neurons each pair of features has in common: M = Z Zᵀ of the binarised rows, beside chance.

    Args:
        share: As in `neuron_groups`.

    Source:
        Shafran, Geiger & Geva 2025 (arXiv:2506.10920), compositional neuron groups. Chance, q values and the agreement
        of signs are ours.
    """
    groups = neuron_groups(components, share=share).cpu().double()
    shared = groups @ groups.T
    size, n_units = groups.sum(1).numpy(), groups.shape[1]
    signed = groups * components.detach().cpu().sign().double()
    same = (shared + signed @ signed.T) / 2
    expected = np.outer(size, size) / n_units
    p = hypergeom.sf(shared.numpy() - 1, n_units, size[:, None], size[None, :])
    upper, q = np.triu_indices(len(p), 1), np.full(p.shape, np.nan)
    if len(upper[0]):
        q[upper] = adjust_p_values(np.clip(p[upper], 0, 1), method="bh")
    q = np.where(np.isnan(q), q.T, q)
    off = ~np.eye(len(p), dtype=bool)
    agreement = np.where(off & (shared.numpy() > 0), (same / shared.clamp(min=1)).numpy(), np.nan)
    coords = {"feature": range(len(p)), "other": range(len(p))}
    arrays = [labelled(array, tuple(coords), coords) for array in (shared, expected, q, agreement)]
    record = {"method": "group_overlaps", "share": float(share), "n_units": n_units}
    return GroupOverlaps(arrays[0].assign_attrs(unit="neurons"), record, *arrays[1:])


def token_texts(bridge: Any, ids: Sequence[int] | np.ndarray) -> dict[str, str]:
    """Text of token ids, by id as text; empty for a model without a tokenizer."""
    if getattr(bridge, "tokenizer", None) is None:
        return {}
    return {str(i): text for i, text in token_strings(bridge.tokenizer, (int(i) for i in ids)).items()}


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
