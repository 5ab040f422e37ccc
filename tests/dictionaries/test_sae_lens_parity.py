"""One training step of each architecture against SAELens 6.54.12: losses, gradients, latents, reconstructions.

The reference values are data, written by `experiments/golden_sae_lens.py`. Where we differ on purpose, both are tested.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from interp.dictionaries.architectures import ARCHITECTURES
from interp.dictionaries.dictionary import Dictionary, Step

DATA = Path(__file__).parent / "data" / "sae_lens" / "steps.safetensors"
D_IN, N_LATENTS = 16, 32
CASES: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "standard": ("relu", {}, 0.3),
    "gated": ("gated", {"detach_decoder": False}, 0.3),
    "topk": ("topk", {"k": 4, "aux": "saelens"}, None),
    "topk_rescaled": ("topk", {"k": 4, "aux": "saelens", "decoder": "rescaled"}, None),
    "batchtopk": ("batch_topk", {"k": 4.5, "aux": "saelens"}, None),
    "batchtopk_rescaled": ("batch_topk", {"k": 4.5, "aux": "saelens", "decoder": "rescaled"}, None),
    "matryoshka": ("matryoshka", {"k": 4, "widths": [4, 12, 32], "aux": "saelens", "decoder": "rescaled"}, None),
    "jumprelu_step": ("jumprelu", {"bandwidth": 0.4}, 0.2),
    "jumprelu_tanh": (
        "jumprelu",
        {"bandwidth": 0.4, "penalty": "tanh", "gradient_to_input": True, "dead_coefficient": 0.1},
        0.2,
    ),
    "jumprelu_quadratic": ("jumprelu", {"bandwidth": 0.4, "penalty": "quadratic", "target_l0": 5}, 0.2),
}


@functools.cache
def data() -> dict[str, Tensor]:
    with safe_open(DATA, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def ours(case: str, **changes: Any) -> tuple[Dictionary, Step]:
    architecture, options, coefficient = CASES[case]
    dictionary = ARCHITECTURES[architecture](D_IN, N_LATENTS, **{**options, **changes})
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            parameter.copy_(data()[f"{case}/weights/{name}"])
    dead = data()[f"{case}/dead"].bool()
    step = dictionary.step(data()[f"{case}/batch"], coefficient=coefficient, dead=dead)
    step.loss.backward()
    return dictionary, step


def worst(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_sae_lens(case: str) -> None:
    dictionary, step = ours(case)
    assert worst(step.loss.detach(), data()[f"{case}/loss"]) < 1e-5
    assert worst(step.reconstruction, data()[f"{case}/reconstruction"]) < 1e-5
    for name, parameter in dictionary.named_parameters():
        assert parameter.grad is not None, name
        assert worst(parameter.grad, data()[f"{case}/gradients/{name}"]) < 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_the_latents_that_fire_are_those_of_sae_lens(case: str) -> None:
    _, step = ours(case)
    latents = data()[f"{case}/latents"]
    assert torch.equal(step.fired, (latents > 0).any(0))
    assert step.l0 == pytest.approx(float((latents > 0).sum()) / len(latents))


def test_the_auxiliary_losses_are_in_the_reference() -> None:
    """Otherwise the comparison above would hold without them."""
    for case in ("topk", "batchtopk", "matryoshka"):
        assert float(data()[f"{case}/losses/auxiliary_reconstruction_loss"]) > 0.1
    assert float(data()["jumprelu_tanh/losses/pre_act_loss"]) > 0.01


def test_a_detached_decoder_gets_no_gradient_from_the_gate() -> None:
    """The paper's form, our default; SAELens lets it through."""
    reference = data()["gated/gradients/W_dec"]
    detached, _ = ours("gated", detach_decoder=True, decoder="unit")
    assert detached.W_dec.grad is not None
    assert worst(detached.W_dec.grad, reference) > 1e-2
    attached, _ = ours("gated", detach_decoder=False)
    assert attached.W_enc.grad is not None and detached.W_enc.grad is not None
    assert worst(detached.W_enc.grad, attached.W_enc.grad) < 1e-5
