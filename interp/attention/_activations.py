"""Activations reduced inside the forward, one at a time, so that none but the reductions stay in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from interp.attention._patterns import check_tokens
from interp.hooks import hook_name, names, no_retained_graph, run_until, stop_layer
from interp.hooks.edits import attach
from interp.hooks.names import device_of
from interp.models import require_eval

Reduce = Callable[[Tensor], Tensor]

_BUDGET = 2**27  # bytes of one float32 activation [batch, pos, d_model] when the number of rows is left open


def reduce_activations(
    bridge: Any, tokens: Tensor, reductions: Mapping[str, Reduce], *, batch_size: int | None = None
) -> dict[str, Tensor]:
    """Hook name to what its reduction keeps of the activation (float32, no gradient), batches concatenated, on the CPU.

    A reduction gives a tensor with the batch along the first axis. Layers above the last hook do not run.
    """
    require_eval(bridge)
    check_tokens(bridge, tokens)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1, or None")
    n, n_pos = tokens.shape
    size = batch_size or max(1, _BUDGET // (4 * n_pos * int(bridge.cfg.d_model)))
    parts: dict[str, list[Tensor]] = {name: [] for name in reductions}
    last = stop_layer(bridge, list(reductions))
    for start in range(0, n, size):
        rows = tokens[start : start + size].to(device_of(bridge))
        with torch.no_grad(), no_retained_graph(bridge), ExitStack() as stack:
            for name, reduce in reductions.items():

                def take(
                    tensor: Tensor, *, hook: Any, _name: str = name, _reduce: Reduce = reduce, _n: int = len(rows)
                ) -> None:
                    if len(tensor) != _n:  # OPT folds batch and position into one axis at some hooks
                        raise ValueError(
                            f"{_name!r} holds {tuple(tensor.shape)} for {_n} rows of tokens: it has no axis of "
                            f"examples on {bridge.cfg.model_name}"
                        )
                    parts[_name].append(_reduce(tensor.detach().float()).cpu())

                attach(stack, bridge, name, take, "fwd")
            run_until(bridge, rows, int(bridge.cfg.n_layers) if last is None else last)
    return {name: torch.cat(found) for name, found in parts.items()}


class Sizes(NamedTuple):
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int


def sizes(bridge: Any) -> Sizes:
    """From the configuration alone: works on attention-only models without norms too."""
    cfg = bridge.cfg
    n_heads = int(cfg.n_heads)
    return Sizes(int(cfg.n_layers), n_heads, int(getattr(cfg, "n_key_value_heads", None) or n_heads), int(cfg.d_model))


def streams(bridge: Any) -> list[str]:
    """Hook names of the residual stream entering block 0 and leaving every block: n_layers + 1 of them."""
    return [hook_name("resid_pre", 0), *(hook_name("resid_post", layer) for layer in range(int(bridge.cfg.n_layers)))]


def query_key_hooks(bridge: Any, layer: int) -> tuple[tuple[str, bool], tuple[str, bool]]:
    """Where queries and keys can be read as they enter the score but for the rotation, and whether heads come before
    positions there: after their own norms, in models that have them (Qwen3, Gemma 3)."""
    found = []
    for part in ("q", "k"):
        normed = f"blocks.{layer}.attn.hook_{part}_normed"
        own = bool(names(bridge, normed))
        found.append((normed, True) if own else (f"blocks.{layer}.attn.hook_{part}", False))
    return found[0], found[1]


def output_factor(bridge: Any, layer: int) -> Tensor:
    """`[head, d_head, d_head]` R with ||v W_O|| = ||R v|| for every v of a head, so that v W_O need not be formed."""
    weight = bridge.blocks[layer].attn.W_O.detach().float()  # [head, d_head, d_model]
    return torch.linalg.qr(weight.transpose(1, 2)).R
