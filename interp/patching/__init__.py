"""Patching: replace activations of one run by those of another, and measure what changes."""

from __future__ import annotations

from interp.patching.activation import activation_patch
from interp.patching.causal_tracing import causal_trace
from interp.patching.effects import Effects

__all__ = ["Effects", "activation_patch", "causal_trace"]
