"""Circuits that are known because the models were set by hand: found exactly, sufficient, complete and minimal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from interp.metrics import logit_difference
from interp.patching import (
    Circuit,
    circuit_auroc,
    circuit_stability,
    faithfulness,
    minimality,
    select_circuit,
)
from interp.patching.edges import edge_attribution
from interp.patching.graph import graph_of
from tests.patching.hand_set import INDUCTION, XOR, induction, induction_prompts, xor, xor_metric, xor_prompts
from tests.patching.test_known_answers import bridge_of, logit, micro_model, one_token

METHODS = ("gradient", "integrated_gradients", "relp", "gim")


@pytest.fixture(scope="module")
def known() -> dict[str, tuple[Any, Any, Any, Circuit]]:
    found = {}
    for name, bridge, p, edges in (
        ("induction", induction(), induction_prompts(), INDUCTION),
        ("xor", xor(), xor_prompts(), XOR),
    ):
        metric = logit_difference(p) if name == "induction" else xor_metric(p)
        found[name] = (bridge, p, metric, Circuit.of(graph_of(bridge), edges))
    return found


def test_the_models_do_what_they_were_set_to(known: Any) -> None:
    bridge, p, metric, _ = known["induction"]
    clean, corrupted = metric(bridge(p.clean)), metric(bridge(p.corrupted))
    assert (bridge(p.clean)[:, -1].argmax(-1) == p.answers).all()
    assert clean.min() > 2
    assert torch.allclose(clean, -corrupted, atol=0.01)  # dimensions that should not turn do so by a hair
    bridge, p, _, _ = known["xor"]
    expected = torch.where(p.clean[:, 0] == p.clean[:, 1], 0.5 * (1 - p.clean[:, 0]), 1.0)
    assert torch.allclose(bridge(p.clean)[:, -1, 1], expected.float(), atol=1e-3)


@pytest.mark.parametrize("name", ["induction", "xor"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_found_exactly(known: Any, name: str, method: Any, direction: Any) -> None:
    """The edges with a score are those of the circuit, whichever way they are selected."""
    bridge, p, metric, truth = known[name]
    scores = edge_attribution(bridge, p, metric, method=method, direction=direction)
    scale = float(np.nanmax(np.abs(scores.values.values)))
    per_example = np.nan_to_num(np.abs(scores.values.values)).max(-1) > 1e-5 * scale
    assert Circuit(truth.graph, torch.tensor(per_example)) == truth
    for how in ("top", "greedy"):
        assert select_circuit(scores, len(truth), how=how) == truth  # type: ignore[arg-type]
    assert select_circuit(scores, threshold=1e-4 * scale) == truth
    assert circuit_auroc(scores, truth).estimate == 1
    if name == "induction":  # examples of XOR differ in sign, so that their means cancel in some resamples
        assert circuit_stability(scores, [len(truth)], n_resamples=20).values.sel(bound="estimate").item() > 0.99


def test_frozen_attention_does_not_find_what_it_cannot(known: Any) -> None:
    """Rules that hold attention patterns constant give queries and keys no score: two of five edges remain."""
    bridge, p, metric, truth = known["induction"]
    scores = edge_attribution(bridge, p, metric, method="cp_lrp", direction="noise")
    found = Circuit(truth.graph, torch.tensor(np.nan_to_num(np.abs(scores.mean().values)) > 1e-6))
    assert found.edges == ["input->a1.h0<v>", "a1.h0->logits"]
    assert circuit_auroc(scores, truth).estimate == pytest.approx((2 + 3 / 2) / 5, abs=0.05)  # ties count half


@pytest.mark.parametrize("name", ["induction", "xor"])
def test_sufficient_complete_and_minimal(known: Any, name: str) -> None:
    bridge, p, metric, truth = known[name]
    kept = faithfulness(bridge, p, metric, truth, ablation="swap")
    assert np.allclose(kept.values.values[0], kept.model.values, atol=1e-4)  # in every example
    assert float(kept.faithfulness()[0]) == pytest.approx(1, abs=1e-4)
    rest = faithfulness(bridge, p, metric, truth, ablation="swap", of="complement")
    assert np.allclose(rest.values.values[0], rest.empty.values, atol=1e-4)
    found = minimality(bridge, p, metric, truth, ablation="swap")
    assert set(found.values["edge"].values) == set(truth.edges)
    assert (found.values.mean("example").values > 0.05).all()
    whole = minimality(bridge, p, metric, Circuit.full(truth.graph), ablation="swap").values.mean("example")
    assert (np.abs(whole.where(~whole["edge"].isin(truth.edges), 0).values) < 1e-4).all()  # the others are idle


def test_an_edge_less_breaks_induction(known: Any) -> None:
    """Without the edge that says what to look for, or the one that says where it is, the answer is not found."""
    bridge, p, metric, truth = known["induction"]
    without = {edge: truth - Circuit.of(truth.graph, [edge]) for edge in truth}
    curve = faithfulness(bridge, p, metric, without, ablation="swap")
    f = dict(zip(curve.values["circuit"].values.tolist(), curve.faithfulness().values.tolist(), strict=True))
    assert f["a1.h0->logits"] == pytest.approx(0, abs=1e-4)
    # head a1.h0 then attends everywhere alike, and moves a little of every token
    assert 0.2 < f["input->a1.h0<q>"] < 0.9
    assert f["input->a0.h0<v>"] == pytest.approx(f["a0.h0->a1.h0<k>"], abs=1e-5)


@pytest.mark.parametrize(
    ("edges", "answer"),
    [
        # heads 0 multiply by [1, 2], heads 1 by [3, 4]: layer 0 gives 1 - [1, 2] + [3, 4], layer 1 times [5, 7]
        (["input->a0.h0<v>"], (15, 21)),
        # only a1.h1 sees a0.h0 turned over: [5, 7] + [1, 2] * [5, 7] + [3, 4] * [3, 3]
        (["a0.h0->a1.h1<v>"], (19, 33)),
        (["a0.h0->logits"], (23, 45)),  # 2 * [1, 2] less
        (["input->logits", "a1.h1->logits"], (25 - 2 - 30, 49 - 2 - 56)),
    ],
)
def test_the_linear_micro_model_by_hand(edges: list[str], answer: tuple[int, int]) -> None:
    bridge = bridge_of(micro_model())
    ablated = Circuit.of(graph_of(bridge), edges)
    for token, expected in enumerate(answer):
        curve = faithfulness(bridge, one_token(0, 1), logit(token), ablated.complement(), ablation="swap")
        assert curve.values.item() == pytest.approx(expected, abs=1e-5)
        assert curve.model.item() == (25, 49)[token]
        assert curve.empty.item() == (-25, -49)[token]
        rest = faithfulness(bridge, one_token(0, 1), logit(token), ablated, ablation="swap", of="complement")
        assert rest.values.item() == curve.values.item()
