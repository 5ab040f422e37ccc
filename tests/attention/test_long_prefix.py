"""Prefix matching by length: matches counted by hand, heads with a planted reach, patterns read one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp import results
from interp.attention import PrefixInduction, PrefixSequences, prefix_induction, prefix_sequences
from interp.hooks import hook_name, interventions
from tests.attention.classic_heads import planted_heads
from tests.helpers import FAMILIES, N_HEADS, N_LAYERS, fresh_bridge, tiny_bridge

LENGTHS = (1, 2, 3, 5)


def made(bridge: Any, **options: Any) -> PrefixSequences:
    given = {"n": 6, "lengths": LENGTHS, "gap": 6, "list_length": 9, "tokens": range(3, 48)}
    return prefix_sequences(bridge, **{**given, **options})


def match_length(row: list[int], place: int) -> int:
    """How many words before `place` are those that end the row."""
    length = 0
    while place - 1 - length >= 0 and row[place - 1 - length] == row[len(row) - 1 - length]:
        length += 1
    return length


def answer_found_by(row: list[int], at_least: int) -> int | None:
    """The place after the longest earlier match, if that has the length; a head's rule, written out."""
    best = max(range(1, len(row)), key=lambda place: (match_length(row, place), place))
    return best if match_length(row, best) >= at_least else None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("corrupt", ["later", "earlier"])
@pytest.mark.parametrize("form", ["random", "list"])
def test_matches_are_as_long_as_they_are_said_to_be(form: Any, corrupt: Any, seed: int) -> None:
    sequences = made(tiny_bridge("gpt2"), form=form, corrupt=corrupt, seed=seed, n=8)
    expected = {"intact": lambda n: n, "corrupted": lambda n: 1, "unmatched": lambda n: 0, "competing": lambda n: n}
    assert set(sequences.tokens) == set(expected) - ({"competing"} if form == "list" else set())
    for condition, by_length in sequences.tokens.items():
        assert set(by_length) == (set(LENGTHS) - {1} if condition == "corrupted" else set(LENGTHS))
        for length, tokens in by_length.items():
            for i, row in enumerate(tokens.tolist()):
                place, rival = int(sequences.source[length][i]), sequences.rival
                assert match_length(row, place) == expected[condition](length), condition
                assert row[0] == 0 and 0 not in row[1:]  # BOS, once
                assert row[place] == int(sequences.answers(length)[i])
                assert int(sequences.foils[length][i]) in row and int(sequences.foils[length][i]) != row[place]
                assert row.count(row[place]) == 1 + (form == "list" and place - 1 == len(row) - 1)
                times = {"unmatched": 1, "competing": 3}.get(condition, 2)
                assert row.count(row[-1]) == times
                if condition == "competing" and rival is not None:
                    assert match_length(row, int(rival[i])) == 1
                    assert row[int(rival[i])] == int(sequences.foils[length][i])
                others = [word for word in set(row) if row.count(word) > 1]
                said_again = 0 if condition == "unmatched" else 1 if condition == "corrupted" else length
                assert len(others) == said_again  # nothing else repeats


def test_lengths_of_an_example_differ_in_the_words_named_and_nothing_else() -> None:
    sequences = made(tiny_bridge("gpt2"), n=40)
    intact, longest = sequences.tokens["intact"], LENGTHS[-1]
    for short, long in zip(LENGTHS[:-1], LENGTHS[1:], strict=True):
        changed = (intact[short] != intact[long]).nonzero()[:, 1].unique().tolist()
        end = intact[long].shape[1]
        assert changed == list(range(end - long, end - short))
    for length in LENGTHS[1:]:
        later = (sequences.tokens["corrupted"][length] != intact[length]).nonzero()[:, 1].unique().tolist()
        assert later == list(range(end - length, end - 1))
        earlier = made(tiny_bridge("gpt2"), n=40, corrupt="earlier")
        assert torch.equal(earlier.tokens["intact"][length], intact[length])
        moved = (earlier.tokens["corrupted"][length] != intact[length]).nonzero()
        place = sequences.source[length][moved[:, 0]]
        assert set((place - moved[:, 1]).tolist()) == set(range(2, length + 1))
    rivalled = (sequences.tokens["competing"][longest] != intact[longest]).nonzero()
    assert sequences.rival is not None
    assert torch.equal(rivalled[:, 1], sequences.rival - 1)
    order = sequences.source[1] < sequences.rival
    assert int(order.sum()) == 20  # either is nearer to the query as often
    assert len(set(sequences.source[1].tolist())) > 5  # no fixed distance


@pytest.mark.parametrize(("corrupt", "start"), [("later", 10), ("earlier", 1)])
def test_words_of_a_list_are_corrupted_where_it_is_asked(corrupt: Any, start: int) -> None:
    """BOS, nine words, and the list again from place 10 on."""
    sequences = made(tiny_bridge("gpt2"), form="list", corrupt=corrupt)
    for length in LENGTHS[1:]:
        intact, corrupted = sequences.tokens["intact"][length], sequences.tokens["corrupted"][length]
        assert (intact != corrupted).nonzero()[:, 1].unique().tolist() == list(range(start, start + length - 1))
        assert torch.equal(intact[:, 10:], intact[:, 1 : 1 + length])


@contextmanager
def heads_with_a_reach(bridge: Any, layer: int, reach: dict[int, int]) -> Iterator[None]:
    """Heads of a layer that look, from the last word, at the place after the longest match if it is long enough, at
    position 0 if it is not. They see the tokens that the model is given."""
    seen: list[Tensor] = []
    embedding = bridge.original_model.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda module, given: seen.__setitem__(slice(None), [given[0]]))

    def look(pattern: Tensor) -> Tensor:
        new = pattern.clone()
        for i, row in enumerate(seen[0].tolist()):
            for head, least in reach.items():
                new[i, head, -1] = 0.0
                new[i, head, -1, answer_found_by(row, least) or 0] = 1.0
        return new

    try:
        with interventions(bridge, {hook_name("pattern", layer): look}):
            yield
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_a_planted_reach_is_read_off_the_curve(family: str) -> None:
    bridge = tiny_bridge(family)
    with heads_with_a_reach(bridge, 1, {0: 1, 2: 3}):
        found = prefix_induction(bridge, made(bridge, n=8), layers=[1])
    for head, least in ((0, 1), (2, 3)):
        here = found.values.sel(layer=1, head=head).mean("example")
        for length in LENGTHS:
            reached = float(length >= least)
            assert float(here.sel(score="induction", length=length)) == reached
            if length > 1:
                assert float(here.sel(score="corrupted", length=length)) == float(least == 1)
                assert float(here.sel(score="competing", length=length)) == reached
                assert float(here.sel(score="rival", length=length)) == 0
            assert float(here.sel(score="unmatched", length=length)) == 0
        tie = here.sel(length=1, score=["competing", "rival"]).values
        assert tie.tolist() == ([0.5, 0.5] if least == 1 else [0, 0])  # the nearer one, which takes turns
    table = found.table().set_index("name")
    assert table.index[0] == "L1H2" and set(table["layer"]) == {1}
    long, short = table.loc["L1H2"], table.loc["L1H0"]
    assert (long["short"], long["long"], long["gain"], long["low"], long["corrupted"]) == (0, 1, 1, 1, 0)
    assert (short["short"], short["long"], short["gain"], short["corrupted"]) == (1, 1, 0, 1)
    assert long["p"] < 0.01 < short["p"]
    assert found.table(short=3, long=5).set_index("name").loc["L1H2", "gain"] == 0
    assert float(found.score("drop").sel(layer=1, head=2, length=5).mean()) == 1
    assert found.score("preference").sel(layer=1, head=0, length=[1, 5]).mean("example").values.tolist() == [0, 1]


def test_a_planted_head_that_matches_one_word_cannot_choose_between_two_matches() -> None:
    bridge, places = planted_heads(1)
    layer, head = places["induction"]
    found = prefix_induction(bridge, made(bridge, n=8))
    here = found.values.sel(layer=layer, head=head)
    assert np.allclose(here.sel(score="induction"), 1, atol=1e-3)
    assert np.allclose(here.sel(score="corrupted").isel(length=slice(1, None)), 1, atol=1e-3)
    assert np.allclose(here.sel(score="unmatched"), 0, atol=1e-3)
    both = here.sel(score=["competing", "rival"])
    assert np.allclose(both.sum("score"), 1, atol=1e-3)
    assert float(abs(both - both.isel(length=0, drop=True)).max()) < 1e-2  # rounding decides, never the longer match
    other = places["previous"]  # it does not look there
    assert float(found.values.sel(score="induction", layer=other[0], head=other[1]).max()) < 0.01
    table = found.table().set_index("name").loc[f"L{layer}H{head}"]
    assert abs(table["gain"]) < 1e-3


def count(bridge: Any) -> int:
    return sum(len(point.fwd_hooks) + len(point._forward_hooks) for point in bridge.hook_points())


@pytest.mark.parametrize("form", ["random", "list"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_cells_of_the_cached_pattern(family: str, form: Any) -> None:
    bridge = tiny_bridge(family)
    before = count(bridge)
    sequences = made(bridge, form=form, n=3, lengths=(1, 3))
    found = prefix_induction(bridge, sequences, batch_size=2)
    assert count(bridge) == before
    names = {"intact": "induction", "corrupted": "corrupted", "unmatched": "unmatched", "competing": "competing"}
    for condition, by_length in sequences.tokens.items():
        for length, tokens in by_length.items():
            logits, cache = bridge.run_with_cache(tokens)
            difference = logits[:, -1].gather(1, torch.stack([sequences.answers(length), sequences.foils[length]], 1))
            measured = found.logits.sel(condition=condition, length=length).values
            assert np.allclose(measured, (difference[:, 0] - difference[:, 1]).detach(), atol=1e-4)
            for layer in range(N_LAYERS):
                pattern = cache[hook_name("pattern", layer)][:, :, -1]
                cells = {names[condition]: sequences.source[length]}
                if condition == "competing" and sequences.rival is not None:
                    cells["rival"] = sequences.rival
                for score, place in cells.items():
                    expected = pattern[torch.arange(3), :, place].T
                    mine = found.values.sel(score=score, length=length, layer=layer).values
                    assert np.allclose(mine, expected.detach(), atol=1e-5)
    assert np.isnan(found.values.sel(score="corrupted", length=1)).all()
    if form == "list":
        assert np.isnan(found.values.sel(score=["competing", "rival"])).all()
        assert np.isnan(found.logits.sel(condition="competing")).all()
    assert np.allclose(found.chance, [1 / sequences.tokens["intact"][n].shape[1] for n in (1, 3)])
    conditions = sum(len(by_length) for by_length in sequences.tokens.values())
    assert found.provenance["cost"]["forwards"] == 2 * conditions


def test_layers_left_out_are_nan_and_results_are_kept(tmp_path: Path) -> None:
    bridge = tiny_bridge("llama")
    found = prefix_induction(bridge, made(bridge), layers=[2])
    assert np.isnan(found.values.sel(layer=[0, 1])).all()
    assert list(found.table()["layer"].unique()) == [2] and len(found.table()) == N_HEADS
    again = results.load(found.save(tmp_path / "prefix.nc"))
    assert isinstance(again, PrefixInduction)
    assert np.array_equal(again.values, found.values, equal_nan=True) and again.logits.equals(found.logits)
    bounds = found.interval("preference").sel(length=5, layer=2, head=1)
    assert float(bounds["low"]) <= float(bounds["estimate"]) <= float(bounds["high"])
    mean = found.score("preference").sel(length=5, layer=2, head=1).mean()
    assert float(bounds["estimate"]) == pytest.approx(float(mean), abs=1e-6)


def test_figures_show_the_heads_asked_for() -> None:
    bridge = tiny_bridge("gpt2")
    found = prefix_induction(bridge, made(bridge))
    curves = {trace.name for trace in found.plot(heads=["L0H1", "L2H3"]).data if trace.showlegend is not False}
    assert {"L0H1", "L2H3"} <= curves
    assert len(found.plot("preference", k=3).data) >= 3
    with pytest.raises(KeyError, match="no heads .'L7H1'."):
        found.plot(heads=["L7H1"])


def test_what_is_refused(unchecked: None) -> None:
    bridge = tiny_bridge("gpt2")
    with pytest.raises(ValueError, match=r"lengths=\[0\], gap=6; expected matches of 1 word or more"):
        made(bridge, lengths=[0])
    with pytest.raises(ValueError, match=r"form='words'; expected one of 'random', 'list'"):
        made(bridge, form="words")
    with pytest.raises(ValueError, match="corrupt='both'; expected one of 'later', 'earlier'"):
        made(bridge, corrupt="both")
    with pytest.raises(ValueError, match="list_length=6 with matches of 5; expected at least 7 words"):
        made(bridge, form="list", list_length=6)
    with pytest.raises(ValueError, match="matches of 20 need 88 different words and the context of this model is 64"):
        made(bridge, lengths=[20])
    found = prefix_induction(bridge, made(bridge, lengths=(1, 2)))
    with pytest.raises(KeyError, match="no score 'reach'; there is 'induction'"):
        found.score("reach")
    with pytest.raises(ValueError, match="short=1, long=5; expected two different ones of 1, 2"):
        found.table(long=5)
    training = fresh_bridge("gpt2")
    training.train()
    with pytest.raises(RuntimeError):
        prefix_induction(training, made(bridge))
