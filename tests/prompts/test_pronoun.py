from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from interp import prompts, tinyworld
from interp.tinyworld.lexicon.names import PRONOUNS, gender


@pytest.fixture(params=["world", "english"])
def bridge(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("distractor", [False, True])
def test_the_pronoun_has_the_gender_of_the_name(bridge: Any, distractor: bool) -> None:
    p = prompts.pronoun(bridge, 32, distractor=distractor)
    for i in range(32):
        name, changed = (p.text(int(ids[i, p.positions["name"][i]])).strip() for ids in (p.clean, p.corrupted))
        case = ("subject", "object", "possessive").index(p.labels["case"][i])
        assert gender(name) != gender(changed)
        assert p.text(p.answers[i]).strip() == PRONOUNS[gender(name)][case]
        assert p.text(p.foils[i]).strip() == PRONOUNS[gender(changed)][case]
    assert Counter(p.labels["gender"]) == {"female": 16, "male": 16}
    assert (p.clean[::2] == p.corrupted[1::2]).all()
    assert ("other" in p.positions) == distractor
    assert ((p.clean != p.corrupted).sum(1) == 1 + distractor).all()


def test_a_template_of_the_other_kind_is_refused(bridge: Any) -> None:
    with pytest.raises(ValueError, match="template=0 is not one of"):
        prompts.pronoun(bridge, 4, distractor=True, template=0)


@pytest.mark.parametrize("distractor", [False, True])
def test_heldout(world: Any, distractor: bool) -> None:
    for split in ("heldout", "train"):
        p = prompts.pronoun(world, 16, distractor=distractor, split=split)
        other = p.labels["other"] if distractor else [str(t) for t in p.labels["template"]]
        assert {tinyworld.held_out("pronoun", c) for c in zip(p.labels["name"], other, strict=True)} == {
            split == "heldout"
        }
