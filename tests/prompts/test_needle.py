from __future__ import annotations

from typing import Any

import pytest

from interp import prompts, tinyworld


@pytest.fixture(params=["world", "english"])
def bridge(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("distance", "before", "pairs"), [(24, 8, 1), (40, 0, 1), (0, 12, 1), (30, 6, 3)])
def test_the_value_stands_where_it_should(bridge: Any, distance: int, before: int, pairs: int) -> None:
    p = prompts.needle(bridge, 12, distance=distance, before=before, pairs=pairs)
    lengths = {p.clean.shape[1]}
    for i in range(12):
        row = p.clean[i]
        key, value, query = (int(p.positions[name][i]) for name in ("key", "value", "query"))
        assert row[value] == p.answers[i]
        assert p.corrupted[i, value] == p.foils[i]
        assert row[key] == row[query]
        assert max(key, value) < query
        assert (row == p.answers[i]).sum() == 1
        assert p.foils[i] not in row
        texts = p.tokens_str()[i]
        stop = texts.index(".", value)  # the needle's sentence ends here
        question = stop + 1 + distance
        assert texts[question].strip().lower() in ("what", "question")
        assert query > question
    assert ((p.clean != p.corrupted).sum(1) == 1).all()
    # only the prose grows with the distance
    assert (
        prompts.needle(bridge, 12, distance=distance + 7, before=before, pairs=pairs).clean.shape[1]
        == lengths.pop() + 7
    )


def test_prose_before_the_needle_is_exact(bridge: Any) -> None:
    lengths = {before: prompts.needle(bridge, 4, before=before).clean.shape[1] for before in (0, 6, 13)}
    assert lengths[6] - lengths[0] == 6
    assert lengths[13] - lengths[0] == 13


def test_a_distance_that_sentences_cannot_fill_is_refused_with_the_nearest(english: Any) -> None:
    with pytest.raises(ValueError, match=r"distance=2 cannot be met exactly .* the nearest are \[0, 3, 4\]"):
        prompts.needle(english, 4, distance=2)


def test_numbers_that_make_no_sense_are_refused(bridge: Any) -> None:
    with pytest.raises(ValueError, match="distance=-1, before=8, pairs=1: expected at least 0, 0 and 1"):
        prompts.needle(bridge, 4, distance=-1)
    with pytest.raises(ValueError, match="pairs=0"):
        prompts.needle(bridge, 4, pairs=0)
    with pytest.raises(ValueError, match="needs at least 400 keys"):
        prompts.needle(bridge, 4, pairs=400)


def test_heldout(world: Any) -> None:
    for split in ("heldout", "train"):
        p = prompts.needle(world, 12, split=split)
        for value in ("value", "corrupted_value"):
            pairs = zip(p.labels["key"], p.labels[value], strict=True)
            assert {tinyworld.held_out("needle", pair) for pair in pairs} == {split == "heldout"}
