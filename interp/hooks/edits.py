"""Reading, replacing and differentiating activations by name.

Hooks on a bridge must return a new tensor: an edit in place is lost at some hook points and not at others, so it is
refused. `hook_resid_mid` of TransformerLens sits on the MLP branch alone; here it means the residual stream, for all
three uses (only `taps` refuses it).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from interp.hooks.names import (
    UnknownHook,
    hook_name,
    hook_point,
    layer_of,
    probe_tokens,
    probed_edit,
    resolve,
    resolve_many,
)

Edit = Callable[[Tensor], Tensor]


@contextmanager
def reads(bridge: Any, selector: str | Sequence[str] | Callable[[str], bool]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that every forward inside the context fills with the activations of these hooks.

    Keys are the names asked for (see `resolve_many`); values are the model's own tensors, on its device and with their
    graph unless the forward ran under `torch.no_grad()`. They are read after any intervention that was entered before
    this context. `torch.autograd.grad` with respect to a value is inert at `hook_q`, `hook_k`, `hook_v`, `hook_z` and
    at the norms: use `gradients`.
    """
    found = _Found("no forward inside the context reached")
    with ExitStack() as stack:
        for name in resolve_many(bridge, selector):

            def keep(tensor: Tensor, *, hook: Any, _name: str = name) -> None:
                found[_name] = tensor

            attach(stack, bridge, name, keep, "fwd")
        yield found


@contextmanager
def gradients(bridge: Any, selector: str | Sequence[str] | Callable[[str], bool]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that a backward pass of a forward run inside the context fills with gradients at these hooks.

    Each is the gradient of what was differentiated with respect to the activation after all edits there, of the
    activation's shape. At `hook_resid_mid` it is that of the residual stream, skip path included (read at
    `hook_attn_out`, where the two are equal). Parameters must be frozen or the graph started at an activation; see
    `interp.load_model`, which freezes them.
    """
    found = _Found("no backward pass of a forward inside the context reached")
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # where the graph starts at the very hook; the gradient is right
        warnings.filterwarnings("ignore", message="Full backward hook is firing when gradients are computed")
        for name in resolve_many(bridge, selector):
            where = hook_name("attn_out", _resid_mid_layer(bridge, name)) if _is_resid_mid(name) else name

            def keep(gradient: Tensor, *, hook: Any, _name: str = name) -> None:
                found[_name] = gradient.detach()

            attach(stack, bridge, where, keep, "bwd")
        yield found


@contextmanager
def taps(bridge: Any, selector: str | Sequence[str] | Callable[[str], bool]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that every forward inside the context fills with the tensors that the model goes on with.

    Values are unchanged, bit for bit. `torch.autograd.grad` of anything computed from them, with respect to any number
    of them at once, is right at every hook: what `reads` gives is a side branch at `hook_q`, `hook_k`, `hook_v` and
    `hook_z`. Contexts entered earlier act before the tap, so their part is not in the gradient; those entered later
    act after it. Where no graph reaches a hook, with frozen parameters or behind a detached tensor, the tap starts one:
    tap `blocks.0.hook_resid_pre` of a frozen model to differentiate the rest. Where the model computes past a hook
    (patterns of delegated attention), `torch.autograd.grad` says that the tap was not used, or gives None with
    `allow_unused`. Keys are the names asked for.

    Raises:
        KeyError: If a name is not a live hook of this model.
        ValueError: For `hook_resid_mid`, whose gradient is that at `hook_attn_out`, and for a hook of token ids.
    """
    found = _Found("no forward inside the context reached")
    names = resolve_many(bridge, selector)
    for name in names:
        if _is_resid_mid(name):
            other = hook_name("attn_out", _resid_mid_layer(bridge, name))
            raise ValueError(f"{name!r} is on the MLP's branch only; the gradient of the stream is that at {other!r}")
    with ExitStack() as stack:
        for name in names:

            def keep(tensor: Tensor, *, hook: Any, _name: str = name) -> Tensor:
                if not tensor.is_floating_point():
                    raise ValueError(f"{_name!r} holds {tensor.dtype}, which has no gradient")
                starts = torch.is_grad_enabled() and not tensor.requires_grad
                found[_name] = tensor.detach().requires_grad_() if starts else tensor.view_as(tensor)
                return found[_name]

            attach(stack, bridge, name, keep, "fwd")
        yield found


@contextmanager
def interventions(
    bridge: Any, edits: Mapping[str, Edit], *, must_fire: bool = True, must_change: bool = False
) -> Iterator[None]:
    """Replace activations: each `fn(tensor) -> new tensor` is applied at its hook in every forward inside the context.

    Edits of contexts entered earlier come first. An edit of `hook_resid_mid` acts on the residual stream between
    attention and MLP (`hook_attn_out` is made to return what takes the stream there), exact to rounding and bit-exact
    where the edit leaves values alone; enter it after edits of `hook_attn_out` of the same block.

    Args:
        must_fire: On leaving, raise if an edit was never applied.
        must_change: On leaving, raise if an edit never changed a value.

    Raises:
        KeyError: If a name is not a live hook of this model.
        ValueError: If edits of a hook are discarded by this model (see `editable`), or an edit returns something else
        than a tensor of the same shape, dtype and device, or edits in place. RuntimeError: On leaving, naming the edits
        that did not fire or did not change anything.
    """
    fired = dict.fromkeys(edits, 0)
    changed = dict.fromkeys(edits, False)

    def checked(name: str, fn: Edit) -> Edit:
        def apply(tensor: Tensor) -> Tensor:
            version = None if tensor.is_inference() else tensor._version
            new = fn(tensor)
            check_edit(name, tensor, new, version)
            fired[name] += 1
            if must_change and not changed[name]:
                changed[name] = not torch.equal(new, tensor)
            return new

        return apply

    with ExitStack() as stack:
        ordered = sorted(edits, key=_is_resid_mid)  # the stream is edited after its parts were
        for name in ordered:
            if not editable(bridge, name):
                raise ValueError(
                    f"an edit of {name!r} has no effect on {bridge.cfg.model_name}: the model computes past this "
                    f"hook. Edit hook_z, hook_q, hook_k or hook_v instead; "
                    f"interp.self_check(bridge) lists what is unsupported"
                )
        for name in ordered:
            _attach_edit(stack, bridge, name, checked(name, edits[name]))
        yield
    if must_fire and (silent := [name for name in edits if not fired[name]]):
        raise RuntimeError(
            f"no forward pass reached {', '.join(map(repr, silent))}: the intervention had no effect. Run the model "
            f"inside the context, from a layer that is not above the hook; or pass must_fire=False."
        )
    if must_change and (idle := [name for name in edits if not changed[name]]):
        raise RuntimeError(
            f"the interventions at {', '.join(map(repr, idle))} returned their input unchanged in every forward"
        )


def editable(bridge: Any, name: str) -> bool:
    """Whether an edit of this hook changes the model's output. False for the patterns of delegated attention (GPT-Neo,
    GPT-J, OPT, ...), which are computed by other code, and for what the split query, key and value inputs bypass.
    Probed once."""

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn_like(tensor) if tensor.is_floating_point() else (tensor + 1) % int(bridge.cfg.d_vocab)

    def run() -> Tensor:
        with ExitStack() as stack:
            _attach_edit(stack, bridge, name, noise)
            return bridge(probe_tokens(bridge))

    resolve(bridge, name)
    # an edit of a norm's own hooks works, but makes it fall back to another formula and warn: not to be done for a
    # probe
    return name.endswith(("hook_scale", "hook_normalized")) or probed_edit(bridge, name, run)


@contextmanager
def no_retained_graph(bridge: Any) -> Iterator[None]:
    """On leaving, drop the attention patterns that joint-QKV attention (GPT-2, NeoX) keeps, graph and all, between
    forwards.

    Put it around a forward and backward pass; without it the graph of the last forward stays in memory and a deep copy
    of the bridge fails.
    """
    try:
        yield
    finally:
        for block in bridge.blocks:
            attention = block._modules.get("attn")
            if attention is not None and getattr(attention, "_pattern", None) is not None:
                attention._pattern = None


class _Found(dict[str, Tensor]):
    """Activations by name, with a message for the names that are not there yet."""

    def __init__(self, why: str) -> None:
        super().__init__()
        self.why = why

    def __missing__(self, name: str) -> Tensor:
        raise UnknownHook(f"{self.why} {name!r}; there is {', '.join(map(repr, self)) or 'nothing'} so far")


def _attach_edit(stack: ExitStack, bridge: Any, name: str, fn: Edit) -> None:
    if _is_resid_mid(name):
        _attach_resid_mid(stack, bridge, _resid_mid_layer(bridge, name), fn)
    else:
        attach(stack, bridge, name, lambda tensor, *, hook: fn(tensor), "fwd")


def attach(stack: ExitStack, bridge: Any, name: str, fn: Callable[..., Any], direction: Literal["fwd", "bwd"]) -> None:
    """Add a hook for as long as the stack is open.

    On the hook point itself, since `bridge.hooks` calls the function once per alias in compatibility mode: an edit
    twice over.
    """
    point = hook_point(bridge, name)
    handle = point.add_hook(fn, dir=direction)

    def remove() -> None:
        handle.hook.remove()
        listed = point.fwd_hooks if direction == "fwd" else point.bwd_hooks
        listed[:] = [other for other in listed if other is not handle]

    stack.callback(remove)


def _attach_resid_mid(stack: ExitStack, bridge: Any, layer: int, fn: Edit) -> None:
    """Write resid_mid: attn_out becomes what must be added to the block's input to give the new stream."""
    entering: list[Tensor] = []

    def enter(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering[:] = [args[0] if args else kwargs["hidden_states"]]

    def write(attn_out: Tensor, *, hook: Any) -> Tensor:
        resid_pre = entering.pop()
        resid_mid = resid_pre + attn_out
        new = fn(resid_mid)
        needed = new - resid_pre
        kept = torch.where(new == resid_mid, attn_out, needed)  # rounding must not touch what the edit left alone
        return kept.detach() + (needed - needed.detach()) if needed.requires_grad else kept

    # the wrapped block sees its input after every hook on it, whatever the order in which they were added
    before = bridge.blocks[layer].original_component.register_forward_pre_hook(enter, with_kwargs=True)
    stack.callback(before.remove)
    attach(stack, bridge, hook_name("attn_out", layer), write, "fwd")


def _is_resid_mid(name: str) -> bool:
    return name.endswith(".hook_resid_mid")


def _resid_mid_layer(bridge: Any, name: str) -> int:
    layer = layer_of(bridge, name)
    assert layer is not None
    return layer


def check_edit(name: str, old: Tensor, new: Any, version: int | None) -> None:
    if version is not None and old._version != version:
        raise ValueError(
            f"the edit at {name!r} changed its input in place; return a new tensor (tensor = tensor.clone() first)"
        )
    if not isinstance(new, Tensor):
        raise ValueError(
            f"the edit at {name!r} returned {type(new).__name__}; return a tensor of shape {tuple(old.shape)}"
        )
    if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
        raise ValueError(
            f"the edit at {name!r} returned {tuple(new.shape)} {new.dtype} on {new.device}; "
            f"the model expects {tuple(old.shape)} {old.dtype} on {old.device}"
        )
