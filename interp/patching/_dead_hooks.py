"""Edits at hooks on which nothing depends, such as the input of an MLP whose weights are zero.

`interventions` refuses an edit that changes nothing on a probe, since a model that computes past a hook would silently
lose it. A part that is dead is no such case, and hand-set models have many. The graph tells the two apart: where a hook
is on the path there is a gradient, be it zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from interp import hooks
from interp.hooks.names import probe_tokens, without_hooks


@contextmanager
def edited(bridge: Any, edits: Mapping[str, hooks.Edit]) -> Iterator[None]:
    """As `hooks.interventions`, dead parts included. Raises ValueError where the model computes past a hook."""
    dead = [name for name in edits if not hooks.editable(bridge, name) and _on_path(bridge, name)]
    with (
        hooks.interventions(bridge, {name: fn for name, fn in edits.items() if name not in dead}),
        ExitStack() as stack,
    ):
        for name in dead:
            hooks.attach(stack, bridge, name, lambda tensor, *, hook, fn=edits[name]: fn(tensor), "fwd")
        yield


_paths: weakref.WeakKeyDictionary[Any, dict[str, bool]] = weakref.WeakKeyDictionary()


def _on_path(bridge: Any, name: str) -> bool:
    """Whether the logits are computed from the value at a hook, whatever they make of it."""
    known = _paths.setdefault(bridge, {})
    if name not in known:
        with without_hooks(bridge), torch.inference_mode(False), torch.enable_grad(), hooks.no_retained_graph(bridge):
            with hooks.taps(bridge, name) as found:
                logits = bridge(probe_tokens(bridge), use_cache=False)
            connected = logits.requires_grad
            if connected:
                connected = torch.autograd.grad(logits.sum(), found[name], allow_unused=True)[0] is not None
        known[name] = connected
    return known[name]
