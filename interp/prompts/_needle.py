"""Retrieval: a key and its value stated in a haystack, the key asked for at a chosen distance."""

from __future__ import annotations

import random
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
    distance: int = 32,
    before: int = 24,
    pairs: int = 3,
    template: int | None = None,
    split: Split | None = None,
) -> Prompts:
    """Needles "the code of the vault is crimson" in prose, one asked for at the end; the answer is its value.

    The corrupted prompt states another value, which is the foil. Distractors, needles with other keys and values, stand
    on either side of the one that is asked for, so that neither "the only value" nor "the last value" is right.
    Positions: `key` and `value` in the needle, `query` (the key where it is asked for), `end`.

    Args:
        bridge: The model; its tokenizer decides between tinyworld prompts and English ones.
        n: Number of examples.
        seed: Seed of every choice.
        distance: Tokens between the end of the needle's sentence and the question, exactly.
        before: Tokens in front of the needle's sentence, exactly (English prompts have an opening sentence besides).
            The depth of the needle is before / (before + distance).
        pairs: Needles in all; 1 for no distractors.
        template: Index of one wording; all that have the commonest length by default.
        split: tinyworld only. `"heldout"` (default): (key, value) pairs that the models never saw, clean and corrupted.

    Raises:
        ValueError: If the tokenizer has too few keys and values that are single tokens, needles and whole sentences
            cannot make up a distance exactly, or the prompts exceed the context.

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
    haystack = _World(bridge) if world else _English(bridge, keys[0], values[0])
    wordings = haystack.wordings(choose("template", template, range(len(STATEMENTS))))

    examples: list[Pair] = []
    while len(examples) < n:
        (key, *other_keys), (value, other, *other_values) = rng.sample(keys, pairs), rng.sample(values, pairs + 1)
        if world and any(tinyworld.held_out("needle", (key, word)) != (split == "heldout") for word in (value, other)):
            continue
        index = rng.choice(wordings)
        after = _after(rng, haystack, index, distance, before, pairs)
        others = list(zip(other_keys, other_values, strict=True))
        clean = haystack.text(rng, index, (key, value), others, after, distance, before)
        start, end = clean.spans["value"]
        corrupted = Text(f"{clean.text[:start]}{other}{clean.text[end:]}")
        labels = {"template": index, "distance": distance, "before": before, "pairs": pairs, "after": after}
        labels |= {"key": key, "value": value, "corrupted_value": other}
        examples.append(Pair(clean, corrupted, [f" {value}"], [f" {other}"], labels))
    return build(bridge, "needle", seed, examples)


def _after(
    rng: random.Random, haystack: _World | _English, template: int, distance: int, before: int, pairs: int
) -> int:
    """How many distractors follow the needle; the others stand before it."""
    size, sizes = haystack.statement(template), haystack.sizes
    room = {"distance": distance, "before": before}
    fits = {what: [k for k in range(pairs) if _reachable(sizes, length - k * size)] for what, length in room.items()}
    for what, counts in fits.items():
        if not counts:
            near = sorted(
                (t for t in range(room[what] + 20) if _reachable(sizes, t)), key=lambda t: abs(t - room[what])
            )
            raise ValueError(
                f"{what}={room[what]} cannot be met exactly with whole sentences of this tokenizer; the nearest are "
                f"{sorted(near[:3])}"
            )
    possible = [k for k in fits["distance"] if pairs - 1 - k in fits["before"]]
    if not possible:
        raise ValueError(
            f"{pairs - 1} distractors of {size} tokens do not fit exactly into before={before} and "
            f"distance={distance}; use fewer pairs or larger numbers"
        )
    return rng.choice(possible)


class _World:
    """Haystacks of tinyworld; its family knows the wordings and the prose."""

    sizes = (1,)  # prose of any length

    def __init__(self, bridge: Any) -> None:
        self.bridge = bridge
        self.draw = tinyworld.TABLE["needle"].draw
        # wording and question are drawn apart there, so each is held to one length
        self.questions = of_one_length(
            bridge, range(len(world_needles.QUESTIONS)), lambda question: Text(self._bare(0, question).text)
        )

    def wordings(self, templates: list[int]) -> list[int]:
        return of_one_length(self.bridge, templates, lambda template: Text(self._bare(template, 0).text))

    def statement(self, template: int) -> int:
        return self._bare(template, 0).words.index(".") + 1

    def text(
        self,
        rng: random.Random,
        template: int,
        asked: tuple[str, str],
        others: list[tuple[str, str]],
        after: int,
        distance: int,
        before: int,
    ) -> Text:
        question = rng.choice(self.questions)
        size = self.statement(template)
        whole = before + distance + len(self._bare(template, question))
        if whole > world_needles.MAX_WORDS:
            raise ValueError(
                f"distance={distance} and before={before} make {whole} words, but a tinyworld haystack has at most "
                f"{world_needles.MAX_WORDS}; reduce one of them"
            )
        key, value = asked
        for _ in range(10_000):
            document = self.draw(
                rng,
                distance=distance,
                before=before - (len(others) - after) * size,
                pairs=len(others) + 1,
                template=template,
                question=question,
                key=key,
                value=value,
            )
            roles = [label.role for label in document.labels]
            if roles[roles.index("key") :].count("distractor_key") == after:
                break
        else:
            raise AssertionError("the family puts any number of distractors behind the needle")
        # the family chooses its own distractors: give it ours, none of which is the corrupted value
        names = iter(word for pair in others for word in _in_order(roles, pair))
        replaced = {i: next(names) for i, role in enumerate(roles) if role.startswith("distractor_")}
        parts = {role: document.index(role) for role in ("key", "value", "query")}
        return document_text(document, document.answers[0], parts, replaced)

    def _bare(self, template: int, question: int) -> Document:
        return self.draw(random.Random(0), distance=0, before=0, pairs=1, template=template, question=question)


def _in_order(roles: list[str], pair: tuple[str, str]) -> tuple[str, str]:
    """Key and value in the order in which the wording says them."""
    return pair if roles.index("key") < roles.index("value") else (pair[1], pair[0])


class _English:
    """Haystacks of our own sentences, each of a known number of tokens."""

    def __init__(self, bridge: Any, key: str, value: str) -> None:
        self.bridge, self.key, self.value = bridge, key, value
        self.sentences = tuple((text, self._size(text)) for text in FILLER)
        self.sizes = tuple(sorted({size for _, size in self.sentences}))

    def wordings(self, templates: list[int]) -> list[int]:
        return of_one_length(
            self.bridge,
            templates,
            lambda t: joined(self._stated(t), fill(QUESTIONS[t], query=self.key, again=self.key)),
        )

    def statement(self, template: int) -> int:
        return self._size(self._stated(template).text)

    def _stated(self, template: int) -> Text:
        return fill(STATEMENTS[template], key=self.key, value=self.value)

    def text(
        self,
        rng: random.Random,
        template: int,
        asked: tuple[str, str],
        others: list[tuple[str, str]],
        after: int,
        distance: int,
        before: int,
    ) -> Text:
        size = self.statement(template)
        distractors = [fill(STATEMENTS[template], key=key, value=value).text for key, value in others]
        sides = []
        for length, said in ((before, distractors[after:]), (distance, distractors[:after])):
            side = [*self._prose(rng, length - len(said) * size), *said]
            rng.shuffle(side)
            sides.append(Text("".join(side)))
        key, value = asked
        needle_ = fill(STATEMENTS[template], key=key, value=value)
        question = fill(QUESTIONS[template], query=key, again=key)
        text = joined(Text(OPENING), sides[0], needle_, sides[1], question)
        return Text(text.text, {name: text.spans[name] for name in ("key", "value", "query")})

    def _size(self, text: str) -> int:
        return len(pieces(self.bridge.tokenizer, OPENING + text)) - len(pieces(self.bridge.tokenizer, OPENING))

    def _prose(self, rng: random.Random, length: int) -> list[str]:
        """Random sentences of exactly `length` tokens together."""
        out = []
        while length > 0:
            fitting = [(text, size) for text, size in self.sentences if _reachable(self.sizes, length - size)]
            text, size = rng.choice(fitting)
            out.append(text)
            length -= size
        return out


@cache
def _reachable(sizes: tuple[int, ...], length: int) -> bool:
    """Whether numbers of these sizes, each any number of times, can add up to `length`."""
    if length < 0:
        return False
    reached = {0}
    for total in range(1, length + 1):
        if any(total - size in reached for size in sizes):
            reached.add(total)
    return length in reached
