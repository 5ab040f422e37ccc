"""Attention patterns, reduced layer by layer inside the forward: the patterns of all layers never exist at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from interp.hooks import hook_name, names, no_retained_graph, run_until
from interp.hooks.edits import attach
from interp.hooks.names import device_of
from interp.models import geometry, require_eval
from interp.types import Site

T = TypeVar("T", Tensor, dict[str, Tensor])

BUDGET = 2**27
"""Bytes that the float32 pattern of one layer may take when the number of rows per forward is left open."""

_BEFORE = ("resid_pre", "q", "k", "v")  # sites that fire before the pattern of their layer


def reduce_patterns(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    reduce: Callable[..., T],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
    rows: Sequence[Tensor] = (),
    sites: Sequence[Site] = (),
) -> dict[int, T]:
    """What `reduce(layer, pattern)` keeps of the attention pattern of every layer, from one forward per batch.

    The pattern [batch, head, dest, src] is handed over as float32, on the model's device and without gradient, inside
    the forward; it is freed when `reduce` returns, so memory is that of one layer. `reduce` must not keep it, nor
    change it in place (the model goes on with it). Interventions that are active are seen.

    Rows of a pattern may sum to less than 1 (learned sinks, off-window masks): nothing is renormalised here.

    Args:
        reduce: Gives a tensor, or a dictionary of tensors (so that one forward serves several statistics), with the
            batch along the first axis. Called as `reduce(layer, pattern, *rows, **sites)`.
        layers: Layers to visit, all by default; layers above the last one do not run.
        batch_size: Rows of tokens per forward; by default as many as keep one layer's pattern within 128 MiB.
        rows: Tensors with one row per row of tokens (token ids, masks, spans): the rows of the batch are handed to
            `reduce` after the pattern, on the model's device.
        sites: Activations of the same layer that `reduce` wants by keyword, of `"resid_pre"`, `"q"`, `"k"`, `"v"`, as
            the model has them (float32; keys and values per key-value head; queries and keys before any rotation).

    Returns:
        Layer to what `reduce` gave, concatenated over batches, on the CPU.

    Raises:
        ValueError: If a layer, the tokens, `rows` or `sites` do not fit, or the pattern of this model cannot be read.
        RuntimeError: If the model is in training mode.
    """
    require_eval(bridge)
    check_tokens(bridge, tokens)
    chosen = check_layers(bridge, layers)
    require_patterns(bridge, chosen)
    for i, tensor in enumerate(rows):
        if len(tensor) != len(tokens):
            raise ValueError(f"rows[{i}] has {len(tensor)} rows and tokens {len(tokens)}; expected one for each")
    if unknown := [site for site in sites if site not in _BEFORE]:
        raise ValueError(f"sites {unknown} are not known before the pattern; expected some of {', '.join(_BEFORE)}")
    n, n_pos = tokens.shape
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1, or None for what fits in 128 MiB")
    size = batch_size or max(1, BUDGET // (4 * int(bridge.cfg.n_heads) * n_pos**2))
    device = device_of(bridge)
    kept: dict[int, list[T]] = {layer: [] for layer in chosen}
    for start in range(0, n, size):
        batch = [tensor[start : start + size].to(device) for tensor in (tokens, *rows)]
        _forward(bridge, batch[0], reduce, batch[1:], sites, kept)
    return {layer: _concatenated(parts) for layer, parts in kept.items()}


def _forward(
    bridge: Any,
    tokens: Tensor,
    reduce: Callable[..., T],
    rows: Sequence[Tensor],
    sites: Sequence[Site],
    kept: Mapping[int, list[T]],
) -> None:
    with torch.no_grad(), no_retained_graph(bridge), ExitStack() as stack:
        for layer, parts in kept.items():
            found: dict[str, Tensor] = {}

            def keep(tensor: Tensor, *, hook: Any, _found: dict[str, Tensor] = found, _site: str) -> None:
                _found[_site] = tensor.float()

            def take(
                pattern: Tensor,
                *,
                hook: Any,
                _layer: int = layer,
                _parts: list[T] = parts,
                _found: dict[str, Tensor] = found,
            ) -> None:
                result = reduce(_layer, pattern.detach().float(), *rows, **_found)
                _found.clear()
                _parts.append(_checked(result, len(tokens), pattern))

            def drop(_tensor: Tensor, *, hook: Any, _layer: int = layer) -> None:
                bridge.blocks[_layer].attn._pattern = None  # joint-QKV attention keeps its pattern: one per layer

            for site in sites:

                def keep_site(tensor: Tensor, *, hook: Any, _keep: Any = keep, _site: str = site) -> None:
                    _keep(tensor, hook=hook, _site=_site)

                attach(stack, bridge, hook_name(site, layer), keep_site, "fwd")
            attach(stack, bridge, hook_name("pattern", layer), take, "fwd")
            attach(stack, bridge, hook_name("attn_out", layer), drop, "fwd")
        run_until(bridge, tokens, max(kept) + 1)
    if silent := [layer for layer, parts in kept.items() if not parts]:
        raise RuntimeError(f"the pattern of layer {silent[0]} was not reached by the forward")


def _checked(result: Any, batch: int, pattern: Tensor) -> Any:
    """What `reduce` gave, on the CPU; a view of the pattern is copied, so that the pattern can be freed."""
    if isinstance(result, dict):
        return {name: _checked(value, batch, pattern) for name, value in result.items()}
    if not isinstance(result, Tensor) or result.ndim == 0 or len(result) != batch:
        what = f"a tensor {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"reduce gave {what}; expected a tensor [batch, ...] with batch = {batch}, or a dict of them")
    result = result.detach()
    return result.clone() if result.device.type == "cpu" else result.cpu()


def _concatenated(parts: list[T]) -> T:
    first = parts[0]
    if isinstance(first, dict):
        return {name: torch.cat([part[name] for part in parts]) for name in first}  # pyright: ignore
    return torch.cat(parts)  # pyright: ignore


def check_tokens(bridge: Any, tokens: Any, what: str = "tokens") -> None:
    """Refuse what are not token ids [batch, pos] that this model can take."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{what} is a {type(tokens).__name__}; expected a tensor of token ids [batch, pos]")
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool or 0 in tokens.shape:
        raise ValueError(f"{what} is {tokens.dtype} {tuple(tokens.shape)}; expected integer token ids [batch, pos]")
    low, high, d_vocab = int(tokens.min()), int(tokens.max()), int(bridge.cfg.d_vocab)
    if low < 0 or high >= d_vocab:
        raise ValueError(f"{what} has ids from {low} to {high}; this model's vocabulary is 0 to {d_vocab - 1}")
    n_ctx = getattr(bridge.cfg, "n_ctx", None)
    if n_ctx is not None and tokens.shape[1] > int(n_ctx):
        raise ValueError(f"{what} has {tokens.shape[1]} positions; this model's context is {int(n_ctx)}")


def check_layers(bridge: Any, layers: Sequence[int] | None) -> list[int]:
    """The layers asked for, in order; all of them for None."""
    n_layers = int(bridge.cfg.n_layers)
    chosen = sorted(set(range(n_layers) if layers is None else layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= n_layers:
        raise ValueError(
            f"layers={list(layers or [])} are not layers of this model; expected some of 0 to {n_layers - 1}"
        )
    return chosen


def require_patterns(bridge: Any, layers: Sequence[int] | None = None, *, edit: bool = False) -> None:
    """Refuse a model whose attention patterns cannot be read (or, with `edit`, cannot be replaced)."""
    for layer in layers if layers is not None else range(int(bridge.cfg.n_layers)):
        name = hook_name("pattern", layer)
        if name not in names(bridge, name):
            raise ValueError(
                f"the attention pattern of layer {layer} cannot be read on {bridge.cfg.model_name}: {name!r} never "
                f"fires there. If the model is loaded with fused attention, load it with interp.load_model, which "
                f"asks for the eager kind; layers= leaves such layers out"
            )
    if edit and geometry(bridge).delegated_attention:
        raise ValueError(
            f"{bridge.cfg.model_name} computes attention where its pattern cannot be replaced; its patterns can be "
            f"read, and hook_z, hook_q, hook_k and hook_v edited"
        )
