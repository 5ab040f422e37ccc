"""The scorer against least squares by hand, and against planted relations that it must and must not find."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from interp.patching import LocalisationScore, score_localisation

LAYERS, EXAMPLES = 4, 40


def planted(
    within: float, between: float = 1.0, noise: float = 0.3, seed: int = 0
) -> tuple[xr.DataArray, xr.DataArray]:
    """Success that follows a localisation within layers, between them, or neither."""
    rng = np.random.default_rng(seed)
    level = np.array([0.0, 2.0, 1.0, -1.0])[:, None]
    x = between * level + rng.standard_normal((LAYERS, EXAMPLES))
    y = level + within * (x - between * level) + noise * rng.standard_normal((LAYERS, EXAMPLES))
    return cells(x), cells(y)


def cells(values: np.ndarray) -> xr.DataArray:
    coords = {"layer": np.arange(values.shape[0]), "example": np.arange(values.shape[1])}
    return xr.DataArray(values.astype(np.float32), dims=("layer", "example"), coords=coords)


def least_squares(design: np.ndarray, y: np.ndarray) -> float:
    guess = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return float(1 - ((y - guess) ** 2).sum() / ((y - y.mean()) ** 2).sum())


FAST: dict[str, Any] = {"n_resamples": 200, "n_permutations": 99}


def test_r_squared_is_that_of_least_squares() -> None:
    x, y = planted(0.5, between=0.3, noise=1.0)
    found = score_localisation(x, y, **FAST)
    a, b = x.values.ravel().astype(float), y.values.ravel().astype(float)
    dummies = np.kron(np.eye(LAYERS), np.ones((EXAMPLES, 1)))
    designs = [
        np.stack([np.ones_like(a), a], 1), dummies, np.c_[dummies, a], np.c_[dummies, dummies * a[:, None]],
    ]  # fmt: skip
    expected = [least_squares(design, b) for design in designs]
    assert found.values.sel(bound="estimate").values == pytest.approx(expected, abs=1e-6)
    assert float(found.increment.sel(bound="estimate")) == pytest.approx(expected[2] - expected[1], abs=1e-6)
    slope = np.linalg.lstsq(designs[2], b, rcond=None)[0][-1]
    assert float(found.slope.sel(bound="estimate")) == pytest.approx(slope, abs=1e-5)


def test_resamples_are_of_whole_examples() -> None:
    """A bootstrap by hand: examples drawn with replacement, all layers of one together."""
    x, y = planted(0.5, noise=1.0)
    found = score_localisation(x, y, n_resamples=400, n_permutations=9)
    rng = np.random.default_rng(5)
    gains = []
    for _ in range(400):
        rows = rng.integers(0, EXAMPLES, EXAMPLES)
        a, b = x.values[:, rows].ravel().astype(float), y.values[:, rows].ravel().astype(float)
        dummies = np.kron(np.eye(LAYERS), np.ones((EXAMPLES, 1)))
        gains.append(least_squares(np.c_[dummies, a], b) - least_squares(dummies, b))
    low, high = np.quantile(gains, [0.025, 0.975])
    assert float(found.increment.sel(bound="low")) == pytest.approx(low, abs=0.02)
    assert float(found.increment.sel(bound="high")) == pytest.approx(high, abs=0.02)


def test_chance_exchanges_whole_examples() -> None:
    """Where layers of one example are alike, an exchange has as many things to exchange as there are examples."""
    rng = np.random.default_rng(0)
    x, y = (cells(np.tile(rng.standard_normal(EXAMPLES), (LAYERS, 1))) for _ in range(2))
    y[:, :] += 1e-3 * rng.standard_normal(y.shape)
    found = score_localisation(x, y, n_resamples=10, n_permutations=400)
    # the mean square correlation of n random pairs, which LAYERS * n pairs would make smaller
    assert float(found.increment.sel(bound="chance")) == pytest.approx(1 / (EXAMPLES - 1), rel=0.25)


def test_the_level_is_that_of_the_intervals() -> None:
    x, y = planted(0.5, noise=1.0)
    half, most = (score_localisation(x, y, level=level, n_resamples=200, n_permutations=9) for level in (0.5, 0.95))
    for wide, narrow in ((most.increment, half.increment), (most.slope, half.slope)):
        assert float(wide.sel(bound="low")) < float(narrow.sel(bound="low"))
        assert float(narrow.sel(bound="high")) < float(wide.sel(bound="high"))


def test_held_out_by_hand() -> None:
    """Least squares on the other folds, for folds drawn here: they hardly matter where each holds two examples."""
    x, y = planted(0.5, between=0.3, noise=1.0)
    found = score_localisation(x, y, folds=EXAMPLES // 2, **FAST).values.sel(bound="heldout").values
    a, b = x.values.astype(float), y.values.astype(float)
    errors, about = np.zeros(4), 0.0
    for k in range(EXAMPLES // 2):
        test = np.arange(EXAMPLES) // 2 == k

        def designs(part: np.ndarray) -> list[np.ndarray]:
            values = a[:, part].ravel()
            dummies = np.kron(np.eye(LAYERS), np.ones((int(part.sum()), 1)))
            return [
                np.stack([np.ones_like(values), values], 1), dummies, np.c_[dummies, values],
                np.c_[dummies, dummies * values[:, None]],
            ]  # fmt: skip

        left, seen = b[:, test].ravel(), b[:, ~test].ravel()
        fits = [np.linalg.lstsq(design, seen, rcond=None)[0] for design in designs(~test)]
        errors += [((left - design @ fit) ** 2).sum() for design, fit in zip(designs(test), fits, strict=True)]
        about += ((left - seen.mean()) ** 2).sum()
    assert found == pytest.approx(1 - errors / about, abs=0.01)
    few = score_localisation(x, y, folds=2, **FAST).values.sel(bound="heldout").values
    assert (few[1:] < found[1:]).all()  # fitted on half of the examples


def test_held_out_is_least_squares_on_the_rest() -> None:
    x, y = planted(0.5, noise=1.0)
    found = score_localisation(x, y, folds=EXAMPLES // 2, **FAST)
    assert float(found.increment.sel(bound="heldout")) == pytest.approx(
        float(found.increment.sel(bound="estimate")), abs=0.05
    )
    both = found.values.sel(bound="heldout") < found.values.sel(bound="estimate")
    assert both.all()


def test_what_follows_the_localisation_within_layers_is_found() -> None:
    found = score_localisation(*planted(1.0), **FAST)  # in the population 1 / (1.25 + 1 + 0.09) = 0.43
    assert float(found.increment.sel(bound="low")) > 0.2
    assert found.p_value.sel(model="layer + localisation") == pytest.approx(0.01, abs=1e-6)
    assert float(found.increment.sel(bound="heldout")) > 0.3
    assert abs(float(found.increment.sel(bound="chance"))) < 0.02
    assert float(found.slope.sel(bound="low")) < 1 < float(found.slope.sel(bound="high")) + 0.05


def test_what_only_the_layers_share_is_not() -> None:
    """Both are high in the same layers, and no more: a correlation over cells is strong and says nothing of facts."""
    small, p_values, held = [], [], []
    for seed in range(20):
        found = score_localisation(*planted(0.0, seed=seed), **FAST)
        assert float(found.values.sel(model="localisation", bound="estimate")) > 0.3
        small.append(float(found.increment.sel(bound="estimate")))
        p_values.append(float(found.p_value.sel(model="layer + localisation")))
        held.append(float(found.increment.sel(bound="heldout")))
    assert max(small) < 0.01 and np.mean(held) < 0
    assert np.mean(np.array(p_values) < 0.1) <= 0.25 and 0.3 < np.mean(p_values) < 0.7


def test_slopes_that_differ_by_layer() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 60))
    found = score_localisation(cells(x), cells(np.array([[1.0], [-1.0]]) * x), **FAST)
    assert float(found.values.sel(model="layer x localisation", bound="estimate")) > 0.999
    assert float(found.increment.sel(bound="estimate")) < 0.1
    assert float(found.p_value.sel(model="layer x localisation")) == pytest.approx(0.01, abs=1e-6)


def test_choosing_a_layer() -> None:
    y = np.zeros((3, 20))
    y[1], y[0, :5] = 0.8, 1.0
    x = np.zeros((3, 20))
    x[0, :10], x[2, 10:] = 1.0, 1.0
    found = score_localisation(cells(x), cells(y), **FAST)
    means = found.chosen.mean("example")
    assert float(means.sel(rule="traced")) == pytest.approx(5 / 20)  # the first five are traced to where 1.0 is
    assert float(means.sel(rule="best")) == pytest.approx(0.8)
    assert float(means.sel(rule="oracle")) == pytest.approx((5 * 1.0 + 15 * 0.8) / 20)
    assert float(means.sel(rule="random")) == pytest.approx(y.mean())
    assert found.choices()["rule"].tolist() == ["traced", "best", "oracle", "random"]


def test_best_is_the_best_of_the_other_examples() -> None:
    y = np.zeros((2, 20))
    y[0, 0], y[1] = 12.0, 0.5  # layer 0 is the best on average, by example 0 alone
    found = score_localisation(cells(y), cells(y), **FAST)
    assert found.chosen.sel(rule="best").values.tolist() == [0.5] + [0.0] * 19


def test_a_localisation_that_is_constant_in_a_layer_explains_nothing_there() -> None:
    x, y = planted(1.0)
    x[2] = 0.0
    found = score_localisation(x, y, **FAST)
    assert np.isfinite(found.values.values).all() and np.isfinite(found.increment.values).all()
    nothing = score_localisation(0 * x, y, **FAST)
    assert float(nothing.increment.sel(bound="estimate")) == 0
    assert float(nothing.p_value.sel(model="layer + localisation")) == 1
    assert float(nothing.values.sel(model="localisation", bound="estimate")) == 0


def test_result(tmp_path: Any) -> None:
    x, y = planted(0.5)
    found = score_localisation(x, y.transpose("example", "layer"), **FAST)
    assert found.summary()["model"].tolist() == [
        "localisation",
        "layer",
        "layer + localisation",
        "layer x localisation",
    ]
    assert list(found.summary()) == ["model", "estimate", "low", "high", "heldout", "p_value"]
    assert found.plot().layout.yaxis.title.text == "R squared"
    assert len(found.plot_cells().data) >= 1
    loaded = LocalisationScore.load(found.save(tmp_path / "l.nc"))
    assert loaded.values.identical(found.values) and loaded.chosen.identical(found.chosen)
    same = score_localisation(x, y, **FAST)
    assert same.values.identical(found.values) and same.increment.identical(found.increment)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x.expand_dims(pos=3), y), r"expected \(layer, example\). Take one position"),
        (
            lambda x, y: (x.isel(layer=slice(1, 4)), y),
            r"localisation has layers \[1, 2, 3\] and success \[0, 1, 2, 3\]",
        ),
        (lambda x, y: (x.where(x < 1), y), "cells of localisation are unmeasured"),
        (lambda x, y: (x, 0 * y + 1), "success is 1.0 in every cell"),
        (lambda x, y: (x.isel(example=slice(6)), y.isel(example=slice(6))), "6 examples cannot make 5 folds"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refusals(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_localisation(*change(*planted(0.5)))
    with pytest.raises(ValueError, match="level=2"):
        score_localisation(*planted(0.5), level=2)
