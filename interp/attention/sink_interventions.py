"""Interventions on sinks, as contexts: massive activations, position embeddings, the attention to a key, whole heads.

Each acts on every forward inside it and leaves no hook behind; `sink_scores` and every other method that runs whole
sequences can be run inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from interp.attention._activations import reduce_activations, sizes
from interp.attention._patterns import require_patterns
from interp.attention.calibration import group_heads
from interp.hooks import hook_name, interventions, names
from interp.models import geometry

Position = int | Literal["top"]


def activation_means(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    layer: int,
    channels: Sequence[int],
    *,
    position: Position = 0,
    batch_size: int | None = None,
) -> list[float]:
    """Mean over sequences of these channels of the stream leaving block `layer`, for `set_activations`.

    Args:
        position: A position; or `"top"`, the one where the largest of the channels is in each sequence.
    """
    chosen = _check_channels(bridge, layer, channels)

    def reduce(stream: Tensor) -> Tensor:
        rows = torch.arange(len(stream), device=stream.device)
        return stream[rows, _positions(stream, chosen, position)][:, chosen]

    name = hook_name("resid_post", layer)
    return reduce_activations(bridge, tokens, {name: reduce}, batch_size=batch_size)[name].mean(0).tolist()


@contextmanager
def set_activations(
    bridge: Any,
    layer: int,
    channels: Sequence[int],
    values: float | int | Sequence[float | int] = 0.0,
    *,
    position: Position = 0,
) -> Iterator[None]:
    """Channels of the stream leaving block `layer` are set to `values` at one position: zero, or their means.

    Zeroing the massive activations removes the sink; setting them to their mean over other texts changes nothing, so
    that they act as constants.

    Args:
        values: One number for all channels, or one each (see `activation_means`).
        position: A position; or `"top"`, the one where the largest of the channels is in each sequence.

    Raises:
        ValueError: If the layer, a channel or the position does not exist, or values and channels differ in number;
            and in forwards that go on from a key-value cache, which hold a part of the positions (not noticed where
            attention is delegated).

    Source:
        Sun et al. 2024 (arXiv:2402.17762), section 3: LLaMA2-7B, output of layer 2, channels 2533 and 1415; zero gives
        infinite perplexity, means 5.47 as before. Their means are kept apart for position 0 and for another top
        position; use two contexts for that.
    """
    chosen = _check_channels(bridge, layer, channels)
    numbers = [float(values)] * len(chosen) if isinstance(values, (int, float)) else [float(v) for v in values]
    if len(numbers) != len(chosen):
        raise ValueError(f"{len(numbers)} values for {len(chosen)} channels {chosen}; give one, or one each")

    def edit(stream: Tensor) -> Tensor:
        new = stream.clone()
        rows = torch.arange(len(stream), device=stream.device)[:, None]
        columns = torch.tensor(chosen, device=stream.device)[None]
        new[rows, _positions(stream, chosen, position)[:, None], columns] = torch.tensor(numbers).to(stream)
        return new

    def whole(pattern: Tensor) -> Tensor:
        if pattern.shape[-1] != pattern.shape[-2]:
            raise ValueError(
                f"a forward of {pattern.shape[-2]} queries over {pattern.shape[-1]} keys: set_activations names a "
                "position of the whole sequence; run it without a key-value cache"
            )
        return pattern

    edits = {hook_name("resid_post", layer): edit}
    if not geometry(bridge).delegated_attention:  # else a continued forward cannot be told from a whole one
        edits = {hook_name("pattern", layer): whole, **edits}
    with interventions(bridge, edits):
        yield


@contextmanager
def swap_position_embeddings(
    bridge: Any, first: int, second: int, *, how: Literal["swap", "replace"] = "swap"
) -> Iterator[None]:
    """Two positions exchange their position embeddings; with `"replace"` the first takes that of the second.

    If the sink belongs to a position and not to a token, it moves with the embedding.

    Raises:
        ValueError: If the model adds no position embeddings, or a position is not in the context.

    Source:
        Gu et al. 2025 (arXiv:2410.10781), section 4, GPT2-XL on one repeated token: the sink rate of position 0 is
        62.28 %; 0.2 to 11 % after replacing; 1.4 to 9.7 % after swapping, with 50 to 58 % at the other position.
    """
    if how not in ("swap", "replace"):
        raise ValueError(f"how={how!r}; expected 'swap' or 'replace'")
    if "hook_pos_embed" not in names(bridge, "hook_pos_embed"):
        raise ValueError(
            f"{bridge.cfg.model_name} adds no position embeddings (positions are "
            f"{bridge.cfg.positional_embedding_type}); move the sink with redirect_attention instead"
        )
    n_ctx = int(bridge.cfg.n_ctx)
    if wrong := [place for place in (first, second) if not 0 <= place < n_ctx]:
        raise ValueError(f"positions {wrong} are not in the context; expected 0 to {n_ctx - 1}")

    def edit(embedding: Tensor) -> Tensor:
        n_pos = embedding.shape[1]
        if max(first, second) >= n_pos:
            raise ValueError(f"positions {first} and {second} in a sequence of {n_pos}; both must be inside")
        order = torch.arange(n_pos, device=embedding.device)
        order[first] = second
        if how == "swap":
            order[second] = first
        return embedding[:, order]

    with interventions(bridge, {"hook_pos_embed": edit}):
        yield


@contextmanager
def redirect_attention(
    bridge: Any,
    heads: Sequence[tuple[int, int]],
    *,
    key: int = 0,
    to: int | Literal["others", "nowhere"] = "others",
) -> Iterator[None]:
    """The attention that these heads pay to `key` is moved, in every query after it; the query of `key` itself stays.

    Args:
        heads: Pairs `(layer, head)`.
        to: `"others"` gives it to the other keys in proportion to what they have (rows keep their sum; a row whose mass
            is all on `key` stays); `"nowhere"` drops it (rows then sum to less); a position moves the sink there, for
            the queries that see it.

    Raises:
        ValueError: If a head does not exist, `to` is `key`, or the model's patterns cannot be replaced.
    """
    if to == key or (isinstance(to, str) and to not in ("others", "nowhere")) or key < 0:
        raise ValueError(f"to={to!r} with key={key}; expected another position, 'others' or 'nowhere'")

    def move(pattern: Tensor) -> Tensor:
        n_pos = pattern.shape[-1]
        if max(key, to if isinstance(to, int) else 0) >= n_pos:
            raise ValueError(f"key={key}, to={to!r} in a sequence of {n_pos} positions; both must be inside")
        new = pattern.clone()
        start = key + 1 if isinstance(to, str) else max(key + 1, to)
        mass = pattern[..., start:, key]
        new[..., start:, key] = 0
        if isinstance(to, int):
            new[..., start:, to] += mass
        elif to == "others":
            rest = new[..., start:, :].sum(-1)
            new[..., start:, :] *= ((rest + mass) / rest.clamp_min(1e-30))[..., None]
            stuck = rest < 1e-6
            new[..., start:, :] = torch.where(stuck[..., None], pattern[..., start:, :], new[..., start:, :])
        return new

    with _edited_patterns(bridge, heads, move):
        yield


@contextmanager
def cut_heads(bridge: Any, heads: Sequence[tuple[int, int]], *, to: int | None = None) -> Iterator[None]:
    """These heads write nothing; or, with `to`, they gather from this position alone (all mass on BOS is `to=0`).

    With `to`, queries before the position keep their attention.

    Raises:
        ValueError: If a head or the position does not exist, or, with `to`, patterns cannot be replaced.

    Source:
        The two head interventions of Guo et al. 2024 (arXiv:2410.13835).
    """
    if to is None:
        grouped = group_heads(bridge, heads)

        def silence(chosen: list[int]) -> Any:
            def edit(z: Tensor) -> Tensor:
                new = z.clone()
                new[:, :, chosen] = 0
                return new

            return edit

        with interventions(bridge, {hook_name("z", layer): silence(chosen) for layer, chosen in grouped.items()}):
            yield
        return
    if to < 0:
        raise ValueError(f"to={to} is not a position")

    def gather(pattern: Tensor) -> Tensor:
        if to >= pattern.shape[-1]:
            raise ValueError(f"to={to} in a sequence of {pattern.shape[-1]} positions; it must be inside")
        new = pattern.clone()
        new[..., to:, :] = 0
        new[..., to:, to] = 1
        return new

    with _edited_patterns(bridge, heads, gather):
        yield


@contextmanager
def _edited_patterns(bridge: Any, heads: Sequence[tuple[int, int]], change: Any) -> Iterator[None]:
    grouped = group_heads(bridge, heads)
    require_patterns(bridge, list(grouped), edit=True)

    def edit(chosen: list[int]) -> Any:
        def apply(pattern: Tensor) -> Tensor:
            if pattern.shape[-1] != pattern.shape[-2]:
                raise ValueError(
                    f"a pattern of {pattern.shape[-2]} queries and {pattern.shape[-1]} keys: run whole sequences, "
                    f"without a key-value cache"
                )
            new = pattern.clone()
            new[:, chosen] = change(pattern[:, chosen])
            return new

        return apply

    with interventions(bridge, {hook_name("pattern", layer): edit(chosen) for layer, chosen in grouped.items()}):
        yield


def _check_channels(bridge: Any, layer: int, channels: Sequence[int]) -> list[int]:
    shape = sizes(bridge)
    chosen = [int(channel) for channel in channels]
    if not 0 <= layer < shape.n_layers:
        raise ValueError(f"layer={layer} is not a layer of this model; expected 0 to {shape.n_layers - 1}")
    if not chosen or any(not 0 <= channel < shape.d_model for channel in chosen):
        raise ValueError(f"channels={chosen}; expected at least one of 0 to {shape.d_model - 1}")
    return chosen


def _positions(stream: Tensor, channels: list[int], position: Position) -> Tensor:
    """One position per row of the batch."""
    if position == "top":
        return stream[..., channels].abs().amax(-1).argmax(1)
    if not 0 <= position < stream.shape[1]:
        raise ValueError(f"position={position} in a sequence of {stream.shape[1]}; expected an index of it, or 'top'")
    return torch.full((len(stream),), position, device=stream.device)
