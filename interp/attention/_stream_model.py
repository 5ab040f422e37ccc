"""A forward in blocks of positions, from the model's own cache of keys and values: patterns come in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from interp.hooks import hook_name, names, no_retained_graph, prefix_cache, supports_prefix_reuse
from interp.hooks.edits import attach
from interp.models import require_eval

Take = Callable[[int, Tensor, int, int, Tensor | None], None]
"""`take(layer, rows, start, first_key, lse)`: rows [batch, head, row, key] of the pattern, float32, queries from
`start` on, keys from `first_key` to the last query; `lse` [batch, head, row], None where scores cannot be read."""


def require_streaming(bridge: Any, *, interventions: bool = False) -> None:
    """Refuse a model that cannot read a sequence in blocks, or (unless allowed) one with active hooks."""
    require_eval(bridge)
    if not supports_prefix_reuse(bridge):
        raise NotImplementedError(
            f"{bridge.cfg.model_name} does not continue from cached keys and values (interp.hooks."
            f"supports_prefix_reuse), so its sequences cannot be read in blocks. Give a layer's queries and keys to "
            f"interp.attention.streaming_statistics, or use the dense route (interp.attention.reduce_patterns)"
        )
    if interventions:
        return
    active = [point.name for point in bridge.hook_points() for handle in point.fwd_hooks if not handle.is_permanent]
    if active:
        raise ValueError(
            f"hooks are active ({', '.join(sorted(set(active))[:3])}) and would see blocks of positions instead of the "
            f"whole sequence; pass interventions=True if they do the same at every position, else use the dense route "
            f"(interp.attention.reduce_patterns)"
        )


def forward_in_blocks(bridge: Any, tokens: Tensor, block: int, layers: Sequence[int], take: Take) -> None:
    """Read the tokens block by block and hand the rows of every chosen layer to `take`."""
    at = {"start": 0, "end": 0}
    scores: dict[int, Tensor] = {}
    with torch.no_grad(), no_retained_graph(bridge), ExitStack() as stack:
        for layer in layers:

            def keep(tensor: Tensor, *, hook: Any, _layer: int = layer) -> None:
                scores[_layer] = tensor

            def read(pattern: Tensor, *, hook: Any, _layer: int = layer) -> None:
                start, end = at["start"], at["end"]
                first_key = _first_key(bridge, pattern, start, end)
                rows = pattern.detach().float()
                take(_layer, rows, start, first_key, _log_sum(rows, scores.pop(_layer, None)))

            name = f"blocks.{layer}.attn.hook_attn_scores"
            if name in names(bridge, name):
                attach(stack, bridge, name, keep, "fwd")
            attach(stack, bridge, hook_name("pattern", layer), read, "fwd")
        for layer in range(int(bridge.cfg.n_layers)):

            def drop(_tensor: Tensor, *, hook: Any, _layer: int = layer) -> None:
                attention = bridge.blocks[_layer]._modules.get("attn")
                if getattr(attention, "_pattern", None) is not None:
                    attention._pattern = None  # joint-QKV attention keeps its rows: one block per layer

            attach(stack, bridge, hook_name("attn_out", layer), drop, "fwd")
        at["end"] = min(block, tokens.shape[1])
        past = prefix_cache(bridge, tokens[:, : at["end"]]).past_key_values()
        while at["end"] < tokens.shape[1]:
            at["start"], at["end"] = at["end"], min(at["end"] + block, tokens.shape[1])
            bridge(tokens[:, at["start"] : at["end"]], past_key_values=past, logits_to_keep=1)


def _first_key(bridge: Any, pattern: Tensor, start: int, end: int) -> int:
    """The position of the first key: layers with a sliding window hold the last ones only."""
    if pattern.ndim != 4 or pattern.shape[-2] != end - start or not end - start <= pattern.shape[-1] <= end:
        raise ValueError(
            f"{bridge.cfg.model_name} gives a pattern {tuple(pattern.shape)} for queries {start} to {end - 1}; "
            f"expected [batch, head, {end - start}, at most {end}]. Its rows cannot be streamed; use the dense route "
            f"(interp.attention.reduce_patterns)"
        )
    return end - int(pattern.shape[-1])


def _log_sum(rows: Tensor, scores: Tensor | None) -> Tensor | None:
    """Log of the sum of exponentials of every row, from its largest weight and that key's score."""
    if scores is None or scores.shape != rows.shape:
        return None
    top, index = rows.max(-1, keepdim=True)
    return (scores.detach().gather(-1, index).float() - top.log()).squeeze(-1)
