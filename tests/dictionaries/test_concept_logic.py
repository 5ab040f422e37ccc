"""Rules and what follows: brute force, confluence, cycles, negation, proofs; and steering by what was derived."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp import hooks
from interp.dictionaries import (
    ConceptSteering,
    RandomEdit,
    Reasoning,
    Rule,
    SetLatents,
    SteeringVector,
    TokenRows,
    TopKSAE,
    VectorEdit,
    fit_propositions,
    forward_chain,
    reason,
    spliced,
    steer,
    token_rows,
)
from interp.prompts import Prompts
from tests.helpers import D_MODEL, FAMILIES, tiny_bridge, tiny_tokens

HOOK = "blocks.1.hook_resid_pre"
NAMES = tuple("abcdefg")
sets = st.frozensets(st.sampled_from(NAMES), max_size=4)
rule_lists = st.lists(
    st.builds(Rule, st.frozensets(st.sampled_from(NAMES), min_size=1, max_size=3), st.sampled_from(NAMES)), max_size=12
)


def closure(facts: frozenset[str], rules: Sequence[Rule]) -> set[str]:
    """The smallest set that holds the facts and is closed under the rules, by trying every subset of names."""
    found = None
    for size in range(len(NAMES) + 1):
        for subset in map(set, itertools.combinations(NAMES, size)):
            closed = all(rule.head in subset or not set(rule.body) <= subset for rule in rules)
            if facts <= subset and closed:
                found = subset
                break
        if found is not None:
            break
    assert found is not None
    return found


def held(found: Reasoning, text: int = 0) -> set[str]:
    return set(found.holds(text))


@settings(max_examples=60, deadline=None)
@given(st.lists(sets, min_size=1, max_size=3), rule_lists, st.randoms(use_true_random=False))
def test_the_closure_is_the_smallest_and_no_order_matters(
    texts: list[frozenset[str]], rules: list[Rule], shuffle: random.Random
) -> None:
    found = forward_chain(texts, rules)
    assert [held(found, i) for i in range(len(texts))] == [closure(text, rules) for text in texts]
    again = forward_chain(texts, shuffle.sample(rules, len(rules)) + rules[:2])  # another order, and some twice
    assert again.values.equals(found.values) and again.rule.equals(found.rule) and again.rules == found.rules
    assert again.round.equals(found.round)
    twice = forward_chain([held(found, i) for i in range(len(texts))], rules)
    assert [held(twice, i) for i in range(len(texts))] == [held(found, i) for i in range(len(texts))]
    assert not (twice.round > 0).any()
    more = forward_chain([text | {"a"} for text in texts], rules)
    fewer = forward_chain(texts, rules[:-1])
    for i in range(len(texts)):
        assert held(fewer, i) <= held(found, i) <= held(more, i)


@settings(max_examples=60, deadline=None)
@given(sets, rule_lists)
def test_a_proof_replays_from_the_facts(facts: frozenset[str], rules: list[Rule]) -> None:
    found = forward_chain([facts], rules)
    for concept in found.holds():
        known, steps = set(facts), found.proof(concept)
        for rule in steps:
            assert rule in rules and set(rule.body) <= known and rule.head not in known
            known.add(rule.head)
        assert concept in known and len(steps) == len(set(steps))
        assert bool(steps) == (concept not in facts)
        assert (steps[-1].head if steps else concept) == concept
        rounds = int(found.round.sel(text=0, concept=concept))
        assert rounds == (1 + max(int(found.round.sel(text=0, concept=p)) for p in steps[-1].body) if steps else 0)


def test_texts_are_reasoned_about_apart_and_shown() -> None:
    rules = [
        Rule({"Cairo"}, "Egypt", "capital"),
        Rule({"Egypt", "asks language"}, "Arabic"),
        Rule({"Arabic"}, "Egypt"),  # a cycle
        Rule({"Paris"}, "France"),
        Rule({"France", "asks language"}, "French"),
    ]
    found = forward_chain([{"Cairo", "asks language"}, {"Paris"}, {"Cairo", "Paris"}], rules)
    assert found.holds(0) == ["Cairo", "asks language", "Egypt", "Arabic"] and held(found, 1) == {"Paris", "France"}
    assert found.single(["Egypt", "France"]) == ["Egypt", "France", None]  # two hold of the last
    assert found.single(["Arabic", "French"]) == ["Arabic", None, None]
    assert [rule.head for rule in found.proof("Arabic")] == ["Egypt", "Arabic"] and found.proof("Cairo") == []
    assert found.explain("Arabic").splitlines() == [
        "given: Cairo, asks language",
        "Cairo -> Egypt  (capital)",
        "Egypt & asks language -> Arabic",
    ]
    table = found.to_dataframe()
    assert table.query("text == 0 and concept == 'Arabic'")["rule"].item() == "Egypt & asks language -> Arabic"
    assert len(table) == 4 + 2 + 4 and int((table["round"] == 0).sum()) == 5
    assert repr(found) == "Reasoning(3 texts, 5 rules: 5 given, 5 derived)"
    figure = found.plot()
    assert figure.data and np.nanmax(np.array(figure.data[0].z, float)) == 2


def test_negation_is_settled_below_and_a_cycle_through_it_is_refused() -> None:
    rules = [
        Rule({"bird"}, "flies", unless={"penguin"}),
        Rule({"tux"}, "penguin"),
        Rule({"flies"}, "travels"),
        Rule({"penguin"}, "bird"),
    ]
    found = forward_chain([{"bird"}, {"tux"}, {"penguin"}], rules)
    assert [held(found, i) for i in range(3)] == [
        {"bird", "flies", "travels"},
        {"tux", "penguin", "bird"},
        {"penguin", "bird"},
    ]
    assert str(rules[0]) == "bird & not penguin -> flies"
    for cycle in (
        [Rule({"a"}, "b", unless={"b"})],
        [Rule({"x"}, "a", unless={"b"}), Rule({"x"}, "b", unless={"a"})],
        [Rule({"x"}, "a", unless={"c"}), Rule({"a"}, "b"), Rule({"b"}, "c")],
    ):
        with pytest.raises(ValueError, match="their own absence"):
            forward_chain([{"x"}], cycle)
    assert held(forward_chain([set()], [Rule((), "b", unless={"a"})])) == {"b"}


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = forward_chain([{"a"}, {"b"}], [Rule({"a"}, "b", "first"), Rule({"b"}, "c", unless={"d"})])
    again = Reasoning.load(found.save(tmp_path / "reasoning.nc"))
    for name in ("values", "given", "rule", "round"):
        assert getattr(again, name).equals(getattr(found, name)), name
    assert again.rule_list() == found.rule_list() and again.explain("c") == found.explain("c")


def test_messages_of_rules() -> None:
    with pytest.raises(ValueError, match="is one string"):
        Rule("abc", "d")
    with pytest.raises(ValueError, match="give it as a fact"):
        Rule((), "d")
    with pytest.raises(ValueError, match="can never fire"):
        Rule({"a"}, "d", unless={"a"})
    facts = xr.DataArray(np.ones((1, 1), bool), dims=("text", "concept"), coords={"concept": ["Egypt"]})
    with pytest.raises(ValueError, match=r"no fact and no rule is about 'Egpyt'; did you mean 'Egypt'"):
        forward_chain(facts, [Rule({"Egpyt"}, "Arabic")])
    with pytest.raises(ValueError, match="expected bool"):
        forward_chain(facts.astype(np.float32), [])
    with pytest.raises(ValueError, match="several columns"):
        forward_chain(xr.concat([facts, facts], "concept"), [])
    with pytest.raises(ValueError, match="one set of concepts for each"):
        forward_chain(["a", "b"], [])
    found = forward_chain([{"Egypt"}], [Rule({"Cairo"}, "Egypt")])
    with pytest.raises(KeyError, match="did you mean 'Cairo'"):
        found.proof("Ciaro")
    with pytest.raises(ValueError, match="what does: Egypt"):
        found.proof("Cairo")


# Reading and steering on models.


def fitted(family: str = "llama") -> tuple[Any, TopKSAE, TokenRows, Any]:
    bridge = tiny_bridge(family)
    sae = TopKSAE(D_MODEL, 24, k=4, hook=HOOK, decoder_norm=1.0).requires_grad_(False)
    rows = token_rows(bridge, tiny_tokens(24, 8), HOOK, skip_tokens=[0])
    masks = {f"w{i}": rows.ids % 3 == i for i in range(3)}
    return bridge, sae, rows, fit_propositions(sae, rows, masks, k=2, n_random=1, n_shuffles=1)


def asked(n: int = 4, pos: int = 6, seed: int = 3) -> Prompts:
    tokens = tiny_tokens(n, pos, seed)
    subject = torch.arange(n) % 3 + 1
    labels = {"subject": [i // 2 for i in range(n)]}
    return Prompts(tokens, tokens, torch.arange(5, 5 + n), torch.full((n,), 3), {"subject": subject}, labels)


def test_reasoning_on_texts_is_reading_and_chaining() -> None:
    bridge, sae, rows, propositions = fitted()
    rules = [Rule({"w0", "w1"}, "both"), Rule({"both", "told"}, "end")]
    known = [{"told"} if i % 2 else set() for i in range(24)]
    found = reason(bridge, rows.tokens, sae, propositions, rules, skip_tokens=[0], known=known)
    read = propositions.read(sae, rows)
    for i in range(24):
        facts = {c for c in propositions.concepts if bool(read.sel(text=i, concept=c))} | known[i]
        assert held(found, i) == held(forward_chain([facts], rules))
    assert bool(found.values.sel(concept="end").any()) and not bool(found.values.sel(concept="end").all())
    assert found.provenance["hook"] == HOOK
    there = reason(bridge, rows.tokens, sae, propositions, [], positions=torch.full((24,), 4), skip_tokens=[0])
    assert there.values.equals(propositions.read(sae, rows, positions=torch.full((24,), 4)))
    with pytest.raises(ValueError, match="1 texts"):
        reason(bridge, rows.tokens, sae, propositions, rules, known=[{"told"}])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_text_is_steered_by_its_own_concept(family: str) -> None:
    """One text at a time through `steer` gives what all at once give; texts without a concept are untouched."""
    bridge, sae, rows, propositions = fitted(family)
    p = asked()
    vectors = propositions.vectors(bridge, sae)
    states = VectorEdit.means(rows, {c: rows.ids % 3 == i for i, c in enumerate(propositions.concepts)})
    names = ["w1", None, "w0", "w1"]
    with torch.no_grad():
        before = bridge(p.clean)
    found = steer_all(bridge, p, {"given": names}, {"add": VectorEdit(vectors), "replace": states})
    plain = before[:, -1].log_softmax(-1)
    np.testing.assert_allclose(found.baseline.values, plain[torch.arange(4), p.answers], atol=1e-5)
    for i, name in enumerate(names):
        for edit, vector in (("add", vectors), ("replace", states.vectors)):
            for strength in (0.5, 1.0, 2.0):
                cell = {"source": "given", "edit": edit, "strength": strength, "example": i}
                if name is None:
                    assert float(found.values.sel(cell)) == float(found.baseline[i])
                    assert float(found.kl.sel(cell)) == 0
                    continue
                values, at = vector[name].values, int(p.positions["subject"][i])
                if edit == "replace":
                    x = rows_at(bridge, p, i, at)
                    values = values - x
                with steer(bridge, SteeringVector(values, HOOK), strength, positions=[at]), torch.no_grad():
                    logits = bridge(p.clean[i : i + 1])[0, -1].log_softmax(-1)
                assert float(found.values.sel(cell)) == pytest.approx(float(logits[p.answers[i]]), abs=1e-4)
                expected = float((plain[i].exp() * (plain[i] - logits)).sum())
                assert float(found.kl.sel(cell)) == pytest.approx(expected, abs=1e-4)
                assert float(found.right.sel(cell)) == float(logits.argmax() == p.answers[i])
    with torch.no_grad():
        assert torch.equal(bridge(p.clean), before)
    assert found.steered.values.tolist() == [[True, False, True, True]]


def rows_at(bridge: Any, p: Prompts, i: int, at: int) -> Tensor:
    with torch.no_grad(), hooks.reads(bridge, [HOOK]) as read:
        bridge(p.clean[i : i + 1])
    return read[HOOK][0, at]


def steer_all(bridge: Any, p: Any, concepts: Any, edits: Any, **options: Any) -> ConceptSteering:
    from interp.dictionaries import steer_by_concept

    return steer_by_concept(bridge, p, concepts, edits, strengths=(0.5, 1, 2), **options)


@pytest.mark.parametrize("exclusive", [True, False])
def test_setting_latents_is_an_edit_of_the_spliced_dictionary(exclusive: bool) -> None:
    bridge, sae, _, propositions = fitted()
    p = asked()
    edit = SetLatents(sae, propositions, exclusive)
    names = ["w0", "w1", "w2", "w0"]
    found = steer_all(bridge, p, {"given": names}, {"set": edit})
    at, members = p.positions["subject"], propositions.latents.values

    def by_hand(latents: Tensor) -> Tensor:
        new = latents.clone()
        for i, name in enumerate(names):
            place = propositions.concepts.index(name)
            for others in members if exclusive else ():
                new[i, at[i], [m for m in others if m >= 0]] = 0.0
            for m, typical in zip(members[place], propositions.typical.values[place], strict=True):
                if m >= 0:
                    new[i, at[i], m] = float(typical)
        return new

    with torch.no_grad(), spliced(bridge, sae, edit=by_hand):
        logits = bridge(p.clean)[:, -1].log_softmax(-1)
    expected = logits[torch.arange(4), p.answers]
    np.testing.assert_allclose(found.values.sel(edit="set", strength=1.0)[0].values, expected, atol=1e-4)
    assert (found.kl.sel(edit="set", strength=1.0) > 0).any()


def test_the_random_control_is_as_long_and_the_same_for_a_concept() -> None:
    _, sae, rows, propositions = fitted()
    edit, x = SetLatents(sae, propositions), rows.values[:6]
    names = ["w0", "w1", "w0", "w2", "w1", "w0"]
    control = RandomEdit(edit, seed=1)
    change, own = control.change(x, names), edit.change(x, names)
    assert torch.allclose(change.norm(dim=1), own.norm(dim=1), atol=1e-5)
    unit = change / change.norm(dim=1, keepdim=True)
    assert torch.allclose(unit[0], unit[2], atol=1e-5) and not torch.allclose(unit[0], unit[1], atol=0.1)
    assert not torch.allclose(RandomEdit(edit, seed=2).change(x, names), change, atol=1e-3)
    assert control.hook == HOOK and list(control.concepts) == propositions.concepts


def test_diff_means_of_concepts_are_taken_against_the_others() -> None:
    _, _, rows, propositions = fitted()
    masks = {c: rows.ids % 3 == i for i, c in enumerate(propositions.concepts)}
    added, states = VectorEdit.diff_means(rows, masks), VectorEdit.means(rows, masks)
    means = torch.stack([rows.values[mask].mean(0) for mask in masks.values()])
    for i, name in enumerate(masks):
        assert torch.allclose(states.vectors[name].values, means[i], atol=1e-5)
        assert torch.allclose(added.vectors[name].values, means[i] - means.mean(0), atol=1e-5)
    assert (added.mode, states.mode) == ("add", "replace")


def test_several_sets_are_pooled_and_summarised(tmp_path: Path) -> None:
    bridge, sae, _, propositions = fitted()
    first, second = asked(4, 6), asked(3, 8, seed=5)
    names = ["w0", None, "w2", "w0", "w1", "w1", "w2"]
    edits = {"set": SetLatents(sae, propositions), "random": RandomEdit(SetLatents(sae, propositions))}
    sources = {"derived": names, "none": [None] * 7}
    both = steer_all(bridge, [first, second], sources, edits, groups="subject")
    for p, part in ((first, slice(0, 4)), (second, slice(4, 7))):
        alone = steer_all(bridge, p, {"derived": names[part]}, edits)
        np.testing.assert_allclose(
            both.values.sel(source=["derived"]).values[..., part], alone.values.values, atol=1e-5
        )  # fmt: skip
    assert both.values["group"].values.tolist() == [0, 0, 1, 1, 0, 0, 1]
    assert (both.values.sel(source="none") == both.baseline).all()
    table = both.summary(against=("none", "set")).set_index(["source", "edit", "strength"]).sort_index()
    gain = (both.values - both.baseline).mean("example")
    for source, edit, strength in table.index:
        row, at = table.loc[(source, edit, strength)], {"source": source, "edit": edit, "strength": strength}
        assert row["gain"] == pytest.approx(float(gain.sel(at)), abs=1e-5)
        assert row["minus"] == pytest.approx(row["gain"], abs=1e-5)
        assert row["right"] == pytest.approx(float(both.right.sel(at).mean()), abs=1e-6)
        assert row["gain_low"] <= row["gain"] <= row["gain_high"]
    assert table.loc["derived", "steered"].to_numpy() == pytest.approx(6 / 7)
    assert not table.loc["none", "steered"].any()
    best = both.best()
    chosen = both.summary(best).set_index(["source", "edit"]).sort_index()
    assert chosen.loc[("derived", "set"), "gain"] == pytest.approx(
        table.xs(("derived", "set"))["gain"].max(), abs=1e-6
    )  # fmt: skip
    assert float(best.sel(source="none", edit="set")) == 0.5  # a tie: the smallest
    held = both.best(folds=2, seed=1)
    per_example = held.sel(source="derived", edit="set")
    for group in (0, 1):  # two groups, a fold each: the strength is the best of the other
        other = both.select(both.values["group"].values != group).best()
        mine = per_example.values[both.values["group"].values == group]
        assert (mine == float(other.sel(source="derived", edit="set"))).all()
    row = both.summary(held).set_index(["source", "edit"]).sort_index().loc[("derived", "set")]
    picked = [
        float(both.values.sel(source="derived", edit="set", strength=float(s), example=i) - both.baseline[i])
        for i, s in enumerate(per_example.values)
    ]
    assert row["gain"] == pytest.approx(np.mean(picked), abs=1e-5)
    assert row["gain"] <= chosen.loc[("derived", "set"), "gain"] + 1e-6
    some = both.select([1, 4, 6]).summary(held).set_index(["source", "edit"]).sort_index()
    assert some.loc[("derived", "set"), "gain"] == pytest.approx(np.mean([picked[i] for i in (1, 4, 6)]), abs=1e-5)
    with pytest.raises(ValueError, match="folds=3; expected 2 to 2"):
        both.best(folds=3)
    few = both.select(both.baseline_right.values == 0)
    assert few.values.sizes["example"] == int((both.baseline_right == 0).sum())
    again = ConceptSteering.load(both.save(tmp_path / "steering.nc"))
    assert again.values.equals(both.values) and again.summary().equals(both.summary())
    assert both.plot().data and both.plot(x="kl").data


def test_messages_of_steering() -> None:
    bridge, sae, rows, propositions = fitted()
    p, edit = asked(), SetLatents(sae, propositions)
    with pytest.raises(KeyError, match="no vector for concept 'w9'"):
        steer_all(bridge, p, {"given": ["w9"] * 4}, {"set": edit})
    with pytest.raises(ValueError, match="2 entries for 4 examples"):
        steer_all(bridge, p, {"given": ["w0", None]}, {"set": edit})
    with pytest.raises(KeyError, match="no position 'verb'; it has"):
        steer_all(bridge, p, {"given": ["w0"] * 4}, {"set": edit}, position="verb")
    with pytest.raises(KeyError, match="no label 'country'"):
        steer_all(bridge, p, {"given": ["w0"] * 4}, {"set": edit}, groups="country")
    with pytest.raises(ValueError, match="nothing to steer"):
        steer_all(bridge, p, {}, {"set": edit})
    vectors = propositions.vectors(bridge, sae)
    mixed = dict(vectors) | {"w1": dataclasses.replace(vectors["w1"], hook="blocks.0.hook_resid_pre")}
    with pytest.raises(ValueError, match="expected one hook"):
        VectorEdit(mixed)
    with pytest.raises(ValueError, match="have no token"):
        VectorEdit.means(rows, {"none": torch.zeros(len(rows), dtype=torch.bool)})
    other = TopKSAE(D_MODEL, 24, k=4, hook="blocks.0.hook_resid_pre")
    with pytest.raises(ValueError, match=r"the dictionary is of 'blocks.0.hook_resid_pre'"):
        SetLatents(other, propositions)
    found = steer_all(bridge, p, {"given": ["w0"] * 4}, {"set": edit})
    with pytest.raises(KeyError, match="was not run"):
        found.summary(found.best() * 3)
