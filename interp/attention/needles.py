"""Prompts with a needle whose tokens are known exactly, and where a needle stands in tokens that somebody else made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Int
from torch import Tensor

from interp.prompts._tokens import Encoded

if TYPE_CHECKING:
    import pandas as pd

Span = tuple[int, int]
Target = Literal["answer", "needle"]


class LostNeedle(ValueError):
    """The needle is not where it should be, so that no score can be given for the prompt."""


@dataclass(frozen=True, eq=False)
class Needle:
    """One prompt with a needle in it; what should follow the prompt is the answer.

    Attributes:
        tokens: Token ids of the prompt, BOS included if the model uses one. The model answers after the last one.
        span: Positions of the needle, first and one past the last.
        answer_span: Positions, inside the needle, of the part that answers the question.
        answer: Token ids that a right answer consists of.
        length: The length that was asked for, in tokens (`len(tokens)` is the real one).
        depth: Where the needle was to stand, 0 at the beginning and 1 at the end of the haystack.
        labels: Anything else to keep, such as the needle's name.
    """

    tokens: Int[Tensor, " pos"]
    span: Span
    answer_span: Span
    answer: tuple[int, ...]
    length: int
    depth: float | int
    labels: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (start, end) in {"span": self.span, "answer_span": self.answer_span}.items():
            if not 0 <= start < end <= len(self.tokens):
                raise LostNeedle(
                    f"{name} {(start, end)} does not lie in a prompt of {len(self.tokens)} tokens; give the first "
                    f"position of the needle and one past its last (find_span finds them)"
                )
        if not (self.span[0] <= self.answer_span[0] and self.answer_span[1] <= self.span[1]):
            raise LostNeedle(f"answer_span {self.answer_span} is not inside the needle at {self.span}")
        if not self.answer:
            raise ValueError("the answer has no tokens, so nothing could be retrieved")

    def target(self, which: Target) -> Span:
        """The positions that count as the needle: its answer, or the whole sentence."""
        if which not in ("answer", "needle"):
            raise ValueError(f"target must be 'answer' or 'needle', got {which!r}")
        return self.answer_span if which == "answer" else self.span


@dataclass(frozen=True, eq=False)
class Needles:
    """Prompts with needles, over lengths and depths.

    Attributes:
        samples: The prompts; they may differ in length.
        strings: Texts of token ids, for tables and figures.
        name: What they are called in provenance.
        seed: Seed of the choices that were random.
    """

    samples: tuple[Needle, ...]
    strings: Mapping[int, str] = field(default_factory=dict)
    name: str = "needles"
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("there is no needle among these samples")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int | slice) -> Any:
        """One `Needle`, or `Needles` for a slice."""
        picked = self.samples[index]
        return picked if isinstance(picked, Needle) else Needles(picked, self.strings, self.name, self.seed)

    def __repr__(self) -> str:
        lengths = sorted({sample.length for sample in self.samples})
        shown = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"
        return f"Needles({self.name}: {len(self)} prompts of {shown} tokens)"

    def text(self, token: int) -> str:
        """Text of one token id, or `#id` if it is unknown."""
        return self.strings.get(int(token), f"#{int(token)}")

    def _said(self, tokens: Sequence[int]) -> str:
        texts = [self.text(token) for token in tokens]
        # word-level tokens carry no spaces of their own
        return ("" if any(text.startswith(" ") for text in self.strings.values()) else " ").join(texts)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per prompt: length, depth, positions, answer, the tokens around the needle, labels."""
        import pandas as pd

        rows = []
        for i, sample in enumerate(self.samples):
            start, end = sample.span
            rows.append(
                {
                    "sample": i,
                    "length": sample.length,
                    "depth": sample.depth,
                    "tokens": len(sample.tokens),
                    "start": start,
                    "end": end,
                    "needle": self._said(sample.tokens[start:end].tolist()),
                    "answer": self._said(sample.answer),
                    **sample.labels,
                }
            )
        return pd.DataFrame(rows)


def find_span(tokens: Int[Tensor, " pos"], needle: Sequence[int] | Int[Tensor, " needle"]) -> Span:
    """Where these token ids stand in a prompt, first position and one past the last.

    Raises:
        LostNeedle: If they are not there, or more than once. Text that was tokenised with its neighbours may have other
            ids than text tokenised alone; `insert_needles` does not depend on that.
    """
    wanted = [int(token) for token in needle]
    row = tokens.tolist()
    found = [i for i in range(len(row) - len(wanted) + 1) if row[i : i + len(wanted)] == wanted] if wanted else []
    if len(found) != 1:
        raise LostNeedle(
            f"the {len(wanted)} tokens {wanted[:8]} of the needle occur {len(found)} times in the prompt"
            f"{f', at {found[:5]}' if found else ''}; expected once. insert_needles knows the span by construction"
        )
    return found[0], found[0] + len(wanted)


def official_span(tokens: Int[Tensor, " pos"], needle: Sequence[int] | Int[Tensor, " needle"]) -> Span:
    """Where the released locator of Wu et al. puts a needle: a replay, to compare with; it is often too early.

    It takes the first window whose set of tokens holds more than 0.9 of the needle's distinct tokens, so a window that
    starts early is taken as soon as what it misses of the end is less than a tenth, or occurs elsewhere in it.
    `(-1, -1)` if there is none.

    Source:
        Retrieval_Head, `retrieval_head_detection.py`, `find_needle_idx`.
    """
    wanted = {int(token) for token in needle}
    row, size = tokens.tolist(), len(needle)
    for start in range(len(row)):
        if len(wanted.intersection(row[start : start + size])) / len(wanted) > 0.9:
            return start, start + size
    return -1, -1


def covering(encoded: Encoded, text: str, start: int, end: int) -> Span:
    """Positions of the tokens that cover the characters from `start` to `end` of a text.

    Raises:
        LostNeedle: If a visible character of them is covered by no token.
    """
    inside = [i for i, (a, b) in enumerate(encoded.offsets) if a < end and b > start and b > a]
    covered = {place for i in inside for place in range(*encoded.offsets[i])}
    lost = "".join(text[place] for place in range(start, end) if place not in covered and not text[place].isspace())
    if lost or not inside:
        raise LostNeedle(
            f"the tokenizer has no token for {lost or text[start:end]!r} of {text[start:end]!r}, so the needle is not "
            f"whole in the prompt; use another wording"
        )
    return inside[0], inside[-1] + 1
