"""Agreement of scores with exact effects: against loops, by hand, and its refusals."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import Any

import numpy as np
import pytest
from scipy import stats

from interp import metrics
from interp.patching import Effects, activation_patch
from interp.patching.agreement import Agreement, agreement
from interp.patching.attribution import attribution_patch
from interp.results import labelled
from tests.helpers import tiny_bridge
from tests.patching.oracle import prompts


def effects(values: Any, *, method: str = "relp", **changes: Any) -> Effects:
    """Results over layer x pos x example."""
    values = np.asarray(values, dtype=float)
    n = values.shape[-1]
    coords = {"layer": list(range(len(values))), "pos": list(range(values.shape[1])), "example": list(range(n))}
    array = labelled(values, ["layer", "pos", "example"], coords, unit="logits")
    ends = (labelled(np.full(n, float(end)), ["example"], unit="logits") for end in (1, 0))
    record = {"model": "tiny", "method": method}
    return dataclasses.replace(
        Effects(array, record, *ends, "denoise", "mlp_out", "swap", "logit_difference"), **changes
    )


def drawn(seed: int = 0, shape: tuple[int, int] = (4, 6), n: int = 12, error: float = 0.6) -> tuple[Effects, Effects]:
    rng = np.random.default_rng(seed)
    exact = rng.standard_t(3, size=shape)[..., None] + rng.normal(size=(*shape, n))
    return effects(exact), effects(exact + error * rng.normal(size=(*shape, n)) + error * rng.normal(size=(*shape, 1)))


def means(result: Effects) -> np.ndarray:
    return result.values.mean("example").values.astype(np.float64).ravel()


def test_estimates_equal_those_of_scipy_and_of_sets() -> None:
    exact, scores = drawn()
    found = agreement(exact, scores, k=5)
    a, b = means(exact), means(scores)
    assert found.pearson == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-6)
    assert found.spearman == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-6)
    best, others = (set(np.argsort(-abs(x))[:5].tolist()) for x in (a, b))
    assert found.precision == pytest.approx(len(best & others) / 5)
    assert found.sign == pytest.approx(np.mean([a[i] * b[i] > 0 for i in best]))
    assert 0 < found.precision < 1  # else the test could not tell


def test_bounds_and_stability_equal_those_of_a_loop() -> None:
    exact, scores = drawn(seed=1)
    k, resamples, level = 4, 150, 0.9
    found = agreement(exact, scores, k=k, level=level, n_resamples=resamples, seed=3)
    n = exact.values.sizes["example"]
    x, y = (e.values.values.astype(np.float64).reshape(-1, n) for e in (exact, scores))
    draws: dict[str, list[float]] = {name: [] for name in ("pearson", "spearman", "precision", "sign")}
    tops = []
    for counts in np.random.default_rng(3).multinomial(n, np.full(n, 1 / n), size=resamples):
        rows = np.repeat(np.arange(n), counts)
        a, b = x[:, rows].mean(1), y[:, rows].mean(1)
        best, top = (set(np.argsort(-abs(z), kind="stable")[:k].tolist()) for z in (a, b))
        draws["pearson"].append(stats.pearsonr(a, b).statistic)
        draws["spearman"].append(stats.spearmanr(a, b).statistic)
        draws["precision"].append(len(best & top) / k)
        draws["sign"].append(np.mean([a[i] * b[i] > 0 for i in best]))
        tops.append(top)
    for name, values in draws.items():
        expected = np.quantile(values, [0.05, 0.95])
        np.testing.assert_allclose(found.interval(name), expected, atol=1e-6)  # type: ignore[arg-type]
    overlaps = [len(s & t) / len(s | t) for s, t in itertools.combinations(tops, 2)]
    assert found.stability == pytest.approx(np.mean(overlaps), abs=1e-5)
    np.testing.assert_allclose(found.interval("stability"), np.quantile(overlaps, [0.05, 0.95]), atol=1e-6)
    assert 0.3 < found.stability < 0.99


def test_examples_are_resampled_together() -> None:
    """Scores that equal the effects on every example agree on every resample, however much examples vary."""
    rng = np.random.default_rng(0)
    exact = effects(20 * rng.normal(size=(3, 5, 8)))
    found = agreement(exact, exact, k=4)
    for name in ("pearson", "spearman", "precision", "sign"):
        assert found.interval(name) == pytest.approx((1, 1), abs=1e-6)  # type: ignore[arg-type]
    assert found.stability < 0.9


def test_blocks_of_resamples_do_not_change_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, scores = drawn()
    whole = agreement(exact, scores)
    monkeypatch.setattr(sys.modules["interp.patching.agreement"], "_BLOCK", 24 * 7)
    np.testing.assert_allclose(agreement(exact, scores).values, whole.values, atol=1e-6)


def test_cells_that_cannot_matter_do_not_raise_the_correlation_of_ranks() -> None:
    exact, scores = drawn(error=2.0)
    padded = [
        effects(np.concatenate([e.values.values, np.zeros_like(e.values.values)], axis=1)) for e in (exact, scores)
    ]
    alone, among_zeros = agreement(exact, scores, k=5), agreement(*padded, k=5)
    assert among_zeros.spearman == pytest.approx(alone.spearman, abs=1e-6)
    assert among_zeros.precision == alone.precision and among_zeros.sign == alone.sign
    assert among_zeros.interval("spearman") == pytest.approx(alone.interval("spearman"), abs=1e-6)
    assert (alone.provenance["n_cells"], alone.provenance["n_zero"]) == (24, 0)
    assert (among_zeros.provenance["n_cells"], among_zeros.provenance["n_zero"]) == (48, 24)
    # Pearson is over all cells, as published
    a, b = (means(e) for e in padded)
    assert among_zeros.pearson == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-6)
    # a cell that is 0 in one of the two only is a miss, and stays
    missed = padded[1].values.values.copy()
    missed[0, 0] = 0
    assert agreement(padded[0], effects(missed), k=5).provenance["n_zero"] == 24


def test_signs_and_scale() -> None:
    exact, _ = drawn()
    flipped = agreement(exact, effects(-3 * exact.values.values), k=5)
    assert (flipped.pearson, flipped.sign, flipped.precision) == pytest.approx((-1, 0, 1), abs=1e-6)
    magnitudes = effects(abs(exact.values.mean("example", keepdims=True).values) * np.ones(12))
    magnitudes = dataclasses.replace(magnitudes, provenance={"method": "gradient", "grad_drop": True})
    unsigned = agreement(exact, magnitudes, k=5)
    assert unsigned.pearson == pytest.approx(1, abs=1e-6) and np.isnan(unsigned.sign)
    assert "no sign" in repr(unsigned) and (unsigned.reference >= 0).all()


@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_constant_scores_agree_with_nothing_and_it_is_said(constant: float) -> None:
    exact, _ = drawn()
    found = agreement(exact, effects(np.full((4, 6, 12), constant)), k=5)
    for name in ("pearson", "spearman", "precision", "stability"):
        assert np.isnan(getattr(found, name)) and np.isnan(found.interval(name)).all()  # type: ignore[arg-type]
    assert found.sign == (0.0 if constant == 0 else pytest.approx((np.sort(means(exact)) > 0).mean(), abs=0.5))
    assert "rank nothing and correlate with nothing" in repr(found)
    assert "r undefined" in found.plot().layout.title.text


@pytest.mark.parametrize("site", ["mlp_out", "z"])
def test_on_a_model_dimensions_may_be_in_any_order(site: Any) -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    metric = metrics.logit_difference(p)
    axes = ("layer", "pos") if site == "mlp_out" else ("layer", "pos", "head")
    exact = activation_patch(bridge, p, metric, site=site, axes=axes)
    scores = attribution_patch(bridge, p, metric, sites=[site], axes=axes[::-1])[site]
    assert scores.values.dims[:-1] == axes[::-1]
    found = agreement(exact, scores, k=3)
    expected = np.corrcoef(exact.mean().values.ravel(), scores.mean().transpose(*axes).values.ravel())[0, 1]
    assert found.pearson == pytest.approx(expected, abs=1e-5) and expected > 0.3
    assert found.provenance["n_zero"] > 0
    assert found.provenance["method"] == "gradient" and found.provenance["reference"] == exact.provenance


def test_figure_table_and_file(tmp_path: Any) -> None:
    exact, scores = drawn()
    found = agreement(exact, scores, k=5)
    (points,) = found.plot().data
    np.testing.assert_allclose(points.x, means(exact), atol=1e-6)
    np.testing.assert_allclose(points.y, means(scores), atol=1e-6)
    np.testing.assert_array_equal(points.marker.color, np.repeat(range(4), 6))
    low, high = found.interval("pearson")
    assert f"r = {found.pearson:.3f} [{low:.3f}, {high:.3f}]" in found.plot().layout.title.text
    frame = found.to_dataframe()
    assert frame["statistic"].tolist() == ["pearson", "spearman", "precision", "sign", "stability"]
    assert frame["estimate"][0] == found.pearson and list(frame.columns) == ["statistic", "estimate", "low", "high"]
    assert "24 cells, 0 of them exactly 0 in both, 12 examples" in repr(found) and "precision@5" in repr(found)
    loaded = Agreement.load(found.save(tmp_path / "agreement.nc"))
    assert loaded.values.identical(found.values) and loaded.reference.identical(found.reference)
    assert repr(loaded) == repr(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": "z"}, "the reference has site='mlp_out' and the approximation site='z': two different experiments"),
        ({"direction": "noise"}, "direction='denoise' and the approximation direction='noise'"),
        ({"metric": "answer_prob"}, "run both with the same metric"),
        ({"value": "zero"}, "value='swap' and the approximation value='zero'"),
    ],
)
def test_different_experiments_are_refused(change: dict[str, Any], message: str) -> None:
    exact, scores = drawn()
    with pytest.raises(ValueError, match=message):
        agreement(exact, dataclasses.replace(scores, **change))


def test_other_prompts_and_models_are_refused() -> None:
    exact, scores = drawn()
    for key, (mine, other) in {"prompts": ({"seed": 0}, {"seed": 5}), "revision": ("sha256:a", "sha256:b")}.items():
        one = dataclasses.replace(exact, provenance={**exact.provenance, key: mine})
        with pytest.raises(ValueError, match=f"the reference is of {key} .*two different experiments"):
            agreement(one, dataclasses.replace(scores, provenance={**scores.provenance, key: other}))
        agreement(one, dataclasses.replace(scores, provenance={**scores.provenance, key: mine}))


@pytest.mark.usefixtures("unchecked")
def test_refusals_say_what_is_wrong() -> None:
    exact, scores = drawn()

    def changed(values: Any) -> Effects:
        return dataclasses.replace(scores, values=values)

    with pytest.raises(
        ValueError, match=r"coordinate 'pos': 6 \(0, 1, 2, 3, 4, 5\) in the reference and 3 \(0, 1, 2\)"
    ):
        agreement(exact, changed(scores.values.isel(pos=slice(3))))
    with pytest.raises(ValueError, match="coordinate 'example'"):
        agreement(exact, changed(scores.values.isel(example=slice(3))))
    with pytest.raises(
        ValueError, match=r"dimensions \('layer', 'pos', 'example'\) and the approximation \('layer', 'h"
    ):
        agreement(exact, changed(scores.values.rename(pos="head")))
    holes = scores.values.copy()
    holes[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="the approximation holds 1 of 288 values that are NaN or infinite"):
        agreement(exact, changed(holes))
    one = [dataclasses.replace(e, values=e.values.isel(example=[0])) for e in (exact, scores)]
    with pytest.raises(ValueError, match="the results hold 1 example, of which nothing can be resampled"):
        agreement(*one)
    with pytest.raises(
        ValueError, match="all 24 exact mean effects are 0: there is nothing that scores could agree with"
    ):
        agreement(effects(np.zeros((4, 6, 12))), scores)
    with pytest.raises(ValueError, match="k=24, but 24 of 24 cells are not exactly 0.*expected k from 1 to 23"):
        agreement(exact, scores, k=24)
    with pytest.raises(ValueError, match="n_resamples=50 is too few"):
        agreement(exact, scores, n_resamples=50)
    with pytest.raises(ValueError, match="level=95 must lie between 0 and 1"):
        agreement(exact, scores, level=95)
    with pytest.raises(
        ValueError, match=r"approximation is dict, expected Effects; attribution_patch gives one per site"
    ):
        agreement(exact, {"mlp_out": scores})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="statistic='pearsn' is unknown; did you mean 'pearson'"):
        agreement(exact, scores).interval("pearsn")  # type: ignore[arg-type]
