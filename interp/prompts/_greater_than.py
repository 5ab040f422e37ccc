"""Greater-than: "The war lasted from the year 1732 to the year 17" -> any later year."""

from __future__ import annotations

import random
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
    of_one_length,
    require,
    too_few,
    world_split,
)
from interp.prompts._prompts import Prompts
from interp.prompts._tokens import Text, pieces
from interp.tinyworld import Split
from interp.tinyworld.families.years import EARLIEST, LATEST
from interp.tinyworld.families.years import TEMPLATES as WORLD_TEMPLATES
from interp.tinyworld.lexicon.times import CENTURIES, EVENTS, TWO_DIGITS

TEMPLATES = (
    "The {event} lasted from the year {century}{start} to the year {century}",
    "The {event} went on from the year {century}{start} to {century}",
    "The {event} that began in the year {century}{start} ended in {century}",
    "The {event} began in the year {century}{start} and ended in the year {century}",
)


def greater_than(
    bridge: Any,
    n: int = 64,
    seed: int = 0,
    *,
    corrupted_start: int | None = None,
    template: int | None = None,
    split: Split | None = None,
) -> Prompts:
    """Spans of years whose end must be later than the start: every later two-digit year is right, every other is wrong.

    `answer_sets` and `foil_sets` hold all of them, for `metrics.probability_difference`, the metric of the paper.
    `answers` and `foils` are one year on either side, equally far from the start, for a logit difference; with a
    corrupted start as early as 01 both are right, so its corrupted value is near zero rather than negative. Positions:
    `century`, `start`, `end`.

    Args:
        bridge: The model; its tokenizer decides between tinyworld prompts and English ones.
        n: Number of examples.
        seed: Seed of every choice.
        corrupted_start: The two-digit start of the corrupted prompt: 1 as in the paper, and in tinyworld 2, the
            earliest start there.
        template: Index of one template; all that have the commonest length by default.
        split: tinyworld only. `"heldout"` (default): (event, century, start) that the models never saw; the corrupted
            start is not held out.

    Raises:
        ValueError: If the tokenizer does not write years as two tokens of two digits each.

    Source:
        Hanna, Liu & Variengien 2023 (arXiv:2305.00586): prompts, the 01 corruption and the probability difference.
        Events, further templates and the pair for a logit difference are our own.
    """
    check_n("greater_than", n)
    world = is_world(bridge)
    split = world_split("greater_than", split, world=world)
    rng = generator("greater_than", seed)
    events = require(bridge, "greater_than", "events", EVENTS, 1)
    low = EARLIEST if corrupted_start is None and world else 1 if corrupted_start is None else corrupted_start
    if not 0 <= low < LATEST:
        raise ValueError(f"corrupted_start={low} must be a two-digit year from 0 to {LATEST - 1}")
    starts = _starts(bridge, low, world=world)
    centuries = list(starts)
    templates = choose("template", template, range(len(WORLD_TEMPLATES if world else TEMPLATES)))
    templates = of_one_length(bridge, templates, lambda t: _text(world, t, events[0], centuries[0], 32))

    pairs: list[Pair] = []
    while len(pairs) < n:
        event, century = rng.choice(events), rng.choice(centuries)
        start = rng.choice(starts[century])
        if world and tinyworld.held_out("greater_than", (event, century, TWO_DIGITS[start])) != (split == "heldout"):
            continue
        index = rng.choice(templates)
        gap = rng.randint(1, min(start, 99 - start, 20))
        space = " " if world else ""
        right = [start + gap, *(year for year in range(start + 1, 100) if year != start + gap)]
        wrong = [start - gap, *(year for year in range(start + 1) if year != start - gap)]
        pairs.append(
            Pair(
                _text(world, index, event, century, start),
                _text(world, index, event, century, low),
                [space + TWO_DIGITS[year] for year in right],
                [space + TWO_DIGITS[year] for year in wrong],
                {"template": index, "event": event, "century": century, "start": start, "corrupted_start": low},
            )
        )
    return build(bridge, "greater_than", seed, pairs)


def _starts(bridge: Any, low: int, *, world: bool) -> dict[str, list[int]]:
    """Century to the later starts in it whose year is two tokens, the century and then the two digits."""
    if world:
        return {century: list(range(low + 1, LATEST + 1)) for century in CENTURIES}
    tokenizer = bridge.tokenizer
    digits = {year: pieces(tokenizer, TWO_DIGITS[year]) for year in range(100)}
    starts: dict[str, list[int]] = {}
    if all(len(ids) == 1 for ids in digits.values()):
        for century in CENTURIES:
            first = pieces(tokenizer, f"the year {century}")
            # frequent years, such as 1776, are one token in some vocabularies
            split = [y for y in digits if pieces(tokenizer, f"the year {century}{TWO_DIGITS[y]}") == first + digits[y]]
            later = [year for year in split if low < year <= LATEST]
            if low in split and later:
                starts[century] = later
    if not starts:
        raise too_few(bridge, "greater_than", "centuries with years of two digits", 0, len(CENTURIES), 1)
    return starts


def _text(world: bool, template: int, event: str, century: str, start: int) -> Text:
    if world:
        document = tinyworld.TABLE["greater_than"].draw(
            random.Random(0), template=template, event=event, century=century, start=start
        )
        parts = {role: document.index(role) for role in ("century", "start")}
        return document_text(document, document.index("end"), parts)
    before, last = TEMPLATES[template].rsplit("{century}", 1)
    text = fill(before + "{end}" + last, event=event, century=century, start=TWO_DIGITS[start], end=century)
    return Text(text.text, {key: text.spans[key] for key in ("century", "start")})
