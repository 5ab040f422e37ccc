"""Patching: replace activations of one run by those of another, and measure or estimate what changes."""

from __future__ import annotations

from interp.patching.activation import activation_patch
from interp.patching.agreement import Agreement, agreement
from interp.patching.attribution import attribution_patch
from interp.patching.causal_tracing import causal_trace
from interp.patching.conservation import Conservation, conservation
from interp.patching.coverage import UnsupportedModule, rule_coverage
from interp.patching.effects import Effects
from interp.patching.miss_bound import MissBound, miss_bound
from interp.patching.rules import PRESETS, Rules, backward_rules
from interp.patching.tables import agreement_table
from interp.patching.verification import PoorApproximation, Verification, verify

__all__ = [
    "PRESETS", "Agreement", "Conservation", "Effects", "MissBound", "PoorApproximation", "Rules", "UnsupportedModule",
    "Verification", "activation_patch", "agreement", "agreement_table", "attribution_patch", "backward_rules",
    "causal_trace", "conservation", "miss_bound", "rule_coverage", "verify",
]  # fmt: skip
