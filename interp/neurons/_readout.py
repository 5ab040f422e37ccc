"""Vectors and tokens brought into the form whose plain products are the scores of a decode."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.neurons._sides import Unembedding
from interp.neurons._tiling import Tiling, moments

Score = Literal["cosine", "centred_cosine", "dot", "unit", "logit", "prob"]
SCORES: tuple[Score, ...] = get_args(Score)
LOGITS: tuple[Score, ...] = ("logit", "prob")
"""Scores that have a scale and a log of the sum of exponentials."""

_SHORT = 1e-6  # of the longest: a vector this short is what rounding leaves of nothing
_BLOCK = 4096


class Readout:
    """The unembedding as a score compares vectors with it.

    The prepared columns are kept if they fit into `room` bytes, and made again for every layer otherwise.

    Attributes:
        kept: Bytes of the columns that are kept.
    """

    def __init__(
        self, bridge: Any, score: Score, *, fold: bool, scale: float | int | None, dtype: torch.dtype, room: int
    ) -> None:
        self._unembedding = Unembedding(bridge, fold=fold)
        self.d_model, self.d_vocab = self._unembedding.d_model, self._unembedding.d_vocab
        self.fold, self.centres = fold, self._unembedding.centres
        self.device, self.dtype, self.score = self._unembedding.device, dtype, score
        self.scale = math.sqrt(self.d_model) if scale is None else float(scale)
        self._block = max(1, min(_BLOCK, room // (16 * self.d_model)))
        self._mean, self._floor = self._survey(bridge)
        self.kept, self._whole = 0, None
        size = self.d_model * self.d_vocab * dtype.itemsize
        if size <= room:
            whole = torch.empty(self.d_vocab, self.d_model, dtype=dtype, device=self.device)  # blocks lie together
            for start in range(0, self.d_vocab, self._block):
                stop = min(start + self._block, self.d_vocab)
                whole[start:stop] = self._prepared(start, stop).T
            self.kept, self._whole = size, whole

    def columns(self, start: int, stop: int) -> Float[Tensor, "d_model some"]:
        return self._prepared(start, stop) if self._whole is None else self._whole[start:stop].T

    def rows(
        self, vectors: Float[Tensor, "neuron d_model"]
    ) -> tuple[Float[Tensor, "neuron d_model"], Float[Tensor, " neuron"], Bool[Tensor, " neuron"]]:
        """The vectors ready for the product, their norms, and which of them are too short to have a direction."""
        norms = vectors.double().norm(dim=1)
        nothing = norms <= _SHORT * norms.max()
        rows = vectors.masked_fill(nothing[:, None], 0)
        if self.score != "dot":
            size = self.scale if self.score in LOGITS else 1.0
            rows = rows * (size / norms.masked_fill(nothing, 1))[:, None].to(rows)
        return rows.to(self.dtype), norms.float(), nothing

    def moments(self, tiling: Tiling) -> tuple[Tensor, Tensor]:
        return moments(self.columns, self.d_vocab, tiling=tiling)

    def _prepared(self, start: int, stop: int) -> Tensor:
        found = self._unembedding.columns(start, stop).float()
        if self.score == "centred_cosine":
            found = found - self._mean.float()[:, None]
        if self.score in ("cosine", "centred_cosine"):
            norms = found.norm(dim=0)
            found = torch.where(norms > self._floor, found / norms, 0.0)
        return found.to(self.dtype)

    def _survey(self, bridge: Any) -> tuple[Tensor, float]:
        """The mean column, and the length below which a column counts as nothing."""
        total = torch.zeros(self.d_model, dtype=torch.float64, device=self.device)
        longest, bad = 0.0, 0
        for start in range(0, self.d_vocab, self._block):
            found = self._unembedding.columns(start, min(start + self._block, self.d_vocab))
            norms = found.norm(dim=0)
            bad += int((~norms.isfinite()).sum())
            total += found.sum(1, dtype=torch.float64)
            longest = max(longest, float(norms.max()))
        if bad:
            raise ValueError(f"the unembedding of {bridge.cfg.model_name} has NaN or infinite values in the columns of "
                             f"{bad} of {self.d_vocab} tokens, which no score can rank")  # fmt: skip
        return total / self.d_vocab, _SHORT * longest
