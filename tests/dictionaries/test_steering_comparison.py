"""Comparing steering methods: scores against their definitions, a planted winner, pairing, intervals, and the cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import interp
from interp.dictionaries import (
    Concept,
    SteeringComparison,
    SteeringVector,
    compare_steering,
    fluency,
    generate_steered,
    harmonic_mean,
    label_log_odds,
    random_directions,
    relative_fluency,
    steer,
    strength_for_kl,
)
from interp.dictionaries._crossed import crossed_interval
from interp.hooks import generate, hook_name
from interp.stats import bootstrap_interval
from tests.helpers import D_MODEL, D_VOCAB, FAMILIES, fresh_bridge, tiny_bridge, tiny_model, tiny_tokenizer, tiny_tokens

HOOK = hook_name("resid_post", 2)
LABELS = {"a": (11, 12, 13), "b": (30, 31), "c": (45,)}
TARGETS = (0.05, 0.5)


def concepts() -> list[Concept]:
    return [Concept.from_tokens(name, tokens, D_VOCAB, reference=0.5) for name, tokens in LABELS.items()]


def planted(bridge: Any, *, hook: str = HOOK) -> dict[str, SteeringVector]:
    """Behind the last block the logits are nearly linear: the label tokens' own unembeddings raise them."""
    unembed = bridge.unembed.W_U.detach().float()  # [d_model, d_vocab]
    found = {}
    for name, tokens in LABELS.items():
        values = unembed[:, list(tokens)].mean(1) - unembed.mean(1)
        found[name] = SteeringVector(values, hook, name, "diff_means")
    return found


def blunt(bridge: Any) -> dict[str, list[SteeringVector]]:
    """The planted directions under so much noise that little is left of them; one per draw."""
    return {
        name: [
            SteeringVector(0.3 * vector.values + noise.values, HOOK, name, "noisy")
            for noise in random_directions(3, like=vector, seed=len(name) + 5)
        ]
        for name, vector in planted(bridge).items()
    }


def compare(bridge: Any, **options: Any) -> SteeringComparison:
    given = {
        "neutral": tiny_tokens(6, 5, seed=1), "targets": TARGETS, "draws": 3, "n_tokens": 4, "top_k": None,
        "top_p": None, **options,
    }  # fmt: skip
    vectors = given.pop("vectors", {"diff_means": planted(bridge), "noisy": blunt(bridge)})
    return compare_steering(bridge, vectors, given.pop("concepts", concepts()), tiny_tokens(8, 5, seed=2), **given)


@pytest.fixture(scope="module")
def llama() -> SteeringComparison:
    return compare(tiny_bridge("llama"))


def test_scores_of_text_and_predictions() -> None:
    log_probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert float(label_log_odds(log_probs, [1, 3])) == pytest.approx(math.log(0.35 / 0.65), abs=1e-6)
    torch.testing.assert_close(label_log_odds(log_probs + 7.0, [0]), torch.tensor(0.0), atol=1e-6, rtol=0)
    concept = Concept.from_tokens("x", [1, 2], 5)
    torch.testing.assert_close(concept.of_text(torch.tensor([[0, 1, 2, 1], [3, 3, 3, 2]])), torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(
        harmonic_mean(torch.tensor([1.0, 0.5, 0.0, 0.7]), torch.tensor([1.0, 0.25, 0.9, 0.0])),
        torch.tensor([1.0, 1 / 3, 0.0, 0.0]),
    )
    # perplexities 8 and 16 nats apart by log 2; more fluent than the model itself counts as 1
    both = relative_fluency(torch.tensor([-math.log(16), -1.0]), torch.tensor(-math.log(8)))
    torch.testing.assert_close(both, torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match="0 or more"):
        harmonic_mean(torch.tensor([-0.1]), torch.tensor([0.5]))


def test_a_classifier_from_labels_counts() -> None:
    ids = torch.tensor([[1, 2, 2, 3, 0], [2, 3, 4, 4, 0]])
    labelled = torch.tensor([[True, True, True, False, True], [False, False, False, True, True]])
    known = ids != 0  # padding is not counted, whatever it is labelled
    concept = Concept.from_labels("x", ids, labelled, 6, known=known)
    torch.testing.assert_close(concept.weights, torch.tensor([0, 1, 2 / 3, 0, 0.5, 0]))
    assert concept.tokens == (1, 2)
    assert concept.reference == pytest.approx((1 + 2 / 3 + 2 / 3 + 0.5) / 4)
    with pytest.raises(ValueError, match="0 of 8 tokens are labelled 'y'"):
        Concept.from_labels("y", ids, torch.zeros_like(labelled), 6, known=known)
    with pytest.raises(ValueError, match="not in single tokens"):
        Concept.from_labels("y", torch.tensor([1, 1, 2, 2]), torch.tensor([True, False, True, False]), 6)
    with pytest.raises(ValueError, match="expected some, not all, of 0 to 4"):
        Concept.from_tokens("z", range(5), 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_fluency_is_the_log_probability_of_what_was_written(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(3, 8)
    with torch.no_grad():
        log_probs = bridge(tokens).log_softmax(-1)
    for prompt_length in (1, 5):
        expected = torch.stack(
            [log_probs[:, p - 1][torch.arange(3), tokens[:, p]] for p in range(prompt_length, 8)]
        ).mean(0)
        torch.testing.assert_close(fluency(bridge, tokens, prompt_length, batch_size=2), expected)
    with pytest.raises(ValueError, match="expected 1 to 7"):
        fluency(bridge, tokens, 8)


def test_every_number_is_what_its_definition_gives(llama: SteeringComparison) -> None:
    bridge, neutral, prompts = tiny_bridge("llama"), tiny_tokens(6, 5, seed=1), tiny_tokens(8, 5, seed=2)
    found = strength_for_kl(bridge, list(planted(bridge).values()), neutral, TARGETS)
    own = llama.strength.sel({"approach": "diff_means", "draw": 0})
    np.testing.assert_allclose(own, found.values, rtol=1e-3)
    assert not bool(llama.strength.isnull().any())
    relative = llama.achieved.sel({"approach": "noisy"}) / llama.achieved["target"] - 1
    assert float(abs(relative).max()) <= 0.05
    base_text = float(llama.unsteered.sel({"score": "text", "concept": "b"}).mean())
    base_log_prob = float(llama.unsteered.sel({"score": "log_prob", "concept": "b"}).mean())
    for approach, draw, vector in (("diff_means", 1, planted(bridge)["b"]), ("noisy", 2, blunt(bridge)["b"][2])):
        cell = {"approach": approach, "concept": "b", "draw": draw, "target": 0.5}
        got = {name: llama.values.sel({**cell, "score": name}).to_numpy() for name in llama.values["score"].values}
        strength = float(llama.strength.sel(cell))
        with torch.no_grad():
            base = label_log_odds(bridge(prompts)[:, -1], LABELS["b"])
            with steer(bridge, vector, strength):
                odds = label_log_odds(bridge(prompts)[:, -1], LABELS["b"]) - base
        np.testing.assert_allclose(got["log_odds"], odds, atol=2e-4, rtol=1e-4)
        written = torch.tensor(llama.written.sel(cell).to_numpy()).long()
        text = torch.isin(written, torch.tensor(LABELS["b"])).float().mean(1)
        log_prob = fluency(bridge, torch.cat([prompts, written], 1), 5)
        np.testing.assert_allclose(got["text"], text)
        np.testing.assert_allclose(got["log_prob"], log_prob, atol=1e-4)
        reach = ((text - base_text) / (0.5 - base_text)).clamp(0, 1)
        fluent = (log_prob - base_log_prob).exp().clamp(max=1)
        np.testing.assert_allclose(got["concept"], reach, atol=1e-5)
        np.testing.assert_allclose(got["fluency"], fluent, rtol=1e-3)
        np.testing.assert_allclose(got["harmonic"], 2 * reach * fluent / (reach + fluent), rtol=1e-3, atol=1e-5)


def test_the_planted_direction_wins_at_equal_divergence(llama: SteeringComparison) -> None:
    frame = llama.summary().set_index(["score", "approach", "target"])
    for target in TARGETS:
        best, noisy, random = (frame.loc["log_odds", name, target] for name in ("diff_means", "noisy", "random"))
        assert best["low"] > max(noisy["high"], 0) and noisy["mean"] > random["mean"]
        assert random["low"] < 0.3 < best["low"]
    gaps = llama.differences("log_odds").set_index(["approach", "target"])
    assert bool((gaps["high"] < 0).all()) and bool((gaps["n_concepts"] == 3).all())
    assert bool((gaps["p"] == 0.25).all())  # three concepts: 2 of 8 patterns of signs are as extreme
    assert frame.loc["text", "diff_means", 0.5]["mean"] > frame.loc["text", "random", 0.5]["mean"]


def test_differences_are_paired(llama: SteeringComparison) -> None:
    values = llama.values.sel(score="log_odds")
    gap = (values.sel({"approach": "noisy"}) - values.sel({"approach": "diff_means"})).transpose(
        "target", "concept", "draw", "example"
    )
    frame = llama.differences("log_odds")
    rows = frame[frame["approach"] == "noisy"]
    interval = crossed_interval(gap.to_numpy().astype(float))
    np.testing.assert_allclose(rows["difference"], gap.mean(["concept", "draw", "example"]), rtol=1e-5)
    np.testing.assert_allclose(rows["low"], interval.low)
    other = llama.differences("log_odds", reference="noisy")
    flipped = other[other["approach"] == "diff_means"]
    np.testing.assert_allclose(flipped["difference"], -rows["difference"], rtol=1e-6)
    assert set(other["approach"]) == {"diff_means", "random"}


def test_the_best_strength_is_chosen_on_other_prompts(llama: SteeringComparison) -> None:
    frame = llama.best("log_odds").set_index("approach")["mean"]
    values = llama.values.sel(score="log_odds")
    same = values.mean(["draw", "example"]).max("target").mean("concept")  # chosen and scored on the same texts
    for name in ("diff_means", "noisy", "random"):
        assert frame[name] <= float(same.sel({"approach": name})) + 1e-5
    top = values.sel({"approach": "diff_means", "target": 0.5}).mean()  # here the largest target is the best one
    assert frame["diff_means"] == pytest.approx(float(top), rel=1e-5)


def test_greedy_text_is_written_once_and_counts_for_all_draws() -> None:
    bridge, prompts = fresh_bridge("gpt2"), tiny_tokens(8, 5, seed=2)
    options = {"temperature": 0.0, "vectors": {"diff_means": planted(bridge)}, "targets": (0.3,)}
    compare(bridge, **options)  # what is probed once
    calls: list[int] = []
    handle = bridge.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0])))
    result = compare(bridge, **options)
    handle.remove()
    assert len(calls) == result.provenance["forwards"]
    written = result.written.sel({"approach": "diff_means"})
    assert bool((written == written.isel(draw=0)).all())
    found = strength_for_kl(bridge, list(planted(bridge).values()), tiny_tokens(6, 5, seed=1), (0.3,))
    for c, vector in enumerate(planted(bridge).values()):
        by_hand = generate_steered(bridge, prompts, 4, vector, float(found.values[c, 0]))[0, :, 5:]
        assert torch.equal(torch.tensor(written[c, 0, 0].to_numpy()).long(), by_hand)
    texts = 8 * (3 + 3 * 3)  # one per concept, and one per concept and draw of the random directions
    assert calls.count(texts) == 4 + 1  # four tokens, and scoring them, all in one batch
    base = generate(bridge, prompts, 4)[:, 5:]
    share = torch.isin(base, torch.tensor(LABELS["a"])).float().mean(1)
    np.testing.assert_allclose(result.unsteered.sel({"score": "text", "concept": "a", "draw": 1}), share)


def test_unreached_targets_are_empty_and_left_out(llama: SteeringComparison) -> None:
    bridge = tiny_bridge("gpt2")
    result = compare(bridge, targets=(0.1, 400.0), vectors={"diff_means": planted(bridge)}, temperature=0.0, draws=2)
    assert bool(result.strength.sel(target=400.0).isnull().all())
    assert bool(result.values.sel(target=400.0).isnull().all()) and bool((result.written.sel(target=400.0) == -1).all())
    assert 0.5 < float(result.achieved.sel(target=400.0).min()) < 400
    frame = result.summary().set_index(["score", "approach", "target"])
    assert frame.loc["concept", "random", 400.0]["reached"] == 0 and math.isnan(
        frame.loc["concept", "random", 400.0]["mean"]
    )
    assert result.table().loc["diff_means", 400.0] == "-" and "[" in result.table().loc["diff_means", 0.1]
    assert result.differences()["difference"].isna().tolist() == [False, True]
    assert len(result.texts(bridge.tokenizer, approach="random", target=400.0)) == 0
    for trace in result.plot().data:  # bars for what was reached, and no others
        assert list(trace.x) == ["0.1"] and len(trace.y) == 1


def test_text_written_elsewhere_than_in_the_prompt_is_searched_at_the_last_position() -> None:
    bridge = tiny_bridge("llama")
    early = planted(bridge, hook=hook_name("resid_post", 0))  # where other positions than the last one count
    options: dict[str, Any] = {"vectors": {"diff_means": early}, "temperature": 0.0, "draws": 1, "targets": (0.2,)}
    result = compare(bridge, positions="generated", **options)
    neutral, vectors = tiny_tokens(6, 5, seed=1), list(early.values())
    last, everywhere = (strength_for_kl(bridge, vectors, neutral, (0.2,), positions=at) for at in ("last", "all"))
    np.testing.assert_allclose(result.strength.sel({"approach": "diff_means"})[:, 0, 0], last.values[:, 0], rtol=1e-3)
    assert float(abs(everywhere.values / last.values - 1).max()) > 0.05
    by_hand = generate_steered(
        bridge, tiny_tokens(8, 5, seed=2), 4, vectors[0], float(last.values[0, 0]), positions="generated"
    )
    np.testing.assert_array_equal(result.written[0, 0, 0, 0], by_hand[0, :, 5:])


def test_methods_at_different_hooks_go_into_one_table() -> None:
    bridge = tiny_bridge("gemma2")
    early = {name: SteeringVector(torch.randn(48), hook_name("neuron", 0), name, "snmf") for name in LABELS}
    result = compare(
        bridge, vectors={"diff_means": planted(bridge), "SNMF": early}, draws=1, targets=(0.02,), n_tokens=2
    )
    assert result.provenance["hooks"] == {"diff_means": [HOOK], "SNMF": ["blocks.0.mlp.hook_post"], "random": [HOOK]}
    assert result.provenance["kinds"]["SNMF"] == "snmf"
    assert bool(result.strength.notnull().all()) and result.values.sizes["approach"] == 3


def test_result_is_saved_drawn_and_read(llama: SteeringComparison, tmp_path) -> None:
    again = SteeringComparison.load(llama.save(tmp_path / "comparison.nc"))
    assert again.values.equals(llama.values) and again.table().equals(llama.table())
    shown = [llama.plot("log_odds"), llama.plot("log_odds", paired=True)]
    for figure in shown:
        assert [bar.name for bar in figure.data] == ["diff_means", "noisy", "random"]
    assert [bar.marker.color for bar in shown[0].data] == [bar.marker.color for bar in shown[1].data]
    assert list(shown[1].data[0].y) == [0.0, 0.0] and max(shown[1].data[2].y) < 0
    np.testing.assert_allclose(
        shown[0].data[1].y,
        llama.values.sel(score="log_odds").sel({"approach": "noisy"}).mean(["concept", "draw", "example"]),
        rtol=1e-5,
    )
    texts = llama.texts(tiny_bridge("llama").tokenizer, approach="noisy", concept="a", target=0.5)
    assert len(texts) == 3 * 8 and all(len(text.split()) == 4 for text in texts["text"])
    assert "approach" in llama.to_dataframe().columns
    with pytest.raises(ValueError, match="no score 'fluent'"):
        llama.table("fluent")
    with pytest.raises(ValueError, match="no method 'SAE'"):
        llama.differences(reference="SAE")


def test_one_factor_alone_is_the_ordinary_bootstrap() -> None:
    values = np.random.default_rng(0).normal(1, 2, (3, 40))
    plain = bootstrap_interval(values, n_resamples=4000)
    for factor in (values[:, :, None, None], values[:, None, :, None], values[:, None, None, :]):
        crossed = crossed_interval(factor, n_resamples=4000)  # concepts, draws or prompts: each is resampled
        np.testing.assert_allclose(crossed.estimate, plain.estimate)
        for a, b in ((crossed.low, plain.low), (crossed.high, plain.high)):
            np.testing.assert_allclose(a, b, atol=0.06)
    alone = crossed_interval(values[:, :1, None, None])
    assert np.isnan(alone.low).all()
    gap = values.copy()[:, None, None, :]
    gap[0, ..., :20] = np.nan
    np.testing.assert_allclose(crossed_interval(gap).estimate[0], np.nanmean(gap[0]))
    assert np.isnan(crossed_interval(np.full((1, 2, 2, 3), np.nan)).low).all()


def test_crossed_intervals_hold_the_truth_where_single_cells_do_not() -> None:
    """Concepts differ by far more than prompts: cells are not independent evidence."""
    draws = np.random.default_rng(3)
    held = {"crossed": 0, "cells": 0}
    for _ in range(80):
        cells = draws.normal(0, 1, (12, 1, 1)) + draws.normal(0, 0.3, (1, 1, 10)) + draws.normal(0, 0.3, (12, 3, 10))
        interval = crossed_interval(cells, n_resamples=300)
        held["crossed"] += int(interval.low <= 0 <= interval.high)
        naive = bootstrap_interval(cells.reshape(-1), n_resamples=300)
        held["cells"] += int(naive.low <= 0 <= naive.high)
    assert held["crossed"] >= 68 and held["cells"] < 40, held


def test_what_cannot_be_compared_is_said_before_any_forward(unchecked: None) -> None:
    bridge = tiny_bridge("llama")
    good = planted(bridge)
    padded: Tensor = tiny_tokens(3, 5)
    padded[1, 3:] = 1
    cases: list[tuple[dict[str, Any], str]] = [
        ({"vectors": {"SNMF": good}}, "no method 'diff_means' among 'SNMF'"),
        ({"vectors": {"diff_means": good, "random": good}}, "'random' is added"),
        ({"vectors": {"diff_means": {"a": good["a"]}}}, "no vector for 'b', 'c'"),
        ({"vectors": {"diff_means": {**good, "a": [good["a"]] * 2}}}, r"2 vectors for 'a'; expected 1, or .* \(3\)"),
        ({"vectors": {"diff_means": {**good, "a": SteeringVector(torch.ones(3), HOOK)}}}, r"holds \(32,\) per token"),
        ({"concepts": []}, "at least one"),
        ({"concepts": concepts()[:1] * 2}, "each name once"),
        ({"concepts": [Concept.from_tokens("a", [1], 9)]}, "weighs 9 tokens, the model has 60"),
        ({"draws": 0}, "draws=0"),
        ({"neutral": padded}, "end in the padding token"),
        ({"targets": (0.1, -1.0)}, "divergences above 0"),
        ({"n_tokens": 90}, "exceed this model's context of 64"),
        ({"temperature": 0.0, "top_k": 3, "n_tokens": 0}, "n_tokens=0"),
        ({"concepts": [Concept.from_tokens("a", range(59), 60, reference=0.1)]}, "no way up"),
        ({"neutral": padded[0]}, r"\[example, pos\]"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            compare(bridge, **change)
    assert good["a"].values.shape == (D_MODEL,)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_devices_and_types_give_the_same_strengths(device: str, dtype: str) -> None:
    bridge = interp.load_model(tiny_model("llama"), tokenizer=tiny_tokenizer(), device=device, dtype=dtype, check=False)
    reference = tiny_bridge("llama")
    options: dict[str, Any] = {"temperature": 0.0, "targets": (0.5,), "draws": 1, "n_tokens": 2}
    found = compare(bridge, vectors={"diff_means": planted(bridge)}, **options)
    expected = compare(reference, vectors={"diff_means": planted(reference)}, **options)
    assert found.provenance["device"] == device and found.provenance["dtype"] == dtype
    room = 0.02 if dtype == "float32" else 0.15
    np.testing.assert_allclose(found.strength, expected.strength, rtol=room)
    assert float(abs(found.achieved / 0.5 - 1).max()) <= 0.05
    odds = [result.values.sel(score="log_odds").mean("example") for result in (found, expected)]
    np.testing.assert_allclose(*odds, rtol=2 * room, atol=2 * room)
