"""How well a model knows the world: accuracy per family on fresh documents, with intervals."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from interp.stats import proportion_interval
from interp.tinyworld.documents import Document, Split
from interp.tinyworld.encoding import encode
from interp.tinyworld.families import SINGLE_ANSWER, sample
from interp.tinyworld.families.years import valid_ends
from interp.tinyworld.lexicon.times import TWO_DIGITS
from interp.tinyworld.vocabulary import IDS

Predict = Callable[[np.ndarray], np.ndarray]  # int64 ids [document, pos] -> logits [document, pos, d_vocab]

BATCH = 64


def evaluate(
    predict: Predict,
    *,
    n: int = 400,
    seed: int = 10_000,
    families: Sequence[str] = SINGLE_ANSWER,
    transform: Callable[[Document], Document] | None = None,
) -> list[dict[str, Any]]:
    """One row per family, split and kind (`"all"` for the family as a whole), on `n` fresh documents per split.

    An answer counts as right where it has the largest logit of the whole vocabulary, with the true words before it.
    `accuracy` is over answers; the Wilson 95 % interval takes documents as the sample, because the answers of one
    document are not independent. A model of no knowledge scores
    about 0.

    Args:
        predict: Ids (right-padded rows, start token first) to logits; the model must be causal.
        transform: Applied to every document first, such as `changes.changed` for the tuned model.
    """
    rows = []
    for family in families:
        for split in ("train", "heldout"):
            documents = fresh(family, n, split=split, seed=seed)
            documents = documents if transform is None else list(map(transform, documents))
            right = correct(predict, documents)
            kinds = sorted({document.kind for document in documents})
            for kind in ["all", *(kinds if len(kinds) > 1 else [])]:
                chosen = [r for r, document in zip(right, documents, strict=True) if kind in ("all", document.kind)]
                answers = sum(map(len, chosen))
                accuracy = sum(int(r.sum()) for r in chosen) / answers
                interval = proportion_interval(round(accuracy * len(chosen)), len(chosen))
                rows.append(
                    {
                        "family": family,
                        "split": split,
                        "kind": kind,
                        "accuracy": round(accuracy, 4),
                        "low": round(float(interval.low), 4),
                        "high": round(float(interval.high), 4),
                        "documents": len(chosen),
                        "answers": answers,
                    }
                )
    return rows


def greater_than(predict: Predict, *, n: int = 400, seed: int = 10_000) -> dict[str, float]:
    """Probability of years that are later than the start, and of years that are not, on held-out spans (means)."""
    documents = fresh("greater_than", n, split="heldout", seed=seed)
    years = [IDS[word] for word in TWO_DIGITS]
    later = not_later = right = 0.0
    for document, logits in zip(documents, _logits(predict, documents), strict=True):
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
        probability = (shifted / shifted.sum(-1, keepdims=True))[document.index("end")]
        valid = [IDS[word] for word in valid_ends(document.words[document.index("start")])]
        mass, all_years = probability[valid].sum(), probability[years].sum()
        later, not_later = later + mass, not_later + all_years - mass
        right += int(probability.argmax()) in valid
    return {
        "probability_later": round(float(later) / n, 4),
        "probability_not_later": round(float(not_later) / n, 4),
        "most_likely_is_later": round(right / n, 4),
        "documents": n,
    }


def fresh(family: str, n: int, *, split: Split, seed: int) -> list[Document]:
    """Documents that no training bank holds in this order: their seed is of another kind than a bank's."""
    rng = random.Random(f"evaluation {seed} {family} {split}")
    documents: list[Document] = []
    while len(documents) < n:
        document = sample(family, rng, split=split)
        if document.answers or family not in SINGLE_ANSWER:
            documents.append(document)
    return documents


def correct(predict: Predict, documents: Sequence[Document]) -> list[np.ndarray]:
    """Per document, which of its answers have the largest logit."""
    results = []
    for document, logits in zip(documents, _logits(predict, documents), strict=True):
        answers = list(document.answers)  # a word's prediction is read one token before it, where its index points
        results.append(logits[answers].argmax(-1) == [IDS[document.words[answer]] for answer in answers])
    return results


def _logits(predict: Predict, documents: Sequence[Document]) -> list[np.ndarray]:
    """Logits per document, without start and padding shifts: row `i` predicts word `i`."""
    rows: list[np.ndarray] = []
    for start in range(0, len(documents), BATCH):
        batch = encode(documents[start : start + BATCH])
        logits = np.asarray(predict(batch.ids), dtype=np.float32)
        rows += [row[: length - 1] for row, length in zip(logits, batch.lengths, strict=True)]
    return rows
