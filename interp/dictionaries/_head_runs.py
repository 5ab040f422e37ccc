"""What attribution to heads reads of a model: sites in one forward, whether heads are pattern times values, tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.cache._reading import forward
from interp.hooks import resolve
from interp.prompts._tokens import token_strings


def read_hooks(bridge: Any, tokens: Int[Tensor, "example pos"], names: Sequence[str]) -> dict[str, Tensor]:
    """Activations by name, from one forward without gradients that stops above the last of them.

    Raises:
        ValueError: If this model has no such hook, before the forward.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda tensor: found.update({name: tensor})

    for name in names:
        try:
            resolve(bridge, name)
        except KeyError as error:
            raise ValueError(f"attribution needs {name!r}, which this model does not have: {error.args[0]}") from error
    forward(bridge, tokens, {name: keep(name) for name in dict.fromkeys(names)})
    return found


def check_pattern_values(
    bridge: Any,
    layer: int,
    z: Float[Tensor, "example pos head d_head"],
    v: Float[Tensor, "example src kv d_head"],
    pattern: Float[Tensor, "example head pos src"],
) -> None:
    """Raise unless the heads' outputs are the values at the sources weighted by the patterns, z = A v.

    Raises:
        ValueError: With gated or linear attention, or values that change behind `hook_v`.
    """
    n_heads = z.shape[2]
    if v.ndim != 4 or v.shape[-1] != z.shape[-1] or pattern.ndim != 4 or n_heads % v.shape[2]:
        off = f"z is {tuple(z.shape)}, v {tuple(v.shape)}, the pattern {tuple(pattern.shape)}"
    else:
        wide = torch.promote_types(z.dtype, torch.float32)
        grouped = pattern.to(wide).unflatten(1, (v.shape[2], -1))
        rebuilt = torch.einsum("bkgds,bske->bdkge", grouped, v.to(wide)).flatten(2, 3)
        gap = float((rebuilt - z).abs().max()) / max(float(z.abs().max()), 1e-30)
        if gap <= (1e-4 if z.dtype in (torch.float32, torch.float64) else 0.05):
            return
        off = f"they differ by {gap:.2g} of the largest"
    raise ValueError(
        f"heads of layer {layer} of {bridge.cfg.model_name} are not pattern times values ({off}), as with gated or "
        'linear attention, or values that are normalised behind hook_v: they have no shares by source; by="head" holds '
        "for direct_feature_attribution"
    )


def destinations(
    positions: int | Sequence[int] | Tensor | None, tokens: Int[Tensor, "example pos"]
) -> tuple[Int[Tensor, "example k"], bool]:
    """Positions per example, from 0, and whether they are the same in all.

    Raises:
        ValueError: If one does not exist, is named twice, or a tensor is not [example] or [example, k].
    """
    n, n_pos = tokens.shape
    shared = not isinstance(positions, Tensor)
    if positions is None:
        where = torch.arange(n_pos).expand(n, -1)
    elif isinstance(positions, Tensor):
        if positions.is_floating_point() or positions.dtype == torch.bool or positions.ndim not in (1, 2):
            raise ValueError(f"positions is {positions.dtype} {tuple(positions.shape)}; expected integers [example] or "
                             "[example, k], or a list for the same positions in every example")  # fmt: skip
        if len(positions) != n:
            raise ValueError(f"positions has {len(positions)} rows for {n} examples; for the same positions in every "
                             "example pass a list")  # fmt: skip
        where = positions.cpu().long().reshape(n, -1)
    else:
        where = torch.tensor([positions] if isinstance(positions, int) else list(positions), dtype=torch.long)
        where = where.expand(n, -1)
    wrong = (where < -n_pos) | (where >= n_pos)
    if where.shape[1] == 0 or bool(wrong.any()):
        raise ValueError(f"positions {where[wrong].unique().tolist()[:5]} do not exist: expected {-n_pos} to "
                         f"{n_pos - 1}, and at least one")  # fmt: skip
    where = where % n_pos
    if any(len(set(row)) < len(row) for row in where.tolist()):
        raise ValueError(f"positions {where[0].tolist()[:10]} name one position twice")
    return where, shared


def token_texts(bridge: Any, tokens: Int[Tensor, "example pos"]) -> np.ndarray:
    """The text of every token, [example, pos]; its number where the model has no tokenizer."""
    ids = tokens.cpu().numpy()
    known = {} if bridge.tokenizer is None else token_strings(bridge.tokenizer, map(int, np.unique(ids)))
    return np.array([[known.get(int(i), f"#{int(i)}") for i in row] for row in ids], dtype=np.str_)
