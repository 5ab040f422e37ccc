"""The layouts of the sites: one canonical shape for all of them, so that the engine has one way to replace a cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp import hooks
from interp.types import Site

STREAM: tuple[Site, ...] = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Sites with one vector of the residual stream's width at each position."""


def unit_axis(site: Site, grouped: bool) -> str | None:
    """What a site has several of at each position: `"head"`, `"kv_head"`, `"neuron"`, or None."""
    if site in STREAM:
        return None
    if site == "neuron":
        return "neuron"
    return "kv_head" if grouped and site in ("k", "v") else "head"


def n_units(site: Site, geometry: Any) -> int:
    """How many units a site has at each position."""
    axis = unit_axis(site, geometry.grouped)
    return {None: 1, "neuron": geometry.d_mlp, "kv_head": geometry.n_kv_heads, "head": geometry.n_heads}[axis]


def width(site: Site, geometry: Any, n_pos: int) -> int:
    """Numbers per position."""
    if site in STREAM:
        return geometry.d_model
    if site == "neuron":
        return geometry.d_mlp
    return n_units(site, geometry) * (n_pos if site == "pattern" else geometry.d_head)


def canonical(site: Site, tensor: Tensor) -> Tensor:
    """A view [batch, pos, unit, ...]: a pattern's positions are its destinations, its last axis the sources."""
    if site in STREAM:
        return tensor.unsqueeze(2)
    if site == "neuron":
        return tensor.unsqueeze(-1)
    return tensor.transpose(1, 2) if site == "pattern" else tensor


def original(site: Site, tensor: Tensor) -> Tensor:
    """The inverse of `canonical`."""
    if site in STREAM:
        return tensor.squeeze(2)
    if site == "neuron":
        return tensor.squeeze(-1)
    return tensor.transpose(1, 2) if site == "pattern" else tensor


@torch.no_grad()
def read_site(bridge: Any, tokens: Tensor, site: Site, layers: Sequence[int]) -> dict[int, Tensor]:
    """The canonical activations of a site, by layer; blocks above the last layer do not run."""
    names = {layer: hooks.hook_name(site, layer) for layer in layers}
    stop = hooks.stop_layer(bridge, list(names.values()))
    with hooks.reads(bridge, list(names.values())) as found:
        bridge(tokens, **({"logits_to_keep": 1} if stop is None else {"stop_at_layer": stop}))
    return {layer: canonical(site, found[name]) for layer, name in names.items()}
