"""Sets of neurons ablated together against one forward each by hand; growth, overlap and planted effects."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from interp.hooks import hook_name, interventions
from interp.metrics import accuracy, answer_log_prob, logit_difference
from interp.models import provenance
from interp.neurons import (
    AblationMatrix,
    Cumulativity,
    ablation_matrix,
    cumulativity,
    knowledge_transplant,
    neuron_statistics,
    versatility,
)
from interp.neurons.relation_effects import _at_least
from interp.prompts import Prompts
from tests.helpers import D_MLP, FAMILIES, N_LAYERS, tiny_bridge, tiny_tokens
from tests.neurons.test_clamping import no_forward

SETS = {"first": [(0, 3), (0, 5), (1, 2)], "second": [(1, 7)]}


def prompts_of(seed: int, n: int = 5, pos: int = 7) -> Prompts:
    tokens = tiny_tokens(n, pos, seed)
    answers = torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(seed))
    ends = [pos - 1 - (row % 2) for row in range(n)]
    return Prompts(tokens, tokens, answers, (answers + 1) % 60, positions={"end": torch.tensor(ends)})


TASKS = {"first": [prompts_of(0), prompts_of(1, n=3, pos=9)], "second": prompts_of(2)}


def by_hand(bridge, prompts: Prompts, neurons, fill: np.ndarray, where: str) -> np.ndarray:
    """The three measures with these neurons ablated, one set per forward."""
    end = torch.arange(prompts.clean.shape[1])[None] == prompts.positions["end"][:, None]

    def edit(layer: int):
        def fn(post: torch.Tensor) -> torch.Tensor:
            new = post.clone()
            for at, index in neurons:
                if at == layer:
                    value = torch.tensor(fill[layer, index])
                    new[..., index] = value if where == "all" else torch.where(end, value, post[..., index])
            return new

        return fn

    edits = {hook_name("neuron", layer): edit(layer) for layer in {layer for layer, _ in neurons}}
    with torch.no_grad(), interventions(bridge, edits):
        logits = bridge(prompts.clean)
    return np.stack([make(prompts)(logits).numpy() for make in (accuracy, answer_log_prob, logit_difference)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("mode", "where"), [("zero", "all"), ("mean", "end"), ("mean", "all")])
def test_every_cell_is_a_forward_by_hand(family: str, mode: str, where: str) -> None:
    bridge = tiny_bridge(family)
    before = bridge(TASKS["second"].clean)
    found = ablation_matrix(bridge, SETS, TASKS, mode=mode, positions=where, n_controls=2, batch_size=7)  # type: ignore[arg-type]
    fill = np.zeros((N_LAYERS, D_MLP), np.float32)
    if mode == "mean":
        rows: list[list[torch.Tensor]] = [[] for _ in range(N_LAYERS)]
        for prompts in (*TASKS["first"], TASKS["second"]):
            _, cache = bridge.run_with_cache(prompts.clean)
            for layer in range(N_LAYERS):
                post = cache[hook_name("neuron", layer)]
                ends = post[torch.arange(len(post)), prompts.positions["end"]]
                rows[layer].append(ends if where == "end" else post.flatten(0, 1))
        fill = np.stack([torch.cat(parts).mean(0).numpy() for parts in rows])
    for name, neurons in SETS.items():
        for task, prompts in TASKS.items():
            parts = [prompts] if isinstance(prompts, Prompts) else prompts
            changed = np.concatenate([by_hand(bridge, one, neurons, fill, where) for one in parts], -1)
            intact = np.concatenate([by_hand(bridge, one, [], fill, where) for one in parts], -1)
            cells = found.values.sel(set=name, task=task).values
            assert np.allclose(cells[:, : changed.shape[1]], changed - intact, atol=2e-4)
            assert np.isnan(cells[:, changed.shape[1] :]).all()
    assert np.abs(found.values.sel(measure="logit_difference")).max("example").min() > 3e-3
    assert torch.equal(bridge(TASKS["second"].clean), before)


def test_controls_are_other_sets_of_the_same_size_and_layers() -> None:
    bridge = tiny_bridge("llama")
    found = ablation_matrix(bridge, SETS, TASKS, n_controls=3)
    assert found.controls.sizes == {
        "measure": 3, "control": 2, "draw": 3, "set": 2, "task": 2, "example": 8
    }  # fmt: skip
    assert set(found.provenance["match"]) == {f"{c}: {s}" for c in ("matched", "uniform") for s in SETS}
    draws = found.controls.sel(measure="logit_difference", control="matched", set="first", task="second").dropna(
        "example"
    )
    assert len({tuple(row) for row in draws.values}) == 3  # three different sets
    # the set of one neuron, by hand: some other neuron of its layer gives exactly the first control
    prompts, fill = TASKS["second"], np.zeros((N_LAYERS, D_MLP), np.float32)
    zero = ablation_matrix(bridge, {"second": SETS["second"]}, {"second": prompts}, mode="zero", n_controls=1)
    control = zero.controls.sel(
        measure="logit_difference", control="matched", draw=0, set="second", task="second"
    ).values
    intact = by_hand(bridge, prompts, [], fill, "all")[2]
    matches = []
    for index in range(D_MLP):
        change = by_hand(bridge, prompts, [(1, index)], fill, "all")[2] - intact
        matches += [index] if np.allclose(change, control, atol=2e-4) else []
    assert len(matches) == 1 and matches != [7]


def test_given_statistics_are_what_is_put_in() -> None:
    bridge = tiny_bridge("gpt2")
    statistics = neuron_statistics(bridge, tiny_tokens(4, 9, seed=9))
    found = ablation_matrix(bridge, SETS, TASKS, controls=(), statistics=statistics)
    expected = by_hand(bridge, TASKS["second"], SETS["first"], statistics.column("mean"), "all")
    cells = found.values.sel(set="first", task="second").dropna("example").values
    assert np.allclose(cells + found.baseline.sel(task="second").dropna("example").values, expected, atol=2e-4)
    with pytest.raises(ValueError, match="statistics are of"):
        ablation_matrix(
            tiny_bridge("gpt2", intermediate_size=24, n_inner=24), {"s": [(0, 1)]}, TASKS, statistics=statistics
        )


def test_means_that_were_not_measured_are_refused_before_any_forward(monkeypatch) -> None:
    bridge = tiny_bridge("gpt2")
    some = neuron_statistics(bridge, tiny_tokens(4, 9, seed=9), layers=[1])
    alone = {"second": SETS["second"]}
    found = ablation_matrix(bridge, alone, TASKS, controls=("matched", "uniform"), n_controls=2, statistics=some)
    assert np.isfinite(found.values.sel(task="second").dropna("example", how="all")).all()
    assert found.values.sel(task="first").notnull().all() and found.controls.sel(task="first").notnull().all()
    zero = ablation_matrix(bridge, SETS, TASKS, mode="zero", controls=(), statistics=some)  # needs no mean
    assert zero.values.sel(task="first").notnull().all()
    no_forward(bridge, monkeypatch)
    rankings = {"first": [(1, 4), (1, 5)], "second": [(1, 7), (0, 2)]}
    kinds: Any = ((), ("uniform",), ("matched",))
    for controls in kinds:
        with pytest.raises(ValueError, match=r"set 'first' .*\(0, 3\).*layers \[1\]"):
            ablation_matrix(bridge, SETS, TASKS, controls=controls, statistics=some)
        with pytest.raises(ValueError, match=r"set 'second' .*\(0, 2\).*layers \[1\]"):
            cumulativity(bridge, rankings, TASKS, counts=(2,), controls=controls, statistics=some)
    with pytest.raises(ValueError, match="layer 0 was not measured"):  # to match a later task's controls by
        cumulativity(bridge, rankings, TASKS, counts=(2,), controls=("matched",), mode="zero", statistics=some)


def test_statistics_of_another_model_of_this_shape_are_refused(monkeypatch) -> None:
    bridge, other = tiny_bridge("gpt2"), tiny_bridge("gpt2", seed=1)
    statistics = neuron_statistics(other, tiny_tokens(4, 9))
    no_forward(bridge, monkeypatch)
    own, theirs = (re.escape(provenance(model)["revision"]) for model in (bridge, other))
    message = f"statistics are of tiny-gpt2 at {theirs}.*this model is tiny-gpt2 at {own}"
    with pytest.raises(ValueError, match=message):
        ablation_matrix(bridge, SETS, TASKS, statistics=statistics)
    with pytest.raises(ValueError, match=message):
        cumulativity(bridge, {name: [(0, 1)] for name in TASKS}, TASKS, counts=(1,), statistics=statistics)
    with pytest.raises(ValueError, match=message):
        knowledge_transplant(bridge, other, SETS, TASKS, statistics=statistics)


def planted() -> AblationMatrix:
    """Own tasks lose 3 logits, one other task gains 1, controls lose 0.5."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.3, (1, 2, 2, 40)).astype(np.float32)
    means = np.array([[-3.0, 1.0], [0.0, -3.0]], np.float32)[None, :, :, None]
    coords = {"measure": ["logit_difference"], "set": ["a", "b"], "task": ["a", "b"]}
    dims = ("measure", "set", "task", "example")
    controls = rng.normal(-0.5, 0.3, (1, 1, 4, 2, 2, 40)).astype(np.float32)
    return AblationMatrix(
        xr.DataArray(means + noise, dims=dims, coords=coords), {"mode": "mean"},
        xr.DataArray(controls, dims=("measure", "control", "draw", "set", "task", "example"),
                     coords={**coords, "control": ["matched"], "draw": range(4)}),
        xr.DataArray(np.ones((1, 2, 40), np.float32), dims=("measure", "task", "example"),
                     coords={key: coords[key] for key in ("measure", "task")}),
    )  # fmt: skip


def test_tables_say_what_was_planted(unchecked) -> None:
    found = planted()
    table = found.summary().set_index(["set", "task"])
    assert table.loc[("a", "a"), "effect"] == pytest.approx(-3, abs=0.2)
    assert table.loc[("a", "a"), "beyond_matched"] == pytest.approx(-2.5, abs=0.2)
    assert table.loc[("b", "a"), "low"] < 0 < table.loc[("b", "a"), "high"]
    assert table["own"].tolist() == [True, False, False, True]
    assert (table["p_matched"] < 0.01).all()  # even no change differs from the controls' loss
    helped = found.interference()
    assert helped[["set", "task", "beyond_control"]].values.tolist() == [["a", "b", True]]
    specific = found.specificity().set_index("set")
    assert specific.loc["a", "difference"] == pytest.approx(-4, abs=0.2)
    assert specific.loc["b", "difference"] == pytest.approx(-3, abs=0.2)
    assert (specific["high"] < 0).all()
    figure: Any = found.plot(beyond="matched")
    assert "beyond matched" in figure.layout.title.text
    with pytest.raises(ValueError, match="no control 'uniform' was run"):
        found.difference("uniform")
    with pytest.raises(ValueError, match="measure='loss'"):
        found.summary("loss")  # type: ignore[arg-type]


def test_refusals_come_before_any_forward(unchecked) -> None:
    bridge = tiny_bridge("gpt2")
    calls = {
        "mode='noise'": {"mode": "noise"}, "positions='last'": {"positions": "last"}, "controls=\\['none'\\]":
        {"controls": ["none"]}, "n_controls=0": {"n_controls": 0}, "batch_size=0": {"batch_size": 0},
    }  # fmt: skip
    for message, options in calls.items():
        with pytest.raises(ValueError, match=message):
            ablation_matrix(bridge, SETS, TASKS, **options)
    with pytest.raises(ValueError, match="do not exist"):
        ablation_matrix(bridge, {"s": [(0, D_MLP)]}, TASKS)
    with pytest.raises(ValueError, match="0 sets of neurons"):
        ablation_matrix(bridge, {}, TASKS)
    with pytest.raises(ValueError, match="has no prompts"):
        ablation_matrix(bridge, SETS, {"t": []})


def test_growth_is_the_matrix_of_its_prefixes(tmp_path) -> None:
    bridge = tiny_bridge("llama")
    rankings = {"first": [(0, 1), (1, 4), (1, 9), (0, 8)], "second": [(1, 7), (0, 2), (0, 4), (0, 30)]}
    found = cumulativity(bridge, rankings, TASKS, counts=(1, 3), n_controls=2)
    for task, prompts in TASKS.items():
        for count in (1, 3):
            alone = ablation_matrix(
                bridge, {"s": rankings[task][:count]}, {task: prompts}, controls=(),
                statistics=_statistics(bridge),
            )  # fmt: skip
            grown = cumulativity(bridge, rankings, TASKS, counts=(count,), controls=(), statistics=_statistics(bridge))
            cells = grown.values.sel(kind="ranked", draw=0, task=task, count=count).dropna("example").values
            assert np.allclose(cells, alone.values.sel(set="s", task=task).values, atol=2e-4)
    assert list(found.values["kind"].values) == ["ranked", "matched", "uniform"]
    assert found.values.sel(kind="ranked", draw=1).isnull().all()
    assert found.values.sel(kind="matched", task="first").notnull().all()
    again = Cumulativity.load(found.save(tmp_path / "c.nc"))
    assert again.summary().equals(found.summary())
    assert found.plot("accuracy", task="first").data
    figure: Any = found.plot()
    shown = {trace.name: trace for trace in figure.data if trace.mode == "lines+markers"}
    means: Any = found.summary().groupby(["kind", "count"])["effect"].mean()
    assert list(shown["matched"].y) == pytest.approx(means["matched"].tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="counts goes to 9"):
        cumulativity(bridge, rankings, TASKS, counts=(9,))
    with pytest.raises(ValueError, match="each task needs its ranking"):
        cumulativity(bridge, {"first": rankings["first"]}, TASKS, counts=(1,))
    with pytest.raises(ValueError, match="no task 'x'"):
        found.plot(task="x")


def _statistics(bridge):
    return neuron_statistics(bridge, tiny_tokens(4, 9, seed=5))


def test_shape_of_a_planted_curve() -> None:
    curve = np.array([-1.0, -4.0, -8.0, -10.0], np.float32)[:, None] * np.ones((1, 12), np.float32)
    values = xr.DataArray(
        curve[None, None, None, None], dims=("measure", "kind", "draw", "task", "count", "example"),
        coords={"measure": ["logit_difference"], "kind": ["ranked"], "draw": [0], "task": ["t"], "count": [1, 2, 4, 8]},
    )  # fmt: skip
    baseline = xr.DataArray(np.full((1, 1, 12), 5, np.float32), dims=("measure", "task", "example"),
                            coords={"measure": ["logit_difference"], "task": ["t"]})  # fmt: skip
    row = Cumulativity(values, {}, baseline).shape().iloc[0]
    assert (row["first 1"], row["all 8"], row["half at"]) == (-1, -10, 4)
    assert row["share of first"] == pytest.approx(0.1) == row["low"] == row["high"]


def test_overlap_null_is_that_of_all_sets() -> None:
    d_mlp, sizes = 4, (np.array([2, 1]), np.array([1, 3]))
    layers = [
        [set(members) for members in itertools.combinations(range(d_mlp), int(size))]
        for pair in zip(*sizes, strict=True)
        for size in pair
    ]
    counts = [len(a & b) + len(c & d) for a, b, c, d in itertools.product(*layers)]
    for shared in range(4):
        assert _at_least(shared, d_mlp, *sizes) == pytest.approx(np.mean([count >= shared for count in counts]))


def test_overlaps() -> None:
    bridge = tiny_bridge("gpt2")
    sets = {"a": [(0, i) for i in range(10)], "b": [(0, i) for i in range(5, 15)], "c": [(1, i) for i in range(10)]}
    found = versatility(bridge, sets)
    assert float(found.values.sel(set="a", other="b")) == pytest.approx(5 / 15)
    assert float(found.values.sel(set="a", other="c")) == 0 == float(found.expected.sel(set="a", other="c"))
    assert float(found.expected.sel(set="a", other="b")) == pytest.approx(100 / D_MLP)
    assert found.sizes.values.tolist() == [[10, 0, 0], [10, 0, 0], [0, 10, 0]]
    first = found.summary().iloc[0]
    assert (first["set"], first["other"], first["shared"]) == ("a", "b", 5)
    assert found.plot().data
    with pytest.raises(ValueError, match="at least two"):
        versatility(bridge, {"a": [(0, 1)]})
