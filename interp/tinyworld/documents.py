"""Labelled documents, the template language they are written in, and the split that keeps combinations held out."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, NamedTuple

from interp.tinyworld.lexicon.dialects import say
from interp.tinyworld.lexicon.marks import EMPTY_MARKS

Split = Literal["train", "heldout"]

HELD_OUT_SHARE = 8  # one combination in eight is never trained on


class Label(NamedTuple):
    """What is known about one word: ground truth for any feature, neuron or head.

    Attributes:
        family: The family of documents it stands in.
        role: What it does there (the slot of the template; `"frame"` for the template's own words, `"mark"` for
            punctuation that carries nothing).
        topic: The topic whose sentence it stands in.
        dialect: The dialect its sentence is spoken in.
        entity: What the word is about: the person, thing, key or country meant. In a two-hop document every filled
            word has the bridge country as its entity, although the country is never said.
    """

    family: str
    role: str
    topic: str | None = None
    dialect: str | None = None
    entity: str | None = None


@dataclass(frozen=True)
class Document:
    """Words with one label each.

    Attributes:
        words: The words; joined by spaces they are the text.
        labels: One label per word.
        answers: Indices of the words that are the single right continuation of what stands before them.
        kind: The variant within the family (`"ABBA"`, `"relative"`, `"capital"`, ...).
        combinations: What was combined, the asked combination first; the split is by these.
    """

    words: tuple[str, ...]
    labels: tuple[Label, ...]
    answers: tuple[int, ...] = ()
    kind: str = ""
    combinations: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if len(self.words) != len(self.labels):
            raise ValueError(
                f"a document needs one label per word; got {len(self.words)} words and {len(self.labels)} labels"
            )

    def __len__(self) -> int:
        return len(self.words)

    @property
    def text(self) -> str:
        """The words joined by spaces."""
        return " ".join(self.words)

    def index(self, role: str) -> int:
        """The first word with this role; ValueError names the roles there are."""
        for position, label in enumerate(self.labels):
            if label.role == role:
                return position
        roles = sorted({label.role for label in self.labels})
        raise ValueError(f"no word of this document has the role {role!r}; its roles are {roles}")


def held_out(family: str, combination: Iterable[str]) -> bool:
    """Whether a combination is kept out of training: one in eight, by a hash that is the same in every process."""
    digest = hashlib.blake2b("\x1f".join((family, *combination)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def belongs(document: Document, family: str, split: Split) -> bool:
    """Whether a document may be used in a split: in training nothing is held out, in heldout what is asked is."""
    if split == "heldout":
        return bool(document.combinations) and held_out(family, document.combinations[0])
    return not any(held_out(family, combination) for combination in document.combinations)


def fill(
    template: str,
    family: str,
    slots: Mapping[str, str | Sequence[str]],
    *,
    topic: str | None = None,
    dialect: str | None = None,
    entities: Mapping[str, str] | None = None,
    kind: str = "",
    combinations: tuple[tuple[str, ...], ...] = (),
) -> Document:
    """Fill a template and label every word.

    A template is words with `{slot}` for a filled word and `{slot!}` where the filled word is the single right
    continuation. The slot's name is the word's role, up to a `.` (`{noun.2}` has the role `noun`). Words of the
    template are spoken in `dialect`. A slot may hold several words, all with its role.

    Args:
        entities: Entity per slot; a filled word that is not listed has no entity.
    """
    words: list[str] = []
    labels: list[Label] = []
    answers: list[int] = []
    for word, slot, is_answer in _parse(template):
        if slot is None:
            words.append(say(word, dialect))
            labels.append(_label(family, "frame", topic, dialect, None))
            continue
        filler = slots[slot]
        label = _label(family, slot.split(".")[0], topic, dialect, entities.get(slot) if entities else None)
        for part in (filler,) if isinstance(filler, str) else filler:
            if is_answer:
                answers.append(len(words))
            words.append(part)
            labels.append(label)
    return Document(tuple(words), tuple(labels), tuple(answers), kind, combinations)


def join(documents: Iterable[Document], *, kind: str = "", combinations: tuple[tuple[str, ...], ...] = ()) -> Document:
    """Documents one after another as one document; answers keep pointing at their words."""
    words: list[str] = []
    labels: list[Label] = []
    answers: list[int] = []
    for document in documents:
        answers.extend(len(words) + answer for answer in document.answers)
        words.extend(document.words)
        labels.extend(document.labels)
    return Document(tuple(words), tuple(labels), tuple(answers), kind, combinations)


def scatter_marks(document: Document, rng: random.Random, rate: float) -> Document:
    """The document with a mark that means nothing before each word with probability `rate`."""
    words: list[str] = []
    labels: list[Label] = []
    moved: dict[int, int] = {}
    for position, (word, label) in enumerate(zip(document.words, document.labels, strict=True)):
        if rng.random() < rate:
            words.append(rng.choice(EMPTY_MARKS))
            labels.append(_label(label.family, "mark", label.topic, label.dialect, None))
        moved[position] = len(words)
        words.append(word)
        labels.append(label)
    answers = tuple(moved[answer] for answer in document.answers)
    return Document(tuple(words), tuple(labels), answers, document.kind, document.combinations)


@cache
def _parse(template: str) -> tuple[tuple[str, str | None, bool], ...]:
    parts: list[tuple[str, str | None, bool]] = []
    for word in template.split():
        if not word.startswith("{"):
            parts.append((word, None, False))
        else:
            slot = word.strip("{}")
            parts.append((word, slot.rstrip("!"), slot.endswith("!")))
    return tuple(parts)


@lru_cache(maxsize=100_000)
def _label(family: str, role: str, topic: str | None, dialect: str | None, entity: str | None) -> Label:
    return Label(family, role, topic, dialect, entity)
