"""What every statistic takes: arrays of examples and the options of a resampling, checked."""

from __future__ import annotations

from typing import Any

import numpy as np


def as_array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):  # a tensor: bfloat16 and CUDA ones have no NumPy form of their own
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def samples(values: Any, name: str) -> np.ndarray:
    array = as_array(values)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"{name} has shape {array.shape}; expected [..., example] with at least one example")
    if np.isinf(array).any():
        raise ValueError(f"{name} has {int(np.isinf(array).sum())} infinite values; a mean over them says nothing")
    return array


def check_options(confidence: float, n_resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}; a 95 % interval is confidence=0.95")
    if n_resamples < 1:
        raise ValueError(f"n_resamples must be at least 1, got {n_resamples}")
