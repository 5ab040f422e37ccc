"""Hook points by stable name: listing, reading, editing, differentiating, and forwards over a part of the model."""

from __future__ import annotations

from interp.hooks.edits import Edit, attach, editable, gradients, interventions, no_retained_graph, reads, taps
from interp.hooks.generating import generate
from interp.hooks.names import SITE_HOOKS, UnknownHook, hook_name, layer_of, names, resolve, resolve_many, stop_layer
from interp.hooks.runs import (
    PrefixCache,
    prefix_cache,
    run_from,
    run_suffix,
    run_until,
    skip_below,
    supports_prefix_reuse,
)

__all__ = [
    "SITE_HOOKS", "Edit", "PrefixCache", "UnknownHook", "attach", "editable", "generate", "gradients", "hook_name",
    "interventions", "layer_of", "names", "no_retained_graph", "prefix_cache", "reads", "resolve", "resolve_many",
    "run_from", "run_suffix", "run_until", "skip_below", "stop_layer", "supports_prefix_reuse", "taps",
]  # fmt: skip
