"""Stable hook names: what each site is called, which names are alive on a model, and directed errors for the rest.

A bridge lists hook points that never fire on its family (`attn.qkv.hook_in` on GPT-2, `hook_rot_q` on NeoX). Which ones
fire is found by one forward over three tokens, once per bridge and set of flags, and only those are ever shown or
accepted.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.types import Site

SITE_HOOKS: dict[Site, str] = {
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "z": "blocks.{layer}.attn.hook_z",
    "q": "blocks.{layer}.attn.hook_q",
    "k": "blocks.{layer}.attn.hook_k",
    "v": "blocks.{layer}.attn.hook_v",
    "pattern": "blocks.{layer}.attn.hook_pattern",
    "neuron": "blocks.{layer}.mlp.hook_post",
}
"""Site to hook name. Shapes, with `kv` the key-value heads of grouped models: residual sites and `attn_out`, `mlp_out`
[batch, pos, d_model]; `z`, `q` [batch, pos, head, d_head]; `k`, `v` [batch, pos, kv_head, d_head]; `pattern`
[batch, head, dest, src]; `neuron` [batch, pos, d_mlp]."""

_FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")
_GATES = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
}
_HOOK_LISTS = ("_forward_hooks", "_backward_hooks", "fwd_hooks", "bwd_hooks")  # torch's and TransformerLens' own
_BLOCK = re.compile(r"^blocks\.(\d+)\.")


class UnknownHook(KeyError):
    """A hook name that cannot be used on this model; the message says why and what to use."""

    def __str__(self) -> str:  # KeyError would show the message's repr
        return str(self.args[0])


def hook_name(site: Site, layer: int) -> str:
    """The hook name of a site in a layer, e.g. `hook_name("z", 3) == "blocks.3.attn.hook_z"`."""
    if site not in SITE_HOOKS:
        raise UnknownHook(f"no site {site!r}; the sites are {', '.join(SITE_HOOKS)}")
    return SITE_HOOKS[site].format(layer=layer)


def names(bridge: Any, pattern: str = "*") -> list[str]:
    """Names of all hook points that fire on this model, aliases included, that match a glob such as `"*attn*"`."""
    return [name for name in _live(bridge).points if fnmatch.fnmatchcase(name, pattern)]


def resolve(bridge: Any, name: str) -> str:
    """The name itself, once it is known to fire on this model.

    Raises:
        UnknownHook: (a KeyError) If there is no such hook point, it never fires here, or a flag of the bridge switches
            it off; the message says which, and what to use instead.
    """
    live = _live(bridge)
    if name not in live.points:
        raise UnknownHook(_why_not(bridge, name, live))
    return name


def resolve_many(bridge: Any, selector: str | Sequence[str] | Callable[[str], bool]) -> list[str]:
    """Hook names from a name, a glob, a list of either, or a predicate; one name per hook point, in forward order.

    Raises:
        UnknownHook: (a KeyError) If a name is unknown (see `resolve`), or a glob or the predicate selects nothing.
    """
    live = _live(bridge)
    if callable(selector):
        chosen = [name for name in live.points if selector(name)]
        if not chosen:
            raise UnknownHook(
                f"the predicate selects none of the {len(live.points)} hook names of this model ({_model(bridge)})"
            )
    else:
        chosen = []
        for entry in [selector] if isinstance(selector, str) else selector:
            if any(character in entry for character in "*?["):
                found = fnmatch.filter(live.points, entry)
                if not found:
                    raise UnknownHook(
                        f"no hook name of this model ({_model(bridge)}) matches {entry!r}; "
                        f"list them with interp.hooks.names(bridge)"
                    )
                chosen += found
            else:
                chosen.append(resolve(bridge, entry))
    unique: dict[int, str] = {}
    for name in chosen:  # an alias and its canonical name are one hook point: keep the first spelling
        unique.setdefault(id(live.points[name]), name)
    return sorted(unique.values(), key=lambda name: live.order[id(live.points[name])])


def layer_of(bridge: Any, name: str) -> int | None:
    """The block a hook belongs to: `l` inside block l, -1 for the embeddings, `n_layers` after the last block, else
    None."""
    if match := _BLOCK.match(name):
        return int(match[1])
    root = name.split(".")[0]
    if root in ("embed", "pos_embed", "embed_ln", "rotary_emb", "hook_embed", "hook_pos_embed"):
        return -1
    return int(bridge.cfg.n_layers) if root in ("ln_final", "unembed", "hook_unembed") else None


def stop_layer(bridge: Any, selected: Sequence[str]) -> int | None:
    """The lowest layer that `run_until` can stop at with all these hooks fired; None if the final norm or unembedding
    is needed."""
    n_layers = int(bridge.cfg.n_layers)
    needed = 0
    for name in selected:
        layer = layer_of(bridge, name)
        if layer is None or layer >= n_layers:
            return None
        entrance = name.endswith((f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_in"))
        needed = max(needed, layer if entrance else layer + 1)
    return needed


@dataclass(frozen=True)
class _Live:
    """The hook points that fired: every spelling of their names, and the order in which they fired."""

    flags: tuple[Any, ...]
    points: dict[str, Any]
    order: dict[int, int]
    logits: Tensor  # of the probe, for `editable`
    editable: dict[str, bool]  # by kind of hook, filled on first use
    block_outputs: int  # length of the tuple that a block returns, 0 if it returns a bare tensor


_cache: weakref.WeakKeyDictionary[Any, _Live] = weakref.WeakKeyDictionary()


def _live(bridge: Any) -> _Live:
    flags = (bool(bridge.compatibility_mode), *(bool(getattr(bridge.cfg, flag, False)) for flag in _FLAGS))
    known = _cache.get(bridge)
    if known is None or known.flags != flags:
        known = _cache[bridge] = _probe(bridge, flags)
    return known


def _probe(bridge: Any, flags: tuple[Any, ...]) -> _Live:
    spellings: dict[str, Any] = bridge.hook_dict
    order: dict[int, int] = {}
    returned: list[int] = []

    def note_type(_block: Any, _inputs: Any, output: Any) -> None:
        returned.append(len(output) if isinstance(output, tuple) else 0)

    with without_hooks(bridge):
        logits = bridge(probe_tokens(bridge))

    def note(key: int) -> Callable[..., None]:
        def first_time(_tensor: Tensor, *, hook: Any) -> None:
            order.setdefault(key, len(order))

        return first_time

    with without_hooks(bridge), ExitStack() as stack:
        stack.callback(bridge.blocks[0].register_forward_hook(note_type).remove)
        for point in {id(point): point for point in spellings.values()}.values():
            # add_hook and not torch's own: some families compute an activation only for a hook that is listed
            point.add_hook(note(id(point)))
        bridge(probe_tokens(bridge))
    firing = {name: point for name, point in spellings.items() if id(point) in order}
    ordered = sorted(firing, key=lambda name: (order[id(firing[name])], name))
    return _Live(flags, {name: firing[name] for name in ordered}, order, logits, {}, returned[0])


@contextmanager
def without_hooks(bridge: Any) -> Iterator[None]:
    """Set the hooks of the model aside for a probe: no gradient, no random numbers drawn, everything put back.

    Permanent hooks stay: TransformerLens wires some hook points (OPT's `mlp.hook_out`) to others with them.
    """
    points = list(bridge.hook_points())
    kept = [(point, {name: copy.copy(getattr(point, name)) for name in _HOOK_LISTS}) for point in points]
    device = device_of(bridge)
    try:
        for point in points:
            for handle in [*point.fwd_hooks, *point.bwd_hooks]:
                if not handle.is_permanent:
                    point._forward_hooks.pop(handle.hook.id, None)
                    point._backward_hooks.pop(handle.hook.id, None)
            for handles in (point.fwd_hooks, point.bwd_hooks):
                handles[:] = [handle for handle in handles if handle.is_permanent]
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for point, before in kept:
            for name, hooks in before.items():
                now = getattr(point, name)
                now.clear()
                now.update(hooks) if isinstance(hooks, dict) else now.extend(hooks)


def device_of(bridge: Any) -> torch.device:
    """Where the parameters are; `bridge.cfg.device` only says where they were meant to be."""
    return next(iter(bridge.original_model.parameters())).device


def probe_tokens(bridge: Any, pos: int = 3) -> Tensor:
    """A row of distinct small token ids [1, pos] on the model's device."""
    return (torch.arange(pos, device=device_of(bridge)) % int(bridge.cfg.d_vocab)).unsqueeze(0)


def block_outputs(bridge: Any) -> int:
    """The length of the tuple that a block of this model returns, 0 if it returns the residual stream alone."""
    return _live(bridge).block_outputs


def hook_point(bridge: Any, name: str) -> Any:
    """The hook point behind a valid name."""
    return _live(bridge).points[resolve(bridge, name)]


def probed_edit(bridge: Any, name: str, run: Callable[[], Tensor]) -> bool:
    """Whether `run()`, the probe's forward with the hook's value replaced by noise, gives other logits. Once per kind
    of hook."""
    live = _live(bridge)
    kind = _BLOCK.sub("blocks.*.", name)
    if kind not in live.editable:
        with without_hooks(bridge), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TransformerLens warns of the edits it discards; here that is the answer
            live.editable[kind] = not torch.equal(run(), live.logits)
    return live.editable[kind]


def _model(bridge: Any) -> str:
    return f"{bridge.cfg.model_name}, {bridge.cfg.n_layers} layers"


def _why_not(bridge: Any, name: str, live: _Live) -> str:
    """The message for a name that cannot be used: what is wrong, what is meant, where to look."""
    head = f"no hook point {name!r} on this model ({_model(bridge)})."
    match = _BLOCK.match(name)
    if match and int(match[1]) >= int(bridge.cfg.n_layers):
        return f"{head} Its blocks are numbered 0 to {int(bridge.cfg.n_layers) - 1}."
    last = name.rsplit(".", 1)[-1]
    if last == "hook_resid_mid" and f"blocks.{match[1] if match else 0}.hook_resid_pre" in live.points:
        return (
            f"{head} Attention and MLP run in parallel here, so no residual stream exists between them; "
            f"use hook_resid_pre or hook_resid_post."
        )
    flag = _GATES.get(last)
    if flag is not None and not getattr(bridge.cfg, flag, False):
        return f"{head} It is switched off; call bridge.set_{flag}(True) first."
    near = difflib.get_close_matches(name, live.points, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    if name in bridge.hook_dict:
        head = f"the hook point {name!r} exists but never fires on this model ({_model(bridge)})."
    glob = f"{near[0].rsplit('.', 1)[0]}.*" if near and "." in near[0] else "*"
    return f'{head}{hint} List them with interp.hooks.names(bridge, "{glob}").'
