"""Groups of tokens: the subject, what is asked about it, the position that answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.patching._cells import choice

Group = str | int | Sequence[str | int] | Tensor
"""Names of `prompts.positions`, indices, a list of either, or a bool mask [example, pos]."""


def token_groups(prompts: Any, *, subject: Group = "subject") -> dict[str, Bool[Tensor, "example pos"]]:
    """Every token up to the answer's position in one of four groups: `first`, `subject`, `relation`, `last`.

    `subject` is what is given, `last` the position `end` where the answer is read, `first` the first token of the
    prompt (a BOS, or whatever stands there: heads with nothing to do attend to it), `relation` all others. A token of
    the subject that stands first belongs to `subject`; a group that is empty in all examples is left out.

    Args:
        subject: Names of `prompts.positions` or indices; a bool mask `[example, pos]` for subjects of several tokens.

    Raises:
        ValueError: If the prompts do not name the subject, or it reaches the position where the answer is read.
    """
    n, n_pos = prompts.clean.shape
    place = torch.arange(n_pos).expand(n, n_pos)
    end = prompts.positions["end"].cpu()[:, None]
    last = place == end
    about = _mask(prompts, "subject", subject) & (place <= end)
    if bool((about & last).any()):
        rows = (about & last).any(1).nonzero().flatten().tolist()
        raise ValueError(
            f"the subject of examples {rows[:8]} is at their last position, where the answer is read; what flows from "
            "one to the other cannot be told apart. Pass groups of your own"
        )
    first = (place == 0) & ~about & ~last
    found = {"first": first, "subject": about, "relation": (place < end) & ~about & ~first, "last": last}
    return {name: mask for name, mask in found.items() if bool(mask.any())}


def masks_of(prompts: Any, groups: Mapping[str, Group]) -> dict[str, Bool[Tensor, "example pos"]]:
    """Every group as a mask; checked."""
    if not groups:
        raise ValueError("groups is empty; name a group of tokens, or leave groups out for token_groups(prompts)")
    return {name: _mask(prompts, name, group) for name, group in groups.items()}


def _mask(prompts: Any, name: str, group: Group) -> Bool[Tensor, "example pos"]:
    n, n_pos = prompts.clean.shape
    if isinstance(group, Tensor):
        if group.dtype != torch.bool or tuple(group.shape) != (n, n_pos):
            raise ValueError(
                f"group {name!r} is {group.dtype} {tuple(group.shape)}; as a tensor it must be a bool mask "
                f"[example, pos], here {(n, n_pos)}"
            )
        mask = group.cpu()
    else:
        mask = torch.zeros(n, n_pos, dtype=torch.bool)
        for entry in [group] if isinstance(group, (str, int)) else group:
            if isinstance(entry, str):
                choice("positions", entry, prompts.positions)
                mask[torch.arange(n), prompts.positions[entry].cpu()] = True
            elif 0 <= entry < n_pos:
                mask[:, entry] = True
            else:
                raise ValueError(f"group {name!r}: position {entry} is not in the prompts; expected 0 to {n_pos - 1}")
    if not bool(mask.any()):
        raise ValueError(f"group {name!r} holds no token")
    return mask
