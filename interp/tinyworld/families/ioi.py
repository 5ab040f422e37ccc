"""Indirect objects: two people, one acts twice, the other receives.

Held out: unordered pairs of names.
"""

from __future__ import annotations

import random
from typing import Literal

from interp.tinyworld.documents import Document, fill
from interp.tinyworld.lexicon.names import NAMES, PLACES, THINGS

NAME = "ioi"

TEMPLATES = (  # {x} is named first, {y} second; the one who acts again is s2
    "when {x} and {y} went to the {place} , {s2} gave the {thing} to {io2!} .",
    "after {x} and {y} met at the {place} , {s2} handed the {thing} to {io2!} .",
    "while {x} and {y} were in the {place} , {s2} passed a {thing} to {io2!} .",
    "then {x} and {y} had a talk at the {place} and {s2} offered the {thing} to {io2!} .",
    "friends {x} and {y} found a {thing} at the {place} ; {s2} showed it to {io2!} .",
    "{x} and {y} worked in the {place} , so {s2} lent a {thing} to {io2!} .",
    "one day {x} and {y} walked to the {place} , where {s2} sold the {thing} to {io2!} .",
    "because {x} and {y} lived near the {place} , {s2} brought a {thing} to {io2!} .",
)
Order = Literal["ABBA", "BABA"]


def draw(
    rng: random.Random,
    *,
    order: Order | None = None,
    template: int | None = None,
    io: str | None = None,
    subject: str | None = None,
    place: str | None = None,
    thing: str | None = None,
) -> Document:
    """One sentence. ABBA names the indirect object first, BABA the subject; what is not given is drawn."""
    order = order or rng.choice(("ABBA", "BABA"))
    index = rng.randrange(len(TEMPLATES)) if template is None else template
    io = io or rng.choice([name for name in NAMES if name != subject])
    subject = subject or rng.choice([name for name in NAMES if name != io])
    first, second = ("io", "s1") if order == "ABBA" else ("s1", "io")
    people = {"io": io, "s1": subject, "s2": subject, "io2": io}
    things = {"place": place or rng.choice(PLACES), "thing": thing or rng.choice(THINGS)}
    return fill(
        TEMPLATES[index].replace("{x}", f"{{{first}}}").replace("{y}", f"{{{second}}}"),
        NAME,
        {**people, **things},
        entities=people,
        kind=order,
        combinations=(tuple(sorted((io, subject))),),
    )
