"""Evaluation of circuits: identities, every ablation against the oracle, integrals by hand, and refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp import results
from interp.metrics import logit_difference
from interp.patching import (
    Circuit,
    FaithfulnessCurve,
    Minimality,
    faithfulness,
    minimality,
    select_circuit,
)
from interp.patching.activation import derangement
from interp.patching.edges import edge_attribution
from interp.patching.graph import graph_of
from tests.helpers import FAMILIES, fresh_bridge, tiny_bridge
from tests.patching.edge_oracle import EdgeOracle
from tests.patching.oracle import prompts

P = prompts()
METRIC = logit_difference(P)


def random_circuits(bridge: Any, *shares: float) -> dict[str, Circuit]:
    graph, generator = graph_of(bridge), torch.Generator().manual_seed(2)
    drawn = {f"{s}": (torch.rand(graph.exists.shape, generator=generator) < s) & graph.exists for s in shares}
    return {name: Circuit(graph, mask) for name, mask in drawn.items()}


def replaced(other: dict[str, Tensor], ablation: str) -> dict[str, Tensor]:
    """What ablated edges carry, by its definition."""
    if ablation == "zero":
        kept = {name: tensor for name, tensor in other.items() if name.startswith("raw")}
        return {**{name: torch.zeros_like(tensor) for name, tensor in other.items()}, **kept}
    if ablation == "mean":
        return {name: tensor.mean(0, keepdim=True).expand_as(tensor) for name, tensor in other.items()}
    if ablation == "resample":
        order = derangement(len(P), torch.Generator().manual_seed(0))
        return {name: tensor[order] for name, tensor in other.items()}
    return other


@pytest.mark.parametrize("family", FAMILIES)
def test_every_ablation_against_the_oracle(family: str) -> None:
    """The oracle in float64: it takes from the stream what is ablated, and where nothing is left its float32 is noise,
    which norms make large."""
    bridge = tiny_bridge(family)
    oracle = EdgeOracle(fresh_bridge(family, dtype=torch.float64), graph_of(bridge))
    other = oracle.written(P.corrupted)
    circuits = random_circuits(bridge, 0.5, 0.9)
    for ablation in ("swap", "mean", "zero", "resample"):
        curve = faithfulness(bridge, P, METRIC, circuits, ablation=ablation)  # type: ignore[arg-type]
        source = replaced(other, ablation)
        for circuit, found in zip(circuits.values(), curve.values.values, strict=True):
            expected = METRIC(oracle(P.clean, source, circuit.complement().edges))
            assert np.allclose(found, expected, atol=2e-5), ablation
        empty = METRIC(oracle(P.clean, source, graph_of(bridge).edges()))
        assert np.allclose(curve.empty.values, empty, atol=2e-5), ablation
        assert curve.provenance["cost"]["forwards"] == {"swap": 4, "zero": 5}.get(ablation, 6)


def test_means_by_default() -> None:
    bridge = tiny_bridge("llama")
    circuit = random_circuits(bridge, 0.5)["0.5"]
    for method in (faithfulness, minimality):
        few = circuit if method is faithfulness else Circuit.of(circuit.graph, ["input->logits", "m1->logits"])
        default, mean, swap = (
            method(bridge, P, METRIC, few, **a) for a in ({}, {"ablation": "mean"}, {"ablation": "swap"})
        )  # type: ignore[arg-type]
        assert default.ablation == default.provenance["ablation"] == "mean"
        assert np.array_equal(default.values.values, mean.values.values)
        assert not np.allclose(default.values.values, swap.values.values, atol=1e-3)


def test_a_full_circuit_by_itself() -> None:
    """Nothing is replaced, so nothing but the two runs is run."""
    bridge = tiny_bridge("llama")
    curve = faithfulness(bridge, P, METRIC, Circuit.full(graph_of(bridge)), ablation="swap")
    assert np.array_equal(curve.values.values[0], curve.model.values) and curve.provenance["cost"]["forwards"] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_full_and_empty_circuits(family: str) -> None:
    """The full one is the model, f = 1; the empty one the corrupted run, f = 0; complements are the reverse."""
    bridge = tiny_bridge(family)
    full = Circuit.full(graph_of(bridge))
    ends = {"full": full, "empty": full.complement()}
    curve = faithfulness(bridge, P, METRIC, ends, ablation="swap")
    with torch.no_grad():
        clean, corrupted = (METRIC(bridge(tokens)).numpy() for tokens in (P.clean, P.corrupted))
    assert np.allclose(curve.values.values, [clean, corrupted], atol=1e-5)
    assert np.allclose(curve.model.values, clean, atol=1e-6)
    assert np.allclose(curve.faithfulness().values, [1, 0], atol=1e-4)
    rest = faithfulness(bridge, P, METRIC, ends, ablation="swap", of="complement")
    assert np.allclose(rest.values.values, [corrupted, clean], atol=1e-5)
    for ablation in ("mean", "zero"):
        found = faithfulness(bridge, P, METRIC, ends, ablation=ablation)  # type: ignore[arg-type]
        assert np.array_equal(found.values.sel(circuit="full").values, found.model.values)
        assert np.array_equal(found.values.sel(circuit="empty").values, found.empty.values)
        assert not np.allclose(found.empty.values, corrupted, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_pruning_does_nothing_under_swap_and_something_under_mean(family: str) -> None:
    """Nodes that nothing feeds write what they write in the other run, but not their mean."""
    bridge = tiny_bridge(family)
    circuit = Circuit.of(graph_of(bridge), ["input->logits", "m0->logits", "a0.h0->m1", "m1->logits"])
    assert circuit.pruned().edges == ["input->logits"]
    swap, mean = (
        faithfulness(bridge, P, METRIC, [circuit, circuit.pruned()], ablation=ablation).values.values  # type: ignore[arg-type]
        for ablation in ("swap", "mean")
    )
    assert np.allclose(swap[0], swap[1], atol=1e-5)
    assert not np.allclose(mean[0], mean[1], atol=1e-3)


def test_batches_and_metrics_do_not_change_the_answer() -> None:
    bridge = tiny_bridge("gemma2")
    circuits = random_circuits(bridge, 0.2, 0.4, 0.6, 0.8)
    expected = faithfulness(bridge, P, METRIC, circuits, ablation="swap").values.values
    for options in ({"batch_size": 1}, {"batch_size": 6}, {"memory_budget": 2**21}):
        found = faithfulness(bridge, P, METRIC, circuits, ablation="swap", **options).values.values  # type: ignore[arg-type]
        assert np.allclose(found, expected, atol=1e-5)
    plain = faithfulness(bridge, P, lambda logits: METRIC(logits), circuits, ablation="swap")
    assert np.allclose(plain.values.values, expected, atol=1e-5)
    one = faithfulness(bridge, P, METRIC, list(circuits.values())[2], ablation="swap")
    assert np.allclose(one.values.values[0], expected[2], atol=1e-5)


def test_from_scores() -> None:
    """Circuits of the sizes asked for are those that `select_circuit` selects."""
    bridge = tiny_bridge("gpt2")
    scores = edge_attribution(bridge, P, METRIC, direction="noise")
    sizes = (0.05, 0.2, 30, 1.0)
    for options in ({"how": "greedy"}, {"absolute": False, "prune": False}):
        curve = faithfulness(bridge, P, METRIC, scores, sizes=sizes, ablation="swap", **options)  # type: ignore[arg-type]
        assert curve.circuits == [select_circuit(scores, size, **options) for size in sizes]  # type: ignore[arg-type]
        assert curve.values["n_edges"].values.tolist() == [len(circuit) for circuit in curve.circuits]
        assert curve.values["circuit"].values.tolist() == ["5%", "20%", "30 edges", "100%"]
        assert np.allclose(curve.values["share"], [0.05, 0.2, 30 / graph_of(bridge).n_edges, 1])
        assert curve.provenance["how"] == options.get("how", "top")
    with pytest.raises(ValueError, match="none twice"):
        faithfulness(bridge, P, METRIC, scores, sizes=(0.1, 0.1))


def curve_of(values: Any, shares: Any, model: Any, empty: Any) -> FaithfulnessCurve:
    """A curve with these numbers: values (circuit, example)."""
    bridge = tiny_bridge("gpt2")
    graph = graph_of(bridge)
    circuits = [select_circuit_of(graph, i) for i in range(len(shares))]
    made = faithfulness(bridge, P, METRIC, circuits, ablation="swap")
    array = made.values.isel(example=[0] * len(model)).assign_coords(example=range(len(model)))
    array = array.copy(data=np.asarray(values, dtype=np.float32)).assign_coords(share=("circuit", shares))
    ends = [made.model.isel(example=[0] * len(model)).copy(data=np.float32(end)) for end in (model, empty)]
    ends = [end.assign_coords(example=range(len(model))) for end in ends]
    return dataclasses.replace(made, values=array, model=ends[0], empty=ends[1])


def select_circuit_of(graph: Any, n: int) -> Circuit:
    return Circuit.of(graph, graph.edges()[:n])


def test_integrals_by_hand() -> None:
    """f = 0, 1/2, 2 at a hundredth, a tenth and all: means of numerators over means of denominators."""
    curve = curve_of([[1, 1], [2, 3], [4, 10]], [0.01, 0.1, 1.0], [3, 5], [1, 1])
    assert curve.faithfulness().values == pytest.approx([0, 0.5, 2])
    assert curve.cpr().estimate == pytest.approx(0.09 * 0.25 + 0.9 * 1.25)
    assert curve.cmd().estimate == pytest.approx(0.09 * 0.75 + 0.9 * 0.75)
    assert curve.cpr("log").estimate == pytest.approx((0.25 + 1.25) / 2)
    assert curve.cmd("log").estimate == pytest.approx((0.75 + 0.75) / 2)
    assert curve.smallest(0.5) == pytest.approx(0.1)
    assert curve.smallest(0.9) == pytest.approx(1.0)
    assert np.isnan(curve.smallest(2.5))
    # two examples can be drawn in three ways, whose f are (0, .5, 1.5), (0, .5, 2) and (0, .5, 2.25)
    low, high = (float(end) for end in curve.cpr()[1:])
    assert low == pytest.approx(0.09 * 0.25 + 0.9 * 1.0)
    assert high == pytest.approx(0.09 * 0.25 + 0.9 * 1.375)
    frame = curve.summary()
    assert frame["statistic"].tolist() == ["cpr", "cpr_log", "cmd", "cmd_log", "smallest_at_0.9"]
    assert frame["estimate"][0] == pytest.approx(curve.cpr().estimate)
    interval = curve.interval()
    assert interval["low"].values[2] == pytest.approx(1.5)
    assert interval["high"].values[2] == pytest.approx(2.25)


@pytest.mark.usefixtures("unchecked")
def test_integrals_that_mean_nothing_are_refused() -> None:
    curve = curve_of([[1, 1], [2, 3]], [0.1, 1.0], [3, 5], [1, 1])
    with pytest.raises(ValueError, match="rising"):
        curve_of([[1, 1], [2, 3]], [1.0, 0.1], [3, 5], [1, 1]).cpr()
    with pytest.raises(ValueError, match="above 0 for axis='log'"):
        curve_of([[1, 1], [2, 3]], [0.0, 0.1], [3, 5], [1, 1]).cmd("log")
    with pytest.raises(ValueError, match="complements"):
        dataclasses.replace(curve, of="complement").cpr()
    with pytest.raises(ValueError, match="faithfulness is undefined"):
        curve_of([[1, 1], [2, 3]], [0.1, 1.0], [1, 1], [1, 1]).faithfulness()
    with pytest.raises(ValueError, match="axis='logarithmic' is unknown"):
        curve.cpr("logarithmic")  # type: ignore[arg-type]
    one = curve_of([[1], [2]], [0.1, 1.0], [3], [1])
    assert np.isnan(one.cpr().low)


def test_minimality_is_a_circuit_less_each_edge() -> None:
    bridge = tiny_bridge("llama")
    circuit = select_circuit(edge_attribution(bridge, P, METRIC, direction="noise"), 20, how="greedy")
    found = minimality(bridge, P, METRIC, circuit, ablation="mean")
    assert found.values["edge"].values.tolist() == circuit.edges
    for edge in circuit.edges[:3]:
        less = circuit - Circuit.of(circuit.graph, [edge])
        pair = faithfulness(bridge, P, METRIC, [circuit, less], ablation="mean").values.values
        assert np.allclose(found.values.sel(edge=edge), pair[0] - pair[1], atol=1e-5)
    frame = found.interval()
    assert frame["loss"].is_monotonic_decreasing
    assert (frame["low"] <= frame["loss"] + 1e-6).all() and (frame["loss"] <= frame["high"] + 1e-6).all()
    assert found.plot(5).data
    with pytest.raises(ValueError, match="needs a Circuit with edges"):
        minimality(bridge, P, METRIC, Circuit.of(circuit.graph))


def test_results_are_saved_and_drawn(tmp_path: Any) -> None:
    bridge = tiny_bridge("gpt2")
    curve = faithfulness(bridge, P, METRIC, random_circuits(bridge, 0.2, 0.6), ablation="swap")
    again = results.load(curve.save(tmp_path / "curve.nc"))
    assert isinstance(again, FaithfulnessCurve)
    assert again.circuits == curve.circuits
    assert again.cpr() == curve.cpr()
    assert repr(again) == repr(curve)
    frame = curve.to_dataframe()
    assert frame.columns.tolist() == ["circuit", "share", "n_edges", "metric", "f", "low", "high"]
    figure = curve.plot()
    assert figure.layout.xaxis.type == "log"
    assert "faithfulness" in figure.layout.yaxis.title.text
    found = minimality(bridge, P, METRIC, Circuit.of(graph_of(bridge), ["input->logits"]))
    assert isinstance(results.load(found.save(tmp_path / "minimality.nc")), Minimality)


def no_forward(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a forward ran before the error")


@pytest.mark.usefixtures("unchecked")
def test_refused_before_any_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = fresh_bridge("llama")
    circuit = Circuit.full(graph_of(bridge))
    faithfulness(bridge, P, METRIC, circuit)  # what is probed once, is
    foreign = Circuit.full(graph_of(tiny_bridge("gpt2")))
    monkeypatch.setattr(type(bridge), "forward", no_forward)
    with pytest.raises(ValueError, match="ablation='gaussian' is unknown"):
        faithfulness(bridge, P, METRIC, circuit, ablation="gaussian")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs other examples, but there is 1"):
        faithfulness(bridge, P[:1], logit_difference(P[:1]), circuit, ablation="mean")
    with pytest.raises(ValueError, match="the model's graph is"):
        faithfulness(bridge, P, METRIC, foreign)
    with pytest.raises(ValueError, match="circuits must be"):
        faithfulness(bridge, P, METRIC, ["input->m0"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="of='rest' is unknown"):
        faithfulness(bridge, P, METRIC, circuit, of="rest")  # type: ignore[arg-type]
    bridge.train()
    with pytest.raises(RuntimeError, match="training mode"):
        faithfulness(bridge, P, METRIC, circuit)


def test_a_budget_that_is_too_small_is_refused() -> None:
    bridge = tiny_bridge("llama")
    with pytest.raises(ValueError, match="memory_budget=100,000 bytes is too small to replace edges"):
        faithfulness(bridge, P, METRIC, Circuit.full(graph_of(bridge)), memory_budget=100_000)
