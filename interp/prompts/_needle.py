"""Retrieval: a key and its value stated in a haystack, the key asked for at a chosen distance."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

from interp import tinyworld
from interp.prompts._build import (
    Pair,
    build,
    check_n,
    choose,
    document_text,
    fill,
    generator,
    is_world,
    joined,
    of_one_length,
    require,
    world_split,
)
from interp.prompts._prompts import Prompts
from interp.prompts._tokens import Text, pieces
from interp.tinyworld import Document, Split
from interp.tinyworld.families import needles as world_needles
from interp.tinyworld.lexicon.needles import KEYS, VALUES

STATEMENTS = (
    " The code of the {key} is {value}.",
    " The word for the {key} is {value}.",
    " The password of the {key} is {value}.",
)
QUESTIONS = (
    " What is the code of the {query}? The code of the {again} is",
    " What is the word for the {query}? The word for the {again} is",
    " What is the password of the {query}? The password of the {again} is",
)
FILLER = (
    " It rained.",
    " The sun was warm.",
    " A dog slept in the yard.",
    " The train came late again.",
    " Children played near the old bridge.",
    " Two men talked about the weather.",
    " The bread was fresh and the tea was hot.",
    " Nobody had seen the cat since the morning.",
    " The road went over the hill and down to the sea.",
    " She read a long letter from her sister.",
    " The wind blew.",
    " He closed the window.",
)
OPENING = "This is a short report."


def needle(
    bridge: Any,
    n: int = 64,
    seed: int = 0,
    *,
    distance: int = 24,
    before: int = 8,
    pairs: int = 1,
    template: int | None = None,
    split: Split | None = None,
) -> Prompts:
    """A needle "the code of the vault is crimson" in prose, asked for at the end; the answer is its value.

    The corrupted prompt states another value, which is the foil. Positions: `key` and `value` in the needle, `query`
    (the key where it is asked for), `end`.

    Args:
        bridge: The model; its tokenizer decides between tinyworld prompts and English ones.
        n: Number of examples.
        seed: Seed of every choice.
        distance: Tokens between the end of the needle's sentence and the question, exactly.
        before: Tokens of prose before the first needle, exactly (English prompts have an opening sentence besides). The
            depth of the needle is about before / (before + distance).
        pairs: Needles in all; the others are distractors with keys and values of their own and stand before the one
            that is asked for.
        template: Index of one wording; all that have the commonest length by default.
        split: tinyworld only. `"heldout"` (default): (key, value) pairs that the models never saw, clean and corrupted.

    Raises:
        ValueError: If the tokenizer has too few keys and values that are single tokens, a distance cannot be met
            exactly, or the prompts exceed the context.

    Source:
        The needle-in-a-haystack test with key-value needles; all text is our own.
    """
    check_n("needle", n)
    if distance < 0 or before < 0 or pairs < 1:
        raise ValueError(f"distance={distance}, before={before}, pairs={pairs}: expected at least 0, 0 and 1")
    world = is_world(bridge)
    split = world_split("needle", split, world=world)
    rng = generator("needle", seed)
    keys = require(bridge, "needle", "keys", KEYS, max(pairs, 2))
    values = require(bridge, "needle", "values", VALUES, pairs + 1)
    indices = choose("template", template, range(len(STATEMENTS)))
    questions: list[int] = []
    if world:
        # wording and question are drawn apart there, so each is held to one length
        wordings = of_one_length(bridge, indices, lambda t: _world_sample(t, 0))
        questions = of_one_length(bridge, range(len(world_needles.QUESTIONS)), lambda q: _world_sample(0, q))
    else:
        wordings = of_one_length(bridge, indices, lambda t: _english(bridge, rng, t, keys[:1], values[:1], 0, 0))

    examples: list[Pair] = []
    while len(examples) < n:
        chosen_keys = rng.sample(keys, pairs)
        *chosen_values, other = rng.sample(values, pairs + 1)
        if world and any(
            tinyworld.held_out("needle", (chosen_keys[-1], v)) != (split == "heldout")
            for v in (chosen_values[-1], other)
        ):
            continue
        index, key, value = rng.choice(wordings), chosen_keys[-1], chosen_values[-1]
        if world:
            document = _document(rng, index, rng.choice(questions), key, value, other, distance, before, pairs)
            parts = {role: document.index(role) for role in ("key", "value", "query")}
            clean, corrupted = (
                document_text(document, document.answers[0], parts, {parts["value"]: word}) for word in (value, other)
            )
        else:
            prose = rng.random()  # fixes the haystack for both prompts
            clean, corrupted = (
                _english(
                    bridge, random.Random(prose), index, chosen_keys, [*chosen_values[:-1], word], distance, before
                )
                for word in (value, other)
            )
        labels = {"template": index, "distance": distance, "before": before, "pairs": pairs}
        labels |= {"key": key, "value": value, "corrupted_value": other}
        examples.append(Pair(clean, corrupted, [f" {value}"], [f" {other}"], labels))
    return build(bridge, "needle", seed, examples)


def _world_sample(template: int, question: int) -> Text:
    """The shortest haystack of a wording, to measure it."""
    document = tinyworld.TABLE["needle"].draw(
        random.Random(0), distance=0, before=0, pairs=1, template=template, question=question
    )
    return Text(document.text)


def _document(
    rng: random.Random,
    template: int,
    question: int,
    key: str,
    value: str,
    other: str,
    distance: int,
    before: int,
    pairs: int,
) -> Document:
    """A tinyworld haystack with its distractors before the needle and no distractor that says `other`."""
    for _ in range(1000):
        document = tinyworld.TABLE["needle"].draw(
            rng,
            distance=distance,
            before=before,
            pairs=pairs,
            template=template,
            question=question,
            key=key,
            value=value,
        )
        roles = [label.role for label in document.labels]
        after = roles[roles.index("value") :]
        if "distractor_key" not in after and other not in document.words:
            first = next(i for i, role in enumerate(roles) if role.endswith("key"))
            # the family shortens the prose in front when the document would outgrow the models' context
            if _before(document, first) != before:
                raise ValueError(
                    f"distance={distance}, before={before}, pairs={pairs} do not fit into {world_needles.MAX_WORDS} "
                    "words; reduce one of them"
                )
            return document
    raise ValueError(f"no haystack with {pairs} needles and distance={distance} could be drawn; use fewer pairs")


def _before(document: Document, first_key: int) -> int:
    """Words of prose before the first needle's sentence."""
    start = first_key
    while start > 0 and document.labels[start - 1].topic is None:
        start -= 1
    return start


def _english(
    bridge: Any,
    rng: random.Random,
    template: int,
    keys: Sequence[str],
    values: Sequence[str],
    distance: int,
    before: int,
) -> Text:
    tokenizer = bridge.tokenizer
    opening = len(pieces(tokenizer, OPENING))
    sentences = tuple((text, len(pieces(tokenizer, OPENING + text)) - opening) for text in FILLER)
    stated = [fill(STATEMENTS[template], key=key, value=value) for key, value in zip(keys, values, strict=True)]
    text = joined(
        Text(OPENING + _prose(rng, sentences, before, "before")),
        *stated,  # the last one is asked for, so its parts keep their names
        Text(_prose(rng, sentences, distance, "distance")),
        fill(QUESTIONS[template], query=keys[-1], again=keys[-1]),
    )
    return Text(text.text, {name: text.spans[name] for name in ("key", "value", "query")})


def _prose(rng: random.Random, sentences: tuple[tuple[str, int], ...], length: int, what: str) -> str:
    """Random sentences of exactly `length` tokens together."""
    sizes = tuple(sorted({size for _, size in sentences}))
    if not _reachable(sizes, length):
        possible = [total for total in range(length + 20) if _reachable(sizes, total)]
        nearest = sorted(possible, key=lambda total: abs(total - length))[:3]
        raise ValueError(
            f"{what}={length} cannot be met exactly with whole sentences of this tokenizer; the nearest are "
            f"{sorted(nearest)}"
        )
    out = ""
    while length > 0:
        text, size = rng.choice([(t, s) for t, s in sentences if s <= length and _reachable(sizes, length - s)])
        out, length = out + text, length - size
    return out


@cache
def _reachable(sizes: tuple[int, ...], length: int) -> bool:
    reached = {0}
    for total in range(1, length + 1):
        if any(total - size in reached for size in sizes):
            reached.add(total)
    return length in reached
