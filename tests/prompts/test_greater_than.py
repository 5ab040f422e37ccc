from __future__ import annotations

from typing import Any

import pytest
import torch

from interp import metrics, prompts, tinyworld
from tests.prompts.builders import english_words, stub, train_bpe


@pytest.fixture(params=["world", "english"])
def bridge(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_every_later_year_is_right_and_every_other_wrong(bridge: Any) -> None:
    p = prompts.greater_than(bridge, 32)
    assert p.answer_sets is not None
    assert p.foil_sets is not None
    for i, start in enumerate(p.labels["start"]):
        assert sorted(int(p.text(t)) for t in p.answer_sets[i]) == list(range(start + 1, 100))
        assert sorted(int(p.text(t)) for t in p.foil_sets[i]) == list(range(start + 1))
        assert int(p.text(p.answers[i])) - start == start - int(p.text(p.foils[i])) > 0
        assert int(p.text(p.clean[i, p.positions["start"][i]])) == start
        assert int(p.text(p.clean[i, -1])) == int(p.text(p.clean[i, p.positions["century"][i]]))
    assert len(set(p.labels["start"])) > 15


def test_only_the_start_is_corrupted(bridge: Any) -> None:
    p = prompts.greater_than(bridge, 16)
    earliest = 2 if tinyworld.is_tinyworld(bridge.tokenizer) else 1
    rows = torch.arange(16)
    assert ((p.clean != p.corrupted).sum(1) == 1).all()
    assert {int(p.text(t)) for t in p.corrupted[rows, p.positions["start"]].tolist()} == {earliest}
    later = prompts.greater_than(bridge, 16, corrupted_start=40)
    assert min(later.labels["start"]) > 40
    with pytest.raises(ValueError, match="corrupted_start=99 must be a two-digit year from 0 to 96"):
        prompts.greater_than(bridge, 4, corrupted_start=99)


def test_the_probability_difference_of_planted_models(bridge: Any) -> None:
    p = prompts.greater_than(bridge, 8)
    metric = metrics.probability_difference(p)
    n, length = p.clean.shape
    logits = torch.zeros(n, length, bridge.cfg.d_vocab)
    assert p.answer_sets is not None
    assert p.foil_sets is not None
    uniform = torch.tensor(
        [(len(a) - len(b)) / bridge.cfg.d_vocab for a, b in zip(p.answer_sets, p.foil_sets, strict=True)]
    )
    assert torch.allclose(metric(logits), uniform, atol=1e-6)
    for i, ids in enumerate(p.answer_sets):
        logits[i, -1, list(ids)] = 40.0
    assert torch.allclose(metric(logits), torch.ones(n))
    # whatever follows a later start is spread over both sides as the sets are
    assert torch.allclose(metrics.probability_difference(p.swap())(logits), -torch.ones(n))


def test_years_that_are_one_token_are_left_out() -> None:
    words = [*english_words(), *(f"17{year}" for year in range(20, 60))]
    bridge = stub(train_bpe(words))
    assert len(bridge.tokenizer(" 1740")["input_ids"]) == 1
    p = prompts.greater_than(bridge, 200)
    starts = {s for s, c in zip(p.labels["start"], p.labels["century"], strict=True) if c == "17"}
    assert starts
    assert not starts & set(range(20, 60))


def test_a_tokenizer_that_splits_years_otherwise_is_refused() -> None:
    bridge = stub(train_bpe(english_words()))
    # years as single digits, as several tokenizers write them
    from tokenizers import pre_tokenizers

    raw = bridge.tokenizer.backend_tokenizer
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), raw.pre_tokenizer])
    with pytest.raises(ValueError, match="greater_than needs at least 1 centuries with years of two digits"):
        prompts.greater_than(bridge, 4)


def test_heldout(world: Any) -> None:
    for split in ("heldout", "train"):
        p = prompts.greater_than(world, 24, split=split)
        combinations = zip(p.labels["event"], p.labels["century"], (f"{s:02d}" for s in p.labels["start"]), strict=True)
        assert {tinyworld.held_out("greater_than", c) for c in combinations} == {split == "heldout"}
