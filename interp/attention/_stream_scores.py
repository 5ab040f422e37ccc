"""Rows of attention from queries and keys, one block at a time: causal, grouped, windowed, biased, capped, with a
learned sink."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.attention._stream_rows import precise_sum

BUDGET = 2**26
"""Bytes that one block of rows (all heads) may take; the few copies of it that work needs come on top."""

MAX_BLOCK = 64


@dataclass(frozen=True)
class Kind:
    """How scores become a pattern; see `streaming_statistics`."""

    scale: float
    window: int | None = None
    alibi: Tensor | None = None  # [head]
    soft_cap: float | None = None
    sink_logits: Tensor | None = None  # [head]


@dataclass(frozen=True)
class Rows:
    """A block of rows: `pattern` [batch, head, row, key] over the keys `first_key`, ..., up to the last query."""

    start: int
    first_key: int
    pattern: Tensor
    lse: Tensor  # [batch, head, row]


def block_rows(batch: int, heads: int, n_pos: int, block: int | None) -> int:
    """Rows per block: those asked for, or at most 64 that keep a block within the budget."""
    if block is not None:
        if block < 1:
            raise ValueError(f"block={block} must be at least 1: it is a number of rows")
        return min(block, n_pos)
    return max(1, min(MAX_BLOCK, n_pos, BUDGET // (4 * batch * heads * n_pos)))


def check_attention(q: Tensor, k: Tensor, v: Tensor | None, kind: Kind, gate: Tensor | None) -> None:
    """Refuse tensors that are not the queries, keys and values of one causal layer."""
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"q is {tuple(q.shape)} and k {tuple(k.shape)}; expected [batch, head, pos, d_head] and "
            f"[batch, kv_head, pos, d_head] of the same positions, after any rotation"
        )
    if 0 in q.shape or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} heads cannot share {k.shape[1]} key-value heads evenly")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v is {tuple(v.shape)} and k {tuple(k.shape)}; expected the same batch, heads and positions")
    if gate is not None and (v is None or gate.shape != (*q.shape[:3], v.shape[-1])):
        raise ValueError("gate multiplies the output: give v, and gate [batch, head, pos, d_head] (after its sigmoid)")
    for name, tensor in (("alibi", kind.alibi), ("sink_logits", kind.sink_logits)):
        if tensor is not None and tensor.shape != (q.shape[1],):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; expected one number for each of {q.shape[1]} heads")
    if kind.window is not None and kind.window < 1:
        raise ValueError(f"window={kind.window} must be at least 1: how many of the last keys a query sees")
    if kind.soft_cap is not None and kind.soft_cap <= 0:
        raise ValueError(f"soft_cap={kind.soft_cap} must be positive, or None for no cap")
    if not math.isfinite(kind.scale):
        raise ValueError(f"scale={kind.scale} is not a number to multiply scores with")


def row_block(q: Tensor, k: Tensor, kind: Kind, start: int, end: int) -> Rows:
    """Rows `start` to `end` of the pattern, float32 (float64 for float64 queries). One buffer, worked on in place."""
    batch, heads, rows = q.shape[0], q.shape[1], end - start
    first = 0 if kind.window is None else max(0, start - kind.window + 1)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    query = q[:, :, start:end].to(dtype) * kind.scale
    key = k[:, :, first:end].to(dtype)
    grouped = query.reshape(batch, k.shape[1], -1, q.shape[-1])  # heads of a group are more rows for the same keys
    scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, rows, end - first)
    if kind.soft_cap is not None:
        scores.div_(kind.soft_cap).tanh_().mul_(kind.soft_cap)
    query_at = torch.arange(start, end, device=q.device)[:, None]
    key_at = torch.arange(first, end, device=q.device)[None, :]
    if kind.alibi is not None:
        back = (query_at - key_at).to(dtype)
        for head, slope in enumerate(kind.alibi.to(dtype)):
            scores[:, head].sub_(back * slope)
    late = slice(start - first, None)  # only the block's own keys can lie after a query
    scores[..., late].masked_fill_(key_at[:, late] > query_at, -torch.inf)
    if kind.window is not None and end - first > kind.window:
        early = slice(0, end - first - kind.window)
        scores[..., early].masked_fill_(query_at - key_at[:, early] >= kind.window, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    sink = None if kind.sink_logits is None else kind.sink_logits.to(dtype)[None, :, None, None]
    if sink is not None:
        top = torch.maximum(top, sink)
    scores.sub_(top).exp_()
    total = precise_sum(scores).to(dtype).unsqueeze(-1)
    if sink is not None:
        total = total + (sink - top).exp()
    scores.div_(total)
    return Rows(start, first, scores, (top + total.log()).squeeze(-1))


def row_blocks(q: Tensor, k: Tensor, kind: Kind, block: int | None) -> Iterator[Rows]:
    """All rows of the pattern, block after block."""
    n_pos = q.shape[2]
    size = block_rows(q.shape[0], q.shape[1], n_pos, block)
    for start in range(0, n_pos, size):
        yield row_block(q, k, kind, start, min(start + size, n_pos))


def mixed(rows: Rows, v: Tensor) -> Tensor:
    """What the rows take from the values [batch, head, row, d_head]."""
    batch, heads, n_rows, n_keys = rows.pattern.shape
    values = v[:, :, rows.first_key : rows.first_key + n_keys].to(rows.pattern.dtype)
    grouped = rows.pattern.view(batch, v.shape[1], -1, n_keys)
    return (grouped @ values).view(batch, heads, n_rows, v.shape[-1])
