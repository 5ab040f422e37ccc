"""The graph of writers and readers: sizes, names, which edges exist, and that the stream is the sum of its writers."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from interp import hooks
from interp.patching.graph import Graph, graph_of
from tests.helpers import FAMILIES, N_HEADS, N_KV_HEADS, N_LAYERS, tiny_bridge, tiny_tokens

SHAPES = [Graph(3, 4, 4, False), Graph(3, 4, 2, False), Graph(2, 6, 1, True), Graph(1, 1, 1, True)]


def test_the_graph_of_gpt2_small_has_the_sizes_of_the_literature() -> None:
    graph = Graph(12, 12, 12, False)
    assert (len(graph.writers), len(graph.readers), graph.n_edges) == (157, 445, 32_491)


def reads(writer: str, reader: str, parallel: bool) -> bool:
    """Whether an edge exists, from names alone."""
    if writer == "input" or reader == "logits":
        return True
    wrote, read = (int(re.findall(r"\d+", name)[0]) for name in (writer, reader))
    if wrote == read:
        return writer[0] == "a" and reader[0] == "m" and not parallel
    return wrote < read


@pytest.mark.parametrize("graph", SHAPES)
def test_edges_exist_where_the_writer_is_in_the_stream_of_the_reader(graph: Graph) -> None:
    expected = [[reads(writer, reader, graph.parallel) for reader in graph.readers] for writer in graph.writers]
    assert graph.exists.tolist() == expected
    names = [f"{w}->{r}" for w in graph.writers for r in graph.readers if reads(w, r, graph.parallel)]
    assert graph.edges() == names and graph.n_edges == len(names)


@pytest.mark.parametrize("graph", SHAPES)
def test_names_places_and_masks_are_one(graph: Graph) -> None:
    names = graph.edges()[:: max(1, graph.n_edges // 17)]
    assert sorted(graph.edges(graph.mask(names))) == sorted(names)
    for name in names:
        writer, reader = graph.place(name)
        assert f"{graph.writers[writer]}->{graph.readers[reader]}" == name
    assert len(set(graph.writers)) == len(graph.writers) and len(set(graph.readers)) == len(graph.readers)
    assert Graph(**dataclasses.asdict(graph)) == graph


def test_queries_have_readers_of_their_own_and_keys_and_values_one_for_each_group() -> None:
    graph = Graph(2, 4, 2, False)
    assert graph.readers[:9] == (
        "a0.h0<q>", "a0.h1<q>", "a0.h2<q>", "a0.h3<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0",
    )  # fmt: skip
    assert graph.feeds("a1.h1<v>") == graph.feeds("a1.h1<k>") == ("a1.h2", "a1.h3")
    assert graph.feeds("a1.h1<q>") == ("a1.h1",) and graph.feeds("m1") == ("m1",) and graph.feeds("logits") == ()
    assert graph.inputs_of("a1.h3") == ("a1.h3<q>", "a1.h1<k>", "a1.h1<v>") and graph.inputs_of("input") == ()
    for writer in graph.writers:
        assert set(graph.inputs_of(writer)) == {reader for reader in graph.readers if writer in graph.feeds(reader)}


def test_what_is_no_edge_is_refused_with_what_is_meant() -> None:
    graph, parallel = Graph(2, 4, 2, False), Graph(2, 2, 2, True)
    with pytest.raises(ValueError, match=r"no reader 'a1.h3<k>'; did you mean"):
        graph.place("input->a1.h3<k>")
    with pytest.raises(ValueError, match=r"no writer 'a0.h1<q>'; did you mean 'a0.h1'"):
        graph.mask(["a0.h1<q>->m1"])
    with pytest.raises(ValueError, match="has no '->'"):
        graph.mask(["m0"])
    with pytest.raises(ValueError, match=r"there is no edge m1->m0: the stream that m0 reads is before m1$"):
        graph.place("m1->m0")
    with pytest.raises(ValueError, match=r"a0.h0->m0.*run in parallel"):
        parallel.place("a0.h0->m0")
    with pytest.raises(ValueError, match=r"Bool\[11, 19\] \[writer, reader\] for this graph, got torch.bool \[11, 5\]"):
        graph.edges(graph.exists[:, :5])
    with pytest.raises(ValueError, match=r"no edge a0.h0->a0.h0<q>.*\(8 such"):
        graph.check(graph.exists | (torch.arange(11)[:, None] == 1))
    with pytest.raises(ValueError, match="must divide"):
        Graph(1, 3, 2, False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_of_a_model(family: str) -> None:
    bridge = tiny_bridge(family)
    grouped = N_KV_HEADS if family in ("llama", "gemma2") else N_HEADS
    assert graph_of(bridge) == Graph(N_LAYERS, N_HEADS, grouped, family == "neox")


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_what_the_writers_of_a_reader_change_is_what_its_stream_changes(family: str) -> None:
    """Between two runs, the writers that exist for a reader differ by what the reader's stream differs by, whose place
    is known: biases cancel, and there is no post-norm in these families."""
    bridge = tiny_bridge(family)
    graph = graph_of(bridge)
    change: dict[str, Tensor] = {}
    sites: dict[str, str] = {"input": "blocks.0.hook_resid_pre", "logits": f"blocks.{N_LAYERS - 1}.hook_resid_post"}
    for layer in range(N_LAYERS):
        sites[f"z{layer}"], sites[f"w{layer}"] = hooks.hook_name("z", layer), hooks.hook_name("mlp_out", layer)
        sites[f"a{layer}"] = hooks.hook_name("resid_pre", layer)
        sites[f"m{layer}"] = hooks.hook_name("resid_pre" if graph.parallel else "resid_mid", layer)
    for name, hook in sites.items():
        first, second = (read(bridge, hook, tiny_tokens(seed=seed)) for seed in (0, 1))
        change[name] = second - first
    for place, reader in enumerate(graph.readers):
        total: Any = 0
        for writer, node in zip(graph.writers, graph.writer_nodes, strict=True):
            if not graph.exists[graph.writers.index(writer), place]:
                continue
            if node.part == "head":
                total = (
                    total + change[f"z{node.layer}"][:, :, node.head] @ bridge.blocks[node.layer].attn.W_O[node.head]
                )
            else:
                total = total + change["input" if node.part == "input" else f"w{node.layer}"]
        assert torch.allclose(total, change[reader.split(".")[0]], atol=1e-5), reader


@torch.no_grad()
def read(bridge: Any, hook: str, tokens: Tensor) -> Tensor:
    with hooks.reads(bridge, hook) as found:
        bridge(tokens)
    return found[hook]
