"""Gemma Scope (`params.npz`) and Gemma Scope 2 (`config.json`, `params.safetensors`): JumpReLU, no bias subtracted.

Gemma Scope's files say nothing but numbers; where they belong is in their path, which the files' own repository names
(`gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82`). Its autoencoders of the embedding were trained on
embeddings before they are multiplied by sqrt(d_model), and `hook_embed` holds them afterwards; the constant is folded
in here. SAELens 6 does the same but for `b_dec`.

Sources: Lieberum et al. 2024 (arXiv 2408.05147); the model cards of google/gemma-scope-2.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from interp.dictionaries import _foreign
from interp.dictionaries._foreign import Found, take

_SITES = {
    "res": "blocks.{layer}.hook_resid_post",
    "mlp": "blocks.{layer}.hook_mlp_out",
    "att": "blocks.{layer}.attn.hook_z",
    "transcoders": "blocks.{layer}.ln2.hook_normalized",
}


def read_npz(path: Path, hook: str | None, target_hook: str | None) -> Found:
    file = path / "params.npz" if path.is_dir() else path
    tensors = {name.lower(): tensor for name, tensor in _foreign.read_npz(file).items()}
    weights = {own: take(tensors, own.lower(), file) for own in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    _foreign.nothing_left(tensors, file, "Gemma Scope")
    place, target = _place(file)
    hook, target = hook or place, target_hook or target
    if hook == "hook_embed":
        _before_scaling(weights)
    record = {"format": "gemma_scope", "path": file.as_posix()}
    return _found(weights, hook, target, record)


def read_safetensors(path: Path, hook: str | None, target_hook: str | None) -> Found:
    file = path / "params.safetensors" if path.is_dir() else path
    config = _foreign.read_json(file.parent / "config.json")
    architecture = _foreign.said(config, "architecture", file.parent / "config.json")
    if architecture != "jump_relu":
        raise ValueError(f"{file.parent} holds architecture {architecture!r}; Gemma Scope 2 is known with 'jump_relu'")
    tensors = _foreign.read_safetensors(file)
    weights = {own: take(tensors, own.lower(), file) for own in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    if weights["W_dec"].ndim == 3:
        raise ValueError(
            f"{file} is a cross-layer transcoder: its decoder {tuple(weights['W_dec'].shape)} writes into "
            f"{weights['W_dec'].shape[1]} layers; a Dictionary rebuilds one hook"
        )
    if "affine_skip_connection" in tensors:
        weights["W_skip"] = take(tensors, "affine_skip_connection", file).T  # [d_in, d_out] there
    _foreign.nothing_left(tensors, file, "Gemma Scope 2")
    source = file.parent / "config.json"
    place = config.get("hf_hook_point_in")
    out = str(config.get("hf_hook_point_out") or place)
    if hook is None:
        hook = _foreign.hook_of_module(_foreign.said(config, "hf_hook_point_in", source), source)
    if target_hook is None and out != place:
        target_hook = _foreign.hook_of_module(out, source)
    record = {"format": "gemma_scope_2", "config": config}
    return _found(weights, hook, target_hook, record)


def _found(weights: dict[str, Tensor], hook: str, target_hook: str | None, record: dict[str, Any]) -> Found:
    n_latents, d_out = len(weights["b_enc"]), len(weights["b_dec"])
    d_in = d_out
    options: dict[str, Any] = {"subtract_bias": False}
    if target_hook is not None:
        rows, columns = weights["W_enc"].shape  # a transcoder's input may have another width than its biases
        d_in = columns if rows == n_latents != columns else rows
        options |= {"target_hook": target_hook, "d_out": d_out, "skip": "W_skip" in weights}
    elif "W_skip" in weights:
        raise ValueError("an affine skip connection belongs to a transcoder; pass the hook it writes: target_hook=...")
    return Found(_foreign.settings("jumprelu", d_in, n_latents, hook, **options), weights, record)


def _place(file: Path) -> tuple[str, str | None]:
    """Hook and target as the path tells; an empty hook if it does not."""
    where = file.absolute().as_posix()
    site = re.search(r"gemma-scope-[^/]*?-(res|mlp|att|transcoders)(?:/|$)", where)
    layer = re.search(r"/layer_(\d+)/", where)
    if "/embedding/" in where and (site is None or site[1] == "res"):
        return "hook_embed", None
    if site is None or layer is None:
        return "", None
    target = f"blocks.{layer[1]}.hook_mlp_out" if site[1] == "transcoders" else None
    return _SITES[site[1]].format(layer=layer[1]), target


def _before_scaling(weights: dict[str, Tensor]) -> None:
    root = len(weights["b_dec"]) ** 0.5
    weights["W_enc"] = weights["W_enc"] / root
    weights["W_dec"] = weights["W_dec"] * root
    weights["b_dec"] = weights["b_dec"] * root
