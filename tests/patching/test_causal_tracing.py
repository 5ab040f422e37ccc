"""Causal tracing against its definition, one forward per cell and draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp import metrics
from interp.patching import causal_trace
from interp.patching._measure import gaussian_rows
from tests.helpers import D_MODEL, N_LAYERS, tiny_bridge
from tests.patching.oracle import POS, N, activations, patched, prompts

DRAWS = 2


@pytest.mark.parametrize(("site", "window"), [("resid_post", 1), ("resid_pre", 2), ("mlp_out", 2), ("attn_out", 10)])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_restored_runs_are_what_the_definition_says(family: str, site: Any, window: int) -> None:
    bridge, p = tiny_bridge(family), prompts()
    metric = metrics.answer_log_prob(p)
    effects = causal_trace(bridge, p, metric, subject=["s1", "s2"], site=site, window=window, n_draws=DRAWS)
    sigma = effects.provenance["noise_std"]
    clean = activations(bridge, p.clean, site)
    mask = torch.zeros(N, POS, 1)
    for name in ("s1", "s2"):
        mask[torch.arange(N), p.positions[name]] = 1
    expected = torch.zeros(N_LAYERS, 2, N)
    corrupted = torch.zeros(N)
    for draw in range(DRAWS):
        noise = sigma * gaussian_rows(torch.arange(N) + draw * N, POS, D_MODEL, 0) * mask
        before = [("blocks.0.hook_resid_pre", lambda resid, hook, _noise=noise: resid + _noise)]
        with torch.no_grad():
            baseline = metric(bridge.run_with_hooks(p.clean, fwd_hooks=before))
        corrupted += baseline / DRAWS
        for layer in range(N_LAYERS):
            start = layer - window // 2
            layers = [each for each in range(start, start + window) if 0 <= each < N_LAYERS]
            for i, name in enumerate(("s2", "end")):
                logits = patched(bridge, p.clean, site, layers, clean, p.positions[name], before=before)
                expected[layer, i] += (metric(logits) - baseline) / DRAWS
    places = torch.tensor(effects.values.values)
    got = torch.stack([places[:, p.positions[name], torch.arange(N)] for name in ("s2", "end")], 1)
    assert torch.allclose(got, expected, atol=2e-5)
    assert float(expected.abs().max()) > 0.01
    assert torch.allclose(torch.tensor(effects.corrupted.values), corrupted, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(torch.tensor(effects.clean.values), metric(bridge(p.clean)), atol=1e-5)


def test_restoring_the_embedding_of_the_whole_subject_restores_everything() -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    effects = causal_trace(
        bridge, p, metrics.logit_difference(p), subject="s2", site="resid_pre", positions="s2", layers=[0], n_draws=3
    )
    assert abs(effects.recovery() - 1).max() < 1e-4
    assert abs(effects.recovery_per_example() - 1).max() < 1e-3
    assert effects.provenance["subject"] == ["s2"] and effects.provenance["n_draws"] == 3


def test_noise_depends_on_the_seed_alone() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    options: dict[str, Any] = {"subject": ["s2"], "n_draws": 2, "layers": [1]}
    whole = causal_trace(bridge, p, metric, **options)
    assert (whole.values == causal_trace(bridge, p, metric, **options).values).all()
    small = causal_trace(bridge, p, metric, **options, batch_size=3)
    assert abs(whole.values - small.values).max() < 1e-5
    other = causal_trace(bridge, p, metric, **options, seed=1)
    assert (whole.corrupted != other.corrupted).all()
    plain = causal_trace(bridge, p, lambda logits: metric(logits), **options)
    assert abs(whole.values - plain.values).max() < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subject": None}, r"subject must say which tokens are destroyed: names \(s1, s2, end\) or indices"),
        ({"subject": "s2", "site": "z"}, "site='z' is unknown"),
        ({"subject": "subject"}, "positions='subject' is unknown"),
        ({"subject": "s2", "window": 0}, "window=0 must be at least 1 layer"),
        ({"subject": "s2", "n_draws": 0}, "n_draws=0 and noise=3.0 must be positive"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refusals(options: dict[str, Any], message: str) -> None:
    p = prompts()
    with pytest.raises(ValueError, match=message):
        causal_trace(tiny_bridge("gpt2"), p, metrics.logit_difference(p), **options)
