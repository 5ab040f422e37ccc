"""Retrieval scores of recorded attention rows: pure tensors, the model is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import norm
from torch import Tensor

from interp.attention.needles import LostNeedle, Span

Mode = Literal["paper", "official", "top_n", "mass", "ov"]
MODES: tuple[Mode, ...] = get_args(Mode)
COPYING: tuple[Mode, ...] = ("paper", "official", "top_n")
"""Modes that ask whether the token that was written is the one attended to."""


def score_rows(
    rows: Float[Tensor, "step *head src"],
    written: Int[Tensor, " step"] | Sequence[int],
    tokens: Int[Tensor, " pos"],
    span: Span,
    *,
    mode: Mode = "paper",
    top_n: int = 5,
    norms: Float[Tensor, "*head src"] | None = None,
) -> Float[Tensor, "*head"]:
    """The retrieval score of every head, from the attention rows of the decoding steps of one prompt.

    A head pastes token w at a step if the position it attends to most lies in the needle and holds w, the token that
    the model writes at that step.

    Args:
        rows: Row i is the attention of the query that wrote token i. Sources beyond the prompt (tokens written before)
            may be there; they are never in the needle.
        written: The tokens written; the first -1 ends them.
        tokens: Token ids of the prompt.
        span: Positions of the needle. `(-1, -1)`, what the released locator gives for a needle it does not find, scores
            0 in `"official"` mode and is refused in the others.
        mode: `"paper"`: share of the needle's distinct tokens that the head pasted, 0 to 1. `"official"`, as released:
            1 / (length of the needle) for every step that pastes, so that a token pasted twice counts twice and scores
            exceed 1. `"top_n"`: as paper, with any of the `top_n` positions attended to most. `"mass"`: attention on
            the needle, and `"ov"`: the share of it in what the head adds up, each source's weight times the norm of its
            value after W_O, which discounts sinks; both are means over the steps that wrote a token of the needle.
        norms: For `"ov"`: the norm of every source's value after W_O.

    Source:
        Wu et al. 2024, *Retrieval Head Mechanistically Explains Long-Context Factuality* (arXiv:2404.15574), section 2;
        `"official"`: Retrieval_Head, `retrieval_head_detection.py`, `retrieval_calculate`.
    """
    check_mode(mode, top_n)
    words = [int(token) for token in written]
    words = words[: words.index(-1)] if -1 in words else words
    if len(rows) < len(words):
        raise ValueError(f"{len(words)} tokens were written, but there are rows for {len(rows)} steps")
    start, end = span
    if mode == "official" and span == (-1, -1):
        return rows.new_zeros(rows.shape[1:-1])
    if not 0 <= start < end <= len(tokens):
        raise LostNeedle(f"the needle at {span} does not lie in a prompt of {len(tokens)} tokens; it has no score")
    rows = rows[: len(words)]
    wrote = torch.tensor(words, dtype=torch.long)
    rows, tokens = rows.cpu(), tokens.cpu()
    norms = None if norms is None else norms.cpu()
    if mode in COPYING:
        n = min(top_n, rows.shape[-1]) if mode == "top_n" else 1
        return pasted_scores(largest(rows, n), wrote, tokens, span, official=mode == "official")
    share = rows if norms is None else rows * norms
    if mode == "ov":
        if norms is None:
            raise ValueError("mode='ov' needs norms=, the norm of every source's value after W_O")
        share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
    elif norms is not None:
        raise ValueError(f"norms= belongs to mode='ov', not to {mode!r}")
    return mean_over_needle_steps(share[..., start:end].sum(-1), wrote, tokens[start:end])


def largest(rows: Float[Tensor, "*row src"], n: int) -> Int[Tensor, "*row n"]:
    """Positions of the `n` largest weights; of equal ones the first, so that a uniform row looks at BOS.

    (The released code takes any of them, and so may count a head that looks everywhere.)
    """
    if n == 1:
        return rows.argmax(-1, keepdim=True)
    return rows.sort(dim=-1, descending=True, stable=True).indices[..., :n]


def pasted_scores(
    top: Int[Tensor, "step *head n"],
    wrote: Int[Tensor, " step"],
    tokens: Int[Tensor, " pos"],
    span: Span,
    *,
    official: bool,
) -> Float[Tensor, "*head"]:
    """Paper or official score from the positions attended to most."""
    start, end = span
    inside = (top >= start) & (top < end)
    held = tokens[top.clamp(0, len(tokens) - 1)]
    shape = (len(wrote), *[1] * (top.ndim - 1))
    hit = (inside & (held == wrote.view(shape))).any(-1)  # [step, head...]
    if official:
        return hit.sum(0).float() / (end - start)
    distinct = tokens[start:end].unique()
    # of several steps that write one token, any that pastes it counts, once
    pasted = [hit[wrote == token].any(0) for token in distinct if bool((wrote == token).any())]
    if not pasted:
        return torch.zeros(hit.shape[1:])
    return torch.stack(pasted).sum(0).float() / len(distinct)


def mean_over_needle_steps(
    values: Float[Tensor, "step *head"], wrote: Int[Tensor, " step"], needle: Int[Tensor, " needle"]
) -> Float[Tensor, "*head"]:
    """Mean over the steps that wrote a token of the needle; 0 if there was none."""
    steps = torch.isin(wrote, needle)
    return values[steps].mean(0) if bool(steps.any()) else torch.zeros(values.shape[1:])


def score_interval(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, low and high over the last axis: Wilson's interval of a rate, with the size that the spread is worth.

    Scores lie between 0 and 1, so their variance is at most m (1 - m), that of a rate m; where it is a c-th of that, n
    prompts say as much as c n yes-or-no ones. Resampling would say of a head that has pasted in none of 20 prompts that
    it never will; this says in up to 16 % of them. Scores above 1 (official) are taken as shares of the largest.
    """
    n = values.shape[-1]
    top = max(1.0, float(values.max()))
    mean = values.mean(-1) / top
    most = mean * (1 - mean)
    spread = values.var(-1, ddof=1) / top**2 if n > 1 else most
    spread = (n * spread + most) / (n + 1)  # the spread of few prompts is not taken at its word
    with np.errstate(invalid="ignore", divide="ignore"):
        worth = n * np.where(most > 0, np.clip(most / spread, 1, None), 1)
    z = float(norm.ppf((1 + level) / 2))
    centre = (mean + z**2 / (2 * worth)) / (1 + z**2 / worth)
    half = z / (1 + z**2 / worth) * np.sqrt(most / worth + z**2 / (4 * worth**2))
    return mean * top, np.clip(centre - half, 0, mean) * top, np.clip(centre + half, mean, 1) * top


def undecided(values: np.ndarray, *, threshold: float, precision: float, level: float, looks: int) -> np.ndarray:
    """Heads whose interval still holds the threshold and is wider than +-precision, when one looks up to `looks` times.

    Each look takes its share of the error, so that all of them together are wrong no more often than 1 - level
    (Bonferroni; per head, not over heads).
    """
    if values.shape[-1] < 2:
        return np.ones(values.shape[:-1], dtype=bool)
    estimate, low, high = score_interval(values, 1 - (1 - level) / looks)
    return (low < threshold) & (high >= threshold) & (np.maximum(high - estimate, estimate - low) > precision)


def check_mode(mode: str, top_n: int) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not a retrieval score; expected one of {', '.join(map(repr, MODES))}")
    if top_n < 1:
        raise ValueError(f"top_n={top_n}; expected at least 1")
