"""Activations [token, unit] read unit by unit, kept as their non-zero entries where most are zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

_SPARSE = 0.2  # below this share of entries that are not zero, an index per entry costs less than the zeros
_CHUNK = 256  # units multiplied with all others at a time


class Columns:
    """Activations of all units on all tokens.

    Attributes:
        n_tokens, n_units: Sizes.
        largest, smallest: [unit], over all tokens, zeros included.
        level: [unit], above which a unit counts as firing: `threshold` times its largest activation, at least 0.
        fires: [unit], on how many tokens it does.
        nonzero: [unit], how many entries are not zero.
    """

    def __init__(self, matrix: Any, threshold: float) -> None:
        self._matrix = matrix  # numpy's array or scipy's csc_matrix, whose types have little in common
        self.n_tokens, self.n_units = matrix.shape
        self._sparse = sparse.issparse(matrix)
        self.nonzero = np.diff(matrix.indptr) if self._sparse else (matrix != 0).sum(0)
        if self._sparse:
            self.largest = matrix.max(axis=0).toarray().ravel()
            self.smallest = matrix.min(axis=0).toarray().ravel()
        else:
            self.largest, self.smallest = matrix.max(0), matrix.min(0)
        self.level = threshold * self.largest.clip(min=0)
        self._firing = self._where_firing()
        self.fires = np.asarray(self._firing.sum(0)).ravel().astype(int)
        sums, squares = self._moments()
        self._mean = sums / self.n_tokens
        self._deviation = np.sqrt((squares / self.n_tokens - self._mean**2).clip(min=0))

    @classmethod
    def of(
        cls,
        values: Tensor,
        activations: Tensor | Callable[[Tensor], Tensor],
        *,
        threshold: float,
        batch_size: int,
    ) -> Columns:
        """From a matrix, or from what makes activations of rows of values, which then sees `batch_size` at a time."""
        parts, width, few = [], None, False
        for start in range(0, len(values), batch_size):
            rows = values[start : start + batch_size]
            with torch.no_grad():
                found = (
                    activations[start : start + batch_size] if isinstance(activations, Tensor) else activations(rows)
                )
            part = found.detach().float().cpu().numpy()
            if part.ndim != 2 or len(part) != len(rows) or width not in (None, part.shape[1]) or not part.shape[1]:
                raise ValueError(f"activations are {tuple(part.shape)} for {len(rows)} rows; expected [token, unit]")
            if not np.isfinite(part).all():
                row, unit = np.argwhere(~np.isfinite(part))[0]
                raise ValueError(f"the activation of unit {unit} on row {start + row} is {part[row, unit]}")
            few = np.count_nonzero(part) < _SPARSE * part.size if width is None else few
            width = part.shape[1]
            parts.append(sparse.csr_matrix(part) if few else part)
        return cls(sparse.vstack(parts, format="csc") if few else np.concatenate(parts), threshold)

    def entries(self, unit: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, ascending, and activations where the unit is not zero."""
        if self._sparse:
            span = slice(self._matrix.indptr[unit], self._matrix.indptr[unit + 1])
            return self._matrix.indices[span].astype(np.int64), self._matrix.data[span]
        column = self._matrix[:, unit]
        tokens = np.flatnonzero(column)
        return tokens, column[tokens]

    def block(self, units: Sequence[int]) -> np.ndarray:
        """[token, some], zeros written out."""
        chosen = self._matrix[:, list(units)]
        return chosen.toarray() if self._sparse else np.ascontiguousarray(chosen)

    def correlations(self, units: Sequence[int]) -> np.ndarray:
        """Pearson's correlation over tokens of some units with all, [some, unit]; NaN for constant ones."""
        chosen = list(units)
        inner = self._inner(self._matrix, chosen, np.float64)
        spread = self._deviation[chosen][:, None] * self._deviation
        # what rounding leaves of the deviation of a constant is not a deviation
        flat = 1e-6 * np.maximum(np.abs(self.largest), np.abs(self.smallest))
        known = (self._deviation > flat)[chosen][:, None] & (self._deviation > flat)
        centred = inner / self.n_tokens - self._mean[chosen][:, None] * self._mean
        return np.where(known, np.clip(centred / np.where(known, spread, 1), -1, 1), np.nan)

    def together(self, units: Sequence[int]) -> np.ndarray:
        """On how many tokens some units fire together with each of all, [some, unit]."""
        return np.rint(self._inner(self._firing, list(units), np.float32)).astype(int)

    def _inner(self, matrix: Any, chosen: list[int], dtype: type) -> np.ndarray:
        if self._sparse:
            return (matrix[:, chosen].T @ matrix).toarray().astype(np.float64)
        left = matrix[:, chosen].astype(dtype).T
        parts = [left @ matrix[:, at : at + _CHUNK].astype(dtype) for at in range(0, self.n_units, _CHUNK)]
        return np.concatenate(parts, 1)

    def _where_firing(self) -> Any:
        if not self._sparse:
            return self._matrix > self.level
        level = np.repeat(self.level, np.diff(self._matrix.indptr))
        data = (self._matrix.data > level).astype(np.float32)
        return sparse.csc_matrix((data, self._matrix.indices, self._matrix.indptr), shape=self._matrix.shape)

    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        if self._sparse:
            data = self._matrix.astype(np.float64)
            return np.asarray(data.sum(0)).ravel(), np.asarray(data.power(2).sum(0)).ravel()
        sums, squares = np.zeros(self.n_units), np.zeros(self.n_units)
        for start in range(0, self.n_tokens, 4096):  # float64 of all rows at once would be twice the data
            part = self._matrix[start : start + 4096].astype(np.float64)
            sums += part.sum(0)
            squares += np.square(part).sum(0)
        return sums, squares
