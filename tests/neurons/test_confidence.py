"""Last-layer suppression: the corners against readouts of the stream, planted suppression, the prior, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.hooks import hook_name, interventions, reads
from interp.neurons import last_layer_suppression
from interp.neurons._sides import unembedding
from interp.prompts import Prompts
from tests.helpers import D_VOCAB, FAMILIES, N_LAYERS, fresh_bridge, tiny_bridge, tiny_tokens

LAST = N_LAYERS - 1


def prompts(n: int = 5, length: int = 7, seed: int = 0) -> Prompts:
    tokens = tiny_tokens(n, length, seed)
    end = torch.arange(n) % 2 + length - 2
    answers = torch.arange(n) + 10
    return Prompts(tokens, tokens, answers, answers + 1, positions={"end": end})


def readout(bridge: Any, stream: Tensor) -> Tensor:
    """Log-probabilities of a final stream, by the modules themselves."""
    logits = bridge.unembed(bridge.ln_final(stream))
    cap = getattr(bridge.cfg, "output_logits_soft_cap", -1.0) or -1.0
    return (cap * (logits / cap).tanh() if cap > 0 else logits).log_softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_corners_are_the_model_and_readouts_of_its_stream(family: str) -> None:
    bridge, given = tiny_bridge(family), prompts()
    found = last_layer_suppression(bridge, given, factors=(0, 1, 0.5), batch_size=2)
    names = [hook_name(site, LAST) for site in ("resid_pre", "attn_out", "mlp_out")]
    with torch.no_grad(), reads(bridge, names) as acts:
        log_probs = {(1, 1): bridge(given.clean).log_softmax(-1)}
        pre, attn, mlp = (acts[name].clone() for name in names)
        log_probs[0, 0] = readout(bridge, pre)
        log_probs[1, 0] = readout(bridge, pre + attn)
        halved = {hook_name("attn_out", LAST): lambda t: 0.5 * t, hook_name("mlp_out", LAST): lambda t: 0.5 * t}
        with interventions(bridge, halved):
            log_probs[0.5, 0.5] = bridge(given.clean).log_softmax(-1)
        if family == "neox":  # the MLP reads the block's input, so the parts are simply added
            log_probs[0, 1] = readout(bridge, pre + mlp)
            log_probs[0.5, 0.5] = readout(bridge, pre + 0.5 * attn + 0.5 * mlp)
    rows = torch.arange(5)
    for (a, m), expected in log_probs.items():
        at = expected[rows, given.positions["end"]]
        cell = found.values.sel(attn=a, mlp=m)
        for quantity, values in {
            "answer": at[rows, given.answers], "right": (at.argmax(-1) == given.answers).float(), "top": at.amax(-1),
            "entropy": torch.distributions.Categorical(logits=at).entropy(),
        }.items():  # fmt: skip
            np.testing.assert_allclose(cell.sel(quantity=quantity), values, atol=2e-4, err_msg=f"{a} {m} {quantity}")
    assert found.values.coords["attn"].values.tolist() == [0, 0.5, 1]
    assert found.provenance["cost"] == {"forwards": 1, "forwards_of_last_block": 9}


def test_several_lengths_are_joined_in_order() -> None:
    bridge = tiny_bridge("llama")
    both = last_layer_suppression(bridge, [prompts(), prompts(3, 9, seed=1)], factors=(0, 1))
    second = last_layer_suppression(bridge, prompts(3, 9, seed=1), factors=(0, 1))
    np.testing.assert_allclose(both.values.values[..., 5:], second.values.values, atol=1e-5)


def test_steps_are_differences_of_corners_and_planted_suppression_is_found() -> None:
    """The last MLP writes against the answer and towards a frequent token: both are seen, and undone at factor 0."""
    bridge, given = tiny_bridge("llama"), prompts(8)
    weights = unembedding(bridge, fold=True)
    against = -6 * weights[:, 10:18].sum(1) + 6 * weights[:, 40]
    counts = torch.ones(D_VOCAB)
    counts[40] = 1e4
    with interventions(bridge, {hook_name("mlp_out", LAST): lambda t: 0 * t + against}):
        found = last_layer_suppression(bridge, given, counts=counts)
    steps = found.steps().set_index(["part", "quantity"])
    assert steps.loc[("mlp", "answer"), "high"] < 0 and steps.loc[("mlp", "prior"), "high"] < 0
    assert steps.loc[("mlp", "answer"), "p_value"] < 0.02
    at = found.values.sel(quantity="answer")
    for part, (before, after) in {
        "attention": ((0, 0), (1, 0)),
        "mlp": ((1, 0), (1, 1)),
        "both": ((0, 0), (1, 1)),
    }.items():
        change = at.sel(attn=after[0], mlp=after[1]) - at.sel(attn=before[0], mlp=before[1])
        assert steps.loc[(part, "answer"), "change"] == pytest.approx(float(change.mean()), abs=1e-5)
    assert found.best()["mlp"] == 0.0 and found.best()["value"] == pytest.approx(float(at.mean("example").max()))
    assert found.plot("right").data[0].z.shape == (3, 3)


def test_prior_is_the_divergence_from_counts_plus_one() -> None:
    bridge, given = tiny_bridge("gpt2"), prompts(4)
    counts = torch.randint(0, 9, (D_VOCAB,), generator=torch.Generator().manual_seed(0)).float()
    found = last_layer_suppression(bridge, given, factors=(1,), counts=counts)
    with torch.no_grad():
        log_probs = bridge(given.clean).log_softmax(-1)[torch.arange(4), given.positions["end"]]
    frequencies = (counts + 1) / (counts + 1).sum()
    expected = torch.nn.functional.kl_div(frequencies.log(), log_probs, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found.values.sel(quantity="prior", attn=1, mlp=1), expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"needs the factors 0 and 1 of both parts; \[0.0\] were not measured"):
        found.steps()


def test_refusals_come_before_any_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = tiny_bridge("gpt2")
    monkeypatch.setattr("interp.neurons.confidence.capture", lambda *_a, **_k: pytest.fail("a forward was run"))
    for match, options in {
        r"factors=\[\]": {"factors": []},
        r"factors=\[nan\]": {"factors": [float("nan")]},
        "batch_size=0": {"batch_size": 0},
        "counts has 60 entries; expected 60 counts, none below 0": {"counts": -torch.ones(D_VOCAB)},
        "counts has 7 entries": {"counts": torch.ones(7)},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=match):
            last_layer_suppression(bridge, prompts(), **options)
    with pytest.raises(ValueError, match="there are no prompts"):
        last_layer_suppression(bridge, [])
    training = fresh_bridge("gpt2")
    training.train()
    with pytest.raises(RuntimeError, match="training mode"):
        last_layer_suppression(training, prompts())
