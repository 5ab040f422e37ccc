"""RazorAttention: which heads attend to repeats, how many of them keep the whole cache, and what that saves."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.attention._decoding import block_size, prefill, require_decoding, rows_read
from interp.attention._patterns import check_tokens
from interp.hooks.names import device_of
from interp.models import geometry, provenance
from interp.results import Result, labelled
from interp.stats import bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd

SCORES = ("echo", "induction")


@dataclass(frozen=True, eq=False, repr=False)
class RazorScores(Result):
    """Attention to earlier copies (`"echo"`) and to what followed them (`"induction"`), on repeated random tokens.

    `values` has dimensions (score, layer, head, example): attention added up over the copies, averaged over queries.
    """

    def mean(self) -> xr.DataArray:
        """Mean over sequences."""
        return self.values.mean("example", keep_attrs=True)

    def summary(self, level: float = 0.95) -> pd.DataFrame:
        """One row per head with both scores and bounds over sequences, by induction score."""
        import pandas as pd

        frame = None
        for name in SCORES:
            values = self.values.sel(score=name).transpose("layer", "head", "example")
            found = bootstrap_interval(values.values, confidence=level)
            part = values.mean("example").rename(name).to_dataframe().reset_index().drop(columns="score")
            part[f"{name}_low"], part[f"{name}_high"] = found.low.ravel(), found.high.ravel()
            frame = part if frame is None else frame.merge(part, on=["layer", "head"])
        assert isinstance(frame, pd.DataFrame)
        frame.insert(0, "name", [f"L{layer}H{head}" for layer, head in zip(frame["layer"], frame["head"], strict=True)])
        return frame.sort_values("induction", ascending=False, kind="stable").reset_index(drop=True)

    def plot(self) -> Any:
        """Maps of both scores over layer and head."""
        from interp.plotting import heatmaps

        mean = self.mean()
        panels = {name: mean.sel(score=name, drop=True) for name in SCORES}
        return heatmaps(panels, title="Attention to copies and to what followed them", unit="attention", signed=False)


def razor_scores(
    bridge: Any,
    *,
    n_tokens: int | None = None,
    repeats: int = 4,
    n: int = 4,
    tokens: Int[Tensor, "batch pos"] | None = None,
    batch_size: int = 4,
    block: int | None = None,
    seed: int = 0,
) -> RazorScores:
    """Echo and induction scores on random tokens that are repeated.

    Echo: attention to earlier copies of the current token. Induction: attention to the tokens that followed them. Both
    are averaged over the queries that have an earlier copy. Rows of attention are read block by block, so that no
    T x T tensor is made. One forward per sequence.

    Args:
        n_tokens: Random tokens, distinct where the vocabulary allows; as many as fit the context, 2500 at most, by
            default.
        repeats: How often they are said.
        n: Sequences.
        tokens: Sequences of one's own instead, with repeats of any kind.

    Raises:
        ValueError: If the sequences do not fit the context, or nothing is repeated.

    Source:
        Tang et al. 2024, RazorAttention (arXiv:2407.15891): 2500 random tokens four times. No code was released.
    """
    require_decoding(bridge)
    if tokens is None:
        tokens = _repeated(bridge, n_tokens, repeats, n, seed)
    check_tokens(bridge, tokens)
    size = block or block_size(bridge, batch_size, tokens.shape[1])
    parts = []
    for start in range(0, len(tokens), batch_size):
        rows = tokens[start : start + batch_size].to(device_of(bridge))
        parts.append(_repeat_attention(bridge, rows, size))
    values = torch.cat(parts, -1)  # [score, layer, head, example]
    return RazorScores(
        values=labelled(
            values,
            ("score", "layer", "head", "example"),
            {name: range(values.shape[i]) for i, name in enumerate(("score", "layer", "head", "example")) if i}
            | {"score": list(SCORES)},
            unit="attention",
        ),
        provenance=provenance(
            bridge,
            method="razor_scores",
            n_tokens=int(tokens.shape[1]),
            repeats=repeats,
            sequences=len(tokens),
            seed=seed,
        ),  # fmt: skip
    )


def _repeat_attention(bridge: Any, tokens: Tensor, block: int) -> Tensor:
    """[score, layer, head, example]"""
    n, n_pos = tokens.shape
    layers, heads = int(bridge.cfg.n_layers), int(bridge.cfg.n_heads)
    sums = torch.zeros(2, layers, heads, n, dtype=torch.float64)
    queries = torch.zeros(n, dtype=torch.float64)
    seen = [0] * layers
    marks: dict[int, tuple[Tensor, Tensor]] = {}  # by first query: shared by the layers

    def read(layer: int, rows: Tensor, _width: int) -> None:
        first, count = seen[layer], rows.shape[2]
        seen[layer] += count
        if first not in marks:
            marks.clear()
            marks[first] = copies(tokens, first, first + count)
        for i, mark in enumerate(marks[first]):
            mark = mark[..., -rows.shape[-1] :]  # a sliding window holds the last keys only
            sums[i, layer] += torch.einsum("bhqk,bqk->hb", rows, mark.to(rows.dtype)).double().cpu()
        if layer == 0:
            queries.add_(marks[first][0].any(-1).sum(-1).cpu())

    with rows_read(bridge, read, lambda: n_pos):
        prefill(bridge, tokens, block=block)
    if bool((queries == 0).any()):
        raise ValueError(
            f"sequence {int((queries == 0).nonzero()[0])} repeats no token, so nothing can be attended to twice; "
            f"use repeats of at least 2"
        )
    return (sums / queries).float()


def copies(
    tokens: Int[Tensor, "batch pos"], first: int, last: int
) -> tuple[Bool[Tensor, "batch query key"], Bool[Tensor, "batch query key"]]:
    """For queries `first` to `last`: earlier keys that hold the same token, and the earlier keys right behind those."""
    query = torch.arange(first, last, device=tokens.device)
    key = torch.arange(last, device=tokens.device)
    earlier = key < query[:, None]
    same = (tokens[:, first:last, None] == tokens[:, None, :last]) & earlier
    after = torch.zeros_like(same)
    after[..., 1:] = same[..., :-1]
    return same, after & earlier


def head_budget(
    scores: RazorScores | xr.DataArray,
    *,
    induction: float | int = 0.14,
    echo: float | int = 0.01,
    kv_heads: int | None = None,
) -> xr.DataArray:
    """Which heads keep the whole cache: True for the best by induction score and the best by echo score.

    Args:
        induction, echo: Shares of all heads, rounded up; a head in both counts once.
        kv_heads: Key-value heads of the model. Where they are fewer than heads a group is kept or dropped as a whole,
            scored by its best head, and shares are of groups.

    Returns:
        bool [layer, head].
    """
    mean = scores.mean() if isinstance(scores, RazorScores) else scores
    mean = mean.transpose("score", "layer", "head")
    n_layers, n_heads = mean.sizes["layer"], mean.sizes["head"]
    groups = kv_heads or n_heads
    if n_heads % groups:
        raise ValueError(f"{n_heads} heads cannot share {groups} key-value heads")
    if not (0 <= induction <= 1 and 0 <= echo <= 1):
        raise ValueError(f"induction={induction}, echo={echo}; expected shares of heads, between 0 and 1")
    best = mean.values.reshape(2, n_layers, groups, n_heads // groups).max(-1)
    keep = np.zeros(n_layers * groups, dtype=bool)
    names = [str(name) for name in mean["score"].values]
    for name, share in (("induction", induction), ("echo", echo)):
        count = math.ceil(share * keep.size - 1e-9)
        keep[np.argsort(-best[names.index(name)].ravel(), kind="stable")[:count]] = True
    heads = np.repeat(keep.reshape(n_layers, groups), n_heads // groups, axis=1)
    coords = {"layer": mean["layer"].values, "head": mean["head"].values}
    return xr.DataArray(heads, dims=("layer", "head"), coords=coords)


def compression(
    n_tokens: int,
    full_share: float | int = 0.15,
    *,
    buffer: int | None = None,
    minimum: int = 4000,
    sinks: int = 4,
    compensation: bool = True,
) -> float:
    """How many times smaller the cache is when this share of heads keeps it whole.

    The others keep `sinks` first tokens, the last `buffer` ones (by default a fifth, but no less than `minimum`) and
    the compensation token. Without the last two and a minimum, 15 % of whole heads give 1 / (0.15 + 0.85 / 5) = 3.125.
    """
    if n_tokens < 1 or not 0 <= full_share <= 1:
        raise ValueError(f"n_tokens={n_tokens}, full_share={full_share}; expected at least 1 and a share of heads")
    kept = max(minimum, n_tokens / 5) if buffer is None else buffer
    short = min(n_tokens, kept + sinks + compensation)
    return n_tokens / (full_share * n_tokens + (1 - full_share) * short)


def compensated_attention(
    q: Float[Tensor, "*batch query d_head"],
    k: Float[Tensor, "*batch key d_head"],
    v: Float[Tensor, "*batch key d_value"],
    keep: Bool[Tensor, " key"],
    *,
    compensation: bool = True,
    scale: float | None = None,
) -> Float[Tensor, "*batch query d_value"]:
    """Attention over the kept keys and one token that stands for the dropped ones (no causal mask: decoding).

    The compensation token has the mean key and the mean value of the dropped ones and counts as often as they are:
    exp(q k') enters the softmax N_d times. Exact when dropped keys are equal, whatever their values.
    """
    factor = float(q.shape[-1]) ** -0.5 if scale is None else scale
    kept_k, kept_v = k[..., keep, :], v[..., keep, :]
    scores = q @ kept_k.transpose(-1, -2) * factor
    dropped = int((~keep).sum())
    if compensation and dropped:
        mean_k, mean_v = k[..., ~keep, :].mean(-2, keepdim=True), v[..., ~keep, :].mean(-2, keepdim=True)
        extra = q @ mean_k.transpose(-1, -2) * factor + math.log(dropped)
        scores, kept_v = torch.cat([scores, extra], -1), torch.cat([kept_v, mean_v], -2)
    return scores.softmax(-1) @ kept_v


def _repeated(bridge: Any, n_tokens: int | None, repeats: int, n: int, seed: int) -> Tensor:
    """[n, BOS + repeats * n_tokens] random ids."""
    shape = geometry(bridge)
    if repeats < 2 or n < 1:
        raise ValueError(f"repeats={repeats}, n={n}; expected at least 2 and 1")
    tokenizer = bridge.tokenizer
    special = set() if tokenizer is None else {int(token) for token in tokenizer.all_special_ids}
    ids = [token for token in range(shape.d_vocab) if token not in special]
    size = min(2500, (shape.n_ctx - 1) // repeats) if n_tokens is None else n_tokens
    rng = random.Random(f"interp razor {seed}")
    bos = [int(tokenizer.bos_token_id)] if shape.has_bos and tokenizer is not None else []
    rows = []
    for _ in range(n):
        said = rng.sample(ids, size) if size <= len(ids) else rng.choices(ids, k=size)
        rows.append([*bos, *said * repeats])
    return torch.tensor(rows)
