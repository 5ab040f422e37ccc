"""Verification: the patched cells equal the whole sweep, others do not run, estimates, warnings and refusals."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from interp import hooks, metrics
from interp.models import geometry
from interp.patching import Effects, activation_patch, agreement, causal_trace, edge_attribution, path_patch
from interp.patching._comparing import weighted_statistics
from interp.patching.attribution import attribution_patch
from interp.patching.verification import PoorApproximation, Verification, verify
from tests.helpers import FAMILIES, fresh_bridge, tiny_bridge
from tests.patching.oracle import N, prompts


def noisy(exact: Effects, error: float = 0.5, seed: int = 0) -> Effects:
    """Scores that are the exact effects with an error, 0 where these are."""
    values = exact.values
    draw = np.random.default_rng(seed).normal(size=values.shape)
    error = error * float(values.std())
    return dataclasses.replace(exact, values=values + (error * draw * (values != 0)).astype(np.float32))


def check(bridge: Any, p: Any, metric: Any, scores: Effects, **options: Any) -> Verification:
    """Verify without the warning, which has a test of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoorApproximation)
        return verify(bridge, p, metric, scores, **{"n_resamples": 100, **options})


CASES: list[tuple[str, dict[str, Any]]] = [
    ("resid_pre", {}),
    ("resid_mid", {"direction": "noise"}),
    ("mlp_out", {"axes": ("pos", "layer"), "value": "mean"}),
    ("attn_out", {"positions": ["s2", "end"], "value": "zero"}),
    ("z", {"axes": ("head", "layer", "pos")}),
    ("q", {"direction": "noise", "positions": ["s1", 7]}),
    ("v", {"layers": [2, 0]}),
    ("pattern", {"direction": "noise"}),
    ("neuron", {"neurons": [5, 0, 17, 40], "axes": ("layer", "neuron", "pos")}),
    ("resid_post", {"value": "resample", "n_draws": 2, "seed": 3}),
    ("mlp_out", {"value": "gaussian", "noise": 1.0, "seed": 5}),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("site", "options"), CASES)
def test_patched_cells_equal_the_whole_sweep(family: str, site: Any, options: dict[str, Any]) -> None:
    bridge, p = tiny_bridge(family), prompts()
    if site == "resid_mid" and geometry(bridge).parallel:
        site = "resid_pre"
    metric = metrics.logit_difference(p)
    exact = activation_patch(bridge, p, metric, site=site, **options)
    scores = noisy(exact)
    found = check(bridge, p, metric, scores, k=3, n_random=4, seed=1)
    assert found.values.dims == exact.values.dims and found.values.coords.equals(exact.values.coords)
    patched = np.isfinite(found.values.values).all(-1)
    assert (patched == (found.group.values > 0)).all() and patched.sum() == found.k + found.n_random
    assert found.k == 3 and found.n_random == min(4, exact.mean().size - 3 - (found.group.values == -1).sum())
    assert np.isnan(found.values.values[~patched]).all()
    # the sums of a forward may be taken in another order where fewer rows share a batch
    np.testing.assert_allclose(found.values.values[patched], exact.values.values[patched], atol=2e-6, rtol=1e-5)
    assert abs(exact.values.values[patched]).max() > 0.01
    top = np.argsort(-abs(scores.mean().values).ravel())[:3]
    assert set(np.flatnonzero(found.group.values.ravel() == 2)) == set(top)
    # whatever was not drawn and is not at the top could have an effect, unless it is said that it cannot
    assert (exact.values.values[found.group.values == -1] == 0).all()


def test_cells_of_a_slice_and_of_named_positions_together() -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    metric = metrics.logit_difference(p)
    exact = activation_patch(bridge, p, metric, site="k", positions=["s1", "end"])  # positions together, kv heads
    assert exact.cells == ("layer", "kv_head")
    part = dataclasses.replace(exact, values=exact.values.isel(kv_head=[1], layer=[2, 0]))
    found = check(bridge, p, metric, noisy(part), k=1, n_random=9)
    np.testing.assert_allclose(found.values.values, part.values.values, atol=2e-6)


def test_only_the_chosen_cells_run_and_the_cost_is_what_ran() -> None:
    bridge, p = fresh_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    exact = activation_patch(bridge, p, metric, site="z", axes=("layer", "head", "pos"))
    scores = noisy(exact)
    geometry(bridge), hooks.supports_prefix_reuse(bridge)
    ran = 0

    def count(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal ran
        resid = args[0] if args else kwargs["hidden_states"]
        ran += resid.shape[0] * resid.shape[1]

    for block in bridge.blocks:
        block.original_component.register_forward_pre_hook(count, with_kwargs=True)
    found = check(bridge, p, metric, scores, k=4, n_random=3)
    cost = found.provenance["cost"]
    assert cost["cells"] == 7 and cost["rows"] == 7 * N and 0 < cost["rows_run"] <= 7 * N
    forwards = ran / (N * p.clean.shape[1] * 3)
    # scores of the runs as they are take a last block more
    assert forwards - 1 <= cost["forwards"] <= forwards + 1
    assert cost["forwards"] < 0.15 * cost["forwards_full_sweep"] and cost["forwards_full_sweep"] == 3 * 4 * 8 + 2


def test_a_plain_callable_is_scored_once_per_chosen_cell() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    calls = 0

    def metric(logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return logits[:, -1, 10] - logits[:, -1, 30]

    exact = activation_patch(bridge, p, metric, site="mlp_out")
    calls = 0
    found = check(bridge, p, metric, noisy(exact), k=4, n_random=3)
    assert calls == 7 + 2  # and the two runs as they are
    patched = np.isfinite(found.values.values)
    np.testing.assert_allclose(found.values.values[patched], exact.values.values[patched], atol=2e-6)


def test_with_all_cells_the_estimates_are_those_of_the_whole_sweep() -> None:
    bridge, p = tiny_bridge("gemma2"), prompts(n=6)
    metric = metrics.logit_difference(p)
    exact = activation_patch(bridge, p, metric, site="attn_out")
    scores = noisy(exact, error=0.8)
    found = check(bridge, p, metric, scores, k=5, n_random=1000)
    matter = (found.group.values >= 0) | (exact.values.values != 0).any(-1)
    a, b = exact.mean().values[matter], scores.mean().values[matter]
    assert 5 < len(a) < exact.mean().size
    assert found.pearson == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-5)
    assert found.spearman == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-5)
    assert found.estimate("sign") == pytest.approx((np.sign(a) == np.sign(b)).mean(), abs=1e-6)
    best, top = (set(np.argsort(-abs(x))[:5].tolist()) for x in (a, b))
    assert found.precision == pytest.approx(len(best & top) / 5)
    assert "every cell that can matter was patched" in repr(found)
    for group, rows in (("top", sorted(top)), ("random", sorted(set(range(len(a))) - top))):
        assert found.estimate("pearson", group) == pytest.approx(np.corrcoef(a[rows], b[rows])[0, 1], abs=1e-5)  # type: ignore[arg-type]


def test_a_sample_estimates_the_whole() -> None:
    """Over seeds, the estimates centre on the statistics of all cells, which the top alone misjudges."""
    rng = np.random.default_rng(0)
    exact = rng.standard_t(3, size=(200, 1)) + 0.1 * rng.normal(size=(200, 5))
    scores = 0.6 * exact + 0.7 * rng.normal(size=(200, 1))
    a, b = exact.mean(1), scores.mean(1)
    order = np.argsort(-abs(b))
    whole = np.array(
        [np.corrcoef(a, b)[0, 1], stats.spearmanr(a, b).statistic, (a * b > 0).mean(),
         len(set(order[:20].tolist()) & set(np.argsort(-abs(a))[:20].tolist())) / 20]
    )  # fmt: skip
    drawn = []
    for seed in range(200):
        group = np.zeros(200, dtype=int)
        group[order[:20]] = 2
        group[np.random.default_rng(seed).permutation(order[20:])[:30]] = 1
        table = weighted_statistics(
            exact[:, :1] * 0 + a[:, None], scores[:, :1] * 0 + b[:, None], group, 180,
            no_sign=False, level=0.95, n_resamples=100, seed=0,
        )  # fmt: skip
        drawn.append(table[:, :, 0])
    mean = np.mean(drawn, axis=0)
    np.testing.assert_allclose(mean[2], whole, atol=0.05)
    assert abs(mean[0] - whole)[2] > 0.1  # signs at the top are easier than elsewhere


def test_poor_scores_warn_with_numbers_and_good_ones_do_not() -> None:
    bridge, p = tiny_bridge("neox"), prompts(n=8)
    metric = metrics.logit_difference(p)
    exact = activation_patch(bridge, p, metric, site="mlp_out")
    good = verify(
        bridge, p, metric, noisy(exact, error=0.01), k=3, n_random=20, n_resamples=100
    )  # a warning would be an error
    assert good.poor == [] and good.pearson > 0.99 and "verdict: holds (nothing below 0.8)" in repr(good)
    shuffled = exact.values.copy(data=exact.values.values[::-1, ::-1])
    scores = dataclasses.replace(exact, values=shuffled)
    with pytest.warns(
        PoorApproximation, match=r"pearson is -?0\.\d\d \[.*\], below 0\.8.*the top 3 and \d+ random cells"
    ):
        found = verify(bridge, p, metric, scores, k=3, n_random=20, n_resamples=100)
    assert found.pearson < 0.8 and "verdict: poor: pearson" in repr(found) and found.precision < 0.8
    assert issubclass(PoorApproximation, UserWarning)
    verify(bridge, p, metric, scores, k=3, n_random=20, warn_below=-1, n_resamples=100)  # no warning
    # one large cell that was missed shows in precision and among the random cells
    best = np.unravel_index(abs(exact.mean().values).argmax(), exact.mean().shape)
    missed = exact.values.copy()
    missed[best] = 0
    with pytest.warns(PoorApproximation, match="precision@1 is 0.00"):
        found = verify(
            bridge, p, metric, dataclasses.replace(exact, values=missed), k=1, n_random=1000, n_resamples=100
        )
    frame = found.to_dataframe()
    assert frame.loc[frame["exact"].abs().idxmax(), "group"] == "random"


def test_where_the_top_is_everything_precision_is_not_a_finding() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    exact = activation_patch(bridge, p, metric, site="mlp_out")
    matter = int((exact.values.values != 0).any(-1).sum())
    found = verify(bridge, p, metric, exact, k=24, n_resamples=100)  # no warning
    assert (found.k, found.n_random) == (matter, 0) and matter < 24
    assert np.isnan(found.precision) and found.pearson == pytest.approx(1) and found.poor == []
    # a score where nothing can matter is an error, and is checked
    wrong = exact.values.copy()
    wrong[0, 0] = 10.0
    with pytest.warns(PoorApproximation, match="pearson is"):
        found = verify(bridge, p, metric, dataclasses.replace(exact, values=wrong), k=3, n_resamples=100)
    assert found.group.values[0, 0] == 2 and (found.values.values[0, 0] == 0).all()


def test_attribution_scores_are_verified_as_they_come() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    for site, axes in (("mlp_out", None), ("z", ("layer", "head")), ("v", ("layer", "head", "pos"))):
        scores = attribution_patch(bridge, p, metric, sites=[site], axes=axes, direction="noise")[site]  # type: ignore[arg-type]
        found = check(bridge, p, metric, scores, k=4, n_random=4)
        exact = activation_patch(bridge, p, metric, site=site, axes=axes, direction="noise")  # type: ignore[arg-type]
        patched = np.isfinite(found.values.values)
        np.testing.assert_allclose(found.values.values[patched], exact.values.values[patched], atol=2e-6)
        assert found.provenance["method"] == "gradient" and found.provenance["direction"] == "noise"
    magnitudes = attribution_patch(bridge, p, metric, sites=["mlp_out"], grad_drop=True)["mlp_out"]
    found = check(bridge, p, metric, magnitudes, k=4, n_random=4)
    assert "no sign" in repr(found) and np.isnan(found.estimate("sign")) and np.isfinite(found.pearson)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scores_of_edges_are_verified_in_one_call(family: str) -> None:
    """The patched edges have the effects that path_patch gives; with all edges it is the agreement of the whole."""
    bridge, p = tiny_bridge(family), prompts()
    metric = metrics.logit_difference(p)
    scores = edge_attribution(bridge, p, metric, method="relp", direction="noise", positions=["s2", "end"])
    found = check(bridge, p, metric, scores, k=6, n_random=5)
    frame = found.to_dataframe()
    assert list(frame["group"]).count("top") == 6 and list(frame["group"]).count("random") == 5
    assert set(frame["edge"][:6]) == set(scores.top(6)["edge"])
    exact = path_patch(bridge, p, metric, list(frame["edge"]), direction="noise", positions=["s2", "end"])
    np.testing.assert_allclose(frame["exact"], exact.mean().values, rtol=1e-4, atol=1e-6)
    assert found.provenance["n_cells"] == scores.graph.n_edges and "scores (edge, noise)" in repr(found)
    assert found.provenance["cost"]["forwards"] < 20 < found.provenance["cost"]["forwards_full_sweep"]
    with pytest.raises(ValueError, match="another metric"):
        verify(bridge, p, metrics.answer_prob(p), scores)
    with pytest.raises(ValueError, match="these are of edges"):
        verify(bridge, p, metric, scores, dictionary=object())


def test_all_edges_checked_is_their_agreement_with_path_patching() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    scores = edge_attribution(bridge, p, metric)
    edges = scores.top(30)["edge"]
    few = dataclasses.replace(scores, values=scores.values.where(scores.graph.mask(edges).numpy()[..., None]))
    with pytest.raises(ValueError, match="are NaN or infinite"):
        verify(bridge, p, metric, few)
    found = check(bridge, p, metric, scores, k=10, n_random=10**6)
    whole = agreement(path_patch(bridge, p, metric, scores.graph.edges()), scores.effects(), k=10, n_resamples=100)
    assert found.pearson == pytest.approx(whole.pearson, abs=1e-5)
    assert found.precision == pytest.approx(whole.precision, abs=1e-9)


def test_figure_table_and_file(tmp_path: Any) -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    exact = activation_patch(bridge, p, metric, site="mlp_out")
    found = check(bridge, p, metric, noisy(exact), k=4, n_random=3)
    frame = found.to_dataframe()
    assert frame["group"].value_counts().to_dict() == {"top": 4, "random": 3}
    assert (frame["group"][:4] == "top").all() and frame["approximation"].abs().is_monotonic_decreasing
    row = frame.iloc[2]
    assert row["exact"] == pytest.approx(float(exact.mean().sel(layer=row["layer"], pos=row["pos"])), abs=2e-6)
    figure = found.plot()
    assert {trace.name: len(trace.x) for trace in figure.data} == {"top": 4, "random": 3}
    loaded = Verification.load(found.save(tmp_path / "verification.nc"))
    assert repr(loaded) == repr(found) and loaded.group.identical(found.group)
    assert found.interval("precision")[0] <= found.precision <= found.interval("precision")[1]


def test_one_example_has_estimates_without_intervals() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts(n=1)
    metric = metrics.logit_difference(p)
    found = check(bridge, p, metric, noisy(activation_patch(bridge, p, metric, site="mlp_out")), k=4, n_random=4)
    assert np.isfinite(found.pearson) and np.isnan(found.interval("pearson")).all() and "no interval" in repr(found)


@pytest.fixture
def scored() -> tuple[Any, Any, Any, Effects]:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    return bridge, p, metric, activation_patch(bridge, p, metric, site="mlp_out")


@pytest.mark.usefixtures("unchecked")
def test_scores_of_something_else_are_refused_before_any_forward(scored: Any) -> None:
    bridge, p, metric, scores = scored
    other = tiny_bridge("gpt2", 1)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((other, p, metric, scores), "the scores were made with another model: their revision is"),
        (
            (tiny_bridge("llama"), p, metric, scores),
            "another model: their model is 'tiny-gpt2', here it is 'tiny-llama'",
        ),
        ((bridge, p[:2], metrics.logit_difference(p[:2]), scores), "another prompts: their n is 4, here it is 2"),
        ((bridge, prompts(seed=1), metrics.logit_difference(prompts(seed=1)), scores), "their seed is 0, here it is 1"),
        ((bridge, prompts(pos=9), metrics.logit_difference(prompts(pos=9)), scores), "their tokens is 8, here it is 9"),
        ((bridge, p, metrics.answer_prob(p), scores), "another metric: their name is 'logit_difference', here"),
        (
            (bridge, p, metric, {"mlp_out": scores}),
            r"scores is dict, expected Effects; attribution_patch gives one per",
        ),
        ((bridge, p, metric, dataclasses.replace(scores, values=scores.values * np.nan)), "scores are NaN or infinite"),
        (
            (bridge, p, metric, dataclasses.replace(scores, values=scores.values * 0)),
            "all 24 mean scores are 0 in magn",
        ),
        ((bridge, p, metric, dataclasses.replace(scores, values=scores.values.isel(example=[0]))), "hold 1 examples"),
        ((bridge, p, metric, dataclasses.replace(scores, site="mlp")), "site='mlp' is unknown; did you mean"),
        (
            (
                bridge,
                p,
                metric,
                dataclasses.replace(scores, values=scores.values.isel(pos=5, drop=True), provenance={}),
            ),
            "no axis 'pos' and do not record the positions",
        ),
        (
            (bridge, p, metric, dataclasses.replace(scores, values=scores.values.assign_coords(layer=[0, 1, 7]))),
            r"\[7\] do not exist",
        ),
    ]
    for each in (bridge, other, tiny_bridge("llama")):
        geometry(each)
    ran: list[int] = []
    handles = [
        each.blocks[0].register_forward_pre_hook(lambda *args: ran.append(1))
        for each in (bridge, other, tiny_bridge("llama"))
    ]
    try:
        for arguments, message in cases:
            with pytest.raises(ValueError, match=message):
                verify(*arguments)
        with pytest.raises(ValueError, match="k=0 and n_random=20"):
            verify(bridge, p, metric, scores, k=0)
        with pytest.raises(ValueError, match="level=2 must lie between 0 and 1"):
            verify(bridge, p, metric, scores, level=2)
    finally:
        for handle in handles:
            handle.remove()
    assert not ran


def test_prompts_of_the_same_name_and_size_are_told_apart_by_the_metric(scored: Any) -> None:
    bridge, p, metric, scores = scored
    changed = dataclasses.replace(prompts(seed=1), seed=0)
    with pytest.raises(ValueError, match=r"the metric of clean example \d is -?[\d.]+ here and was -?[\d.]+ then"):
        verify(bridge, changed, metrics.logit_difference(changed), scores)
    traced = causal_trace(bridge, p, metric, subject="s1", n_draws=1)
    with pytest.raises(ValueError, match="effects of causal_trace, which are exact already"):
        verify(bridge, p, metric, traced)


def test_hooks_and_modes_are_left_as_found(scored: Any) -> None:
    bridge, p, metric, scores = scored
    before = [len(point.fwd_hooks) for point in bridge.hook_points()]
    with torch.enable_grad():
        check(bridge, p, metric, noisy(scores), k=3, n_random=2)
        assert torch.is_grad_enabled()
    assert [len(point.fwd_hooks) for point in bridge.hook_points()] == before
