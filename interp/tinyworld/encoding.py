"""From documents to token ids and back, the tokenizer, and the bank of rows that models are trained on."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from interp.tinyworld.documents import Document, Label, Split
from interp.tinyworld.families import FAMILIES, TABLE, sample
from interp.tinyworld.vocabulary import IDS, VOCABULARY

PAD, BOS, UNK = "<pad>", "<bos>", "<unk>"

SHARES: dict[str, float] = {  # of the words of a training bank, before the last document of a row is cut
    "ioi": 0.14,
    "facts": 0.06,
    "two_hop": 0.09,
    "greater_than": 0.05,
    "agreement": 0.05,
    "pronoun": 0.08,
    "mention": 0.04,
    "induction": 0.11,
    "needle": 0.17,
    "docstring": 0.08,
    "dialect": 0.09,
    "topic": 0.02,
    "punctuation": 0.02,
}
MARKED_SHARE, MARK_RATE = 0.05, 0.05  # documents of any family that are strewn with empty marks, and how thickly


class Batch(NamedTuple):
    """Documents as rows of token ids, right-padded, with the label of every token.

    Attributes:
        ids: int64 [document, position]; the first column is the start token.
        lengths: int64 [document]; tokens of each row, the start token included.
        labels: One tuple per row, aligned with `ids`; None at the start token and at padding.
        answers: bool [document, position]; where a token is the single right continuation.
    """

    ids: np.ndarray
    lengths: np.ndarray
    labels: tuple[tuple[Label | None, ...], ...]
    answers: np.ndarray


class Bank(NamedTuple):
    """Rows of one length, packed with whole documents, each row beginning with one start token.

    Attributes:
        ids: uint16 [row, position].
        answers: bool [row, position]; where a token is the single right continuation.
        labels: One tuple per row when asked for, else empty.
    """

    ids: np.ndarray
    answers: np.ndarray
    labels: tuple[tuple[Label | None, ...], ...] = ()


def tokenizer() -> Any:
    """A fresh word-level `PreTrainedTokenizerFast`; its post-processor puts the start token before a text, once."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(dict(IDS), unk_token=UNK))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, IDS[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=BOS,
        pad_token=PAD,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


def is_tinyworld(tokenizer: Any) -> bool:
    """Whether a tokenizer speaks this language: every word of it under the id it has here."""
    vocabulary = getattr(tokenizer, "get_vocab", dict)()
    return len(vocabulary) == len(IDS) and vocabulary == IDS


def encode(documents: Document | Sequence[Document]) -> Batch:
    """Token ids of documents, one row each, with labels aligned to tokens. KeyError names a word that is not known."""
    documents = [documents] if isinstance(documents, Document) else list(documents)
    if not documents:
        raise ValueError("encode() got no documents")
    width = 1 + max(map(len, documents))
    ids = np.full((len(documents), width), IDS[PAD], dtype=np.int64)
    answers = np.zeros((len(documents), width), dtype=bool)
    labels: list[tuple[Label | None, ...]] = []
    for row, document in enumerate(documents):
        ids[row, : len(document) + 1] = [IDS[BOS], *map(_word_id, document.words)]
        answers[row, [answer + 1 for answer in document.answers]] = True
        labels.append((None, *document.labels, *[None] * (width - 1 - len(document))))
    return Batch(ids, np.array([len(document) + 1 for document in documents]), tuple(labels), answers)


def decode(ids: Sequence[int]) -> str:
    """Words joined by spaces; special tokens are left out."""
    return " ".join(VOCABULARY[index] for index in ids if VOCABULARY[index] not in (PAD, BOS))


def bank(
    tokens: int,
    *,
    seed: int,
    context: int = 128,
    split: Split = "train",
    shares: Mapping[str, float] | None = None,
    transform: Callable[[Document], Document] | None = None,
    labels: bool = False,
) -> Bank:
    """At least `tokens` tokens of training text in rows of `context`.

    Every row begins with a start token and a whole document; documents follow one another without a separator and the
    last one of a row is cut. Deterministic from the seed.

    Args:
        shares: Share of words per family; `SHARES` by default. With `split="heldout"` only families that hold something
            out may be named.
        transform: Applied to every document before it is packed.
        labels: Keep the label of every token (slower, and much more memory).
    """
    shares = dict(SHARES if shares is None else shares)
    unknown = sorted(set(shares) - set(FAMILIES))
    if unknown:
        raise KeyError(f"no families {unknown} in tinyworld; there are {', '.join(FAMILIES)}")
    rng = random.Random(f"tinyworld bank {seed}")
    weights = [share / _mean_length(family) for family, share in shares.items()]
    families = tuple(shares)
    rows = -(-tokens // context)
    ids = np.full((rows, context), IDS[BOS], dtype=np.uint16)
    answers = np.zeros((rows, context), dtype=bool)
    kept: list[tuple[Label | None, ...]] = []
    for row in range(rows):
        filled = 1
        row_labels: list[Label | None] = [None]
        while filled < context:
            family = rng.choices(families, weights)[0]
            marks = MARK_RATE if rng.random() < MARKED_SHARE else 0.0
            document = sample(family, rng, split=split, marks=marks)
            document = document if transform is None else transform(document)
            words = document.words[: context - filled]
            ids[row, filled : filled + len(words)] = [IDS[word] for word in words]
            for answer in document.answers:
                if answer < len(words):
                    answers[row, filled + answer] = True
            if labels:
                row_labels.extend(document.labels[: len(words)])
            filled += len(words)
        if labels:
            kept.append(tuple(row_labels))
    return Bank(ids, answers, tuple(kept))


def _word_id(word: str) -> int:
    if word not in IDS:
        raise KeyError(f"{word!r} is not a word of tinyworld; see interp.tinyworld.VOCABULARY")
    return IDS[word]


@cache
def _mean_length(family: str) -> float:
    rng = random.Random(f"length of {family}")
    return sum(len(TABLE[family].draw(rng)) for _ in range(200)) / 200
