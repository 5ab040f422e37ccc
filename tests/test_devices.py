"""The main calls on each device and in bfloat16: the same code, the same answers as float32 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp.cache import capture, harvest
from interp.dictionaries import LiveSource, TrainingConfig, evaluate, load_dictionary, spliced, train
from interp.metrics import logit_difference
from interp.patching import activation_patch, attribution_patch
from interp.prompts import Prompts
from tests.helpers import FAMILIES, tiny_model, tiny_tokenizer, tiny_tokens

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def bridge_on(device: str, family: str, dtype: str = "float32"):
    return interp.load_model(tiny_model(family), tokenizer=tiny_tokenizer(), device=device, dtype=dtype, check=False)


def planted_prompts(n: int = 4) -> Prompts:
    clean, corrupted = tiny_tokens(n, 9, seed=1), tiny_tokens(n, 9, seed=1)
    corrupted[:, 4] = (corrupted[:, 4] - 3 + 7) % 57 + 3
    return Prompts(clean=clean, corrupted=corrupted, answers=clean[:, 4], foils=corrupted[:, 4])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_patching_and_capture_agree_with_the_cpu(device: str, family: str) -> None:
    prompts = planted_prompts()
    metric = logit_difference(prompts)
    reference, bridge = bridge_on("cpu", family), bridge_on(device, family)
    assert next(bridge.parameters()).device.type == device
    for site in ("resid_pre", "z"):
        exact = activation_patch(reference, prompts, metric, site=site).values
        found = activation_patch(bridge, prompts, metric, site=site).values
        assert abs(exact - found).max() < 1e-4
        assert abs(exact).max() > 0.01
    name = "blocks.1.hook_mlp_out"
    cached = capture(bridge, prompts.clean, name)[name]
    assert cached.device.type == device
    torch.testing.assert_close(cached.cpu(), capture(reference, prompts.clean, name)[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_agrees_with_the_cpu(device: str, family: str) -> None:
    prompts = planted_prompts()
    metric = logit_difference(prompts)
    reference, bridge = bridge_on("cpu", family), bridge_on(device, family)
    for options in ({"method": "relp"}, {"method": "integrated_gradients"}, {"sites": ("q", "k"), "qk_fix": True}):
        expected = attribution_patch(reference, prompts, metric, **options)  # type: ignore[arg-type]
        found = attribution_patch(bridge, prompts, metric, **options)  # type: ignore[arg-type]
        for site, effects in expected.items():
            assert abs(effects.values - found[site].values).max() < 1e-4
            assert abs(effects.values).max() > 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_finds_the_same_cells(device: str, family: str, tmp_path: Path) -> None:
    prompts = planted_prompts()
    metric = logit_difference(prompts)
    reference, bridge = bridge_on("cpu", family), bridge_on(device, family, "bfloat16")
    exact = activation_patch(reference, prompts, metric).mean().values
    found = activation_patch(bridge, prompts, metric)
    assert found.provenance["dtype"] == "bfloat16"
    # An effect is a difference of logits, so its error is in units of these, not of the effect: bfloat16 keeps 8 bits,
    # and each of some ten roundings on the way to a logit loses up to 2^-9 of it.
    error = abs(exact - found.mean().values).max()
    assert error < 10 * 2**-9 * float(reference(prompts.clean).abs().max())
    assert np.corrcoef(exact.ravel(), found.mean().values.ravel())[0, 1] > 0.97
    store = harvest(
        bridge, prompts.clean, "blocks.0.hook_resid_post", tmp_path / "store", batch_size=2, dtype=torch.bfloat16
    )
    assert store["blocks.0.hook_resid_post"][:].dtype == torch.bfloat16
    assert store.verify().ok


DICTIONARIES: dict[str, dict[str, Any]] = {
    "relu": {"coefficient": 0.1, "normalisation": "mean_norm"},
    "gated": {"coefficient": 0.1},
    "jumprelu": {"coefficient": 0.1},
    "topk": {"k": 3, "normalisation": "mean_square"},
    "batch_topk": {"k": 3},
    "matryoshka": {"k": 3, "widths": [8, 24]},
    "mutual_choice": {"k": 3},
    "feature_choice": {"k": 3},
    "gradient": {"k": 3},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("architecture", DICTIONARIES)
def test_dictionaries_train_and_stand_in_a_model_as_on_the_cpu(architecture: str, device: str, tmp_path: Path) -> None:
    hook, tokens = "blocks.1.hook_mlp_out", tiny_tokens(16, 10)
    reference, bridge = bridge_on("cpu", "llama"), bridge_on(device, "llama")
    settings = {"architecture": architecture, "n_latents": 24, "hook": hook, **DICTIONARIES[architecture]}
    aims = {"target_l0": 4.0, "resample_every": 4} if architecture in ("relu", "gated", "jumprelu") else {}
    # dead after hardly any tokens, so that auxiliary losses and resampling take part
    config = TrainingConfig(settings, n_steps=15, batch_size=32, learning_rate=1e-3, dead_after=40, log_every=5, **aims)
    gradient = hook if architecture == "gradient" else None
    sources = [LiveSource(b, tokens, (hook,), texts_per_buffer=8, gradient_of=gradient) for b in (reference, bridge)]
    expected = train(config, sources[0], path=tmp_path / "reference")
    found = train(config, sources[1], path=tmp_path / device)
    assert {tensor.device.type for tensor in found.parameters()} == {device}
    resumed = train(config, sources[0], path=tmp_path / device)  # what was trained there goes on here
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name].cpu(), value, atol=1e-4, rtol=1e-3)
        assert torch.equal(resumed.state_dict()[name], found.state_dict()[name].cpu())
    loaded = load_dictionary(tmp_path / device, device=device)
    assert {tensor.device.type for tensor in loaded.state_dict().values() if tensor.ndim} == {device}
    with torch.no_grad(), spliced(bridge, loaded) as inside:
        logits = bridge(tokens.to(device))
    assert inside.latents is not None and inside.latents.device.type == device
    torch.testing.assert_close(logits, bridge(tokens.to(device)).detach(), atol=1e-4, rtol=1e-4)
    report, on_cpu = evaluate(loaded, bridge, tokens), evaluate(expected, reference, tokens)
    for metric in ("l0", "fvu", "ce_rise", "kl_spliced"):
        assert report[metric] == pytest.approx(on_cpu[metric], rel=0.02, abs=1e-3), metric
