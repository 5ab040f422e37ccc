"""The families of documents. To add one: a module with templates and a `draw`, and one line in `TABLE`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

from interp.tinyworld.documents import Document, Split, belongs, scatter_marks
from interp.tinyworld.families import agreement, facts, ioi, lists, mentions, needles, pronouns, prose, years


class Family(NamedTuple):
    """How a family is drawn, what it may be scored by, and what of it is held out of training."""

    draw: Callable[..., Document]
    single_answer: bool
    held_out: str


TABLE: dict[str, Family] = {
    ioi.NAME: Family(ioi.draw, True, "unordered pairs of names"),
    facts.FACTS: Family(facts.draw_fact, True, "(relation, subject, wording): every fact is trained on in other words"),
    facts.TWO_HOP: Family(facts.draw_two_hop, True, "(relation, entity): the composition, never the two facts in it"),
    years.NAME: Family(years.draw, False, "(event, century, first year)"),
    agreement.NAME: Family(agreement.draw, True, "(structure, noun, attractor), or (noun, opening) without one"),
    pronouns.NAME: Family(pronouns.draw, True, "(name, other name), or (name, wording) where there is none"),
    mentions.NAME: Family(mentions.draw, True, "(name, wording)"),
    lists.INDUCTION: Family(lists.draw_induction, True, "the contents of the list in their order"),
    needles.NAME: Family(needles.draw, True, "(key, value) pairs"),
    lists.DOCSTRING: Family(lists.draw_docstring, True, "the parameters in their order"),
    prose.DIALECT: Family(prose.draw_dialect, True, "(subject, verb, object) of a sentence"),
    prose.TOPIC: Family(prose.draw_topic, False, "nothing"),
    prose.PUNCTUATION: Family(prose.draw_punctuation, False, "nothing"),
}
FAMILIES: tuple[str, ...] = tuple(TABLE)
SINGLE_ANSWER: tuple[str, ...] = tuple(name for name, family in TABLE.items() if family.single_answer)


def sample(family: str, rng: random.Random, *, split: Split = "train", marks: float = 0.0, **options: Any) -> Document:
    """One document of a family.

    Args:
        rng: Source of every choice: the same state gives the same document in any process.
        split: `"train"` never holds a combination that is held out; `"heldout"` always asks for one that is.
        marks: Probability of a mark that carries no information before each word.
        options: What the family's `draw` takes, such as `order="ABBA"` or `distance=40`.

    Raises:
        KeyError: For an unknown family.
        ValueError: If the options leave no document in the split, such as a held-out pair asked for in training, or
            `split="heldout"` of a family that holds nothing out.
    """
    if family not in TABLE:
        raise KeyError(f"no family {family!r} in tinyworld; there are {', '.join(FAMILIES)}")
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; it must be 'train' or 'heldout'")
    for _ in range(1000):
        document = TABLE[family].draw(rng, **options)
        if belongs(document, family, split):
            return scatter_marks(document, rng, marks) if marks else document
    raise ValueError(
        f"no document of {family!r} with options {options} is in split {split!r}; held out is "
        f"{TABLE[family].held_out}. Ask for the other split, or give fewer options."
    )
