"""Per-layer transcoders of circuit-tracer: `layer_N.safetensors` beside a `config.yaml` that names the hooks.

ReLU, or JumpReLU where a threshold is stored, with or without a skip connection. The encoder is stored latent by
latent, and looks like the decoder. Cross-layer transcoders, whose decoders write into many layers, are refused.

Source: github.com/decoderesearch/circuit-tracer, `SingleLayerTranscoder`; Hanna et al.'s Qwen 3 transcoders.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from interp.dictionaries import _foreign
from interp.dictionaries._foreign import Found, linear, take

_THRESHOLDS = ("threshold", "activation_function.threshold", "log_thresholds")


def read(path: Path, hook: str | None, target_hook: str | None) -> Found:
    if path.is_dir():
        layers = sorted(entry.name for entry in path.glob("layer_*.safetensors"))
        raise ValueError(f"{path} holds {len(layers)} transcoders; name one of them, for example {path / layers[0]}")
    tensors = _foreign.read_safetensors(path)
    if any(re.fullmatch(r"(W|b)_(enc|dec)_\d+", name) for name in tensors):
        raise ValueError(
            f"{path} is part of a cross-layer transcoder ({', '.join(sorted(tensors))}): its latents write into many "
            f"layers, and a Dictionary rebuilds one hook"
        )
    config = _settings(path.parent)
    layer = re.fullmatch(r"layer_(\d+)", path.stem)
    hook = hook or _hook(config, "feature_input_hook", layer)
    target_hook = target_hook or _hook(config, "feature_output_hook", layer)
    if not hook or not target_hook:
        raise ValueError(
            f"{path} does not say where it reads and writes, and there is no config.yaml beside it that does (found: "
            f"{config or 'nothing'}); pass hook=... and target_hook=..., such as blocks.0.mlp.hook_in and "
            f"blocks.0.hook_mlp_out"
        )
    weights = {
        "W_enc": linear(tensors, "W_enc", path),
        "W_dec": take(tensors, "W_dec", path),
        "b_enc": take(tensors, "b_enc", path),
        "b_dec": take(tensors, "b_dec", path),
    }
    if "W_skip" in tensors:
        weights["W_skip"] = take(tensors, "W_skip", path)
    stored = [name for name in _THRESHOLDS if name in tensors]
    if stored:
        threshold = take(tensors, stored[0], path)
        threshold = threshold.exp() if stored[0].startswith("log") else threshold
        weights["threshold"] = threshold.expand(len(weights["b_enc"])) if threshold.ndim < 2 else threshold
    _foreign.nothing_left(tensors, path, "circuit-tracer")
    n_latents, d_out = len(weights["b_enc"]), len(weights["b_dec"])
    rows, columns = weights["W_enc"].shape
    d_in = columns if rows == n_latents != columns else rows
    options = {"target_hook": target_hook, "d_out": d_out, "skip": "W_skip" in weights}
    architecture = "jumprelu" if "threshold" in weights else "relu"
    record = {"format": "circuit_tracer", "config": config}
    return Found(_foreign.settings(architecture, d_in, n_latents, hook, **options), weights, record)


def _hook(config: dict[str, Any], key: str, layer: re.Match[str] | None) -> str:
    name = config.get(key)
    return f"blocks.{layer[1]}.{name}" if name and layer else ""


def _settings(folder: Path) -> dict[str, Any]:
    """Lines `name: value` of config.yaml; lists and what is below them are not needed."""
    file = folder / "config.yaml"
    if not file.is_file():
        return {}
    lines = re.findall(r"^(\w+):[ \t]+([^\s#].*?)[ \t]*$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: value.strip("\"'") for name, value in lines}
