"""Patching: replace activations of one run by those of another, and measure or estimate what changes."""

from __future__ import annotations

from interp.patching.activation import activation_patch
from interp.patching.causal_tracing import causal_trace
from interp.patching.conservation import Conservation, conservation
from interp.patching.coverage import UnsupportedModule, rule_coverage
from interp.patching.effects import Effects
from interp.patching.rules import PRESETS, Rules, backward_rules

__all__ = [
    "PRESETS", "Conservation", "Effects", "Rules", "UnsupportedModule", "activation_patch", "backward_rules",
    "causal_trace", "conservation", "rule_coverage",
]  # fmt: skip
