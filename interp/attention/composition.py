"""Composition of heads, from weights alone: how much of what an early head writes a later head reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.attention._weights import HeadWeights, centred, embedding, gains, head_weights
from interp.attention.head_scores import HeadScores, collect
from interp.models import provenance, require_eval
from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd

Mode = Literal["Q", "K", "V"]

PAIR = ("early_layer", "early_head", "late_layer", "late_head")


@dataclass(frozen=True, eq=False, repr=False)
class CompositionScores(Result):
    """How much a later head reads of what an earlier one writes, for every pair; NaN unless early comes before late.

    `values` (early_layer, early_head, late_layer, late_head) is |W_OV M| / (|W_OV| |M|) in Frobenius norms, with M the
    later head's W_QK ("Q"), its transpose ("K") or its W_OV ("V"); less `baseline` if that was asked for.

    Attributes:
        mode: Whether the later head's query, key or value reads.
        baseline: What independent random matrices give, 1 / sqrt(d_model).
    """

    mode: str
    baseline: float

    def table(self) -> pd.DataFrame:
        """One row per pair, highest first: `early` and `late` (L0H3), `score`."""
        import pandas as pd

        frame = self.to_dataframe().dropna(subset=["value"]).rename(columns={"value": "score"})
        for end in ("early", "late"):
            layer, head = frame[f"{end}_layer"], frame[f"{end}_head"]
            frame[end] = [f"L{a}H{b}" for a, b in zip(layer, head, strict=True)]
        frame = frame.sort_values("score", ascending=False, kind="stable")
        return pd.DataFrame(frame[["early", "late", "score"]].reset_index(drop=True))

    def strongest(self) -> xr.DataArray:
        """Of every head as the early one, the highest score with any later head, (layer, head)."""
        found = self.values.max(["late_layer", "late_head"])
        return found.rename(early_layer="layer", early_head="head").assign_attrs(self.values.attrs)

    def plot(self) -> Any:
        """Figure: early heads on the y axis, late heads on the x axis, what independent matrices give in the middle."""
        from interp.plotting import heatmap

        shown = self.values - (self.baseline if float(self.values.min()) >= 0 else 0.0)
        n_layers, n_heads = self.values.shape[:2]
        names = [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
        flat = xr.DataArray(shown.values.reshape(len(names), -1), dims=("early head", "late head"))
        title = f"{self.mode}-composition above that of independent matrices"
        return heatmap(flat, title=title, unit="score above 1/sqrt(d_model)", x_labels=names, y_labels=names)


def composition_scores(
    bridge: Any, mode: Mode, *, subtract_baseline: bool = False, norms: bool = False
) -> CompositionScores:
    """Q-, K- or V-composition of every pair of heads. No forward.

    Products of d_model x d_model matrices are never formed: thin QR factors leave d_head x d_head ones. Scores do
    not change when a head's own basis does (W_V R, R^-1 W_O). Where keys and values are shared by a group, every query
    head has its own score. Rotations of queries and keys by position (RoPE) are not in the weights: scores are
    those at distance 0.

    Args:
        mode: What of the later head reads: its query, key or value.
        subtract_baseline: Subtract 1 / sqrt(d_model), the root mean square score of independent random matrices.
        norms: Put the gains of the norm that the later head reads through (and of a norm on the early head's output)
            between them; False, as published, takes the weights as they are.

    Source:
        Elhage et al. 2021, A Mathematical Framework, "Q-, K- and V-Composition". Equal to TransformerLens'
        `bridge.all_composition_scores(mode)`, which has zeros where there is NaN here.
    """
    require_eval(bridge)
    check_mode(mode)
    weights = head_weights(bridge)
    writes, (inner, outer) = _writes(bridge, weights, norms), reader(bridge, weights, mode, norms)
    n_layers, n_heads = weights.W_Q.shape[:2]
    d_model = int(bridge.cfg.d_model)
    left = _thin(weights.W_V) @ writes  # [layer, head, d_head, d_model]: same norms as W_V W_O
    right = inner @ _thin(outer).mT  # [layer, head, d_model, d_head]
    values = torch.full((n_layers, n_heads, n_layers, n_heads), torch.nan, dtype=torch.float64)
    for early in range(n_layers - 1):
        for late in range(early + 1, n_layers):
            product = torch.einsum("ahd,bdk->abhk", left[early], right[late])
            sizes = _norm(left[early])[:, None] * _norm(right[late])
            values[early, :, late] = _norm(product) / sizes
    baseline = d_model**-0.5
    if subtract_baseline:
        values = values - baseline
    unit = "composition score above 1/sqrt(d_model)" if subtract_baseline else "composition score"
    record = provenance(
        bridge, method="composition_scores", mode=mode, norms=norms, subtract_baseline=subtract_baseline
    )
    return CompositionScores(
        labelled(values, PAIR, pair_coords(n_layers, n_heads), unit=unit), record, mode=mode, baseline=baseline
    )


def prefix_matching_from_weights(bridge: Any, previous: HeadScores, *, score: str = "previous_token") -> HeadScores:
    """Which heads look for "what came before the earlier copy of me", from weights and previous-token scores.

    An induction head's query is its own token and its key the token that a previous-token head wrote there. For every
    token, what the head looks for in the stream (W_E W_QK) is compared with what the earlier head writes (W_E W_OV):
    the trace of their product over all tokens, each less its mean over tokens, divided by both norms. This cosine, from
    -1 to 1, is averaged over earlier heads with their previous-token scores as weights; NaN in the first layer.
    `values` [score, layer, head] without examples.

    Args:
        previous: Scores that hold `score`, e.g. `pattern_scores(bridge, text, ["previous_token"])`.

    Source:
        Elhage et al. 2021, A Mathematical Framework, "How induction heads work", where the K-composed circuit has
        positive eigenvalues, whose sum is the trace. Dividing by the norms, which keeps heads that hardly compose at
        all from scoring 1, and the weighting are ours. Gains of the norms are on the path.
    """
    require_eval(bridge)
    weights, found = head_weights(bridge), gains(bridge)
    trust = torch.tensor(previous.mean(score).values).double().clamp_min(0)
    n_layers, n_heads = weights.W_Q.shape[:2]
    if trust.shape != (n_layers, n_heads):
        raise ValueError(f"previous has {tuple(trust.shape)} layers and heads; this model has {(n_layers, n_heads)}")
    tokens = centred(centred(embedding(bridge), 1, found.centred), 0)
    gram = tokens.T @ tokens
    scores: dict[int, dict[str, Tensor]] = {0: {"prefix_matching_weights": torch.full((n_heads,), torch.nan)}}
    for late in range(1, n_layers):
        query = found.before[late][:, None] * weights.W_Q[late]
        key = found.before[late][:, None] * weights.W_K[late]
        wanted = _trace(query.mT @ gram @ query, key.mT @ key).sqrt()  # |W_E W_QK|, per head
        total, weight = torch.zeros(n_heads, dtype=torch.float64), 0.0
        for early in range(late):
            value = found.before[early][:, None] * weights.W_V[early]
            out = centred(weights.W_O[early] * found.after[early], -1, found.centred)
            written = _trace(value.mT @ gram @ value, out @ out.mT).sqrt()
            for head in range(n_heads):
                alike = _trace(value[head].T @ gram @ query, key.mT @ out[head].T)
                total += trust[early, head] * alike / (wanted * written[head]).clamp_min(1e-30)
                weight += float(trust[early, head])
        scores[late] = {"prefix_matching_weights": total / weight if weight else total * torch.nan}
    return collect(bridge, scores, "cosine", method="prefix_matching_from_weights", previous=score)


def _trace(left: Tensor, right: Tensor) -> Tensor:
    """trace(left @ right), for every pair of matrices."""
    return (left * right.mT).sum((-2, -1))


def reader(bridge: Any, weights: HeadWeights, mode: Mode, norms: bool) -> tuple[Tensor, Tensor]:
    """The later head's matrix as `inner @ outer^T`, both [layer, head, d_model, d_head]; the stream enters at inner."""
    inner, outer = {
        "Q": (weights.W_Q, weights.W_K),
        "K": (weights.W_K, weights.W_Q),
        "V": (weights.W_V, weights.W_O.mT),
    }[mode]
    if norms:
        found = gains(bridge)
        inner = found.before[:, None, :, None] * inner
        inner = centred(inner, 2, found.centred)
        if mode != "V":
            outer = found.before[:, None, :, None] * outer
    return inner, outer


def check_mode(mode: str) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")


def pair_coords(n_layers: int, n_heads: int) -> dict[str, Any]:
    return {name: range(n_layers if name.endswith("layer") else n_heads) for name in PAIR}


def _writes(bridge: Any, weights: HeadWeights, norms: bool) -> Float[Tensor, "layer head d_head d_model"]:
    return weights.W_O * gains(bridge).after[:, None, None] if norms else weights.W_O


def _thin(weight: Float[Tensor, "layer head d_model d_head"]) -> Float[Tensor, "layer head d_head d_head"]:
    """R of the thin QR factorisation: what is left of a matrix when only norms of its products matter."""
    return torch.linalg.qr(weight, mode="r").R


def _norm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix)
