"""Facts about countries, asked directly and through a country that is never said."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Literal, get_args

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
    single_tokens,
    too_few,
    world_split,
)
from interp.prompts._prompts import Prompts
from interp.prompts._tokens import Text
from interp.tinyworld import Split
from interp.tinyworld.families import facts as world_facts

Relation = Literal["capital", "language", "currency", "country", "landmark"]
TwoHopRelation = Literal[
    "capital_language", "capital_currency", "landmark_capital", "landmark_language", "landmark_currency"
]

TEMPLATES: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital city of {subject} is",
        "The government of {subject} sits in",
        "The parliament of {subject} meets in",
    ),
    "language": (
        "The official language of {subject} is",
        "Most people in {subject} speak",
        "Newspapers in {subject} are written in",
    ),
    "currency": (
        "The official currency of {subject} is the",
        "People in {subject} pay with the",
        "Prices in {subject} are given in the",
    ),
    "country": (
        "The city of {subject} is the capital of",
        "The city of {subject} lies in",
        "A visitor to {subject} is a visitor to",
    ),
    "landmark": ("The famous {subject} stands in the country of", "To see the {subject} one travels to"),
}
TWO_HOP_TEMPLATES: dict[str, tuple[str, ...]] = {
    "capital_language": (
        "The language that most people in {subject} speak is",
        "Children who grow up in {subject} usually speak",
    ),
    "capital_currency": (
        "In the shops of {subject} people pay with the",
        "Prices in the shops of {subject} are given in the",
    ),
    "landmark_capital": (
        "The capital of the country where the {subject} stands is",
        "The country of the {subject} is governed from",
    ),
    "landmark_language": (
        "Most people who live near the {subject} speak",
        "The language of the country where the {subject} stands is",
    ),
    "landmark_currency": (
        "In the shops near the {subject} people pay with the",
        "The currency where the {subject} stands is the",
    ),
}


def facts(
    bridge: Any,
    n: int = 64,
    seed: int = 0,
    *,
    relation: Relation = "capital",
    template: int | None = None,
    split: Split | None = None,
) -> Prompts:
    """One fact about one country; the corrupted prompt names another subject, whose answer is the foil.

    Every pair of subjects is asked both ways, so that answers and foils are the same words equally often. When `n` is
    more than there are questions, they repeat. Positions: `subject` (its last token), `end`.

    Args:
        bridge: The model; its tokenizer decides between tinyworld prompts and English ones.
        n: Number of examples.
        seed: Seed of every choice.
        relation: `"capital"`, `"language"`, `"currency"` of a country, or the country of a capital (`"country"`) or
            `"landmark"`.
        template: Index of one template; all that have the commonest length by default.
        split: tinyworld only. `"heldout"` (default): wordings in which the models never saw this subject; the fact they
            did see.

    Raises:
        ValueError: If the tokenizer has too few subjects and answers that are single tokens.
    """
    choose("relation", relation, get_args(Relation))
    return _facts(bridge, n, seed, "facts", relation, template, split)


def two_hop(
    bridge: Any,
    n: int = 64,
    seed: int = 0,
    *,
    relation: TwoHopRelation = "capital_language",
    template: int | None = None,
    split: Split | None = None,
) -> Prompts:
    """A fact that needs a country in between which the prompt never says: the language spoken in Cairo, through Egypt.

    The corrupted prompt names another subject, whose answer is the foil; both directions are asked. The label `bridge`
    is the country in between. Positions: `subject` (its last token), `end`.

    Args:
        bridge: The model; its tokenizer decides between tinyworld prompts and English ones.
        n: Number of examples.
        seed: Seed of every choice.
        relation: What is given and what is asked, such as `"capital_language"` or `"landmark_capital"`.
        template: Index of one template; all that have the commonest length by default.
        split: tinyworld only. `"heldout"` (default): compositions that the models never saw, of facts that they saw
            apart.

    Raises:
        ValueError: If the tokenizer has too few subjects and answers that are single tokens.

    Source:
        The question of Biran et al. 2024 (arXiv:2406.12775); countries and wordings are our own.
    """
    choose("relation", relation, get_args(TwoHopRelation))
    return _facts(bridge, n, seed, "two_hop", relation, template, split)


def _facts(
    bridge: Any, n: int, seed: int, task: str, relation: str, template: int | None, split: Split | None
) -> Prompts:
    check_n(task, n)
    world = is_world(bridge)
    split = world_split(task, split, world=world)
    rng = generator(task, seed)
    given = world_facts.subjects(relation)
    answers = {subject: world_facts.answer(relation, subject) for subject in given}
    known = set(single_tokens(bridge, (*given, *answers.values())))
    subjects = [subject for subject in given if subject in known and answers[subject] in known]
    if len({answers[subject] for subject in subjects}) < 2:
        raise too_few(bridge, task, f"{relation} questions with subjects and answers", len(subjects), len(given), 2)
    tables: Mapping[str, tuple[str, ...]]
    if world:
        tables = world_facts.FACT_TEMPLATES if task == "facts" else world_facts.TWO_HOP_TEMPLATES
    else:
        tables = TEMPLATES if task == "facts" else TWO_HOP_TEMPLATES
    templates = choose("template", template, range(len(tables[relation])))
    templates = of_one_length(bridge, templates, lambda t: _text(world, task, relation, t, subjects[0]))

    asked = []  # every pair of subjects with different answers that the split holds, in every wording
    for index in templates:
        allowed = subjects
        if world:
            combination = {s: (relation, s) if task == "two_hop" else (relation, s, str(index)) for s in subjects}
            allowed = [s for s in subjects if tinyworld.held_out(task, combination[s]) == (split == "heldout")]
        asked += [(index, a, b) for i, a in enumerate(allowed) for b in allowed[i + 1 :] if answers[a] != answers[b]]
    if not asked:
        raise ValueError(
            f"no two {relation} questions of the {split!r} split have different answers in templates {templates}; "
            "choose another template, relation or split"
        )
    rng.shuffle(asked)
    pairs: list[Pair] = []
    while len(pairs) < n:
        index, *both = asked[len(pairs) // 2 % len(asked)]
        for a, b in (both, both[::-1]):
            labels = {"template": index, "relation": relation, "subject": a, "corrupted_subject": b}
            if task == "two_hop":
                labels["bridge"] = world_facts.bridge_country(a)
            clean, corrupted = (_text(world, task, relation, index, subject) for subject in (a, b))
            pairs.append(Pair(clean, corrupted, [f" {answers[a]}"], [f" {answers[b]}"], labels))
    return build(bridge, task, seed, pairs[:n])


def _text(world: bool, task: str, relation: str, template: int, subject: str) -> Text:
    if not world:
        return fill((TEMPLATES if task == "facts" else TWO_HOP_TEMPLATES)[relation][template], subject=subject)
    document = tinyworld.TABLE[task].draw(random.Random(0), relation=relation, subject=subject, template=template)
    return document_text(document, document.answers[0], {"subject": document.words.index(subject)})
