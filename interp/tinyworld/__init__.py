"""A synthetic world: documents whose every word is labelled, and the tokenizer of the models trained on them.

    >>> import random
    >>> from interp import tinyworld
    >>> document = tinyworld.sample("ioi", random.Random(0), order="ABBA")
    >>> document.labels[document.answers[0]].role
    'io2'

Importing this needs neither torch nor transformers; `tokenizer()` imports transformers when called.
"""

from __future__ import annotations

from interp.tinyworld.documents import Document, Label, Split, fill, held_out, join, scatter_marks
from interp.tinyworld.encoding import SHARES, Bank, Batch, bank, decode, encode, is_tinyworld, tokenizer
from interp.tinyworld.families import FAMILIES, SINGLE_ANSWER, TABLE, Family, sample
from interp.tinyworld.vocabulary import IDS, SPECIAL, VOCABULARY

__all__ = [
    "FAMILIES",
    "IDS",
    "SHARES",
    "SINGLE_ANSWER",
    "SPECIAL",
    "TABLE",
    "VOCABULARY",
    "Bank",
    "Batch",
    "Document",
    "Family",
    "Label",
    "Split",
    "bank",
    "decode",
    "encode",
    "fill",
    "held_out",
    "is_tinyworld",
    "join",
    "sample",
    "scatter_marks",
    "tokenizer",
]
