from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import pytest

from interp import prompts, tinyworld
from interp.prompts._agreement import Structure
from interp.tinyworld.lexicon.agreement import AUXILIARIES, BY_WORD


@pytest.fixture(params=["world", "english"])
def bridge(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("structure", get_args(Structure))
def test_the_auxiliary_has_the_number_of_the_subject(bridge: Any, structure: Structure) -> None:
    p = prompts.agreement(bridge, 32, structure=structure)
    pairs = {forms[:2] for forms in AUXILIARIES.values()}
    for i in range(32):
        subject, changed = (p.text(int(ids[i, p.positions["subject"][i]])).strip() for ids in (p.clean, p.corrupted))
        answer, foil = p.text(p.answers[i]).strip(), p.text(p.foils[i]).strip()
        noun = BY_WORD[subject]
        plural = subject == noun.plural
        assert changed == (noun.singular if plural else noun.plural)
        assert ((foil, answer) if plural else (answer, foil)) in pairs
        # a subject relative has a verb of the subject's, which changes along
        assert int((p.clean[i] != p.corrupted[i]).sum()) == (2 if structure == "subject_relative" else 1)
        if structure != "simple":
            attractor = p.text(int(p.clean[i, p.positions["attractor"][i]])).strip()
            assert attractor in BY_WORD[p.labels["attractor"][i]]
            assert (attractor == BY_WORD[attractor].plural) == (p.labels["attractor_number"][i] == "plural")
    assert len(set(p.answers.tolist())) >= 4


def test_numbers_are_crossed_in_fours(bridge: Any) -> None:
    p = prompts.agreement(bridge, 32)
    assert set(Counter(zip(p.labels["number"], p.labels["attractor_number"], strict=True)).values()) == {8}
    for i in range(0, 32, 4):
        # subject and attractor apart, the four sentences are the same
        assert len({p.labels["noun"][j] for j in range(i, i + 4)}) == 1
        assert (p.clean[i : i + 4] == p.clean[i]).all(0).sum() == p.clean.shape[1] - 2
    only = prompts.agreement(bridge, 8, attractor_number="plural")
    assert Counter(only.labels["attractor_number"]) == {"plural": 8}
    assert Counter(only.labels["number"]) == {"plural": 4, "singular": 4}


@pytest.mark.usefixtures("unchecked")
def test_bad_options_are_refused(bridge: Any) -> None:
    with pytest.raises(ValueError, match="'simple' has no attractor"):
        prompts.agreement(bridge, 4, structure="simple", attractor_number="plural")
    with pytest.raises(ValueError, match=r"structure='pp' is not one of \['simple'"):
        prompts.agreement(bridge, 4, structure="pp")  # type: ignore[arg-type]


@pytest.mark.parametrize("structure", get_args(Structure))
def test_heldout(world: Any, structure: Structure) -> None:
    for split in ("heldout", "train"):
        p = prompts.agreement(world, 16, structure=structure, split=split)
        other = p.labels["opening" if structure == "simple" else "attractor"]
        combinations = [(structure, noun, o) for noun, o in zip(p.labels["noun"], other, strict=True)]
        assert {tinyworld.held_out("agreement", c) for c in combinations} == {split == "heldout"}
