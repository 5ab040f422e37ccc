from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from interp import prompts, tinyworld
from interp.prompts import Prompts


def at(p: Prompts, which: str, name: str) -> list[str]:
    """The token at a named position, per example."""
    rows = getattr(p, which)
    return [p.text(int(rows[i, position])).strip() for i, position in enumerate(p.positions[name].tolist())]


def answers(p: Prompts) -> list[str]:
    return [p.text(token).strip() for token in p.answers.tolist()]


def foils(p: Prompts) -> list[str]:
    return [p.text(token).strip() for token in p.foils.tolist()]


@pytest.fixture(params=["world", "english"])
def bridge(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_the_answer_is_the_name_said_once(bridge: Any) -> None:
    p = prompts.ioi(bridge, 40)
    assert answers(p) == at(p, "clean", "io") == list(p.labels["io"])
    assert foils(p) == at(p, "clean", "s1") == at(p, "clean", "s2") == list(p.labels["subject"])
    for i, row in enumerate(p.clean.tolist()):
        assert row.count(int(p.answers[i])) == 1
        assert row.count(int(p.foils[i])) == 2
    assert (p.positions["s1+1"] == p.positions["s1"] + 1).all()
    assert (p.positions["s2"] > p.positions["s1+1"]).all()


def test_orders_are_balanced_over_everything_else(bridge: Any) -> None:
    p = prompts.ioi(bridge, 64)
    assert Counter(p.labels["order"]) == {"ABBA": 32, "BABA": 32}
    for i in range(0, 64, 2):
        for key in ("template", "io", "subject", "place", "thing"):
            assert p.labels[key][i] == p.labels[key][i + 1]
        # ABBA names IO first; the two rows differ in the order of the first two names alone
        assert p.positions["io"][i] < p.positions["s1"][i]
        assert p.positions["io"][i] == p.positions["s1"][i + 1]
        assert (p.clean[i] != p.clean[i + 1]).sum() == 2
        assert p.answers[i] == p.answers[i + 1]
    assert len(set(p.labels["template"])) >= 3
    assert set(prompts.ioi(bridge, 5, order="BABA").labels["order"]) == {"BABA"}


def test_corruptions_change_what_they_say(bridge: Any) -> None:
    p = prompts.ioi(bridge, 24)
    assert ((p.clean != p.corrupted).sum(1) == 1).all()
    assert at(p, "corrupted", "s2") == answers(p)  # now the subject is said once, so the foil is right
    third = prompts.ioi(bridge, 24, corruption="s2_random")
    assert ((third.clean != third.corrupted).sum(1) == 1).all()
    assert not any(
        {a} & {b, c} for a, b, c in zip(at(third, "corrupted", "s2"), answers(third), foils(third), strict=True)
    )
    abc = prompts.ioi(bridge, 24, corruption="abc")
    assert ((abc.clean != abc.corrupted).sum(1) == 3).all()
    for i in range(24):
        names = {at(abc, "corrupted", role)[i] for role in ("io", "s1", "s2")}
        assert len(names) == 3
        assert not names & {answers(abc)[i], foils(abc)[i]}


def test_heldout_pairs_are_held_out_and_training_pairs_are_not(world: Any) -> None:
    for split, expected in (("heldout", True), ("train", False)):
        p = prompts.ioi(world, 32, split=split)
        pairs = zip(p.labels["io"], p.labels["subject"], strict=True)
        assert [tinyworld.held_out("ioi", sorted(pair)) for pair in pairs] == [expected] * 32
    default = prompts.ioi(world, 32)
    assert (default.clean == prompts.ioi(world, 32, split="heldout").clean).all()


def test_a_template_can_be_chosen_and_all_of_them_work(bridge: Any) -> None:
    texts = {tuple(prompts.ioi(bridge, 1, template=i).clean[0].tolist()) for i in range(8)}
    assert len(texts) == 8
    with pytest.raises(ValueError, match=r"template=8 is not one of \[0, 1, 2"):
        prompts.ioi(bridge, 4, template=8)


@pytest.mark.usefixtures("unchecked")
def test_unknown_options_are_named(bridge: Any) -> None:
    with pytest.raises(ValueError, match=r"corruption='noise' is not one of \['s2_io_flip', 's2_random', 'abc'\]"):
        prompts.ioi(bridge, 4, corruption="noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"order='AABB' is not one of \['ABBA', 'BABA'\]"):
        prompts.ioi(bridge, 4, order="AABB")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="split must be 'train', 'heldout' or None, got 'test'"):
        prompts.ioi(bridge, 4, split="test")  # type: ignore[arg-type]
