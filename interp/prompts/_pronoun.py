"""Gendered pronouns: "Mary was tired, so we brought a blanket to" -> her."""

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
    world_split,
)
from interp.prompts._prompts import Prompts
from interp.prompts._tokens import Text
from interp.tinyworld import Split
from interp.tinyworld.families.pronouns import CASES
from interp.tinyworld.families.pronouns import TEMPLATES as WORLD_TEMPLATES
from interp.tinyworld.lexicon.names import FEMALE, MALE, PLACES, PRONOUNS, THINGS

TEMPLATES = (  # (case of the answer, prompt); a template opens with a word, never with the name
    ("subject", "Because {name} was tired after the day at the {place},"),
    ("subject", "When {name} came home from the {place} last night,"),
    ("possessive", "Yesterday {name} went to the {place} and forgot to take"),
    ("object", "As {name} was late, we waited at the {place} for"),
    ("possessive", "Near the {place}, {name}, who had met {other} before, had lost"),
    ("object", "While {name} was at the {place}, {other} kept waiting for"),
    ("object", "Because {name} needed help, {other} went to the {place} with"),
)


def pronoun(
    bridge: Any,
    n: int = 64,
    seed: int = 0,
    *,
    distractor: bool = False,
    template: int | None = None,
    split: Split | None = None,
) -> Prompts:
    """A person and a pronoun that must have that person's gender; the foil is the same case of the other gender.

    Examples come in twos, one female and one male, that are otherwise the same. The corrupted prompt names the other
    person of the two, so its answer is the foil. With a distractor, somebody of the other gender stands in between, and
    the corrupted prompt exchanges the two. Positions: `name`, `other` (with a distractor), `end`.

    Args:
        bridge: The model; its tokenizer decides between tinyworld prompts and English ones.
        n: Number of examples.
        seed: Seed of every choice.
        distractor: Whether a person of the other gender is named between the name and the pronoun.
        template: Index of one template of that kind; all that have the commonest length by default.
        split: tinyworld only. `"heldout"` (default): (name, wording), or (name, other), that the models never saw.

    Raises:
        ValueError: If the tokenizer has too few names of either gender that are single tokens.

    Source:
        Our own sentences on the gendered-pronoun task of Mathwin et al. 2023; see also CausalGym (arXiv:2402.12560).
    """
    check_n("pronoun", n)
    world = is_world(bridge)
    split = world_split("pronoun", split, world=world)
    rng = generator("pronoun", seed)
    women, men = (
        require(bridge, "pronoun", what, words, 1) for what, words in (("female names", FEMALE), ("male names", MALE))
    )
    require(bridge, "pronoun", "pronouns", sorted({word for forms in PRONOUNS.values() for word in forms}), 5)
    places, things = (
        require(bridge, "pronoun", what, words, 1) for what, words in (("places", PLACES), ("things", THINGS))
    )
    kinds = [
        template.count("{other}") > 0 for template in (WORLD_TEMPLATES if world else [text for _, text in TEMPLATES])
    ]
    templates = choose("template", template, [i for i, kind in enumerate(kinds) if kind == distractor])
    templates = of_one_length(bridge, templates, lambda t: _text(world, t, women[0], men[0], places[0], things[0])[1])

    pairs: list[Pair] = []
    for _ in range(1000 * n):
        if len(pairs) >= n:
            return build(bridge, "pronoun", seed, pairs[:n])
        index, people = rng.choice(templates), (rng.choice(women), rng.choice(men))
        place, thing = rng.choice(places), rng.choice(things)
        both = (people, people[::-1])
        if world:
            combinations = [(name, other) if distractor else (name, str(index)) for name, other in both]
            if any(tinyworld.held_out("pronoun", c) != (split == "heldout") for c in combinations):
                continue
        for name, other in both:
            case, clean = _text(world, index, name, other, place, thing)
            _, corrupted = _text(world, index, other, name, place, thing)
            gender = "female" if name == people[0] else "male"
            forms = (PRONOUNS["female"], PRONOUNS["male"])[:: 1 if gender == "female" else -1]
            answer, foil = (f" {form[CASES.index(case)]}" for form in forms)
            labels = {"template": index, "case": case, "gender": gender, "name": name, "other": other}
            pairs.append(Pair(clean, corrupted, [answer], [foil], labels))
    raise ValueError(
        f"no two names of the {split!r} split fit templates {templates} both ways; choose another template or split"
    )


def _text(world: bool, template: int, name: str, other: str, place: str, thing: str) -> tuple[str, Text]:
    """Case of the answer and the prompt."""
    if world:
        document = tinyworld.TABLE["pronoun"].draw(
            random.Random(0), template=template, name=name, other=other, place=place, thing=thing
        )
        parts = {
            role: document.index(role)
            for role in ("name", "other")
            if any(label.role == role for label in document.labels)
        }
        return document.kind, document_text(document, document.answers[0], parts)
    case, text = TEMPLATES[template]
    filled = fill(text, name=name, other=other, place=place)
    return case, Text(filled.text, {role: filled.spans[role] for role in ("name", "other") if role in filled.spans})
