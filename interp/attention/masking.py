"""Masking heads, in four meanings of the word, and random heads to compare with."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.attention._decoding import (
    batches,
    prefill,
    require_decoding,
    site_read,
    stacked,
)
from interp.attention.needles import Needles
from interp.attention.retrieval_result import Head
from interp.hooks import hook_name, interventions
from interp.hooks.names import device_of

if TYPE_CHECKING:
    pass

Mask = Literal["zero", "mean", "uniform", "bos"]
MASKS: tuple[Mask, ...] = get_args(Mask)


@contextmanager
def masked_heads(
    bridge: Any,
    heads: Sequence[Head] | Bool[Tensor, "batch layer head"],
    mask: Mask = "zero",
    *,
    means: Float[Tensor, "layer head d_head"] | None = None,
) -> Iterator[None]:
    """Mask heads in every forward inside the context.

    Args:
        heads: (layer, head) pairs; or a bool tensor that says, for each row of the batch, which heads are masked.
        mask: `"zero"`: the head writes nothing. `"mean"`: it writes its mean output, whatever it reads. `"uniform"`: it
            attends to all it can see alike (what the released code does, by setting its scores to 0). `"bos"`: it
            attends to the first token alone, where idle heads rest.
        means: For `"mean"`: mean output (`hook_z`) of every head; see `head_means`.

    Raises:
        ValueError: If a head does not exist, patterns of this model cannot be replaced, or (`"bos"`) a row cannot see
            the first token because the window of its layer has moved on.
    """
    chosen = as_masks(bridge, heads)
    if mask not in MASKS:
        raise ValueError(f"mask={mask!r}; expected one of {', '.join(map(repr, MASKS))}")
    if (mask == "mean") != (means is not None):
        raise ValueError(f"mask={mask!r} and means={'None' if means is None else 'given'}: means belong to mask='mean'")
    edits: dict[str, Any] = {}
    for layer in range(int(bridge.cfg.n_layers)):
        picked = chosen[:, layer].to(device_of(bridge))
        if not bool(picked.any()):
            continue
        if mask in ("zero", "mean"):
            new = None if means is None else means[layer].to(device_of(bridge))
            edits[hook_name("z", layer)] = _output_edit(picked, new)
        else:
            edits[f"blocks.{layer}.attn.hook_attn_scores"] = _score_edit(picked, layer, to_first=mask == "bos")
    with interventions(bridge, edits, must_fire=False) if edits else ExitStack():
        yield


def head_means(bridge: Any, needles: Needles, *, batch_size: int = 8) -> Float[Tensor, "layer head d_head"]:
    """Mean output of every head (`hook_z`) over all positions of these prompts, each prompt weighing the same.

    One forward per prompt.
    """
    require_decoding(bridge)
    layers = int(bridge.cfg.n_layers)
    sums: list[Any] = [0.0] * layers
    for rows in batches(needles.samples, batch_size):
        tokens = stacked(bridge, [needles.samples[i] for i in rows])

        def read(layer: int, z: Tensor, n_pos: int = tokens.shape[1]) -> None:
            sums[layer] = sums[layer] + z.double().sum((0, 1)) / n_pos

        with site_read(bridge, "z", read):
            prefill(bridge, tokens)
    return (torch.stack(sums) / len(needles)).float()


def matched_random_heads(
    heads: Sequence[Head],
    n_layers: int,
    n_heads: int,
    *,
    exclude: Sequence[Head] = (),
    match: Literal["layer", "any"] = "layer",
    seed: int = 0,
) -> list[Head]:
    """As many random heads as given, none of them given or excluded.

    Args:
        match: `"layer"`: as many in each layer as there are among `heads`, so that depth is not what makes the
            difference. `"any"`: from all layers.

    Raises:
        ValueError: If too few heads are left; it says where.
    """
    out = {*heads, *exclude}
    rng = random.Random(f"interp random heads {seed}")
    wanted: dict[int | None, int] = {}
    for layer, _ in heads:
        group = layer if match == "layer" else None
        wanted[group] = wanted.get(group, 0) + 1
    drawn: list[Head] = []
    for group, count in sorted(wanted.items(), key=str):
        layers = range(n_layers) if group is None else (group,)
        free = [(layer, head) for layer in layers for head in range(n_heads) if (layer, head) not in out]
        if len(free) < count:
            where = "the model" if group is None else f"layer {group}"
            raise ValueError(
                f"{count} random heads of {where} are wanted, but only {len(free)} of its heads are not among the "
                f"{len(out)} masked or excluded; use smaller ks, a smaller exclude, or match='any'"
            )
        drawn += rng.sample(free, count)
    return sorted(drawn)


def _output_edit(picked: Tensor, mean: Tensor | None) -> Any:
    def edit(z: Tensor) -> Tensor:  # [batch, pos, head, d_head]
        new = torch.zeros_like(z) if mean is None else mean.to(z.dtype).expand_as(z)
        return torch.where(_rows_of(picked, z)[:, None, :, None], new, z)

    return edit


def _score_edit(picked: Tensor, layer: int, *, to_first: bool) -> Any:
    def edit(scores: Tensor) -> Tensor:  # [batch, head, dest, src]
        lowest = torch.finfo(scores.dtype).min
        seen = scores > lowest / 2
        if to_first:
            here = _rows_of(picked, scores).any(1)
            if bool((~seen[here][..., 0]).any()):
                raise ValueError(
                    f"a query of layer {layer} does not see the first token, so its heads cannot attend to it; use "
                    f"mask='zero', 'mean' or 'uniform'"
                )
            first = torch.arange(scores.shape[-1], device=scores.device) == 0
            new = torch.where(first, torch.zeros_like(scores), lowest)
        else:
            new = torch.where(seen, torch.zeros_like(scores), scores)
        return torch.where(_rows_of(picked, scores)[:, :, None, None], new, scores)

    return edit


def _rows_of(picked: Tensor, tensor: Tensor) -> Tensor:
    """Masked heads [batch, head] of a forward; a single row of masks is for all."""
    if len(picked) not in (1, len(tensor)):
        raise ValueError(f"masks for {len(picked)} rows, but the forward has {len(tensor)}; expected one row for each")
    return picked.expand(len(tensor), -1)


def as_masks(bridge: Any, heads: Any) -> Tensor:
    n_layers, n_heads = int(bridge.cfg.n_layers), int(bridge.cfg.n_heads)
    if isinstance(heads, Tensor):
        if heads.dtype != torch.bool or heads.shape[1:] != (n_layers, n_heads):
            raise ValueError(
                f"heads is {heads.dtype} {tuple(heads.shape)}; expected bool [batch, {n_layers}, {n_heads}]"
            )
        return heads
    masks = torch.zeros(1, n_layers, n_heads, dtype=torch.bool)
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(f"({layer}, {head}) is not a head of this model: {n_layers} layers of {n_heads} heads")
        masks[0, layer, head] = True
    return masks
