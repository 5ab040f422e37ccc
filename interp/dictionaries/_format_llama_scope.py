"""Llama Scope: `hyperparams.json`, `checkpoints/final.safetensors`; or `config.json`, `sae_weights.safetensors`.

Inputs are multiplied by sqrt(d_model) / average norm, targets likewise by their own norm; both constants are kept as
the normalisation. With `sparsity_include_decoder_norm` pre-activations are compared with the threshold times the norm
of their decoder row, which is the same as a threshold per latent, divided by that norm. The scalar threshold of
`hyperparams.json` is in units of the model's activations: of the target's, if decoder norms take part, of the input's
otherwise. The distinction only matters to transcoders, and is our reading: with it, thresholds of layer 8's
autoencoder and transcoder, as published, are alike (2.05 and 1.96), without it they are not (2.05 and 0.10).
SAELens 6 scales by the input's norm alone, ignores the decoder's norms and reads no transcoders.

Sources: He et al. 2024 (arXiv 2410.20526); the parameters' standardisation in OpenMOSS Language-Model-SAEs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.dictionaries import _foreign
from interp.dictionaries._foreign import Found, linear, said, take

_FUNCTIONS = ("jumprelu", "relu", "topk")
_NORMALISATION = {"dataset-wise": "mean_norm", "inference": "none", "none": "none", "token-wise": "constant_norm"}


def read(path: Path, hook: str | None, target_hook: str | None) -> Found:
    folder = path if path.is_dir() else path.parent.parent if path.parent.name == "checkpoints" else path.parent
    distilled = not (folder / "hyperparams.json").is_file()
    source = folder / ("config.json" if distilled else "hyperparams.json")
    file = folder / ("sae_weights.safetensors" if distilled else "checkpoints/final.safetensors")
    config, tensors = _foreign.read_json(source), _foreign.read_safetensors(file)
    d_in = int(said(config, "d_model", source))
    n_latents = int(config.get("d_sae") or d_in * said(config, "expansion_factor", source))
    function = str(config.get("act_fn", "jumprelu")).lower()
    if function not in _FUNCTIONS or config.get("use_glu_encoder"):
        found = "a gated linear encoder" if config.get("use_glu_encoder") else f"activation function {function!r}"
        raise ValueError(f"{source} has {found}; readable are {', '.join(_FUNCTIONS)} with a plain encoder")
    kind = str(config.get("norm_activation", "dataset-wise"))
    if kind not in _NORMALISATION:
        raise ValueError(f"{source} has norm_activation {kind!r}; readable are {', '.join(_NORMALISATION)}")
    place, out = said(config, "hook_point_in", source), config.get("hook_point_out")
    target = target_hook or (None if out in (None, place) else out)
    weights = {
        "W_enc": linear(tensors, "encoder.weight", file),
        "b_enc": take(tensors, "encoder.bias", file),
        "W_dec": linear(tensors, "decoder.weight", file),
    }
    if "decoder.bias" in tensors:
        weights["b_dec"] = take(tensors, "decoder.bias", file)
    elif config.get("use_decoder_bias", True):
        raise ValueError(f"{file} has no decoder.bias, which {source.name} says is used")
    else:
        weights["b_dec"] = torch.zeros(weights["W_dec"].shape[1])
    scales = _scales(config, tensors, d_in, kind)
    with_norms = bool(config.get("sparsity_include_decoder_norm", False))
    options: dict[str, Any] = {
        "subtract_bias": bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        "normalisation": _NORMALISATION[kind],
    }
    if target is not None:
        options |= {"target_hook": target, "d_out": len(weights["b_dec"])}
    if function == "topk":
        options |= {"k": int(said(config, "top_k", source)), "decoder": "rescaled" if with_norms else "free"}
    if function == "jumprelu":
        weights["threshold"] = _thresholds(config, tensors, weights, scales, with_norms, source)
    _foreign.nothing_left(tensors, file, "Llama Scope")
    if kind == "dataset-wise":
        weights |= {"input_scale": scales[0], "target_scale": scales[1]}
    described = _foreign.settings(function, d_in, n_latents, hook or place, **options)
    return Found(described, weights, {"format": "llama_scope", "config": config})


def _scales(config: dict[str, Any], tensors: dict[str, Tensor], d_in: int, kind: str) -> tuple[Tensor, Tensor]:
    """What inputs and targets are multiplied by; NaN, to be estimated, if the files do not give their norms."""
    prefix = "dataset_average_activation_norm"
    stored = {name: float(tensors.pop(name)) for name in list(tensors) if name.startswith(f"{prefix}.")}
    norms: dict[str, Any] = config.get(prefix) or {}
    scales = []
    for end in ("in", "out"):
        hook = config.get(f"hook_point_{end}") or config["hook_point_in"]
        norm: Any = stored.get(f"{prefix}.{hook}", norms.get(end, norms.get(hook, float("nan"))))
        scale = d_in**0.5 / float(norm) if kind == "dataset-wise" else 1.0
        scales.append(torch.tensor(scale, dtype=torch.float64))
    return scales[0], scales[1]


def _thresholds(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    weights: dict[str, Tensor],
    scales: tuple[Tensor, Tensor],
    with_norms: bool,
    source: Path,
) -> Tensor:
    """In units of our pre-activations, one per latent."""
    n_latents = len(weights["b_enc"])
    norms = weights["W_dec"].norm(dim=1) if with_norms else torch.ones(n_latents)
    if len(norms) != n_latents:
        raise ValueError(
            f"decoder.weight beside {source} is {tuple(weights['W_dec'].T.shape)} for {n_latents} latents; it looks "
            f"transposed"
        )
    for name in ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold"):
        if name in tensors:  # learned, in normalised units
            return take(tensors, name, source).exp() / norms
    scale = float(scales[1] if with_norms else scales[0])
    if scale != scale:
        raise ValueError(f"{source} gives a threshold in the units of activations but not their average norm")
    return float(said(config, "jump_relu_threshold", source)) * scale / norms
