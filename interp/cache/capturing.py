"""Activations in memory: only the named hooks, only the named positions, no layer above the last one needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp.cache._reading import Layout, check_tokens, forward, layouts
from interp.hooks import resolve_many
from interp.hooks.names import device_of
from interp.models import require_eval


def capture(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    hooks: str | Sequence[str] | Callable[[str], bool],
    *,
    positions: int | Sequence[int] | Int[Tensor, "..."] | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    max_bytes: int = 4 * 2**30,
) -> dict[str, Tensor]:
    """Activations of some hooks on these tokens, as compact copies under the names they were asked by.

    Equal, bit for bit, to `run_with_cache` on the same batches. No gradients; layers above the last hook do not run
    and an activation is freed as soon as the wanted positions are copied. Costs one forward (less the layers above),
    and two over two or three tokens when a hook is first used.

    Rows are taken as they are, padding included: with right padding in a causal model real tokens are not affected,
    with left padding they are. Interventions that are active are seen.

    Args:
        hooks: A name, a glob, a list of either or a predicate; see `interp.hooks.resolve_many`. Keys are names as
            given; for globs and predicates as listed by `interp.hooks.names`; in forward order.
        positions: None keeps all. An int keeps one position of every row and drops the axis; a list keeps these
            positions of every row. A tensor is per row: [batch] keeps one each and drops the axis, [batch, k] keeps
            k each. Negative positions count from the end of the row. In an attention pattern positions are
            destinations.
        batch_size: Rows per forward; all at once by default. On most machines other sizes round differently in the
            last bit.
        device: Where results are put; the model's device by default.
        max_bytes: Refuse results larger than this, before the forward.

    Returns:
        Name to tensor [batch, ...] in the model's dtype, e.g. [batch, pos, d_model] for the residual stream.

    Raises:
        KeyError: If a hook does not exist or never fires on this model.
        ValueError: If tokens or positions do not fit, or the result would be larger than `max_bytes`.

    Example:
        >>> found = capture(bridge, p.clean, "blocks.*.hook_resid_post", positions=p.positions["end"])   # doctest:
        +SKIP
        >>> found["blocks.0.hook_resid_post"].shape                                                     # doctest: +SKIP
        torch.Size([64, 128])
    """
    require_eval(bridge)
    check_tokens(bridge, tokens)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1, or None for one forward")
    names = resolve_many(bridge, hooks)
    n, n_pos = tokens.shape
    chosen = _positions(positions, n, n_pos)
    layout = layouts(bridge, names)
    shapes = {name: _shape(name, layout[name], chosen, n, n_pos) for name in names}
    model = next(iter(bridge.original_model.parameters()))
    _check_budget(shapes, model.element_size(), max_bytes)
    found: dict[str, Tensor] = {}
    device = torch.device(device) if device is not None else device_of(bridge)
    for start in range(0, n, batch_size or n):
        rows = slice(start, min(start + (batch_size or n), n))

        def reader(name: str, axis: int | None, rows: slice = rows) -> Callable[[Tensor], None]:
            def read(tensor: Tensor) -> None:
                if name not in found:
                    found[name] = torch.empty(shapes[name], dtype=tensor.dtype, device=device)
                found[name][rows] = _select(tensor, axis, chosen, rows)

            return read

        forward(bridge, tokens[rows], {name: reader(name, layout[name].position_axis) for name in names})
    return {name: found[name] for name in names}


def _positions(positions: Any, n: int, n_pos: int) -> int | Tensor | None:
    """An int, shared positions [k], per-row positions [batch] or [batch, k] as (marked by) their shape; all
    non-negative."""
    if positions is None:
        return None
    if isinstance(positions, int):
        index = torch.tensor([positions])
    elif isinstance(positions, Tensor):
        if positions.ndim not in (1, 2) or len(positions) != n or positions.is_floating_point():
            raise ValueError(
                f"positions is a {positions.dtype} tensor {tuple(positions.shape)}; expected integers [{n}] or "
                f"[{n}, k], one row per row of tokens. For the same positions in every row pass a list"
            )
        index = positions.cpu().long()
    else:
        index = torch.tensor(list(positions), dtype=torch.long)
    wrong = (index < -n_pos) | (index >= n_pos)
    if index.numel() == 0 or bool(wrong.any()):
        raise ValueError(
            f"positions {index[wrong].tolist()[:5] or '[]'} do not exist: tokens has {n_pos} positions; expected "
            f"{-n_pos} to {n_pos - 1}, and at least one"
        )
    index = index % n_pos
    if isinstance(positions, int):
        return int(index)
    return index if isinstance(positions, Tensor) else index.unsqueeze(0)  # a list: [1, k], the same for all rows


def _shape(name: str, layout: Layout, chosen: int | Tensor | None, n: int, n_pos: int) -> tuple[int, ...]:
    shape, axis = list(layout.shape(n_pos)), layout.position_axis
    if chosen is None:
        return (n, *shape)
    if axis is None:
        raise ValueError(f"{name!r} has no axis of positions; capture it without positions=")
    kept = [chosen.shape[1]] if isinstance(chosen, Tensor) and chosen.ndim == 2 else []
    return (n, *shape[: axis - 1], *kept, *shape[axis:])


def _select(tensor: Tensor, axis: int | None, chosen: int | Tensor | None, rows: slice) -> Tensor:
    """What is kept of the activation of these rows of tokens: chosen positions along `axis`."""
    if chosen is None or axis is None:
        return tensor
    if isinstance(chosen, int):
        return tensor.select(axis, chosen)
    chosen = (chosen if len(chosen) == 1 and chosen.ndim == 2 else chosen[rows]).to(tensor.device)
    by_position = tensor.movedim(axis, 1)
    if chosen.ndim == 1:  # one position per row: the axis goes
        return by_position[torch.arange(len(chosen), device=tensor.device), chosen]
    picked = by_position[torch.arange(len(tensor), device=tensor.device)[:, None], chosen]  # [batch, k, ...]
    return picked.movedim(1, axis)


def _check_budget(shapes: dict[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> None:
    sizes = {name: torch.Size(shape).numel() * itemsize for name, shape in shapes.items()}
    total = sum(sizes.values())
    if total > max_bytes:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"these {len(sizes)} hooks would take {total:,} bytes, {sizes[largest]:,} of them {largest!r} "
            f"{shapes[largest]}; max_bytes is {max_bytes:,}. Choose positions= or fewer hooks, raise max_bytes, or "
            f"write to disk with interp.cache.harvest"
        )
