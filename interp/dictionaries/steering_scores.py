"""What steered text is scored by: how much of a concept it holds, and how well the unsteered model expects it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.dictionaries._steered_rows import rows_per_forward
from interp.hooks.names import device_of
from interp.models import require_eval


@dataclass(frozen=True, eq=False)
class Concept:
    """What steering is to bring about, as something that can be counted in text.

    Attributes:
        name: Shown in tables.
        tokens: Its label tokens, whose odds are read from the model's predictions.
        weights: How much each token of the vocabulary speaks for it, 0 to 1; the score of a text is their mean.
        reference: The score of the concept's own texts, which counts as full.
    """

    name: str
    tokens: tuple[int, ...]
    weights: Float[Tensor, " d_vocab"] = field(repr=False)
    reference: float = 1.0

    def __post_init__(self) -> None:
        size = len(self.weights)
        if not self.tokens or min(self.tokens) < 0 or max(self.tokens) >= size or len(set(self.tokens)) >= size:
            raise ValueError(
                f"concept {self.name!r} has label tokens {self.tokens[:8]}; expected some, not all, of 0 to {size - 1}"
            )
        if not 0 < self.reference <= 1:
            raise ValueError(f"concept {self.name!r} has reference {self.reference}; expected above 0 and at most 1")

    @classmethod
    def from_tokens(cls, name: str, tokens: Sequence[int], d_vocab: int, *, reference: float | int = 1.0) -> Concept:
        """A concept that is its label tokens and no others."""
        weights = torch.zeros(d_vocab)
        weights[list(tokens)] = 1.0
        return cls(name, tuple(int(token) for token in tokens), weights, float(reference))

    @classmethod
    def from_labels(
        cls, name: str, ids: Int[Tensor, "..."], labelled: Bool[Tensor, "..."], d_vocab: int, *, known: Any = None
    ) -> Concept:
        """A classifier from labelled text: a token weighs as often as it was labelled where it occurred.

        Label tokens are those that are labelled more often than not, and the reference is the mean weight of labelled
        tokens: what the score of a text that is labelled throughout comes to.

        Args:
            ids: Token ids of texts with and without the concept.
            labelled: Whether each token is the concept's, such as `label.topic == "sea"` in tinyworld.
            known: Bool like `ids`; tokens to count at all (not padding). All by default.

        Raises:
            ValueError: If nothing, or everything, is labelled, or no token is labelled more often than not.
        """
        keep = torch.ones_like(labelled) if known is None else torch.as_tensor(known).bool()
        flat, truth = ids[keep].long().cpu(), labelled[keep].double().cpu()
        if not 0 < float(truth.sum()) < len(truth):
            raise ValueError(f"{int(truth.sum())} of {len(truth)} tokens are labelled {name!r}; both kinds are needed")
        seen = torch.zeros(d_vocab, dtype=torch.float64).index_add_(0, flat, torch.ones_like(truth))
        hits = torch.zeros(d_vocab, dtype=torch.float64).index_add_(0, flat, truth)
        weights = hits / seen.clamp_min(1)
        tokens = torch.where(weights > 0.5)[0].tolist()
        if not tokens:
            raise ValueError(f"no token is labelled {name!r} more often than not: this concept is not in single tokens")
        reference = float((weights[flat] * truth).sum() / truth.sum())
        return cls(name, tuple(tokens), weights.float(), reference)

    def of_text(self, written: Int[Tensor, "... n_tokens"]) -> Float[Tensor, "..."]:
        """Mean weight of the tokens of each text, 0 to 1."""
        return self.weights[written.long().cpu()].mean(-1)


def label_log_odds(log_probs: Float[Tensor, "... d_vocab"], tokens: Sequence[int]) -> Float[Tensor, "..."]:
    """Log-odds, in nats, that the next token is one of these: log P(one of them) - log P(none of them).

    Takes logits as well as log-probabilities.
    """
    values = log_probs.float()
    inside = torch.zeros(values.shape[-1], dtype=torch.bool, device=values.device)
    inside[list(tokens)] = True
    return values[..., inside].logsumexp(-1) - values[..., ~inside].logsumexp(-1)


def fluency(
    bridge: Any, tokens: Int[Tensor, "row pos"], prompt_length: int, *, batch_size: int | None = None
) -> Float[Tensor, " row"]:
    """Mean log-probability per written token under the unsteered model, in nats (0 is certain), one forward per batch.

    Call it outside of any steering: interventions that are active are seen.

    Args:
        tokens: Prompts followed by what was written, as `generate_steered` gives them.
        prompt_length: Tokens of the prompt; they are not scored.

    Raises:
        ValueError: If no token was written, or the prompt is empty.
    """
    require_eval(bridge)
    n_pos = tokens.shape[1]
    if not 1 <= prompt_length < n_pos:
        raise ValueError(f"prompt_length={prompt_length} in texts of {n_pos} tokens; expected 1 to {n_pos - 1}")
    device, found = device_of(bridge), []
    keep = torch.arange(prompt_length - 1, n_pos - 1, device=device)
    size = batch_size or rows_per_forward(bridge, n_pos, read=len(keep))
    with torch.no_grad():
        for part in tokens.to(device).split(size):
            log_probs = bridge(part, logits_to_keep=keep, use_cache=False).float().log_softmax(-1)
            found.append(log_probs.gather(-1, part[:, prompt_length:, None]).mean((1, 2)).cpu())
    return torch.cat(found)


def relative_fluency(log_prob: Float[Tensor, "..."], unsteered: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Perplexity of unsteered text over that of steered text, at most 1: 1 is as fluent as the model itself."""
    return (log_prob - unsteered).clamp_max(0).exp()


def harmonic_mean(concept: Float[Tensor, "..."], fluent: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """2 c f / (c + f), and 0 where either is 0: both are needed.

    Source:
        The final score of arXiv:2506.10920, there of two ratings from 0 to 2 by a language model; here of two
        measured numbers from 0 to 1.
    """
    if bool(((concept < 0) | (fluent < 0)).any()):
        raise ValueError("a harmonic mean takes scores of 0 or more; normalise them first")
    total = concept + fluent
    return torch.where((concept > 0) & (fluent > 0), 2 * concept * fluent / total.clamp_min(1e-30), 0 * total)
