from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import stats


def sample(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.4, 1.0, shape)


# bootstrap


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_bootstrap_agrees_with_scipy_and_transformerlens(statistic: Any) -> None:
    from transformer_lens.utilities import bootstrap_ci

    values = sample(3, 41)  # an odd number: torch's median of an even one is the lower of the middle two
    ours = stats.bootstrap_interval(values, statistic=statistic, n_resamples=8000)
    theirs = scipy.stats.bootstrap(
        (values,), getattr(np, statistic), axis=-1, method="percentile", n_resamples=8000, rng=1
    ).confidence_interval
    lens = bootstrap_ci(torch.tensor(values), statistic=statistic, n_resamples=8000)
    for mine, scipys, lenses in zip(ours[1:], theirs, lens, strict=True):
        assert np.allclose(mine, scipys, atol=0.03)
        assert np.allclose(mine, lenses.numpy(), atol=0.03)
    assert np.allclose(ours.estimate, getattr(np, statistic)(values, axis=-1))


def test_the_interval_covers_as_often_as_it_says() -> None:
    covered = stats.bootstrap_interval(sample(2000, 60), n_resamples=500)
    rate = np.mean((covered.low < 0.4) & (covered.high > 0.4))
    assert 0.92 < rate < 0.97
    narrow = stats.bootstrap_interval(sample(2000, 60), n_resamples=500, confidence=0.5)
    assert 0.45 < np.mean((narrow.low < 0.4) & (narrow.high > 0.4)) < 0.55


def test_cells_are_independent_and_a_seed_repeats() -> None:
    values = sample(2, 3, 10)
    whole = stats.bootstrap_interval(values, seed=4)
    assert whole.low.shape == (2, 3)
    one = stats.bootstrap_interval(values[1, 2], seed=4)
    assert np.allclose([x[1, 2] for x in whole], one)
    assert not np.allclose(whole.low, stats.bootstrap_interval(values, seed=5).low)


def test_tensors_and_data_arrays_are_taken() -> None:
    values = sample(2, 10)
    expected = stats.bootstrap_interval(values)
    array = xr.DataArray(values, dims=("layer", "example"))
    tensor = torch.tensor(values).requires_grad_()
    for given_values in (array, tensor, values.tolist()):
        assert np.allclose(stats.bootstrap_interval(given_values), expected)
    half = stats.bootstrap_interval(tensor.bfloat16())
    assert np.allclose(half, expected, atol=0.02)


def test_unmeasured_cells_stay_unmeasured() -> None:
    values = sample(3, 10)
    values[1, 4] = np.nan
    for interval in (
        stats.bootstrap_interval(values),
        stats.bootstrap_interval(values, statistic="median", n_resamples=50),
        stats.ratio_interval(values, np.ones(10)),
    ):
        for part in interval:
            assert np.isnan(part).tolist() == [False, True, False]
    assert np.isnan(stats.paired_test(values)).tolist() == [False, True, False]
    assert np.isnan(stats.paired_test(values, method="wilcoxon")).tolist() == [False, True, False]


def test_one_example_says_nothing_of_the_spread() -> None:
    interval = stats.bootstrap_interval([[2.0], [3.0]])
    assert interval.estimate.tolist() == [2.0, 3.0]
    assert np.isnan(interval.low).all()
    assert np.isnan(interval.high).all()
    constant = stats.bootstrap_interval(np.full(6, 2.5))
    assert np.allclose(constant, 2.5)


# ratio


def test_a_constant_ratio_is_found_exactly() -> None:
    denominator = np.abs(sample(20)) + 1
    interval = stats.ratio_interval(np.stack([0.5 * denominator, -2 * denominator]), denominator)
    assert np.allclose(np.stack(interval), np.array([[0.5, -2.0]] * 3))


def test_it_is_the_ratio_of_means_not_the_mean_of_ratios() -> None:
    numerator, denominator = np.array([1.0, 1.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0, 0.01])
    interval = stats.ratio_interval(numerator, denominator)
    assert np.isclose(interval.estimate, 4 / 3.01)
    assert np.mean(numerator / denominator) > 25
    assert interval.low < interval.estimate < interval.high


def test_ratio_agrees_with_scipy_on_pairs() -> None:
    numerator, denominator = sample(50, seed=1) + 2, sample(50, seed=2) + 3
    theirs = scipy.stats.bootstrap(
        (numerator, denominator),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True, method="percentile", n_resamples=8000, rng=0,
    ).confidence_interval  # fmt: skip
    ours = stats.ratio_interval(numerator, denominator, n_resamples=8000)
    assert np.allclose([ours.low, ours.high], theirs, atol=0.02)


# paired tests


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_sign_flips_are_exact_for_few_examples(alternative: Any) -> None:
    from transformer_lens.utilities import sign_flip_permutation_pvalue

    values = sample(6, 9)
    ours = stats.paired_test(values, alternative=alternative)
    lens = sign_flip_permutation_pvalue(torch.tensor(values), alternative=alternative).numpy()
    assert np.allclose(ours, lens)
    for cell, p in zip(values, ours, strict=True):
        exact = scipy.stats.permutation_test(
            (cell,), lambda x, axis: x.mean(axis), permutation_type="samples", n_resamples=np.inf,
            alternative=alternative, vectorized=True,
        )  # fmt: skip
        assert np.isclose(p, exact.pvalue)


def test_sign_flips_of_a_case_worked_by_hand() -> None:
    # of the eight patterns of signs on 1, 2, 3 only +++ has a mean of 2, only --- of -2
    assert np.isclose(stats.paired_test([1.0, 2.0, 3.0]), 2 / 8)
    assert np.isclose(stats.paired_test([1.0, 2.0, 3.0], alternative="greater"), 1 / 8)
    assert np.isclose(stats.paired_test([1.0, 2.0, 3.0], alternative="less"), 1.0)
    assert np.isclose(stats.paired_test([0.0, 0.0]), 1.0)


def test_drawn_sign_flips_agree_with_the_exact_ones() -> None:
    values = np.concatenate([sample(14, seed=3), np.zeros(3)])  # zeros flip to themselves: same null, more examples
    drawn = stats.paired_test(values, n_permutations=40_000)
    assert np.isclose(drawn, stats.paired_test(values[:14]), atol=0.01)
    assert stats.paired_test(np.ones(30), n_permutations=99) == 1 / 100  # never zero
    assert stats.paired_test(values, seed=1) == stats.paired_test(values, seed=1)


def test_p_values_are_uniform_under_the_null() -> None:
    p = stats.paired_test(np.random.default_rng(0).normal(size=(1500, 10)))
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


def test_wilcoxon_is_scipys() -> None:
    values = sample(4, 12)
    values[2, :3] = 0.0
    ours = stats.paired_test(values, method="wilcoxon", alternative="greater")
    theirs = [scipy.stats.wilcoxon(cell[cell != 0], alternative="greater").pvalue for cell in values]
    assert np.allclose(ours, theirs)
    assert stats.paired_test(np.zeros(5), method="wilcoxon") == 1.0


# proportions


def test_wilson_interval_of_published_cases() -> None:
    interval = stats.proportion_interval(81, 263)  # Newcombe 1998, table I: 0.2553 to 0.3662
    assert np.isclose(interval.estimate, 81 / 263)
    assert np.allclose([interval.low, interval.high], [0.2553, 0.3662], atol=5e-5)
    none = stats.proportion_interval(0, 20)  # 0.0000 to 0.1611
    assert np.allclose([none.low, none.high], [0.0, 0.1611], atol=5e-5)
    assert stats.proportion_interval(5, 5).high == 1.0


# correlations


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_correlation_is_scipys_and_its_interval_is_scipys_bootstrap(kind: Any) -> None:
    x = sample(60, seed=1)
    y = x + sample(60, seed=2)
    ours = stats.correlation(x.reshape(6, 10), torch.tensor(y).reshape(6, 10), kind=kind, n_resamples=4000)
    function = scipy.stats.pearsonr if kind == "pearson" else scipy.stats.spearmanr
    expected: Any = function(x, y)
    assert np.isclose(ours.estimate, expected.statistic)
    assert np.isclose(ours.p_value, expected.pvalue)
    assert ours.n == 60
    theirs = scipy.stats.bootstrap(
        (x, y), lambda a, b: function(a, b).statistic, paired=True, vectorized=False, method="percentile",
        n_resamples=1500, rng=0,
    ).confidence_interval  # fmt: skip
    assert np.allclose([ours.low, ours.high], theirs, atol=0.03)


def test_perfect_correlations() -> None:
    x = np.arange(10.0)
    assert np.allclose(stats.correlation(x, 3 * x - 1)[:3], 1.0)
    assert np.allclose(stats.correlation(x, -np.exp(x), kind="spearman")[:3], -1.0)
    assert stats.correlation(x, -np.exp(x)).estimate > -0.9


def test_unmeasured_pairs_are_left_out_and_counted() -> None:
    x, y = np.arange(8.0), np.array([0.0, 1, np.nan, 3, 4, 5, 6, 7])
    assert np.isclose(stats.correlation(x, y).estimate, 1.0)
    assert stats.correlation(x, y).n == 7


def test_constant_input_has_no_correlation() -> None:
    result = stats.correlation(np.zeros(5), np.arange(5.0))
    assert np.isnan(result[:4]).all()
    assert result.n == 5


# corrections


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_corrections_keep_the_order_and_never_help(p: list[float]) -> None:
    for method in ("holm", "bh"):
        adjusted = stats.adjust_p_values(p, method=method)  # type: ignore[arg-type]
        assert (adjusted >= np.array(p) - 1e-12).all()
        assert (adjusted <= 1).all()
        assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= -1e-12).all()
    holm, bh = stats.adjust_p_values(p), stats.adjust_p_values(p, method="bh")
    assert (holm >= bh - 1e-12).all()


def test_holm_of_a_case_worked_by_hand() -> None:
    # sorted 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1, then the running maximum
    assert np.allclose(stats.adjust_p_values([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    # times 4/1, 4/2, 4/3, 4/4, then the running minimum from the right
    assert np.allclose(stats.adjust_p_values([0.01, 0.04, 0.03, 0.005], method="bh"), [0.02, 0.04, 0.04, 0.02])


def test_unmeasured_p_values_are_not_counted() -> None:
    adjusted = stats.adjust_p_values(np.array([[0.01, np.nan], [0.04, np.nan]]))
    assert np.allclose(adjusted, [[0.02, np.nan], [0.04, np.nan]], equal_nan=True)
    assert np.isnan(stats.adjust_p_values([np.nan, np.nan])).all()


# messages


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.bootstrap_interval(3.0), r"values has shape \(\); expected \[..., example\]"),
        (lambda: stats.bootstrap_interval(np.ones((3, 0))), r"values has shape \(3, 0\)"),
        (lambda: stats.bootstrap_interval([1.0, np.inf]), "values has 1 infinite values"),
        (lambda: stats.bootstrap_interval([1.0, 2.0], confidence=95), "confidence must lie between 0 and 1, got 95"),
        (lambda: stats.bootstrap_interval([1.0, 2.0], n_resamples=0), "n_resamples must be at least 1"),
        (lambda: stats.bootstrap_interval([1.0, 2.0], statistic="mode"), "'mean' or 'median', got 'mode'"),
        (lambda: stats.ratio_interval([1.0, 2.0], [1.0]), "numerator has 2 examples and denominator 1"),
        (lambda: stats.ratio_interval([1.0, 2.0], [1.0, -1.0]), "mean of the denominator is 0"),
        (lambda: stats.paired_test([1.0], alternative="both"), "alternative must be 'two-sided', 'greater' or 'less'"),
        (lambda: stats.paired_test([1.0], method="t"), "method must be 'sign_flip' or 'wilcoxon', got 't'"),
        (lambda: stats.paired_test(np.ones(20), n_permutations=0), "n_permutations must be at least 1"),
        (lambda: stats.proportion_interval(4, 3), "4 successes of 3 trials"),
        (lambda: stats.correlation([1.0, 2.0], [1.0]), r"x has shape \(2,\) and y \(1,\)"),
        (lambda: stats.correlation([1.0, 2.0], [1.0, 2.0]), "only 2 pairs are measured on both sides"),
        (lambda: stats.correlation([1.0, 2.0, np.inf], [1.0, 2.0, 3.0]), "x has 1 and y 0 infinite values"),
        (lambda: stats.correlation([1.0] * 3, [1.0] * 3, kind="kendall"), "'pearson' or 'spearman', got 'kendall'"),
        (lambda: stats.adjust_p_values([0.1, 1.2]), r"must lie in \[0, 1\]; they run from 0.1 to 1.2"),
        (lambda: stats.adjust_p_values([0.1], method="bonferroni"), "method must be 'holm' or 'bh'"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# max_statistic


def test_max_statistic_is_what_trying_every_pattern_says() -> None:
    values = sample(2, 3, 6, seed=3)
    values[1, 2] = np.nan
    for statistic in ("mean", "t"):
        for alternative in ("two-sided", "greater", "less"):
            found = stats.max_statistic(values, statistic=statistic, alternative=alternative)  # type: ignore[arg-type]

            def score(cells: np.ndarray, _statistic: str = statistic, _alternative: str = alternative) -> np.ndarray:
                out = cells.mean(-1)
                if _statistic == "t":
                    out = out / (cells.std(-1, ddof=1) / np.sqrt(6))
                return {"two-sided": abs(out), "greater": out, "less": -out}[_alternative]

            null = [np.nanmax(score(values * np.array(s))) for s in itertools.product((1, -1), repeat=6)]
            expected = np.array([[np.mean(np.array(null) >= cell - 1e-12) for cell in row] for row in score(values)])
            expected[1, 2] = np.nan
            assert np.allclose(found.p_value, expected, equal_nan=True)
            assert np.allclose(abs(found.statistic), abs(score(values)), equal_nan=True)
            assert (np.sign(found.statistic) == np.sign(values.mean(-1))).sum() == 5  # all that are measured
            for level in (0.5, 0.8, 0.95):
                again = stats.max_statistic(values, statistic=statistic, alternative=alternative, confidence=level)  # type: ignore[arg-type]
                reported = np.nan_to_num(score(values), nan=-np.inf) > again.threshold
                assert (reported == (np.nan_to_num(found.p_value, nan=1.0) <= 1 - level + 1e-12)).all()


def test_a_search_over_a_grid_of_noise_reports_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    for n in (8, 30):  # every pattern, and a sample of them
        hits = {"max": 0, "each": 0}
        for _ in range(200):
            # cells of a grid share what they share, unlike independent ones
            noise = rng.normal(size=(20, n)) + 2 * rng.normal(size=n)
            hits["max"] += stats.max_statistic(noise, n_permutations=199).p_value.min() <= 0.1
            hits["each"] += stats.paired_test(noise, n_permutations=199).min() <= 0.1
        assert 0.04 < hits["max"] / 200 < 0.16
        assert hits["each"] > 1.5 * hits["max"]


def test_shared_noise_costs_nothing_unlike_with_holm() -> None:
    rng = np.random.default_rng(1)
    better = 0
    for _ in range(20):
        values = 0.1 * rng.normal(size=(40, 20)) + rng.normal(size=20) + 0.55
        corrected = stats.max_statistic(values, n_permutations=1000).p_value.min()
        better += corrected < stats.adjust_p_values(stats.paired_test(values, n_permutations=1000)).min()
    assert better == 20


def test_one_cell_is_the_paired_test_and_large_t_needs_no_large_mean() -> None:
    values = sample(1, 10)
    assert np.allclose(stats.max_statistic(values).p_value, stats.paired_test(values))
    many = stats.max_statistic(sample(1, 40), n_permutations=500, seed=2)
    assert np.allclose(many.p_value, stats.paired_test(sample(1, 40), n_permutations=500, seed=2))
    small = np.stack([5 * sample(30, seed=1), 0.01 * sample(30, seed=2) + 0.02])
    assert stats.max_statistic(small, statistic="t").p_value[1] < 0.01
    assert stats.max_statistic(small, statistic="mean").p_value[1] > 0.5
    assert stats.max_statistic(np.zeros((2, 5)), statistic="t").p_value.tolist() == [1, 1]


def test_examples_of_a_group_flip_together() -> None:
    values = np.tile(sample(3, 5), (1, 8))  # every group's value eight times
    names = np.tile(list("abcde"), 8)
    grouped = stats.max_statistic(values, groups=names)
    assert grouped.n_groups == 5
    assert np.allclose(grouped.p_value, stats.max_statistic(sample(3, 5)).p_value)
    assert stats.max_statistic(values).p_value.min() < grouped.p_value.min()
    assert stats.max_statistic(np.ones((2, 4))).threshold == np.inf  # 2 of 16 patterns: p = 0.125 at best
    assert stats.max_statistic(np.ones((2, 4)), confidence=0.8).threshold < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "median"}, "statistic must be 'mean' or, for 2 examples or more, 't'; got 'median'"),
        ({"alternative": "more"}, "alternative must be 'two-sided', 'greater' or 'less', got 'more'"),
        ({"groups": ["a"]}, "groups has 1 entries for 5 examples"),
        ({"confidence": 95}, "confidence must lie between 0 and 1"),
        ({"differences": np.full((2, 5), np.nan)}, "every cell holds a NaN"),
        ({"differences": np.ones((2, 1)), "statistic": "t"}, "for 2 examples or more, 't'; got 't' for 1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_max_statistic_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stats.max_statistic(options.pop("differences", sample(2, 5)), **options)
