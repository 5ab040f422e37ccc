"""What a sink costs and gives each head: mass, contribution, value drain, and why the logit is large."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.attention._activations import output_factor, query_key_hooks, sizes
from interp.attention._patterns import check_tokens, reduce_patterns
from interp.hooks import no_retained_graph, run_until
from interp.hooks.edits import attach
from interp.hooks.names import device_of
from interp.models import provenance, require_eval
from interp.results import Result, labelled

MEASURES = ("mass", "contribution", "ratio", "variation", "value_ratio", "output_ratio")
PARTS = ("logit", "query_norm", "key_norm", "cosine")


@dataclass(frozen=True, eq=False, repr=False)
class SinkDrain(Result):
    """What attending to one position amounts to, `(measure, layer, head, example)`.

    Measures, each a mean over the queries after the position:
        mass: Attention to the position.
        contribution: Its share of what is gathered, A |v| / sum_j A_j |v_j|: 0 to 1. A sink has mass without it.
        ratio: A |v| / |sum_j A_j v_j|: against the sum, in which values may cancel, so it can exceed 1.
        variation: Mean |A - mean A| / mean A over queries: 0 if the position gives every query the same, as a bias
            would (the update it gives is A v).
        value_ratio: |v| over the mean at other positions (of the head's key-value head).
        output_ratio: The same for v W_O, what is written to the stream.
    """

    def table(self) -> pd.DataFrame:
        """A row per layer and head with the mean of every measure over examples, largest mass first."""
        means = self.values.mean("example").to_dataset("measure").to_dataframe().reset_index()
        return means.sort_values("mass", ascending=False, kind="stable").reset_index(drop=True)

    def plot(self) -> Any:
        """Points per head: contribution against mass; on the line y = x attention is worth what it weighs."""
        from interp.plotting import scatter

        title = f"What heads gather from position {self.provenance['key']}"
        return scatter(self.table(), x="mass", y="contribution", colour="layer", hover=["head"], title=title,
                       x_title="share of attention", y_title="share of |A v|", colour_title="layer")  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class QKDecomposition(Result):
    """Attention logits as norm of the query x norm of the key x cosine x scale, `(part, target, layer, head, example)`.

    Parts: `logit` (scaled, before the softmax), `query_norm`, `key_norm`, `cosine`; each a mean over pairs. Targets:
    `sink`, the pairs of every later query with the position; `rest`, those of the same queries with all other keys that
    they see, themselves included.

    Attributes:
        scale: The factor on q . k by layer.
    """

    scale: xr.DataArray

    def table(self) -> pd.DataFrame:
        """Mean over examples by layer and head: a column per part and target, such as `cosine_sink`."""
        frame = self.values.mean("example").rename("value").to_dataframe().reset_index()
        frame["column"] = frame["part"] + "_" + frame["target"]
        wide = frame.pivot(index=["layer", "head"], columns="column", values="value").reset_index()
        return wide.rename_axis(columns=None)

    def plot(self) -> Any:
        """Layer x head figure: cosine with the sink minus cosine with the rest."""
        from interp.plotting import layer_head

        cosine = self.values.sel(part="cosine").mean("example")
        difference = cosine.sel(target="sink") - cosine.sel(target="rest")
        title = f"Cosine of queries with key {self.provenance['key']} minus that with other keys"
        return layer_head(difference, title=title, unit="cosine")


def sink_drain(
    bridge: Any, tokens: Int[Tensor, "batch pos"], *, key: int = 0, batch_size: int | None = None
) -> SinkDrain:
    """Mass and contribution of one position in every head, and how drained its value is. Costs one forward.

    With an attention of 0.85 and a value of 5 % of the usual norm, 85 % of the mass is 22 % of the contribution.

    Raises:
        ValueError: If the tokens or the key do not fit, or patterns cannot be read. RuntimeError: In training mode.

    Source:
        Value drain: Guo et al. 2024 (arXiv:2410.13835); small values at the sink also in Gu et al. 2025
        (arXiv:2410.10781). The contribution and variation measures are ours.
    """
    _check_key(tokens, key)
    shape = sizes(bridge)
    factors = {layer: output_factor(bridge, layer) for layer in range(shape.n_layers)}

    def reduce(layer: int, pattern: Tensor, *, v: Tensor) -> Tensor:
        value = v.repeat_interleave(shape.n_heads // v.shape[2], dim=2).transpose(1, 2)  # [batch, head, pos, d_head]
        norms = value.norm(dim=-1)
        written = (value @ factors[layer].to(value.device).transpose(1, 2)).norm(dim=-1)
        weight = pattern[:, :, key + 1 :, key]  # [batch, head, later query]
        own = weight * norms[:, :, key, None]
        rows = pattern[:, :, key + 1 :]
        mass = weight.mean(-1)
        spread = (weight - mass[..., None]).abs().mean(-1)
        return torch.stack(
            [
                mass,
                (own / (rows @ norms[..., None]).squeeze(-1)).mean(-1),
                (own / (rows @ value).norm(dim=-1)).mean(-1),
                spread / mass,
                _against_rest(norms, key),
                _against_rest(written, key),
            ],
            dim=1,
        )

    found = reduce_patterns(bridge, tokens, reduce, sites=("v",), batch_size=batch_size)
    values = torch.stack([found[layer] for layer in range(shape.n_layers)])  # [layer, batch, measure, head]
    coords = {
        "measure": list(MEASURES),
        "layer": range(shape.n_layers),
        "head": range(shape.n_heads),
        "example": range(len(tokens)),
    }
    record = _record(bridge, tokens, "sink_drain", key)
    return SinkDrain(labelled(values.permute(2, 0, 3, 1), list(coords), coords), record)


def qk_decomposition(
    bridge: Any, tokens: Int[Tensor, "batch pos"], *, key: int = 0, batch_size: int = 8
) -> QKDecomposition:
    """Why queries attend to a position: its logit split into norms and cosine, against those of other keys.

    The model's own scores are divided by the norms, so rotations and query and key norms are as the model has them; a
    cap on the scores is undone. Costs one forward; holds the scores of one layer at a time.

    Raises:
        ValueError: If the tokens or the key do not fit, or the model adds something to q . k (ALiBi) or hides its
            scores. RuntimeError: In training mode.

    Source:
        Gu et al. 2025 (arXiv:2410.10781), section 3: the logit of the sink is large through the cosine, while its key
        is small.
    """
    require_eval(bridge)
    check_tokens(bridge, tokens)
    _check_key(tokens, key)
    shape = sizes(bridge)
    if str(bridge.cfg.positional_embedding_type) == "alibi":
        raise ValueError(f"{bridge.cfg.model_name} adds a bias (ALiBi) to q . k, so its logits are not norms x cosine")
    parts: list[list[Tensor]] = [[] for _ in range(shape.n_layers)]
    scales = torch.zeros(shape.n_layers)
    for start in range(0, len(tokens), batch_size):
        rows = tokens[start : start + batch_size].to(device_of(bridge))
        with torch.no_grad(), no_retained_graph(bridge), ExitStack() as stack:
            for layer in range(shape.n_layers):
                _attach_layer(stack, bridge, layer, key, parts[layer], scales)
            run_until(bridge, rows, shape.n_layers)
    values = torch.stack([torch.cat(layer) for layer in parts])  # [layer, batch, part, target, head]
    coords = {
        "part": list(PARTS),
        "target": ["sink", "rest"],
        "layer": range(shape.n_layers),
        "head": range(shape.n_heads),
        "example": range(len(tokens)),
    }
    return QKDecomposition(
        labelled(values.permute(2, 3, 0, 4, 1), list(coords), coords),
        _record(bridge, tokens, "qk_decomposition", key),
        labelled(scales, ["layer"], {"layer": range(shape.n_layers)}),
    )


def _attach_layer(stack: ExitStack, bridge: Any, layer: int, key: int, parts: list[Tensor], scales: Tensor) -> None:
    """Read queries, keys and scores of a layer, and reduce them as soon as all three are there."""
    found: dict[str, Tensor] = {}
    hooks = dict(zip(("q", "k"), query_key_hooks(bridge, layer), strict=True))
    wanted = {**hooks, "scores": (f"blocks.{layer}.attn.hook_attn_scores", True)}
    for part, (name, heads_first) in wanted.items():

        def take(tensor: Tensor, *, hook: Any, _part: str = part, _heads_first: bool = heads_first) -> None:
            found[_part] = tensor.float() if _heads_first else tensor.float().transpose(1, 2)
            if len(found) == len(wanted):  # families differ in what fires last
                result, scale = _decomposed(bridge, layer, key, **found)
                parts.append(result.cpu())
                scales[layer] = scale
                found.clear()

        attach(stack, bridge, name, take, "fwd")


def _decomposed(bridge: Any, layer: int, key: int, q: Tensor, k: Tensor, scores: Tensor) -> tuple[Tensor, float]:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    # at its own position a query and its key are rotated alike, so that score is scale x q . k whatever the rotation
    own = (q * k).sum(-1)
    cap = float(getattr(bridge.original_model.config, "attn_logit_softcapping", None) or 0)
    best = None
    for uncapped in (False, True) if cap else (False,):
        logits = cap * torch.atanh((scores / cap).clamp(-1 + 1e-7, 1 - 1e-7)) if uncapped else scores
        diagonal = logits.diagonal(dim1=-2, dim2=-1)
        scale = float((diagonal * own).sum() / (own * own).sum())
        error = float((diagonal - scale * own).abs().max()) / max(float(diagonal.abs().max()), 1e-30)
        if best is None or error < best[0]:
            best = error, scale, logits
    assert best is not None
    error, scale, logits = best
    if not error <= 1e-2:  # the rounding of half-precision scores passes, a bias does not
        raise ValueError(
            f"hook_attn_scores of layer {layer} of {bridge.cfg.model_name} is not a multiple of q . k on the diagonal "
            f"(relative difference {error:.2g}): the model adds something to its scores, or shows something else there "
            f"(delegated attention shows its pattern). norm_profile and sink_drain work on such models"
        )
    norms_q, norms_k = q.norm(dim=-1), k.norm(dim=-1)
    cosine = logits / (scale * norms_q[..., :, None] * norms_k[..., None, :]).clamp_min(1e-30)
    n_pos = scores.shape[-1]
    place = torch.arange(n_pos, device=scores.device)
    later = place > key
    seen = (place[None, :] <= place[:, None]) & later[:, None]
    seen = seen & (scores > -1e30)  # a sliding window hides keys
    targets = [seen & (place == key), seen & (place != key)]
    tensors = [logits, norms_q[..., :, None].expand_as(logits), norms_k[..., None, :].expand_as(logits), cosine]
    means = [[_masked_mean(tensor, target) for target in targets] for tensor in tensors]
    return torch.stack([torch.stack(row, dim=1) for row in means], dim=1), scale


def _masked_mean(tensor: Tensor, mask: Tensor) -> Tensor:
    total = torch.where(mask, tensor, 0).sum((-1, -2))
    return total / mask.expand_as(tensor).sum((-1, -2))


def _against_rest(norms: Tensor, key: int) -> Tensor:
    n_pos = norms.shape[-1]
    rest = (norms.sum(-1) - norms[..., key]) / (n_pos - 1)
    return norms[..., key] / rest


def _check_key(tokens: Tensor, key: int) -> None:
    n_pos = tokens.shape[1]
    if not 0 <= key < n_pos - 1:
        raise ValueError(f"key={key} must be a position that a later query sees; expected 0 to {n_pos - 2}")


def _record(bridge: Any, tokens: Tensor, method: str, key: int) -> dict[str, Any]:
    n, n_pos = tokens.shape
    return provenance(bridge, method=method, n_examples=n, n_pos=n_pos, key=key, cost={"forwards": 1})
