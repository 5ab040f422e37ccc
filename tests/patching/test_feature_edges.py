"""Edges between features: finite differences, conservation, answers by hand, a planted circuit, costs, refusals."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp import hooks, results
from interp.metrics import logit_difference
from interp.patching import (
    FeatureEdges,
    feature_edges,
    feature_effects,
    feature_faithfulness,
    select_features,
)
from tests.helpers import FAMILIES, fresh_bridge, tiny_bridge
from tests.patching.feature_cases import several, target_of
from tests.patching.hand_set import COPY, OUT, D, induction, induction_prompts
from tests.patching.oracle import POS, N, prompts
from tests.patching.test_attribution import _double, double, doubled, micro
from tests.patching.test_known_answers import logit, one_token
from tests.patching.test_latents import dictionary, read, signs

__all__ = ["_double"]  # a fixture

P = prompts()
METRIC = logit_difference(P)


class ByDifferences:
    """Derivatives between nodes from forwards in which all activations with dictionaries are held, save one."""

    def __init__(self, bridge: Any, saes: dict[str, Any], tokens: Tensor) -> None:
        self.bridge, self.saes, self.tokens = bridge, saes, tokens
        targets = [target_of(sae) for sae in saes.values()]
        self.own = dict(zip(saes, read(bridge, tokens, *targets), strict=True))

    @torch.no_grad()
    def run(self, moved: str, added: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """What comes in at every dictionary, what each reads, and the metric."""
        came: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name, sae in self.saes.items():

                def hold(tensor: Tensor, *, hook: Any = None, _name: str = name) -> Tensor:
                    came[_name] = tensor.flatten(2)
                    held = self.own[_name] + (added if _name == moved else 0)
                    return held.reshape(tensor.shape)

                if target_of(sae).endswith("resid_mid"):
                    stack.enter_context(hooks.interventions(self.bridge, {target_of(sae): hold}))
                else:
                    hooks.attach(stack, self.bridge, target_of(sae), hold, "fwd")
            found = stack.enter_context(hooks.reads(self.bridge, [sae.hook for sae in self.saes.values()]))
            metric = METRIC(self.bridge(self.tokens))
        for name, sae in self.saes.items():
            inputs[name] = found[sae.hook].flatten(2) if sae.target_hook else came[name]
        return came, inputs, metric

    def edge(self, up: str, add: Tensor, down: str, unit: int | str, pos: int, coefficient: Tensor) -> Tensor:
        """First-order change of the node `down`, times its coefficient, when `add` is added to the activation `up`."""
        step, ends = 1e-5, []
        for sign in (1, -1):
            came, inputs, _ = self.run(up, sign * step * add)
            sae = self.saes[down]
            f = sae.encode(inputs[down])
            zero = torch.zeros_like(f)
            x = read(self.bridge, self.tokens, sae.hook)[0]  # decoded where the run is

            def decoded(latents: Tensor, _sae: Any = sae, _x: Tensor = x, _zero: Tensor = zero) -> Tensor:
                return _sae.decode(latents, _x) - _sae.decode(_zero, _x)

            if unit == "error":
                ends.append(came[down] - decoded(f))
            else:
                only = zero.clone()
                only[..., unit] = f[..., unit]
                ends.append(decoded(only))
        change = (ends[0] - ends[1]) / (2 * step)
        return (change * coefficient)[:, pos].sum(-1)

    def metric(self, up: str, add: Tensor) -> Tensor:
        return (self.run(up, 1e-5 * add)[2] - self.run(up, -1e-5 * add)[2]) / 2e-5


@pytest.mark.parametrize("kind", ["plain", "with input"])
@pytest.mark.parametrize("family", FAMILIES)
def test_edges_are_finite_differences_with_all_else_held(family: str, kind: str) -> None:
    bridge, saes = doubled(family), several(family, True, kind)
    effects = feature_effects(bridge, P, METRIC, saes, method="gradient")
    few = effects.top(12)["node"].tolist()
    few += [f"{name}/error@{POS - 1}" for name in effects.dictionaries]
    circuit = select_features(effects, 0).subset(few)
    found = feature_edges(bridge, P, METRIC, saes, circuit, method="gradient")
    named = {effects._name(sae): sae for sae in saes}
    by = ByDifferences(bridge, named, P.clean)
    coefficient = {}
    with hooks.no_retained_graph(bridge), torch.enable_grad():
        mid = {name: target_of(sae).endswith("resid_mid") for name, sae in named.items()}
        where = {n: target_of(s).replace("hook_resid_mid", "hook_attn_out") for n, s in named.items()}
        assert not (any(mid.values()) and "1.attn_out" in mid and mid["1.attn_out"])
        with hooks.gradients(bridge, list(where.values())) as gradients, hooks.taps(bridge, "blocks.0.hook_resid_pre"):
            METRIC(bridge(P.clean)).sum().backward()
        for name, hook in where.items():
            coefficient[name] = gradients[hook].flatten(2)
    checked, largest = 0, 0.0
    for i, up in enumerate(circuit.nodes):
        name, _, rest = up.partition("/")
        unit, _, pos = rest.partition("@")
        sae, at = named[name], int(pos)
        (x, own), (x2, own2) = ((read(bridge, t, sae.hook, target_of(sae)) * 2)[:2] for t in (P.clean, P.corrupted))
        f, f2 = sae.encode(x), sae.encode(x2)
        add = own2 - own - (sae.decode(f2, x) - sae.decode(f, x))
        if unit != "error":
            one = f.clone()
            one[..., int(unit)] = f2[..., int(unit)]
            add = sae.decode(one, x) - sae.decode(f, x)
        add = torch.where((torch.arange(POS) == at)[None, :, None], add, 0)
        direct = by.metric(name, add)
        assert np.allclose(found.values[i, -1], direct, atol=1e-5), up
        for j, down in enumerate(circuit.nodes):
            to, _, rest = down.partition("/")
            kind_, _, where_ = rest.partition("@")
            if effects.dictionaries.index(to) <= effects.dictionaries.index(name):
                assert found.values[i, j].isnull().all()
                continue
            if (i + j) % 3:  # a third of them
                continue
            expected = by.edge(name, add, to, kind_ if kind_ == "error" else int(kind_), int(where_), coefficient[to])
            assert np.allclose(found.values[i, j], expected, atol=1e-5), (up, down)
            checked, largest = checked + 1, max(largest, float(expected.abs().max()))
    assert checked > 10 and largest > 1e-3


@pytest.mark.parametrize("kind", ["plain", "with input"])
@pytest.mark.parametrize("family", FAMILIES)
def test_edges_out_of_a_node_sum_to_its_score(family: str, kind: str) -> None:
    """Whatever the rules, what goes in, and the direction: to all nodes of all dictionaries, and the metric."""
    bridge, saes = tiny_bridge(family), several(family, kind=kind)
    cases = [("gradient", "swap", "noise"), ("relp", "mean", "denoise"), ("gim", "zero", "noise"),
             ("relp_ah", "swap", "denoise")]  # fmt: skip
    for method, value, direction in cases[::2] if kind == "plain" else cases[1::2]:  # each in every family
        options: Any = {"method": method, "value": value, "direction": direction}
        effects = feature_effects(bridge, P, METRIC, saes, per_position=False, **options)
        full = select_features(effects, 1.0)
        edges = feature_edges(bridge, P, METRIC, saes, full, **options)
        assert np.allclose(edges.nodes, effects.values, atol=1e-6)
        gap, direct = abs(edges.elsewhere()).max(), abs(edges.nodes - edges.values[:, -1]).max()
        assert float(gap) < 5e-6 and float(direct) > 1e-2, (method, float(gap))
    less = full.subset([node for node in full.nodes if not node.startswith("2.")] + ["2.resid_post/error"])
    some = feature_edges(bridge, P, METRIC, saes, less, **options)
    assert float(abs(some.elsewhere()).max()) > 1e-3  # the last stream's latents are not asked for


def test_nodes_at_single_positions_are_parts_of_those_at_all() -> None:
    bridge, saes = tiny_bridge("llama"), several("llama")
    options: Any = {"method": "relp", "value": "mean"}
    effects = feature_effects(bridge, P, METRIC, saes, **options)
    together = feature_effects(bridge, P, METRIC, saes, per_position=False, **options)
    chosen = [*(f"1.mlp_out/{i}" for i in together.of("1.mlp_out").top(2)["latent"]), "2.resid_post/error", "1.z/error"]
    edges = feature_edges(bridge, P, METRIC, saes, select_features(together, 0).subset(chosen), **options)
    spread = select_features(effects, 0).subset([f"{node}@{pos}" for node in chosen for pos in range(POS)])
    parts = feature_edges(bridge, P, METRIC, saes, spread, **options)
    array = parts.values.values
    place = {node: i for i, node in enumerate(parts.values["upstream"].values.tolist())}
    largest = 0.0
    for up in chosen:
        for down in chosen:
            whole = edges.values.sel(upstream=up, downstream=down).values
            if np.isnan(whole).any():
                continue
            grid = array[[place[f"{up}@{p}"] for p in range(POS)]][:, [place[f"{down}@{p}"] for p in range(POS)]]
            assert np.allclose(grid.sum((0, 1)), whole, atol=1e-5)
            if up == "1.z/error" and down.startswith("1.mlp_out"):
                assert np.abs(whole).max() == 0  # all goes by way of 1.attn_out
            largest = max(largest, float(np.abs(whole).max()))
            assert np.abs(np.tril(grid.transpose(2, 0, 1), -1)).max() == 0  # nothing goes back in time
    assert largest > 1e-2
    named = feature_effects(bridge, P, METRIC, saes, positions=["s1", "end"], **options)
    two = select_features(named, 0).subset(["1.z/error@s1", "2.resid_post/error@end"])
    found = feature_edges(bridge, P, METRIC, saes, two, **options).values[0, 1].values
    for row in range(N):
        s1, end = int(P.positions["s1"][row]), int(P.positions["end"][row])
        expected = array[place[f"1.z/error@{s1}"], place[f"2.resid_post/error@{end}"], row]
        assert found[row] == pytest.approx(expected, abs=1e-6)


def test_integrated_gradients_weigh_the_downstream_nodes() -> None:
    """Coefficients are means along lines; derivatives between nodes are those of the run itself."""
    bridge, saes = doubled("llama"), several("llama", True)
    options: Any = {"method": "integrated_gradients", "steps": 4, "points": "midpoint"}
    effects = feature_effects(bridge, P, METRIC, saes, **options)
    plain = feature_effects(bridge, P, METRIC, saes, method="gradient")
    circuit = select_features(effects, 25)
    edges = feature_edges(bridge, P, METRIC, saes, circuit, **options)
    local = feature_edges(bridge, P, METRIC, saes, circuit, method="gradient")
    assert np.allclose(edges.nodes, effects.at(circuit.nodes).values, atol=1e-6)
    assert np.allclose(edges.values[:, -1], local.values[:, -1], atol=1e-6)
    seen = 0
    for j, down in enumerate(circuit.nodes):
        if "error" in down:
            continue
        mean, point = effects.at([down]).values.values[0], plain.at([down]).values.values[0]
        live = np.abs(point) > 1e-3
        ratio = mean[live] / point[live]
        column, other = (e.values.values[:, j][:, live] for e in (edges, local))
        rows = np.isfinite(column).all(1) & (np.abs(other) > 1e-4).any(1)
        assert np.allclose(column[rows], other[rows] * ratio, rtol=1e-3, atol=1e-6), down
        seen += int(rows.sum())
    assert seen > 5


def test_rules_govern_what_lies_between() -> None:
    """With frozen attention nothing crosses positions but through values: other edges than those of the gradient."""
    bridge, saes = tiny_bridge("llama"), several("llama")
    circuit = select_features(feature_effects(bridge, P, METRIC, saes, method="gradient"), 30)
    gradient, relp = (feature_edges(bridge, P, METRIC, saes, circuit, method=m) for m in ("gradient", "relp"))  # type: ignore[arg-type]
    assert float(abs(gradient.values - relp.values).max()) > 1e-2
    own = relp.nodes
    scores = feature_effects(bridge, P, METRIC, saes, method="relp").at(circuit.nodes)
    assert np.allclose(own, scores.values, atol=1e-6)


@pytest.mark.parametrize(("direction", "sign"), [("denoise", 1.0), ("noise", -1.0)])
def test_edges_of_a_linear_model_by_hand(direction: Any, sign: float) -> None:
    """The stream is x = (1, 1) or (-1, -1); attention 0 adds (4x0, 6x1), attention 1 as much of what it reads.

    25 x0 is x0, 4 x0 of attention 0, 4 x0 of attention 1 by the way past attention 0 and 16 x0 through both.
    """
    bridge = double(micro())
    names = ("blocks.0.hook_resid_pre", "blocks.0.hook_attn_out", "blocks.1.hook_attn_out")
    saes = [signs(bridge, name, None, torch.eye(2)) for name in names]
    p, metric = one_token(0, 1), logit(0)
    on = 2 if direction == "denoise" else 0  # relu(-x0) or relu(x0), as the run that is patched has it
    for method in ("gradient", "relp"):
        effects = feature_effects(bridge, p, metric, saes, method=method, direction=direction)  # type: ignore[arg-type]
        full = select_features(effects, 1.0)
        edges = feature_edges(bridge, p, metric, saes, full, method=method, direction=direction)  # type: ignore[arg-type]
        frame = edges.to_dataframe()
        edge = dict(zip(zip(frame["upstream"], frame["downstream"], strict=True), frame["weight"], strict=True))
        for unit in (0, 2):  # turning one off and the other on move the stream alike
            start, middle, last = (f"{name}/{unit}@0" for name in effects.dictionaries)
            first, second = (f"{name}/{on}@0" for name in effects.dictionaries[1:])
            assert edge[start, first] == pytest.approx(sign * 20) and edge[start, second] == pytest.approx(sign * 4)
            assert edge[start, "metric"] == pytest.approx(sign * 1) and edge[last, "metric"] == pytest.approx(sign * 20)
            assert edge[middle, second] == pytest.approx(sign * 16) and edge[middle, "metric"] == pytest.approx(
                sign * 4
            )
        assert len(edge) == 2 * (3 + 2 + 1)  # the other token's, errors, and into latents that are off there are none
        assert float(abs(edges.elsewhere()).max()) < 1e-5
        inflow = edges.values.sel(downstream=f"0.attn_out/{on}@0").sum("upstream")
        score = effects.at([f"0.attn_out/{unit}@0" for unit in (0, 2)]).values.sum("node")
        assert np.allclose(inflow, score)  # in a linear model what comes in is what there is


def test_the_planted_circuit_of_induction() -> None:
    """`x A B y A`: head 0 of block 0 writes A where B stands, head 0 of block 1 finds it there and writes B at the end.

    Dictionaries have one latent for each sign of each dimension of what attention writes.
    """
    bridge, p = induction(), induction_prompts()[:1]
    metric, bases = logit_difference(p), torch.eye(D, dtype=torch.float64)
    saes = [signs(bridge, f"blocks.{i}.hook_attn_out", None, bases).to(torch.float32) for i in (0, 1)]
    a, b, c = int(p.clean[0, 1]), int(p.answers[0]), int(p.foils[0])
    found, written, wrong = f"0.attn_out/{COPY + a}@2", f"1.attn_out/{OUT + b}@4", f"1.attn_out/{OUT + c}@4"
    exact = feature_effects(bridge, p, metric, saes, method="exact")
    mean = exact.mean()
    large = {node for node, effect in zip(exact.nodes, mean.values.ravel(), strict=True) if abs(effect) > 0.5}
    assert large == {found, written, wrong}
    line = feature_effects(bridge, p, metric, saes, method="integrated_gradients", steps=20, points="gauss_legendre")
    assert set(line.top(3)["node"]) == large
    circuit = select_features(exact, 3)
    options: Any = {"ablation": "swap"}
    assert feature_faithfulness(bridge, p, metric, saes, circuit, **options).faithfulness().item() > 0.95
    assert (
        feature_faithfulness(bridge, p, metric, saes, circuit, of="complement", **options).faithfulness().item() < 0.05
    )
    assert (
        feature_faithfulness(bridge, p, metric, saes, circuit - circuit.subset([found]), **options).faithfulness() < 0.8
    )
    edges = feature_edges(bridge, p, metric, saes, circuit, method="integrated_gradients", steps=20, points="midpoint")
    weights = edges.mean()
    into = weights.sel(upstream=found)
    assert abs(float(into.sel(downstream=written))) > 10 * abs(float(into.sel(downstream="metric")))
    assert float(weights.sel(upstream=written, downstream="metric")) == pytest.approx(float(mean.sel(
        node=f"1.attn_out/{OUT + b}", pos=4)), rel=1e-3)  # fmt: skip
    drawn = edges.circuit(circuit, k=9)
    assert len(drawn.edges) == 3 and drawn.edges[0]["downstream"] == "metric"
    assert [e for e in (drawn - circuit.subset([found])).edges if e["upstream"] == found] == []


def test_costs_batches_and_saving(tmp_path: Any) -> None:
    bridge, saes = tiny_bridge("gpt2"), several("gpt2")
    circuit = select_features(feature_effects(bridge, P, METRIC, saes), 9)
    found = feature_edges(bridge, P, METRIC, saes, circuit)
    first = sum(node.startswith("1.z/") for node in circuit.nodes)
    assert 0 < first < 9
    assert found.provenance["cost"] == {"forwards": 3 + 9 - first, "backwards": 2 + 9 - first}
    calls = 0
    original = torch.autograd.grad

    def grad(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", grad)
        one = feature_edges(bridge, P, METRIC, saes, circuit, batch_size=N)
    assert calls - 2 * 3 * len(saes) == 2 + 9 - first  # besides: placing the dictionaries
    assert np.allclose(one.values, found.values, atol=1e-6, equal_nan=True)
    for options in ({"batch_size": 3}, {"memory_budget": 2**21}):
        again = feature_edges(bridge, P, METRIC, saes, circuit, **options)  # type: ignore[arg-type]
        assert np.allclose(again.values, found.values, atol=1e-6, equal_nan=True)
    plain = feature_edges(bridge, P, lambda logits: METRIC(logits), saes, circuit)
    assert np.allclose(plain.values, found.values, atol=1e-6, equal_nan=True)
    loaded = results.load(found.save(tmp_path / "edges.nc"))
    assert isinstance(loaded, FeatureEdges) and repr(loaded) == repr(found)
    frame = loaded.to_dataframe()
    assert frame["weight"].abs().is_monotonic_decreasing and frame.columns.tolist() == [
        "upstream",
        "downstream",
        "weight",
    ]
    assert found.top(1)["edge"].item() == "->".join(frame.loc[0, ["upstream", "downstream"]])
    bound = float(frame["weight"].abs()[9])
    joined = found.circuit(circuit, threshold=bound)
    assert joined.edges == found.circuit(circuit, k=10).edges and len(joined.edges) == 10
    assert results.load(joined.save(tmp_path / "circuit.nc")).edges == joined.edges  # type: ignore[attr-defined]
    assert found.plot().layout.title.text.startswith("relp edges")


def test_hooks_and_gradients_are_left_as_found() -> None:
    bridge, saes = fresh_bridge("gemma2"), several("gemma2")
    circuit = select_features(feature_effects(bridge, P, METRIC, saes), 10)
    bridge.requires_grad_(True)
    before = METRIC(bridge(P.clean))
    feature_edges(bridge, P, METRIC, saes, circuit)
    assert torch.equal(METRIC(bridge(P.clean)), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in bridge.parameters())
    calls = 0

    def fails(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise ZeroDivisionError
        return METRIC(logits)

    with pytest.raises(ZeroDivisionError):
        feature_edges(bridge, P, fails, saes, circuit)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in bridge.hook_points())
    with pytest.raises(RuntimeError, match="training mode"):
        feature_edges(bridge.train(), P, METRIC, saes, circuit)


@pytest.mark.usefixtures("unchecked")
def test_what_is_refused() -> None:
    bridge, saes = tiny_bridge("llama"), several("llama")
    circuit = select_features(feature_effects(bridge, P, METRIC, saes), 5)
    queries = dictionary(bridge, "blocks.1.attn.hook_q")
    of_queries = select_features(feature_effects(bridge, P, METRIC, queries), 5)

    def run(given: Any = circuit, dictionaries: Any = saes, **options: Any) -> Any:
        return feature_edges(bridge, P, METRIC, dictionaries, given, **options)

    for message, call in {
        "method='exact' is unknown": lambda: run(method="exact"),
        "direction='up' is unknown": lambda: run(direction="up"),
        "value='resample' is unknown": lambda: run(value="resample"),
        "rules= replaces": lambda: run(rules="gim"),
        "must have some": lambda: run(circuit - circuit),
        "of a FeatureCircuit": lambda: run(["1.z/3"]),
        "but these are of": lambda: run(dictionaries=saes[:3]),
        "no relevance reaches": lambda: run(of_queries, (queries,), method="relp_ah"),
        "needs other examples": lambda: feature_edges(
            bridge, P[:1], logit_difference(P[:1]), saes, circuit, value="mean"
        ),
        "memory_budget=1,000 bytes is too small": lambda: run(memory_budget=1000),
        "has no gradient": lambda: feature_edges(bridge, P, lambda x: x[:, -1].argmax(-1).float(), saes, circuit),
        "give one of threshold": lambda: run().circuit(circuit),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_dictionaries_of_queries_are_cut_before_the_rules() -> None:
    """The factor of a rule on queries belongs to the coefficient of the node: conservation shows it."""
    bridge = tiny_bridge("llama")
    saes = (dictionary(bridge, "blocks.1.attn.hook_q"), dictionary(bridge, "blocks.0.hook_mlp_out"))
    effects = feature_effects(bridge, P, METRIC, saes, method="attnlrp", per_position=False)
    edges = feature_edges(bridge, P, METRIC, saes, select_features(effects, 1.0), method="attnlrp")
    into = edges.values.sel(upstream="0.mlp_out/error")[:-1].sum("downstream")
    assert float(abs(into).max()) > 1e-4 and float(abs(edges.elsewhere()).max()) < 1e-6
    assert dataclasses.replace(edges).nodes.sizes["upstream"] == 2 * 25
