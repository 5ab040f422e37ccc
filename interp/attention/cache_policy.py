"""What a smaller cache does to retrieval: RazorAttention, a streaming cache that keeps sinks, and controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.attention._decoding import (
    answer_recall,
    answers,
    batches,
    check_needles,
    decode,
    end_tokens,
    fork,
    labels_of,
    prefill,
    require_decoding,
    stacked,
)
from interp.attention.needles import Needles
from interp.hooks import interventions
from interp.models import provenance
from interp.results import Result, labelled
from interp.stats import bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("recall", "kl", "answer_log_prob", "cache")


@dataclass(frozen=True)
class CachePolicy:
    """What the heads keep of a prompt.

    Attributes:
        full: bool [layer, head]: heads that keep everything; None for none of them (a streaming cache).
        buffer: Most recent tokens that the others keep, the current one included.
        sinks: First tokens that they keep.
        compensation: Whether they keep one more token that stands for the dropped ones: their mean key and value,
            counted as often as they are.
    """

    full: xr.DataArray | None = None
    buffer: int = 32
    sinks: int = 4
    compensation: bool = True

    def __post_init__(self) -> None:
        if self.buffer < 1 or self.sinks < 0:
            raise ValueError(f"buffer={self.buffer}, sinks={self.sinks}; expected at least 1 and 0")

    def cache(self, n_tokens: int) -> float:
        """Entries kept for a prompt of this length, as a share of all."""
        short = self.sinks + self.buffer
        short = n_tokens if short >= n_tokens else min(n_tokens, short + self.compensation)
        share = 0.0 if self.full is None else float(self.full.mean())
        return share + (1 - share) * short / n_tokens


@dataclass(frozen=True, eq=False, repr=False)
class CacheEffects(Result):
    """What each policy does; `values` has dimensions (policy, measure, example), the policy `"full"` first.

    Measures: `recall` of the answer written greedily; `kl`: divergence of the next-token distribution from that with
    the full cache, nats, mean over the steps of the right answer; `answer_log_prob`: its log-probability, sum over
    tokens; `cache`: entries kept, as a share of all.
    """

    def summary(self, level: float = 0.95) -> pd.DataFrame:
        """One row per policy: mean of each measure, bounds of the recall over prompts, and the compression."""
        import pandas as pd

        rows = []
        for policy in self.values["policy"].values:
            part = self.values.sel(policy=policy)
            found = bootstrap_interval(part.sel(measure="recall").values, confidence=level)
            mean = {name: float(part.sel(measure=name).mean()) for name in MEASURES}
            rows.append(
                {"policy": str(policy), **mean, "recall_low": float(found.low), "recall_high": float(found.high)}
                | {"compression": 1 / mean["cache"]}
            )
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """Recall of each policy with its interval; cache sizes are in the labels."""
        from interp.plotting import bars

        frame = self.summary()
        sizes = zip(frame["policy"], frame["cache"], strict=True)
        frame["label"] = [f"{name} ({share:.0%} of the cache)" for name, share in sizes]
        return bars(
            frame, x="label", y="recall", interval=("recall_low", "recall_high"), horizontal=True,
            title="Recall of the answer by cache policy", unit="answer recall", x_title="Policy",
        )  # fmt: skip


def cache_effects(
    bridge: Any,
    needles: Needles,
    policies: Mapping[str, CachePolicy],
    *,
    max_new_tokens: int | None = None,
    stop: Sequence[int] | None = None,
    batch_size: int = 16,
) -> CacheEffects:
    """How a smaller cache changes what the model finds: recall, divergence and answer log-probability per policy.

    The prompt is read with everything in place, once; then each policy decodes from it with what it keeps, as if the
    rest were gone. Positions stay what they were (StreamingLLM numbers those in its cache anew).

    Raises:
        ValueError: If a policy's heads are not this model's, or the model caps its attention scores, where a mean key
            is not a mean score and compensation would be wrong.

    Source:
        Tang et al. 2024 (arXiv:2407.15891); streaming: Xiao et al. 2023 (arXiv:2309.17453).
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1, or None for the length of the answer")
    steps = max_new_tokens or max(len(sample.answer) for sample in needles.samples)
    require_decoding(bridge, edit=True)
    check_needles(bridge, needles, steps)
    if not policies or "full" in policies:
        raise ValueError("pass at least one policy; 'full' is added by itself and must not be among them")
    for name, policy in policies.items():
        _check(bridge, name, policy)
    ends = end_tokens(bridge) if stop is None else list(stop)
    out = np.full((1 + len(policies), len(MEASURES), len(needles)), np.nan)
    for index in batches(needles.samples, batch_size):
        samples = [needles.samples[i] for i in index]
        tokens = stacked(bridge, samples)
        read = prefill(bridge, tokens[:, :-1])
        everyone = torch.arange(len(index))
        forced = answers(samples, steps).to(tokens.device)
        whole: Tensor | None = None
        for place, policy in enumerate([None, *policies.values()]):
            with _kept(bridge, policy, tokens.shape[1] - 1):
                own, _ = decode(bridge, fork(read, everyone), tokens[:, -1], steps, stop=ends)
            with _kept(bridge, policy, tokens.shape[1] - 1):
                _, logits = decode(bridge, fork(read, everyone), tokens[:, -1], steps, forced=forced)
            log_probs = logits.float().log_softmax(-1)
            whole = log_probs if whole is None else whole
            divergence = (whole.exp() * (whole - log_probs)).sum(-1)  # [batch, step]
            right = log_probs.gather(-1, forced[..., None])[..., 0]
            for i, sample in enumerate(samples):
                n = min(steps, len(sample.answer))
                kept = 1.0 if policy is None else policy.cache(int(tokens.shape[1]))
                recall = answer_recall(sample.answer, own[i].tolist())
                found = (recall, float(divergence[i, :n].mean()), float(right[i, :n].sum()), kept)
                out[place, :, index[i]] = found
    coords = labels_of(needles, range(len(needles)), "example")
    settings = {
        name: {"buffer": p.buffer, "sinks": p.sinks, "compensation": p.compensation}
        | {"full_share": 0.0 if p.full is None else float(p.full.mean())}
        for name, p in policies.items()
    }
    return CacheEffects(
        values=labelled(
            out,
            ("policy", "measure", "example"),
            {"policy": ["full", *policies], "measure": list(MEASURES), **coords},
        ),
        provenance=provenance(
            bridge,
            method="cache_effects",
            policies=settings,
            needles=needles.name,
            needles_seed=needles.seed,
            max_new_tokens=steps,
            stop=ends,
        ),  # fmt: skip
    )


@contextmanager
def _kept(bridge: Any, policy: CachePolicy | None, prompt: int) -> Iterator[None]:
    """Forwards inside see, at the heads that do not keep everything, only what the policy keeps."""
    if policy is None:
        yield
        return
    n_layers, n_heads = int(bridge.cfg.n_layers), int(bridge.cfg.n_heads)
    if policy.full is None:
        short = torch.ones(n_layers, n_heads, dtype=torch.bool)
    else:
        short = ~torch.from_numpy(policy.full.transpose("layer", "head").values.astype(bool))
    edits = {
        f"blocks.{layer}.attn.hook_attn_scores": _edit(short[layer], policy, prompt)
        for layer in range(n_layers)
        if bool(short[layer].any())
    }
    with interventions(bridge, edits, must_fire=False):
        yield


def _edit(short: Tensor, policy: CachePolicy, prompt: int) -> Any:
    """Scores of dropped keys: their mean, which is the compensation token N_d times over; or none at all.

    A mean key gives the mean of the scores, and softmax weights that are equal add up to N_d exp(q k') times the mean
    value: so this is the compensation token to rounding, without making it.
    """
    seen = [prompt]

    def edit(scores: Tensor) -> Tensor:  # [batch, head, query, key]
        n, width = scores.shape[2:]
        total = seen[0] + n
        seen[0] = total
        query = torch.arange(total - n, total, device=scores.device)[:, None]
        key = torch.arange(total - width, total, device=scores.device)
        lowest = torch.finfo(scores.dtype).min
        dropped = (key >= policy.sinks) & (key <= query - policy.buffer) & (scores > lowest / 2)
        dropped = dropped & short.to(scores.device)[:, None, None]
        if not policy.compensation:
            return torch.where(dropped, lowest, scores)
        count = dropped.sum(-1, keepdim=True)
        mean = torch.where(dropped, scores, 0).sum(-1, keepdim=True) / count.clamp_min(1)
        return torch.where(dropped, mean, scores)

    return edit


def _check(bridge: Any, name: str, policy: CachePolicy) -> None:
    n_layers, n_heads = int(bridge.cfg.n_layers), int(bridge.cfg.n_heads)
    if policy.full is not None and dict(policy.full.sizes) != {"layer": n_layers, "head": n_heads}:
        raise ValueError(
            f"policy {name!r} is for {dict(policy.full.sizes)}; this model has {n_layers} layers of {n_heads} heads"
        )
    config = bridge.original_model.config
    if policy.compensation and getattr(config, "attn_logit_softcapping", None):
        raise ValueError(
            f"policy {name!r}: {bridge.cfg.model_name} caps attention scores at {config.attn_logit_softcapping}, so "
            f"the score of a mean key is not the mean of the scores; use compensation=False"
        )
