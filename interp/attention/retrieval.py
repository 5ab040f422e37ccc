"""Retrieval heads: which heads attend to the needle while the model copies it, over lengths and depths."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.attention._decoding import (
    answer_recall,
    answers,
    batches,
    block_size,
    check_needles,
    decode,
    end_tokens,
    labels_of,
    prefill,
    require_decoding,
    rows_read,
    site_read,
    stacked,
)
from interp.attention._scoring import (
    COPYING,
    Mode,
    check_mode,
    largest,
    mean_over_needle_steps,
    pasted_scores,
    undecided,
)
from interp.attention.needles import Needle, Needles, Target
from interp.attention.retrieval_result import RetrievalScores
from interp.models import geometry, provenance
from interp.results import labelled


def retrieval_scores(
    bridge: Any,
    needles: Needles,
    *,
    mode: Mode = "paper",
    target: Target = "answer",
    top_n: int = 5,
    max_new_tokens: int | None = None,
    stop: Sequence[int] | None = None,
    gate: float | int | None = 0.5,
    forced: bool = False,
    adaptive: bool = False,
    look: int = 20,
    threshold: float | int = 0.1,
    precision: float | int = 0.05,
    level: float = 0.95,
    batch_size: int = 8,
    block: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> RetrievalScores:
    """How far every head copies the needle: its score on every prompt that the model answers.

    The model reads the prompt, all but its last token, in blocks and unhooked, then writes greedily; at every step only
    the row of attention of the token just read is looked at, and of that only the positions with the largest weights.
    No T x T tensor is made: a layer holds [batch, head, block, T] of a pattern at most. Costs one forward over each
    prompt and one over one token per step.

    Args:
        needles: Prompts; see `needle_grid` and `insert_needles`.
        mode: `"paper"`, `"official"`, `"top_n"`, `"mass"` or `"ov"`; see `score_rows`.
        target: What counts as the needle: the part that answers (as released) or the whole sentence (as in the paper).
        max_new_tokens: Steps to decode; as many as the longest answer has by default. The released code takes 50.
        stop: Tokens that end an answer; the tokenizer's end of text by default.
        gate: Prompts whose answer is recalled by no more than this (share of its tokens that were written, in any
            order: ROUGE-1 recall) are not counted, since nothing was retrieved; None counts all.
        forced: Feed the right answer instead of what the model writes, and take it as written. For models that attend
            to the needle but do not answer; the gate is then on what they would have written.
        adaptive: Take the prompts in random order, `look` at a time, and stop when the interval of every head leaves
            out `threshold` or is within +-`precision`. Looks share the error.
        batch_size: Most prompts per forward, of equal length.
        block: Positions per forward of the prompt; by default as many as keep a layer's rows within 128 MiB.

    Returns:
        `values` [layer, head, example], one example for each prompt counted; recall of all prompts beside.

    Raises:
        ValueError: If no prompt passes the gate (with the recalls found), or a prompt does not fit the model.
        NotImplementedError: If the model does not continue from a cache.

    Source:
        Wu et al. 2024 (arXiv:2404.15574) and its code. Differs in that needles are where they were put, and not where a
        locator finds them; a prompt whose needle is lost raises and is not counted as 0.
    """
    check_mode(mode, top_n)
    if look < 2 or batch_size < 1:
        raise ValueError(f"look={look} and batch_size={batch_size}; expected at least 2 and 1")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1, or None for the length of the answer")
    steps = max_new_tokens or max(len(sample.answer) for sample in needles.samples)
    require_decoding(bridge)
    check_needles(bridge, needles, steps)
    ends = end_tokens(bridge) if stop is None else list(stop)
    order = list(range(len(needles)))
    if adaptive:
        random.Random(f"interp retrieval {seed}").shuffle(order)
    size = look if adaptive else len(order)
    looks = -(-len(order) // size)
    found: dict[int, tuple[Tensor, float]] = {}
    bar = _bar(len(order), progress)
    open_heads: np.ndarray | None = None
    for start in range(0, len(order), size):
        wanted = order[start : start + size]
        for rows in batches([needles.samples[i] for i in wanted], batch_size):
            index = [wanted[row] for row in rows]
            batch = [needles.samples[i] for i in index]
            scored = _score(bridge, batch, mode, target, top_n, steps, ends, forced=forced, block=block)
            found.update(zip(index, scored, strict=True))
            bar.update(len(index))
        counted = _counted(found, gate)
        if adaptive and len(counted) >= 2:
            values = torch.stack([found[i][0] for i in counted], -1).numpy()
            options = {"threshold": float(threshold), "precision": float(precision), "level": level}
            open_heads = undecided(values, **options, looks=looks)
            if not open_heads.any():
                break
    bar.close()
    counted = _counted(found, gate)
    recall = {i: found[i][1] for i in sorted(found)}
    if not counted:
        raise ValueError(
            f"the model recalls the answer of none of {len(found)} prompts by more than gate={gate} (best "
            f"{max(recall.values()):.2f}, mean {np.mean(list(recall.values())):.2f}), so nothing was retrieved and no "
            f"head can be scored; use prompts that it can answer, forced=True to feed the answer, or gate=None"
        )
    values = torch.stack([found[i][0] for i in counted], -1)
    left = None if open_heads is None else np.argwhere(open_heads).tolist()
    record = provenance(
        bridge,
        method="retrieval_scores",
        mode=mode,
        target=target,
        top_n=top_n if mode == "top_n" else 1,
        gate=None if gate is None else float(gate),
        forced=forced,
        max_new_tokens=steps,
        stop=ends,
        threshold=float(threshold),
        needles=needles.name,
        needles_seed=needles.seed,
        seed=seed,
        samples={"given": len(needles), "run": len(found), "counted": len(counted)},
        adaptive={"look": look, "looks": looks, "precision": float(precision), "level": level, "undecided": left}
        if adaptive
        else None,
        cost={"prompt_tokens": sum(len(needles.samples[i].tokens) - 1 for i in found), "decode_steps": steps},
    )
    coords = {"layer": range(values.shape[0]), "head": range(values.shape[1])}
    ran = list(recall)
    return RetrievalScores(
        values=labelled(
            values,
            ("layer", "head", "example"),
            {**coords, **labels_of(needles, counted, "example")},
            unit=_UNITS[mode],
        ),
        provenance=record,
        recall=labelled(
            np.array([recall[i] for i in ran]), ("sample",), labels_of(needles, ran, "sample"), unit="answer recall"
        ),
        mode=mode,
    )


_UNITS = {
    "paper": "retrieval score",
    "official": "retrieval score (official)",
    "top_n": "retrieval score (top n)",
    "mass": "attention on the needle",
    "ov": "share of head output from the needle",
}


def _counted(found: dict[int, tuple[Tensor, float]], gate: float | int | None) -> list[int]:
    return [i for i in sorted(found) if gate is None or found[i][1] > gate]


def _score(
    bridge: Any,
    batch: Sequence[Needle],
    mode: Mode,
    target: Target,
    top_n: int,
    steps: int,
    stop: Sequence[int],
    *,
    forced: bool,
    block: int | None,
) -> list[tuple[Tensor, float]]:
    """Scores [layer, head] and recall of prompts of one length."""
    tokens = stacked(bridge, batch)
    spans = [sample.target(target) for sample in batch]
    rows = _Rows(bridge, mode, spans, top_n, tokens.shape[1] - 1)
    with rows.values():
        past = prefill(bridge, tokens[:, :-1], block=block or block_size(bridge, *tokens.shape))
        fed = answers(batch, steps).to(tokens.device) if forced else None
        with rows.patterns():
            own, _ = decode(bridge, past, tokens[:, -1], steps, stop=stop, forced=fed)
    own = own.cpu()
    out = []
    for i, sample in enumerate(batch):
        answer = list(sample.answer)
        said = own[i].tolist()
        said = said[: said.index(-1)] if -1 in said else said
        wrote = torch.tensor(answer[:steps] if forced else said)
        out.append((rows.score(i, wrote, sample.tokens, spans[i]), answer_recall(answer, said[: len(wrote)])))
    return out


class _Rows:
    """What the score needs of the rows of attention of a batch, kept step by step."""

    def __init__(self, bridge: Any, mode: Mode, spans: Sequence[tuple[int, int]], top_n: int, prompt: int) -> None:
        self.bridge, self.mode, self.prompt = bridge, mode, prompt
        self.n = top_n if mode == "top_n" else 1
        self.spans = spans
        layers = int(bridge.cfg.n_layers)
        self.kept: list[list[Tensor]] = [[] for _ in range(layers)]  # [batch, head, query, n], or [batch, head, query]
        self.norms: list[list[Tensor]] = [[] for _ in range(layers)]  # [batch, head, pos] each
        self.written = 0

    def values(self) -> Any:
        """Context that keeps the norms of values after W_O, which only the `"ov"` score needs."""
        if self.mode != "ov":
            return nullcontext()
        shape = geometry(self.bridge)
        group = shape.n_heads // shape.n_kv_heads

        def read(layer: int, v: Tensor) -> None:
            w = self.bridge.blocks[layer].attn.W_O.detach().float()  # [head, d_head, d_model]
            gram = w @ w.transpose(-1, -2)
            v = v.repeat_interleave(group, dim=2)
            squared = torch.einsum("bphd,hde,bphe->bhp", v, gram, v)
            self.norms[layer].append(squared.clamp_min(0).sqrt())

        return site_read(self.bridge, "v", read)

    def patterns(self) -> Any:
        return rows_read(self.bridge, self._read, lambda: self.prompt)

    def _read(self, layer: int, rows: Float[Tensor, "batch head query key"], width: int) -> None:
        total = width + self._seen(layer) + rows.shape[2]
        offset = total - rows.shape[-1]  # a sliding window holds the last keys only
        if self.mode in COPYING:
            n = min(self.n, rows.shape[-1])
            top = largest(rows, n) + offset
            # early rows may have fewer keys than n is large; position -1 is in no needle
            self.kept[layer].append(torch.nn.functional.pad(top, (0, self.n - n), value=-1).cpu())
            return
        if self.mode == "ov":
            norms = torch.cat(self.norms[layer], -1)[..., offset:]
            rows = rows * norms[:, :, None]
            rows = rows / rows.sum(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        inside = torch.zeros(rows.shape[0], rows.shape[-1], device=rows.device)
        for i, (start, end) in enumerate(self.spans):
            inside[i, max(start - offset, 0) : max(end - offset, 0)] = 1
        self.kept[layer].append(torch.einsum("bhqk,bk->bhq", rows, inside).cpu())

    def _seen(self, layer: int) -> int:
        return sum(part.shape[2] for part in self.kept[layer])

    def score(self, i: int, wrote: Int[Tensor, " step"], tokens: Tensor, span: tuple[int, int]) -> Tensor:
        """[layer, head] of one prompt."""
        kept = [torch.cat([part[i] for part in parts], 1)[:, : len(wrote)] for parts in self.kept]
        rows = torch.stack(kept).movedim(2, 0)  # [step, layer, head(, n)]
        if self.mode in COPYING:
            return pasted_scores(rows, wrote, tokens, span, official=self.mode == "official")
        return mean_over_needle_steps(rows, wrote, tokens[span[0] : span[1]])


def _bar(total: int, progress: bool) -> Any:
    return tqdm(total=total, disable=not progress or os.environ.get("INTERP_PROGRESS") == "0", desc="retrieval")
