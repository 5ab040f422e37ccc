"""Partial forwards: from a layer, up to a layer, and from a position on, with the keys and values of the prefix
reused."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from interp.hooks.edits import attach, reads
from interp.hooks.names import block_outputs, hook_name, probe_tokens, without_hooks


@contextmanager
def skip_below(bridge: Any, layer: int) -> Iterator[None]:
    """Blocks below `layer` hand their input on unchanged and cost nothing. For use with `start_at_layer`: see
    `run_from`."""
    blocks = list(bridge.blocks)
    if not 0 <= layer <= len(blocks):
        raise ValueError(f"layer={layer} is not a layer of this model; expected 0 to {len(blocks)}")
    skipped = blocks[:layer]
    extra = (None,) * (block_outputs(bridge) - 1)
    alone = block_outputs(bridge) == 0

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        resid = args[0] if args else kwargs["hidden_states"]
        return resid if alone else (resid, *extra)

    before = [block.__dict__.get("forward") for block in skipped]
    try:
        for block in skipped:
            object.__setattr__(block, "forward", hand_on)
        yield
    finally:
        for block, forward in zip(skipped, before, strict=True):
            if forward is None:
                object.__delattr__(block, "forward")
            else:
                object.__setattr__(block, "forward", forward)


def run_from(bridge: Any, resid: Float[Tensor, "batch pos d_model"], layer: int, **kwargs: Any) -> Any:
    """Logits [batch, pos, d_vocab] of a forward that enters at block `layer` with this residual stream (its resid_pre).

    Blocks below do not run. Equal, bit for bit, to the whole forward when `resid` is what that forward has there.
    Keyword arguments go to the bridge; `logits_to_keep=index` (LongTensor) unembeds only these positions.
    """
    if not 0 <= layer < len(bridge.blocks):
        raise ValueError(f"layer={layer} is not a block of this model; expected 0 to {len(bridge.blocks) - 1}")
    with skip_below(bridge, layer):
        return bridge(resid, start_at_layer=layer, **kwargs)


def run_until(
    bridge: Any, tokens: Int[Tensor, "batch pos"], layer: int, **kwargs: Any
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream entering block `layer` (`n_layers`: leaving the last block). Nothing above it is computed."""
    n_layers = len(bridge.blocks)
    if not 0 <= layer <= n_layers:
        raise ValueError(f"layer={layer} is not a layer of this model; expected 0 to {n_layers}")
    if layer < n_layers:
        return bridge(tokens, stop_at_layer=layer, **kwargs)

    def stop(tensor: Tensor, *, hook: Any) -> None:
        raise StopAtLayerException(tensor)  # caught by the bridge's forward, as for the blocks before the last

    with ExitStack() as stack:
        attach(stack, bridge, hook_name("resid_post", n_layers - 1), stop, "fwd")
        return bridge(tokens, **kwargs)


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of every layer for the first `n_tokens` positions of each example; never changed by use."""

    layers: tuple[Any, ...]
    template: Any
    batch: int
    n_tokens: int

    def crop(self, n_tokens: int) -> PrefixCache:
        """The cache of the first `n_tokens` positions: views, nothing copied."""
        if not 0 < n_tokens <= self.n_tokens:
            raise ValueError(
                f"n_tokens={n_tokens}; this cache holds {self.n_tokens} positions, so expected 1 to {self.n_tokens}"
            )
        layers = []
        for layer in self.layers:
            layer = copy.copy(layer)
            layer.keys, layer.values = layer.keys[:, :, :n_tokens], layer.values[:, :, :n_tokens]
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = n_tokens
            layers.append(layer)
        return PrefixCache(tuple(layers), self.template, self.batch, n_tokens)

    def past_key_values(self, rows: Int[Tensor, " batch"] | None = None, *, start_layer: int = 0) -> Any:
        """A transformers cache to be used up by one forward: row i continues example `rows[i]` (None: row i continues
        i).

        Layers below `start_layer` are not expanded; a forward that enters at that layer does not read them.
        """
        layers = [copy.copy(layer) for layer in self.layers]
        for layer in layers[start_layer:]:
            layer.keys, layer.values = _take(layer.keys, rows), _take(layer.values, rows)
            if isinstance(
                layer, DynamicSlidingWindowLayer
            ):  # the stored layer holds every position; attention sees a window
                layer.record_past = False
                start = max(self.n_tokens - layer.sliding_window + 1, 0)
                layer.keys, layer.values = layer.keys[:, :, start:], layer.values[:, :, start:]
        past = copy.copy(self.template)
        past.layers = layers
        return past


def prefix_cache(bridge: Any, tokens: Int[Tensor, "batch pos"], **kwargs: Any) -> PrefixCache:
    """Keys and values of a prefix (or of whole prompts: `.crop(n)` then gives any shorter prefix), from one forward.

    Interventions that are active act on it as on any forward.

    Raises:
        NotImplementedError: If this model's cache is not one of plain keys and values per layer and position.
    """
    past = DynamicCache(config=bridge.original_model.config)
    for layer in past.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.record_past = True  # keep what leaves the window, so that a crop can bring it back
    with torch.no_grad():
        bridge(tokens, past_key_values=past, **{"logits_to_keep": 1, **kwargs})
    layers: list[Any] = past.layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    if not plain or len(layers) != len(bridge.blocks) or any(layer.keys is None for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise NotImplementedError(
            f"{bridge.cfg.model_name} caches {', '.join(kinds)}; prefix reuse needs keys and values of every layer. "
            f"Run whole prompts instead (see supports_prefix_reuse)."
        )
    return PrefixCache(tuple(layers), past, int(tokens.shape[0]), int(tokens.shape[1]))


def run_suffix(
    bridge: Any,
    suffix: Tensor,
    cache: PrefixCache,
    *,
    rows: Int[Tensor, " batch"] | None = None,
    start_layer: int = 0,
    **kwargs: Any,
) -> Any:
    """Logits [batch, suffix, d_vocab] of the positions after a cached prefix; only these, and layers >= `start_layer`,
    run.

    Args:
        suffix: Token ids [batch, suffix], or the residual stream [batch, suffix, d_model] that enters block
            `start_layer` at these positions (its resid_pre; position information, where it is added to the embedding,
            included).
        cache: The prefix. Its keys and values are those of the model that made it: right as long as no activation at a
            prefix position differs.
        rows: Which cached example each row continues; None if row i continues example i, or the cache holds one
        example. start_layer: The first block to run; above 0 the suffix must be a residual stream. **kwargs: For the
        bridge, e.g. `logits_to_keep`.
    """
    if rows is None and len(suffix) != cache.batch:
        if cache.batch != 1:
            raise ValueError(
                f"suffix has {len(suffix)} rows and the cache {cache.batch}; "
                f"pass rows= to say which example each continues"
            )
        rows = torch.zeros(len(suffix), dtype=torch.long, device=suffix.device)
    past = cache.past_key_values(rows, start_layer=start_layer)
    if suffix.is_floating_point():
        return run_from(bridge, suffix, start_layer, past_key_values=past, **kwargs)
    if start_layer:
        raise ValueError(f"start_layer={start_layer} needs the residual stream entering that block, not token ids")
    return bridge(suffix, past_key_values=past, **kwargs)


_reuse: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def supports_prefix_reuse(bridge: Any, *, tolerance: float = 1e-4) -> bool:
    """Whether suffixes run on a cached prefix, from every kind of start, give this model's own logits (probed once)."""
    if bridge not in _reuse:
        _reuse[bridge] = _probe_reuse(bridge, tolerance)
    return _reuse[bridge]


def _probe_reuse(bridge: Any, tolerance: float) -> bool:
    tokens, split, layer = probe_tokens(bridge, 6), 4, len(bridge.blocks) - 1
    name = hook_name("resid_pre", layer)
    with without_hooks(bridge):
        with reads(bridge, name) as found:
            whole = bridge(tokens)[:, split:]
        entering = found[name][:, split:]
        try:
            cache = prefix_cache(bridge, tokens).crop(split)
            parts = [
                run_suffix(bridge, tokens[:, split:], cache),
                run_suffix(bridge, entering, cache, start_layer=layer),
            ]
        except (NotImplementedError, TypeError, ValueError, AttributeError):
            return False
    scale = float(whole.abs().max())
    room = tolerance if whole.dtype in (torch.float32, torch.float64) else 0.05
    return all(float((part - whole).abs().max()) <= room * scale for part in parts)


def _take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return tensor
    if tensor.shape[0] == 1:
        return tensor.expand(len(rows), -1, -1, -1)  # a view: the forward's own concatenation copies it
    return tensor.index_select(0, rows.to(tensor.device))
