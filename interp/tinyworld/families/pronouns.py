"""Pronouns agree with the gender of the one they stand for, also with a person of the other gender in between.

Held out: (name, wording) in sentences about one person, (name, other) with two.
"""

from __future__ import annotations

import random

from interp.tinyworld.documents import Document, fill
from interp.tinyworld.lexicon.names import FEMALE, MALE, NAMES, PLACES, PRONOUNS, THINGS, gender

NAME = "pronoun"

TEMPLATES = (
    "{name} was tired , so {subject!} slept at the {place} .",
    "{name} lost {possessive!} {thing} at the {place} .",
    "{name} needed help , so we called {object!} from the {place} .",
    "{name} left the {place} when {subject!} had found the {thing} .",
    "{name} , who had met {other} at the {place} , forgot {possessive!} {thing} .",
    "{name} was late , but {other} waited for {object!} at the {place} .",
    "{name} stayed at the {place} with {other} until {subject!} fell asleep .",
)
CASES = ("subject", "object", "possessive")  # as PRONOUNS lists them


def draw(
    rng: random.Random,
    *,
    template: int | None = None,
    name: str | None = None,
    other: str | None = None,
    place: str | None = None,
    thing: str | None = None,
) -> Document:
    """One sentence; the other person, where there is one, is always of the other gender."""
    index = rng.randrange(len(TEMPLATES)) if template is None else template
    name = name or rng.choice(NAMES)
    other = other or rng.choice(MALE if gender(name) == "female" else FEMALE)
    text = TEMPLATES[index]
    kind = next(case for case in CASES if f"{{{case}!}}" in text)
    slots = {
        "name": name,
        "other": other,
        "place": place or rng.choice(PLACES),
        "thing": thing or rng.choice(THINGS),
        "pronoun": PRONOUNS[gender(name)][CASES.index(kind)],
    }
    return fill(
        # the answer's role is "pronoun" whatever its case, so that templates can be compared
        text.replace(f"{{{kind}!}}", "{pronoun!}"),
        NAME,
        slots,
        entities={"name": name, "other": other, "pronoun": name},
        kind=kind,
        combinations=((name, other if "{other}" in text else str(index)),),
    )
