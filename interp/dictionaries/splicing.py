"""A dictionary inside a model: its reconstruction, or its latents as things to read, edit and differentiate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.dictionaries.dictionary import Dictionary
from interp.hooks import editable, interventions, resolve
from interp.hooks.names import device_of

LatentEdit = Callable[[Float[Tensor, "batch pos latent"]], Float[Tensor, "batch pos latent"]]


class Spliced:
    """What the last forward inside `spliced` found; None before there was one.

    Attributes:
        latents: [batch, pos, latent], before any edit, with the forward's graph.
        error: What the dictionary misses of the activation that it rebuilds, [batch, pos, width].
    """

    def __init__(self) -> None:
        self.latents: Tensor | None = None
        self.error: Tensor | None = None


@contextmanager
def spliced(
    bridge: Any,
    dictionary: Dictionary,
    *,
    error: bool = True,
    edit: LatentEdit | None = None,
    keep: Bool[Tensor, "batch pos"] | None = None,
) -> Iterator[Spliced]:
    """In every forward inside the context the dictionary stands where its activations are.

    With `error`, what it misses is added back: the forward is unchanged to the bit until a latent is edited, and an
    edit changes the activation by the decoded change alone. Without, the reconstruction takes the activation's place.
    `torch.autograd.grad` of anything with respect to `latents` and `error` gives their attributions; gradients also go
    on through the encoder. `backward()` fills `.grad` of both, and of the dictionary's own parameters. Activations with
    several axes per token (`hook_z`) are flattened on the way in and restored.

    Args:
        edit: Latents -> latents, applied before decoding; it must return a new tensor.
        keep: Positions where the dictionary stands; elsewhere the model's own activations stay. All by default.

    Raises:
        KeyError, ValueError: Before any forward, if the dictionary names no hook of this model that can be edited; in
            the first one, if its width does not fit.
    """
    hook, target = check_place(bridge, dictionary)
    found = Spliced()
    entered: list[Tensor] = []

    def enter(tensor: Tensor) -> Tensor:
        entered[:] = [tensor]
        return tensor

    def replace(tensor: Tensor) -> Tensor:
        x = tensor if target == hook else entered.pop()
        x, own = _flat(x, dictionary.d_in, hook), _flat(tensor, dictionary.d_out, target)
        latents = dictionary.encode(x)
        if torch.is_grad_enabled():
            if latents.requires_grad:
                latents.retain_grad()
            else:
                latents.requires_grad_()  # a frozen model and dictionary: the graph starts here
        found.latents = latents
        edited = latents if edit is None else edit(latents)
        if edited.shape != latents.shape:
            raise ValueError(f"the edit of the latents returned {tuple(edited.shape)}; expected {tuple(latents.shape)}")
        rebuilt = dictionary.decode(edited, x)
        before = rebuilt if edit is None else dictionary.decode(latents, x)
        missed = (own - before).detach()
        if torch.is_grad_enabled():
            missed.requires_grad_()
        found.error = missed
        # with the error, written as changes: what did not change stays the same to the bit
        changes = (rebuilt - before.detach()) + (missed - missed.detach())
        new = own.detach() + changes if error else rebuilt
        new = new.to(tensor.dtype).reshape(tensor.shape)
        if keep is None:
            return new
        where = keep.to(tensor.device).reshape(*keep.shape, *[1] * (tensor.ndim - 2))
        return torch.where(where, new, tensor)

    edits = {target: replace} if target == hook else {hook: enter, target: replace}
    with interventions(bridge, edits, must_fire=False):
        yield found


def check_place(bridge: Any, dictionary: Dictionary) -> tuple[str, str]:
    """The hooks that a dictionary reads and rebuilds, once they can be edited and both are on one device.

    Raises:
        KeyError, ValueError: See `spliced`.
    """
    own, there = dictionary.W_dec.device, device_of(bridge)
    if own.type != there.type:
        raise ValueError(
            f"the dictionary is on {own} and the model on {there}; move one: dictionary.to({str(there)!r}), or "
            f"device={str(there)!r} for train and load_dictionary"
        )
    if not dictionary.hook:
        raise ValueError(
            'this dictionary does not say which hook it reads; set dictionary.hook, for example "blocks.2.hook_mlp_out"'
        )
    hook = resolve(bridge, dictionary.hook)
    target = hook if dictionary.target_hook is None else resolve(bridge, dictionary.target_hook)
    for name in {hook, target}:
        if not editable(bridge, name):
            raise ValueError(f"edits of {name!r} have no effect on {bridge.cfg.model_name}: nothing can be spliced in")
    return hook, target


def check_width(flat: Tensor, width: int, hook: str) -> None:
    """Raise if activations [..., found] are not as wide as the dictionary."""
    if flat.shape[-1] != width:
        raise ValueError(
            f"{hook!r} of this model is {flat.shape[-1]} wide, the dictionary {width}: it was made for another model "
            f"or hook"
        )


def _flat(tensor: Tensor, width: int, hook: str) -> Tensor:
    flat = tensor.flatten(2)
    check_width(flat, width, hook)
    return flat
