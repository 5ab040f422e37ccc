"""Forwards that compute no more than some hooks need, and the shapes that those hooks have on a model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.hooks import run_until, stop_layer
from interp.hooks.edits import attach
from interp.hooks.names import device_of, without_hooks


@dataclass(frozen=True)
class Layout:
    """Shape of an activation as a function of batch and positions: `sizes[i]` is None where axis i runs over
    positions."""

    sizes: tuple[int | None, ...]  # without the batch axis
    floating: bool

    @property
    def position_axis(self) -> int | None:
        """Axis of the activation [batch, ...] that runs over positions; the destinations of an attention pattern."""
        return self.sizes.index(None) + 1 if None in self.sizes else None

    @property
    def row_shape(self) -> tuple[int, ...] | None:
        """Shape at one token, or None where the activation is not one row per token (an attention pattern)."""
        if self.sizes[:1] != (None,) or None in self.sizes[1:]:
            return None
        return tuple(size for size in self.sizes if size is not None)

    def shape(self, n_pos: int) -> tuple[int, ...]:
        """Shape of one example of `n_pos` tokens."""
        return tuple(n_pos if size is None else size for size in self.sizes)


def layouts(bridge: Any, names: Sequence[str]) -> dict[str, Layout]:
    """The layout of each hook, from two forwards over a few tokens; remembered per bridge.

    Sizes alone cannot tell [batch, pos, head, d_head] from [batch, head, pos, pos] when there are as many heads as
    positions, so two batch sizes and two lengths are compared.

    Raises:
        ValueError: If a hook holds no examples along its first axis (the rotary tables).
    """
    known = _known.setdefault(bridge, {})
    missing = [name for name in names if name not in known]
    if missing:
        small, large = _shapes(bridge, missing, 1, 2), _shapes(bridge, missing, 2, 3)
        for name in missing:
            (a, floating), (b, _) = small[name], large[name]
            if len(a) != len(b) or (a[:1], b[:1]) != ((1,), (2,)):
                raise ValueError(
                    f"{name!r} is {a} for one example and {b} for two: it does not hold examples along its first "
                    f"axis and cannot be cached per example; read it with interp.hooks.reads"
                )
            known[name] = Layout(tuple(None if x != y else x for x, y in zip(a[1:], b[1:], strict=True)), floating)
    return {name: known[name] for name in names}


_known: weakref.WeakKeyDictionary[Any, dict[str, Layout]] = weakref.WeakKeyDictionary()


def _shapes(bridge: Any, names: Sequence[str], batch: int, pos: int) -> dict[str, tuple[tuple[int, ...], bool]]:
    found: dict[str, tuple[tuple[int, ...], bool]] = {}

    def note(name: str) -> Callable[[Tensor], None]:
        return lambda tensor: found.update({name: (tuple(tensor.shape), tensor.is_floating_point())})

    tokens = (torch.arange(pos) % int(bridge.cfg.d_vocab)).expand(batch, pos)
    with without_hooks(bridge):
        forward(bridge, tokens, {name: note(name) for name in names})
    return found


def forward(bridge: Any, tokens: Tensor, readers: Mapping[str, Callable[[Tensor], None]]) -> None:
    """One forward without gradients that hands each activation to its reader and stops above the last one.

    Readers run inside the forward, so that an activation they do not keep is freed at once. They see what interventions
    that are active have made of it. The model's default of building a key-value cache is left alone: switching it
    off changes the memory layout of keys, and with it the last bit of GPT-2's attention scores.
    """
    stop = stop_layer(bridge, list(readers))
    with torch.no_grad(), ExitStack() as stack:
        for name, read in readers.items():

            def fire(tensor: Tensor, *, hook: Any, _read: Callable[[Tensor], None] = read) -> None:
                _read(tensor)

            attach(stack, bridge, name, fire, "fwd")
        tokens = tokens.to(device_of(bridge))
        if stop is None:
            bridge(tokens)
        else:
            run_until(bridge, tokens, stop)


def check_tokens(bridge: Any, tokens: Any, what: str = "tokens") -> Tensor:
    """`tokens` itself, once it is known to be ids [example, pos] that this model can take."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{what} is a {type(tokens).__name__}; expected a tensor of token ids [example, pos]")
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"{what} is {tokens.dtype} {tuple(tokens.shape)}; expected integer token ids [example, pos]")
    if 0 in tokens.shape:
        raise ValueError(f"{what} is empty: its shape is {tuple(tokens.shape)}")
    low, high, d_vocab = int(tokens.min()), int(tokens.max()), int(bridge.cfg.d_vocab)
    if low < 0 or high >= d_vocab:
        raise ValueError(f"{what} has ids from {low} to {high}; this model's vocabulary is 0 to {d_vocab - 1}")
    n_ctx = getattr(bridge.cfg, "n_ctx", None)
    if n_ctx is not None and tokens.shape[1] > int(n_ctx):
        raise ValueError(f"{what} has {tokens.shape[1]} positions; this model's context is {int(n_ctx)}")
    return tokens
