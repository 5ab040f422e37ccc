"""Retrieval: keys and values stated in a haystack of prose, one key asked for at the end.

Held out: (key, value) pairs; no other pair of a training document is held out either.
"""

from __future__ import annotations

import random

from interp.tinyworld.documents import Document, fill, join
from interp.tinyworld.families.prose import filler
from interp.tinyworld.lexicon.needles import KEYS, VALUES

NAME = "needle"

STATEMENTS = (
    "the code of the {key} is {value} .",
    "the {key} opens with {value} .",
    "the {key} hides {value} .",
)
QUESTIONS = (
    "what is the code of the {query} ? {answer!} .",
    "what opens the {query} ? {answer!} .",
    "question : {query} ? {answer!} .",
)
MAX_WORDS = 120  # with the start token, inside the context of the embedded models


def draw(
    rng: random.Random,
    *,
    distance: int | None = None,
    before: int | None = None,
    pairs: int | None = None,
    template: int | None = None,
    question: int | None = None,
    key: str | None = None,
    value: str | None = None,
) -> Document:
    """A haystack with one needle asked for, the others being distractors.

    Args:
        distance: Words between the end of the needle's sentence and the question, exactly. Distractors that do not
            fit there stand before the needle.
        before: Words of prose before everything else.
        pairs: Needles in all, one to five by default.
        template: Wording of all the needles; each has its own by default.
    """
    pairs = pairs or rng.randint(1, 5)
    keys = rng.sample([word for word in KEYS if word != key], pairs - 1)
    values = rng.sample([word for word in VALUES if word != value], pairs - 1)
    key = key or rng.choice([word for word in KEYS if word not in keys])
    value = value or rng.choice([word for word in VALUES if word not in values])
    asked = _statement(rng, "", key, value, template)
    distractors = [_statement(rng, "distractor_", *pair, template) for pair in zip(keys, values, strict=True)]
    asking = fill(
        QUESTIONS[rng.randrange(len(QUESTIONS)) if question is None else question],
        NAME,
        {"query": key, "answer": value},
        entities={"query": key, "answer": key},
    )
    room = MAX_WORDS - len(asked) - len(asking) - sum(map(len, distractors))
    if distance is None:
        near = rng.randint(0, rng.randint(0, room))  # near ones more often than far ones
        distance = min(room, near + sum(map(len, distractors[: rng.randint(0, len(distractors))])))
    after: list[Document] = []
    while distractors and rng.random() < 0.6 and sum(map(len, after)) + len(distractors[-1]) <= distance:
        after.append(distractors.pop())
    gap = distance - sum(map(len, after))
    cut = rng.randint(0, gap)
    before = rng.randint(0, 12) if before is None else before
    used = before + distance + len(asked) + len(asking) + sum(map(len, distractors))
    if used > MAX_WORDS:
        before = max(0, before - (used - MAX_WORDS))
    parts = [filler(rng, before, NAME), *distractors, asked, filler(rng, cut, NAME), *after]
    parts += [filler(rng, gap - cut, NAME), asking]
    combinations = ((key, value), *zip(keys, values, strict=True))
    return join(parts, kind=f"{pairs} needles", combinations=combinations)


def _statement(rng: random.Random, prefix: str, key: str, value: str, template: int | None) -> Document:
    text = STATEMENTS[rng.randrange(len(STATEMENTS)) if template is None else template]
    text = text.replace("{key}", f"{{{prefix}key}}").replace("{value}", f"{{{prefix}value}}")
    slots = {f"{prefix}key": key, f"{prefix}value": value}
    return fill(text, NAME, slots, entities=dict.fromkeys(slots, key))
