"""Lists said twice (induction) and code whose parameters are documented in their order (docstring).

Held out: the contents of lists, as a whole; in `docstring` the names of the parameters in their order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from interp.tinyworld.documents import Document, fill
from interp.tinyworld.lexicon.dialects import NOUNS as DIALECT_NOUNS
from interp.tinyworld.lexicon.names import PLACES, THINGS
from interp.tinyworld.lexicon.needles import FUNCTIONS, KEYS, PARAMETERS, VALUES
from interp.tinyworld.lexicon.topics import TOPICS

INDUCTION = "induction"
DOCSTRING = "docstring"

LIST_WORDS = tuple(
    dict.fromkeys(
        [*PLACES, *THINGS, *KEYS, *VALUES, *PARAMETERS, *DIALECT_NOUNS]
        + [noun for topic in TOPICS.values() for noun in topic.nouns]
    )
)
FRAME_WORDS = ["list : ; again : .", 'def ( ) : """ :param .']  # the words that the templates below are made of
ListKind = Literal["framed", "bare"]


def draw_induction(
    rng: random.Random,
    *,
    kind: ListKind | None = None,
    length: int | None = None,
    words: Sequence[str] | None = None,
) -> Document:
    """A list of distinct words said twice: with a frame ("list : a b ; again : a b ."), or bare ("a b a b").

    In a bare list the first word of the repetition is no answer: nothing says that the list has ended.
    """
    kind = kind or rng.choice(("framed", "bare"))
    if words is None:
        words = rng.sample(LIST_WORDS, length or rng.randint(3, 16))
    combinations = (tuple(words),)
    if kind == "framed":
        slots = {"first": words, "second": words}
        return fill("list : {first} ; again : {second!} .", INDUCTION, slots, kind=kind, combinations=combinations)
    slots = {"first": words, "restart": words[0], "second": words[1:]}
    return fill("{first} {restart} {second!}", INDUCTION, slots, kind=kind, combinations=combinations)


def draw_docstring(
    rng: random.Random, *, parameters: Sequence[str] | None = None, described: int | None = None
) -> Document:
    """A function's signature and the start of its docstring, which names the parameters in their order.

    Args:
        parameters: Names in the signature; one to six are drawn by default.
        described: How many of them the docstring gets to, any number by default.
    """
    parameters = tuple(parameters or rng.sample(PARAMETERS, rng.randint(1, 6)))
    described = described or rng.randint(1, len(parameters))
    signature = " ".join(f"{{parameter.{i}}}" for i in range(len(parameters)))
    lines = " ".join(f":param {{documented.{i}!}}" for i in range(described))
    slots: dict[str, str | Sequence[str]] = {"function": rng.choice(FUNCTIONS), "summary": rng.sample(LIST_WORDS, 2)}
    entities: dict[str, str] = {}
    for i, parameter in enumerate(parameters):
        slots[f"parameter.{i}"] = slots[f"documented.{i}"] = parameter
        entities[f"parameter.{i}"] = entities[f"documented.{i}"] = parameter
    return fill(
        f'def {{function}} ( {signature} ) : """ {{summary}} {lines} .',
        DOCSTRING,
        slots,
        entities=entities,
        kind=f"{len(parameters)} parameter(s)",
        combinations=(parameters,),
    )
