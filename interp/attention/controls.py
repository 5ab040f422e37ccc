"""Controls of the sink rate: random tokens, one token repeated, and attention of known importance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from interp import stats
from interp.attention._activations import sizes
from interp.attention.sinks import EPSILON, sink_scores
from interp.models import provenance
from interp.results import Result, labelled

Control = Literal["random", "repeated"]


def uniform_importance(n_pos: int) -> np.ndarray:
    """Importance of every key `[n_pos]` when each query attends evenly to all it sees: (H(n) - H(k)) / (n - k).

    0.0741 at key 0 of 64: what a model without position information gives one repeated token.
    """
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, n_pos + 1))])
    key = np.arange(n_pos)
    return (harmonic[-1] - harmonic[key]) / (n_pos - key)


def self_importance(n_pos: int) -> np.ndarray:
    """Importance of every key `[n_pos]` when each query attends to itself alone: 1 / (n - k), so 1 at the last key."""
    return 1.0 / (n_pos - np.arange(n_pos))


def constant_logit_importance(logit: float | int, n_pos: int) -> float:
    """Importance of key 0 when its attention logit is `logit` for every query and all others are 0."""
    rows = np.arange(n_pos)
    return float(np.mean(1.0 / (1.0 + rows * math.exp(-logit))))


def logit_for_importance(importance: float | int, n_pos: int) -> float:
    """The constant logit at which key 0 has this importance: the inverse of `constant_logit_importance`."""
    if not 1 / n_pos < importance < 1:
        raise ValueError(f"importance={importance} of key 0 lies between 1/{n_pos} = {1 / n_pos:.4f} and 1")
    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if constant_logit_importance(middle, n_pos) < importance else (low, middle)
    return (low + high) / 2


def control_tokens(
    bridge: Any, n: int, n_pos: int, kind: Control, *, first: int | None = None, seed: int = 0
) -> Int[Tensor, "n n_pos"]:
    """Token ids drawn evenly from the vocabulary: `"random"` each its own, `"repeated"` one per row.

    Args:
        first: Id put at position 0 of every row (BOS); none by default, as in the paper.

    Source:
        The random and repeated inputs of Gu et al. 2025 (arXiv:2410.10781), section 4.
    """
    if kind not in ("random", "repeated"):
        raise ValueError(f"kind={kind!r}; expected 'random' or 'repeated'")
    if n < 1 or n_pos < 1:
        raise ValueError(f"n={n} rows of n_pos={n_pos} tokens; both must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(int(bridge.cfg.d_vocab), (n, n_pos if kind == "random" else 1), generator=generator)
    tokens = drawn.expand(n, n_pos).clone()
    if first is not None:
        tokens[:, 0] = first
    return tokens


@dataclass(frozen=True, eq=False, repr=False)
class SinkControls(Result):
    """Importance of one key on natural text and on its controls: `(condition, layer, head, example)`."""

    def rates(self, epsilon: float | int = EPSILON, **interval: Any) -> pd.DataFrame:
        """Sink rate of every condition with its bootstrap interval over sequences: `condition, rate, low, high`."""
        flags = (self.values > epsilon).where(self.values.notnull()).mean(["layer", "head"])
        rate, low, high = stats.bootstrap_interval(flags.transpose("condition", "example"), **interval)
        return pd.DataFrame({"condition": self.values["condition"].values, "rate": rate, "low": low, "high": high})

    def plot(self, epsilon: float | int = EPSILON) -> Any:
        """Bars of the rates."""
        from interp.plotting import bars

        title = f"Sink rate of position {self.provenance['key']} by kind of input (importance > {epsilon:g})"
        table = self.rates(epsilon)
        return bars(table, x="condition", y="rate", interval=("low", "high"), title=title, unit="sink rate", width=680)


def sink_controls(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    *,
    key: int = 0,
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> SinkControls:
    """The importance of one key on these tokens, on random tokens and on one token repeated.

    A sink that belongs to a *position* (learned position embeddings) stays when one token is repeated; with rotary or
    no positions all hidden states are then equal, attention has nothing to single out and the rate is 0. Where every
    row begins with the same id (BOS), both controls are also run with that id first: `"first + random"`,
    `"first + repeated"`. Costs three forwards, or five.

    Raises:
        ValueError, RuntimeError: As `sink_scores`.

    Source:
        Gu et al. 2025 (arXiv:2410.10781), section 4. At 64 tokens, natural / random / repeated: GPT2-XL 77.00 / 70.29 /
        62.28 %, Mistral-7B 97.49 / 75.21 / 0.00, LLaMA2-7B 92.47 / 90.13 / 0.00, LLaMA3-8B 99.02 / 91.23 / 0.00.
    """
    n, n_pos = tokens.shape
    conditions: dict[str, Tensor] = {"natural": tokens}
    kinds: tuple[Control, ...] = ("random", "repeated")
    for kind in kinds:
        conditions[kind] = control_tokens(bridge, n, n_pos, kind, seed=seed)
    first = int(tokens[0, 0])
    if bool((tokens[:, 0] == first).all()):
        for kind in kinds:
            conditions[f"first + {kind}"] = control_tokens(bridge, n, n_pos, kind, first=first, seed=seed)
    options: dict[str, Any] = {"keys": [key], "layers": layers, "batch_size": batch_size}
    scores = {name: sink_scores(bridge, rows, **options) for name, rows in conditions.items()}
    values = np.stack([score.values.sel(key=key).values for score in scores.values()])
    shape = sizes(bridge)
    coords = {
        "condition": list(scores),
        "layer": range(shape.n_layers),
        "head": range(shape.n_heads),
        "example": range(n),
    }
    settings = {"n_examples": n, "n_pos": n_pos, "key": key, "seed": seed, "cost": {"forwards": len(scores)}}
    record = provenance(bridge, method="sink_controls", **settings)
    return SinkControls(labelled(values, list(coords), coords, unit="mean attention weight"), record)
