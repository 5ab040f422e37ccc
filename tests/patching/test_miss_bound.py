"""The miss bound: coverage of the largest effect, its width, joint patches against an oracle, and its refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from interp import hooks, metrics
from interp.models import geometry
from interp.patching import Effects, activation_patch
from interp.patching._joint import patch_sets
from interp.patching._rerun import rerun
from interp.patching.attribution import attribution_patch
from interp.patching.miss_bound import MissBound, _sets, bounds, miss_bound
from tests.helpers import FAMILIES, fresh_bridge, tiny_bridge
from tests.patching.oracle import POS, N, activations, prompts, write

Draw = Callable[[np.random.Generator, int], np.ndarray]
KINDS: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy tails": lambda rng, n: rng.standard_t(1.5, size=n),
    "heavy tails, one sign": lambda rng, n: rng.exponential(size=n) ** 2,
    "one large": lambda rng, n: np.append(0.1 * rng.normal(size=n - 1), 5.0),
}


def covered(kind: str, *, seeds: range, n_cells: int = 150, n_subsets: int = 256, quality: float | None = None) -> Any:
    """Whether the bound covers, and its excess over the largest effect, for each seed; effects add up."""
    found = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        effects = KINDS[kind](rng, n_cells)
        members = _sets(n_cells, n_subsets, n_subsets // 10, seed)
        outcomes = members @ effects + 0.05 * rng.normal(size=n_subsets)
        scores = None
        if quality is not None:
            scores = 2 * (quality * effects + (1 - quality) * rng.permutation(effects))
        upper = bounds(members, outcomes, scores, 0.95).upper.max()
        found.append((upper >= abs(effects).max(), upper - abs(effects).max(), upper))
    return np.array(found).T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quality", [None, 0.0, 0.7])
def test_the_bound_covers_the_largest_effect_in_95_percent_of_200_draws(kind: str, quality: float | None) -> None:
    assert covered(kind, seeds=range(200), quality=quality)[0].sum() >= 190


def test_the_bound_comes_down_as_one_over_the_root_of_the_sets() -> None:
    few, many = (covered("one large", seeds=range(60), n_subsets=m)[1].mean() for m in (200, 3200))
    assert few / many == pytest.approx(4, rel=0.2) and many > 0
    # among cells of like size the largest noise counts too, and comes down faster
    few, many = (covered("normal", seeds=range(20), n_subsets=m)[1].mean() for m in (200, 3200))
    assert 4 < few / many < 7 and many > 0


def test_good_scores_narrow_the_bound_and_bad_ones_do_no_harm() -> None:
    plain, bad, good = (covered("normal", seeds=range(40), quality=q)[2].mean() for q in (None, 0.0, 0.9))
    assert good < 0.75 * plain and bad < 1.1 * plain


def test_a_large_missed_effect_is_noticed() -> None:
    rng = np.random.default_rng(0)
    effects = 0.1 * rng.normal(size=200)
    effects[77] = -3.0  # scores know the others, and nothing of this one
    scores = np.where(np.arange(200) == 77, 0.0, effects)
    members = _sets(200, 256, 26, 0)
    found = bounds(members, members @ effects, scores, 0.95)
    assert found.upper.argmax() == 77 and found.upper[77] > 3 and found.estimate[77] == pytest.approx(-3, abs=0.3)
    # and the bound without the miss is an order smaller
    without = bounds(members, members @ scores, scores, 0.95)
    assert (
        without.upper.max() == pytest.approx(abs(scores).max(), rel=1e-6)
        and found.upper.max() > 8 * without.upper.max()
    )


def test_estimates_are_differences_of_means_with_welch_intervals() -> None:
    from scipy import stats

    rng = np.random.default_rng(1)
    members, outcomes = _sets(12, 40, 10, 3), rng.normal(size=40)
    found = bounds(members, outcomes, None, 0.9)
    for cell in range(12):
        a, b = outcomes[members[:, cell]], outcomes[~members[:, cell]]
        test: Any = stats.ttest_ind(a, b, equal_var=False)
        low, high = test.confidence_interval(0.9)
        assert found.estimate[cell] == pytest.approx(a.mean() - b.mean())
        assert found.upper[cell] == pytest.approx(max(abs(low), abs(high)))


def test_every_cell_is_in_the_same_number_of_sets_apart_from_the_others() -> None:
    members = _sets(300, 200, 20, 0)
    assert (members.sum(0) == 20).all() and not (members == _sets(300, 200, 20, 1)).all()
    together = (members.T.astype(float) @ members)[np.triu_indices(300, 1)]
    assert together.mean() == pytest.approx(20 * 20 / 200, rel=0.02) and together.max() <= 10


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "z", "k", "pattern", "neuron"])
def test_joint_patches_equal_one_forward_with_all_cells_written(family: str, site: Any) -> None:
    bridge, p = tiny_bridge(family), prompts()
    metric = metrics.logit_difference(p)
    unit = None if site in ("attn_out", "mlp_out") else "neuron" if site == "neuron" else "head"
    exact = activation_patch(
        bridge, p, metric, site=site, axes=("layer", "pos", unit) if unit else ("layer", "pos"),
        layers=[2, 0], neurons=[7, 3] if unit == "neuron" else None, direction="noise",
    )  # fmt: skip
    again = rerun(bridge, p, metric, exact, memory_budget=2**30, batch_size=None)
    sets = torch.rand((5, *again.plan.shape), generator=torch.Generator().manual_seed(0)) < 0.3
    sets[4] = False
    found, forwards = patch_sets(bridge, again, sets, progress=False)
    source = activations(bridge, p.corrupted, site)
    with torch.no_grad():
        baseline = metric(bridge(p.clean))
    units = [None] if unit is None else exact.values.coords[exact.cells[2]].values.tolist()
    for members, effect in zip(sets, found, strict=True):
        edits = []
        for w, layer in enumerate([2, 0]):

            def replace(tensor: Any, *, hook: Any, _members: Any = members[w], _layer: int = layer) -> Any:
                for spot, u in _members.nonzero().tolist():
                    tensor = write(site, tensor, source[_layer], torch.full((N,), spot), units[u])
                return tensor

            edits.append((hooks.SITE_HOOKS[site].format(layer=layer), replace))  # type: ignore[index]
        with torch.no_grad():
            expected = metric(bridge.run_with_hooks(p.clean, fwd_hooks=edits)) - baseline
        assert torch.allclose(effect, expected, atol=1e-5)
    assert abs(found[:4]).max() > 0.01 and (found[4] == 0).all() and 0 < forwards <= 4


def scaled(effects: Effects, factor: float) -> Effects:
    return dataclasses.replace(effects, values=effects.values * factor)


@pytest.mark.parametrize(
    ("family", "site", "axes"), [("gpt2", "z", ("layer", "head", "pos")), ("llama", "neuron", None)]
)
def test_on_a_model_the_bound_covers_what_exact_patching_finds(family: str, site: Any, axes: Any) -> None:
    """Effects of a real model do not quite add up: the share of draws, not each, is what is held to."""
    bridge, p = tiny_bridge(family), prompts()
    metric = metrics.logit_difference(p)
    exact = activation_patch(bridge, p, metric, site=site, axes=axes)
    scores = attribution_patch(bridge, p, metric, sites=[site], axes=axes)[site]
    hits = []
    for seed in range(12):
        found = miss_bound(bridge, p, metric, scores, k=8, n_subsets=120, seed=seed)
        outside = np.isfinite(found.upper.values)
        assert outside.sum() == exact.mean().size - 8
        largest = abs(exact.mean().values[outside]).max()
        hits.append(found.bound >= largest)
        assert largest / 1.1 <= found.bound <= 3 * largest
    assert np.mean(hits) >= 0.95


def test_a_missed_cell_of_a_model_is_the_first_suspect(tmp_path: Any) -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    exact = activation_patch(bridge, p, metric, site="z", axes=("layer", "head", "pos"))
    mean = abs(exact.mean().values)
    best = np.unravel_index(mean.argmax(), mean.shape)
    missed = exact.values.copy()
    missed[best] = 0
    scores = dataclasses.replace(exact, values=missed)
    found = miss_bound(bridge, p, metric, scores, k=6)
    row = found.to_dataframe().iloc[0]
    assert (row["layer"], row["head"], row["pos"]) == best and row["score"] == 0
    assert found.bound == row["upper"] >= mean.max() and row["estimate"] == pytest.approx(
        exact.mean().values[best], rel=0.3
    )
    assert np.isnan(found.values.values).sum() == 6 and found.bound > found.provenance["smallest_top_score"]
    # cells that cannot matter are known to be 0 and are not in any set
    dead = (exact.values.values == 0).all(-1) & np.isfinite(found.upper.values)
    dead[best] = False
    assert dead.sum() > 10 and (found.upper.values[dead] == 0).all()
    assert found.provenance["n_cells_bounded"] == mean.size - 6 - dead.sum()
    assert f"no |effect| above {found.bound:.3g} at 95% confidence if effects add up" in repr(found)
    (points,) = found.plot().data
    assert max(points.y) == pytest.approx(found.bound) and points.x[0] == 0
    loaded = MissBound.load(found.save(tmp_path / "bound.nc"))
    assert repr(loaded) == repr(found) and loaded.upper.identical(found.upper)


def test_where_no_other_cell_can_matter_nothing_is_missed() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    exact = activation_patch(bridge, p, metric, site="mlp_out")
    found = miss_bound(bridge, p, metric, exact, k=23)
    assert found.bound == 0 and "no cell outside the top 23 can matter" in repr(found)


def test_scores_without_sign_or_use_are_left_out() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    exact = activation_patch(bridge, p, metric, site="mlp_out")
    used = miss_bound(bridge, p, metric, exact, k=3)
    plain = miss_bound(bridge, p, metric, exact, k=3, use_scores=False)
    assert used.provenance["factor"] == pytest.approx(1, abs=0.2) and plain.provenance["factor"] == 0
    assert used.bound < plain.bound
    magnitudes = dataclasses.replace(abs_of(exact), provenance=exact.provenance | {"grad_drop": True})
    assert not miss_bound(bridge, p, metric, magnitudes, k=3).provenance["use_scores"]
    # scores of another scale give the same bound
    assert miss_bound(bridge, p, metric, scaled(exact, 0.01), k=3).bound == pytest.approx(used.bound, rel=1e-3)


def abs_of(effects: Effects) -> Effects:
    return dataclasses.replace(effects, values=abs(effects.values))


def test_the_cost_is_what_ran_and_everything_is_restored() -> None:
    bridge, p = fresh_bridge("llama"), prompts()
    metric = metrics.logit_difference(p)
    scores = activation_patch(bridge, p, metric, site="mlp_out")
    geometry(bridge), hooks.supports_prefix_reuse(bridge)
    before = [len(point.fwd_hooks) for point in bridge.hook_points()]
    ran = 0

    def count(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal ran
        resid = args[0] if args else kwargs["hidden_states"]
        ran += resid.shape[0] * resid.shape[1]

    handles = [block.original_component.register_forward_pre_hook(count, with_kwargs=True) for block in bridge.blocks]
    with torch.enable_grad():
        cost = miss_bound(bridge, p, metric, scores, k=3, n_subsets=80, batch_size=32).provenance["cost"]
        assert torch.is_grad_enabled()
    for handle in handles:
        handle.remove()
    forwards = ran / (N * POS * 3)
    assert forwards - 1 <= cost["forwards"] <= forwards + 1 and cost["forwards"] <= 85
    assert [len(point.fwd_hooks) for point in bridge.hook_points()] == before


def test_plain_callables_and_averages_over_draws() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)

    def plain(logits: torch.Tensor) -> torch.Tensor:
        return metric(logits)

    sets = torch.rand((6, 3, POS, 1), generator=torch.Generator().manual_seed(0)) < 0.2
    found = []
    for kind in (metric, plain):
        scores = activation_patch(bridge, p, kind, site="mlp_out", value="resample", n_draws=2)
        again = rerun(bridge, p, kind, scores, memory_budget=2**30, batch_size=None)
        found.append(patch_sets(bridge, again, sets, progress=False)[0])
        assert miss_bound(bridge, p, kind, scores, k=3, n_subsets=80).bound > 0
    assert torch.allclose(*found, atol=1e-5) and abs(found[0]).max() > 0.01
    # a set of one cell has the effect of that cell
    singles = torch.eye(3 * POS, dtype=torch.bool).reshape(-1, 3, POS, 1)
    effects = patch_sets(bridge, again, singles, progress=False)[0]
    np.testing.assert_allclose(effects, scores.values.values.reshape(-1, N), atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_refusals_come_before_any_forward() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    scores = activation_patch(bridge, p, metric, site="mlp_out")
    stream = activation_patch(bridge, p, metric, site="resid_pre")
    geometry(bridge)
    ran: list[int] = []
    handle = bridge.blocks[0].register_forward_pre_hook(lambda *args: ran.append(1))
    cases: list[tuple[Effects, dict[str, Any], str]] = [
        (stream, {}, "site='resid_pre' is the residual stream: patched in several layers, the last state overwrites"),
        (scores, {"n_subsets": 50}, "put each cell in 5 sets and leave it out of 45; expected at least 8 of both"),
        (scores, {"share": 0.99}, "leave it out of 3"),
        (scores, {"k": 24}, "k=24 of 24 cells leaves nothing that could be missed; expected 1 to 23"),
        (scores, {"level": 95}, "level=95 must lie between 0 and 1"),
        (scaled(scores, 0.0), {}, "all 24 mean scores are 0 in magnitude"),
    ]
    try:
        for given, options, message in cases:
            with pytest.raises(ValueError, match=message):
                miss_bound(bridge, p, metric, given, **options)
        with pytest.raises(ValueError, match="another prompts: their seed is 0, here it is 1"):
            miss_bound(bridge, prompts(seed=1), metric, scores)
        with pytest.raises(ValueError, match=r"pass scores\['z'\]"):
            miss_bound(bridge, p, metric, {"mlp_out": scores})  # type: ignore[arg-type]
    finally:
        handle.remove()
    assert not ran
