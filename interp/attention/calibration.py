"""Attention calibration (ACT): take attention from sinks and give it to the other keys, as released and without its
pitfalls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.attention._patterns import require_patterns
from interp.attention.sinks import MIN_QUERIES, sink_importance
from interp.hooks import hook_name, interventions


@dataclass(frozen=True)
class Calibration:
    """Settings of `calibrate_pattern`.

    Attributes:
        beta: What is left of a sink's attention.
        threshold: Importance above which a key is a sink; None for `alpha` / number of keys.
        alpha: Used where `threshold` is None.
        diagonal: Count the attention of a token to itself when looking for sinks.
        min_queries: Queries that must see a key before it can be a sink.
        spare: Position that keeps its attention and, unlike in the release, receives nothing either; None spares none.
        released: Behave as the released code: the *first sink found* is spared, wherever it is, and takes its share of
            what is freed; only the first row of the batch is calibrated; A[0, 0] is set to 1; rows whose keys are all
            sinks become NaN.
    """

    beta: float | int = 0.4
    threshold: float | int | None = None
    alpha: float | int = 5.0
    diagonal: bool = False
    min_queries: int = MIN_QUERIES
    spare: int | None = 0
    released: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(
                f"beta={self.beta} must lie between 0 and 1: it is the share of attention that a sink keeps"
            )
        if self.min_queries < 1:
            raise ValueError(f"min_queries={self.min_queries} must be at least 1")
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise ValueError(f"threshold={self.threshold} must lie between 0 and 1: it is a mean attention weight")
        if self.alpha <= 0 or (self.spare is not None and self.spare < 0):
            raise ValueError(f"alpha={self.alpha} must be positive and spare={self.spare} a position, or None")


RELEASED = Calibration(beta=0.4, threshold=0.1, diagonal=True, min_queries=1, spare=None, released=True)
"""The constants and the behaviour of the released code."""

SANE = Calibration()
"""The same idea with its pitfalls removed: see `calibrate_pattern`."""


def calibration_sinks(
    pattern: Float[Tensor, "batch head dest src"], settings: Calibration = SANE
) -> Bool[Tensor, "batch head src"]:
    """The keys that are sinks by these settings, the spared one included."""
    n_pos = pattern.shape[-1]
    threshold = settings.alpha / n_pos if settings.threshold is None else settings.threshold
    importance = sink_importance(pattern, diagonal=settings.diagonal)
    queries = torch.arange(n_pos, 0, -1, device=pattern.device) - (0 if settings.diagonal else 1)
    return (importance > threshold) & (queries >= settings.min_queries)


def calibrate_pattern(
    pattern: Float[Tensor, "batch head dest src"], settings: Calibration = SANE
) -> Float[Tensor, "batch head dest src"]:
    """A new pattern in which sinks keep `beta` of their attention and each row's other keys share the rest.

    What is freed goes to the keys that are not sinks, in proportion to the attention they have; sums of rows stay. The
    default settings work on every example by itself; do not mistake self-attention near the end for a sink; spare
    position 0 by name, and give it nothing; leave a row as it is that has no other key to give to.

    Raises:
        ValueError: If the pattern is not of whole sequences (decoding with a cache), where a column is one row.

    Source:
        ACT, Yu et al. 2024 (arXiv:2406.15765). `RELEASED` does what the code does, which differs from its paper:
        threshold 0.1 for 5 / n, first row of the batch only, last keys flagged by their own diagonal, and most of the
        freed attention returning to position 0, which as first sink is spared and stays among the receivers.
    """
    if settings.released:
        return torch.cat([_released(pattern[:1], settings), pattern[1:]])
    sinks = calibration_sinks(pattern, settings)
    receivers = ~sinks
    if settings.spare is not None:
        sinks = sinks.clone()
        sinks[..., settings.spare] = False
        receivers = receivers.clone()
        receivers[..., settings.spare] = False
    reduced, pool = sinks.unsqueeze(-2), receivers.unsqueeze(-2)
    freed = (1 - settings.beta) * torch.where(reduced, pattern, 0).sum(-1, keepdim=True)
    room = torch.where(pool, pattern, 0).sum(-1, keepdim=True)
    moved = torch.where(reduced, settings.beta * pattern, pattern)
    moved = moved + torch.where(pool, pattern, 0) * (freed / room.clamp_min(1e-30))
    return torch.where((room > 1e-6) & (freed > 0), moved, pattern)


def _released(pattern: Tensor, settings: Calibration) -> Tensor:
    new = pattern.clone()
    found = calibration_sinks(pattern, settings)
    for head in range(pattern.shape[1]):
        sinks = found[0, head].nonzero().flatten()[1:]  # the first is spared, whatever its position
        if len(sinks) == 0:
            continue
        rows = new[0, head]
        freed = (1 - settings.beta) * rows[:, sinks].sum(-1, keepdim=True)
        pool = torch.ones(rows.shape[-1], dtype=torch.bool, device=rows.device)
        pool[sinks] = False
        others = torch.where(pool, rows, 0)
        rows[:, sinks] *= settings.beta
        rows += freed * others / others.sum(-1, keepdim=True)
        rows[0] = pattern[0, head, 0]
        rows[0, 0] = 1.0
    return new


@contextmanager
def calibrated(bridge: Any, heads: Sequence[tuple[int, int]], settings: Calibration = SANE) -> Iterator[None]:
    """Every forward inside the context calibrates the attention of these heads, given as `(layer, head)`.

    The paper finds the heads by a search over all of them with labelled data (about 900 prompts a task), and shows that
    calibrating every head does harm.

    Raises:
        ValueError: If a head does not exist, or the model's patterns cannot be replaced.
    """
    by_layer = group_heads(bridge, heads)
    require_patterns(bridge, list(by_layer), edit=True)

    def edit(chosen: list[int]) -> Any:
        def apply(pattern: Tensor) -> Tensor:
            new = pattern.clone()
            new[:, chosen] = calibrate_pattern(pattern[:, chosen].float(), settings).to(pattern.dtype)
            return new

        return apply

    with interventions(bridge, {hook_name("pattern", layer): edit(chosen) for layer, chosen in by_layer.items()}):
        yield


def group_heads(bridge: Any, heads: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """Layer to its heads, sorted and each once.

    Raises:
        ValueError: If there are none, or one does not exist.
    """
    n_layers, n_heads = int(bridge.cfg.n_layers), int(bridge.cfg.n_heads)
    if not heads:
        raise ValueError("no heads were given; pass pairs (layer, head), such as [(2, 3)]")
    grouped: dict[int, set[int]] = {}
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(
                f"there is no head ({layer}, {head}): this model has layers 0 to {n_layers - 1} of heads 0 to "
                f"{n_heads - 1}"
            )
        grouped.setdefault(int(layer), set()).add(int(head))
    return {layer: sorted(chosen) for layer, chosen in sorted(grouped.items())}
