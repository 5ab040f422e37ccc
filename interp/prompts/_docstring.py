"""Docstring completion: which parameter does the docstring describe next?"""

from __future__ import annotations

import random
import re
from typing import Any

from interp import tinyworld
from interp.prompts._build import Pair, build, check_n, document_text, fill, generator, is_world, require, world_split
from interp.prompts._prompts import Prompts
from interp.prompts._tokens import Text
from interp.tinyworld import Split
from interp.tinyworld.families.lists import LIST_WORDS
from interp.tinyworld.lexicon.needles import FUNCTIONS, PARAMETERS

LINE = "\n    :param {doc} : {one} {two}"  # the space before the colon keeps the name a token of its own


def docstring(
    bridge: Any,
    n: int = 64,
    seed: int = 0,
    *,
    parameters: int = 4,
    documented: int | None = None,
    split: Split | None = None,
) -> Prompts:
    """A function and the start of its docstring; the answer is the parameter that the next `:param` line describes.

    The corrupted prompt exchanges that parameter and the one after it in the signature, so the other one, the foil,
    comes next.
    Positions: `def_previous` and `def_answer` (in the signature: the parameter described last, and the one after it),
    `doc_previous` (the one described last, in the docstring), `end`.

    Args:
        bridge: The model; its tokenizer decides between tinyworld prompts and English ones.
        n: Number of examples.
        seed: Seed of every choice.
        parameters: Parameters in the signature, at least 3.
        documented: How many the docstring has described, from 1 to `parameters - 2`; that many by default.
        split: tinyworld only. `"heldout"` (default): parameters in orders that the models never saw, clean and
            corrupted.

    Raises:
        ValueError: If the tokenizer has too few parameter names that are single tokens.

    Source:
        The task of Heimersheim & Janiak 2023, "A circuit for Python docstrings in a 4-layer attention-only
        transformer"; names are our own and the corruption is a symmetric exchange where theirs draws random names.
    """
    check_n("docstring", n)
    if parameters < 3:
        raise ValueError(
            f"parameters={parameters}: at least 3 are needed, one described, one to answer and one to exchange it with"
        )
    documented = parameters - 2 if documented is None else documented
    if not 1 <= documented <= parameters - 2:
        raise ValueError(f"documented={documented} must lie between 1 and parameters - 2 = {parameters - 2}")
    world = is_world(bridge)
    split = world_split("docstring", split, world=world)
    rng = generator("docstring", seed)
    names = require(bridge, "docstring", "parameter names", PARAMETERS, parameters)
    functions = require(bridge, "docstring", "function names", FUNCTIONS, 1)
    words = require(bridge, "docstring", "words", LIST_WORDS, 2)

    pairs: list[Pair] = []
    while len(pairs) < n:
        order = rng.sample(names, parameters)
        answer, foil = order[documented : documented + 2]
        exchanged = [*order[:documented], foil, answer, *order[documented + 2 :]]
        if world and any(tinyworld.held_out("docstring", row) != (split == "heldout") for row in (order, exchanged)):
            continue
        kind = rng.random()  # fixes the rest of the text for both prompts
        render = _world if world else _english
        clean, corrupted = (
            render(random.Random(kind), row, documented, functions, words) for row in (order, exchanged)
        )
        # the descriptions are random words, among them names of parameters: none of this prompt's own
        said = re.findall(r"\w+", clean.text)
        if any(said.count(name) != 1 + (i < documented) for i, name in enumerate(order)):
            continue
        labels = {"parameters": tuple(order), "documented": documented}
        pairs.append(Pair(clean, corrupted, [f" {answer}"], [f" {foil}"], labels))
    return build(bridge, "docstring", seed, pairs)


def _world(rng: random.Random, parameters: list[str], documented: int, functions: list[str], words: list[str]) -> Text:
    document = tinyworld.TABLE["docstring"].draw(rng, parameters=parameters, described=documented + 1)
    order = [i for i, label in enumerate(document.labels) if label.role == "parameter"]
    parts = {
        "def_previous": order[documented - 1],
        "def_answer": order[documented],
        "doc_previous": document.answers[documented - 1],
    }
    return document_text(document, document.answers[documented], parts)


def _english(
    rng: random.Random, parameters: list[str], documented: int, functions: list[str], words: list[str]
) -> Text:
    slots = {"function": rng.choice(functions)} | {f"def{i}": name for i, name in enumerate(parameters)}
    template = (
        "def {function}(self, " + ", ".join(f"{{def{i}}}" for i in range(len(parameters))) + '):\n    """ {s1} {s2}\n'
    )
    slots |= dict(zip(("s1", "s2"), rng.sample(words, 2), strict=True))
    for i in range(documented):
        template += LINE.format(doc=f"{{doc{i}}}", one=f"{{one{i}}}", two=f"{{two{i}}}")
        one, two = rng.sample(words, 2)
        slots |= {f"doc{i}": parameters[i], f"one{i}": one, f"two{i}": two}
    text = fill(template + "\n    :param", **slots)
    named = {
        "def_previous": f"def{documented - 1}",
        "def_answer": f"def{documented}",
        "doc_previous": f"doc{documented - 1}",
    }
    return Text(text.text, {key: text.spans[slot] for key, slot in named.items()})
