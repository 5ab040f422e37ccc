"""Halves of prompts that share no entity."""

from __future__ import annotations

import pytest
import torch

from interp import tinyworld
from interp.neurons import distinct_facts, split_entities
from interp.neurons.relation_prompts import _once
from interp.prompts import Prompts
from interp.tinyworld.families.facts import answer, bridge_country, subjects
from tests.helpers import tiny_bridge, tiny_tokens
from tests.prompts.builders import stub


def prompts_of(countries: list[str], seed: int = 0) -> Prompts:
    tokens = tiny_tokens(len(countries), 6, seed)
    answers = torch.arange(3, 3 + len(countries))
    return Prompts(
        tokens, tokens, answers, answers + 1, labels={"country": tuple(countries), "subject": tuple(countries)}
    )


def test_no_entity_and_no_wording_in_both_halves() -> None:
    names = [f"c{i}" for i in range(10)]
    sets = {"a": (prompts_of(names), prompts_of(names[::-1], 1)), "b": (prompts_of(names[:7], 2), prompts_of(names, 3))}
    first, second = split_entities(sets, seed=4)
    seen = [
        {name for part in half.values() for one in part for name in one.labels["country"]} for half in (first, second)
    ]
    assert not seen[0] & seen[1] and len(seen[0]) == 5 == len(seen[1])
    assert torch.equal(first["a"][0].clean, sets["a"][0].clean[[int(n[1:]) for n in first["a"][0].labels["country"]]])
    assert len(first["a"]) == 1 == len(second["a"])  # a wording each
    shared = split_entities(sets, wordings="shared", seed=4)
    assert [len(half["a"]) for half in shared] == [2, 2]
    assert split_entities(sets, seed=4)[0]["b"][0].labels == first["b"][0].labels
    assert {tuple(split_entities(sets, seed=seed)[0]["a"][0].labels["country"]) for seed in range(6)} != {
        tuple(first["a"][0].labels["country"])
    }


def test_each_subject_once() -> None:
    kept = _once(prompts_of(["x", "y", "x", "z", "y"]))
    assert kept.labels["subject"] == ("x", "y", "z")
    assert kept.answers.tolist() == [3, 4, 6]


def test_refusals() -> None:
    one = prompts_of(["x", "y"])
    with pytest.raises(ValueError, match="share=1"):
        split_entities({"a": (one, one)}, share=1.0)
    with pytest.raises(ValueError, match="not with 'city'"):
        split_entities({"a": (one, one)}, by="city")
    with pytest.raises(ValueError, match="1 wordings"):
        split_entities({"a": (one,)})
    with pytest.raises(ValueError, match="no examples left"):
        split_entities({"a": (prompts_of(["x"]),), "b": (one,)}, wordings="shared")


def test_every_fact_comes_once_in_every_wording() -> None:
    facts = distinct_facts(stub(tinyworld.tokenizer(), n_ctx=128), ["landmark"], n=200)
    assert [len(one) for one in facts["landmark"]] == [len(subjects("landmark"))] * 4
    for number, one in enumerate(facts["landmark"]):
        assert set(one.labels["template"]) == {number}
        assert set(one.labels["subject"]) == set(subjects("landmark"))
        assert list(one.labels["country"]) == [bridge_country(subject) for subject in one.labels["subject"]]
        asked = [answer("landmark", subject) for subject in one.labels["subject"]]
        assert one.answers.tolist() == [tinyworld.IDS[word] for word in asked]


def test_a_tokenizer_without_the_words_is_refused(unchecked) -> None:
    with pytest.raises(ValueError, match="no capital questions for this tokenizer"):
        distinct_facts(tiny_bridge("gpt2"), ["capital"])
    with pytest.raises(ValueError, match="relations="):
        distinct_facts(tiny_bridge("gpt2"), ["mayor"])  # type: ignore[list-item]
