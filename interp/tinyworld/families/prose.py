"""Prose: topic paragraphs, the two dialects, and text strewn with marks that mean nothing.

Held out: (subject, verb, object) of a sentence of the `dialect` family. Nothing of its phrases or of topics.
"""

from __future__ import annotations

import random
from typing import Literal

from interp.tinyworld.documents import Document, fill, join, scatter_marks
from interp.tinyworld.lexicon.dialects import ADJECTIVES, DIALECTS, NOUNS, VERBS, say
from interp.tinyworld.lexicon.marks import EMPTY_MARKS
from interp.tinyworld.lexicon.topics import TOPICS

TOPIC = "topic"
DIALECT = "dialect"
PUNCTUATION = "punctuation"

TOPIC_TEMPLATES = (
    "the {adjective} {noun} {verb} the {noun.2} .",
    "the {noun} {verb} a {noun.2} .",
    "the {noun} and the {noun.2} {verb} the {adjective} {noun.3} .",
    "a {noun} {verb} the {adjective} {noun.2} near the {noun.3} .",
    "the {noun} {verb} while the {noun.2} {verb.2} .",
    "in the {noun} a {adjective} {noun.2} {verb} , but the {noun.3} {verb.2} .",
)
DIALECT_TEMPLATES = (
    "the {noun} {verb} the {noun.2}",
    "the {adjective} {noun} {verb} a {noun.2}",
    "the {noun} {verb} the {adjective} {noun.2} with the {noun.3}",
    "in the {noun.3} the {noun} {verb} the {noun.2}",
    "the {noun} {verb} the {noun.2} and the very {adjective} {noun.3}",
)
DIALECT_PHRASES = ("{noun}", "the {adjective} {noun}", "{verb} the {noun}")  # what a dictionary lists
Dialect = Literal["north", "south"]


def draw_topic(
    rng: random.Random,
    *,
    topic: str | None = None,
    dialect: Dialect | None = None,
    sentences: int | None = None,
    family: str = TOPIC,
) -> Document:
    """A paragraph that keeps to the words of one topic and to the function words of one dialect."""
    topic = topic or rng.choice(tuple(TOPICS))
    dialect = dialect or _either(rng)
    count = sentences or rng.randint(2, 6)
    return join([_topic_sentence(rng, family, topic, dialect) for _ in range(count)], kind=topic)


def filler(rng: random.Random, length: int, family: str) -> Document:
    """Exactly `length` words of topic paragraph; what no sentence fits into is filled with empty marks."""
    topic, dialect = rng.choice(tuple(TOPICS)), _either(rng)
    parts: list[Document] = []
    room = length
    for _ in range(3 + length // 4):
        sentence = _topic_sentence(rng, family, topic, dialect)
        if len(sentence) <= room:
            parts.append(sentence)
            room -= len(sentence)
    marks = fill("{mark}", family, {"mark": rng.choices(EMPTY_MARKS, k=room)}, topic=topic, dialect=dialect)
    return join([*parts, marks])


def draw_dialect(
    rng: random.Random,
    *,
    kind: Literal["translation", "phrase", "monologue"] | None = None,
    dialect: Dialect | None = None,
    sentences: int | None = None,
) -> Document:
    """A sentence or phrase in one dialect and then the other ("north : ... ; south : ... ."), or a paragraph in one.

    In a translation every word of what is said second is determined. `dialect` is the one that is spoken first.
    """
    kind = kind or rng.choices(("translation", "phrase", "monologue"), (0.5, 0.25, 0.25))[0]
    dialect = dialect or _either(rng)
    if kind != "monologue":
        first, second = dialect_pair(rng, dialect=dialect, phrase=kind == "phrase")
        spoken = {label.dialect for label in second.labels}.pop()
        parts = [
            fill("{dialect} :", DIALECT, {"dialect": dialect}, dialect=dialect),
            first,
            fill("; {dialect} :", DIALECT, {"dialect": str(spoken)}, dialect=spoken),
            Document(second.words, second.labels, tuple(range(len(second)))),
            fill(".", DIALECT, {}, dialect=spoken),
        ]
        return join(parts, kind=kind, combinations=first.combinations)
    said = [dialect_pair(rng, dialect=dialect)[0] for _ in range(sentences or rng.randint(2, 5))]
    stop = fill(".", DIALECT, {}, dialect=dialect)
    combinations = tuple(combination for sentence in said for combination in sentence.combinations)
    return join([part for sentence in said for part in (sentence, stop)], kind=kind, combinations=combinations)


def dialect_pair(rng: random.Random, *, dialect: Dialect = "north", phrase: bool = False) -> tuple[Document, Document]:
    """The same sentence, or phrase, in `dialect` and in the other one, aligned word by word."""
    noun, noun_2, noun_3 = rng.sample(tuple(NOUNS), 3)
    verb, adjective = rng.choice(tuple(VERBS)), rng.choice(tuple(ADJECTIVES))
    template = rng.choice(DIALECT_PHRASES if phrase else DIALECT_TEMPLATES)
    meanings = {"noun": noun, "noun.2": noun_2, "noun.3": noun_3, "verb": verb, "adjective": adjective}
    combinations = () if phrase else ((noun, verb, noun_2),)

    def spoken(language: str) -> Document:
        slots = {slot: say(word, language) for slot, word in meanings.items()}
        return fill(
            template, DIALECT, slots, dialect=language, entities=meanings, kind="sentence", combinations=combinations
        )

    return spoken(dialect), spoken(_other(dialect))


def draw_punctuation(rng: random.Random, *, rate: float = 0.25, topic: str | None = None) -> Document:
    """A topic paragraph with empty marks strewn over it; a mark says nothing about what comes next."""
    return scatter_marks(draw_topic(rng, topic=topic, sentences=rng.randint(2, 4), family=PUNCTUATION), rng, rate)


def _topic_sentence(rng: random.Random, family: str, topic: str, dialect: str) -> Document:
    words = TOPICS[topic]
    nouns = rng.sample(words.nouns, 3)
    verbs = rng.sample(words.verbs, 2)
    slots = {"noun": nouns[0], "noun.2": nouns[1], "noun.3": nouns[2], "verb": verbs[0], "verb.2": verbs[1]}
    slots["adjective"] = rng.choice(words.adjectives)
    return fill(rng.choice(TOPIC_TEMPLATES), family, slots, topic=topic, dialect=dialect)


def _either(rng: random.Random) -> Dialect:
    return "north" if rng.random() < 0.5 else "south"


def _other(dialect: str) -> str:
    return DIALECTS[1 - DIALECTS.index(dialect)]
