"""Laundry list: a list of items, all but one of which are said again; the answer is the one that is left."""

from __future__ import annotations

import random
from typing import Any, Literal

from interp import tinyworld
from interp.prompts._build import (
    Pair,
    build,
    check_n,
    choose,
    generator,
    is_world,
    joined,
    require,
    world_split,
)
from interp.prompts._prompts import Prompts
from interp.prompts._tokens import Text
from interp.tinyworld import Split
from interp.tinyworld.families.lists import LIST_WORDS

Task = Literal["next", "remaining"]

ITEMS = """
    pencil notebook apple book phone cup hat ring box bag key pen shirt coat cat dog ball map card clock lamp knife
    fork spoon plate bowl chair table door window flower tree stone shell coin toy drum bell boat car train plane
"""


def recall(
    bridge: Any,
    n: int = 64,
    seed: int = 0,
    *,
    length: int = 4,
    task: Task = "next",
    answer_index: int | None = None,
    split: Split | None = None,
) -> Prompts:
    """A list of `length` items that must be recalled: which comes next, or which one is left.

    `"next"`: the list is said again in its order and stops before item `answer_index`. `"remaining"`: all items but
    that one are said again, in random order (the laundry list); what is left is the answer. The foil is another item
    of the list. In the corrupted prompt answer and foil have changed places (`"next"`: in the first list), or the
    answer was said again instead of the foil (`"remaining"`). Positions: `item_0`, `item_1`, ... (first mentions),
    `answer`, `foil` (their first mentions), `end`. Labels: `length`, `answer_index`, `foil_index`, `task`.

    A tinyworld model has seen lists said twice in order, framed as here, and never the second task: its accuracy there
    is a finding and no failure of the prompts.

    Args:
        bridge: The model; any other tokenizer gets English with items that are single tokens there.
        length: Items in the list.
        answer_index: Which item is asked for, from 0 (`"next"`: from 1). By default the middle one for `"next"`,
            where the length of the prompt depends on it, and any for `"remaining"`.
        split: tinyworld only. `"heldout"` (default): lists whose contents the models never saw.

    Raises:
        ValueError: If the options do not fit, or too few words are single tokens.

    Source:
        Merullo et al. 2024 (arXiv:2406.09519), Laundry List: accuracy by length and by place in the list. Their
        wording was not available; ours differs, and `"next"` is our own, for models that know lists.
    """
    check_n("recall", n)
    choose("task", task, ("next", "remaining"))
    first = 1 if task == "next" else 0
    if length < 3:
        raise ValueError(f"length={length}: expected at least 3 items, so that there is something to confuse")
    if answer_index is not None and not first <= answer_index < length:
        raise ValueError(
            f"answer_index={answer_index}; expected {first} to {length - 1} for {task!r} and {length} items"
        )
    world = is_world(bridge)
    split = world_split("recall", split, world=world)
    rng = generator("recall", seed)
    pool = list(LIST_WORDS) if world else require(bridge, "recall", "items", ITEMS.split(), length)
    if length > len(pool):
        raise ValueError(f"length={length}, but there are {len(pool)} different items")
    pairs: list[Pair] = []
    while len(pairs) < n:
        items = rng.sample(pool, length)
        answer = answer_index
        if answer is None:
            answer = length // 2 if task == "next" else rng.randrange(length)
        others = [i for i in range(length) if i != answer]
        if task == "next":  # one that was not said again yet, where there is one
            others = [i for i in others if i > answer] or others
        pair, orders = _pair(rng, items, answer, rng.choice(others), task, world)
        if not world or all(tinyworld.held_out("induction", order) == (split == "heldout") for order in orders):
            pairs.append(pair)
    return build(bridge, "recall", seed, pairs)


def _pair(
    rng: random.Random, items: list[str], answer: int, foil: int, task: Task, world: bool
) -> tuple[Pair, tuple[list[str], list[str]]]:
    """The example, and the two lists it is made of."""
    order = [i for i in range(len(items)) if i != answer]
    if task == "remaining":
        rng.shuffle(order)
    again = [items[i] for i in (range(answer) if task == "next" else order)]
    swapped, other = list(items), list(again)
    if task == "next":
        swapped[answer], swapped[foil] = items[foil], items[answer]
        if foil < answer:  # said again already: in the corrupted prompt it is the answer that stands there
            other[foil] = items[answer]
    else:
        other[order.index(foil)] = items[answer]
    labels = {"length": len(items), "answer_index": answer, "foil_index": foil, "task": task}
    clean, corrupted = _text(items, again, answer, foil, task, world), _text(swapped, other, answer, foil, task, world)
    separator = "" if world else " "
    pair = Pair(clean, corrupted, [separator + items[answer]], [separator + items[foil]], labels)
    return pair, (items, swapped)


def _text(items: list[str], again: list[str], answer: int, foil: int, task: Task, world: bool) -> Text:
    listed = [_named(word, i, answer, foil) for i, word in enumerate(items)]
    if world:
        head, middle, between = Text("list : "), Text(" ; again : "), Text(" ")
    elif task == "next":
        head, middle, between = Text("The list is:"), Text(". Once more, the list is:"), Text("")
    else:
        head, middle, between = Text("In the basket there are:"), Text(". I took out the"), Text("")
    parts: list[Text] = [head]
    for i, item in enumerate(listed):
        parts += ([between] if i else []) + ([item] if world else [Text(" "), item])
    parts.append(middle)
    for i, word in enumerate(again):
        parts += ([between] if i else []) + ([Text(word)] if world else [Text(f" {word}")])
    if not world and task == "remaining":
        parts.append(Text(". What is left is the"))
    return joined(*parts)


def _named(word: str, index: int, answer: int, foil: int) -> Text:
    span = (0, len(word))
    spans = {f"item_{index}": span}
    spans |= {name: span for name, place in (("answer", answer), ("foil", foil)) if place == index}
    return Text(word, spans)
