"""Activations in memory (`capture`), on disk (`harvest`, planned by `estimate`) and back (`ActivationStore`)."""

from __future__ import annotations

from interp.cache._manifest import StoreError
from interp.cache.capture import capture
from interp.cache.estimate import Estimate, estimate
from interp.cache.harvest import harvest
from interp.cache.store import ActivationStore, Column, VerifyReport

__all__ = ["ActivationStore", "Column", "Estimate", "StoreError", "VerifyReport", "capture", "estimate", "harvest"]
