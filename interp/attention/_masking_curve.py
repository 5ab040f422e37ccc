"""The causal curve of retrieval heads: what is still found with the best heads masked, and with random ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.attention._decoding import (
    answer_recall,
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
from interp.attention.masking import MASKS, Mask, as_masks, head_means, masked_heads, matched_random_heads
from interp.attention.needles import Needles
from interp.attention.retrieval_result import Head, RetrievalScores
from interp.models import provenance
from interp.results import Result, labelled
from interp.stats import adjust_p_values, bootstrap_interval, paired_test

if TYPE_CHECKING:
    import pandas as pd

When = Literal["decode", "everywhere"]


@dataclass(frozen=True, eq=False, repr=False)
class MaskingCurve(Result):
    """Recall of the answer with the best heads masked, and with random ones.

    `values` has dimensions (k, heads, example): `heads` is `"top"` and then one label per random draw.

    Attributes:
        baseline: Recall with nothing masked, by example.
        mask: What masking meant.
        when: Whether heads were masked while decoding only, or also while the prompt was read.
    """

    baseline: xr.DataArray
    mask: str
    when: str

    def summary(self, level: float = 0.95, *, seed: int = 0) -> pd.DataFrame:
        """Rows for the top heads and the random ones at each k: mean `recall` with bounds over prompts.

        Random draws are averaged within a prompt first; `lowest` is the worst draw. `p_value` is for the top heads
        hurting more than random ones (sign flips over prompts, Holm over k).
        """
        import pandas as pd

        top = self.values.sel(heads="top")
        drawn = self.values.isel(heads=slice(1, None))
        random_ = drawn.mean("heads")
        worst = drawn.mean("example").min("heads")
        p = adjust_p_values(paired_test((random_ - top).values, alternative="greater", seed=seed))
        rows: list[dict[str, Any]] = []
        whole = bootstrap_interval(self.baseline.values, confidence=level, seed=seed)
        for name in ("top", "random"):
            rows.append(_row(0, name, whole))
        for i, k in enumerate(self.values["k"].values):
            for name, part in (("top", top), ("random", random_)):
                found = bootstrap_interval(part.isel(k=i).values, confidence=level, seed=seed)
                extra = {"p_value": float(p[i])} if name == "top" else {"lowest": float(worst[i])}
                rows.append(_row(int(k), name, found) | extra)
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """Recall against the number of masked heads, for the top heads and random ones, with intervals over prompts."""
        from interp.plotting import lines

        return lines(
            self.summary(), x="k", y="recall", group="heads", interval=("low", "high"),
            title=f"Recall with heads masked ({self.mask}, {self.when})", unit="answer recall",
            x_title="Masked heads",
        )  # fmt: skip


def masking_curve(
    bridge: Any,
    needles: Needles,
    ranking: RetrievalScores | Sequence[Head],
    *,
    ks: Sequence[int] = (2, 5, 10),
    mask: Mask = "zero",
    when: When = "decode",
    n_random: int = 5,
    match: Literal["layer", "any"] = "layer",
    exclude: int | None = None,
    max_new_tokens: int | None = None,
    stop: Sequence[int] | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> MaskingCurve:
    """How much of the answer is still found when the k best heads are masked, next to random heads of the same layers.

    With `when="decode"` a prompt is read once and every set of heads continues from its cache, several sets per
    forward; with `"everywhere"` it is read once per set.

    Args:
        ranking: Heads, best first.
        mask: See `masked_heads`. The mean is taken over these prompts.
        when: `"decode"`: from the last token of the prompt on, as released. `"everywhere"`: while reading, too.
        n_random: Random draws for each k.
        match: `"layer"`: random heads are of the layers of the top ones. `"any"`: of all layers.
        exclude: Random heads are not among the first this many of the ranking; the largest k by default. (The released
            code means to leave out the first 100 and leaves out none.)
        batch_size: Most rows (prompts x sets) per forward.

    Raises:
        ValueError: If ranking, ks or mask do not fit the model; before any forward.

    Source:
        Wu et al. 2024 (arXiv:2404.15574), section 4; its code masks by `"uniform"`, `"decode"`.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1, or None for the length of the answer")
    steps = max_new_tokens or max(len(sample.answer) for sample in needles.samples)
    require_decoding(bridge, edit=mask in ("uniform", "bos"))
    check_needles(bridge, needles, steps)
    if when not in ("decode", "everywhere") or mask not in MASKS:
        raise ValueError(f"mask={mask!r}, when={when!r}; expected one of {MASKS} and 'decode' or 'everywhere'")
    ranked = ranking.ranking() if isinstance(ranking, RetrievalScores) else [(int(a), int(b)) for a, b in ranking]
    n_layers, n_heads = int(bridge.cfg.n_layers), int(bridge.cfg.n_heads)
    if not ks or min(ks) < 1 or max(ks) > len(ranked) or n_random < 1:
        raise ValueError(f"ks={list(ks)}, n_random={n_random}; expected 1 to {len(ranked)} ranked heads, and a draw")
    as_masks(bridge, ranked)  # each is a head of this model
    excluded = ranked[: max(ks) if exclude is None else exclude]
    sets: list[list[Head]] = [[]]
    for k in ks:
        top = ranked[:k]
        sets.append(top)
        for draw in range(n_random):
            options: Any = {"exclude": excluded, "match": match, "seed": 1_000_003 * seed + 1009 * k + draw}
            sets.append(matched_random_heads(top, n_layers, n_heads, **options))
    masks = torch.cat([as_masks(bridge, heads) for heads in sets])
    means = head_means(bridge, needles) if mask == "mean" else None
    ends = end_tokens(bridge) if stop is None else list(stop)
    recall = _recalls(bridge, needles, masks, mask, when, means, steps, ends, batch_size)
    values = recall[1:].reshape(len(ks), 1 + n_random, len(needles))
    coords = labels_of(needles, range(len(needles)), "example")
    names = ["top", *(f"random {i}" for i in range(n_random))]
    return MaskingCurve(
        values=labelled(
            values, ("k", "heads", "example"), {"k": list(ks), "heads": names, **coords}, unit="answer recall"
        ),
        provenance=provenance(
            bridge,
            method="masking_curve",
            mask=mask,
            when=when,
            match=match,
            excluded=len(excluded),
            seed=seed,
            needles=needles.name,
            needles_seed=needles.seed,
            max_new_tokens=steps,
            stop=ends,
            heads=[[list(head) for head in heads] for heads in sets[1:]],
        ),  # fmt: skip
        baseline=labelled(recall[0], ("example",), coords, unit="answer recall"),
        mask=mask,
        when=when,
    )


def _recalls(
    bridge: Any,
    needles: Needles,
    masks: Tensor,
    mask: Mask,
    when: When,
    means: Tensor | None,
    steps: int,
    stop: Sequence[int],
    batch_size: int,
) -> np.ndarray:
    """Recall [set, example]."""
    out = np.full((len(masks), len(needles)), np.nan)
    for index in batches(needles.samples, batch_size):
        samples = [needles.samples[i] for i in index]
        tokens = stacked(bridge, samples)
        n, at_once = len(index), max(1, batch_size // len(index))
        read = None if when == "everywhere" else prefill(bridge, tokens[:, :-1])
        for first in range(0, len(masks), at_once):
            sets = masks[first : first + at_once]
            rows = torch.arange(n).repeat(len(sets))  # set-major
            with masked_heads(bridge, sets.repeat_interleave(n, 0), mask, means=means):
                past = prefill(bridge, tokens[rows, :-1]) if read is None else fork(read, rows)
                if mask == "bos":
                    _require_first(past, tokens.shape[1] - 1)
                written, _ = decode(bridge, past, tokens[rows, -1], steps, stop=stop)
            for row, said in enumerate(written.cpu().tolist()):
                place, sample = first + row // n, row % n
                out[place, index[sample]] = answer_recall(samples[sample].answer, said)
    return out


def _require_first(past: Any, n_tokens: int) -> None:
    short = [i for i, layer in enumerate(past.layers) if layer.keys.shape[-2] < n_tokens]
    if short:
        raise ValueError(
            f"the window of layers {short} no longer holds the first token after {n_tokens} tokens, so heads there "
            f"cannot attend to it; use mask='zero', 'mean' or 'uniform'"
        )


def _row(k: int, heads: str, found: Any) -> dict[str, Any]:
    return {
        "k": k,
        "heads": heads,
        "recall": float(found.estimate),
        "low": float(found.low),
        "high": float(found.high),
    }
