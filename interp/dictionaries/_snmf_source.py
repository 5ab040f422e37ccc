"""Where activations come from: a matrix, or a hook of a store; rows are checked as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.cache import ActivationStore, Column


@dataclass
class Source:
    """Rows of a matrix or of a hook of a store, checked as they are read."""

    given: Tensor | Column
    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    provenance: dict[str, Any] = field(default_factory=dict)
    total: float = 0.0

    @classmethod
    def of(
        cls, given: Tensor | tuple[ActivationStore, str], device: str | torch.device | None, dtype: torch.dtype | None
    ) -> Source:
        if isinstance(given, tuple):
            store, hook = given
            column = store[hook]  # the store says which hooks it has
            shape = (len(column), torch.Size(column.row_shape).numel())
            provenance = {**store.provenance, "hook": hook}
            return cls(column, shape, torch.device(device or "cpu"), dtype or _computed_in(column.dtype), provenance)
        if given.ndim != 2:
            raise ValueError(
                f"SNMF factorises a matrix [token, neuron], got shape {tuple(given.shape)}; for [batch, pos, neuron] "
                f"leave out BOS and padding, then A = acts[:, 1:].reshape(-1, acts.shape[-1])"
            )
        if not given.is_floating_point():
            raise ValueError(f"SNMF factorises floating-point activations, got {given.dtype}; use A.float()")
        shape = (given.shape[0], given.shape[1])
        return cls(given, shape, torch.device(device or given.device), dtype or _computed_in(given.dtype))

    def rows(self, part: slice | Tensor = slice(None)) -> Float[Tensor, "token neuron"]:
        taken = self.given[part]
        rows = taken.reshape(len(taken), -1).detach().to(self.device, self.dtype)
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(
                f"{int((~torch.isfinite(rows)).sum())} activations are NaN or infinite; leave their rows out"
            )
        return rows

    def batches(self, size: int) -> Iterator[tuple[slice, Float[Tensor, "token neuron"]]]:
        for start in range(0, self.shape[0], size):
            part = slice(start, min(start + size, self.shape[0]))
            yield part, self.rows(part)

    def check(self, total: float) -> None:
        if not total > 0.0:
            raise ValueError(
                f"all {self.shape[0]} x {self.shape[1]} activations are zero; there is nothing to factorise"
            )


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
