"""The main calls on each device and in bfloat16: the same code, the same answers as float32 on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import interp
from interp.cache import capture, harvest
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
