"""What patching means, one forward per cell with TransformerLens' own hooks: the reference the engine is held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from interp import hooks
from interp.prompts import Prompts
from tests.helpers import D_VOCAB, tiny_tokens

N, POS = 4, 8


def prompts(n: int = N, pos: int = POS, seed: int = 0) -> Prompts:
    """Random pairs that differ in two tokens, at places of their own in every example."""
    clean = tiny_tokens(n, pos, seed)
    corrupted, rows = clean.clone(), torch.arange(n)
    s1, s2 = 2 + rows % 2, 4 + rows % 2
    for where in (s1, s2):
        corrupted[rows, where] = 3 + (clean[rows, where] + 5) % (D_VOCAB - 3)
    end = torch.full((n,), pos - 1)
    return Prompts(clean, corrupted, 10 + rows, 30 + rows, {"s1": s1, "s2": s2, "end": end}, name="random", seed=seed)


def write(site: str, tensor: Tensor, source: Tensor, pos: Tensor, unit: int | None) -> Tensor:
    """The tensor with one cell of every row replaced; `pos` [batch] or [batch, k] positions."""
    new = tensor.clone()
    for row in range(len(tensor)):
        for position in pos[row].reshape(-1).tolist():
            if site == "pattern":
                index: Any = (row, slice(None) if unit is None else unit, position)
            else:
                index = (row, position) if unit is None else (row, position, unit)
            new[index] = source[index]
    return new


@torch.no_grad()
def patched(
    bridge: Any,
    tokens: Tensor,
    site: str,
    layers: list[int],
    source: dict[int, Tensor],
    pos: Tensor,
    unit: int | None = None,
    *,
    before: list[tuple[str, Callable[..., Any]]] | None = None,
) -> Tensor:
    """Logits of one whole forward with one cell replaced by `source` in each of these layers."""
    entering: dict[int, Tensor] = {}
    fwd_hooks: list[tuple[str, Callable[..., Any]]] = list(before or [])
    for layer in layers:
        if site == "resid_mid":  # the stream is changed through attn_out, since its own hook sits on the MLP's branch

            def keep(tensor: Tensor, *, hook: Any, _layer: int = layer) -> None:
                entering[_layer] = tensor

            def change(tensor: Tensor, *, hook: Any, _layer: int = layer) -> Tensor:
                stream = entering[_layer] + tensor
                return write(site, stream, source[_layer], pos, unit) - entering[_layer]

            fwd_hooks.append((f"blocks.{layer}.hook_resid_pre", keep))
            fwd_hooks.append((f"blocks.{layer}.hook_attn_out", change))
        else:

            def replace(tensor: Tensor, *, hook: Any, _layer: int = layer) -> Tensor:
                return write(site, tensor, source[_layer], pos, unit)

            fwd_hooks.append((hooks.SITE_HOOKS[site].format(layer=layer), replace))  # type: ignore[index]
    return bridge.run_with_hooks(tokens, fwd_hooks=fwd_hooks)


@torch.no_grad()
def activations(bridge: Any, tokens: Tensor, site: str) -> dict[int, Tensor]:
    """A site in every layer, of one plain forward."""
    found: dict[int, Tensor] = {}
    fwd_hooks = []
    for layer in range(bridge.cfg.n_layers):

        def keep(tensor: Tensor, *, hook: Any, _layer: int = layer) -> None:
            found[_layer] = tensor

        fwd_hooks.append((hooks.SITE_HOOKS[site].format(layer=layer), keep))  # type: ignore[index]
    bridge.run_with_hooks(tokens, fwd_hooks=fwd_hooks)
    return found
