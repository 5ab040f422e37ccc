"""Spans of years: the end is later than the start, in the same century. No single answer is right.

Held out: (event, century, start).
"""

from __future__ import annotations

import random

from interp.tinyworld.documents import Document, fill
from interp.tinyworld.lexicon.times import CENTURIES, EVENTS, TWO_DIGITS

NAME = "greater_than"

TEMPLATES = (
    "the {event} lasted from the year {century} {start} to the year {century.2} {end} .",
    "the {event} began in {century} {start} and ended in {century.2} {end} .",
    "between {century} {start} and {century.2} {end} there was a {event} .",
    "the {event} of {century} {start} was over by {century.2} {end} .",
)
EARLIEST, LATEST = 2, 97  # room for years on both sides of the start


def draw(
    rng: random.Random,
    *,
    template: int | None = None,
    event: str | None = None,
    century: str | None = None,
    start: int | None = None,
) -> Document:
    """One span; the end is uniform over the later years of the century."""
    index = rng.randrange(len(TEMPLATES)) if template is None else template
    start = rng.randint(EARLIEST, LATEST) if start is None else start
    event, century = event or rng.choice(EVENTS), century or rng.choice(CENTURIES)
    slots = {
        "event": event,
        "century": century,
        "century.2": century,
        "start": TWO_DIGITS[start],
        "end": TWO_DIGITS[rng.randint(start + 1, 99)],
    }
    return fill(TEMPLATES[index], NAME, slots, combinations=((event, century, TWO_DIGITS[start]),))


def valid_ends(start: str) -> tuple[str, ...]:
    """The two-digit years that may follow, all those later than `start`."""
    return TWO_DIGITS[int(start) + 1 :]
