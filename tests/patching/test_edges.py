"""Edge attribution: worked answers, the model's own graph, TransformerLens' own, sums to nodes, refusals."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from interp import hooks, metrics
from interp.patching._edge_passes import EdgePasses
from interp.patching.edge_scores import EdgeScores
from interp.patching.edges import edge_attribution
from interp.patching.graph import Graph, graph_of
from interp.patching.rules import PRESETS, Rules, backward_rules
from interp.results import load
from tests.helpers import FAMILIES, N_LAYERS, fresh_bridge, tiny_bridge
from tests.patching.oracle import POS, N, activations, prompts
from tests.patching.test_attribution import (
    METHODS,
    _double,  # noqa: F401 (a fixture: float64 models compute in float64 throughout)
    double,
    doubled,
    exact_scores,
    micro,
    runs,
)
from tests.patching.test_known_answers import logit, one_token


def edges_of(bridge: Any, p: Any, metric: Any, **options: Any) -> tuple[Tensor, EdgeScores]:
    """Scores [writer, reader, spot, example] in the model's own precision, 0 where there is no edge, and the result."""
    kept: list[Any] = []
    run = EdgePasses.run

    def keep(self: EdgePasses, done: Any) -> Any:
        kept.append(run(self, done))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EdgePasses, "run", keep)
        result = edge_attribution(bridge, p, metric, **options)
    edges = kept[0][0]
    missing = edges.isnan()
    assert torch.equal(missing, ~result.graph.exists[:, :, None, None].expand_as(missing))
    return edges.nan_to_num(0), result


# The linear micro-model of test_known_answers: two heads add [1, 2] and [3, 4] times what enters each of two layers.

MICRO = {
    "input->logits": (2, 2), "input->a1.h0<v>": (2, 4), "input->a1.h1<v>": (6, 8),
    "input->a0.h0<v>": (10, 28), "input->a0.h1<v>": (30, 56),
    "a0.h0->logits": (2, 4), "a0.h0->a1.h0<v>": (2, 8), "a0.h0->a1.h1<v>": (6, 16),
    "a0.h1->logits": (6, 8), "a0.h1->a1.h0<v>": (6, 16), "a0.h1->a1.h1<v>": (18, 32),
    "a1.h0->logits": (10, 28), "a1.h1->logits": (30, 56),
}  # fmt: skip
"""Twice what each edge carries of the two outputs, which are 25 and 49 in one run and -25 and -49 in the other."""


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_every_method_gives_the_worked_scores_of_a_linear_model(direction: Any) -> None:
    bridge, sign = double(micro()), 1 if direction == "denoise" else -1
    for method in ("gradient", "integrated_gradients", "relp", "relp_ah", "attnlrp", Rules(norm="LN", gate="detach")):
        factor = 1.0
        if not isinstance(method, Rules) and method in PRESETS:
            factor = PRESETS[method].qkv[2]
        token = 0 if direction == "denoise" else 1  # each of the two outputs once
        options: dict[str, Any] = {"method": method, "direction": direction}
        edges, result = edges_of(bridge, one_token(0, 1), logit(token), **options)
        names = result.graph.edges()
        expected = [MICRO.get(edge, (0, 0))[token] * sign for edge in names]
        if factor != 1:
            expected = [scaled(edge, token, factor) * sign if edge in MICRO else 0 for edge in names]
        found = edges[result.graph.exists].flatten()
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.double), atol=1e-10, rtol=0), method


def scaled(edge: str, token: int, factor: float) -> float:
    """As `MICRO` where the gradient at values is multiplied by a factor: every head on the way does that."""
    weights = {"h0": (1, 2), "h1": (3, 4)}
    writer, reader = edge.split("->")
    carried = 2.0
    total = 1 + 4 if token == 0 else 1 + 6
    if writer.startswith("a"):
        carried *= weights[writer[3:]][token] * (total if writer[1] == "1" else 1)
    if reader == "logits":
        return carried
    above = 1 + factor * (total - 1) if reader[1] == "0" else 1
    return carried * factor * weights[reader[3:5]][token] * above


# What a reader would send back, by the model's own graph: one reader, and one head, at a time.


def reference(
    bridge: Any, p: Any, metric: Any, method: Any, direction: str = "denoise", stream: Tensor | None = None
) -> Tensor:
    """Scores [writer, reader, pos, example] of swapping, each by a backward pass through the own modules of the
    model, in the run that is patched or in one that enters block 0 with another stream."""
    graph, (base, other) = graph_of(bridge), runs(p, direction)
    layers = range(graph.n_layers)
    outputs: dict[Any, str] = {("head", i): hooks.hook_name("z", i) for i in layers}
    outputs |= {("mlp", i): hooks.hook_name("mlp_out", i) for i in layers}
    outputs["input", -1] = "blocks.0.hook_resid_pre"
    change: dict[str, Tensor] = {}
    with torch.no_grad(), hooks.reads(bridge, list(outputs.values())) as read:
        bridge(other)
        change |= read
        bridge(base)
        change = {name: tensor - read[name] for name, tensor in change.items()}
    entered, left, early = {}, {}, []
    for i in layers:
        own = "ln2" in bridge.blocks[i]._modules
        for part in "qkv":
            entered[part, i], left[part, i] = f"blocks.{i}.ln1.hook_in", hooks.hook_name(part, i)  # type: ignore[arg-type]
            early.append(left[part, i])
        entered["mlp", i], left["mlp", i] = f"blocks.{i}.{'ln2' if own else 'ln1'}.hook_in", f"blocks.{i}.mlp.hook_in"
    last = hooks.hook_name("resid_post", graph.n_layers - 1)
    added = {i: hooks.hook_name("attn_out", i) for i in layers}
    scores = torch.zeros(len(graph.writers), len(graph.readers), base.shape[1], len(base), dtype=torch.double)
    with hooks.no_retained_graph(bridge), torch.enable_grad(), ExitStack() as stack:
        stack.enter_context(hooks.taps(bridge, "blocks.0.hook_resid_pre"))  # where the graph begins
        found = [stack.enter_context(hooks.taps(bridge, name)) for name in dict.fromkeys([*entered.values(), *early])]
        stack.enter_context(backward_rules(bridge, method))
        late = [*added.values(), *outputs.values(), *(left["mlp", i] for i in layers), last]
        found += [stack.enter_context(hooks.taps(bridge, name)) for name in late if name != outputs["input", -1]]
        total = metric(bridge(base) if stream is None else hooks.run_from(bridge, stream, 0)).sum()
        taps = {name: tensor for context in found for name, tensor in context.items()}

        def back(of: Tensor, to: Tensor, gradient: Tensor | None = None) -> Tensor | None:
            return torch.autograd.grad(of, to, gradient, retain_graph=True, allow_unused=True)[0]

        through: Tensor | None = None
        for r, reader in enumerate(graph.reader_nodes):
            if reader.part == "logits":
                gradient = back(total, taps[last])
            else:
                here = taps[left[reader.part, reader.layer]]
                gradient = back(total, here)
                if gradient is not None and reader.part != "mlp":
                    alone = torch.zeros_like(gradient)
                    alone[:, :, reader.head] = gradient[:, :, reader.head]
                    gradient = alone
                if gradient is not None:
                    gradient = back(here, taps[entered[reader.part, reader.layer]], gradient)
            if gradient is None:
                continue
            for w, writer in enumerate(graph.writer_nodes):
                if not graph.exists[w, r]:
                    continue
                name = outputs[writer.part, writer.layer]
                if writer.part == "head":
                    if writer.head == 0:
                        through = back(taps[added[writer.layer]], taps[name], gradient)
                    assert through is not None
                    scores[w, r] = (change[name] * through)[:, :, writer.head].sum(-1).T
                else:
                    scores[w, r] = (change[name] * gradient).sum(-1).T
    return scores


@pytest.mark.parametrize(
    ("family", "preset"), [("gpt2", "attnlrp"), ("llama", "gim"), ("neox", "cp_lrp"), ("gemma2", "attnlrp")]
)
def test_scores_are_those_of_one_backward_pass_for_every_reader(family: str, preset: Any) -> None:
    bridge, p = doubled(family), prompts(n=2, pos=6)
    metric = metrics.logit_difference(p)
    for method, direction in (("gradient", "noise"), (preset, "denoise")):
        options: dict[str, Any] = {"method": method, "direction": direction}
        found, _ = edges_of(bridge, p, metric, per_position=True, **options)
        expected = reference(bridge, p, metric, method, direction)
        assert float(expected.abs().max()) > 0.05
        assert torch.allclose(found, expected, atol=1e-9 * float(expected.abs().max()), rtol=0), method


def node_scores(bridge: Any, p: Any, metric: Any, graph: Graph, **options: Any) -> Tensor:
    """Scores [writer, pos, example] by attribution patching."""
    axes: Any = {"resid_pre": ("layer", "pos"), "z": ("layer", "pos", "head"), "mlp_out": ("layer", "pos")}
    found = exact_scores(bridge, p, metric, sites=tuple(axes), axes=axes, **options)
    parts = {"input": found["resid_pre"], "head": found["z"], "mlp": found["mlp_out"]}
    return torch.stack([parts[node.part][max(0, node.layer), :, node.head] for node in graph.writer_nodes])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_edges_sum_to_nodes(family: str, method: Any) -> None:
    bridge, p = doubled(family), prompts()
    metric = metrics.logit_difference(p)
    case: dict[str, Any] = {"value": "mean" if method in ("relp", "gim") else "zero", "direction": "noise"}
    if method == "integrated_gradients":
        case = {"points": "left", "direction": "noise", "rules": "relp", "steps": 2}
    for options in ({}, case) if method in ("gradient", "relp", "integrated_gradients") else ({},):
        edges, _ = edges_of(bridge, p, metric, method=method, per_position=True, **options)
        nodes = node_scores(bridge, p, metric, graph_of(bridge), method=method, **options)
        assert float(nodes.abs().max()) > 0.05
        assert float((edges.sum(1) - nodes).abs().max()) <= 1e-9 * float(nodes.abs().max()), options


@pytest.mark.parametrize("family", ["qwen3", "gptj", "gemma3"])
def test_edges_sum_to_nodes_in_more_families(family: str) -> None:
    """Norms of queries and keys; one norm for attention and MLP, attention that is computed elsewhere; all at once."""
    bridge, p = tiny_bridge(family), prompts(n=2)
    metric = metrics.logit_difference(p)
    for method in ("gradient", "relp_ah"):
        edges, result = edges_of(bridge, p, metric, method=method, per_position=True)
        nodes = node_scores(bridge, p, metric, result.graph, method=method)
        assert float((edges.sum(1) - nodes).abs().max()) <= 1e-5 * float(nodes.abs().max())


def test_scores_are_those_of_transformer_lens() -> None:
    """Its own function, one pair at a time: denoising, gradients at inputs that it splits by head."""
    tl: Any = importlib.import_module("transformer_lens.tools.analysis.attribution_patching")
    bridge, p = fresh_bridge("gpt2"), prompts(n=2, pos=6)
    found = edge_attribution(bridge, p, metrics.logit_difference(p), per_position=True)
    bridge.requires_grad_(True)  # as it must be for theirs
    graph, expected = found.graph, torch.full(tuple(found.values.shape), torch.nan)
    names = {"embed": "input", "mlp_out": "m{l}", "attn_head_out": "a{l}.h{h}", "mlp_in": "m{l}", "logits": "logits"}
    names |= {f"{part}_input": "a{l}.h{h}<" + part + ">" for part in "qkv"}

    def name(node: Any) -> str:
        return names[node.kind].format(l=node.layer, h=node.head)

    for i in range(len(p)):
        answer, foil = int(p.answers[i]), int(p.foils[i])
        result = tl.attribution_patch(
            bridge, p.clean[i : i + 1], p.corrupted[i : i + 1],
            lambda logits, a=answer, f=foil: logits[0, -1, a] - logits[0, -1, f],
            config=tl.EdgeAttributionConfig(granularity="edge"),
        )  # fmt: skip
        for (writer, reader), score in result.edge_scores.items():
            place = graph.place(f"{name(writer)}->{name(reader)}")
            expected[place[0], place[1], writer.position, i] = float(score)
    theirs, ours = expected.isnan(), torch.tensor(found.values.values)
    assert torch.equal(theirs, ours.isnan())
    # theirs counts the position embedding as no writer; it is the same in both runs, and adds nothing
    assert float((ours - expected)[~theirs].abs().max()) <= 1e-6 < float(expected[~theirs].abs().max())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_integrated_gradients_is_the_published_left_sum(family: str) -> None:
    """Streams entering block 0 at corrupted + k / steps (clean - corrupted), k from 0, are the runs whose gradients are
    averaged. With post-norms the writers' outputs are taken to first order in each of them."""
    bridge, p, steps = doubled(family), prompts(n=2, pos=6), 2
    metric = metrics.logit_difference(p)
    options: dict[str, Any] = {"method": "integrated_gradients", "steps": steps, "points": "left"}
    found, result = edges_of(bridge, p, metric, per_position=True, **options)
    start, end = (activations(bridge, tokens, "resid_pre")[0] for tokens in (p.corrupted, p.clean))
    expected = sum(
        reference(bridge, p, metric, "gradient", stream=start + k / steps * (end - start)) / steps for k in range(steps)
    )
    assert torch.allclose(found, expected, atol=1e-10, rtol=0)
    assert result.provenance["cost"] == {"forwards": 2 + steps, "backwards": steps}
    one_by_one, _ = edges_of(bridge, p, metric, per_position=True, batch_size=1, **options)
    assert torch.allclose(found, one_by_one, atol=1e-12, rtol=0)


def test_edges_into_held_attention_patterns_score_nothing_and_factors_are_of_the_reader() -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    metric = metrics.logit_difference(p)
    graph = graph_of(bridge)
    into = torch.tensor([node.part in ("q", "k") for node in graph.reader_nodes])
    for method in ("relp_ah", "cp_lrp"):
        found, _ = edges_of(bridge, p, metric, method=method)
        assert not found[:, into].any() and found[:, ~into].any(1).all()
    relp, attnlrp = (edges_of(bridge, p, metric, method=method)[0] for method in ("relp", "attnlrp"))
    for part, factor in (("q", 0.25), ("k", 0.25), ("v", 0.5)):  # the last block's: nothing above it differs
        last = torch.tensor([node.part == part and node.layer == N_LAYERS - 1 for node in graph.reader_nodes])
        assert torch.allclose(attnlrp[:, last], factor * relp[:, last], atol=1e-7, rtol=0)
        assert float(relp[:, last].abs().max()) > 1e-3


def test_positions_are_summed_kept_apart_and_chosen() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    kept, by_pos = edges_of(bridge, p, metric, per_position=True)
    assert by_pos.values.dims == ("writer", "reader", "pos", "example") and by_pos.values.sizes["pos"] == POS
    assert by_pos.values["token"].dims == ("pos",)
    summed, result = edges_of(bridge, p, metric)
    assert result.values.dims == ("writer", "reader", "example")
    assert torch.allclose(summed[:, :, 0], kept.sum(2), atol=1e-6)
    names = ["s1", "end"]
    chosen, named = edges_of(bridge, p, metric, positions=names, per_position=True)
    for i, name in enumerate(names):
        where = p.positions[name]
        for example in range(N):
            assert torch.allclose(chosen[:, :, i, example], kept[:, :, where[example], example], atol=1e-7)
    assert named.values["pos"].values.tolist() == names and named.provenance["positions"] == names
    both, _ = edges_of(bridge, p, metric, positions=["s1", 4])
    expected = torch.stack([kept[:, :, [*{int(p.positions["s1"][i]), 4}], i].sum(2) for i in range(N)], -1)
    assert torch.allclose(both[:, :, 0], expected, atol=1e-6)  # a position that both name counts once


def test_batches_and_blocks_of_positions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, p = doubled("gemma2"), prompts()
    metric = metrics.logit_difference(p)
    every, _ = edges_of(bridge, p, metric)
    for size in (1, 3):
        found, _ = edges_of(bridge, p, metric, batch_size=size)
        assert torch.allclose(found, every, atol=1e-13, rtol=0)
    blocks = []
    read = EdgePasses._read

    def count(self: EdgePasses, found: Any, at: Tensor) -> Any:
        blocks.append(len(at))
        return read(self, found, at)

    monkeypatch.setattr(EdgePasses, "_read", count)
    monkeypatch.setattr("interp.patching._edge_passes._CPU_BLOCK", 2**18)
    found, _ = edges_of(bridge, p, metric)
    assert len(blocks) > 1 and sum(blocks) == POS
    assert torch.allclose(found, every, atol=1e-13, rtol=0)
    whole, _ = edges_of(bridge, p, lambda logits: metric(logits))  # a plain callable sees all examples at once
    assert torch.allclose(whole, every, atol=1e-12, rtol=0)


def test_a_result_says_what_it_is_ranks_adds_up_and_is_kept_on_disk(tmp_path: Any) -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    metric = metrics.logit_difference(p)
    found = edge_attribution(bridge, p, metric, method="relp", direction="noise")
    assert found.graph == graph_of(bridge) and found.method == "relp"
    assert f"{found.graph.n_edges} edges; relp; noise, swap; metric logit_difference" in repr(found)
    mean = found.mean()
    best = found.top(3)
    strongest = abs(mean).where(mean.notnull(), 0).values
    assert abs(best["value"][0]) == pytest.approx(strongest.max())
    place = found.graph.place(best["edge"][0])
    assert strongest[place] == strongest.max() and list(best.columns[:3]) == ["edge", "writer", "reader"]
    frame = found.to_dataframe()
    assert len(frame) == found.graph.n_edges * N and frame["edge"].nunique() == found.graph.n_edges
    assert found.nodes().dims == ("writer", "example")
    some = found.between(["input", "m0"], "m1")
    assert some.values == pytest.approx(found.values.sel(writer=["input", "m0"], reader="m1").sum("writer").values)
    with pytest.raises(ValueError, match="no reader 'm9'"):
        found.between("input", "m9")
    again = load(found.save(tmp_path / "edges.nc"))
    assert isinstance(again, EdgeScores) and again.graph == found.graph
    assert again.values.identical(found.values) and again.clean.identical(found.clean)
    with torch.no_grad():
        clean, corrupted = (metric(bridge(tokens)) for tokens in (p.clean, p.corrupted))
    assert found.clean.values == pytest.approx(clean, abs=1e-5)
    assert found.corrupted.values == pytest.approx(corrupted, abs=1e-5)
    assert found.provenance["cost"] == {"forwards": 2, "backwards": 1} and found.plot().data


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_scored_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    monkeypatch.setattr(EdgePasses, "run", lambda self, done: pytest.fail("a forward was run"))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"method": "relpp"}, "method='relpp' is unknown; did you mean 'relp'"),
        ({"direction": "up"}, "direction='up' is unknown"),
        ({"value": "gaussian"}, "value='gaussian' is unknown"),
        ({"method": "integrated_gradients", "value": "zero"}, "use value='swap'"),
        ({"rules": "relp"}, "pass the preset or the Rules as method="),
        ({"positions": "nowhere"}, "positions='nowhere' is unknown"),
        ({"memory_budget": 1000}, "memory_budget=1,000 bytes is too small"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            edge_attribution(bridge, p, metric, **options)
    with pytest.raises(ValueError, match="accuracy has no gradient"):
        edge_attribution(bridge, p, metrics.accuracy(p))


def test_a_model_whose_heads_are_not_what_they_are_taken_for_is_refused() -> None:
    bridge, p = fresh_bridge("gpt2"), prompts()
    bridge.blocks[1].ln1.register_forward_hook(lambda module, args, output: 2 * output[..., :1] * output)
    with pytest.raises(ValueError, match="block 1.*not linear in the norm of the stream"):
        edge_attribution(bridge, p, metrics.logit_difference(p))


def test_the_model_is_left_as_it_was() -> None:
    bridge, p = fresh_bridge("gemma2"), prompts()
    bridge.requires_grad_(True)
    before = {id(point): len(point._forward_hooks) + len(point._backward_hooks) for point in bridge.hook_points()}
    edge_attribution(bridge, p, metrics.logit_difference(p), method="relp")
    with pytest.raises(RuntimeError, match="broken"):
        edge_attribution(bridge, p, broken)
    after = {id(point): len(point._forward_hooks) + len(point._backward_hooks) for point in bridge.hook_points()}
    assert before == after and all(parameter.requires_grad for parameter in bridge.parameters())
    assert all(parameter.grad is None for parameter in bridge.parameters())


def broken(logits: Tensor) -> Tensor:
    raise RuntimeError("broken")
