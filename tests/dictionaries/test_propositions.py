"""Propositions: planted latents and thresholds, brute force, controls, reading, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.dictionaries import (
    Propositions,
    TokenRows,
    TopKSAE,
    diff_means,
    fit_propositions,
    latent_vectors,
    token_rows,
)
from interp.dictionaries._threshold_fit import best_thresholds
from tests.helpers import D_MODEL, FAMILIES, tiny_bridge, tiny_tokens

HOOK = "blocks.1.hook_resid_pre"


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def made_rows(values: Tensor, per_document: int = 10, hook: str = HOOK) -> TokenRows:
    n = len(values)
    tokens = torch.arange(n).reshape(-1, per_document) % 50
    at = torch.arange(n)
    return TokenRows(values, tokens, at // per_document, at % per_document, hook, {"hook": hook})


@pytest.fixture(scope="module")
def planted() -> tuple[TokenRows, dict[str, Tensor], Tensor]:
    """Latent 3 is above 1 exactly where "one" is; 5 and 7 are on in a half each of "two"; the others are noise."""
    n = 800
    one, two, half = draws(n) < 0.2, draws(n, seed=1) < 0.3, draws(n, seed=2) < 0.5
    latents = 0.5 * draws(n, 40, seed=3)
    latents[:, 3] = draws(n, seed=4) * 0.9 + 1.1 * one
    latents[:, 5], latents[:, 7] = (two & half) * (1 + draws(n, seed=5)), (two & ~half) * (1 + draws(n, seed=6))
    return made_rows(latents), {"one": one, "two": two}, latents


def test_planted_latents_are_found_and_controls_are_not(planted: tuple) -> None:
    rows, masks, _ = planted
    single, several = (fit_propositions(lambda x: x, rows, masks, k=k, seed=1) for k in (1, 3))
    assert single.latents.values[0] == 3 and single.latents.values[1] in (5, 7)
    assert 0.85 < float(single.thresholds[0, 0]) < 1.15
    f1 = single.values.sel(score="f1")
    assert float(f1.sel(concept="one", arm="latents")) > 0.97
    assert float(f1.sel(concept="two", arm="latents")) < 0.8  # one latent has half of it
    assert several.latents.values[1, :2].tolist() in ([5, 7], [7, 5])
    assert float(several.values.sel(concept="two", arm="latents", score="f1")) == 1.0
    assert several.latents.values[1, 2] == -1 and np.isnan(several.thresholds.values[1, 2])  # nothing left to gain
    chance = {"one": 2 * 0.2 / 1.2, "two": 2 * 0.3 / 1.3}  # of saying that it always holds
    for name, best in chance.items():
        for arm in ("random latents", "shuffled labels"):
            assert float(f1.sel(concept=name, arm=arm)) < best + 0.08, (name, arm)
    assert float(f1.sel(concept="one", arm="DiffMeans")) > 0.8
    table = several.to_dataframe()
    assert table["positives"].tolist() == [int(mask.sum()) for mask in masks.values()]
    assert several.summary().set_index("arm").loc["latents", "f1"] == pytest.approx(table["f1"].mean(), abs=1e-6)
    assert float(several.typical[0, 0]) == pytest.approx(1.55, abs=0.1)  # the mean where the label is


def test_thresholds_are_those_of_trying_all(planted: tuple) -> None:
    scores = (8 * draws(60, 4)).round()  # many ties
    truth, covered = draws(60, 3, seed=8) < 0.4, draws(60, 3, seed=9) < 0.2

    def f1(held: Tensor, label: Tensor) -> float:
        return float(2 * (held & label).sum() / (held.sum() + label.sum()))

    for before in (None, covered):
        found, limits = best_thresholds(scores, truth, before)
        for label in range(3):
            given = torch.zeros(60, dtype=torch.bool) if before is None else before[:, label]
            for unit in range(4):
                column = scores[:, unit]
                levels = column.unique()[:-1]  # a threshold below all is none
                tried = [f1((column > level) | given, truth[:, label]) for level in levels]
                assert float(found[label, unit]) == pytest.approx(max(tried))
                assert f1((column > limits[label, unit]) | given, truth[:, label]) == pytest.approx(max(tried))
    flat, none = best_thresholds(torch.ones(5, 1), torch.tensor([[True], [False], [True], [True], [True]]))
    assert flat.item() == 0 and not (torch.ones(5) > none[0, 0]).any()  # a constant unit says nothing


def test_scores_are_of_the_documents_that_did_not_choose(planted: tuple) -> None:
    """A latent that names the tokens of one half of the documents is chosen only if that half chooses."""
    rows, masks, latents = planted
    first = fit_propositions(lambda x: x, rows, masks, seed=0)
    chooses = torch.zeros(len(rows.tokens), dtype=torch.bool)
    kinds = torch.Generator().manual_seed(0)
    chooses[torch.randperm(len(rows.tokens), generator=kinds) < len(rows.tokens) / 2] = True
    leaked = latents.clone()
    leaked[:, 0] = 9.0 * (masks["two"] & chooses[rows.row])
    found = fit_propositions(lambda x: x, made_rows(leaked), masks, seed=0)
    assert found.latents.values[1, 0] == 0
    assert float(found.values.sel(concept="two", arm="latents", score="recall")) == 0.0
    assert np.isnan(float(found.values.sel(concept="two", arm="latents", score="precision")))
    assert int(first.positives[1, 0]) == int((masks["two"] & chooses[rows.row]).sum())


def test_numbers_of_diff_means_by_hand(planted: tuple) -> None:
    rows, masks, latents = planted
    found = fit_propositions(lambda x: x, rows, masks, seed=0, n_random=0, n_shuffles=0)
    order = torch.randperm(len(rows.tokens), generator=torch.Generator().manual_seed(0))
    choosing = (order < len(rows.tokens) / 2)[rows.row]
    for name, mask in masks.items():
        vector = diff_means(latents[choosing & mask], latents[choosing & ~mask], hook=HOOK)
        along = latents @ vector.values
        _, limit = best_thresholds(along[choosing][:, None], mask[choosing][:, None])
        held, truth = along[~choosing] > limit[0, 0], mask[~choosing]
        expected = float(2 * (held & truth).sum() / (held.sum() + truth.sum()))
        assert float(found.values.sel(concept=name, arm="DiffMeans", score="f1")) == pytest.approx(expected, abs=1e-6)
    assert bool(found.values.sel(arm=["random latents", "shuffled labels"]).isnull().all())


def test_no_latent_stands_for_two_concepts_when_asked(planted: tuple) -> None:
    rows, masks, _ = planted
    twice = {"one": masks["one"], "again": masks["one"]}
    assert fit_propositions(lambda x: x, rows, twice).latents.values.tolist() == [[3], [3]]
    assert len(set(fit_propositions(lambda x: x, rows, twice, unique=True).latents.values.ravel())) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_a_dictionary_of_a_model(family: str) -> None:
    """What is read is what encoding and comparing by hand gives; at any kept token, or at one place."""
    bridge, tokens = tiny_bridge(family), tiny_tokens(24, 8)
    sae = TopKSAE(D_MODEL, 24, k=4, hook=HOOK, decoder_norm=1.0).requires_grad_(False)
    rows = token_rows(bridge, tokens, HOOK, skip_tokens=[0])
    masks = {f"w{i}": rows.ids % 3 == i for i in range(3)}
    found = fit_propositions(sae, rows, masks, k=2, n_random=1, n_shuffles=1)
    latents = sae.encode(rows.values)
    at = torch.full((24,), 5)
    anywhere, there = found.read(sae, rows), found.read(sae, rows, positions=at)
    assert anywhere.dims == ("text", "concept") and anywhere.dtype == np.bool_
    for c, (members, limits) in enumerate(zip(found.latents.values, found.thresholds.values, strict=True)):
        held = torch.zeros(len(rows), dtype=torch.bool)
        for member, limit in zip(members, limits, strict=True):
            held |= (latents[:, member] > float(limit)) if member >= 0 else False
        for text in range(24):
            assert bool(anywhere[text, c]) == bool(held[rows.row == text].any())
            assert bool(there[text, c]) == bool(held[(rows.row == text) & (rows.position == 5)].any())
    assert not bool(found.read(sae, rows, positions=torch.zeros(24, dtype=torch.long)).any())  # BOS has no row
    vectors = found.vectors(bridge, sae)
    used = [int(m) for m in found.latents.values[0] if m >= 0]
    parts = latent_vectors(bridge, sae, used)
    total = sum(float(a) * p.values for a, p in zip(found.typical.values[0], parts, strict=False))
    assert torch.allclose(vectors["w0"].values, total, atol=1e-5) and vectors["w0"].hook == HOOK


def test_saved_and_shown(planted: tuple, tmp_path: Path) -> None:
    rows, masks, _ = planted
    found = fit_propositions(lambda x: x, rows, masks, k=2)
    again = Propositions.load(found.save(tmp_path / "propositions.nc"))
    assert again.concepts == ["one", "two"] and again.read(lambda x: x, rows).equals(found.read(lambda x: x, rows))
    np.testing.assert_array_equal(again.thresholds.values, found.thresholds.values)
    assert "2 concepts" in repr(found) and found.plot().data


def test_messages(planted: tuple) -> None:
    rows, masks, _ = planted
    with pytest.raises(ValueError, match="give more documents"):
        fit_propositions(lambda x: x, rows, {"rare": torch.arange(800) < 3})
    with pytest.raises(ValueError, match="k=0; expected 1 to 40"):
        fit_propositions(lambda x: x, rows, masks, k=0)
    with pytest.raises(ValueError, match="use k=1"):
        fit_propositions(lambda x: x, rows, masks, k=2, unique=True)
    with pytest.raises(ValueError, match="expected no more"):
        fit_propositions(lambda x: x[:, 3:4], rows, masks, unique=True)
    sae = TopKSAE(40, 24, k=4, hook="blocks.0.hook_resid_pre")
    with pytest.raises(ValueError, match=r"reads 'blocks.0.hook_resid_pre' and the rows are of 'blocks.1"):
        fit_propositions(sae, rows, masks)
    found = fit_propositions(lambda x: x, rows, masks)
    with pytest.raises(ValueError, match="2 positions for 80 texts"):
        found.read(lambda x: x, rows, positions=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="does not exist"):
        found.read(lambda x: x[:, :3], rows)
    bridge = tiny_bridge("llama")
    layered = TopKSAE(D_MODEL, 24, k=4, hook=HOOK, normalisation="layer_norm").requires_grad_(False)
    real = token_rows(bridge, tiny_tokens(24, 8), HOOK, skip_tokens=[0])
    fitted = fit_propositions(layered, real, {"w": real.ids % 2 == 0})
    with pytest.raises(ValueError, match="another length at every token"):
        fitted.vectors(bridge, layered)
