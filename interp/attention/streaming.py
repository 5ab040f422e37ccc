"""Every statistic of attention at long context, exactly, without a T x T tensor: patterns are made and reduced in
blocks of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.attention._patterns import check_layers, check_tokens, require_patterns
from interp.attention._stream_model import forward_in_blocks, require_streaming
from interp.attention._stream_result import AttentionRows, AttentionStream, row_result, stream_result
from interp.attention._stream_rows import RowBlocks, Target, make_request
from interp.attention._stream_scores import BUDGET, Kind, block_rows, check_attention, mixed, row_block, row_blocks
from interp.hooks.names import device_of

__all__ = [
    "AttentionRows", "AttentionStream", "LayerStatistics", "attention_rows", "streaming_rows", "streaming_statistics",
    "stream_statistics",
]  # fmt: skip


@dataclass(frozen=True)
class LayerStatistics:
    """What `streaming_statistics` takes of one layer; float32, or float64 for float64 queries.

    Attributes:
        rows: By statistic, `[batch, head, dest]`; NaN where a row has nothing to measure.
        importance: Column sum over the number of queries that can see the key, `[batch, head, src]`.
        self_attention: The diagonal of the pattern, `[batch, head, src]`.
        column_entropy: Nats, of every column scaled to sum to 1, `[batch, head, src]`.
        column_max: The largest weight a key gets, `[batch, head, src]`.
        output: What the heads take from the values, `[batch, head, dest, d_head]`, after the gate; None without values.
    """

    rows: dict[str, Tensor]
    importance: Tensor
    self_attention: Tensor
    column_entropy: Tensor
    column_max: Tensor
    output: Tensor | None


def streaming_statistics(
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch kv_head pos d_head"],
    v: Float[Tensor, "batch kv_head pos d_value"] | None = None,
    *,
    scale: float | int | None = None,
    window: int | None = None,
    alibi: Float[Tensor, "head"] | None = None,
    soft_cap: float | int | None = None,
    sink_logits: Float[Tensor, "head"] | None = None,
    gate: Float[Tensor, "batch head pos d_value"] | None = None,
    offsets: Sequence[int] = (0, 1),
    recent: int = 64,
    sets: Mapping[str, Any] | None = None,
    targets: Sequence[Target] = (),
    tokens: Int[Tensor, "batch pos"] | None = None,
    block: int | None = None,
) -> LayerStatistics:
    """Statistics of the causal pattern of one layer from its queries and keys, one block of rows at a time.

    Of every row: `entropy` (nats; mass on no key counts as one more key), `entropy_normalised` (over the log of the
    number of keys before and at the query; NaN for the first row), `max` and `top` (largest weight and its key),
    `support` (1 / sum of squares, mass on no key as one more), `distance` (mean distance to what it attends to),
    `recent` (mass on the last keys), `off_sequence` (1 - row sum: what a learned sink takes), `lse` (log of the sum of
    exponentials, learned sink included), `current_token`, `previous_token`, `offset_3`, ... (mass at an offset), and
    the mass of key sets and targets by name. Rows are never renormalised.

    Extra memory is about three blocks [batch, head, block, pos], with 64 rows 32 to 43 MiB per head at 32k positions.

    Args:
        q: Queries after any rotation and normalisation, not scaled yet; with `scale=1`, already scaled.
        k: Keys likewise; fewer heads than queries where attention is grouped (they are not copied).
        v: Values: the output of the heads is then given as well.
        scale: What scores are multiplied with; 1 / sqrt(d_head) by default.
        window: Keys that a query sees, itself included; all by default.
        alibi: Slopes: scores fall by slope x distance.
        soft_cap: Bound of the scores: cap x tanh(score / cap), before masking.
        sink_logits: Learned logit per head that joins the softmax and takes mass off the sequence.
        gate: Factor of the output after attention. It does not change any row's mass.
        offsets: Distances back whose mass is taken; rows without such a key are NaN.
        recent: Number of last keys of `recent`, the query's own included.
        sets: Masks `[key]` or `[batch, key]`, or lists of positions, by name; rows before all of them are NaN.
        targets: `"duplicate_token"` (earlier equal tokens), `"induction"` (what followed them); see
            `detection_pattern`. Rows without any are NaN. They need `tokens`.
        block: Rows at a time; by default up to 64 that fit in 64 MiB for all heads.

    Raises:
        ValueError: If shapes or options do not fit.

    Source:
        Exact row-wise softmax in blocks, as in Rabe & Staats 2021 (arXiv:2112.05682) without the chunking over keys.
    """
    kind = _kind(q, scale, window, alibi, soft_cap, sink_logits)
    check_attention(q, k, v, kind, gate)
    batch, heads, n_pos, _ = q.shape
    if tokens is not None and tokens.shape != (batch, n_pos):
        raise ValueError(f"tokens is {tuple(tokens.shape)}; expected ({batch}, {n_pos}) as the queries")
    request = make_request(
        n_pos, offsets=offsets, recent=recent, sets=sets, targets=targets, tokens=tokens, batch=batch
    )
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        found = RowBlocks(batch, heads, n_pos, request, q.device, dtype)
        output = None if v is None else torch.empty(*q.shape[:3], v.shape[-1], dtype=dtype, device=q.device)
        for rows in row_blocks(q, k, kind, block):
            found.update(rows.pattern, rows.start, first_key=rows.first_key, lse=rows.lse)
            if output is not None and v is not None:
                output[:, :, rows.start : rows.start + rows.pattern.shape[-2]] = mixed(rows, v)
        if output is not None and gate is not None:
            output *= gate
        return LayerStatistics(
            found.rows,
            found.importance().to(dtype),
            found.self_attention.to(dtype),
            found.column_entropy().to(dtype),
            found.peak,
            output,
        )


def streaming_rows(
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch kv_head pos d_head"],
    dest: Sequence[int],
    *,
    scale: float | int | None = None,
    window: int | None = None,
    alibi: Float[Tensor, "head"] | None = None,
    soft_cap: float | int | None = None,
    sink_logits: Float[Tensor, "head"] | None = None,
) -> Float[Tensor, "batch head row pos"]:
    """Whole rows of the pattern at a few queries, nothing else computed: what retrieval scores read. Arguments as for
    `streaming_statistics`; a row of 32k positions is 128 KiB per head."""
    kind = _kind(q, scale, window, alibi, soft_cap, sink_logits)
    check_attention(q, k, None, kind, None)
    places = _places(dest, q.shape[2])
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    found = torch.zeros(q.shape[0], q.shape[1], len(places), q.shape[2], dtype=dtype, device=q.device)
    with torch.no_grad():
        for i, place in enumerate(places):
            rows = row_block(q, k, kind, place, place + 1)
            found[:, :, i, rows.first_key : place + 1] = rows.pattern[:, :, 0]
    return found


def stream_statistics(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    *,
    layers: Sequence[int] | None = None,
    block: int | None = None,
    offsets: Sequence[int] = (0, 1),
    recent: int = 64,
    sets: Mapping[str, Any] | None = None,
    targets: Sequence[Target] = (),
    keep: Sequence[str] | None = None,
    batch_size: int | None = None,
    interventions: bool = False,
) -> AttentionStream:
    """Statistics of every head's attention on long sequences, exact, with no T x T tensor anywhere.

    The model reads the tokens in blocks, continuing from its own cache of keys and values, so that a layer makes the
    pattern of one block of rows at a time; these rows are the model's own, whatever it does to them (rotation, soft
    caps, windows, gates, learned sinks, grouped keys), and are reduced where they appear. Costs one forward. Memory is
    that of the cache, some copies of [batch, head, block, pos] for one layer at a time, and the statistics of all
    chosen layers: 72 bytes per layer, head and position with the default options (2.3 GiB for 32 x 32 heads at 32k;
    choose fewer layers at a time where that is too much).

    Args:
        layers: Layers to measure, all by default; the others are NaN.
        block: Positions per forward; by default up to 64 whose rows fit in 64 MiB for all heads of a layer.
        offsets, recent, sets, targets: As for `streaming_statistics`; targets are found in `tokens`.
        keep: Statistics whose every row is kept (layers x heads x positions x sequences numbers each), all by default;
            of the others there is the mean over rows.
        batch_size: Sequences at a time; by default as many as leave room for blocks of 32 rows.
        interventions: Allow active hooks. They see blocks of positions and not the whole sequence: right for edits
            that do the same at every position (a head cut), wrong for those that name positions.

    Returns:
        Means over rows, rows and columns; `.sink_scores()`, `.entropy_scores()` and `.head_scores()` give the results
        of the dense routes.

    Raises:
        ValueError: If the tokens, layers or options do not fit, patterns cannot be read, or hooks are active.
        NotImplementedError: If the model does not continue from cached keys and values.
        RuntimeError: If the model is in training mode.
    """
    chosen = _checked(bridge, tokens, layers, interventions)
    n, n_pos = tokens.shape
    heads = int(bridge.cfg.n_heads)
    request = make_request(n_pos, offsets=offsets, recent=recent, sets=sets, targets=targets, tokens=tokens, batch=n)
    kept = request.names() if keep is None else list(keep)
    if not kept or any(name not in request.names() for name in kept):
        raise ValueError(f"keep={kept}; expected at least one of {', '.join(request.names())}")
    size = batch_size if batch_size is not None else max(1, BUDGET // (4 * heads * n_pos * min(32, n_pos)))
    if size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1, or None for what fits")
    found: dict[int, list[dict[str, Any]]] = {layer: [] for layer in chosen}
    device = device_of(bridge)
    for first in range(0, n, size):
        batch = tokens[first : first + size]
        part = request.part(first, first + len(batch))
        streams = {layer: RowBlocks(len(batch), heads, n_pos, part, device, torch.float32) for layer in chosen}

        def take(
            layer: int, rows: Tensor, start: int, first_key: int, lse: Tensor | None, _streams: Any = streams
        ) -> None:
            _streams[layer].update(rows, start, first_key=first_key, lse=lse)

        forward_in_blocks(bridge, batch.to(device), block_rows(len(batch), heads, n_pos, block), chosen, take)
        for layer in chosen:
            found[layer].append(streams.pop(layer).summary(kept))
    return stream_result(
        bridge, tokens, found, request, kept, block=block_rows(min(size, n), heads, n_pos, block), layers=chosen
    )


def attention_rows(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    dest: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    block: int | None = None,
    interventions: bool = False,
) -> AttentionRows:
    """Whole rows of attention at a few queries of long sequences, for every head: what a decode step attends to.

    The tokens before are read in blocks as in `stream_statistics`, nothing behind the last query runs.

    Args:
        dest: Positions of the queries.

    Returns:
        `values` [layer, head, dest, key, example]; keys after a query are 0.

    Raises:
        As `stream_statistics`.
    """
    chosen = _checked(bridge, tokens, layers, interventions)
    places = _places(dest, tokens.shape[1])
    n, heads, end = len(tokens), int(bridge.cfg.n_heads), max(places) + 1
    values = torch.full((int(bridge.cfg.n_layers), heads, len(places), tokens.shape[1], n), torch.nan)
    values[chosen] = 0
    size = max(1, BUDGET // (4 * heads * end * min(32, end)))
    for first in range(0, n, size):
        examples = slice(first, first + size)

        def take(layer: int, rows: Tensor, start: int, first_key: int, _lse: Any, _examples: slice = examples) -> None:
            for i, place in enumerate(places):
                if start <= place < start + rows.shape[-2]:
                    row = rows[:, :, place - start].permute(1, 2, 0).cpu()
                    values[layer, :, i, first_key : first_key + row.shape[1], _examples] = row

        batch = tokens[examples, :end].to(device_of(bridge))
        forward_in_blocks(bridge, batch, block_rows(len(batch), heads, end, block), chosen, take)
    return row_result(bridge, values, places, tokens)


def _kind(
    q: Tensor,
    scale: float | int | None,
    window: int | None,
    alibi: Tensor | None,
    soft_cap: float | int | None,
    sink_logits: Tensor | None,
) -> Kind:
    factor = float(q.shape[-1]) ** -0.5 if scale is None else float(scale)
    return Kind(factor, window, alibi, None if soft_cap is None else float(soft_cap), sink_logits)


def _places(dest: Sequence[int], n_pos: int) -> list[int]:
    places = [int(place) for place in dest]
    if not places or min(places) < 0 or max(places) >= n_pos or len(set(places)) < len(places):
        raise ValueError(f"dest={places[:5]} must name at least one of the positions 0 to {n_pos - 1}, and each once")
    return places


def _checked(bridge: Any, tokens: Tensor, layers: Sequence[int] | None, interventions: bool) -> list[int]:
    check_tokens(bridge, tokens)
    chosen = check_layers(bridge, layers)
    require_patterns(bridge, chosen)
    require_streaming(bridge, interventions=interventions)
    return chosen
