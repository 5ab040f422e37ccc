"""Concept vectors: planted tokens, noise that equals a change of the weights, traces between models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.metrics import logit_difference
from interp.neurons import (
    ConceptVectors,
    KnowledgeTrace,
    concept_ablation,
    concept_vectors,
    knowledge_trace,
    knowledge_transplant,
)
from interp.prompts import Prompts
from tests.helpers import D_MLP, D_VOCAB, FAMILIES, N_LAYERS, fresh_bridge, tiny_bridge, tiny_tokens


def prompts_of(seed: int = 0, n: int = 5, pos: int = 7) -> Prompts:
    tokens = tiny_tokens(n, pos, seed)
    answers = torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(seed))
    return Prompts(tokens, tokens, answers, (answers + 1) % 60)


def value_vector(bridge, layer: int, index: int) -> torch.Tensor:
    """A view of the stored weights."""
    return bridge.blocks[layer].mlp.W_out.data[index]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_coverage_are_those_of_the_whole_product(family: str) -> None:
    bridge = tiny_bridge(family)
    concepts = {"one": [7], "three": [4, 9, 30]}
    found = concept_vectors(bridge, concepts, k=6, layers=[1])
    logits = bridge.blocks[1].mlp.W_out.double() @ bridge.W_U.double()
    z = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)
    order = logits.argsort(1, descending=True)[:, :6]
    for name, ids in concepts.items():
        assert np.allclose(found.values.sel(quantity="score", concept=name, layer=1), z[:, ids].mean(1), atol=1e-4)
        covered = [np.mean([token in row for token in ids]) for row in order.tolist()]
        assert np.allclose(found.values.sel(quantity="coverage", concept=name, layer=1), covered)
    assert found.values.sel(layer=0).isnull().all()


def test_a_planted_vector_is_the_first_candidate(tmp_path) -> None:
    bridge = fresh_bridge("llama")
    for token in (11, 12):
        value_vector(bridge, 1, 5).add_(3 * bridge.W_U.data[:, token] / bridge.W_U.data[:, token].norm())
    found = concept_vectors(bridge, {"pair": [11, 12], "other": [40]}, k=5)
    assert found.sets(1)["pair"] == [(1, 5)]
    assert found.candidates("pair", 1).iloc[0]["coverage"] == 1.0
    spectrum = found.spectrum().set_index("concept")
    covered = found.values.sel(quantity="coverage", concept="pair") >= 0.5
    assert spectrum.loc["pair", "carriers"] == int(covered.sum())
    assert spectrum.loc["other", "expected"] == pytest.approx(N_LAYERS * D_MLP * 5 / D_VOCAB)
    assert spectrum.loc["pair", "expected"] == pytest.approx(N_LAYERS * D_MLP * (1 - (1 - 5 / D_VOCAB) ** 2))
    assert ConceptVectors.load(found.save(tmp_path / "v.nc")).sets(2) == found.sets(2)
    assert found.plot(5).data
    many = concept_vectors(bridge, {str(token): [token] for token in range(9)}, k=5)
    with pytest.raises(ValueError, match="9 lines"):
        many.plot()
    assert many.plot(concepts=["3", "4"]).data
    with pytest.raises(ValueError, match="no concept 'x'"):
        found.candidates("x")


@pytest.mark.parametrize("family", [*FAMILIES, "opt", "gptj"])
def test_moving_a_vector_through_the_activation_is_moving_the_weight(family: str) -> None:
    bridge, other, prompts = tiny_bridge(family), fresh_bridge(family), prompts_of()
    chosen = [(0, 3), (1, 6), (1, 20)]
    generator = torch.Generator().manual_seed(3)
    for layer, index in chosen:
        value_vector(other, layer, index).add_(torch.randn(32, generator=generator))
    metric = logit_difference(prompts)
    with torch.no_grad():
        change = metric(other(prompts.clean)) - metric(bridge(prompts.clean))
    assert float(change.abs().max()) > 0.05  # the weights were really changed
    found = knowledge_transplant(bridge, other, {"all": chosen, "one": chosen[:1]}, {"t": prompts}, controls=(),
                                 batch_size=3)  # fmt: skip
    cells = found.values.sel(measure="logit_difference", task="t")
    assert np.allclose(cells.sel(set="all"), change, atol=1e-3)
    assert not np.allclose(cells.sel(set="one"), change, atol=1e-3)


def test_noise_is_relative_to_the_vector_or_absolute_and_can_be_repeated() -> None:
    bridge, prompts = tiny_bridge("llama"), prompts_of()
    options = {"controls": (), "n_draws": 1, "seed": 1}
    sets = {"short": [(0, 3)]}
    small, again, large = (
        concept_ablation(bridge, sets, {"t": prompts}, noise=noise, **options)  # type: ignore[arg-type]
        for noise in (0.1, 0.1, 0.2)
    )
    assert np.array_equal(small.values, again.values)
    pick = {"measure": "logit_difference", "set": "short"}
    assert np.allclose(2 * small.values.sel(pick), large.values.sel(pick), rtol=0.2, atol=2e-3)
    # absolute noise of a relative one's standard deviation is the same noise
    length = float(value_vector(bridge, 0, 3).norm())
    same = concept_ablation(bridge, sets, {"t": prompts}, noise=0.2 * length / 32**0.5, scale="absolute", **options)  # type: ignore[arg-type]
    assert np.allclose(same.values.sel(pick), large.values.sel(pick), atol=2e-4)
    assert np.abs(large.values.sel(pick)).max() > 1e-2


def test_noise_on_the_vector_that_carries_an_answer_hurts_that_answer() -> None:
    bridge = fresh_bridge("gpt2")
    prompts = prompts_of(n=8)
    answer = Prompts(prompts.clean, prompts.clean, torch.full((8,), 9), torch.full((8,), 10))
    other = Prompts(prompts.clean, prompts.clean, torch.full((8,), 30), torch.full((8,), 31))
    value_vector(bridge, 1, 4).copy_(2.0 * bridge.W_U.data[:, 9])
    value_vector(bridge, 1, 5).copy_(0.0 * bridge.W_U.data[:, 9])
    found = concept_ablation(
        bridge, {"nine": [(1, 4)], "nothing": [(1, 5)]}, {"nine": answer, "other": other}, n_draws=8
    )
    assert (found.values.sel(set="nothing", measure="logit_difference") == 0).all()
    assert float(np.abs(found.values.sel(set="nine", measure="logit_difference")).mean()) > 0.01
    assert found.controls.sizes["draw"] == 5
    assert found.provenance["mode"] == "noise"


@pytest.mark.parametrize("head", ["own", "before"])
def test_a_trace_shows_what_moved_and_nothing_else(head: str, tmp_path) -> None:
    before, after = tiny_bridge("llama"), fresh_bridge("llama")
    concepts = {"moved": [11], "kept": [40]}
    vectors = {"moved": [(1, 5)], "kept": [(0, 2), (1, 9)]}
    old = value_vector(after, 1, 5).clone()
    value_vector(after, 1, 5).copy_(-old)
    found = knowledge_trace(before, after, concepts, vectors, k=8, head=head)  # type: ignore[arg-type]
    still = np.ones((N_LAYERS, D_MLP), bool)
    still[1, 5] = False
    assert np.allclose(found.values.sel(quantity="cosine").values[still], 1, atol=1e-5)
    assert (found.values.sel(quantity="l2").values[still] == 0).all()
    assert (found.values.sel(quantity="jaccard").values[still] == 1).all()
    assert float(found.values.sel(quantity="cosine")[1, 5]) == pytest.approx(-1, abs=1e-5)
    assert float(found.values.sel(quantity="relative_l2")[1, 5]) == pytest.approx(2, abs=1e-5)
    logits = old @ before.W_U
    tops = [set((sign * logits).topk(8).indices.tolist()) for sign in (1, -1)]
    expected = len(tops[0] & tops[1]) / len(tops[0] | tops[1])
    assert float(found.values.sel(quantity="jaccard")[1, 5]) == pytest.approx(expected)
    assert float(found.related.sel(stage="before", concept="moved")[0]) == float(11 in tops[0])
    assert float(found.related.sel(stage="after", concept="moved")[0]) == float(11 in tops[1])
    table = found.concepts().set_index("concept")
    assert table.loc["moved", "moved_more_than"] == 1.0
    assert table.loc["kept", "cosine"] == pytest.approx(1, abs=1e-5)
    assert table["vectors"].tolist() == [1, 2]
    assert KnowledgeTrace.load(found.save(tmp_path / "t.nc")).concepts().equals(found.concepts())
    assert found.plot("cosine").data


def test_the_head_is_compared_too_unless_it_is_held() -> None:
    before, after = tiny_bridge("llama"), fresh_bridge("llama")
    after.W_U.data.copy_(torch.randn(after.W_U.shape, generator=torch.Generator().manual_seed(1)))
    own, held = (knowledge_trace(before, after, {"c": [5]}, k=8, head=head) for head in ("own", "before"))  # type: ignore[arg-type]
    assert float(own.values.sel(quantity="jaccard").mean()) < 0.3
    assert float(held.values.sel(quantity="jaccard").min()) == 1.0
    assert own.vectors.sizes["vector"] == 5  # the best of `before`, by default


def test_refusals(unchecked) -> None:
    bridge, prompts = tiny_bridge("gpt2"), prompts_of()
    with pytest.raises(ValueError, match="token ids \\[999\\]"):
        concept_vectors(bridge, {"x": [999]}, k=5)
    with pytest.raises(ValueError, match="no concepts"):
        concept_vectors(bridge, {}, k=5)
    with pytest.raises(ValueError, match="k=200"):
        concept_vectors(bridge, {"x": [1]})
    with pytest.raises(ValueError, match="noise=0"):
        concept_ablation(bridge, {"x": [(0, 1)]}, {"t": prompts}, noise=0)
    with pytest.raises(ValueError, match="scale='both'"):
        concept_ablation(bridge, {"x": [(0, 1)]}, {"t": prompts}, scale="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_draws=0"):
        concept_ablation(bridge, {"x": [(0, 1)]}, {"t": prompts}, n_draws=0)
    with pytest.raises(ValueError, match="the models differ"):
        knowledge_trace(bridge, tiny_bridge("gpt2", n_inner=24), {"x": [1]}, k=5)
    with pytest.raises(ValueError, match="each concept needs its own"):
        knowledge_trace(bridge, bridge, {"x": [1]}, {"y": [(0, 1)]}, k=5)
    with pytest.raises(ValueError, match="head='after'"):
        knowledge_trace(bridge, bridge, {"x": [1]}, k=5, head="after")  # type: ignore[arg-type]
