from __future__ import annotations

from typing import Any

import pytest

from interp import prompts, tinyworld
from interp.tinyworld.lexicon.needles import KEYS, VALUES


@pytest.fixture(params=["world", "english"])
def bridge(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("distance", "before", "pairs"), [(32, 24, 3), (24, 8, 1), (40, 0, 1), (0, 30, 2), (50, 25, 4)]
)
def test_the_value_stands_where_it_should(bridge: Any, distance: int, before: int, pairs: int) -> None:
    p = prompts.needle(bridge, 12, distance=distance, before=before, pairs=pairs)
    starts = set()
    for i in range(12):
        row, texts = p.clean[i], [text.strip() for text in p.tokens_str()[i]]
        key, value, query = (int(p.positions[name][i]) for name in ("key", "value", "query"))
        assert row[value] == p.answers[i]
        assert p.corrupted[i, value] == p.foils[i]
        assert row[key] == row[query]
        assert max(key, value) < query
        assert (row == p.answers[i]).sum() == 1
        assert p.foils[i] not in row
        stop = texts.index(".", max(key, value))
        question = stop + 1 + distance
        assert texts[question].lower() in ("what", "question")
        starts.add(question)
        said = [word for word in texts if word in VALUES]
        assert len(said) == pairs
        assert len({*said, p.text(p.foils[i]).strip()}) == pairs + 1
        assert p.labels["after"][i] == pairs - 1 - said.index(p.text(p.answers[i]).strip())
        assert len({word for word in texts[1:question] if word in KEYS}) == pairs
    assert ((p.clean != p.corrupted).sum(1) == 1).all()
    # only what stands in between grows with the distance
    further = prompts.needle(bridge, 12, distance=distance + 7, before=before, pairs=pairs)
    assert further.clean.shape[1] == p.clean.shape[1] + 7
    assert len(starts) == 1


def test_the_asked_needle_is_neither_always_first_nor_always_last(bridge: Any) -> None:
    p = prompts.needle(bridge, 48)
    assert set(p.labels["after"]) == {0, 1, 2}
    assert set(prompts.needle(bridge, 12, pairs=1).labels["after"]) == {0}


def test_what_stands_before_the_needle_is_exact(bridge: Any) -> None:
    lengths = {before: prompts.needle(bridge, 4, before=before).clean.shape[1] for before in (24, 30, 37)}
    assert lengths[30] - lengths[24] == 6
    assert lengths[37] - lengths[24] == 13


def test_a_distance_that_sentences_cannot_fill_is_refused_with_the_nearest(english: Any) -> None:
    with pytest.raises(ValueError, match=r"distance=2 cannot be met exactly .* the nearest are \[0, 3, 4\]"):
        prompts.needle(english, 4, distance=2, pairs=1)


def test_distractors_that_do_not_fit_are_refused(bridge: Any) -> None:
    with pytest.raises(
        ValueError, match=r"4 distractors of \d+ tokens do not fit exactly into before=8 and distance=10"
    ):
        prompts.needle(bridge, 4, distance=10, before=8, pairs=5)


def test_numbers_that_make_no_sense_are_refused(bridge: Any) -> None:
    with pytest.raises(ValueError, match="distance=-1, before=24, pairs=3: expected at least 0, 0 and 1"):
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
