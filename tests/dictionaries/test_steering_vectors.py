"""Directions from activations: planted answers, and the known ways in which they go wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from interp.cache import capture
from interp.dictionaries import (
    SteeringVector,
    choose_feature,
    covariance_direction,
    dictionary_vectors,
    diff_means,
    fit_probe,
    last_activations,
    principal_direction,
    random_directions,
    reading_direction,
)
from interp.dictionaries.vectors import separation
from interp.hooks import hook_name
from tests.helpers import tiny_bridge, tiny_tokens

HOOK = "blocks.1.hook_resid_post"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cos(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


@pytest.fixture
def planted() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs that differ by 2 along a contrast, and by +-6 along a nuisance, on top of a large mean activation."""
    contrast, nuisance, mean = torch.eye(24)[0], torch.eye(24)[1], 15 * torch.eye(24)[2]
    shared = normal(200, 24, seed=1) + mean
    swings = 6 * torch.sign(normal(200, 1, seed=2))
    swings -= swings.mean()
    positive = shared + 2 * contrast + swings * nuisance + 0.1 * normal(200, 24, seed=3)
    return positive, shared, contrast, nuisance


def test_difference_in_means_is_the_planted_contrast(planted) -> None:
    positive, negative, contrast, _ = planted
    vector = diff_means(positive, negative, hook=HOOK, name="sea")
    assert cos(vector.values, contrast) > 0.99 and vector.norm == pytest.approx(2, rel=0.05)
    assert (vector.kind, vector.name, vector.hook) == ("diff_means", "sea", HOOK)
    assert vector.unit().norm == pytest.approx(1) and cos(vector.reversed().values, contrast) < -0.99
    heads = diff_means(positive.reshape(-1, 4, 6), negative.reshape(-1, 4, 6), hook=HOOK)
    torch.testing.assert_close(heads.values, vector.values.reshape(4, 6))
    scores = [rows.double() @ vector.values.double() for rows in (positive, negative)]
    assert vector.info["auroc"] == pytest.approx(brute_auroc(*scores), abs=1e-4)


def test_centred_pca_removes_the_contrast_that_is_wanted(planted, unchecked: None) -> None:
    """Library PCA centres its input; the first component is then the nuisance, at a right angle to the contrast."""
    positive, negative, contrast, nuisance = planted
    centred = principal_direction(positive, negative, hook=HOOK, centred=True)
    assert abs(cos(centred.values, nuisance)) > 0.99
    assert abs(centred.info["cos_mean_difference"]) < 0.1  # and the report says so
    assert centred.kind == "principal_centred"
    calm = (
        negative + 2 * contrast + 0.5 * torch.sign(normal(200, 1, seed=2)) * nuisance
    )  # a nuisance below the contrast
    uncentred = principal_direction(calm, negative, hook=HOOK)
    assert cos(uncentred.values, contrast) > 0.97  # turned towards the mean, too
    assert uncentred.info["cos_mean_difference"] > 0.97
    assert abs(cos(principal_direction(calm, negative, hook=HOOK, centred=True).values, contrast)) < 0.1
    flipped = principal_direction(negative, calm, hook=HOOK)
    assert cos(flipped.values, contrast) < -0.97
    with pytest.raises(ValueError, match="expected pairs"):
        principal_direction(positive, negative[:-1], hook=HOOK)


def test_uncentred_direction_is_the_top_eigenvector(planted) -> None:
    positive, negative, *_ = planted
    found = principal_direction(positive, negative, hook=HOOK)
    gaps = (positive - negative).double().numpy()
    values, vectors = np.linalg.eigh(gaps.T @ gaps)
    assert abs(cos(found.values, torch.from_numpy(vectors[:, -1]))) == pytest.approx(1, abs=1e-6)
    assert found.info["share"] == pytest.approx(values[-1] / values.sum(), abs=1e-3)
    assert found.norm == pytest.approx(np.linalg.norm(gaps, axis=1).mean(), rel=1e-5)


def test_a_reading_without_contrast_is_mostly_the_mean_activation(planted) -> None:
    positive, negative, contrast, _ = planted
    background = torch.cat([positive, negative])
    plain = reading_direction(positive, hook=HOOK, background=background, subtract=False)
    assert plain.info["cos_mean_activation"] > 0.98 and abs(cos(plain.values, contrast)) < 0.2
    contrasted = reading_direction(positive, hook=HOOK, background=background)
    assert cos(contrasted.values, contrast) > 0.97 and abs(contrasted.info["cos_mean_activation"]) < 0.2


def test_the_last_token_is_not_a_pad_token() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(3, 6)
    lengths = torch.tensor([6, 3, 5])
    padded = tokens.clone()
    for row, length in enumerate(lengths.tolist()):
        padded[row, length:] = 1
    with pytest.raises(ValueError, match=r"rows \[1, 2\] end in the padding token 1: their last position"):
        last_activations(bridge, padded, HOOK)
    found = last_activations(bridge, padded, HOOK, lengths=lengths)
    wrong = capture(bridge, padded, HOOK)[HOOK][:, -1]
    for row, length in enumerate(lengths.tolist()):
        alone = capture(bridge, tokens[row : row + 1, :length], HOOK)[HOOK][0, -1]
        torch.testing.assert_close(found[row], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[1], wrong[1], atol=0.1)  # what index -1 would have read
    torch.testing.assert_close(last_activations(bridge, tokens, HOOK), capture(bridge, tokens, HOOK)[HOOK][:, -1])


def test_weighted_mean_less_the_mean_is_the_covariance() -> None:
    rows = normal(300, 10) + 5
    weights = (rows[:, 3] - 5).exp() + 0.1  # a property that one unit drives
    centred = covariance_direction(rows, weights, hook=HOOK)
    weighted = covariance_direction(rows, weights, hook=HOOK, centred=False)
    identity = (weighted.values - rows.mean(0)) * weights.mean()
    torch.testing.assert_close(centred.values, identity, atol=1e-4, rtol=1e-3)
    assert int(centred.values.abs().argmax()) == 3 and cos(centred.values, torch.eye(10)[3]) > 0.9
    assert weighted.info["cos_mean_activation"] > 0.9 > abs(centred.info["cos_mean_activation"])
    with pytest.raises(ValueError, match="not all alike"):
        covariance_direction(rows, torch.ones(300), hook=HOOK)
    with pytest.raises(ValueError, match="0 or more"):
        covariance_direction(rows, weights - 1, hook=HOOK, centred=False)


def test_probe_solves_the_balanced_logistic_problem() -> None:
    scale = torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0])
    positive = (normal(60, 5, seed=1) + torch.tensor([1.5, 0, 0, 0, 0])) * scale + 3
    negative = normal(150, 5, seed=2) * scale + 3
    probe = fit_probe(positive, negative, hook=HOOK, l2=0.05, held_out=0.2, seed=4)
    draws = torch.Generator().manual_seed(4)
    kept, out = [], []
    for rows in (positive, negative):
        order = torch.randperm(len(rows), generator=draws)
        n_out = round(0.2 * len(rows))
        out.append(rows[order[:n_out]])
        kept.append(rows[order[n_out:]].double().numpy())
    x, n = np.concatenate(kept), [len(rows) for rows in kept]
    y = np.concatenate([np.ones(n[0]), -np.ones(n[1])])
    share = np.concatenate([np.full(n[0], 0.5 / n[0]), np.full(n[1], 0.5 / n[1])])
    z = (x - x.mean(0)) / x.std(0, ddof=1)

    def loss(p):
        return (share * np.logaddexp(0, -y * (z @ p[:-1] + p[-1]))).sum() + 0.025 * (p[:-1] ** 2).sum()

    best = minimize(loss, np.zeros(6), method="BFGS", options={"gtol": 1e-9}).x
    weight = best[:-1] / x.std(0, ddof=1)
    np.testing.assert_allclose(probe.weight, weight, rtol=1e-3, atol=1e-5)
    assert probe.bias == pytest.approx(best[-1] - weight @ x.mean(0), rel=1e-3)
    rates = [float((probe.score(rows) > 0).float().mean()) for rows in out]
    assert probe.accuracy == pytest.approx((rates[0] + 1 - rates[1]) / 2, abs=1e-4) and probe.accuracy > 0.6
    assert torch.equal(probe(positive), probe.score(positive) > 0)
    vector = probe.vector(name="first")
    assert vector.norm == pytest.approx(1) and vector.kind == "probe" and cos(vector.values, probe.weight) > 0.999
    batch = normal(2, 7, 5)
    torch.testing.assert_close(probe.score(batch)[1, 3], probe.score(batch[1, 3]))
    with pytest.raises(ValueError, match="four or more rows"):
        fit_probe(positive[:3], negative, hook=HOOK)


def test_random_directions_match_in_length_and_differ_in_direction() -> None:
    like = SteeringVector(7 * normal(4, 8), HOOK, "sea")
    found = random_directions(30, like=like, seed=1)
    stacked = torch.stack([vector.values.flatten() for vector in found])
    torch.testing.assert_close(stacked.norm(dim=1), torch.full((30,), like.norm))
    between = torch.corrcoef(stacked).fill_diagonal_(0)
    assert float(between.abs().max()) < 0.7 and abs(float(between.mean())) < 0.05
    assert all(vector.hook == HOOK and vector.values.shape == (4, 8) for vector in found)
    again = random_directions(30, like=like, seed=1)
    assert all(torch.equal(a.values, b.values) for a, b in zip(found, again, strict=True))
    assert not torch.equal(found[0].values, random_directions(30, like=like, seed=2)[0].values)
    spread = torch.tensor([5.0, 1.0, 0.1, 0.0])
    rows = normal(500, 4) * spread + 100
    lively = torch.stack([v.values for v in random_directions(200, hook=HOOK, activations=rows, norm=2.0)])
    torch.testing.assert_close(lively.norm(dim=1), torch.full((200,), 2.0))
    used = lively.square().mean(0).sqrt()
    assert used[0] > 2 * used[1] > 6 * used[2] and float(used[3]) < 1e-4  # where activations never vary: nothing
    cases: list[dict[str, Any]] = [{}, {"like": like, "hook": HOOK}, {"hook": HOOK}]
    for wrong in cases:
        with pytest.raises(ValueError, match="like=vector, or hook="):
            random_directions(2, **wrong)


def test_dictionary_rows_become_vectors() -> None:
    matrix = normal(5, 6)
    matrix[3] = 0

    class SNMF:
        components_ = matrix

    class Sparse:
        W_dec = matrix.numpy()

    for source, kind in ((SNMF(), "snmf"), (Sparse(), "sparse"), (matrix, "given")):
        found = dictionary_vectors(source, HOOK)
        assert [vector.info["feature"] for vector in found] == [0, 1, 2, 4]  # the dead one is left out
        assert all(vector.kind == kind for vector in found)
        assert all(vector.norm == pytest.approx(1) for vector in found)
        assert cos(found[-1].values, matrix[4]) == pytest.approx(1)
    assert dictionary_vectors(matrix, HOOK, [4], unit=False)[0].norm == pytest.approx(float(matrix[4].norm()))
    with pytest.raises(ValueError, match=r"features \[3\] are zero \(dead\)"):
        dictionary_vectors(matrix, HOOK, [0, 3])
    with pytest.raises(ValueError, match=r"features \[5, -1\] do not exist; the dictionary has 0 to 4"):
        dictionary_vectors(matrix, HOOK, [5, -1])


def brute_auroc(positive: Tensor, negative: Tensor) -> float:
    gaps = positive[:, None] - negative[None]
    return float(((gaps > 0).double() + 0.5 * (gaps == 0).double()).mean())


def test_the_feature_is_chosen_by_its_area_under_the_curve() -> None:
    truth = normal(80) > 0.4
    features = normal(80, 6, seed=1).clamp_min(0)  # many ties at 0, as in sparse dictionaries
    features[:, 4] += 1.5 * truth
    best, area = choose_feature(features, truth)
    areas = [brute_auroc(features[truth, i], features[~truth, i]) for i in range(6)]
    assert best == 4 == int(np.argmax(areas)) and area == pytest.approx(max(areas))
    for i in range(6):
        assert separation(features[truth, i], features[~truth, i]) == pytest.approx(areas[i])
    with pytest.raises(ValueError, match="rows of both kinds"):
        choose_feature(features, torch.ones(80))


def test_sets_that_do_not_fit_are_refused(unchecked: None) -> None:
    for positive, negative in ((normal(3, 4), normal(3, 5)), (normal(0, 4), normal(3, 4)), (normal(4), normal(4))):
        with pytest.raises(ValueError, match="same width"):
            diff_means(positive, negative, hook=HOOK)
    with pytest.raises(ValueError, match="zero everywhere"):
        diff_means(torch.ones(3, 4), torch.ones(2, 4), hook=HOOK)


def test_vectors_from_a_model_separate_its_tokens() -> None:
    """End to end on activations: tokens of two words, told apart by every supervised direction."""
    bridge = tiny_bridge("llama")
    hook = hook_name("resid_post", 1)
    tokens = tiny_tokens(40, 8)
    tokens[:, 4] = torch.where(torch.arange(40) < 20, 7, 9)
    at = capture(bridge, tokens, hook, positions=4)[hook]
    for vector in (diff_means(at[:20], at[20:], hook=hook), fit_probe(at[:20], at[20:], hook=hook).vector()):
        area = brute_auroc(at[:20] @ vector.values, at[20:] @ vector.values)
        assert area > 0.95 and math.isfinite(vector.norm)
