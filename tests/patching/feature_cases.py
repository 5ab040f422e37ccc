"""Several dictionaries in one model, and what ablating their latents and errors means, written down without the engine:
what the tests of feature circuits share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from interp import hooks
from interp.dictionaries import JumpReLUSAE, ReLUSAE
from tests.helpers import tiny_bridge
from tests.patching.test_attribution import doubled
from tests.patching.test_latents import dictionary, read

PLAIN = ("1.z", "1.attn_out", "1.mlp_out", "2.resid_post")


@functools.cache
def several(family: str, double: bool = False, kind: str = "plain") -> tuple[Any, ...]:
    """Dictionaries of one model, not in the order of computation: plain ones, or such as decode with their input."""
    bridge = doubled(family) if double else tiny_bridge(family)
    if kind == "plain":
        return (
            dictionary(bridge, "blocks.2.hook_resid_post", kind=ReLUSAE),
            dictionary(bridge, "blocks.1.hook_mlp_out"),
            dictionary(bridge, "blocks.1.attn.hook_z", kind=JumpReLUSAE),
            dictionary(bridge, "blocks.1.hook_attn_out", normalisation="mean_norm"),
        )
    made = [
        dictionary(bridge, "blocks.2.hook_resid_post", kind=JumpReLUSAE, normalisation="layer_norm"),
        dictionary(bridge, "blocks.0.hook_resid_pre", "blocks.1.hook_attn_out", skip=True),
        dictionary(bridge, "blocks.2.mlp.hook_in", "blocks.2.mlp.hook_out", skip=True),
    ]
    return tuple(made if family == "neox" else [*made, dictionary(bridge, "blocks.1.hook_resid_mid")])


def target_of(sae: Any) -> str:
    return sae.target_hook or sae.hook


@torch.no_grad()
def ablated_by_hand(
    bridge: Any,
    clean: Tensor,
    other: Tensor,
    saes: tuple[Any, ...],
    keep: dict[str, Callable[[int, int, int | str], bool]],
    ablation: str,
) -> Tensor:
    """Logits of a run in which each activation is decoded anew from latents and an error, of which those that `keep`
    (row, pos, latent or "error") denies are replaced. One forward; loops over every number."""
    found: dict[str, Tensor] = {}
    sources = [read(bridge, other, sae.hook, target_of(sae)) for sae in saes]  # of the intact model
    with ExitStack() as stack:
        for sae, source in zip(saes, sources, strict=True):
            x, own = source[0], source[-1]
            latents = sae.encode(x)
            gone = own - sae.decode(latents, x)
            if ablation == "mean":
                latents, gone, own = (t.mean(0, keepdim=True).expand_as(t) for t in (latents, gone, own))
            if ablation == "zero":
                latents, gone = torch.zeros_like(latents), torch.zeros_like(gone)
            with_input = sae.skip or sae.normalisation == "layer_norm"

            def edit(
                tensor: Tensor, *, hook: Any = None, _sae: Any = sae, _in: Tensor = latents, _gone: Tensor = gone,
                _own: Tensor = own, _with_input: bool = with_input,
            ) -> Tensor:  # fmt: skip
                flat, kept = tensor.flatten(2), keep[target_of(_sae)]
                x = found[_sae.hook] if _sae.target_hook else flat
                f = _sae.encode(x)
                error = flat - _sae.decode(f, x)
                # what an input-dependent decoder leaves over is no mean of what it left over elsewhere
                instead = _own - _sae.decode(_in, x) if _with_input and ablation != "zero" else _gone
                new, rest = f.clone(), error.clone()
                for row in range(f.shape[0]):
                    for pos in range(f.shape[1]):
                        if not kept(row, pos, "error"):
                            rest[row, pos] = instead[row, pos]
                        for latent in range(f.shape[2]):
                            if not kept(row, pos, latent):
                                new[row, pos, latent] = _in[row, pos, latent]
                return (_sae.decode(new, x) + rest).reshape(tensor.shape)

            if sae.target_hook:

                def note(tensor: Tensor, *, hook: Any, _name: str = sae.hook) -> None:
                    found[_name] = tensor.flatten(2)

                hooks.attach(stack, bridge, sae.hook, note, "fwd")
            if target_of(sae).endswith("resid_mid"):
                stack.enter_context(hooks.interventions(bridge, {target_of(sae): edit}))
            else:
                hooks.attach(stack, bridge, target_of(sae), edit, "fwd")
        return bridge(clean)
