"""The tiled search for the largest and smallest entries, against sorting the whole product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.neurons import _tiling
from interp.neurons._tiling import GROUP, Tiling, extremes, moments, plan, scan, spread

CPU = torch.device("cpu")


def integers(rows: int, columns: int, d: int = 5, largest: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Small whole numbers: their products are exact in any order of addition, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randint(-largest, largest + 1, size, generator=generator) for size in ((rows, d), (d, columns)))
    left, right = draw
    return left.float(), right.float()


def sorted_product(left: Tensor, right: Tensor, k: int, sign: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` largest (smallest) entries of each row, equal ones by column: by sorting all of them."""
    product = (left.double() @ right.double()).numpy()
    order = np.stack([np.lexsort((np.arange(len(row)), -sign * row))[:k] for row in product])
    return np.take_along_axis(product, order, 1).astype(np.float32), order


def assert_exact(left: Tensor, right: Tensor, k: int, tiling: Tiling) -> None:
    seen: list[tuple[int, int]] = []

    def columns(start: int, stop: int) -> Tensor:
        seen.append((start, stop))
        return right[:, start:stop]

    found = scan(left, columns, right.shape[1], k, tiling=tiling)
    for part, sign in ((found.top, 1), (found.bottom, -1)):
        values, order = sorted_product(left, right, k, sign)
        assert part.columns.dtype == torch.int32
        np.testing.assert_array_equal(part.values.numpy(), values)
        np.testing.assert_array_equal(part.columns.numpy(), order)
    assert seen == [(a, min(a + tiling.columns, right.shape[1])) for a in range(0, right.shape[1], tiling.columns)]


@pytest.mark.parametrize("k", [1, 2, 10, 33])
@pytest.mark.parametrize(
    ("n_columns", "tiling"),
    [
        (33, Tiling(7, 32)),  # one column after the last group
        (40, Tiling(16, 4096)),  # one tile, of one group and a rest
        (1000, Tiling(5, 96)),  # rows and columns that tiles do not divide
        (1000, Tiling(64, 50)),  # tiles of one group and a rest
        (1024, Tiling(3, 256)),
        (700, Tiling(64, 20)),  # tiles smaller than a group, and than k
    ],
)
def test_exact_with_ties(k: int, n_columns: int, tiling: Tiling) -> None:
    for largest, seed in ((1, 0), (3, 1), (1000, 2)):  # nearly everything ties, much does, little does
        assert_exact(*integers(13, n_columns, largest=largest, seed=seed), k, tiling)


def test_all_columns_can_be_asked_for() -> None:
    assert_exact(*integers(4, 75), 75, Tiling(2, 32))


@pytest.mark.parametrize("slope", [1.0, -1.0, 0.0])
def test_orders_that_defeat_the_bound(slope: float) -> None:
    """Every tile beats the ones before, none does, or all entries are equal."""
    left = torch.tensor([[1.0], [-1.0], [0.0], [3.0]])
    assert_exact(left, slope * torch.arange(500.0)[None], 7, Tiling(4, 64))


def test_rows_that_open_many_groups_among_rows_that_open_none() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.zeros(6, 40), torch.randint(-9, 10, (40, 640), generator=generator).float()
    left[1, 3], left[4, 8], left[5] = 1.0, -2.0, 1.0
    right[3, 320:] = 9.0  # the last tiles of row 1 are one long tie above nearly all before
    right[8, ::5] = 9.0
    assert_exact(left, right, 6, Tiling(6, 160))


def test_ties_open_no_more_groups_than_there_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[int, ...]] = []
    real = _tiling._Running._merge
    monkeypatch.setattr(_tiling._Running, "_merge", lambda self, keys: opened.append(keys.shape) or real(self, keys))
    assert_exact(torch.zeros(4, 3), torch.ones(3, 640), 2, Tiling(4, 320))
    assert opened == [(4, 2 * GROUP)] * 2  # the first tile, once for each sign; no tie after it is looked at


def test_the_two_zeros_are_equal() -> None:
    scores, columns = torch.tensor([[0.0, -0.0, 0.0, -1.0]]), torch.arange(4)
    keys = _tiling._keys(scores, columns)
    assert keys.argsort(descending=True).tolist() == [[0, 1, 2, 3]]
    assert _tiling._scores(keys).tolist() == [[0.0, 0.0, 0.0, -1.0]]
    wide = torch.tensor([-torch.inf, -3e38, -1e-40, 0.0, 1e-40, 2.5, 3e38, torch.inf])
    assert bool((_tiling._keys(wide, torch.tensor(5)).diff() > 0).all())
    assert torch.equal(_tiling._scores(_tiling._keys(wide, torch.tensor(2**31 - 1))), wide)


def test_real_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(50, 64, generator=generator), torch.randn(64, 3001, generator=generator)
    found = scan(left, lambda a, b: right[:, a:b], 3001, 10, tiling=Tiling(16, 512))
    product = left.double() @ right.double()
    for part, sign in ((found.top, 1), (found.bottom, -1)):
        expected = (sign * product).topk(10)
        torch.testing.assert_close(part.values, (sign * expected.values).float(), atol=1e-5, rtol=1e-5)
        assert torch.equal(part.columns.long(), expected.indices)


def test_bfloat16_operands_are_added_up_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(9, 64, generator=generator).bfloat16()
    right = torch.randn(64, 300, generator=generator).bfloat16()
    found = scan(left, lambda a, b: right[:, a:b], 300, 5, tiling=Tiling(4, 64), logsumexp=True)
    product = left.double() @ right.double()
    torch.testing.assert_close(found.top.values, product.topk(5).values.float(), atol=1e-5, rtol=1e-6)
    assert not torch.equal(found.top.values, found.top.values.bfloat16().float())
    assert found.logsumexp is not None
    torch.testing.assert_close(found.logsumexp, product.logsumexp(1).float(), atol=1e-5, rtol=1e-6)


def test_logsumexp_over_tiles_of_very_different_height() -> None:
    left = torch.tensor([[1.0], [-1.0], [0.0]])
    right = torch.cat([torch.linspace(-2000, 0, 100), torch.linspace(3000, 2999, 100)])[None]
    found = scan(left, lambda a, b: right[:, a:b], 200, 3, tiling=Tiling(2, 64), logsumexp=True)
    assert found.logsumexp is not None
    torch.testing.assert_close(found.logsumexp, (left.double() @ right.double()).logsumexp(1).float())
    assert scan(left, lambda a, b: right[:, a:b], 200, 3, tiling=Tiling(2, 64)).logsumexp is None


def test_extremes_are_the_ends() -> None:
    left, right = integers(11, 333, largest=1000)
    high, low = extremes(left, lambda a, b: right[:, a:b], 333, tiling=Tiling(4, 50))
    assert torch.equal(high, (left @ right).amax(1)) and torch.equal(low, (left @ right).amin(1))


def test_mean_and_spread_follow_from_moments_of_the_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(20, 16, generator=generator), torch.randn(16, 500, generator=generator)
    right += 300 * torch.randn(16, 1, generator=generator)  # a mean much larger than the spread
    mean, std = spread(left, *moments(lambda a, b: right[:, a:b], 500, tiling=Tiling(8, 96)))
    product = left.double() @ right.double()
    torch.testing.assert_close(mean, product.mean(1).float(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(std, product.std(1, unbiased=False).float(), rtol=1e-4, atol=1e-5)


def test_after_is_called_once_per_block_of_columns() -> None:
    left, right = integers(9, 200)
    calls: list[int] = []
    scan(left, lambda a, b: right[:, a:b], 200, 2, tiling=Tiling(2, 64), after=lambda: calls.append(0))
    extremes(left, lambda a, b: right[:, a:b], 200, tiling=Tiling(2, 64), after=lambda: calls.append(1))
    assert calls == [0] * 4 + [1] * 4


@pytest.mark.parametrize("budget", [2**18, 2**20, 2**24, 2**28])
def test_plans_stay_within_their_budget_and_use_it(budget: int) -> None:
    tiling = plan(64, 10_000, 50_000, 10, budget=budget, device=CPU)
    assert tiling.columns % GROUP == 0 and tiling.rows >= 16
    used = tiling.rows * tiling.columns * 4 + 64 * tiling.columns * 4
    assert used <= budget
    assert used > budget / 20 or (tiling.rows, tiling.columns) == (1024, 4096)


def test_plans_are_no_larger_than_the_product() -> None:
    assert plan(64, 48, 60, 5, budget=2**28, device=CPU) == Tiling(48, 64)
    with pytest.raises(ValueError, match=r"memory_budget of 1,000 bytes is too small: .* needs [\d,]+"):
        plan(64, 48, 60, 5, budget=1000, device=CPU)


@pytest.mark.parametrize("k", [0, 41])
def test_lists_longer_than_the_row_are_refused(k: int) -> None:
    left, right = integers(3, 40)
    with pytest.raises(ValueError, match=f"k must lie between 1 and the 40 columns, got {k}"):
        scan(left, lambda a, b: right[:, a:b], 40, k, tiling=Tiling(2, 32))
