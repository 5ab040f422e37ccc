"""Indirect object identification: "When Mary and John went to the shop, John gave the ring to" -> Mary."""

from __future__ import annotations

import random
from typing import Any, Literal, NamedTuple, get_args

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
    of_one_length,
    require,
    world_split,
)
from interp.prompts._prompts import Prompts
from interp.prompts._tokens import Text
from interp.tinyworld import Split
from interp.tinyworld.families.ioi import TEMPLATES as WORLD_TEMPLATES
from interp.tinyworld.lexicon.names import NAMES, PLACES, THINGS

TEMPLATES = (  # {x} is named first, {y} second; a template opens with a word, never with a name
    "When {x} and {y} went to the {place}, {s2} gave a {thing} to",
    "After {x} and {y} met at the {place}, {s2} handed a {thing} to",
    "While {x} and {y} stood in the {place}, {s2} passed a {thing} to",
    "Once {x} and {y} came to the {place}, {s2} offered a {thing} to",
    "Because {x} and {y} worked at the {place}, {s2} brought a {thing} to",
    "Then {x} and {y} had a talk at the {place}, and {s2} sent a {thing} to",
    "Last week {x} and {y} walked to the {place}, and {s2} sold a {thing} to",
    "Yesterday {x} and {y} arrived at the {place}, and {s2} showed a {thing} to",
)

Corruption = Literal["s2_io_flip", "s2_random", "abc"]
Order = Literal["ABBA", "BABA"]


class _Slots(NamedTuple):
    io: str
    subject: str
    place: str
    thing: str


def ioi(
    bridge: Any,
    n: int = 64,
    seed: int = 0,
    *,
    corruption: Corruption = "s2_io_flip",
    order: Order | None = None,
    template: int | None = None,
    split: Split | None = None,
) -> Prompts:
    """Two people, one acts again, the other receives: the answer is the name said once, the foil the one said twice.

    Examples come in twos that differ only in the order of the first two names, so ABBA and BABA are balanced exactly
    over names, templates, places and things. Positions: `io`, `s1`, `s1+1` (the token after the subject's first
    mention), `s2`, `end`.

    Args:
        bridge: The model; its tokenizer decides between tinyworld prompts and English ones.
        n: Number of examples.
        seed: Seed of every choice.
        corruption: What the corrupted prompt changes.
            `"s2_io_flip"`: S2 becomes IO, which makes the subject the right answer (symmetric token replacement: the
            logit difference changes its sign). `"s2_random"`: S2 becomes a third name. `"abc"`: all three mentions
            become three other names (the ABC prompts of the paper); nothing then favours answer or foil.
        order: Only `"ABBA"` (IO named first) or only `"BABA"`.
        template: Index of one template; all that have the commonest length by default.
        split: tinyworld only. `"heldout"` (default): pairs of names that the models never saw together.

    Raises:
        ValueError: If the tokenizer has too few single-token names, places or things.

    Source:
        Wang et al. 2022 (arXiv:2211.00593); symmetric replacement as recommended by Zhang & Nanda 2023
        (arXiv:2309.16042), named as in MIB (arXiv:2504.13151). Templates and names are our own.
    """
    check_n("ioi", n)
    choose("corruption", corruption, get_args(Corruption))
    orders = choose("order", order, get_args(Order))
    world = is_world(bridge)
    split = world_split("ioi", split, world=world)
    rng = generator("ioi", seed)
    names = require(bridge, "ioi", "names", NAMES, 5)
    places, things = (
        require(bridge, "ioi", what, words, 1) for what, words in (("places", PLACES), ("things", THINGS))
    )
    templates = choose("template", template, range(len(WORLD_TEMPLATES if world else TEMPLATES)))
    example = _Slots(names[0], names[1], places[0], things[0])
    templates = of_one_length(bridge, templates, lambda t: _text(world, t, "ABBA", example))

    pairs: list[Pair] = []
    while len(pairs) < n:
        io, subject, *others = _names(rng, names, split if world else None)
        slots = _Slots(io, subject, rng.choice(places), rng.choice(things))
        index = rng.choice(templates)
        swaps = {
            "s2_io_flip": {"s2": io},
            "s2_random": {"s2": others[0]},
            "abc": dict(zip(("io", "s1", "s2"), others, strict=True)),
        }[corruption]
        for each in orders:
            pairs.append(
                Pair(
                    _text(world, index, each, slots),
                    _text(world, index, each, slots, swaps),
                    [f" {io}"],
                    [f" {subject}"],
                    {"template": index, "order": each, "corruption": corruption, **slots._asdict()},
                )
            )
    return build(bridge, "ioi", seed, pairs[:n])


def _names(rng: random.Random, names: list[str], split: Split | None) -> list[str]:
    """IO, subject and three further names; the first two are a pair of the split."""
    for _ in range(1000):
        drawn = rng.sample(names, 5)
        if split is None or tinyworld.held_out("ioi", sorted(drawn[:2])) == (split == "heldout"):
            return drawn
    raise AssertionError("one pair of names in eight is held out, so a thousand draws find one")


def _text(world: bool, template: int, order: str, slots: _Slots, swaps: dict[str, str] | None = None) -> Text:
    people = {"io": slots.io, "s1": slots.subject, "s2": slots.subject, **(swaps or {})}
    if world:
        document = tinyworld.TABLE["ioi"].draw(random.Random(0), order=order, template=template, **slots._asdict())
        at = {role: document.index(role) for role in people}
        words = {at[role]: name for role, name in people.items()}
        return document_text(document, document.answers[0], {**at, "s1+1": at["s1"] + 1}, words)
    first, second = ("io", "s1") if order == "ABBA" else ("s1", "io")
    raw = TEMPLATES[template].replace("{x}", f"{{{first}}}").replace("{y}", f"{{{second}}}")
    text = fill(raw, **people, place=slots.place, thing=slots.thing)
    after = text.spans["s1"][1]  # what follows is " and" or, after the second name, another word
    spans = {role: text.spans[role] for role in people}
    return Text(text.text, {**spans, "s1+1": (after + 1, after + 2)})
