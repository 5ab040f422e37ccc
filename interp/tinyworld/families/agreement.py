"""Subject and verb agree in number: alone, across a prepositional phrase, across a relative clause.

Held out: (noun, attractor) pairs, and (noun, opening or verb) in simple sentences.
"""

from __future__ import annotations

import random
from typing import Literal

from interp.tinyworld.documents import Document, fill
from interp.tinyworld.lexicon.agreement import ADVERBS, AUXILIARIES, NOUNS, PREPOSITIONS, RELATIVE_VERBS, Noun

NAME = "agreement"

STRUCTURES = {
    "simple": "here the {subject}",  # "here" says that no phrase follows the noun, so that the verb must
    "prepositional": "the {subject} {preposition} the {attractor}",
    "object_relative": "the {subject} that the {attractor} {relative_verb}",
    "subject_relative": "the {subject} that {relative_verb} the {attractor}",
}
Number = Literal["singular", "plural"]


def draw(
    rng: random.Random,
    *,
    structure: str | None = None,
    number: Number | None = None,
    attractor_number: Number | None = None,
    noun: Noun | None = None,
    attractor: Noun | None = None,
    opening: str | None = None,
) -> Document:
    """One sentence. With an `opening` the verb is an auxiliary ("now ... is"); with `""` it is the noun's own."""
    structure = structure or rng.choice(tuple(STRUCTURES))
    number = number or rng.choice(("singular", "plural"))
    attractor_number = attractor_number or rng.choice(("singular", "plural"))
    noun = noun or rng.choice(NOUNS)
    attractor = attractor or rng.choice([other for other in NOUNS if other is not noun])
    opening = rng.choice(("", *AUXILIARIES)) if opening is None else opening
    plural = number == "plural"
    slots = {
        "subject": noun.plural if plural else noun.singular,
        "attractor": getattr(attractor, attractor_number),
        "preposition": rng.choice(PREPOSITIONS),
        "opening": opening,
    }
    # inside an object relative the attractor governs the verb, inside a subject relative the subject does
    governor = attractor_number if structure == "object_relative" else number
    slots["relative_verb"] = rng.choice(RELATIVE_VERBS)[governor == "plural"]
    if opening:
        singular_form, plural_form, followers = AUXILIARIES[opening]
        slots["verb"] = plural_form if plural else singular_form
        slots["follower"] = rng.choice(followers)
        template = "{opening} " + STRUCTURES[structure] + " {verb!} {follower} ."
    else:
        slots["verb"] = noun.verb_plural if plural else noun.verb_singular
        slots["follower"] = rng.choice(ADVERBS)
        template = STRUCTURES[structure] + " {verb!} {follower} ."
    other = opening or "own verb" if structure == "simple" else attractor.singular
    entities = {"subject": noun.singular, "verb": noun.singular, "attractor": attractor.singular}
    return fill(
        template, NAME, slots, entities=entities, kind=structure, combinations=((structure, noun.singular, other),)
    )
