"""Matryoshka BatchTopK: nested dictionaries, of which every prefix has to rebuild the target by itself.

Early latents learn general features that later ones cannot take over, which counters absorption and splitting.

Sources: Bussmann et al. 2025 (arXiv 2503.17547), section 3; SAELens 6. The loss is the sum over prefixes of the squared
error, all with weight 1. dictionary_learning averages it instead, which makes the auxiliary loss as many times stronger
(`average=True`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.dictionaries._sparse import decode_active
from interp.dictionaries.allocation import Active
from interp.dictionaries.batch_topk import BatchTopKSAE


class MatryoshkaSAE(BatchTopKSAE):
    """`widths`: sizes of the prefixes, rising, the last being `n_latents`."""

    architecture = "matryoshka"

    def __init__(
        self, d_in: int, n_latents: int, *, widths: Sequence[int], average: bool = False, **options: Any
    ) -> None:
        widths = [int(width) for width in widths]
        if len(widths) < 2 or widths[0] < 1 or sorted(set(widths)) != widths or widths[-1] != n_latents:
            raise ValueError(f"widths={widths}; expected at least two rising sizes, the last being {n_latents}")
        super().__init__(d_in, n_latents, **options)
        self.widths, self.average = widths, average

    def _reconstructions(self, values: Tensor, active: Active, z: Tensor) -> list[Tensor]:
        sizes = [width - before for before, width in zip([0, *self.widths], self.widths, strict=False)]
        built: Any = self.b_dec + self._skipped(z)
        parts, start = [], 0
        for rows in self.W_dec.split(sizes):
            here = (active.latents >= start) & (active.latents < start + len(rows))
            inside = Active(active.tokens[here], active.latents[here] - start)
            built = built + decode_active(values[here], inside, len(z), rows)
            parts.append(built)
            start += len(rows)
        return parts

    def _joined(self, errors: Tensor) -> Tensor:
        return errors.mean() if self.average else errors.sum()


def prefix_widths(n_latents: int, fractions: Sequence[float] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)) -> list[int]:
    """Widths of groups that hold these shares of the latents (those of dictionary_learning), adding up to all."""
    edges = torch.tensor(list(fractions), dtype=torch.float64).cumsum(0)
    if not bool((edges > 0).all()) or abs(float(edges[-1]) - 1) > 1e-9:
        raise ValueError(f"fractions={list(fractions)} must be positive and add up to 1")
    return [*(int(round(float(edge) * n_latents)) for edge in edges[:-1]), n_latents]
