from __future__ import annotations

from typing import Any

import pytest
import torch

from interp import prompts, tinyworld
from interp.tinyworld.families.lists import LIST_WORDS
from tests.prompts.builders import stub


@pytest.fixture(params=["world", "english", "letters"])
def bridge(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("length", "repeated"), [(12, None), (2, 1), (9, 8), (20, 3)])
def test_the_answer_followed_the_last_token_before(bridge: Any, length: int, repeated: int | None) -> None:
    p = prompts.induction(bridge, 16, length=length, repeated=repeated)
    said = repeated or length // 2
    assert p.clean.shape == (16, 1 + length + said)
    rows = torch.arange(16)
    assert torch.equal(p.clean[rows, p.positions["match"]], p.clean[:, -1])
    assert torch.equal(p.clean[rows, p.positions["source"]], p.answers)
    assert torch.equal(p.corrupted[rows, p.positions["source"]], p.foils)
    assert torch.equal(p.positions["source"], p.positions["match"] + 1)
    for i, row in enumerate(p.clean.tolist()):
        listed = row[1 : 1 + length]
        assert len(set(listed)) == length  # so the answer is unambiguous
        assert row[1 + length :] == listed[:said]
        assert int(p.foils[i]) not in row
    assert ((p.clean != p.corrupted).sum(1) == 1).all()


def test_only_words_are_repeated(letters: Any) -> None:
    special = {*letters.tokenizer.all_special_ids}
    p = prompts.induction(letters, 64)
    used = set(p.clean[:, 1:].flatten().tolist()) | set(p.foils.tolist())
    assert not used & special
    assert all(any(c.isalnum() for c in p.text(token)) and "\ufffd" not in p.text(token) for token in used)


def test_without_a_tokenizer_all_ids_are_tokens() -> None:
    p = prompts.induction(stub(None, d_vocab=9), 200, length=4)
    assert p.clean.shape == (200, 6)  # no BOS
    assert set(p.clean.flatten().tolist()) == set(range(9))
    assert p.strings == {}


def test_tinyworld_lists_are_its_own_and_held_out(world: Any) -> None:
    for split in ("heldout", "train"):
        p = prompts.induction(world, 16, length=6, split=split)
        lists = [[tinyworld.VOCABULARY[token] for token in row[1:7]] for row in p.clean.tolist()]
        assert {tinyworld.held_out("induction", words) for words in lists} == {split == "heldout"}
        assert {word for words in lists for word in words} <= set(LIST_WORDS)


def test_tokens_of_ones_own(english: Any) -> None:
    own = [50, 60, 70, 80, 90]
    p = prompts.induction(english, 100, length=3, tokens=own)
    assert set(p.clean[:, 1:].flatten().tolist()) | set(p.foils.tolist()) == set(own)
    with pytest.raises(
        ValueError, match="length=5 needs 6 different tokens, but the tokens given are 5; ask for a shorter"
    ):
        prompts.induction(english, 4, length=5, tokens=own)
    with pytest.raises(ValueError, match="tokens run from 50 to 999999; this model's ids are 0 to"):
        prompts.induction(english, 4, length=2, tokens=[50, 60, 999999])


def test_impossible_lists_are_refused(words: Any) -> None:
    with pytest.raises(ValueError, match="length=1: a list needs at least 2 tokens"):
        prompts.induction(words, 4, length=1)
    with pytest.raises(ValueError, match="repeated=12 must lie between 1 and length - 1 = 11"):
        prompts.induction(words, 4, length=12, repeated=12)
    with pytest.raises(ValueError, match="length=11 needs 12 different tokens, but the tokenizer has 11"):
        prompts.induction(words, 4, length=11)
    with pytest.raises(ValueError, match="the prompts have 18 tokens but the model's context is 16"):
        prompts.induction(words, 4, length=9, repeated=8)
