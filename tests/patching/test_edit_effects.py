"""The sweep of edits against weights that are really edited, one example at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.patching import EditEffects, edit_sweep, edited_weights, fit_edits
from interp.patching._rank_one import noised
from interp.patching.editing import subject_noise
from interp.prompts import Prompts
from tests.helpers import FAMILIES, N_LAYERS, tiny_bridge, tiny_tokens
from tests.patching.oracle import N, prompts

FIT: dict[str, Any] = {"steps": 5, "max_norm": 1.0}


@pytest.fixture(scope="module")
def facts() -> Prompts:
    p = prompts()
    where = {"subject": p.positions["s1"], "end": p.positions["end"]}
    return replace(p, positions=where, labels={"subject": ["a", "b", "c", "d"]})


@pytest.fixture(scope="module")
def paraphrases(facts: Prompts) -> Prompts:
    """Longer prompts: two about `b`, one about `d`, one whose answer is another, one about nobody."""
    rows = torch.tensor([1, 3, 1, 0, 2])
    clean = tiny_tokens(5, 10, seed=5)
    end, subject = torch.full((5,), 8), torch.tensor([2, 3, 4, 5, 6])
    answers = facts.answers[rows].clone()
    answers[3] = 50
    return Prompts(
        clean,
        clean,
        answers,
        facts.foils[rows],
        {"subject": subject, "end": end},
        {"subject": ["b", "d", "b", "a", "z"]},
    )


def said(bridge: Any, tokens: Tensor, end: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        logits = bridge(tokens)
    rows = torch.arange(len(tokens))
    return logits[rows, end].double().softmax(-1)[rows, targets]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("goal", ["inject", "erase"])
def test_every_measure_is_that_of_edited_weights(family: str, goal: Any, facts: Prompts, paraphrases: Prompts) -> None:
    bridge = tiny_bridge(family)
    found = edit_sweep(bridge, facts, goal=goal, layers=[2, 1], paraphrases=[paraphrases], neighbours=2, **FIT)
    targets = facts.foils if goal == "inject" else facts.answers
    end = facts.positions["end"]
    again = {1: [0, 2], 3: [1]}  # by example
    for layer in (1, 2):
        edits = fit_edits(bridge, facts, layer, goal=goal, **FIT)
        assert np.allclose(found.norms.sel(layer=layer), edits.norms, atol=1e-5)
        cell = found.values.sel(layer=layer)
        for i in range(N):
            others = [j for j in range(N) if j != i]
            asked = [
                (facts.clean[i : i + 1], end[i : i + 1], targets[i : i + 1]),
                (facts.clean[others], end[others], facts.answers[others]),
            ]
            if i in again:
                rows = again[i]
                asked.append((paraphrases.clean[rows], torch.full((len(rows),), 8), targets[i].repeat(len(rows))))
            before = [said(bridge, *one) for one in asked]
            with edited_weights(bridge, edits, i):
                after = [said(bridge, *one) for one in asked]

            def score(k: int, before: list[Tensor] = before, after: list[Tensor] = after) -> float:
                p, q = before[k], after[k]
                return float(((p - q) / p if goal == "erase" else (q - p) / (1 - p)).mean())

            got = {str(name): float(cell.sel(measure=name, example=i)) for name in cell.measure.values}
            assert got["rewrite"] == pytest.approx(score(0), abs=2e-5)
            nats = float((after[0] / before[0]).log()) * (-1 if goal == "erase" else 1)
            assert got["nats"] == pytest.approx(nats, abs=1e-4)
            assert (
                np.isnan(got["paraphrase"])
                if i not in again
                else got["paraphrase"] == pytest.approx(score(2), abs=2e-5)
            )
            kept = (1 - (after[1] - before[1]).abs()).tolist()  # two of the three others, drawn
            pairs = [(kept[a] + kept[b]) / 2 for a, b in ((0, 1), (0, 2), (1, 2))]
            assert min(abs(got["neighbourhood"] - pair) for pair in pairs) < 2e-5
    gained = found.success("nats")
    assert float(gained.min()) > 0 and float(gained.mean()) > 0.01  # a few steps: some examples hardly move yet
    assert found.before.values == pytest.approx(said(bridge, facts.clean, end, targets).numpy(), abs=1e-5)


def test_forcing_is_measured_under_the_noise_it_was_fitted_under(facts: Prompts, paraphrases: Prompts) -> None:
    bridge = tiny_bridge("gpt2")
    found = edit_sweep(
        bridge, facts, goal="force", layers=[1], paraphrases=[paraphrases], neighbours=3, noise=1.0, **FIT
    )
    assert float(found.success("nats").min()) > 0.01
    plain = said(bridge, facts.clean, facts.positions["end"], facts.answers)
    assert abs(found.before.values - plain.numpy()).min() > 1e-5
    assert found.provenance["noise"] == 1.0 and found.goal == "force"
    edits = fit_edits(bridge, facts, 1, goal="force", noise=1.0, **FIT)
    every, end = torch.arange(N), facts.positions["end"]
    for i, row in ((1, [0, 2]), (3, [1])):
        others = [j for j in every.tolist() if j != i]
        near = (facts.clean[others], end[others], facts.answers[others])
        again = (paraphrases.clean[row], torch.full((len(row),), 8), facts.answers[i].repeat(len(row)))
        # the noise that belongs to the example, where its subject stands here; neighbours are asked without any
        where = paraphrases.positions["subject"][row]
        noise = subject_noise(bridge, torch.tensor([i] * len(row)), where, 10, edits.noise_std, edits.seed)
        intact = said(bridge, *near)
        with noised(bridge, noise):
            before = said(bridge, *again)
        with edited_weights(bridge, edits, i):
            kept = 1 - (said(bridge, *near) - intact).abs()
            with noised(bridge, noise):
                gained = (said(bridge, *again) - before) / (1 - before)
        cell = found.values.isel(layer=0, example=i)
        assert float(cell.sel(measure="neighbourhood")) == pytest.approx(float(kept.mean()), abs=2e-5)
        assert float(cell.sel(measure="paraphrase")) == pytest.approx(float(gained.mean()), abs=2e-5)


def test_neighbours_are_drawn_among_others_by_the_seed(facts: Prompts) -> None:
    bridge = tiny_bridge("gpt2")
    options: dict[str, Any] = {"layers": [1], "neighbours": 1, **FIT}
    drawn = [edit_sweep(bridge, facts, **options, seed=seed).success("neighbourhood") for seed in (0, 1, 0)]
    assert drawn[0].identical(drawn[2]) and not drawn[0].identical(drawn[1])
    two = replace(facts[[0, 1]], foils=facts.answers[[1, 0]])  # the only other fact has the answer that is injected
    with pytest.raises(ValueError, match="example 0 has no neighbour"):
        edit_sweep(bridge, two, **options)


def test_result(facts: Prompts, tmp_path: Any) -> None:
    found = edit_sweep(tiny_bridge("llama"), facts, neighbours=1, **FIT)
    assert found.values.dims == ("measure", "layer", "example") and found.values.sizes["layer"] == N_LAYERS
    assert np.isnan(found.success("paraphrase")).all() and found.values.subject.values.tolist() == ["a", "b", "c", "d"]
    interval = found.interval()
    assert np.allclose(interval["estimate"].sel(measure="rewrite"), found.success().mean("example"), atol=1e-6)
    assert np.isnan(interval["low"].sel(measure="paraphrase")).all()
    assert found.success("nats").attrs["unit"] == "nats" and found.success().attrs["unit"] == "score"
    assert list(found.summary()) == ["layer", "rewrite", "paraphrase", "neighbourhood", "nats"]
    figure = found.plot()
    assert "inject" in figure.layout.title.text and "paraphrase" not in str(figure.to_plotly_json()["data"])
    loaded = EditEffects.load(found.save(tmp_path / "e.nc"))
    assert loaded.values.identical(found.values) and loaded.goal == "inject"


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_measure_is_refused(facts: Prompts) -> None:
    found = edit_sweep(tiny_bridge("gpt2"), facts, layers=[1], neighbours=1, **FIT)
    with pytest.raises(ValueError, match="measure='rewritten' is unknown; did you mean 'rewrite'"):
        found.success("rewritten")  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
def test_refusals(facts: Prompts, paraphrases: Prompts) -> None:
    bridge = tiny_bridge("gpt2")
    with pytest.raises(ValueError, match="no paraphrase has the subject and the answer of any example"):
        edit_sweep(bridge, facts, paraphrases=[paraphrases[4]])
    with pytest.raises(ValueError, match=r"labelled \['subject'\], not with 'country'"):
        edit_sweep(bridge, facts, by="country")
    with pytest.raises(ValueError, match="neighbours=-1"):
        edit_sweep(bridge, facts, neighbours=-1)
    with pytest.raises(ValueError, match="example 0 has no neighbour"):
        edit_sweep(bridge, facts[0])
    with pytest.raises(ValueError, match="position='object' is unknown"):
        edit_sweep(bridge, facts, position="object")
    same = edit_sweep(bridge, facts, paraphrases=[replace(facts, labels={"subject": list("abcd")}), paraphrases],
                      layers=[0], neighbours=0, **FIT)  # fmt: skip
    assert np.isnan(same.success("paraphrase").values).ravel().tolist() == [True, False, True, False]
