"""What an MLP adds at the last position of prompts, and what the heads before it wrote there."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from interp.cache import capture
from interp.hooks import hook_name
from interp.models import geometry
from interp.neurons._sides import _gain
from interp.prompts import Prompts

Basis = Literal["heads", "all_heads", "resid"]


class Parts(NamedTuple):
    """One row per example, float64 on the CPU."""

    mlp: Tensor  # [example, d_model]
    regressors: Tensor  # [example, regressor, d_model]
    scale: Tensor  # [example]: what the final norm divides by
    names: list[str]


def mlp_parts(bridge: Any, prompts: Sequence[Prompts], layer: int, basis: Basis) -> Parts:
    """Everything at `end` of every prompt. One forward."""
    n_layers = int(bridge.cfg.n_layers)
    sources = source_layers(bridge, layer, basis)
    hooks = {hook_name("mlp_out", layer), hook_name("resid_post", n_layers - 1)}
    hooks |= {hook_name(site, source) for source in sources for site in ("z", "attn_out")}
    if basis == "resid":
        hooks |= {hook_name("resid_pre", layer), hook_name("attn_out", layer)}
    found: dict[str, list[Tensor]] = {name: [] for name in hooks}
    for one in prompts:
        for name, value in capture(bridge, one.clean, sorted(hooks), positions=one.positions["end"]).items():
            found[name].append(value.cpu().double())
    acts = {name: torch.cat(values) for name, values in found.items()}
    if basis == "resid":
        regressors = torch.stack([acts[hook_name("resid_pre", layer)], acts[hook_name("attn_out", layer)]], 1)
        names = ["stream", "attention"]
    else:
        parts = [_heads(bridge, source, acts) for source in sources]
        regressors = torch.cat(parts, 1)
        names = [f"L{source}H{h}" for source, part in zip(sources, parts, strict=True) for h in range(part.shape[1])]
    last = acts[hook_name("resid_post", n_layers - 1)]
    if geometry(bridge).norm == "LayerNorm":
        last = last - last.mean(-1, keepdim=True)
    return Parts(acts[hook_name("mlp_out", layer)], regressors, last.pow(2).mean(-1).sqrt(), names)


def source_layers(bridge: Any, layer: int, basis: Basis) -> list[int]:
    """Layers whose heads are regressors.

    Raises:
        ValueError: In parallel blocks the heads of a layer do not reach its MLP; in layer 0 of those none does.
    """
    parallel = geometry(bridge).parallel
    if basis == "resid":
        if parallel:
            raise ValueError(
                f"attention of layer {layer} does not feed its MLP on {bridge.cfg.model_name} (parallel blocks); "
                "use basis='all_heads'"
            )
        return []
    if basis == "heads":
        if parallel:
            raise ValueError(
                f"the heads of layer {layer} do not feed its MLP on {bridge.cfg.model_name} (parallel blocks); "
                "use basis='all_heads', the heads of the layers before"
            )
        return [layer]
    if basis != "all_heads":
        raise ValueError(f"basis={basis!r}; expected 'heads', 'all_heads' or 'resid'")
    sources = list(range(layer if parallel else layer + 1))
    if not sources:
        raise ValueError(f"no head writes before the MLP of layer 0 on {bridge.cfg.model_name} (parallel blocks)")
    return sources


def _heads(bridge: Any, layer: int, acts: Mapping[str, Tensor]) -> Tensor:
    """What each head adds to the stream, `[example, head, d_model]`; refused if it does not add up."""
    block = bridge.blocks[layer]
    z, total = acts[hook_name("z", layer)], acts[hook_name("attn_out", layer)]
    writes = torch.einsum("nhi,hid->nhd", z, block.attn.W_O.detach().cpu().double())
    norm = block._modules.get("ln1_post")
    if norm is not None:  # a linear map once its scale is held at what it was
        writes = writes * _gain(bridge, norm).cpu().double()
        whole = writes.sum(1)
        writes = writes * ((total * whole).sum(-1) / whole.pow(2).sum(-1))[:, None, None]
    rest = total - writes.sum(1)  # the bias, the same for all examples
    error = float((rest - rest[:1]).abs().max() / total.abs().max())
    parameter = next(iter(bridge.original_model.parameters()))
    if error > (1e-3 if parameter.dtype in (torch.float32, torch.float64) else 0.05):
        raise ValueError(
            f"the heads of layer {layer} of {bridge.cfg.model_name} do not add up to what attention adds (relative "
            f"difference {error:.2g}); use basis='resid'"
        )
    return writes


def groups_of(prompts: Sequence[Prompts], by: str | None, task: str) -> list[Hashable]:
    """The entity of every example: the label `by`; by default `country`, else `subject`."""
    out: list[Hashable] = []
    for one in prompts:
        name = by or next((label for label in ("country", "subject") if label in one.labels), None)
        if name is None or name not in one.labels:
            raise ValueError(
                f"the prompts of {task!r} are labelled {sorted(one.labels)}, not with "
                f"{by or 'country or subject'!r}; by= names the label whose values must not be in two folds"
            )
        out += list(one.labels[name])
    return out


def as_sets(bridge: Any, tasks: Mapping[str, Prompts | Sequence[Prompts]]) -> dict[str, tuple[Prompts, ...]]:
    """Every task as a tuple of prompts that this model can take."""
    if not isinstance(tasks, Mapping) or not tasks:
        raise ValueError("tasks must be a mapping with at least one entry, name to Prompts (or several of them)")
    sets = {str(name): (given,) if isinstance(given, Prompts) else tuple(given) for name, given in tasks.items()}
    for name, some in sets.items():
        if not some or not all(len(one) for one in some):
            raise ValueError(f"task {name!r} has no examples")
        for one in some:
            one.check(bridge)
    return sets
