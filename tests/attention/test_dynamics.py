"""The course of a sink over checkpoints."""

from __future__ import annotations

import numpy as np
import pytest

from interp.attention.dynamics import SinkDynamics, sink_dynamics
from interp.attention.norms import norm_profile
from interp.attention.sinks import sink_scores
from interp.results import load
from tests.helpers import tiny_bridge, tiny_tokens


def test_every_step_is_the_measurement_of_its_model(tmp_path):
    tokens = tiny_tokens(3, 12)
    models = {100: tiny_bridge("llama", 2), 0: tiny_bridge("llama", 0), 10: tiny_bridge("llama", 1)}
    course = sink_dynamics(models, tokens, key=1)
    assert course.values["step"].values.tolist() == [0, 10, 100]
    for step, bridge in models.items():
        at = course.values.sel(step=step)
        assert np.allclose(at.sel(measure="importance"), sink_scores(bridge, tokens).values.sel(key=1), atol=1e-6)
        profile = norm_profile(bridge, tokens)
        assert np.allclose(at.sel(measure="output_ratio"), profile.ratio("output", 1), rtol=1e-5)
        shared = profile.ratio("value", 1)
        for head in range(4):  # two heads share a key-value head
            assert np.allclose(at.sel(measure="value_ratio", head=head), shared.sel(kv_head=head // 2), rtol=1e-5)
        assert np.allclose(course.peak.sel(step=step), profile.ratio("residual", 1), rtol=1e-5)
        rate = float(sink_scores(bridge, tokens).rates(0.15).sel(key=1))
        assert float(course.rates(0.15).sel(step=step)) == pytest.approx(rate)
    loaded = load(course.save(tmp_path / "course.nc"))
    assert isinstance(loaded, SinkDynamics)
    assert loaded.peak.identical(course.peak)


def test_the_axis_is_split_between_step_0_and_the_rest():
    models = {step: tiny_bridge("llama", seed) for seed, step in enumerate((0, 10, 1000))}
    course = sink_dynamics(models, tiny_tokens(2, 8))
    for figure in (course.plot(), course.plot("value_ratio", top=40), course.plot_peak()):
        ticks = dict(zip(figure.layout.xaxis.ticktext, figure.layout.xaxis.tickvals, strict=True))
        assert ticks["1000"] == 3
        assert ticks["0"] < 1  # left of the first step
        assert any(note.text == "//" for note in figure.layout.annotations)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sink_dynamics({}, tiny_tokens(1, 5)), "got no models"),
        (lambda: sink_dynamics({0: tiny_bridge("llama")}, tiny_tokens(1, 5), key=5), "key=5.*0 to 4"),
        (
            lambda: sink_dynamics({0: tiny_bridge("llama"), 1: tiny_bridge("gpt_neo")}, tiny_tokens(1, 5)),
            r"step 1 has \(layers, heads\) \(4, 4\) and step 0 \(3, 4\)",
        ),
        (lambda: sink_dynamics({0: tiny_bridge("llama")}, tiny_tokens(1, 5)).plot(), r"no step but \[0\]"),
    ],
)
def test_errors(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
