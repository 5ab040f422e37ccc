"""Controls of the sink rate and attention of known importance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp.attention.controls import (
    constant_logit_importance,
    control_tokens,
    logit_for_importance,
    self_importance,
    sink_controls,
    uniform_importance,
)
from interp.attention.sinks import sink_scores
from tests.helpers import D_VOCAB, tiny_bridge, tiny_tokens


def test_uniform_importance_is_the_harmonic_formula():
    h = [0.0]
    for i in range(1, 65):
        h.append(h[-1] + 1 / i)
    expected = [(h[64] - h[k - 1]) / (64 - k + 1) for k in range(1, 65)]
    assert np.allclose(uniform_importance(64), expected, atol=1e-12)
    assert uniform_importance(64)[0] == pytest.approx(h[64] / 64)
    assert self_importance(64)[-3:].tolist() == pytest.approx([1 / 3, 1 / 2, 1])


@pytest.mark.parametrize("importance", [0.05, 0.3, 0.9])
def test_the_constant_logit_is_solved_for(importance: float):
    logit = logit_for_importance(importance, 64)
    assert constant_logit_importance(logit, 64) == pytest.approx(importance, abs=1e-9)
    brute = np.mean([np.exp(logit) / (np.exp(logit) + t - 1) for t in range(1, 65)])
    assert brute == pytest.approx(importance, abs=1e-9)


def test_control_tokens_are_what_they_say():
    bridge = tiny_bridge("llama")
    random, repeated = (control_tokens(bridge, 50, 40, kind, seed=3) for kind in ("random", "repeated"))
    assert random.shape == repeated.shape == (50, 40)
    assert (repeated == repeated[:, :1]).all()
    assert len(random.unique()) == D_VOCAB  # every id occurs among 2000 draws of 60
    assert torch.equal(random, control_tokens(bridge, 50, 40, "random", seed=3))
    assert not torch.equal(random, control_tokens(bridge, 50, 40, "random", seed=4))
    with_first = control_tokens(bridge, 50, 40, "repeated", first=0, seed=3)
    assert (with_first[:, 0] == 0).all()
    assert torch.equal(with_first[:, 1:], repeated[:, 1:])


def test_controls_are_the_scores_of_their_tokens():
    bridge, tokens = tiny_bridge("neox"), tiny_tokens(4, 24)
    controls = sink_controls(bridge, tokens, seed=5)
    assert controls.values["condition"].values.tolist() == [
        "natural", "random", "repeated", "first + random", "first + repeated",
    ]  # fmt: skip
    for condition, rows in {
        "natural": tokens,
        "repeated": control_tokens(bridge, 4, 24, "repeated", seed=5),
        "first + random": control_tokens(bridge, 4, 24, "random", first=0, seed=5),
    }.items():
        expected = sink_scores(bridge, rows).values.sel(key=0)
        assert np.allclose(controls.values.sel(condition=condition), expected, atol=1e-6)
    rates = controls.rates(0.1).set_index("condition")["rate"]
    assert rates["natural"] == pytest.approx(float(sink_scores(bridge, tokens).rates(0.1).sel(key=0)), abs=1e-6)
    assert "position 0" in controls.plot().layout.title.text


def test_rates_count_only_the_layers_that_were_measured():
    controls = sink_controls(tiny_bridge("llama"), tiny_tokens(3, 12), layers=[1])
    assert (controls.rates(0.01)["rate"] == 1).all()


def test_rows_that_begin_with_different_tokens_have_no_first_condition():
    tokens = tiny_tokens(3, 12)
    tokens[0, 0] = 5
    assert sink_controls(tiny_bridge("llama"), tokens).values.sizes["condition"] == 3


@pytest.mark.parametrize(("name", "stays"), [("tinyworld-gpt", True), ("tinyworld-llama", False)])
def test_one_token_repeated_keeps_the_sink_of_learned_positions_and_not_that_of_rotary_ones(name: str, stays: bool):
    bridge = interp.load_model(name, check=False)
    rows = torch.tensor(interp.tinyworld.bank(64 * 24, seed=7, context=64).ids[:24].astype("int64"))
    rates = sink_controls(bridge, rows).rates().set_index("condition")
    assert rates.loc["natural", "low"] > rates.loc["random", "high"]
    if stays:
        assert rates.loc["repeated", "low"] > 0.05
    else:
        assert rates.loc["repeated", "rate"] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: logit_for_importance(0.001, 64), "between 1/64"),
        (lambda: control_tokens(tiny_bridge("llama"), 0, 3, "random"), "n=0 rows"),
    ],
)
def test_errors(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
