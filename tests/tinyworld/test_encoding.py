"""Ids, labels and rows: what the models read is what the labels speak of."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from interp import tinyworld
from interp.tinyworld import FAMILIES, IDS, VOCABULARY
from interp.tinyworld.encoding import BOS, PAD, SHARES


@pytest.fixture(scope="module")
def documents() -> list[tinyworld.Document]:
    rng = random.Random(3)
    return [tinyworld.sample(family, rng) for family in FAMILIES for _ in range(5)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    tinyworld.tokenizer().save_pretrained(directory)
    return directory


def test_tokenizer_round_trip_and_one_start_token(documents: list[tinyworld.Document], saved: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tinyworld.is_tinyworld(tokenizer)
    for document in documents:
        ids = tokenizer(document.text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id == IDS[BOS] and ids.count(IDS[BOS]) == 1
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == document.text
        assert ids == tinyworld.encode(document).ids[0].tolist()
        assert tinyworld.decode(ids) == document.text
        assert tokenizer(document.text, add_special_tokens=False)["input_ids"] == ids[1:]


def test_is_tinyworld_refuses_another_vocabulary(saved: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    assert not tinyworld.is_tinyworld(other)
    assert not tinyworld.is_tinyworld(None)


def test_labels_stay_with_their_tokens(documents: list[tinyworld.Document]) -> None:
    batch = tinyworld.encode(documents)
    assert (batch.ids[:, 0] == IDS[BOS]).all()
    for row, document in enumerate(documents):
        length = batch.lengths[row]
        assert [VOCABULARY[i] for i in batch.ids[row, 1:length]] == list(document.words)
        assert batch.labels[row][1:length] == document.labels
        assert batch.labels[row][0] is None and set(batch.labels[row][length:]) <= {None}
        assert (batch.ids[row, length:] == IDS[PAD]).all()
        assert np.flatnonzero(batch.answers[row]).tolist() == [answer + 1 for answer in document.answers]


def test_bank_rows_begin_with_one_start_token_and_keep_labels() -> None:
    bank = tinyworld.bank(128 * 60, seed=4, labels=True)
    assert bank.ids.shape == (60, 128) and bank.ids.dtype == np.uint16
    assert ((bank.ids == IDS[BOS]).sum(1) == 1).all() and (bank.ids[:, 0] == IDS[BOS]).all()
    for row, labels in enumerate(bank.labels):
        assert len(labels) == 128 and labels[0] is None
        for token, label in zip(bank.ids[row, 1:], labels[1:], strict=True):
            assert label is not None
            if label.role in ("pronoun", "verb") and label.family == "agreement":
                assert VOCABULARY[token] not in ("the", ".")
    assert tinyworld.bank(128 * 60, seed=4).ids.tobytes() == bank.ids.tobytes()
    assert tinyworld.bank(128 * 60, seed=5).ids.tobytes() != bank.ids.tobytes()


def test_bank_mixes_the_families_by_their_shares() -> None:
    bank = tinyworld.bank(128 * 500, seed=1, labels=True)
    told = [label.family for row in bank.labels for label in row if label is not None]
    for family, share in SHARES.items():
        # long documents are cut at the end of a row more often than short ones
        assert told.count(family) / len(told) == pytest.approx(share, rel=0.3, abs=0.01)
    assert abs(sum(SHARES.values()) - 1) < 1e-9


def test_bank_holds_no_held_out_combination() -> None:
    seen: list[tinyworld.Document] = []

    def note(document: tinyworld.Document) -> tinyworld.Document:
        seen.append(document)
        return document

    tinyworld.bank(128 * 100, seed=2, transform=note)
    assert len(seen) > 500
    for document in seen:
        family = document.labels[0].family
        assert not any(tinyworld.held_out(family, combination) for combination in document.combinations)


def test_errors_name_the_word() -> None:
    strange = tinyworld.Document(("zebra",), (tinyworld.Label("x", "y"),))
    with pytest.raises(KeyError, match="'zebra' is not a word of tinyworld"):
        tinyworld.encode(strange)
    with pytest.raises(ValueError, match="no documents"):
        tinyworld.encode([])
    with pytest.raises(KeyError, match="no families \\['facta'\\]"):
        tinyworld.bank(128, seed=0, shares={"facta": 1.0})
