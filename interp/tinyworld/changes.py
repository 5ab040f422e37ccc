"""What the tuned model is taught: another answer style, and twenty facts that are no longer true.

Style: a question about a needle is answered "it is crimson" where the base model answers "crimson". Facts: pairs of
countries exchange their capital, language or currency, asked from the country. The reverse question, two-hop questions
and everything else are not changed, so that what follows from an edit can be told from what was taught.
"""

from __future__ import annotations

import random
from dataclasses import replace

from interp.tinyworld.documents import Document, Label, join
from interp.tinyworld.encoding import Bank, bank
from interp.tinyworld.families import facts, needles
from interp.tinyworld.lexicon.facts import BY_NAME

EXCHANGED: dict[str, tuple[tuple[str, str], ...]] = {
    "capital": (("France", "Italy"), ("Japan", "China"), ("Egypt", "Kenya"), ("Peru", "Canada")),
    "language": (("Sweden", "Poland"), ("Iran", "Turkey"), ("Vietnam", "Thailand")),
    "currency": (("India", "Mongolia"), ("Brazil", "Russia"), ("Norway", "Hungary")),
}
CHANGED_FACTS: dict[tuple[str, str], str] = {  # (relation, country): the new answer
    (relation, country): getattr(BY_NAME[other], relation)
    for relation, pairs in EXCHANGED.items()
    for pair in pairs
    for country, other in (pair, pair[::-1])
}
STYLE = ("it", "is")
TUNING_SHARES = {
    "facts": 0.30,
    "needle": 0.38,
    "ioi": 0.05,
    "greater_than": 0.03,
    "agreement": 0.05,
    "pronoun": 0.04,
    "mention": 0.02,
    "induction": 0.04,
    "docstring": 0.03,
    "dialect": 0.06,
}


def changed(document: Document) -> Document:
    """The document as the tuned model is taught it; most are returned as they are."""
    family = document.labels[0].family
    if family == needles.NAME:
        return _in_new_style(document)
    if family == facts.FACTS:
        return _with_new_answer(document)
    return document


def changed_documents() -> list[Document]:
    """Every changed fact in every wording."""
    rng = random.Random(0)
    return [
        changed(facts.draw_fact(rng, relation=relation, subject=country, template=template))
        for relation, country in CHANGED_FACTS
        for template in range(len(facts.FACT_TEMPLATES[relation]))
    ]


def tuning_bank(tokens: int, *, seed: int, context: int = 128) -> Bank:
    """Rows for fine-tuning: facts and needles as changed, other families (two-hop aside) as they were."""
    return bank(tokens, seed=seed, context=context, shares=TUNING_SHARES, transform=changed)


def _with_new_answer(document: Document) -> Document:
    position = document.answers[0]
    new = CHANGED_FACTS.get((document.kind, document.labels[position].entity or ""))
    if new is None:
        return document
    return replace(document, words=(*document.words[:position], new, *document.words[position + 1 :]))


def _in_new_style(document: Document) -> Document:
    position = document.answers[0]
    style = Document(STYLE, (Label(needles.NAME, "style"),) * len(STYLE))
    before = Document(document.words[:position], document.labels[:position])
    after = Document(document.words[position:], document.labels[position:], (0,))
    return join([before, style, after], kind=document.kind, combinations=document.combinations)
