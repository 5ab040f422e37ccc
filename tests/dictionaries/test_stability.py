"""Matching of dictionaries and stability over seeds: permutations undone, planted stability, a null that means it."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch

from interp.dictionaries import Stability, match_features, seed_stability


def sparse(n: int = 12, d: int = 60, entries: int = 5, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=rng)
    return rows * (rows.abs() >= rows.abs().topk(entries, 1).values[:, -1:])


def test_a_permutation_is_undone_whatever_the_scale() -> None:
    rows, order = sparse(), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    found = match_features(rows, rows[order] * torch.rand(12, 1) + 1e-3 * rows[order])
    assert torch.equal(order[found.pairs[:, 1]], torch.arange(12))
    assert found.mean == pytest.approx(1, abs=1e-5) and found.mmcs == pytest.approx(1, abs=1e-5)


def test_the_pairing_is_the_best_of_all_and_mmcs_is_no_smaller() -> None:
    rng = torch.Generator().manual_seed(1)
    first, second = torch.randn(5, 7, generator=rng), torch.randn(5, 7, generator=rng)
    cosine = torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=-1).numpy()
    best = max(cosine[np.arange(5), list(p)].mean() for p in permutations(range(5)))
    found = match_features(first, second)
    assert found.mean == pytest.approx(best, abs=1e-6)
    assert found.mmcs == pytest.approx(cosine.max(1).mean(), abs=1e-6) and found.mmcs >= found.mean


def test_signs_count_unless_either_is_asked_for() -> None:
    rows = sparse()
    assert match_features(rows, -rows).mean < 0.5
    assert match_features(rows, -rows, sign="either").mean == pytest.approx(1, abs=1e-5)
    dead = rows.clone()
    dead[0] = 0
    assert match_features(dead, rows).cosine[0] == 0
    fewer = match_features(rows[:4], rows)
    assert fewer.pairs.shape == (4, 2) and fewer.mean == pytest.approx(1, abs=1e-5)
    run: Any = match_features
    with pytest.raises(ValueError, match="of 60 and 59 units"):
        run(rows, rows[:, 1:])
    with pytest.raises(ValueError, match="second has 1 values that are not finite"):
        run(rows, rows.clone().index_fill_(0, torch.tensor([0]), 1.0).masked_fill(rows == rows.max(), torch.inf))


def test_stable_features_are_told_from_unstable_ones_and_both_from_the_null() -> None:
    shared = sparse(8)
    runs = [torch.cat([shared, sparse(4, seed=10 + s)])[torch.randperm(12)] for s in range(5)]
    found = seed_stability(runs)
    assert found.values.sizes == {"run": 5, "other": 5, "feature": 12}
    assert np.isnan(found.values.values[range(5), range(5)]).all()
    for run in range(5):
        ours = [int((runs[run] == row).all(1).nonzero()) for row in shared]
        stable = found.features(run)
        np.testing.assert_allclose(stable[ours], 1, atol=1e-5)
        assert np.delete(stable, ours).max() < 0.8
    frame = found.summary(threshold=0.9).set_index("dictionaries")
    matched, null = frame.loc["matched"], frame.loc["null"]
    assert matched["share"] == pytest.approx(8 / 12) and null["share"] == 0
    assert (
        matched["cosine_low"] <= matched["cosine"] <= matched["cosine_high"]
        and matched["cosine_low"] > null["cosine_high"]
    )
    assert len(found.plot().data) > 0


def test_the_null_is_what_unrelated_dictionaries_give() -> None:
    runs = [sparse(20, 80, 6, seed=s) for s in range(6)]
    frame = seed_stability(runs).summary().set_index("dictionaries")
    assert abs(frame.loc["matched", "cosine"] - frame.loc["null", "cosine"]) < 0.03
    again = seed_stability(runs).summary().set_index("dictionaries")
    assert frame.equals(again)  # from the seed alone


def test_saved_and_refused(tmp_path: Any) -> None:
    found = seed_stability([sparse(seed=0), sparse(seed=1)])
    assert np.isnan(found.summary()["cosine_low"]).all()  # one pair says nothing of the spread
    loaded = Stability.load(found.save(tmp_path / "s.nc"))
    np.testing.assert_array_equal(loaded.null.values, found.null.values)
    with pytest.raises(ValueError, match="got 1, expected at least 2"):
        seed_stability([sparse()])
    with pytest.raises(ValueError, match="expected runs of one size"):
        seed_stability([sparse(), sparse(11)])
