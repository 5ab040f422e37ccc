"""Subject-verb agreement: "The keys near the cabinet" -> are."""

from __future__ import annotations

import random
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
    require,
    too_few,
    world_split,
)
from interp.prompts._prompts import Prompts
from interp.prompts._tokens import Text
from interp.tinyworld import Split
from interp.tinyworld.lexicon.agreement import AUXILIARIES, NOUNS, PREPOSITIONS, RELATIVE_VERBS, Noun

Structure = Literal["simple", "prepositional", "object_relative", "subject_relative"]
Number = Literal["singular", "plural"]

TEMPLATES: dict[Structure, str] = {
    "simple": "The {subject}",
    "prepositional": "The {subject} {preposition} the {attractor}",
    "object_relative": "The {subject} that the {attractor} {relative_verb}",
    "subject_relative": "The {subject} that {relative_verb} the {attractor}",
}


def agreement(
    bridge: Any,
    n: int = 64,
    seed: int = 0,
    *,
    structure: Structure = "prepositional",
    attractor_number: Number | None = None,
    split: Split | None = None,
) -> Prompts:
    """A subject, perhaps another noun, and the auxiliary that agrees with the subject; the foil is its other form.

    The auxiliaries are is/are, was/were and has/have; in tinyworld an opening word ("now", "yesterday", "already") says
    which. Examples come in fours, number of the subject crossed with number of the attractor, that are otherwise the
    same (in twos where the structure has no attractor or its number is given). The corrupted prompt has the subject in
    the other number, and so is the other answer; inside a subject relative the verb that the subject governs changes
    with it. Positions: `subject`, `attractor` (if any), `end`.

    Args:
        bridge: The model; its tokenizer decides between tinyworld prompts and English ones.
        n: Number of examples.
        seed: Seed of every choice.
        structure: `"simple"` (the dogs), `"prepositional"` (the dogs near the cat), `"object_relative"` (the dogs that
            the cat sees) or `"subject_relative"` (the dogs that see the cat).
        attractor_number: Only attractors of this number.
        split: tinyworld only. `"heldout"` (default): (structure, noun, attractor) that the models never saw.

    Raises:
        ValueError: If the tokenizer has too few nouns with both numbers as single tokens.

    Source:
        Structures as in Linzen et al. 2016 (arXiv:1611.01368) and Lakretz et al. 2019 (arXiv:1903.07435); sentences are
        our own.
    """
    check_n("agreement", n)
    choose("structure", structure, get_args(Structure))
    attractors = choose("attractor_number", attractor_number, get_args(Number))
    if structure == "simple":
        if attractor_number is not None:
            raise ValueError(
                f"attractor_number={attractor_number!r}: structure='simple' has no attractor; choose another structure"
            )
        attractors = ["singular"]
    world = is_world(bridge)
    split = world_split("agreement", split, world=world)
    rng = generator("agreement", seed)
    nouns = [noun for noun in NOUNS if len(require(bridge, "agreement", "forms", noun[:2], 0)) == 2]
    if len(nouns) < 2:
        raise too_few(bridge, "agreement", "nouns with both numbers", len(nouns), len(NOUNS), 2)
    others = {
        "preposition": require(bridge, "agreement", "prepositions", PREPOSITIONS, 1),
        "relative": [pair for pair in RELATIVE_VERBS if len(require(bridge, "agreement", "verbs", pair, 0)) == 2],
        "opening": [
            o
            for o, (one, many, _) in AUXILIARIES.items()
            if len(require(bridge, "agreement", "verbs", (one, many), 0)) == 2
        ],
    }
    if structure.endswith("relative") and not others["relative"]:
        raise too_few(bridge, "agreement", "verbs with both numbers", 0, len(RELATIVE_VERBS), 1)

    pairs: list[Pair] = []
    while len(pairs) < n:
        noun, attractor = rng.sample(nouns, 2)
        opening = rng.choice(others["opening"])
        combination = (structure, noun.singular, opening if structure == "simple" else attractor.singular)
        if world and tinyworld.held_out("agreement", combination) != (split == "heldout"):
            continue
        forms = AUXILIARIES[opening][:2]
        kind = rng.random()  # fixes preposition and relative verb for all the examples of a group
        for attractor_is in attractors:
            for number in get_args(Number):
                plural = number == "plural"
                flipped = "singular" if plural else "plural"
                clean, corrupted = (
                    _text(world, structure, opening, noun, each, attractor, attractor_is, kind, others)
                    for each in (number, flipped)
                )
                labels = {"structure": structure, "number": number, "noun": noun.singular, "opening": opening}
                if structure != "simple":
                    labels |= {"attractor_number": attractor_is, "attractor": attractor.singular}
                pairs.append(Pair(clean, corrupted, [f" {forms[plural]}"], [f" {forms[not plural]}"], labels))
    return build(bridge, "agreement", seed, pairs[:n])


def _text(
    world: bool,
    structure: Structure,
    opening: str,
    noun: Noun,
    number: str,
    attractor: Noun,
    attractor_number: str,
    kind: float,
    others: dict[str, Any],
) -> Text:
    rng = random.Random(f"agreement {kind}")
    names = ("subject",) if structure == "simple" else ("subject", "attractor")
    if world:
        document = tinyworld.TABLE["agreement"].draw(
            rng,
            structure=structure,
            number=number,
            attractor_number=attractor_number,
            noun=noun,
            attractor=attractor,
            opening=opening,
        )
        return document_text(document, document.answers[0], {role: document.index(role) for role in names})
    governor = attractor_number if structure == "object_relative" else number
    slots = {
        "subject": getattr(noun, number),
        "attractor": getattr(attractor, attractor_number),
        "preposition": rng.choice(others["preposition"]),
    }
    if structure.endswith("relative"):
        slots["relative_verb"] = rng.choice(others["relative"])[governor == "plural"]
    text = fill(TEMPLATES[structure], **slots)
    return Text(text.text, {role: text.spans[role] for role in names})
