"""The five-parameter curve of massive activations: planted parameters, its derivative and its peak."""

from __future__ import annotations

import math

import numpy as np
import pytest

from interp.attention.massive import massive_activations
from interp.attention.massive_dynamics import GrowthCurve, MassiveDynamics, fit_growth, massive_growth
from interp.results import load
from tests.helpers import tiny_bridge, tiny_tokens

STEPS = np.unique(np.concatenate([[0], np.round(np.geomspace(1, 143_000, 40))]))  # about Pythia's checkpoints


def planted(rng: np.random.Generator) -> GrowthCurve:
    """A curve that peaks between 3 % and 120 % of training."""
    decay, start = math.exp(rng.uniform(math.log(0.02), math.log(2))), rng.uniform(0.2, 1.2)
    x = math.exp(_lambert(1 / decay))
    start = min(start, x / 2)
    rate = (x - start) / (rng.uniform(0.03, 1.2) * STEPS[-1])
    return GrowthCurve(rng.uniform(10, 3000), decay, rate, start, rng.uniform(0, 100))


def _lambert(z: float) -> float:
    w = math.log1p(z)
    for _ in range(50):  # Newton's method, independent of scipy
        w -= (w * math.exp(w) - z) / (math.exp(w) * (w + 1))
    return w


def test_planted_curves_come_back_without_noise_and_as_well_as_can_be_with_it():
    rng = np.random.default_rng(0)
    for i in range(100):
        curve = planted(rng)
        values, noise = curve(STEPS), rng.normal(size=len(STEPS))
        fit = fit_growth(STEPS, values)
        assert fit.r2 >= 0.999
        assert fit.peak == pytest.approx(curve.peak, rel=0.01)
        if i % 10 == 0:
            noise *= 0.05 * values.std()
            noisy = values + noise
            truth = 1 - (noise**2).sum() / ((noisy - noisy.mean()) ** 2).sum()
            r2 = fit_growth(STEPS, noisy).r2
            assert r2 >= 0.98
            assert r2 >= truth - 1e-6  # least squares is at least as near as the curve that was planted


def test_the_parameters_come_back_where_the_data_determine_them():
    curve = GrowthCurve(300.0, 0.4, 5e-5, 0.8, 40.0)
    fit = fit_growth(STEPS, curve(STEPS))
    assert fit.parameters == pytest.approx(curve.parameters, rel=1e-4)


def test_jacobian_is_that_of_finite_differences():
    rng = np.random.default_rng(1)
    for _ in range(20):
        curve = planted(rng)
        jacobian = curve.jacobian(STEPS)
        for i, value in enumerate(curve.parameters):
            shifted = []
            for sign in (1, -1):
                changed = list(curve.parameters)
                changed[i] = value * (1 + sign * 1e-6)
                shifted.append(GrowthCurve(*changed)(STEPS))
            slope = (shifted[0] - shifted[1]) / (2e-6 * value)
            assert np.allclose(jacobian[:, i], slope, rtol=1e-5, atol=1e-5 * np.abs(slope).max())


def test_the_peak_is_the_largest_value_of_the_curve():
    rng = np.random.default_rng(2)
    for _ in range(20):
        curve = planted(rng)
        dense = np.linspace(0, 2 * STEPS[-1], 200_001)
        assert curve.peak == pytest.approx(dense[curve(dense).argmax()], abs=dense[1])
        derivative = np.diff(curve([curve.peak * 0.999, curve.peak, curve.peak * 1.001]))
        assert derivative[0] > 0 > derivative[1]
    assert math.isnan(GrowthCurve(1.0, 1.0, 1e-3, 5.0, 0.0).peak)  # before time 0
    assert math.isnan(GrowthCurve(-1.0, 0.1, 1e-3, 0.5, 0.0).peak)  # a trough


def test_no_logarithm_of_a_number_that_is_not_positive():
    with np.errstate(all="raise", under="ignore"):
        for seed in range(5):  # pure noise leads the fit to its bounds
            fit = fit_growth(STEPS, np.random.default_rng(seed).normal(size=len(STEPS)))
            assert min(fit.decay, fit.rate, fit.start) > 0
            assert np.isfinite(fit(STEPS)).all()


def test_every_step_is_the_ratio_of_its_model(tmp_path):
    tokens = tiny_tokens(2, 8)
    models = {step: tiny_bridge("llama", seed) for seed, step in enumerate((0, 1, 3, 10, 30, 100, 300))}
    course = massive_growth(models, tokens)
    for step, bridge in models.items():
        found = massive_activations(bridge, tokens, absolute=None, ratio=1e9).values
        for layer in course.values["layer"].values:
            state = found.sel(state=layer + 1)
            expected = state.sel(statistic="top 1") / state.sel(statistic="median")
            assert np.allclose(course.values.sel(step=step, layer=layer), expected, rtol=1e-6)
    table = course.fits()
    assert table["layer"].tolist() == course.values["layer"].values.tolist()
    assert (table["r2"] > 0).all()
    figure = course.plot([0, 1])
    assert sum(trace.mode == "markers" for trace in figure.data) == 2
    loaded = load(course.save(tmp_path / "course.nc"))
    assert isinstance(loaded, MassiveDynamics)
    assert loaded.values.identical(course.values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GrowthCurve(1.0, 1.0, 1.0, 0.0, 0.0), "start=0.0 must be positive"),
        (lambda: GrowthCurve(1.0, 1.0, 1.0, 1.0, 0.0)([-1.0]), "time -1.0 is before 0"),
        (lambda: fit_growth([0, 1, 2, 3, 4], [1, 2, 3, 4, 5]), "5 distinct times for 5 parameters"),
        (lambda: fit_growth([0, 1], [1, 2, 3]), "equal length"),
        (lambda: fit_growth(range(-1, 9), range(10)), "time -1.0 is before 0"),
        (lambda: fit_growth(range(8), [1] * 8), "all values are 1.0"),
        (lambda: fit_growth(range(8), [math.nan] * 8), "must be finite"),
        (lambda: massive_growth({}, tiny_tokens(1, 5)), "got no models"),
    ],
)
def test_errors(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
