"""Attribution patching: worked answers, finite differences, TransformerLens' own, completeness, cost and refusals."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from interp import hooks, metrics
from interp.models import geometry
from interp.patching import Effects, Rules, activation_patch
from interp.patching._passes import Passes
from interp.patching._quadrature import quadrature
from interp.patching.attribution import attribution_patch
from interp.types import SITES
from tests.helpers import FAMILIES, MORE_FAMILIES, N_LAYERS, fresh_bridge, tiny_bridge
from tests.patching.oracle import POS, N, activations, patched, prompts
from tests.patching.test_known_answers import blank, bridge_of, effect, logit, micro_model, one_token

STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
METHODS = ("gradient", "integrated_gradients", "relp", "relp_ah", "cp_lrp", "attnlrp", "gim")


@pytest.fixture(scope="module", autouse=True)
def _double() -> Iterator[None]:
    """RMSNorms of transformers and the softmax of rotary attention compute in float32 even in a float64 model, which
    costs 1e-7; here they do not, so that float64 models can be held to float64 tolerances. float32 is untouched."""
    softmax = torch.nn.functional.softmax

    def native(tensor: Tensor, dim: int | None = None, dtype: Any = None, **options: Any) -> Tensor:
        return softmax(tensor, dim=dim, dtype=None if tensor.dtype == torch.float64 else dtype, **options)

    def llama(norm: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
        return norm.weight * scaled.to(x.dtype)

    def gemma(norm: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
        return (scaled * (1 + norm.weight.to(wide.dtype))).to(x.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", native)
        patch.setattr(LlamaRMSNorm, "forward", llama)
        patch.setattr(Gemma2RMSNorm, "forward", gemma)
        yield


@functools.cache
def doubled(family: str, **config: Any) -> Any:
    """A float64 bridge of this module's own: what is probed of it, and remembered, was computed in float64 too."""
    return fresh_bridge(family, dtype=torch.float64, **config)


def all_sites(bridge: Any) -> tuple[Any, ...]:
    shape = geometry(bridge)
    left_out = {"resid_mid"} if shape.parallel else set()
    return tuple(site for site in SITES if site not in left_out | ({"pattern"} if shape.delegated_attention else set()))


def exact_scores(bridge: Any, p: Any, metric: Any, **options: Any) -> dict[Any, Tensor]:
    """Scores [layer, spot, unit, example] in the model's own precision: results are float32."""
    kept: list[Any] = []
    run = Passes.run

    def keep(self: Passes, done: Any) -> Any:
        kept.append(run(self, done))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Passes, "run", keep)
        attribution_patch(bridge, p, metric, **options)
    return kept[0].values


def runs(p: Any, direction: str) -> tuple[Tensor, Tensor]:
    """The run that is patched, and the other."""
    return (p.corrupted, p.clean) if direction == "denoise" else (p.clean, p.corrupted)


def close(effects: Effects, expected: Any, tolerance: float = 1e-10) -> bool:
    return torch.allclose(effect(effects).double(), torch.as_tensor(expected).double(), atol=tolerance, rtol=0)


# The linear micro-model of test_known_answers: layers multiply the stream by [5, 7], of which heads add [1, 2], [3, 4].


def micro() -> Any:
    model = micro_model()
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                matrix.normal_(generator=torch.Generator().manual_seed(0))  # a single token attends to itself anyway
    return model


def double(model: Any) -> Any:
    bridge = bridge_of(model.double())
    bridge.to(torch.float64, print_details=False)
    return bridge


NODES: dict[Any, Any] = {
    "resid_pre": ([[50.0], [50.0]], [[98.0], [98.0]]),
    "resid_mid": ([[50.0], [50.0]], [[98.0], [98.0]]),
    "resid_post": ([[50.0], [50.0]], [[98.0], [98.0]]),
    "attn_out": ([[40.0], [40.0]], [[84.0], [84.0]]),
    "mlp_out": ([[0.0], [0.0]], [[0.0], [0.0]]),
    "z": ([[10.0, 30.0], [10.0, 30.0]], [[28.0, 56.0], [28.0, 56.0]]),
    "v": ([[10.0, 30.0], [10.0, 30.0]], [[28.0, 56.0], [28.0, 56.0]]),
    "pattern": ([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]),
    "neuron": ([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]),
    "q": ([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]),
    "k": ([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]),
}


@pytest.mark.parametrize(("direction", "sign"), [("denoise", 1.0), ("noise", -1.0)])
def test_a_linear_model_has_its_hand_worked_effects(direction: Any, sign: float) -> None:
    bridge = double(micro())
    kinds: list[dict[str, Any]] = [{"method": "gradient"}, {"method": "gradient", "qk_fix": True}]
    for points, steps in (("gauss_legendre", 3), ("midpoint", 1), ("left", 4), ("right", 2)):
        kinds += [{"method": "integrated_gradients", "points": points, "steps": steps}]
    for token in (0, 1):
        for site in ("resid_mid", "z", "k"):  # the exact method; test_known_answers has the other sites
            exact = activation_patch(bridge, one_token(0, 1), logit(token), site=site, direction=direction)
            assert close(exact, sign * torch.tensor(NODES[site][token])), site
        for kind in [*kinds, {"method": "relp"}, {"method": "relp_ah"}, {"method": "cp_lrp"}]:
            sites = tuple(site for site in NODES if kind["method"] not in ("relp_ah", "cp_lrp") or site not in "qk")
            found = exact_scores(bridge, one_token(0, 1), logit(token), sites=sites, direction=direction, **kind)
            for site in sites:
                expected = sign * torch.tensor(NODES[site][token]).double()
                assert torch.allclose(found[site].flatten(1), expected, rtol=0, atol=1e-10), (site, kind)


def test_rules_for_norms_turn_a_model_with_norms_into_its_linear_one() -> None:
    """The micro-model with RMSNorms whose gains undo their denominators, which are the same in both runs.

    Exact effects of single heads are no longer those of the linear model, since a patched head changes denominators;
    relevance patching holds these constant, so its scores still are. AttnLRP and GIM halve what passes through each
    value, so a layer multiplies by [3, 4] on the way back.
    """
    model = micro().double()
    with torch.no_grad():
        x = torch.tensor([1.0, 1.0], dtype=torch.float64)
        for layer in model.model.layers:
            layer.input_layernorm = LlamaRMSNorm(2, eps=0.0).double()
            layer.input_layernorm.weight.fill_(x.pow(2).mean().sqrt())
            x = x * torch.tensor([5.0, 7.0])
            layer.post_attention_layernorm = LlamaRMSNorm(2, eps=0.0).double()
            layer.post_attention_layernorm.weight.fill_(x.pow(2).mean().sqrt())
        model.model.norm = LlamaRMSNorm(2, eps=0.0).double()
        model.model.norm.weight.fill_(x.pow(2).mean().sqrt())
    bridge = double(model.requires_grad_(False))
    methods: list[Any] = ["relp", "relp_ah", "cp_lrp", Rules(norm="LN"), Rules(norm="LN", attention="temperature")]
    for method in methods:
        sites = tuple(site for site in NODES if method not in ("relp_ah", "cp_lrp") or site not in ("q", "k"))
        for direction, sign in (("denoise", 1.0), ("noise", -1.0)):
            found = exact_scores(bridge, one_token(0, 1), logit(1), sites=sites, method=method, direction=direction)
            for site in sites:
                expected = sign * torch.tensor(NODES[site][1]).double()
                assert torch.allclose(found[site].flatten(1), expected, rtol=0, atol=1e-10), (method, site)
    gradient = attribution_patch(bridge, one_token(0, 1), logit(1), sites="z")["z"]
    assert abs(effect(gradient) - torch.tensor(NODES["z"][1])).max() > 10
    halved = {"resid_pre": [[32.0], [56.0]], "z": [[16.0, 32.0], [28.0, 56.0]], "v": [[8.0, 16.0], [14.0, 28.0]]}
    for method in ("attnlrp", "gim"):
        found = exact_scores(bridge, one_token(0, 1), logit(1), sites=tuple(halved), method=method)
        for site, answers in halved.items():
            assert torch.allclose(found[site].flatten(1), torch.tensor(answers).double(), rtol=0, atol=1e-10), site


@pytest.fixture(scope="module")
def gates() -> Any:
    """Heads 0 and 1 hand on the inputs a and b, head 2 one that nothing reads; neurons make gates of them.

    AND is relu(a + b - 1.25), OR is relu(a + b + 0.25) - relu(a + b - 0.75): away from the kinks of relu. Stream: three
    inputs, their copies (3, 4, 5), the constant 1 (6), the two outputs (7, 8).
    """
    model = blank(d_model=12, d_vocab=4, n_layers=2, n_heads=3, d_mlp=3)
    with torch.no_grad():
        embed = model.model.embed_tokens.weight
        embed[:, 6] = 1
        embed[0, :3] = 1  # token 0: all inputs on; token 1: all off
        first, second = model.model.layers
        for head in range(3):
            first.self_attn.o_proj.weight[3 + head, head * 12 + head] = 1
        mlp = second.mlp
        mlp.up_proj.weight[:, 6] = 1
        for neuron, offset in enumerate((-1.25, 0.25, -0.75)):
            mlp.gate_proj.weight[neuron, [3, 4]], mlp.gate_proj.weight[neuron, 6] = 1, offset
        mlp.down_proj.weight[7, 0] = 1
        mlp.down_proj.weight[8, 1], mlp.down_proj.weight[8, 2] = 1, -1
        model.lm_head.weight[0, 7] = 1
        model.lm_head.weight[1, 8] = 1
    return bridge_of(model)


@pytest.mark.parametrize(
    ("gate", "direction", "exact", "gradient"),
    [
        ("and", "noise", [-0.75, -0.75, 0.0], [-1.0, -1.0, 0.0]),  # breaking either input breaks an AND
        ("and", "denoise", [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),  # restoring one input alone restores nothing
        ("or", "noise", [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),  # the other input still suffices
        ("or", "denoise", [0.75, 0.75, 0.0], [1.0, 1.0, 0.0]),  # either input suffices
    ],
)
def test_noising_finds_the_inputs_of_and_denoising_those_of_or(
    gates: Any, gate: str, direction: Any, exact: list[float], gradient: list[float]
) -> None:
    metric = logit(["and", "or"].index(gate))
    for site in ("z", "v"):
        options: dict[str, Any] = {"direction": direction}
        assert close(activation_patch(gates, one_token(0, 1), metric, site=site, **options), [exact, [0.0] * 3], 1e-6)
        found = attribution_patch(gates, one_token(0, 1), metric, sites=site, **options)
        assert close(found[site], [gradient, [0.0] * 3], 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_derivatives_of_exact_patching(family: str) -> None:
    """Towards the other run's activation, at the base's own: central differences of one patched forward per cell."""
    bridge, p, step = doubled(family), prompts(), 1e-4
    metric = metrics.logit_difference(p)
    for number, site in enumerate(all_sites(bridge)):
        direction = ("denoise", "noise")[number % 2]
        base, other = runs(p, direction)
        unit = None if site in STREAM else 1
        axes = ("layer", "pos") if unit is None else ("layer", "pos", "neuron" if site == "neuron" else "head")
        found = exact_scores(bridge, p, metric, sites=site, direction=direction, axes=axes)[site]
        ends, start = activations(bridge, other, site), activations(bridge, base, site)
        largest = 0.0
        for layer, position in ((0, 4), (1, POS - 1), (2, POS - 1)):
            slopes = []
            for sign in (1, -1):
                moved = {layer: start[layer] + sign * step * (ends[layer] - start[layer])}
                logits = patched(bridge, base, site, [layer], moved, torch.full((N,), position), unit)
                slopes.append(metric(logits))
            expected = (slopes[0] - slopes[1]) / (2 * step)
            got = found[layer, position, 0 if unit is None else unit]
            assert torch.allclose(got, expected, rtol=1e-6, atol=1e-8), (site, layer, position)
            largest = max(largest, float(expected.abs().max()))
        assert largest > 1e-4, site


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "gemma2", "qwen3", "gptj"])
def test_node_scores_are_those_of_transformer_lens(family: str) -> None:
    peer: Any = importlib.import_module("transformer_lens.tools.analysis.attribution_patching")
    bridge, p = doubled(family), prompts()
    one = [metrics.logit_difference(p[i : i + 1]) for i in range(N)]
    expected: dict[Any, float] = {}
    for i in range(N):  # its metric is not told which example it scores
        pair = (p.clean[i : i + 1], p.corrupted[i : i + 1])
        bridge.requires_grad_(True)  # it needs a graph from the embeddings on
        try:
            with hooks.no_retained_graph(bridge):
                result = peer.attribution_patch(bridge, *pair, lambda logits, m=one[i]: m(logits).sum())
        finally:
            bridge.requires_grad_(False)
        for node, score in result.node_scores.items():
            expected[node] = expected.get(node, 0.0) + score / N
    heads = exact_scores(bridge, p, metrics.logit_difference(p), sites="z", axes=("layer", "pos", "head"))["z"].mean(-1)
    mlps = exact_scores(bridge, p, metrics.logit_difference(p), sites="mlp_out")["mlp_out"].mean(-1)
    compared = 0
    for node, score in expected.items():
        if node.kind == "embed":
            continue
        got = (
            heads[node.layer, node.position, node.head] if node.head is not None else mlps[node.layer, node.position, 0]
        )
        assert float(got) == pytest.approx(score, rel=1e-9, abs=1e-12), node
        compared += 1
    assert compared == N_LAYERS * POS * 5  # four heads and an MLP


COMBINATIONS: dict[str, dict[str, Any]] = {
    "denoise": {"direction": "denoise", "layers": [2]},
    "noise": {"direction": "noise", "positions": ["s2", "end"], "layers": [2, 0], "axes": ("layer", "pos")},
}


@functools.cache
def patched_exactly(family: str, site: Any, direction: str) -> Effects:
    p, options = prompts(), COMBINATIONS[direction]
    return activation_patch(tiny_bridge(family), p, metrics.logit_difference(p), site=site, **options)


@pytest.mark.parametrize(
    ("family", "method"),
    [*(("llama", method) for method in METHODS), ("gpt2", "gradient"), ("neox", "relp"), ("gemma2", "attnlrp")],
)
def test_results_line_up_with_exact_patching(family: str, method: Any) -> None:
    bridge, p = tiny_bridge(family), prompts()
    metric = metrics.logit_difference(p)
    sites = tuple(site for site in all_sites(bridge) if method not in ("relp_ah", "cp_lrp") or site not in ("q", "k"))
    found: dict[Any, Effects] = {}
    for options in COMBINATIONS.values() if family == "llama" else [COMBINATIONS["noise"]]:
        found = attribution_patch(bridge, p, metric, sites=sites, method=method, steps=2, **options)
        assert tuple(found) == sites
        for site in sites:
            exact, values = patched_exactly(family, site, options["direction"]), found[site].values
            assert values.dims == exact.values.dims and set(values.coords) == set(exact.values.coords)
            assert all((values[name] == exact.values[name]).all() for name in values.coords), site
            assert values.attrs["unit"] == exact.values.attrs["unit"]
            assert bool(abs(values).max() > 0)
            for end in ("clean", "corrupted"):
                assert abs(getattr(found[site], end) - getattr(exact, end)).max() < 1e-5
    record = found["mlp_out"].provenance
    assert record["method"] == method and record["direction"] == "noise" and record["sites"] == list(sites)
    assert record["cost"] == ({"forwards": 4, "backwards": 2} if "inte" in method else {"forwards": 2, "backwards": 1})


def test_grouped_models_have_key_value_heads() -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    found = attribution_patch(bridge, p, metrics.logit_difference(p), sites=("k", "v", "q"), axes=("layer", "head"))
    assert found["k"].values.sizes == found["v"].values.sizes == {"layer": N_LAYERS, "kv_head": 2, "example": N}
    assert found["q"].values.sizes == {"layer": N_LAYERS, "head": 4, "example": N}


def test_joint_cells_are_sums_and_selections_are_selections() -> None:
    bridge, p = doubled("llama"), prompts()
    metric = metrics.logit_difference(p)
    for site in all_sites(bridge):
        axis = None if site in STREAM else {"neuron": "neuron", "k": "head", "v": "head"}.get(site, "head")
        whole = exact_scores(bridge, p, metric, sites=site, axes=("layer", "pos", axis) if axis else ("layer", "pos"))
        together = exact_scores(bridge, p, metric, sites=site, axes=("layer",))[site]
        assert torch.allclose(together, whole[site].sum((1, 2), keepdim=True), rtol=1e-9, atol=1e-12)
        some = exact_scores(bridge, p, metric, sites=site, axes=("layer",), positions=["s1", 6], layers=[1])[site]
        expected = whole[site][1].sum(1)[torch.stack([p.positions["s1"], torch.full((N,), 6)]), torch.arange(N)].sum(0)
        assert torch.allclose(some[0, 0, 0], expected, rtol=1e-9, atol=1e-12)
        if axis:
            units = exact_scores(bridge, p, metric, sites=site, axes=("layer", axis))[site]
            assert torch.allclose(units, whole[site].sum(1, keepdim=True), rtol=1e-9, atol=1e-12)
    mixed = attribution_patch(
        bridge, p, metric, sites=("z", "v", "mlp_out"), axes={"z": ("layer",), "v": ("layer", "pos")}
    )
    assert [found.cells for found in mixed.values()][::2] == [("layer",), ("layer", "pos")]
    assert mixed["v"].cells == ("layer", "pos")
    neurons = attribution_patch(bridge, p, metric, sites="neuron")["neuron"].values
    chosen = attribution_patch(bridge, p, metric, sites="neuron", neurons=[7, 3])["neuron"].values
    assert chosen.neuron.values.tolist() == [7, 3] and chosen.equals(neurons.sel(neuron=[7, 3]))


@pytest.mark.parametrize("value", ["zero", "mean"])
def test_zero_and_mean_replacements(value: Any) -> None:
    """Against the same product by hand, from backward hooks."""
    bridge, p = doubled("gemma2"), prompts()
    metric = metrics.logit_difference(p)
    sites = all_sites(bridge)
    found = exact_scores(bridge, p, metric, sites=sites, value=value, axes=("layer",))
    names = {(site, layer): hooks.hook_name(site, layer) for site in sites for layer in range(N_LAYERS)}
    start = {"blocks.0.hook_resid_pre": lambda tensor: tensor.detach().requires_grad_()}
    listed = list(names.values())
    with hooks.no_retained_graph(bridge), hooks.interventions(bridge, start), hooks.gradients(bridge, listed) as slopes:
        metric(bridge(p.corrupted)).sum().backward()
    for site in sites:
        own, other = activations(bridge, p.corrupted, site), activations(bridge, p.clean, site)
        for layer in range(N_LAYERS):
            new = torch.zeros_like(own[layer]) if value == "zero" else other[layer].mean(0, keepdim=True)
            expected = ((new - own[layer]) * slopes[names[site, layer]]).flatten(1).sum(1)
            assert torch.allclose(found[site][layer, 0, 0], expected, rtol=1e-9, atol=1e-12), site
    results = attribution_patch(bridge, p, metric, sites="z", value=value)["z"]
    assert results.value == value and results.provenance["completeness"] is None
    assert results.provenance["cost"] == {"forwards": 2, "backwards": 1}


def likeness(family: str) -> Any:
    """A tiny model whose embeddings share a mean, as trained ones do: the line between two of them does not come near
    the origin, where a norm divides by almost nothing and no quadrature of few points could follow."""
    bridge = fresh_bridge(family, dtype=torch.float64)
    with torch.no_grad():
        embed = bridge.original_model.get_input_embeddings().weight
        embed.copy_(
            0.6 * embed + 0.3 * torch.randn(embed.shape[1], generator=torch.Generator().manual_seed(1)).double()
        )
    return bridge


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_are_complete(family: str) -> None:
    bridge, p = likeness(family), prompts()

    def error(points: Any, steps: int = 5) -> float:
        """Summed over examples, so that errors of different signs do not cancel."""
        found = attribution_patch(
            bridge, p, metrics.logit_difference(p), sites="resid_pre", layers=[0], axes=("layer",),
            method="integrated_gradients", points=points, steps=steps,
        )["resid_pre"]  # fmt: skip
        change = found.clean - found.corrupted
        record = found.provenance["completeness"]
        assert record["metric_change"] == pytest.approx(float(change.mean()), rel=1e-5, abs=1e-6)
        assert record["input_sum"] == pytest.approx(float(found.values.mean()), rel=1e-5, abs=1e-6)
        assert record["relative_error"] == pytest.approx(
            abs(record["input_sum"] - record["metric_change"]) / abs(record["metric_change"])
        )
        return float(abs(found.values - change).sum() / abs(change).sum())

    assert error("gauss_legendre") < 1e-3
    assert min(error("left"), error("right")) > 10 * error("gauss_legendre") and error("left") > 0.01
    assert error("gauss_legendre", 12) < 1e-6


def test_ends_of_the_line_are_the_gradients_of_the_two_runs() -> None:
    bridge, p = doubled("llama"), prompts()
    metric, sites = metrics.logit_difference(p), ("z", "mlp_out", "q", "resid_mid")
    plain = exact_scores(bridge, p, metric, sites=sites)
    line: dict[str, Any] = {"sites": sites, "method": "integrated_gradients"}
    left = exact_scores(bridge, p, metric, points="left", steps=1, **line)
    right = exact_scores(bridge, p, metric, points="right", steps=1, **line)
    reverse = exact_scores(bridge, p, metric, sites=sites, direction="noise")
    whole = exact_scores(bridge, p, metric, steps=3, **line)
    parts = exact_scores(bridge, p, metric, steps=3, batch_size=1, **line)
    relp = exact_scores(bridge, p, metric, sites=sites, method="relp")
    ruled = exact_scores(bridge, p, metric, points="left", steps=1, rules="relp", **line)
    for site in sites:
        assert torch.allclose(left[site], plain[site], rtol=1e-9, atol=1e-12)
        assert torch.allclose(right[site], -reverse[site], rtol=1e-9, atol=1e-12)
        assert torch.allclose(whole[site], parts[site], rtol=1e-9, atol=1e-12)
        assert torch.allclose(ruled[site], relp[site], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(relp[site], plain[site], rtol=0.1)


def test_quadratures_are_exact_to_their_degree() -> None:
    for steps in range(1, 9):
        for points, degree in (("gauss_legendre", 2 * steps - 1), ("midpoint", 1), ("left", 0), ("right", 0)):
            nodes, weights = quadrature(points, steps)  # type: ignore[arg-type]
            assert nodes == sorted(nodes) and nodes[0] >= 0 and nodes[-1] <= 1 and len(nodes) == steps
            for power in range(degree + 2):
                got = sum(weight * node**power for node, weight in zip(nodes, weights, strict=True))
                exact = abs(got - 1 / (power + 1)) < 1e-12
                assert exact == (power <= degree) or steps >= 8, (points, steps, power)  # there the error is as small
    with pytest.raises(ValueError, match="steps=0"):
        quadrature("left", 0)


def test_two_forwards_and_one_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    metric = metrics.logit_difference(p)
    sites = all_sites(bridge)
    for method in ("gradient", "relp"):
        attribution_patch(bridge, p, metric, sites=sites, method=method)  # what is probed once is probed
    forwards, backwards = [], []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: (backwards.append(1), grad(*a, **k))[1])
    handle = bridge.blocks[0].register_forward_pre_hook(lambda module, inputs: forwards.append(len(inputs[0])))
    kinds: list[tuple[dict[str, Any], int, int]] = [
        ({}, 2, 1),
        ({"method": "relp"}, 2, 1),
        ({"value": "mean"}, 2, 1),
        ({"value": "zero"}, 2, 1),
        ({"method": "integrated_gradients", "steps": 3}, 5, 3),
        ({"qk_fix": True}, 4, 1),
        ({"grad_drop": True}, 2, 1 + N_LAYERS),
    ]
    try:
        for options, n_forwards, n_backwards in kinds:
            forwards.clear()
            backwards.clear()
            found = attribution_patch(bridge, p, metric, sites=sites, **options)
            assert found["z"].provenance["cost"] == {"forwards": n_forwards, "backwards": n_backwards}
            assert sum(forwards) == n_forwards * N, options  # rows, since steps share forwards
            assert len(backwards) == (1 if "steps" in options else n_backwards), options
    finally:
        handle.remove()


def test_everything_is_restored_and_no_graph_is_kept() -> None:
    bridge, p = fresh_bridge("gpt2"), prompts()
    bridge.requires_grad_(True)
    frozen = next(iter(bridge.original_model.parameters()))
    frozen.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in bridge.original_model.parameters()]
    points = [(len(point.fwd_hooks), len(point.bwd_hooks)) for point in bridge.hook_points()]
    with torch.no_grad():
        logits = bridge(p.clean)
    calls = 0

    def failing(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise ArithmeticError("between the forwards")
        return logits[:, -1, 0]

    def check() -> None:
        assert [parameter.requires_grad for parameter in bridge.original_model.parameters()] == flags
        assert all(parameter.grad is None for parameter in bridge.parameters())
        assert [(len(point.fwd_hooks), len(point.bwd_hooks)) for point in bridge.hook_points()] == points
        assert all(getattr(block.attn, "_pattern", None) is None for block in bridge.blocks)
        assert all("forward" not in block.__dict__ for block in bridge.blocks)
        with torch.no_grad():
            assert torch.equal(bridge(p.clean), logits)

    kinds: list[dict[str, Any]] = [
        {}, {"method": "relp"}, {"method": "integrated_gradients"}, {"grad_drop": True, "qk_fix": True}
    ]  # fmt: skip
    for options in kinds:
        attribution_patch(bridge, p, metrics.logit_difference(p), sites=("q", "resid_mid", "z"), **options)
        with torch.no_grad():  # the caller's grad mode neither matters nor changes
            attribution_patch(bridge, p, metrics.logit_difference(p), sites=("q", "z"), **options)
            assert not torch.is_grad_enabled()
        check()
        calls = 0
        with pytest.raises(ArithmeticError):
            attribution_patch(bridge, p, failing, sites=("q", "resid_mid", "z"), **options)
        check()


def test_batches_do_not_change_the_scores() -> None:
    bridge, p = doubled("gpt2"), prompts(n=6)
    metric = metrics.logit_difference(p)
    kinds: list[dict[str, Any]] = [
        {}, {"value": "mean"}, {"grad_drop": True, "qk_fix": True}, {"method": "integrated_gradients"}
    ]  # fmt: skip
    for options in kinds:
        whole = exact_scores(bridge, p, metric, sites=("z", "q", "k", "neuron"), **options)
        for size in ({"batch_size": 4}, {"memory_budget": 3 * 2**20}):
            parts = exact_scores(bridge, p, metric, sites=("z", "q", "k", "neuron"), **options, **size)
            assert all(torch.allclose(parts[site], whole[site], rtol=1e-9, atol=1e-12) for site in whole), size


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_metrics_of_every_kind(family: str) -> None:
    """Every differentiable metric, at places of its own in each example, and plain callables; by hand."""
    bridge, p = doubled(family), prompts()
    early = dataclasses.replace(p, positions={**p.positions, "end": torch.tensor([5, 7, 6, 5])})
    sets: list[list[list[int]]] = [[[10 + i, 20 + i] for i in range(N)], [[30 + i] for i in range(N)]]
    with torch.no_grad():
        reference = bridge(p.clean)
    kinds: list[Any] = [
        metrics.logit_difference(early),
        metrics.answer_log_prob(early),
        metrics.answer_prob(p),
        metrics.probability_difference(p, answers=sets[0], foils=sets[1]),
        metrics.kl_divergence(reference),
        metrics.kl_divergence(reference, positions=p.positions["end"]),
        lambda logits: logits[:, -1, 5] - logits[:, -1].logsumexp(-1),
        lambda logits: (logits[:, 3:].softmax(-1)[..., 7]).mean(-1),
    ]
    names = [hooks.hook_name("resid_post", layer) for layer in range(N_LAYERS)]
    own, other = activations(bridge, p.corrupted, "resid_post"), activations(bridge, p.clean, "resid_post")
    for metric in kinds:
        found = exact_scores(bridge, p, metric, sites="resid_post")["resid_post"][:, :, 0]
        with hooks.no_retained_graph(bridge), hooks.taps(bridge, names) as taps:
            total = metric(bridge(p.corrupted)).sum()
        slopes = torch.autograd.grad(total, [taps[name] for name in names])
        for layer, slope in enumerate(slopes):
            expected = ((other[layer] - own[layer]) * slope).sum(-1).T
            assert torch.allclose(found[layer], expected, rtol=1e-7, atol=1e-10)
        assert found.abs().max() > 1e-6


def test_half_precision_scores_are_accumulated_in_float32() -> None:
    bridge, p = fresh_bridge("llama", dtype=torch.bfloat16), prompts()
    found = attribution_patch(bridge, p, metrics.logit_difference(p), sites=("z", "neuron", "q"), method="relp")
    exact = attribution_patch(tiny_bridge("llama"), p, metrics.logit_difference(p), sites=("z",), method="relp")
    mine, theirs = effect(found["z"]).flatten(), effect(exact["z"]).flatten()
    assert torch.corrcoef(torch.stack([mine, theirs]))[0, 1] > 0.95


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_further_families(family: str) -> None:
    """Every site has the derivative of exact patching, also where attention is delegated to other code."""
    bridge, p = doubled(family), prompts()
    metric = metrics.logit_difference(p)
    sites = all_sites(bridge)
    found = exact_scores(bridge, p, metric, sites=sites, axes=("layer",))
    everywhere = torch.arange(POS).repeat(N, 1)
    for site in sites:
        own, other = activations(bridge, p.corrupted, site), activations(bridge, p.clean, site)
        slopes = []
        for step in (1e-3, -1e-3):
            moved = {1: own[1] + step * (other[1] - own[1])}
            slopes.append(metric(patched(bridge, p.corrupted, site, [1], moved, everywhere)))
        expected = (slopes[0] - slopes[1]) / 2e-3
        # their norms and softmaxes round to float32, which a difference quotient divides by its step
        assert torch.allclose(found[site][1, 0, 0], expected, rtol=2e-3, atol=2e-3), site


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ("residpre",)}, "sites='residpre' is unknown; did you mean 'resid_pre'"),
        ({"sites": ()}, "must name at least one site"),
        ({"sites": ("z", "z")}, "none twice"),
        ({"method": "gradients"}, "method='gradients' is unknown; did you mean 'gradient'"),
        ({"direction": "denoising"}, "direction='denoising' is unknown"),
        ({"value": "resample"}, "value='resample' is unknown.*'swap', 'zero', 'mean'"),
        ({"points": "gauss"}, "points='gauss' is unknown"),
        ({"rules": "relp"}, "here method='gradient': pass the preset or the Rules as method="),
        ({"method": "relp", "rules": "gim"}, "rules= replaces the gradient of method='integrated_gradients'"),
        ({"method": "integrated_gradients", "rules": "rlp"}, "preset='rlp' is unknown; did you mean 'relp'"),
        ({"method": "integrated_gradients", "steps": 0}, "steps=0 must be at least 1"),
        ({"method": "integrated_gradients", "value": "zero"}, "use value='swap', or another method"),
        ({"method": "relp_ah", "sites": ("q", "z")}, "no relevance reaches 'q' with relp_ah.*held constant"),
        ({"method": "cp_lrp", "sites": ("k", "q")}, "no relevance reaches 'k' and 'q' with cp_lrp"),
        ({"method": Rules(qkv=(0, 1, 1)), "sites": "q"}, "no relevance reaches 'q' with these rules"),
        (
            {"method": Rules(qkv=(1, 1, 0)), "sites": "v"},
            "no relevance reaches 'v' with these rules.*factor in qkv is 0",
        ),
        ({"method": "integrated_gradients", "rules": "cp_lrp", "sites": "q"}, "no relevance reaches 'q'"),
        ({"qk_fix": True}, "qk_fix=True is about the sites 'q' and 'k'"),
        ({"qk_fix": True, "method": "relp", "sites": "q"}, "qk_fix=True repairs method='gradient'; here method='relp'"),
        ({"grad_drop": True, "method": "gim"}, "grad_drop=True repairs method='gradient'"),
        ({"axes": ("layer", "head")}, "site 'resid_pre': axes='head' is unknown"),
        ({"axes": {"z": ("layer",)}}, "axes= names 'z', but the sites are 'resid_pre', 'attn_out', 'mlp_out'"),
        ({"sites": "z", "neurons": [1]}, r"neurons= is for the site 'neuron'; the sites are 'z'"),
        ({"positions": ["s3"]}, "positions='s3' is unknown"),
        ({"layers": [3]}, r"layers=\[3\]: \[3\] do not exist; expected indices from 0 to 2"),
        ({"batch_size": 0}, "batch_size=0 is below 1"),
        ({"memory_budget": 1000}, "memory_budget=1,000 bytes is too small"),
        ({"memory_budget": 2**18, "sites": SITES}, r"a backward pass needs about [\d,]+ \(one row\)"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refusals_come_before_any_forward(options: dict[str, Any], message: str) -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    geometry(bridge)
    ran = []
    handle = bridge.blocks[0].register_forward_pre_hook(lambda *args: ran.append(1))
    try:
        with pytest.raises(ValueError, match=message):
            attribution_patch(bridge, p, metrics.logit_difference(p), **options)
        for metric in (metrics.accuracy(p), metrics.answer_rank(p)):
            with pytest.raises(ValueError, match=f"{metric.name} has no gradient.*use interp.metrics.logit_difference"):
                attribution_patch(bridge, p, metric)
    finally:
        handle.remove()
    assert not ran


@pytest.mark.usefixtures("unchecked")
def test_refusals_of_models_and_metrics() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    with pytest.raises(ValueError, match="needs other examples, but there is 1"):
        attribution_patch(bridge, p[:1], metrics.logit_difference(p[:1]), value="mean")
    with pytest.raises(ValueError, match="<lambda> has no gradient"):
        attribution_patch(bridge, p, lambda logits: (logits[:, -1, 0] > 0).float())
    with pytest.raises(ValueError, match=r"the metric returned shape \(\) for logits of 4 examples"):
        attribution_patch(bridge, p, lambda logits: logits.mean())
    with pytest.raises(ValueError, match="the metric is not finite"):
        attribution_patch(bridge, p, lambda logits: logits[:, -1, 0] * torch.nan)
    with pytest.raises(ValueError, match="pattern cannot be edited"):
        attribution_patch(tiny_bridge("gptj"), p, metric, sites=("z", "pattern"))
    with pytest.raises(ValueError, match="qk_fix=True edits attention patterns, which tiny-gptj computes where"):
        attribution_patch(tiny_bridge("gptj"), p, metric, sites="q", qk_fix=True)
    with pytest.raises(ValueError, match="Attention and MLP run in parallel"):
        attribution_patch(tiny_bridge("neox"), p, metric, sites=("z", "resid_mid"))
    with pytest.raises(ValueError, match="drops one layer of several; this model has 1"):
        attribution_patch(tiny_bridge("gpt2", n_layer=1), p, metric, grad_drop=True)
    training = fresh_bridge("gpt2")
    training.train()
    with pytest.raises(RuntimeError, match="training mode"):
        attribution_patch(training, p, metric)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_divergence_from_the_run_itself_is_refused(dtype: torch.dtype) -> None:
    bridge, p = tiny_bridge("gpt2", dtype=dtype), prompts()
    with torch.no_grad():
        reference = bridge(p.clean)
    for positions in (None, p.positions["end"]):
        metric = metrics.kl_divergence(reference, positions=positions)
        with pytest.raises(
            ValueError, match=r"gradient of kl_divergence is zero at the logits of the clean run.*denoise"
        ):
            attribution_patch(bridge, p, metric, direction="noise")
        assert abs(attribution_patch(bridge, p, metric)["mlp_out"].values).max() > 1e-4
        line = attribution_patch(bridge, p, metric, direction="noise", method="integrated_gradients")
        assert abs(line["mlp_out"].values).max() > 1e-4
    same = dataclasses.replace(p, corrupted=p.clean)  # nothing to explain: zeros, and nothing to complain about
    assert abs(attribution_patch(bridge, same, metrics.logit_difference(same))["mlp_out"].values).max() == 0


def test_results_are_saved_whole(tmp_path: Any) -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    options: dict[str, Any] = {"sites": "z", "axes": ("layer", "head", "pos"), "positions": ["s2", "end"]}
    custom = attribution_patch(bridge, p, metrics.logit_difference(p), method=Rules(norm="LN"), **options)["z"]
    dropped = attribution_patch(bridge, p, metrics.logit_difference(p), grad_drop=True, **options)["z"]
    for effects in (custom, dropped):
        loaded = Effects.load(effects.save(tmp_path / "effects.nc"))
        assert loaded.values.identical(effects.values) and loaded.provenance == effects.provenance
    record = custom.provenance
    assert record["method"] == "custom" and record["rules"]["norm"] == "LN" and record["steps"] is None
    assert record["reference"] == "the same example of the other run"
    assert dropped.provenance["grad_drop"] is True and "absolute" in dropped.values.attrs["score"]
    line = attribution_patch(bridge, p, metrics.logit_difference(p), method="integrated_gradients", **options)["z"]
    assert (line.provenance["steps"], line.provenance["points"]) == (5, "gauss_legendre")
