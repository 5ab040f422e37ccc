"""Someone is named, and then named again: the only person there is, so that the second mention is determined.

Held out: (name, wording).
"""

from __future__ import annotations

import random

from interp.tinyworld.documents import Document, fill
from interp.tinyworld.lexicon.names import NAMES, PLACES, THINGS

NAME = "mention"

TEMPLATES = (
    "{name} went to the {place} , and everyone there greeted {again!} .",
    "a {thing} was found at the {place} by {name} , so it belongs to {again!} .",
    "at the {place} we met {name} and gave the {thing} to {again!} .",
    "this {thing} is from {name} ; at the {place} they thanked {again!} .",
)


def draw(
    rng: random.Random,
    *,
    template: int | None = None,
    name: str | None = None,
    place: str | None = None,
    thing: str | None = None,
) -> Document:
    """One sentence about one person."""
    index = rng.randrange(len(TEMPLATES)) if template is None else template
    name = name or rng.choice(NAMES)
    people = {"name": name, "again": name}
    things = {"place": place or rng.choice(PLACES), "thing": thing or rng.choice(THINGS)}
    return fill(TEMPLATES[index], NAME, {**people, **things}, entities=people, combinations=((name, str(index)),))
