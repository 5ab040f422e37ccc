"""Prefill and greedy decoding with the cache of keys and values: rows of attention without any T x T tensor.

The prompt goes through in blocks of positions, so that a layer never holds more than [batch, head, block, T] of a
pattern; decoding then costs one row per step. Interventions that are active are seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.attention._patterns import require_patterns
from interp.attention.needles import Needle, Needles
from interp.hooks import hook_name, prefix_cache, supports_prefix_reuse
from interp.hooks.edits import attach
from interp.hooks.names import device_of
from interp.models import require_eval
from interp.types import Site

BUDGET = 2**27
"""Bytes that the float32 rows of one layer's pattern may take."""

Read = Callable[[int, Tensor, int], None]
"""`read(layer, rows, width)`: rows [batch, head, query, key], and how many tokens the last query sees or has passed.

Keys are the last ones: fewer than `width` in a layer with a sliding window."""


def require_decoding(bridge: Any, *, edit: bool = False) -> None:
    """Refuse a model whose rows cannot be read, or that does not continue from cached keys and values."""
    require_eval(bridge)
    require_patterns(bridge, edit=edit)
    if not supports_prefix_reuse(bridge):
        raise NotImplementedError(
            f"{bridge.cfg.model_name} does not continue from cached keys and values (interp.hooks."
            f"supports_prefix_reuse), which decoding needs"
        )


def check_needles(bridge: Any, needles: Needles, steps: int) -> None:
    """Refuse needles that this model cannot take, before any forward."""
    d_vocab, n_ctx = int(bridge.cfg.d_vocab), getattr(bridge.cfg, "n_ctx", None)
    for i, sample in enumerate(needles.samples):
        highest = max(int(sample.tokens.max()), *sample.answer)
        if highest >= d_vocab:
            raise ValueError(
                f"sample {i} holds token {highest}, but this model's vocabulary is 0 to {d_vocab - 1}; the needles "
                f"were made for another tokenizer"
            )
        if len(sample.tokens) < 2:
            raise ValueError(f"sample {i} has {len(sample.tokens)} token; decoding starts behind at least one other")
        if n_ctx is not None and len(sample.tokens) + steps > int(n_ctx):
            raise ValueError(
                f"sample {i} has {len(sample.tokens)} tokens, and {steps} more are to be decoded, but this model's "
                f"context is {int(n_ctx)}; use shorter needles or a smaller max_new_tokens"
            )


def batches(needles: Sequence[Needle], size: int) -> Iterator[list[int]]:
    """Indices of samples in batches of equal length, each no larger than `size`."""
    by_length: dict[int, list[int]] = {}
    for i, sample in enumerate(needles):
        by_length.setdefault(len(sample.tokens), []).append(i)
    for _, rows in sorted(by_length.items()):
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def block_size(bridge: Any, batch: int, n_pos: int) -> int:
    """Positions per forward that keep a layer's rows within the budget."""
    return max(1, min(n_pos, BUDGET // (4 * batch * int(bridge.cfg.n_heads) * n_pos)))


def prefill(bridge: Any, tokens: Int[Tensor, "batch pos"], *, block: int | None = None) -> Any:
    """A transformers cache that holds these tokens, filled block by block."""
    size = block or block_size(bridge, *tokens.shape)
    past = prefix_cache(bridge, tokens[:, :size]).past_key_values()
    for start in range(size, tokens.shape[1], size):
        with torch.no_grad():
            bridge(tokens[:, start : start + size], past_key_values=past, logits_to_keep=1)
    drop_patterns(bridge)
    return past


def fork(past: Any, rows: Int[Tensor, " rows"]) -> Any:
    """A cache of its own whose row i continues row `rows[i]` of another, which stays as it is."""
    new = copy.copy(past)
    new.layers = [copy.copy(layer) for layer in past.layers]
    for layer in new.layers:
        index = rows.to(layer.keys.device)
        layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)
    return new


def decode(
    bridge: Any,
    past: Any,
    last: Int[Tensor, " batch"],
    steps: int,
    *,
    stop: Sequence[int] = (),
    forced: Int[Tensor, "batch steps"] | None = None,
) -> tuple[Int[Tensor, "batch steps"], Tensor]:
    """What the model writes after `last`, greedily, and the logits of every step [batch, step, d_vocab] if forced.

    `past` is used up. A row ends with its first stop token, which is part of what it wrote; behind it are -1s. With
    `forced` these tokens are fed instead of the model's own, in one forward; what is returned is still the model's.
    """
    with torch.no_grad():
        if forced is not None:
            fed = torch.cat([last[:, None], forced[:, :-1]], 1)
            logits = bridge(fed, past_key_values=past)
            drop_patterns(bridge)
            return logits.argmax(-1), logits
        written = torch.full((len(last), steps), -1, dtype=torch.long, device=last.device)
        done = torch.zeros(len(last), dtype=torch.bool, device=last.device)
        ends = torch.tensor(list(stop), dtype=torch.long, device=last.device)
        current, logits = last, torch.empty(0)
        for step in range(steps):
            logits = bridge(current[:, None], past_key_values=past)[:, -1]
            current = logits.argmax(-1)
            written[:, step] = torch.where(done, -1, current)
            done |= torch.isin(current, ends)
            if bool(done.all()):
                break
    drop_patterns(bridge)
    return written, torch.empty(0)


@contextmanager
def rows_read(bridge: Any, read: Read, width: Callable[[], int]) -> Iterator[None]:
    """Hand every layer's pattern to `read` inside the forwards of this context, as float32."""
    with ExitStack() as stack:
        for layer in range(int(bridge.cfg.n_layers)):

            def take(pattern: Tensor, *, hook: Any, _layer: int = layer) -> None:
                read(_layer, pattern.detach().float(), width())

            attach(stack, bridge, hook_name("pattern", layer), take, "fwd")
        yield


@contextmanager
def site_read(bridge: Any, site: Site, read: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hand one site of every layer to `read` inside the forwards of this context, as float32."""
    with ExitStack() as stack:
        for layer in range(int(bridge.cfg.n_layers)):

            def take(tensor: Tensor, *, hook: Any, _layer: int = layer) -> None:
                read(_layer, tensor.detach().float())

            attach(stack, bridge, hook_name(site, layer), take, "fwd")
        yield


def drop_patterns(bridge: Any) -> None:
    """Let go of the patterns that joint-QKV attention keeps after a forward."""
    for block in bridge.blocks:
        attention = block._modules.get("attn")
        if attention is not None and getattr(attention, "_pattern", None) is not None:
            attention._pattern = None


def stacked(bridge: Any, needles: Sequence[Needle]) -> Tensor:
    """Token ids [batch, pos] of samples of one length, on the model's device."""
    return torch.stack([sample.tokens for sample in needles]).to(device_of(bridge))


def answers(needles: Sequence[Needle], steps: int) -> Tensor:
    """Answers [batch, step], cut or filled with their last token to `steps`."""
    rows = [[*sample.answer, *[sample.answer[-1]] * steps][:steps] for sample in needles]
    return torch.tensor(rows)


def answer_recall(answer: Sequence[int], written: Sequence[int]) -> float:
    """Share of the answer's tokens that were written, a token as often as it was: ROUGE-1 recall over token ids."""
    left = list(written)
    hits = 0
    for token in answer:
        if token in left:
            left.remove(token)
            hits += 1
    return hits / len(answer)


def labels_of(needles: Needles, index: Sequence[int], dim: str) -> Mapping[str, Any]:
    """Coordinates of an axis over these samples."""
    return {
        dim: list(index),
        "length": (dim, [needles.samples[i].length for i in index]),
        "depth": (dim, [float(needles.samples[i].depth) for i in index]),
    }


def end_tokens(bridge: Any) -> list[int]:
    """The tokenizer's end of text, which ends an answer; nothing for a model without one."""
    end = getattr(bridge.tokenizer, "eos_token_id", None)
    return [] if end is None else [int(end)]
