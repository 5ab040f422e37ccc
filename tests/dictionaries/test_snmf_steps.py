"""The steps of the solvers: against brute force, scipy and plain formulas."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from interp.dictionaries import _snmf_init as starting
from interp.dictionaries import _snmf_repair as repairing
from interp.dictionaries import _snmf_steps as steps


def problem(seed: int = 0, k: int = 4, n: int = 30, d: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=rng, dtype=torch.float64)
    components = torch.randn(k, d, generator=rng, dtype=torch.float64)
    return rows, components, torch.rand(k, n, generator=rng, dtype=torch.float64)


def squared_error(rows: Tensor, components: Tensor, codes: Tensor) -> float:
    return float((rows - codes.T @ components).square().sum())


def test_winner_take_all_keeps_the_largest_and_of_equals_the_first() -> None:
    values = torch.tensor([[3.0, -5.0, 3.0, -3.0, 1.0], [0.0, 0.0, 2.0, 0.0, 0.0]])
    kept = steps.winner_take_all(values, 2)
    assert kept.tolist() == [[3.0, -5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0, 0.0]]
    assert torch.equal(steps.winner_take_all(values, 5), values)


@pytest.mark.parametrize(
    ("sparsity", "d", "expected"), [(0.01, 3072, 31), (0.07, 100, 7), (0.29, 100, 29), (1e-9, 5, 1), (1.0, 5, 5)]
)
def test_the_number_kept_is_the_ceiling_without_rounding_noise(sparsity: float, d: int, expected: int) -> None:
    assert steps.kept_neurons(sparsity, d) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sparse_product_is_the_dense_one(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 200, generator=rng, dtype=dtype)
    components = steps.winner_take_all(torch.randn(6, 200, generator=rng, dtype=dtype), 3)
    data = steps.Data(rows)
    assert steps._SPARSE_BELOW * 200 > 3  # the route under test
    torch.testing.assert_close(data.against_components(components, 3), components @ rows.T)
    torch.testing.assert_close(data.against_direction(components[0]), rows @ components[0])
    dense = torch.randn(6, 200, generator=rng, dtype=dtype)
    torch.testing.assert_close(data.against_components(dense, 200), dense @ rows.T)


def test_the_gram_loss_is_the_squared_error() -> None:
    rows, components, codes = problem()
    loss = steps.gram_loss(
        float(rows.square().sum()), components @ rows.T, codes, steps.gram(components), steps.gram(codes)
    )
    assert loss == pytest.approx(squared_error(rows, components, codes), rel=1e-12)
    assert steps.exact_loss(rows, components, codes) == pytest.approx(loss, rel=1e-12)


def test_a_swept_component_is_the_best_of_all_supports() -> None:
    rows, components, codes = problem(k=1, d=6)
    found = steps.sweep_components(components, steps.gram(codes), codes @ rows, keep=2)
    errors = {}
    for support in combinations(range(6), 2):
        trial = torch.zeros_like(components)
        trial[0, list(support)] = (codes @ rows)[0, list(support)] / codes.square().sum()
        errors[support] = squared_error(rows, trial, codes)
    best = min(errors, key=lambda support: errors[support])
    assert tuple(found[0].nonzero()[:, 0].tolist()) == best
    assert squared_error(rows, found, codes) == pytest.approx(errors[best], rel=1e-12)


@pytest.mark.parametrize("keep", [2, 9])
def test_no_block_update_raises_the_loss(keep: int) -> None:
    rows, components, codes = problem(seed=1)
    components = steps.winner_take_all(components, keep)
    losses = [squared_error(rows, components, codes)]
    for _ in range(20):
        components = steps.sweep_components(components, steps.gram(codes), codes @ rows, keep)
        losses.append(squared_error(rows, components, codes))
        codes = steps.sweep_codes(codes, steps.gram(components), components @ rows.T)
        losses.append(squared_error(rows, components, codes))
    assert all(after <= before * (1 + 1e-12) for before, after in zip(losses, losses[1:], strict=False))
    assert losses[-1] < 0.9 * losses[0] and bool((codes >= 0).all()) and int((components != 0).sum(1).max()) <= keep


def test_the_multiplicative_rule_is_the_formula_and_lowers_the_loss() -> None:
    rows, components, codes = problem(seed=2)
    cross, inner = components @ rows.T, components @ components.T
    plus, minus = (lambda x: (x.abs() + x) / 2), (lambda x: (x.abs() - x) / 2)
    expected = codes * ((plus(cross) + minus(inner) @ codes) / (minus(cross) + plus(inner) @ codes)).sqrt()
    found = steps.multiply_codes(codes, inner, cross)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    assert squared_error(rows, components, found) < squared_error(rows, components, codes)


def test_best_codes_are_non_negative_least_squares() -> None:
    rows, components, codes = problem(seed=3)
    found = steps.best_codes(codes, steps.gram(components), components @ rows.T, tol=1e-12, max_sweeps=5000)
    for token in range(len(rows)):
        expected, _ = scipy.optimize.nnls(components.T.numpy(), rows[token].numpy())
        np.testing.assert_allclose(found[:, token].numpy(), expected, atol=1e-8)


def test_dead_components_stay_finite() -> None:
    rows, components, codes = problem()
    codes[1] = 0.0
    components[2] = 0.0
    solved = steps.solve_components(steps.gram(codes), codes @ rows, 1e-6)
    assert torch.isfinite(solved).all() and float(solved[1].abs().max()) == 0.0
    assert float(steps.sweep_components(components, steps.gram(codes), codes @ rows, 9)[1].abs().max()) == 0.0
    assert float(steps.sweep_codes(codes, steps.gram(components), components @ rows.T)[2].max()) == 0.0
    assert torch.isfinite(steps.multiply_codes(codes, steps.gram(components), components @ rows.T)).all()
    scaled, unit = steps.unit_codes(components, codes)
    torch.testing.assert_close(unit.T @ scaled, codes.T @ components)
    assert unit.norm(dim=1).tolist() == pytest.approx([1.0, 0.0, 1.0, 1.0])


def test_the_cost_of_merging_is_what_one_component_cannot_hold() -> None:
    _, components, codes = problem(seed=4)
    costs = repairing.merge_costs(steps.gram(components), steps.gram(codes))
    for i, j in combinations(range(4), 2):
        second = torch.linalg.svdvals(codes[[i, j]].T @ components[[i, j]])[1]
        assert float(costs[i, j]) == pytest.approx(float(second) ** 2, rel=1e-8)
    assert bool(torch.isinf(costs.diagonal()).all())


def test_repair_frees_a_duplicate_and_finds_what_was_missing() -> None:
    rng = torch.Generator().manual_seed(5)
    atoms = torch.eye(3, 12, dtype=torch.float64)
    codes = torch.rand(3, 50, generator=rng, dtype=torch.float64)
    data = steps.Data(codes.T @ atoms)
    # The first two components share the first atom, the last atom has none.
    components = torch.stack([atoms[0], atoms[0], atoms[1]])
    start = torch.stack([codes[0] * 0.6, codes[0] * 0.4, codes[1]])
    found, found_codes, swaps = repairing.repair(data, components, start, keep=1, limit=3)
    assert swaps == 1
    assert sorted(found.abs().argmax(1).tolist()) == [0, 1, 2]
    assert squared_error(data.rows, found, found_codes) < 1e-20 * data.total


@pytest.mark.parametrize("penalty", [0.0, 0.1, 0.5])
def test_repair_keeps_a_swap_only_if_loss_and_penalty_fall(penalty: float) -> None:
    kept = []
    for seed in range(8):
        rows, components, codes = problem(seed=seed, k=6)
        data, components = steps.Data(rows), steps.winner_take_all(components, 3)
        for _ in range(4):
            components = steps.sweep_components(components, steps.gram(codes), codes @ rows, 3, penalty)
            codes = steps.sweep_codes(codes, steps.gram(components), components @ rows.T, penalty)
        found, found_codes, swaps = repairing.repair(data, components, codes, 3, 6, penalty)
        after, before = (
            squared_error(rows, z, y) + penalty * float((z.square().sum(1) * y.square().sum(1)).sum())
            for z, y in ((found, found_codes), (components, codes))
        )
        assert after < before if swaps else torch.equal(found, components)
        kept.append(swaps)
    assert sum(kept) > 0


def test_a_swap_that_lowers_the_loss_alone_is_refused() -> None:
    # One atom is held, the other is left to a dead component: loss 10, and 90 or 100 of energy.
    rows = torch.zeros(20, 4, dtype=torch.float64)
    rows[:10, 0], rows[10:, 1] = 1.0, 3.0
    components = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    codes = torch.stack([rows[:, 1], torch.zeros(20, dtype=torch.float64)])
    for penalty, swaps in ((0.0, 1), (0.5, 1), (1.5, 0)):  # 55 to 50 at 0.5, 145 to 150 at 1.5
        assert repairing.repair(steps.Data(rows), components, codes, 1, 1, penalty)[2] == swaps


def test_repair_leaves_a_good_factorisation_alone() -> None:
    rng = torch.Generator().manual_seed(6)
    atoms, codes = torch.eye(3, 12, dtype=torch.float64), torch.rand(3, 50, generator=rng, dtype=torch.float64)
    noise = 1e-3 * torch.randn(50, 12, generator=rng, dtype=torch.float64)
    data = steps.Data(codes.T @ atoms + noise)
    for _ in range(3):
        atoms = steps.sweep_components(atoms, steps.gram(codes), codes @ data.rows, 1)
        codes = steps.sweep_codes(codes, steps.gram(atoms), atoms @ data.rows.T)
    found, _, swaps = repairing.repair(data, atoms, codes, keep=1, limit=3)
    assert swaps == 0 and torch.equal(found, atoms)


def test_singular_vectors_against_the_full_decomposition() -> None:
    rng = torch.Generator().manual_seed(7)
    rows = torch.randn(60, 5, generator=rng, dtype=torch.float64) @ torch.randn(5, 40, generator=rng).double()
    left, values = starting.leading_singular(rows, 4, torch.Generator().manual_seed(0))
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(values, s[:4])
    torch.testing.assert_close((left * u[:, :4]).sum(0).abs(), torch.ones(4, dtype=torch.float64))


def test_the_svd_start_uses_both_signs() -> None:
    # One direction with activations of both signs: one non-negative component cannot hold it, two can.
    rng = torch.Generator().manual_seed(8)
    rows = torch.outer(torch.randn(40, generator=rng), torch.randn(10, generator=rng)).double()
    codes = starting.start_codes(rows, 2, "svd", torch.Generator().manual_seed(0))
    components = steps.solve_components(steps.gram(codes), codes @ rows, 1e-12)
    assert squared_error(rows, components, codes) < 1e-6 * float(rows.square().sum())
    assert float((components[0] @ components[1]) / components[0].norm() / components[1].norm()) < -0.99
