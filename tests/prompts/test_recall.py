"""Lists that are recalled, and lists of random tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp import load_model, prompts, tinyworld
from tests.helpers import tiny_bridge


@pytest.fixture(scope="module")
def world() -> Any:
    return load_model("tinyworld-gpt", check=False)


@pytest.mark.parametrize("answer_index", [1, 2, 4])
def test_the_next_item_of_a_list(world: Any, answer_index: int) -> None:
    p = prompts.recall(world, 8, length=5, answer_index=answer_index)
    for row in range(8):
        words = tinyworld.decode(p.clean[row].tolist()).split()
        items = words[2:7]
        assert words == ["list", ":", *items, ";", "again", ":", *items[:answer_index]]
        assert len(set(items)) == 5
        assert p.text(p.answers[row]) == items[answer_index]
        foil = p.labels["foil_index"][row]
        assert p.text(p.foils[row]) == items[foil]
        swapped = list(items)
        swapped[answer_index], swapped[foil] = items[foil], items[answer_index]
        other = tinyworld.decode(p.corrupted[row].tolist()).split()
        assert other == ["list", ":", *swapped, ";", "again", ":", *swapped[:answer_index]]
        assert int(p.positions["answer"][row]) == int(p.positions[f"item_{answer_index}"][row]) == 3 + answer_index
        assert tinyworld.held_out("induction", items) and tinyworld.held_out("induction", swapped)


def test_the_item_that_is_left(world: Any) -> None:
    p = prompts.recall(world, 16, length=4, task="remaining")
    for row in range(16):
        words = tinyworld.decode(p.clean[row].tolist()).split()
        items, again = words[2:6], words[9:]
        assert set(items) - set(again) == {p.text(p.answers[row])}
        other = tinyworld.decode(p.corrupted[row].tolist()).split()
        assert other[2:6] == items
        assert set(items) - set(other[9:]) == {p.text(p.foils[row])}
    assert len(set(p.labels["answer_index"])) > 1


def test_english_for_other_tokenizers() -> None:
    bridge = tiny_bridge("llama")  # its words are w3, w4, ...
    with pytest.raises(ValueError, match="recall needs at least 4 items that are single tokens"):
        prompts.recall(bridge)


def test_repeated_tokens(world: Any) -> None:
    rows = prompts.repeated_tokens(world, 3, 7)
    assert rows.shape == (3, 101)
    assert torch.equal(rows, prompts.repeated_tokens(world, 3, 7))
    assert not torch.equal(rows, prompts.repeated_tokens(world, 3, 8))
    for row in rows:
        assert int(row[0]) == world.tokenizer.bos_token_id
        assert len(set(row[1:26].tolist())) == 25
        assert torch.equal(row[1:26].repeat(4), row[1:])
    mine = prompts.repeated_tokens(tiny_bridge("gpt2"), 2, length=3, repeats=2, tokens=[5, 6, 7])
    assert set(mine[:, 1:].flatten().tolist()) == {5, 6, 7}


def test_what_is_refused(world: Any) -> None:
    with pytest.raises(ValueError, match="make 151 positions; the context is 128. Ask for length=21"):
        prompts.repeated_tokens(world, length=25, repeats=6)
    with pytest.raises(ValueError, match="needs as many different tokens, but there are 2"):
        prompts.repeated_tokens(world, length=3, tokens=[5, 6])
    with pytest.raises(ValueError, match="length=2: expected at least 3 items"):
        prompts.recall(world, length=2)
    with pytest.raises(ValueError, match="answer_index=0; expected 1 to 3 for 'next'"):
        prompts.recall(world, answer_index=0)
