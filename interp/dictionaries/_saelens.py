"""Folders of SAELens 6: `cfg.json` and `sae_weights.safetensors`, W_enc [d_in, d_sae], W_dec [d_sae, d_out]."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from interp.dictionaries import _foreign
from interp.dictionaries._foreign import Found
from interp.dictionaries.batch_topk import BatchTopKSAE
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.gated import GatedSAE
from interp.dictionaries.jumprelu import JumpReLUSAE
from interp.dictionaries.relu import ReLUSAE
from interp.dictionaries.topk import TopKSAE

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
VERSION = "6.0.0"  # of the layout that is written
_KINDS: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "relu"},
    "topk": {"architecture": "topk"},
    "gated": {"architecture": "gated", "detach_decoder": False},
    "jumprelu": {"architecture": "jumprelu"},
    "transcoder": {"architecture": "relu"},
    "skip_transcoder": {"architecture": "relu", "skip": True},
    "jumprelu_transcoder": {"architecture": "jumprelu"},
    "jumprelu_skip_transcoder": {"architecture": "jumprelu", "skip": True},
    "batchtopk": {"architecture": "batch_topk"},  # these two in training checkpoints only
    "matryoshka_batchtopk": {"architecture": "matryoshka"},
}
_REFUSED = {
    "matching_pursuit": "its latents are found one after the other by a search, not by an encoder",
    "abstopk": "its latents are of both signs, and those here are never negative",
    "temporal": "its latents of a token depend on the tokens before it",
}
_NORMALISATION = {
    "none": "none",
    "expected_average_only_in": "mean_norm",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}


def read(folder: Path, hook: str | None, target_hook: str | None) -> Found:
    """A dictionary from a folder, also of versions before 6. See `interp.dictionaries.load_dictionary`."""
    folder = folder if folder.is_dir() else folder.parent
    config = _modern(_foreign.read_json(folder / CONFIG))
    file = folder / WEIGHTS
    tensors = _foreign.read_safetensors(file)
    kind = config["architecture"]
    if kind not in _KINDS:
        why = f": {_REFUSED[kind]}" if kind in _REFUSED else ""
        raise ValueError(f"{folder} holds architecture {kind!r}{why}; readable are {', '.join(_KINDS)}")
    metadata = config["metadata"]
    _one_head(config, metadata, folder)
    transcoder = "transcoder" in kind
    settings: dict[str, Any] = {
        **_KINDS[kind],
        "d_in": _foreign.said(config, "d_in", folder / CONFIG),
        "n_latents": _foreign.said(config, "d_sae", folder / CONFIG),
        "hook": metadata.get("hook_name") or "",
        "subtract_bias": bool(config.get("apply_b_dec_to_input", not transcoder)),
        "normalisation": _named(config.get("normalize_activations") or "none", folder),
        "dtype": (config.get("dtype") or "float32").removeprefix("torch."),
    }
    if transcoder:
        settings["target_hook"] = target_hook or metadata.get("hook_name_out") or ""
        settings["d_out"] = _foreign.said(config, "d_out", folder / CONFIG)
    if settings["architecture"] in ("topk", "batch_topk", "matryoshka"):
        settings |= {"k": _foreign.said(config, "k", folder / CONFIG), "aux": "none" if kind == "topk" else "saelens"}
        settings["decoder"] = "rescaled" if config.get("rescale_acts_by_decoder_norm") else "free"
    if settings["architecture"] == "matryoshka":
        settings["widths"] = _widths(config, folder)
    scaling = tensors.pop("scaling_factor", torch.ones(1))
    if not bool((scaling == 1).all()):
        raise ValueError(
            f"{file} has a scaling_factor from {float(scaling.min()):g} to {float(scaling.max()):g}: a "
            f"dictionary fine-tuned by an old SAELens, whose latents are multiplied by it before decoding. Multiply "
            f"the rows of W_dec by it and leave it out"
        )
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if "topk_threshold" in tensors:  # of a training checkpoint; 0 until the first step
        threshold = tensors.pop("topk_threshold")
        tensors["threshold"] = threshold if float(threshold) > 0 else torch.full_like(threshold, float("nan"))
    if settings["normalisation"] == "mean_norm" and (scaler := _scaler(folder)) is not None:
        tensors |= {"input_scale": scaler, "target_scale": scaler}
    return Found(settings, tensors, {"format": "saelens", "saelens": config})


def write(dictionary: Dictionary, folder: Path) -> None:
    """What SAELens 6 loads with `SAE.load_from_disk`."""
    kind = _kind_of(dictionary)
    folded = dictionary.folded()
    tensors = {name: p.detach().cpu().contiguous() for name, p in folded.named_parameters()}
    config: dict[str, Any] = {
        "d_in": folded.d_in,
        "d_sae": folded.n_latents,
        "dtype": str(folded.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": folded.subtract_bias,
        "normalize_activations": {v: k for k, v in _NORMALISATION.items()}[folded.normalisation],
        "reshape_activations": "hook_z" if folded.hook.endswith("hook_z") else "none",
        "architecture": kind,
    }
    if folded.is_transcoder:
        config["d_out"] = folded.d_out
    if kind == "topk" and isinstance(folded, TopKSAE):
        config |= {"k": folded.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(folded, BatchTopKSAE):
        if bool(folded.threshold.isnan().any()):
            raise ValueError(f"this {folded.architecture} dictionary has no threshold yet: train it first")
        threshold = folded.threshold.float().cpu()
        tensors["threshold"] = (threshold if threshold.ndim else threshold.expand(folded.n_latents)).contiguous()
    config["metadata"] = {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": VERSION,
        "hook_name": folded.hook,
        "training_architecture": folded.architecture,
    }
    if folded.target_hook is not None:
        config["metadata"]["hook_name_out"] = folded.target_hook
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}.tmp"
    try:
        save_file(tensors, partial)
        text = folder / f".{CONFIG}.tmp"
        text.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        partial.replace(folder / WEIGHTS)
        text.replace(folder / CONFIG)
    finally:
        partial.unlink(missing_ok=True)
        (folder / f".{CONFIG}.tmp").unlink(missing_ok=True)


def _kind_of(dictionary: Dictionary) -> str:
    jumps = isinstance(dictionary, (JumpReLUSAE, BatchTopKSAE))
    if dictionary.is_transcoder:
        if not jumps and not isinstance(dictionary, ReLUSAE):
            raise ValueError(
                f"SAELens has no {dictionary.architecture} transcoders, only ReLU and JumpReLU ones; save it with "
                f'format="interp"'
            )
        return f"{'jumprelu_' if jumps else ''}{'skip_' if dictionary.skip else ''}transcoder"
    if jumps:
        return "jumprelu"
    if isinstance(dictionary, GatedSAE):
        return "gated"
    return "topk" if isinstance(dictionary, TopKSAE) else "standard"


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """Flat settings of versions before 6 in the form of version 6."""
    if "metadata" in config and "architecture" in config:
        return config
    new = dict(config)
    new.setdefault("architecture", "standard")
    new["metadata"] = {
        "hook_name": config.get("hook_name") or config.get("hook_point"),
        "hook_head_index": config.get("hook_head_index", config.get("hook_point_head_index")),
    }
    function = config.get("activation_fn_str") or config.get("activation_fn")
    if function == "topk":
        new["architecture"] = "topk"
        new["k"] = (config.get("activation_fn_kwargs") or {}).get("k")
    elif function not in (None, "relu"):
        raise ValueError(f"activation function {function!r} is unknown; relu and topk are known")
    if isinstance(config.get("normalize_activations"), bool):
        new["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    return new


def _named(name: str, folder: Path) -> str:
    if name not in _NORMALISATION:
        raise ValueError(f"{folder} was trained with normalisation {name!r}; readable are {', '.join(_NORMALISATION)}")
    return _NORMALISATION[name]


def _one_head(config: dict[str, Any], metadata: dict[str, Any], folder: Path) -> None:
    for name in ("hook_head_index", "hook_head_index_out"):
        index = metadata.get(name, config.get(name))
        if index is not None:
            raise ValueError(
                f"{folder} is for head {index} alone ({name}); a Dictionary takes all heads of "
                f"{metadata.get('hook_name')!r}"
            )


def _widths(config: dict[str, Any], folder: Path) -> list[int]:
    widths = [int(width) for width in _foreign.said(config, "matryoshka_widths", folder / CONFIG)]
    return widths if widths[-1] == config["d_sae"] else [*widths, int(config["d_sae"])]


def _scaler(folder: Path) -> Tensor | None:
    """The constant of a training checkpoint, which finished dictionaries have folded in."""
    file = folder / SCALER
    factor = _foreign.read_json(file).get("scaling_factor") if file.is_file() else None
    return None if factor is None else torch.tensor(float(factor), dtype=torch.float64)
