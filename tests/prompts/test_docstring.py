from __future__ import annotations

from typing import Any

import pytest

from interp import prompts, tinyworld


@pytest.fixture(params=["world", "english"])
def bridge(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(("parameters", "documented"), [(4, None), (3, 1), (6, 2)])
def test_the_next_parameter_of_the_signature_is_asked_for(bridge: Any, parameters: int, documented: int | None) -> None:
    p = prompts.docstring(bridge, 12, parameters=parameters, documented=documented)
    described = documented or parameters - 2
    for i, names in enumerate(p.labels["parameters"]):
        texts = [text.strip() for text in p.tokens_str()[i]]
        assert len(names) == parameters
        first = texts.index(names[0])
        assert [text for text in texts[first : first + 2 * parameters] if text in names] == list(names)
        at = {name: texts[int(position[i])] for name, position in p.positions.items()}
        assert at["def_previous"] == at["doc_previous"] == names[described - 1]
        assert at["def_answer"] == names[described] == p.text(p.answers[i]).strip()
        assert p.text(p.foils[i]).strip() == names[described + 1]
        assert texts.count(names[described]) == 1  # the signature alone tells it
        assert p.positions["doc_previous"][i] > p.positions["def_answer"][i]
    changed = p.clean != p.corrupted
    assert (changed.sum(1) == 2).all()
    assert (p.clean.sum(1) == p.corrupted.sum(1)).all()  # an exchange


def test_impossible_signatures_are_refused(bridge: Any) -> None:
    with pytest.raises(ValueError, match="parameters=2: at least 3 are needed"):
        prompts.docstring(bridge, 4, parameters=2)
    with pytest.raises(ValueError, match="documented=3 must lie between 1 and parameters - 2 = 2"):
        prompts.docstring(bridge, 4, documented=3)


def test_heldout(world: Any) -> None:
    for split in ("heldout", "train"):
        p = prompts.docstring(world, 8, split=split)
        assert {tinyworld.held_out("docstring", names) for names in p.labels["parameters"]} == {split == "heldout"}
