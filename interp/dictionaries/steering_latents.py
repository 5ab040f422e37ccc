"""Steering by the latents of a dictionary: their directions as vectors, and their values set in every forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.dictionaries._steering_edits import Gate, Mode, apply_change, make_edit, token_shape
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.splicing import check_place, check_width
from interp.dictionaries.vectors import SteeringLatent, SteeringVector
from interp.hooks import Edit


def latent_vectors(bridge: Any, dictionary: Dictionary, latents: Sequence[int]) -> list[SteeringLatent]:
    """Latents of a dictionary to steer by, at the hook that it rebuilds.

    Adding one with a strength raises the latent by so many units while everything else of the activation, the
    dictionary's error included, stays; with `mode="clamp"` the latent is set to the strength, which is 0 where it is to
    be off. Vectors keep the length of the decoder's rows, in the units of the activations; compare them at equal
    divergence (`strength_for_kl`) or take `.unit()`. No forward but one over three tokens.

    Raises:
        KeyError, ValueError: If the dictionary does not fit the model, a latent does not exist, or its direction is
            zero.

    Example:
        >>> (vector,) = interp.dictionaries.latent_vectors(bridge, sae, [17])
        >>> with interp.dictionaries.steer(bridge, vector, 8.0, mode="clamp"):
        ...     logits = bridge(tokens)
    """
    hook, target = check_place(bridge, dictionary)
    shape = token_shape(bridge, target)
    for name, width in ((hook, dictionary.d_in), (target, dictionary.d_out)):
        check_width(torch.empty(token_shape(bridge, name)).flatten(), width, name)
    chosen = [int(latent) for latent in latents]
    if wrong := [latent for latent in chosen if not 0 <= latent < dictionary.n_latents]:
        raise ValueError(f"latents {wrong[:8]} do not exist; the dictionary has 0 to {dictionary.n_latents - 1}")
    with torch.no_grad():
        rows = dictionary.directions(chosen)
    return [
        SteeringLatent(
            row.reshape(shape),
            target,
            f"latent {i}",
            dictionary.architecture,
            {"latent": i},
            dictionary=dictionary,
            latent=i,
        )  # fmt: skip
        for i, row in zip(chosen, rows, strict=True)
    ]


def steering_edits(
    bridge: Any,
    vector: SteeringVector,
    strength: float | int | Tensor,
    mode: Mode,
    *,
    gate: Gate | None,
    keep_norm: bool,
) -> dict[str, Edit]:
    """The edits of one vector, by hook; for latents that are set also the hook that the dictionary reads."""
    if not isinstance(vector, SteeringLatent) or mode == "add":
        return {vector.hook: make_edit(vector.values, strength, mode, gate=gate, keep_norm=keep_norm)}
    dictionary, latent = vector.dictionary, vector.latent
    hook, target = check_place(bridge, dictionary)
    strengths = torch.as_tensor(strength)
    entered: list[Tensor] = []

    def enter(tensor: Tensor) -> Tensor:
        entered[:] = [tensor]
        return tensor

    def replace(tensor: Tensor) -> Tensor:
        x = (tensor if hook == target else entered.pop()).flatten(2)
        if strengths.ndim and len(strengths) != len(tensor):
            raise ValueError(f"{len(strengths)} strengths for {len(tensor)} rows; give one number, or one per row")
        before = dictionary.encode(x)
        after = before.clone()
        s = strengths.to(before.device, before.dtype).reshape(-1, 1)
        after[..., latent] = s if mode == "clamp" else before[..., latent] * (1 - s)
        change = dictionary.decode(after, x) - dictionary.decode(before, x)
        return apply_change(tensor, change.to(torch.promote_types(tensor.dtype, torch.float32)), gate, keep_norm)

    return {target: replace} if hook == target else {hook: enter, target: replace}
