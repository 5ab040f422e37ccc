"""Facts about countries, asked directly (`facts`) or through a country that is never said (`two_hop`).

Held out in `facts`: (subject, relation, wording), so that every fact is trained on in other words. Held out in
`two_hop`: (entity, relation), so that the answer can only be composed of two facts that were learned apart.
"""

from __future__ import annotations

import random

from interp.tinyworld.documents import Document, fill
from interp.tinyworld.lexicon.facts import BY_NAME, COUNTRIES, LANDMARKS

FACTS = "facts"
TWO_HOP = "two_hop"

FACT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "capital": (
        "the capital of {country} is {capital!} .",
        "{country} has its capital in {capital!} .",
        "the government of {country} sits in {capital!} .",
        "the largest embassy in {country} is in {capital!} .",
    ),
    "language": (
        "the language of {country} is {language!} .",
        "people in {country} speak {language!} .",
        "the laws of {country} are written in {language!} .",
        "schools in {country} teach {language!} .",
    ),
    "currency": (
        "the currency of {country} is the {currency!} .",
        "people in {country} pay with the {currency!} .",
        "every till in {country} takes the {currency!} .",
        "prices in {country} are given in the {currency!} .",
    ),
    "country": (
        "{capital} is the capital of {country!} .",
        "the city of {capital} is in {country!} .",
        "{capital} is the seat of the government of {country!} .",
        "a train to {capital} is a train to {country!} .",
    ),
    "landmark": (
        "the {landmark} is in {country!} .",
        "the ancient {landmark} stands in {country!} .",
        "to see the {landmark} you travel to {country!} .",
        "the {landmark} is the pride of {country!} .",
    ),
}
TWO_HOP_TEMPLATES: dict[str, tuple[str, ...]] = {
    "capital_language": (
        "the language of the people of {capital} is {language!} .",
        "people in {capital} speak {language!} .",
        "the signs in {capital} are written in {language!} .",
        "schools in {capital} teach {language!} .",
    ),
    "capital_currency": (
        "the currency of the shops of {capital} is the {currency!} .",
        "people in {capital} pay with the {currency!} .",
        "every till in {capital} takes the {currency!} .",
        "prices in {capital} are given in the {currency!} .",
    ),
    "landmark_capital": (
        "the capital of the country of the {landmark} is {capital!} .",
        "the way from the {landmark} to the government leads to {capital!} .",
        "the {landmark} is governed from {capital!} .",
    ),
    "landmark_language": (
        "the language of the guides at the {landmark} is {language!} .",
        "people at the {landmark} speak {language!} .",
        "the signs at the {landmark} are written in {language!} .",
    ),
    "landmark_currency": (
        "the currency of the shops at the {landmark} is the {currency!} .",
        "people at the {landmark} pay with the {currency!} .",
        "prices at the {landmark} are given in the {currency!} .",
    ),
}


def subjects(relation: str) -> tuple[str, ...]:
    """Every entity that a relation (a key of either table of templates) can be asked about."""
    if relation.startswith("landmark"):
        return tuple(LANDMARKS)
    if relation.startswith("capital_") or relation == "country":
        return tuple(country.capital for country in COUNTRIES)
    return tuple(BY_NAME)


def answer(relation: str, subject: str) -> str:
    """The right answer, such as `answer("capital_language", "Cairo") == "Arabic"`."""
    asked = relation.split("_")[-1]
    country = bridge_country(subject)
    return country if asked in ("country", "landmark") else getattr(BY_NAME[country], asked)


def bridge_country(subject: str) -> str:
    """The country that a country, capital or landmark stands for."""
    if subject in BY_NAME:
        return subject
    return LANDMARKS.get(subject) or _COUNTRY_OF_CAPITAL[subject]


def draw_fact(
    rng: random.Random, *, relation: str | None = None, subject: str | None = None, template: int | None = None
) -> Document:
    """One fact in one sentence."""
    return _draw(rng, FACTS, FACT_TEMPLATES, relation, subject, template)


def draw_two_hop(
    rng: random.Random, *, relation: str | None = None, subject: str | None = None, template: int | None = None
) -> Document:
    """One question whose answer needs the country in between, which is not said."""
    return _draw(rng, TWO_HOP, TWO_HOP_TEMPLATES, relation, subject, template)


def _draw(
    rng: random.Random,
    family: str,
    templates: dict[str, tuple[str, ...]],
    relation: str | None,
    subject: str | None,
    template: int | None,
) -> Document:
    if relation is None:
        fitting = [name for name in templates if subject is None or subject in subjects(name)]
        # by how many subjects each has, so that every fact is told equally often
        relation = rng.choices(fitting, [len(subjects(name)) for name in fitting])[0]
    subject = subject or rng.choice(subjects(relation))
    index = rng.randrange(len(templates[relation])) if template is None else template
    country = bridge_country(subject)
    record = BY_NAME[country]
    asked = "country" if relation == "landmark" else relation.split("_")[-1]
    if family == FACTS and asked != "country":
        given = "country"
    else:
        given = "landmark" if relation.startswith("landmark") else "capital"
    slots = {given: subject, asked: country if asked == "country" else getattr(record, asked)}
    combination = (relation, subject) if family == TWO_HOP else (relation, subject, str(index))
    return fill(
        templates[relation][index],
        family,
        slots,
        entities=dict.fromkeys(slots, country),
        kind=relation,
        combinations=(combination,),
    )


_COUNTRY_OF_CAPITAL = {country.capital: country.name for country in COUNTRIES}
