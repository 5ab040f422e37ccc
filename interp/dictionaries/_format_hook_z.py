"""Attention-output autoencoders of Kissane et al.: `NAME.pt` and `NAME_cfg.json`, ReLU on the flattened `hook_z`.

Source: Kissane, Krzyzanowski, Bloom, Conmy and Nanda 2024 (arXiv 2406.17759).
"""

from __future__ import annotations

from pathlib import Path

from interp.dictionaries import _foreign
from interp.dictionaries._foreign import Found, said, take


def config_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_cfg.json")


def read(path: Path, hook: str | None, target_hook: str | None) -> Found:
    source = config_of(path)
    config, tensors = _foreign.read_json(source), _foreign.only_tensors(_foreign.read_torch(path), path)
    place = str(hook or said(config, "act_name", source))
    if not place.endswith("hook_z"):
        raise ValueError(
            f"{source} was made for {place!r}; this layout is known for heads' outputs, blocks.N.attn.hook_z. If it "
            f"reads these, pass hook=..."
        )
    if target_hook is not None:
        raise ValueError(f"{path} is an autoencoder; target_hook={target_hook!r} is for transcoders")
    weights = {name: take(tensors, name, path) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    _foreign.nothing_left(tensors, path, "hook_z")
    d_in, n_latents = said(config, "act_size", source), said(config, "dict_size", source)
    described = _foreign.settings("relu", d_in, n_latents, place, subtract_bias=True)
    return Found(described, weights, {"format": "hook_z", "config": config})
