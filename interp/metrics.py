"""Metrics: logits to one number per example.

A metric is a callable object. `metric(logits)` takes `[batch, pos, d_vocab]` and gives `[batch]`; means over examples
come later, so that error bars are always available. Every metric has a `.name`, a `.unit`, the `.positions` it reads
(None: all of them), `.at(logits_at_positions)` for an engine that unembedded those positions only, and `.select(rows)`,
the same metric for a batch that holds some examples, repeated or reordered: `metric.select(rows)(logits)`.

Logits in half precision are read in float32, so that a difference of two large logits keeps its digits. All but
`answer_rank` and `accuracy` are differentiable. Which one to use: the logit difference is close to linear in the
residual stream and sees components that work against the answer; a probability saturates, exaggerates, and cannot see
negative components once it is near zero (Zhang & Nanda 2023, arXiv:2309.16042; Heimersheim & Nanda 2024,
arXiv:2404.15255).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "ExampleMetric",
    "accuracy",
    "answer_log_prob",
    "answer_prob",
    "answer_rank",
    "kl_divergence",
    "logit_difference",
    "probability_difference",
]


@runtime_checkable
class Answered(Protocol):
    """What a metric needs of `interp.prompts.Prompts`: token ids and the position at which the answer is read."""

    @property
    def answers(self) -> Tensor: ...
    @property
    def foils(self) -> Tensor: ...
    @property
    def positions(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True, eq=False)
class ExampleMetric:
    """A metric that knows which example each row of a batch is.

    Attributes:
        name: The function that built it, such as `"logit_difference"`.
        unit: Unit of its values, such as `"logits"`, `"nats"` or `"probability"`.
        positions: The position read in every example, or None if all positions are read.
        targets: Tensors with one row per example that the score needs (token ids, reference log-probabilities).
        score: `(logits, **targets) -> [batch]`, on logits `[batch, d_vocab]` (or `[batch, pos, d_vocab]` if `positions`
            is None).
    """

    name: str
    unit: str
    positions: Int[Tensor, "example"] | None
    targets: Mapping[str, Tensor] = field(repr=False)
    score: Callable[..., Tensor] = field(repr=False)

    def __len__(self) -> int:
        return len(next(iter(self.targets.values())))

    def __call__(self, logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, "batch"]:
        """One value per example of a batch that holds exactly the metric's examples, in order."""
        if logits.ndim != 3:
            raise ValueError(
                f"{self.name} expects logits [batch, pos, d_vocab] but got shape {tuple(logits.shape)}; logits of the "
                "read positions alone, [batch, d_vocab], go to metric.at(logits)"
            )
        self._check_batch(logits)
        if self.positions is None:
            return self._score(logits)
        if int(self.positions.max()) >= logits.shape[1]:
            row = int(self.positions.argmax())
            raise ValueError(
                f"{self.name} reads position {int(self.positions[row])} of row {row}, but the logits have only "
                f"{logits.shape[1]} positions; pass the logits of the whole prompt, or those of the read positions "
                "alone, [batch, d_vocab], to metric.at(logits)"
            )
        rows = torch.arange(len(self), device=logits.device)
        return self._score(logits[rows, self.positions.to(logits.device)])

    def at(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch"]:
        """One value per example, from the logits at `metric.positions` alone."""
        if self.positions is None:
            raise ValueError(
                f"this {self.name} reads all positions, so there is no single one to score; call metric(logits)"
            )
        if logits.ndim != 2:
            raise ValueError(
                f"{self.name}.at expects the logits of one position per example, [batch, d_vocab], but got shape "
                f"{tuple(logits.shape)}; logits of whole prompts go to metric(logits)"
            )
        self._check_batch(logits)
        return self._score(logits)

    def select(self, rows: Tensor | Sequence[int] | slice) -> ExampleMetric:
        """The same metric for a batch that holds examples `rows` (indices, in order, repeats allowed)."""
        index = rows.cpu() if isinstance(rows, Tensor) else rows
        try:
            index = torch.arange(len(self))[index]
        except IndexError as error:
            raise IndexError(f"{self.name} has {len(self)} examples; cannot select rows {rows}: {error}") from None
        positions = None if self.positions is None else self.positions[index.to(self.positions.device)]
        targets = {key: value[index.to(value.device)] for key, value in self.targets.items()}
        return replace(self, positions=positions, targets=targets)

    def _score(self, logits: Tensor) -> Tensor:
        # scores upcast where they must: a gather of two logits need not copy the whole vocabulary in float32
        return self.score(logits, **{key: value.to(logits.device) for key, value in self.targets.items()})

    def _check_batch(self, logits: Tensor) -> None:
        if len(logits) != len(self):
            raise ValueError(
                f"the batch has {len(logits)} rows but this {self.name} was built for {len(self)} examples; score a "
                "batch that holds some of them, or repeats, with metric.select(rows)(logits), where rows[i] is the "
                "example in row i"
            )


def logit_difference(prompts: Answered) -> ExampleMetric:
    """Logit of the answer minus logit of the foil, at position `end`, in logits.

    Positive when the model prefers the answer. Does not depend on the softmax or on a constant added to all logits.
    """

    def score(logits: Tensor, answers: Tensor, foils: Tensor) -> Tensor:
        return _pick(logits, answers) - _pick(logits, foils)

    return _answer_metric("logit_difference", "logits", prompts, score, foils=prompts.foils)


def answer_log_prob(prompts: Answered) -> ExampleMetric:
    """Log-probability of the answer at position `end`, in nats (0 is certainty, more negative is worse)."""
    return _answer_metric("answer_log_prob", "nats", prompts, _log_prob)


def answer_prob(prompts: Answered) -> ExampleMetric:
    """Probability of the answer at position `end`, from 0 to 1.

    Easy to read but exaggerates: it is flat where the model is sure or hopeless, so a component can matter and show
    nothing.
    """
    return _answer_metric(
        "answer_prob", "probability", prompts, lambda logits, answers: _log_prob(logits, answers).exp()
    )


def answer_rank(prompts: Answered) -> ExampleMetric:
    """How many other tokens have at least the answer's logit, at position `end` (0: the answer is the best token).

    Ties and NaN count against the answer, so a model that says the same of every token has no rank-0 answers. Has no
    gradient.
    """
    return _answer_metric("answer_rank", "rank", prompts, _rank)


def accuracy(prompts: Answered) -> ExampleMetric:
    """1 where the answer is the single best token of the vocabulary at position `end`, else 0. Has no gradient."""
    return _answer_metric(
        "accuracy", "fraction correct", prompts, lambda logits, answers: (_rank(logits, answers) == 0).float()
    )


def probability_difference(
    prompts: Answered, *, answers: Sequence[Sequence[int]] | None = None, foils: Sequence[Sequence[int]] | None = None
) -> ExampleMetric:
    """Summed probability of the right tokens minus that of the wrong ones, at position `end`, from -1 to 1.

    For tasks with many right answers, such as every year after the first in greater-than. The sets come from the
    prompts (`prompts.answer_sets`, `prompts.foil_sets`) unless they are given here, one list of token ids per example.

    Raises:
        ValueError: If neither the prompts nor the call name the sets, a set is empty, or the two sets of an example
            overlap.

    Source:
        Hanna, Liu & Variengien 2023 (arXiv:2305.00586), section 2: sum of p(y) over y > YY minus sum over y <= YY.
    """
    right = answers if answers is not None else getattr(prompts, "answer_sets", None)
    wrong = foils if foils is not None else getattr(prompts, "foil_sets", None)
    if right is None or wrong is None:
        raise ValueError(
            "probability_difference compares two sets of tokens per example and these prompts carry none; pass "
            "answers=[[ids], ...] and foils=[[ids], ...], or use logit_difference for one answer and one foil"
        )
    for key, sets in (("answers", right), ("foils", wrong)):
        if len(sets) != len(prompts.answers):
            raise ValueError(f"{key} has {len(sets)} sets but the prompts have {len(prompts.answers)} examples")
        if empty := [row for row, ids in enumerate(sets) if len(ids) == 0]:
            raise ValueError(
                f"{key} has empty sets in rows {empty[:8]}; every example needs at least one token on each side"
            )
    for row, (a, b) in enumerate(zip(right, wrong, strict=True)):
        if shared := sorted(set(a) & set(b)):
            raise ValueError(f"row {row}: tokens {shared[:8]} are both right and wrong")

    # each distinct token of either set is one column: +1 right, -1 wrong, 0 neither (sparse in the vocabulary)
    columns = sorted({token for sets in (right, wrong) for ids in sets for token in ids})
    where = {token: column for column, token in enumerate(columns)}
    signs = torch.zeros(len(prompts.answers), len(columns))
    for row, (a, b) in enumerate(zip(right, wrong, strict=True)):
        signs[row, [where[token] for token in a]] = 1.0
        signs[row, [where[token] for token in b]] = -1.0
    tokens = torch.tensor(columns)

    def score(logits: Tensor, signs: Tensor) -> Tensor:
        _check_ids(logits, tokens)
        probabilities = _upcast(logits).softmax(-1)[:, tokens.to(logits.device)]
        return (probabilities * signs.to(probabilities.dtype)).sum(-1)

    return ExampleMetric("probability_difference", "probability", _end(prompts), {"signs": signs}, score)


def kl_divergence(
    reference_logits: Float[Tensor, "example pos d_vocab"], *, positions: Int[Tensor, "example"] | None = None
) -> ExampleMetric:
    """KL divergence from the reference's next-token distribution to the run's, KL(reference || run), in nats.

    Zero where the run predicts exactly what the reference does, else positive. With `positions` (for instance
    `prompts.positions["end"]`) it is read there; without, it is the mean over all positions.

    Its gradient is zero where run and reference agree, so first-order attribution from the reference's own run is zero
    everywhere: use it with exact patching, or take gradients at the other prompt.

    Args:
        reference_logits: Logits of the intact model on the same examples, for instance `bridge(prompts.clean)`.
        positions: The position to read in every example; None for the mean over all positions.
    """
    if reference_logits.ndim != 3:
        raise ValueError(
            f"reference_logits must be [example, pos, d_vocab] but has shape {tuple(reference_logits.shape)}; pass the "
            "logits of the whole prompts and name the position with positions="
        )
    reference = reference_logits.detach()
    if positions is not None:
        _check_positions(positions, len(reference), reference.shape[1])
        reference = reference[torch.arange(len(reference)), positions.to(reference.device)]

    def score(logits: Tensor, reference: Tensor) -> Tensor:
        if logits.shape != reference.shape:
            raise ValueError(
                f"kl_divergence compares logits of shape {tuple(logits.shape)} with a reference of shape "
                f"{tuple(reference.shape)}; both must come from the same prompts and vocabulary"
            )
        log_p, log_q = _upcast(reference).log_softmax(-1), _upcast(logits).log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        return divergence if divergence.ndim == 1 else divergence.mean(-1)

    positions = None if positions is None else positions.detach().cpu().long()
    return ExampleMetric("kl_divergence", "nats", positions, {"reference": reference}, score)


def _answer_metric(
    name: str, unit: str, prompts: Answered, score: Callable[..., Tensor], **extra: Tensor
) -> ExampleMetric:
    targets = {"answers": prompts.answers, **extra}
    return ExampleMetric(name, unit, _end(prompts), targets, score)


def _end(prompts: Any) -> Tensor:
    if "end" not in prompts.positions:
        raise ValueError(
            f"the prompts name positions {sorted(prompts.positions)} but not 'end', where the answer is read"
        )
    return prompts.positions["end"]


def _check_positions(positions: Tensor, n: int, length: int) -> None:
    if positions.shape != (n,):
        raise ValueError(
            f"positions must hold one index per example, shape ({n},), but has shape {tuple(positions.shape)}"
        )
    if n and not 0 <= int(positions.min()) <= int(positions.max()) < length:
        raise ValueError(
            f"positions run from {int(positions.min())} to {int(positions.max())}; expected 0 to {length - 1}"
        )


def _check_ids(logits: Tensor, tokens: Tensor) -> None:
    if len(tokens) and int(tokens.max()) >= logits.shape[-1]:
        raise ValueError(
            f"the metric reads token {int(tokens.max())} but the logits have a vocabulary of {logits.shape[-1]}; the "
            "prompts were made for another tokenizer"
        )


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _pick(logits: Tensor, tokens: Tensor) -> Tensor:
    _check_ids(logits, tokens)
    return _upcast(logits.gather(-1, tokens[:, None]).squeeze(-1))


def _log_prob(logits: Tensor, answers: Tensor) -> Tensor:
    return _pick(_upcast(logits).log_softmax(-1), answers)


def _rank(logits: Tensor, answers: Tensor) -> Tensor:
    # "not smaller" rather than "larger": NaN compares as False, so a broken model cannot look perfect
    not_smaller = ~(_upcast(logits) < _pick(logits, answers)[:, None])
    return (not_smaller.sum(-1) - 1).float()
