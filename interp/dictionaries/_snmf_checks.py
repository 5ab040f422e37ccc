"""Settings and starts of SNMF that cannot be honoured, refused before any work."""

from __future__ import annotations

import torch
from torch import Tensor


def check_settings(
    counts: dict[str, int | None],
    sparsity: float | int,
    init: str | Tensor,
    repair: bool | None,
    restarts: int,
    explore: int | None,
    penalty: float | int | None,
    mode: str,
    dtype: torch.dtype | None,
) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if explore is not None and explore < 0:
        raise ValueError(f"explore must be at least 0, got {explore}")
    if penalty is not None and not 0.0 <= penalty < float("inf"):
        raise ValueError(f"penalty must be at least 0 and finite, got {penalty}")
    batch_size = counts["batch_size"]
    if not 0.0 < sparsity <= 1.0:
        raise ValueError(f"sparsity is the share of neurons that a component keeps, in (0, 1]; got {sparsity}")
    if not isinstance(init, Tensor) and init not in ("kmeans", "svd", "random"):
        raise ValueError(f"init must be 'kmeans', 'svd', 'random' or activations [token, component], got {init!r}")
    if mode not in ("standard", "official"):
        raise ValueError(f"mode must be 'standard' or 'official', got {mode!r}")
    if mode == "official" and repair:
        raise ValueError("the released algorithm has no repair; use mode='standard', or repair=False")
    if mode == "official" and penalty:
        raise ValueError(f"the released algorithm has no penalty, got {penalty}; use mode='standard', or penalty=None")
    if mode == "official" and explore is not None:
        raise ValueError(
            f"the released algorithm has one rule throughout and no change after explore={explore} iterations; "
            f"use mode='standard', or explore=None"
        )
    if mode == "official" and batch_size is not None:
        raise ValueError("the released algorithm has no minibatches; use mode='standard', or batch_size=None")
    if isinstance(init, Tensor) and (restarts > 1 or batch_size is not None):
        raise ValueError("one given start allows neither restarts nor batch_size; use a named init")
    if dtype not in (None, torch.float32, torch.float64):
        raise ValueError(f"SNMF computes in float32 or float64, not {dtype}")


def check_explore(explore: int | None, iterations: int, where: str) -> None:
    if explore is not None and explore > iterations:
        raise ValueError(f"explore is {explore}, but {where}; give explore={iterations} for no block updates there")


def check_start(init: Tensor, expected: tuple[int, int]) -> None:
    if tuple(init.shape) != expected:
        raise ValueError(f"init has shape {tuple(init.shape)}; these data need [token, component] = {expected}")
    if not bool((init >= 0).all()):
        raise ValueError(f"init holds activations and must be at least 0; its smallest value is {float(init.min())}")
