"""Reference values of SAELens, written once: one training step of each architecture, and saved inference folders.

SAELens 6.54 cannot be imported beside TransformerLens 4.3, so this runs in an environment of its own:

    python -m venv peer && peer/bin/pip install sae_lens==6.54.12 transformer-lens==3.9.0
    peer/bin/python experiments/golden_sae_lens.py tests/dictionaries/data/sae_lens

Written are `steps.safetensors` (weights, batch, losses, gradients, latents, reconstruction by case), `steps.json`
(settings and versions) and one folder per saved dictionary, with what it encodes and decodes in `expected.safetensors`.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens import saes  # type: ignore[import-not-found]
from sae_lens.saes.sae import TrainStepInput  # type: ignore[import-not-found]
from safetensors.torch import save_file

D_IN, D_OUT, N_LATENTS, N = 16, 12, 32, 64
COMMON: dict[str, Any] = {"d_in": D_IN, "d_sae": N_LATENTS, "device": "cpu", "dtype": "float32"}
TRAINING: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "standard": ("Standard", {}, {"l1": 0.3}),
    "gated": ("Gated", {}, {"l1": 0.3}),
    "topk": ("TopK", {"k": 4, "rescale_acts_by_decoder_norm": False}, {}),
    "topk_rescaled": ("TopK", {"k": 4, "rescale_acts_by_decoder_norm": True}, {}),
    "batchtopk": ("BatchTopK", {"k": 4.5, "rescale_acts_by_decoder_norm": False}, {}),
    "batchtopk_rescaled": ("BatchTopK", {"k": 4.5, "rescale_acts_by_decoder_norm": True}, {}),
    "matryoshka": ("MatryoshkaBatchTopK", {"k": 4, "matryoshka_widths": [4, 12, 32]}, {}),
    "jumprelu_step": ("JumpReLU", {"jumprelu_bandwidth": 0.4}, {"l0": 0.2}),
    "jumprelu_tanh": (
        "JumpReLU",
        {
            "jumprelu_bandwidth": 0.4,
            "jumprelu_sparsity_loss_mode": "tanh",
            "jumprelu_ste_to_input": True,
            "pre_act_loss_coefficient": 0.1,
        },
        {"l0": 0.2},
    ),
    "jumprelu_quadratic": (
        "JumpReLU",
        {"jumprelu_bandwidth": 0.4, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 5.0},
        {"l0": 0.2},
    ),
}
SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("StandardSAE", {}),
    "standard_layer_norm": ("StandardSAE", {"normalize_activations": "layer_norm"}),
    "standard_constant_norm": ("StandardSAE", {"normalize_activations": "constant_norm_rescale"}),
    "topk": ("TopKSAE", {"k": 4}),
    "topk_rescaled": ("TopKSAE", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    "gated": ("GatedSAE", {}),
    "jumprelu": ("JumpReLUSAE", {"apply_b_dec_to_input": False}),
    "transcoder": ("Transcoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "skip_transcoder": ("SkipTranscoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "jumprelu_transcoder": ("JumpReLUTranscoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
    "jumprelu_skip_transcoder": ("JumpReLUSkipTranscoder", {"d_out": D_OUT, "apply_b_dec_to_input": False}),
}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, (kind, options, coefficients) in TRAINING.items():
        tensors |= {f"{name}/{key}": value for key, value in step(kind, options, coefficients).items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "steps.safetensors")
    made_by = {package: version(package) for package in ("sae_lens", "transformer-lens", "torch")}
    cases = {name: {"options": o, "coefficients": c} for name, (_, o, c) in TRAINING.items()}
    (folder / "steps.json").write_text(json.dumps({"made_by": made_by, "cases": cases}, indent=1) + "\n")
    for name, (kind, options) in SAVED.items():
        save(folder / name, kind, options)


def batch(seed: int) -> torch.Tensor:
    return torch.randn(N, D_IN, generator=torch.Generator().manual_seed(seed))


def randomise(module: torch.nn.Module) -> None:
    """Every parameter random, thresholds positive, so that nothing is tested at zero."""
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draws))
            if "threshold" in name:
                parameter.abs_()


def step(kind: str, options: dict[str, Any], coefficients: dict[str, float]) -> dict[str, torch.Tensor]:
    config = getattr(saes, f"{kind}TrainingSAEConfig")(**COMMON, **options)
    sae = getattr(saes, f"{kind}TrainingSAE")(config)
    randomise(sae)
    x = batch(1)
    dead = torch.zeros(N_LATENTS, dtype=torch.bool)
    dead[[2, 5, 6, 20, 31]] = True
    out = {f"weights/{name}": p.detach().clone() for name, p in sae.named_parameters()}
    output = sae.training_forward_pass(TrainStepInput(x, coefficients, dead, 0, False))
    output.loss.backward()
    out |= {"batch": x, "dead": dead.float(), "loss": output.loss.detach()[None]}
    out |= {f"losses/{name}": value.detach().reshape(1) for name, value in output.losses.items()}
    out |= {f"gradients/{name}": p.grad for name, p in sae.named_parameters() if p.grad is not None}
    out |= {"reconstruction": output.sae_out.detach(), "latents": output.feature_acts.detach()}
    return out


def save(folder: Path, kind: str, options: dict[str, Any]) -> None:
    sae = getattr(saes, kind)(getattr(saes, f"{kind}Config")(**COMMON, **options))
    randomise(sae)
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_pre"
    sae.cfg.metadata.model_name = "none"
    sae.save_model(folder)
    x = batch(2)
    with torch.no_grad():
        latents = sae.encode(x)
        expected = {"inputs": x, "latents": latents, "reconstruction": sae(x)}
    save_file({name: value.contiguous() for name, value in expected.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
