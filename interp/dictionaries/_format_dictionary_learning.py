"""dictionary_learning: `ae.pt` with `config.json`, and the file with the optimiser that `backup_steps` leaves.

Activations are normalised in training, and the constant is folded into biases and thresholds when a dictionary is
finished. A backup has neither happened to nor lost the constant (`norm_factor`): it is folded in here, in the same way.
Only tensors and plain values are read; a file that holds anything else is refused.

Source: Marks, Karvonen and Mueller, github.com/saprmarks/dictionary_learning; classes of dictionaries as in 2025.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.dictionaries import _foreign
from interp.dictionaries._foreign import Found, linear, take

_CLASSES = {
    "AutoEncoder": "relu",
    "AutoEncoderNew": "relu_new",
    "GatedAutoEncoder": "gated",
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batch_topk",
    "JumpReluAutoEncoder": "jumprelu",
    "MatryoshkaBatchTopKSAE": "matryoshka",
}
_SUBMODULES = {"resid_post": "hook_resid_post", "resid_pre": "hook_resid_pre", "mlp_out": "hook_mlp_out"}


def read(path: Path, hook: str | None, target_hook: str | None) -> Found:
    file = path / "ae.pt" if path.is_dir() else path
    loaded = _foreign.read_torch(file)
    factor, step = 1.0, None
    config: dict[str, Any] = {}
    if "ae" in loaded and isinstance(loaded["ae"], dict):
        config = {"trainer": dict(loaded.get("config") or {})}
        factor, step = float(loaded.get("norm_factor") or 1.0), loaded.get("step")
        loaded = loaded["ae"]
    tensors = _foreign.only_tensors(loaded, file)
    for folder in (file.parent, file.parent.parent):  # checkpoints lie in a folder of their own
        if (folder / "config.json").is_file():
            config = _foreign.read_json(folder / "config.json")
            break
    trainer, buffer = config.get("trainer") or {}, config.get("buffer") or {}
    if target_hook is not None or buffer.get("io") == "in_and_out":
        raise ValueError(f"{file} is to be a transcoder; those of dictionary_learning are not read")
    architecture = _architecture(trainer.get("dict_class"), tensors, file)
    weights, options = _weights(architecture, tensors, trainer, file)
    _foreign.nothing_left(tensors, file, f"dictionary_learning {trainer.get('dict_class') or architecture}")
    if factor != 1.0:
        for name in ("b_enc", "b_dec", "b_gate", "b_mag", "threshold"):
            if name in weights:
                weights[name] = weights[name] * factor
    kind = "relu" if architecture == "relu_new" else architecture
    d_in = int(trainer.get("activation_dim") or len(weights["b_dec"]))
    n_latents = int(trainer.get("dict_size") or len(weights["b_mag" if kind == "gated" else "b_enc"]))
    record: dict[str, Any] = {"format": "dictionary_learning", "config": _plain(config)}
    if step is not None:
        record |= {"backup_step": int(step), "norm_factor": factor}
    place = _hook(trainer, buffer) if hook is None else hook
    return Found(_foreign.settings(kind, d_in, n_latents, place, **options), weights, record)


def _architecture(name: str | None, tensors: dict[str, Tensor], file: Path) -> str:
    """What the class is called, or what only one class's tensors can be."""
    if name is not None:
        if name not in _CLASSES:
            raise ValueError(f"{file} holds a {name}; readable are {', '.join(_CLASSES)}")
        return _CLASSES[name]
    if "mag_bias" in tensors:
        return "gated"
    if "W_enc" in tensors:
        return "matryoshka" if "k" in tensors else "jumprelu"
    if "bias" in tensors:
        return "relu"
    if "decoder.bias" in tensors:
        return "relu_new"
    if not {"encoder.weight", "b_dec"} <= set(tensors):
        raise ValueError(
            f"{file} has tensors {', '.join(sorted(tensors)) or 'nothing'}, which fit no class of dictionary_learning, "
            f"the only files of this kind that are read without a config.json or NAME_cfg.json beside them"
        )
    raise ValueError(
        f"{file} has tensors {', '.join(sorted(tensors))}, which fit several classes of dictionary_learning "
        f"(AutoEncoderTopK and BatchTopKSAE differ in nothing else); its config.json, with trainer.dict_class, must "
        f"lie beside it"
    )


def _weights(
    architecture: str, tensors: dict[str, Tensor], trainer: dict[str, Any], file: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our tensors and settings; what is used is taken out of `tensors`."""
    plain = "W_enc" in tensors
    weights = {
        "W_enc": take(tensors, "W_enc", file) if plain else linear(tensors, "encoder.weight", file),
        "W_dec": take(tensors, "W_dec", file) if plain else linear(tensors, "decoder.weight", file),
    }
    options: dict[str, Any] = {"subtract_bias": architecture not in ("jumprelu", "relu_new")}
    if architecture == "gated":
        names = {"b_dec": "decoder_bias", "r_mag": "r_mag", "b_gate": "gate_bias", "b_mag": "mag_bias"}
        options |= {"detach_decoder": False}
    else:
        bias = {"relu": "bias", "relu_new": "decoder.bias"}.get(architecture, "b_dec")
        names = {"b_dec": bias, "b_enc": "b_enc" if plain else "encoder.bias"}
    weights |= {ours: take(tensors, theirs, file) for ours, theirs in names.items()}
    if architecture == "jumprelu":
        weights["threshold"] = take(tensors, "threshold", file)
    if architecture in ("topk", "batch_topk", "matryoshka"):
        k = take(tensors, "k", file) if "k" in tensors else _foreign.said(trainer, "k", file)
        options["k"] = int(k)
        threshold = tensors.pop("threshold", None)
        if architecture != "topk":  # there it is followed but not used
            weights["threshold"] = _threshold(threshold, file)
    if architecture == "matryoshka":
        sizes = tensors.pop("group_sizes", None)
        sizes = _foreign.said(trainer, "group_sizes", file) if sizes is None else sizes.tolist()
        options["widths"] = torch.tensor([int(size) for size in sizes]).cumsum(0).tolist()
    return weights, options


def _threshold(found: Tensor | None, file: Path) -> Tensor:
    """Below 0 stands for none: training has not come to `threshold_start_step`. Ours is then NaN, and encoding raises,
    where dictionary_learning lets every positive latent through."""
    if found is None or float(found.max()) < 0:
        return torch.tensor(float("nan"), dtype=torch.float64)
    if found.numel() != 1:
        raise ValueError(f"threshold in {file} is {tuple(found.shape)}; these classes have one for all latents")
    return found.double().reshape(())


def _hook(trainer: dict[str, Any], buffer: dict[str, Any]) -> str:
    """As the submodule's name tells, the residual stream if there is none; empty if it is of another kind."""
    layer, name = trainer.get("layer"), str(trainer.get("submodule_name") or "resid_post")
    known = [hook for prefix, hook in _SUBMODULES.items() if name.startswith(prefix)]
    if layer is None or not known or buffer.get("io", "out") != "out":
        return ""
    return f"blocks.{layer}.{known[0]}"


def _plain(value: Any) -> Any:
    """Settings that can be written as JSON."""
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
