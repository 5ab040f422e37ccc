"""Feature circuits: selection and sets; ablated runs against loops over every number; identities, costs, refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from interp import results
from interp.metrics import logit_difference
from interp.patching import (
    FeatureCircuit,
    FeatureCurve,
    FeatureEffects,
    feature_effects,
    feature_faithfulness,
    select_features,
)
from tests.helpers import FAMILIES, fresh_bridge, tiny_bridge
from tests.patching.feature_cases import ablated_by_hand, several, target_of
from tests.patching.oracle import POS, N, prompts
from tests.patching.test_latents import WIDTH, dictionary, read

P = prompts()
METRIC = logit_difference(P)


def scores_of(family: str, kind: str = "plain", **options: Any) -> FeatureEffects:
    return feature_effects(
        tiny_bridge(family), P, METRIC, several(family, kind=kind), **{"method": "gradient", **options}
    )


def random_circuit(effects: FeatureEffects, share: float, seed: int = 0) -> FeatureCircuit:
    """Of all nodes, those that never change included."""
    drawn = np.random.default_rng(seed).random(effects.mean().shape) < share
    return dataclasses.replace(select_features(effects, 0), values=effects.mean().copy(data=drawn))


def by_hand(bridge: Any, saes: Any, circuit: FeatureCircuit, ablation: str, errors: str = "nodes") -> np.ndarray:
    """The metric of a circuit by `ablated_by_hand`."""
    named = {record["target_hook"]: record["name"] for record in circuit.provenance["dictionary"]}
    inside = set(circuit.nodes)
    keep = {}
    for sae in saes:
        name = named[target_of(sae)] if target_of(sae) in named else named["blocks.2.hook_mlp_out"]

        def kept(row: int, pos: int, latent: int | str, _name: str = name) -> bool:
            if latent == "error" and errors != "nodes":
                return errors == "keep"
            node = f"{_name}/{latent}"
            return (f"{node}@{pos}" if "pos" in circuit.values.dims else node) in inside

        keep[target_of(sae)] = kept
    with torch.no_grad():
        return METRIC(ablated_by_hand(bridge, P.clean, P.corrupted, saes, keep, ablation)).numpy()


@pytest.mark.parametrize("kind", ["plain", "with input"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablated_runs_are_those_of_loops_over_every_number(family: str, kind: str) -> None:
    bridge, saes = tiny_bridge(family), several(family, kind=kind)
    effects = scores_of(family, kind)
    circuits = {f"{share}": random_circuit(effects, share, seed) for seed, share in enumerate((0.0, 0.5, 0.9))}
    for ablation in ("mean", "swap", "zero"):
        curve = feature_faithfulness(bridge, P, METRIC, saes, circuits, ablation=ablation)  # type: ignore[arg-type]
        for i, circuit in enumerate(circuits.values()):
            expected = by_hand(bridge, saes, circuit, ablation)
            assert np.allclose(curve.values.values[i], expected, atol=5e-5), (ablation, i)
        assert np.allclose(curve.empty, curve.values[0], atol=1e-5)
        assert np.ptp(curve.values.values, axis=0).min() > 1e-3  # the circuits differ
    assert curve.circuits[1].nodes == circuits["0.5"].nodes


@pytest.mark.parametrize("errors", ["keep", "remove"])
def test_errors_that_are_no_nodes(errors: Any) -> None:
    bridge, saes = tiny_bridge("llama"), several("llama")
    effects = scores_of("llama", per_position=False)
    circuit = random_circuit(effects, 0.6)
    curve = feature_faithfulness(bridge, P, METRIC, saes, circuit, errors=errors)
    assert np.allclose(curve.values.values[0], by_hand(bridge, saes, circuit, "mean", errors), atol=5e-5)
    empty = select_features(effects, 0)
    assert np.allclose(curve.empty.values, by_hand(bridge, saes, empty, "mean", errors), atol=5e-5)
    n_latents = len(saes) * WIDTH
    latents = [node for node in circuit.nodes if not node.endswith("error")]
    assert curve.values["n_nodes"].item() == len(latents) < len(circuit)
    assert curve.values["share"].item() == pytest.approx(len(latents) / n_latents)
    curve = feature_faithfulness(bridge, P, METRIC, saes, effects, errors=errors, sizes=(3, n_latents))
    assert curve.values["n_nodes"].values.tolist() == [3, n_latents]
    assert not any(node.endswith("error") for node in curve.circuits[1].nodes)
    whole = np.array_equal(curve.values.values[1], curve.model.values)
    assert whole == (errors == "keep")


@pytest.mark.parametrize("family", FAMILIES)
def test_full_and_empty_circuits(family: str) -> None:
    """The full one is the model to the bit, run or not; complements are the reverse."""
    bridge, saes = tiny_bridge(family), several(family)
    effects = scores_of(family)
    full = select_features(effects, 1.0)
    attention = saes[-1]
    off = sum(attention.encode(read(bridge, tokens, attention.hook)[0]) for tokens in (P.clean, P.corrupted)) == 0
    position, latent = off.all(0).nonzero()[0].tolist()
    less = full - full.subset([f"1.attn_out/{latent}@{position}"])  # off in all runs
    assert len(less) == len(full) - 1
    ends = {"full": full, "less": less, "empty": full.complement()}
    with torch.no_grad():
        clean = METRIC(bridge(P.clean)).numpy()
    for ablation in ("mean", "swap", "zero"):
        curve = feature_faithfulness(bridge, P, METRIC, saes, ends, ablation=ablation)  # type: ignore[arg-type]
        assert np.allclose(curve.model, clean, atol=1e-6)
        assert np.array_equal(curve.values.sel(circuit="full"), curve.model)
        assert np.allclose(curve.values.sel(circuit="less"), curve.model, atol=1e-6)
        assert np.array_equal(curve.values.sel(circuit="empty"), curve.empty)
        assert np.abs(curve.empty - curve.model).max() > 1e-2
        rest = feature_faithfulness(bridge, P, METRIC, saes, ends, ablation=ablation, of="complement")  # type: ignore[arg-type]
        assert np.allclose(rest.values.sel(circuit="full"), curve.empty, atol=1e-6)
        assert np.array_equal(rest.values.sel(circuit="empty"), curve.model)
    last = dictionary(bridge, "blocks.2.hook_resid_post")
    alone = feature_effects(bridge, P, METRIC, last, method="gradient")
    swap = feature_faithfulness(bridge, P, METRIC, last, select_features(alone, 0), ablation="swap")
    with torch.no_grad():
        assert np.allclose(swap.empty, METRIC(bridge(P.corrupted)).numpy(), atol=1e-5)  # the last stream says it all


def _flat(effects: FeatureEffects) -> np.ndarray:
    return effects.values.values.reshape(-1, N)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_circuit_less_one_node_is_that_node_patched(family: str) -> None:
    """Under swap, all but one node is the noising of that node: `feature_effects(method="exact")`."""
    bridge, saes = tiny_bridge(family), several(family, kind="with input")
    exact = scores_of(family, "with input", method="exact", positions=[4, POS - 1])
    for node in [*exact.top(3)["node"], next(name for name in exact.nodes if "error" in name)]:
        one = select_features(exact, 0).subset([node])
        curve = feature_faithfulness(bridge, P, METRIC, saes, one, ablation="swap", of="complement")
        found = curve.values.values[0] - curve.model.values
        assert np.allclose(found, exact.at([node]).values.values[0], atol=2e-5) and np.abs(found).max() > 1e-4, node


def test_positions_by_name_and_together() -> None:
    """Nodes of named positions are where the name is; without positions they are ablated everywhere; what is no node
    stays."""
    bridge, saes = tiny_bridge("llama"), several("llama")
    named = scores_of("llama", positions=["s1", "end"])
    assert named.values["pos"].values.tolist() == ["s1", "end"]
    kept = random_circuit(named, 0.5)
    curve = feature_faithfulness(bridge, P, METRIC, saes, kept)
    at = {"s1": P.positions["s1"], "end": P.positions["end"]}
    everywhere = scores_of("llama")
    inside = [
        node for node in everywhere.nodes
        for name, pos in [node.split("@")]
        if not any(int(at[p][0]) == int(pos) and f"{name}@{p}" not in kept for p in at)
    ]  # fmt: skip
    alike = select_features(everywhere, 0).subset(inside)  # the same for example 0
    again = feature_faithfulness(bridge, P, METRIC, saes, alike)
    assert abs(float(curve.values[0, 0] - again.values[0, 0])) < 1e-5
    together = scores_of("llama", positions=["s1", "end"], per_position=False)
    few = select_features(together, 5)
    spread = select_features(named, 0).subset([f"{node}@{p}" for node in few.nodes for p in at])
    one, other = (feature_faithfulness(bridge, P, METRIC, saes, c).values.values for c in (few, spread))
    assert np.allclose(one, other, atol=1e-6)


def test_latents_that_are_no_nodes_stay() -> None:
    """Circuits of some latents only: the others follow, whatever is ablated."""
    bridge, saes = tiny_bridge("llama"), several("llama", kind="plain")
    some = scores_of("llama", latents={sae: [1, 5, 11] for sae in saes})
    none = select_features(some, 0)
    curve = feature_faithfulness(bridge, P, METRIC, saes, none)
    every = select_features(scores_of("llama"), 1.0)
    same = feature_faithfulness(bridge, P, METRIC, saes, every - every.subset(some.nodes))
    assert np.allclose(curve.values, same.values, atol=1e-6) and np.array_equal(curve.empty, curve.values[0])
    assert not np.allclose(curve.values, same.empty, atol=1e-2)


def test_other_prompts_than_those_of_the_scores() -> None:
    bridge, saes = tiny_bridge("llama"), several("llama")
    others = prompts(seed=5)
    curve = feature_faithfulness(bridge, others, logit_difference(others), saes, scores_of("llama"), sizes=(5, 50))
    assert curve.values.shape == (2, N) and curve.provenance["discovered_on"]["seed"] == 0
    longer = prompts(pos=POS + 1)
    with pytest.raises(ValueError, match=f"prompts of {POS} tokens, and these have {POS + 1}"):
        feature_faithfulness(bridge, longer, logit_difference(longer), saes, scores_of("llama"))
    summed = scores_of("llama", per_position=False)
    curve = feature_faithfulness(bridge, longer, logit_difference(longer), saes, summed, sizes=(5,))
    assert curve.values.shape == (1, N)


def test_costs_and_batches() -> None:
    bridge, saes = tiny_bridge("gemma2"), several("gemma2")
    effects, forwards = scores_of("gemma2"), 0
    point = bridge.blocks[0]

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    sizes = (1, 5, 20, effects.mean().size)
    for ablation, expected in (("mean", 6), ("swap", 6), ("zero", 5)):
        with point.register_forward_hook(count):
            forwards = 0
            curve = feature_faithfulness(
                bridge,
                P,
                METRIC,
                saes,
                effects,
                sizes=sizes,
                ablation=ablation,
                batch_size=N,  # type: ignore[arg-type]
            )
        # besides: one probe of three tokens for each dictionary, twice
        assert curve.provenance["cost"]["forwards"] == expected == forwards - 2 * len(saes)
        for options in ({"batch_size": 1}, {"batch_size": 3}, {"memory_budget": 2**21}, {}):
            again = feature_faithfulness(
                bridge,
                P,
                METRIC,
                saes,
                effects,
                sizes=sizes,
                ablation=ablation,
                **options,  # type: ignore[arg-type]
            )
            assert np.allclose(again.values, curve.values, atol=1e-5)
    plain = feature_faithfulness(bridge, P, lambda logits: METRIC(logits), saes, effects, sizes=sizes)
    swap = feature_faithfulness(bridge, P, METRIC, saes, effects, sizes=sizes)
    assert np.allclose(plain.values, swap.values, atol=1e-5)


def test_selection_by_hand() -> None:
    effects = scores_of("gpt2")
    mean = effects.mean().values.ravel()
    order = np.argsort(-np.abs(mean), kind="stable")
    ten = select_features(effects, 10)
    assert set(ten.nodes) == {effects.nodes[i] for i in order[:10]} and len(ten) == 10
    assert ten.to_dataframe()["node"].tolist() == [effects.nodes[i] for i in order[:10]]
    assert ten.to_dataframe()["score"].values == pytest.approx(mean[order[:10]])
    signed = select_features(effects, 10, absolute=False)
    assert set(signed.nodes) == {effects.nodes[i] for i in np.argsort(mean)[:10]}  # noising: the answer needs these
    bound = float(np.abs(mean)[order[6]])
    assert select_features(effects, threshold=bound).nodes == select_features(effects, 7).nodes
    assert len(select_features(effects, 0.1)) == round(0.1 * len(mean))
    drawn = [select_features(effects, 20, how="random", seed=seed) for seed in (0, 0, 1)]
    live = {name for name, row in zip(effects.nodes, _flat(effects), strict=True) if row.any()}
    assert drawn[0].nodes == drawn[1].nodes != drawn[2].nodes and set(drawn[0].nodes) <= live
    assert len(ten | signed) + len(ten & signed) == 20 and set((ten - signed).nodes) == {*ten} - {*signed}
    assert ten.jaccard(ten) == 1 and ten.nodes[0] in ten and ten.nodes[0] not in ten.complement()
    curve = feature_faithfulness(tiny_bridge("gpt2"), P, METRIC, several("gpt2"), effects, sizes=(7, 0.1))
    assert curve.circuits[0].nodes == select_features(effects, 7).nodes
    assert curve.values["circuit"].values.tolist() == ["7 nodes", "10%"]
    again = feature_faithfulness(tiny_bridge("gpt2"), P, METRIC, several("gpt2"), effects, thresholds=(bound, 1e-9))
    assert np.array_equal(again.values[0], curve.values[0])
    default = feature_faithfulness(tiny_bridge("gpt2"), P, METRIC, several("gpt2"), effects)
    counts = default.values["n_nodes"].values.tolist()
    assert counts[:4] == [1, 2, 5, 10] and counts[-1] == len(mean) and counts[-2] < len(live)


def test_results_are_saved_compared_and_drawn(tmp_path: Any) -> None:
    bridge, saes, effects = tiny_bridge("gpt2"), several("gpt2"), scores_of("gpt2")
    curve = feature_faithfulness(bridge, P, METRIC, saes, effects)
    again = results.load(curve.save(tmp_path / "curve.nc"))
    assert isinstance(again, FeatureCurve) and repr(again) == repr(curve)
    assert [c.nodes for c in again.circuits] == [c.nodes for c in curve.circuits]
    assert np.array_equal(feature_faithfulness(bridge, P, METRIC, saes, again.circuits).values, curve.values)
    circuit = select_features(effects, 12)
    loaded = results.load(circuit.save(tmp_path / "circuit.nc"))
    assert isinstance(loaded, FeatureCircuit) and loaded.nodes == circuit.nodes
    assert np.array_equal(feature_faithfulness(bridge, P, METRIC, saes, loaded).values[0],
                          feature_faithfulness(bridge, P, METRIC, saes, circuit).values[0])  # fmt: skip
    frame = curve.to_dataframe()
    assert frame.columns.tolist() == ["circuit", "share", "n_nodes", "metric", "f", "low", "high"]
    figure = curve.plot()
    assert figure.layout.xaxis.type == "log" and "faithfulness" in figure.layout.yaxis.title.text
    f = curve.faithfulness().values
    assert curve.nodes_needed(0.9) == curve.values["n_nodes"].values[f >= 0.9].min()
    assert curve.cmd("log").estimate > 0 and f[-1] == 1
    drawn = feature_faithfulness(bridge, P, METRIC, saes, effects, how="random")
    gap = drawn.compare(curve, "cmd", "log")
    assert gap.estimate == pytest.approx(float(drawn.cmd("log").estimate - curve.cmd("log").estimate))
    assert gap.low <= gap.estimate <= gap.high
    same = curve.compare(again, "cpr", "log")
    assert (float(same.estimate), float(same.low), float(same.high)) == (0, 0, 0)
    with pytest.raises(ValueError, match="example by example"):
        curve.compare(feature_faithfulness(bridge, P, METRIC, saes, effects, ablation="zero"))


def test_hooks_and_training_mode() -> None:
    bridge, saes, effects = tiny_bridge("llama"), several("llama"), scores_of("llama")
    before = METRIC(bridge(P.clean))
    feature_faithfulness(bridge, P, METRIC, saes, effects, sizes=(5,))
    assert torch.equal(METRIC(bridge(P.clean)), before)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in bridge.hook_points())

    def fails(logits: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        feature_faithfulness(bridge, P, fails, saes, effects, sizes=(5,))
    assert not any(point.fwd_hooks or point.bwd_hooks for point in bridge.hook_points())
    trained = fresh_bridge("llama").train()
    with pytest.raises(RuntimeError, match="training mode"):
        feature_faithfulness(trained, P, METRIC, saes, effects)


@pytest.mark.usefixtures("unchecked")
def test_what_is_refused() -> None:
    bridge, saes, effects = tiny_bridge("llama"), several("llama"), scores_of("llama")
    circuit = select_features(effects, 3)

    def run(given: Any = circuit, dictionaries: Any = saes, **options: Any) -> Any:
        return feature_faithfulness(bridge, P, METRIC, dictionaries, given, **options)

    for message, call in {
        "ablation='noise' is unknown": lambda: run(ablation="noise"),
        "of='rest' is unknown": lambda: run(of="rest"),
        "errors='drop' is unknown": lambda: run(errors="drop"),
        "these circuits have their sizes": lambda: run(sizes=(1,)),
        "not both": lambda: run(effects, sizes=(1,), thresholds=(0.1,)),
        "how='random' does not look at them": lambda: run(effects, how="random", thresholds=(0.1,)),
        "none twice": lambda: run(effects, sizes=(5, 5)),
        "size=100000": lambda: run(effects, sizes=(100_000,)),
        "at least one in a list": lambda: run([effects.nodes[0]]),
        "but these are of": lambda: run(dictionaries=saes[:2]),
        "another dictionary of '1.mlp_out'": lambda: run(
            dictionaries=(*saes[:1], dictionary(bridge, "blocks.1.hook_mlp_out", seed=9), *saes[2:])
        ),
        "several dictionaries rebuild 'blocks.1.hook_mlp_out'": lambda: run(dictionaries=(*saes, saes[1])),
        "too small to ablate features": lambda: run(memory_budget=100_000),
        "give one of size": lambda: select_features(effects),
        "is not over the nodes": lambda: circuit | select_features(scores_of("gpt2", "with input"), 2),
        "no node '9.z/0@0'": lambda: circuit.subset(["9.z/0@0"]),
        "needs other examples": lambda: feature_faithfulness(
            bridge, P[:1], logit_difference(P[:1]), saes, circuit, ablation="mean"
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_the_first_and_the_last_stream() -> None:
    """Names of layers order nodes; the last stream ablated is the other run whatever else is kept."""
    bridge = tiny_bridge("neox")
    first, last = dictionary(bridge, "blocks.0.hook_resid_pre"), dictionary(bridge, "blocks.2.hook_resid_post")
    effects = feature_effects(bridge, P, METRIC, (last, first), method="gradient")
    assert effects.dictionaries == ["0.resid_pre", "2.resid_post"]
    none = feature_faithfulness(bridge, P, METRIC, (first, last), select_features(effects, 0), ablation="swap")
    with torch.no_grad():
        assert np.allclose(none.empty, METRIC(bridge(P.corrupted)).numpy(), atol=1e-5)
