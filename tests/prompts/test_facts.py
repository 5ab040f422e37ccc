from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import pytest

from interp import prompts, tinyworld
from interp.prompts._facts import Relation, TwoHopRelation
from interp.tinyworld.families import facts as world_facts

CASES = [("facts", r) for r in get_args(Relation)] + [("two_hop", r) for r in get_args(TwoHopRelation)]


@pytest.fixture(params=["world", "english"])
def bridge(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("task", "relation"), CASES)
def test_answers_are_the_facts_of_the_table(bridge: Any, task: str, relation: str) -> None:
    p = prompts.TASKS[task](bridge, 24, relation=relation)
    for i in range(24):
        subject, other = (p.text(int(ids[i, p.positions["subject"][i]])).strip() for ids in (p.clean, p.corrupted))
        assert subject == p.labels["subject"][i]
        assert other == p.labels["corrupted_subject"][i]
        assert p.text(p.answers[i]).strip() == world_facts.answer(relation, subject)
        assert p.text(p.foils[i]).strip() == world_facts.answer(relation, other)
        if task == "two_hop":
            country = p.labels["bridge"][i]
            assert country == world_facts.bridge_country(subject)
            assert country not in {text.strip() for text in p.tokens_str("clean")[i]}
    assert ((p.clean != p.corrupted).sum(1) == 1).all()


def test_both_directions_are_asked_so_that_no_word_is_always_the_answer(bridge: Any) -> None:
    p = prompts.facts(bridge, 64)
    assert Counter(p.answers.tolist()) == Counter(p.foils.tolist())
    assert (p.clean[::2] == p.corrupted[1::2]).all()
    assert len({tuple(row) for row in p.clean.tolist()}) > 6


def test_a_fact_that_is_the_same_for_both_is_no_pair(world: Any) -> None:
    # many countries pay with the euro: such pairs have no foil
    p = prompts.facts(world, 200, relation="currency", split="train")
    assert (p.answers != p.foils).all()


@pytest.mark.parametrize(("task", "relation"), CASES)
def test_heldout(world: Any, task: str, relation: str) -> None:
    for split in ("heldout", "train"):
        p = prompts.TASKS[task](world, 24, relation=relation, split=split)
        for key in ("subject", "corrupted_subject"):
            for subject, template in zip(p.labels[key], p.labels["template"], strict=True):
                combination = (relation, subject) if task == "two_hop" else (relation, subject, str(template))
                assert tinyworld.held_out(task, combination) == (split == "heldout")


@pytest.mark.usefixtures("unchecked")
def test_unknown_relations_are_named(bridge: Any) -> None:
    with pytest.raises(ValueError, match=r"relation='anthem' is not one of \['capital'"):
        prompts.facts(bridge, 4, relation="anthem")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"relation='capital' is not one of \['capital_language'"):
        prompts.two_hop(bridge, 4, relation="capital")  # type: ignore[arg-type]
