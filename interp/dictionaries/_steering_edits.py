"""The arithmetic of steering: one edit for one hook, with a vector and a strength of its own for every row."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from interp.cache import capture
from interp.dictionaries.vectors import SteeringLatent, SteeringVector
from interp.hooks import Edit, editable
from interp.hooks.names import probe_tokens

Mode = Literal["add", "clamp", "ablate"]
Positions = Literal["all", "prompt", "generated", "last"] | Sequence[int] | Tensor
Gate = Callable[[Tensor], Tensor] | Tensor


def make_edit(
    values: Tensor,
    strength: float | int | Tensor,
    mode: Mode,
    *,
    gate: Gate | None = None,
    keep_norm: bool = False,
) -> Edit:
    """The edit of activations [batch, pos, *width].

    Args:
        values: The vector [*width], or one per row [batch, *width].
        strength: One number, or one per row [batch].
        gate: Weights [batch] known before, or a function of the activation that gives them [batch, pos] (a bool or
            numbers from 0 to 1); the change is multiplied by them.
        keep_norm: Scale each edited token back to the length it had.
    """
    strengths = torch.as_tensor(strength)

    def edit(tensor: Tensor) -> Tensor:
        width = tensor.shape[2:]
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        v = values.to(tensor.device, dtype)
        per_row = v.ndim == len(width) + 1
        if v.shape[int(per_row) :] != width or (per_row and len(v) != len(tensor)):
            raise ValueError(
                f"vectors of shape {tuple(v.shape)} for activations {tuple(tensor.shape)}; expected {tuple(width)}, "
                f"or one per row, {(len(tensor), *width)}"
            )
        if strengths.ndim and len(strengths) != len(tensor):
            raise ValueError(f"{len(strengths)} strengths for {len(tensor)} rows; give one number, or one per row")
        flat = tensor.to(dtype).flatten(2)  # [batch, pos, units]
        v = v.flatten(1)[:, None] if per_row else v.flatten()[None, None]
        s = strengths.to(tensor.device, dtype).reshape(-1, 1, 1)
        if mode == "add":
            change = (s * v).expand_as(flat)
        else:
            unit = v / v.norm(dim=-1, keepdim=True)
            along = (flat * unit).sum(-1, keepdim=True)
            change = (s - along) * unit if mode == "clamp" else -s * along * unit
        return apply_change(tensor, change, gate, keep_norm)

    return edit


def apply_change(tensor: Tensor, change: Tensor, gate: Gate | None, keep_norm: bool) -> Tensor:
    """The activation [batch, pos, *width] after a change [batch, pos, units], weighted and rescaled as asked for."""
    flat = tensor.to(change.dtype).flatten(2)
    if gate is not None:
        change = change * _weights(gate, tensor).to(change.dtype)
    new = flat + change
    if keep_norm:
        moved = (change != 0).any(-1, keepdim=True)
        scaled = new * (flat.norm(dim=-1, keepdim=True) / new.norm(dim=-1, keepdim=True).clamp_min(1e-30))
        new = torch.where(moved, scaled, flat)
    return new.reshape(tensor.shape).to(tensor.dtype)


def check_steering(bridge: Any, vector: SteeringVector, mode: Mode) -> None:
    """Raise, before any forward of the caller's, unless this vector can be steered along at its hook."""
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r}; expected 'add', 'clamp' (set the projection) or 'ablate' (take it away)")
    if isinstance(vector, SteeringLatent):
        if mode != "add":
            raise ValueError(
                f"mode={mode!r} of {vector.name!r} sets a latent, which steer and generate_steered do; for the "
                "projection on its direction pass vector.plain()"
            )
        vector.require_one_length()
    if vector.hook.endswith(("hook_pattern", "hook_attn_scores")):
        raise ValueError(
            f"{vector.hook!r} is [batch, head, query, key]; steer hook_z, hook_q, hook_k or hook_v instead"
        )
    if not editable(bridge, vector.hook):
        raise ValueError(
            f"an edit of {vector.hook!r} has no effect on {bridge.cfg.model_name}: the model computes past this hook. "
            f"Steer the residual stream, hook_z or mlp.hook_post instead"
        )
    width = token_shape(bridge, vector.hook)
    if tuple(vector.values.shape) != width:
        raise ValueError(
            f"{vector.name!r} has shape {tuple(vector.values.shape)}, but {vector.hook!r} holds {width} per token"
        )


_widths: weakref.WeakKeyDictionary[Any, dict[str, tuple[int, ...]]] = weakref.WeakKeyDictionary()


def token_shape(bridge: Any, hook: str) -> tuple[int, ...]:
    """Shape of one token's activation at a hook, from one forward over three tokens; remembered."""
    known = _widths.setdefault(bridge, {})
    if hook not in known:
        shape = tuple(capture(bridge, probe_tokens(bridge), hook)[hook].shape)
        if shape[:2] != (1, 3) or len(shape) < 3:
            raise ValueError(f"{hook!r} holds {shape} for one row of 3 tokens; steering needs [batch, pos, ...]")
        known[hook] = shape[2:]
    return known[hook]


def position_mask(tensor: Tensor, positions: Positions, prompt_length: int | None) -> Tensor:
    """Bool [batch or 1, pos]: the positions of this forward that are to change."""
    n_pos = tensor.shape[1]
    mask = torch.zeros(1, n_pos, dtype=torch.bool, device=tensor.device)
    if isinstance(positions, Tensor):
        if positions.dtype != torch.bool or positions.shape[-1] != n_pos or positions.ndim > 2:
            raise ValueError(
                f"positions is {positions.dtype} {tuple(positions.shape)}; expected a bool mask [pos] or [batch, pos] "
                f"for a forward of {n_pos} positions"
            )
        return positions.to(tensor.device).reshape(-1, n_pos)
    if not isinstance(positions, str):
        if wrong := [place for place in positions if not -n_pos <= place < n_pos]:
            raise ValueError(f"positions {wrong} do not exist in a forward of {n_pos} positions")
        mask[:, list(positions)] = True
        return mask
    if positions in ("prompt", "generated"):
        assert prompt_length is not None
        if n_pos < prompt_length:
            raise ValueError(
                f"a forward of {n_pos} positions with prompt_length={prompt_length}: steer() sees whole texts, not "
                f"continuations from a cache; write with generate_steered"
            )
        mask[:, slice(0, prompt_length) if positions == "prompt" else slice(prompt_length, None)] = True
    else:
        mask[:, -1 if positions == "last" else slice(None)] = True
    return mask


def at_positions(edit: Edit, positions: Positions, prompt_length: int | None) -> Edit:
    """The edit where the positions are meant, the old values elsewhere."""
    if isinstance(positions, str) and positions == "all":
        return edit

    def apply(tensor: Tensor) -> Tensor:
        mask = position_mask(tensor, positions, prompt_length)
        return torch.where(mask.reshape(*mask.shape, *[1] * (tensor.ndim - 2)), edit(tensor), tensor)

    return apply


def _weights(gate: Gate, tensor: Tensor) -> Tensor:
    """[batch, pos or 1, 1]"""
    weights = gate if isinstance(gate, Tensor) else gate(tensor)
    weights = weights.to(tensor.device, torch.float32)
    if weights.shape == tensor.shape[:1]:
        return weights[:, None, None]
    if weights.shape != tensor.shape[:2]:
        raise ValueError(
            f"the gate gives {tuple(weights.shape)} for activations {tuple(tensor.shape)}; expected one weight per "
            f"token, {tuple(tensor.shape[:2])}, or per row, {tuple(tensor.shape[:1])}"
        )
    return weights[..., None]
