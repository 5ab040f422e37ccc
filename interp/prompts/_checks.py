"""What prompts must be: checks of tensors when they are made, of BOS and padding before a model reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interp.prompts._tokens import uses_bos


def token_ids(value: Any, key: str, ndim: int) -> Tensor:
    """Token ids of one or two dimensions as a long tensor on the CPU."""
    shape = "[example, pos]" if ndim == 2 else "[example]"
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{key} is a {type(value).__name__}; expected a tensor of token ids {shape}. Strings go to "
            "prompts.from_text"
        )
    if value.ndim != ndim:
        raise ValueError(f"{key} has shape {tuple(value.shape)}; expected {shape}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{key} has dtype {value.dtype}; token ids are integers (torch.long)")
    value = value.detach().cpu().long().contiguous()
    if value.numel() and int(value.min()) < 0:
        raise ValueError(
            f"{key} holds {int(value.min())}; token ids start at 0 and there is no padding or ignore index"
        )
    return value


def named_positions(positions: Mapping[str, Any] | None, n: int, length: int) -> dict[str, Tensor]:
    """One index per example under every name, `"end"` included."""
    named = dict(positions or {})
    named.setdefault("end", torch.full((n,), length - 1))
    out = {}
    for key, value in named.items():
        if (
            not isinstance(value, Tensor)
            or value.ndim != 1
            or len(value) != n
            or value.is_floating_point()
            or value.dtype == torch.bool
        ):
            what = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"positions[{key!r}] is {what}; expected one index per example, an integer tensor of shape ({n},)"
            )
        value = value.detach().cpu().long()
        bad = ((value < 0) | (value >= length)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"positions[{key!r}] is {int(value[bad[0]])} in row {bad[0]}; expected 0 to {length - 1}, counted from "
                "the first token"
            )
        out[str(key)] = value
    return out


def plain_labels(labels: Mapping[str, Sequence[Any]] | None, n: int) -> dict[str, tuple[Any, ...]]:
    """One plain value, or tuple of them, per example under every name."""
    out = {}
    for key, values in (labels or {}).items():
        values = tuple(tuple(v) if isinstance(v, list) else v for v in values)
        if len(values) != n:
            raise ValueError(f"labels[{key!r}] has {len(values)} entries but there are {n} examples")
        for row, value in enumerate(values):
            for part in value if isinstance(value, tuple) else (value,):
                if part is not None and not isinstance(part, (str, int, float, bool)):
                    raise ValueError(
                        f"labels[{key!r}][{row}] is a {type(part).__name__}; labels are plain strings, numbers, "
                        "booleans or None, so that they can be saved"
                    )
        out[str(key)] = values
    return out


def token_sets(sets: Sequence[Sequence[int]] | None, key: str, n: int) -> tuple[tuple[int, ...], ...] | None:
    """One tuple of token ids per example, or None."""
    if sets is None:
        return None
    if len(sets) != n:
        raise ValueError(f"{key} has {len(sets)} entries but there are {n} examples")
    out = tuple(tuple(int(token) for token in ids) for ids in sets)
    if bad := [row for row, ids in enumerate(out) if not ids or min(ids) < 0]:
        raise ValueError(f"{key}: rows {bad[:8]} are empty or hold a negative id")
    return out


def check_bos(ids: Tensor, key: str, bridge: Any) -> None:
    """BOS once at the start of every row, if the model uses one."""
    bos = bridge.tokenizer.bos_token_id
    if bos is None:
        return
    later = (ids[:, 1:] == bos).any(1).nonzero().flatten().tolist()
    if uses_bos(bridge):
        missing = (ids[:, 0] != bos).nonzero().flatten().tolist()
        # rows padded on the left do not start with BOS either, and there the padding is what is wrong
        missing = [row for row in missing if int(ids[row, 0]) != bridge.tokenizer.pad_token_id]
        if missing:
            raise ValueError(
                f"{key}: rows {missing[:8]} do not start with BOS (token {bos}, {bridge.tokenizer.bos_token!r}), which "
                "this model expects; prepend it, or set bridge.cfg.default_prepend_bos = False if the model is to run "
                "without"
            )
    if later and bos != bridge.tokenizer.pad_token_id:
        raise ValueError(
            f"{key}: rows {later[:8]} hold BOS (token {bos}) again after the first position; it belongs there exactly "
            "once"
        )


def check_padding(ids: Tensor, key: str, bridge: Any) -> None:
    """No padding token in any row."""
    tokenizer = bridge.tokenizer
    pad = tokenizer.pad_token_id
    if pad is None:
        return
    is_pad = ids == pad
    if pad == tokenizer.bos_token_id:
        # one leading BOS is right; any more is a doubled BOS or padding
        is_pad = is_pad[:, 1:] if uses_bos(bridge) else is_pad
    elif pad == tokenizer.eos_token_id:
        # an end-of-text inside a row separates documents; only at the edges is it padding
        is_pad = is_pad[:, [0, -1]]
    rows = is_pad.any(1).nonzero().flatten().tolist()
    if rows and pad == tokenizer.bos_token_id:
        raise ValueError(
            f"{key}: rows {rows[:8]} hold token {pad} ({tokenizer.pad_token!r}), which is both BOS and padding, "
            "outside the first position; BOS belongs there exactly once, and rows of different length go to "
            "prompts.groups_from_text"
        )
    if rows:
        side = "left" if int(ids[rows[0], 0]) == pad else "right" if int(ids[rows[0], -1]) == pad else "inside"
        raise ValueError(
            f"{key}: rows {rows[:8]} hold the padding token {pad} ({tokenizer.pad_token!r}; row {rows[0]}: {side}); "
            "positions would no longer mean the same place in every row. Group prompts by length instead "
            "(prompts.groups_from_text)"
        )
