"""Exact path patching: the hand-worked outputs, sums of edges that are whole activations, TransformerLens' own."""

from __future__ import annotations

from typing import Any

import pytest
from transformer_lens.patching import get_act_patch_direct_path

from interp import metrics
from interp.patching import activation_patch, agreement
from interp.patching.edges import edge_attribution
from interp.patching.graph import graph_of
from interp.patching.path_patching import EdgeEffects, path_patch
from interp.results import load
from tests.helpers import FAMILIES, N_HEADS, N_LAYERS, fresh_bridge, tiny_bridge
from tests.patching.oracle import N, prompts
from tests.patching.test_attribution import (
    _double,  # noqa: F401 (a fixture: float64 models compute in float64 throughout)
    double,
    doubled,
    micro,
)
from tests.patching.test_edges import MICRO
from tests.patching.test_known_answers import logit, one_token


def test_three_edges_in_turn_give_the_hand_worked_outputs() -> None:
    """From (-25, -49), each edge along with those before it: the third carries a head that the second has changed."""
    bridge, turns = double(micro()), ["input->a1.h1<v>", "a0.h1->a1.h0<v>", "a1.h0->logits"]
    sets = {str(k): turns[: k + 1] for k in range(3)}
    expected = {0: [-19, -13, -9], 1: [-41, -25, -13]}
    for token, values in expected.items():
        found = path_patch(bridge, one_token(0, 1), logit(token), sets)
        assert (found.values.values[:, 0] + float(found.corrupted[0])).tolist() == pytest.approx(values, abs=1e-10)
        noised = path_patch(bridge, one_token(0, 1), logit(token), sets, direction="noise")
        assert (noised.values.values[:, 0] + float(noised.clean[0])).tolist() == pytest.approx(
            [-value for value in values], abs=1e-10
        )


def test_every_edge_of_a_linear_model_has_the_effect_that_its_score_says() -> None:
    bridge = double(micro())
    for token in (0, 1):
        found = path_patch(bridge, one_token(0, 1), logit(token), "*->*")
        assert list(found.values["edge"].values) == graph_of(bridge).edges()
        expected = [MICRO.get(edge, (0, 0))[token] for edge in found.values["edge"].values]
        assert found.values.values[:, 0] == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_of_a_writer_are_its_output_and_all_edges_of_a_reader_its_input(family: str) -> None:
    bridge, p = doubled(family), prompts()
    metric, graph = metrics.logit_difference(p), graph_of(bridge)
    whole: dict[Any, Any] = {
        site: activation_patch(bridge, p, metric, site=site, axes=["layer", "head"] if site in "zqkv" else ["layer"])
        for site in ("resid_pre", "mlp_out", "z", "q", "k", "v")
    }  # type: ignore[arg-type]
    sets, expected = {}, []
    for name, node in zip(graph.writers, graph.writer_nodes, strict=True):
        sets[f"out of {name}"] = f"{name}->*"
        site = {"input": "resid_pre", "head": "z", "mlp": "mlp_out"}[node.part]
        here = whole[site].values.isel(layer=max(0, node.layer))
        expected.append(here.values if node.part != "head" else here.isel(head=node.head).values)
    for name, node in zip(graph.readers, graph.reader_nodes, strict=True):
        if node.part == "logits":
            here = (whole["z"].clean - whole["z"].corrupted).values
        else:
            here = whole["mlp_out" if node.part == "mlp" else node.part].values.isel(layer=node.layer)
            here = here.values if node.part == "mlp" else here.values[node.head]
        sets[f"into {name}"] = f"*->{name}"
        expected.append(here)
    found = path_patch(bridge, p, metric, sets)
    largest = float(max(abs(values).max() for values in expected))
    for name, values in zip(sets, expected, strict=True):
        # results are float32
        assert found.values.sel(edge=name).values == pytest.approx(values, abs=1e-6 * largest), name
    assert largest > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_heads_into_heads_as_transformer_lens_patches_them_directly(family: str) -> None:
    """Its inputs are split by head, which grouped models allow for queries alone."""
    bridge, p = fresh_bridge(family), prompts(n=2, pos=6)
    metric = metrics.logit_difference(p)
    caches = [bridge.run_with_cache(tokens)[1] for tokens in (p.clean, p.corrupted)]
    base, largest = float(metric(bridge(p.corrupted)).mean()), 0.0
    for part in "qkv" if family == "gpt2" else "q":
        theirs = get_act_patch_direct_path(
            bridge, p.corrupted, *caches, lambda logits: metric(logits).mean(), 0, 1, component=part, verbose=False
        )
        names = [f"a0.h1->a{layer}.h{head}<{part}>" for layer in range(1, N_LAYERS) for head in range(N_HEADS)]
        found = path_patch(bridge, p, metric, names).mean().values
        assert found == pytest.approx(theirs[1:].flatten().numpy() - base, abs=1e-6)
        largest = max(largest, abs(found).max())
    assert largest > 1e-3


def test_values_positions_and_examples() -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    metric = metrics.logit_difference(p)
    edge = "input->a1.h0<k>"
    every = path_patch(bridge, p, metric, edge)
    assert every.values.dims == ("edge", "example") and every.values.sizes["edge"] == 1
    at = {name: path_patch(bridge, p, metric, edge, positions=name) for name in ("s1", "s2")}
    rest = path_patch(bridge, p, metric, edge, positions=[0, 1, 6, 7])
    assert abs(rest.values).max() < 1e-6  # the prompts are alike there
    both = path_patch(bridge, p, metric, edge, positions=["s1", "s2"])
    assert both.values.values == pytest.approx(every.values.values, abs=1e-6)
    assert all(abs(effects.values).max() > 1e-4 for effects in at.values())
    seen = [every]
    for value in ("mean", "zero", "resample"):
        seen.append(path_patch(bridge, p, metric, edge, value=value))
        assert seen[-1].value == value
        for other in seen[:-1]:
            assert abs(seen[-1].values - other.values).max() > 1e-5
    for i in (0, N - 1):  # one example at a time
        alone = path_patch(bridge, p[i : i + 1], metrics.logit_difference(p[i : i + 1]), edge)
        assert float(alone.values[0, 0]) == pytest.approx(float(every.values[0, i]), abs=1e-5)
    again = path_patch(bridge, p, metric, edge, batch_size=1)
    assert again.values.values == pytest.approx(every.values.values, abs=1e-6)


def test_a_result_is_one_of_effects(tmp_path: Any) -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    scores = edge_attribution(bridge, p, metric)
    edges = scores.top(12)["edge"]
    found = path_patch(bridge, p, metric, edges)
    assert list(found.values["edge"].values) == list(edges) and found.method == "path_patch"
    assert found.provenance["cost"] == {"forwards": 14}
    agreed = agreement(found, scores.effects(edges), k=4)
    assert agreed.pearson > 0.5 and "gradient" in repr(agreed)
    assert set(found.summary().columns) >= {"edge", "effect", "low", "high", "recovery"}
    assert found.plot().data
    again = load(found.save(tmp_path / "paths.nc"))
    assert isinstance(again, EdgeEffects) and again.values.identical(found.values)
    sets = path_patch(bridge, p, metric, {"one head": "a0.h1->*", "two": ["input->m0", "m0->logits"]})
    assert sets.provenance["edges"]["two"] == ["input->m0", "m0->logits"]
    heads = sets.provenance["edges"]["one head"]
    assert len(heads) == N_LAYERS + (N_LAYERS - 1) * 3 * N_HEADS + 1 and all(
        edge.startswith("a0.h1->") for edge in heads
    )


@pytest.mark.usefixtures("unchecked")
def test_refusals() -> None:
    bridge, p = tiny_bridge("neox"), prompts()
    metric = metrics.logit_difference(p)
    refused: list[tuple[Any, dict[str, Any], str]] = [
        ("a0.h0->m0", {}, "run in parallel"),
        ("a0.h9->m1", {}, "no writer 'a0.h9'"),
        ("m2->a*", {}, "no edge of this graph matches"),
        ([], {}, "edges= names no edge"),
        ({"nothing": []}, {}, "edges= names no edge"),
        ("input->m0", {"value": "gaussian"}, "value='gaussian' is unknown"),
        ("input->m0", {"direction": "up"}, "direction='up' is unknown"),
        ("input->m0", {"positions": "nowhere"}, "is unknown"),
        ("input->m0", {"memory_budget": 10}, "memory_budget=10 bytes is too small"),
    ]
    for edges, options, message in refused:
        with pytest.raises(ValueError, match=message):
            path_patch(bridge, p, metric, edges, **options)
    with pytest.raises(ValueError, match="value='mean' needs other examples"):
        path_patch(bridge, p[:1], metrics.logit_difference(p[:1]), "input->m0", value="mean")
