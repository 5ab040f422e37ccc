"""What units write: their direct effects on logits, beside random directions, and the nearest other units."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.features import feature_directions
from interp.hooks import resolve
from interp.models import geometry
from interp.neurons._sides import unembedding

_STREAM = re.compile(r"^blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_attn_out|hook_mlp_out)$")
_NEURONS = re.compile(r"^blocks\.(\d+)\.mlp\.hook_post$")
_HEADS = re.compile(r"^blocks\.(\d+)\.attn\.hook_z$")
_N_RANDOM = 256
_ROOM = 2**24  # effects in memory at a time


def stream_directions(bridge: Any, hook: str, directions: Float[Tensor, "unit width"]) -> Float[Tensor, "unit d_model"]:
    """What directions at a hook add to the residual stream.

    Raises:
        ValueError: If the hook does not write to the stream by itself, or the width is not that of the hook.
    """
    resolve(bridge, hook)
    if match := _NEURONS.match(hook):
        return feature_directions(bridge, int(match[1]), directions)
    d_model = int(bridge.cfg.d_model)
    if match := _HEADS.match(hook):
        if geometry(bridge).post_norm:
            raise ValueError(f"{bridge.cfg.model_name} has a norm after attention, so that a vector at {hook!r} has no "
                             f"fixed direction in the stream; pass effects=False")  # fmt: skip
        weight = bridge.blocks[int(match[1])].attn.W_O.detach().reshape(-1, d_model)
    elif _STREAM.match(hook):
        weight = None
    else:
        raise ValueError(
            f"directions at {hook!r} are not written to the residual stream by themselves, so that they have no direct "
            f"effect on logits; those at hook_resid_*, hook_attn_out, hook_mlp_out, attn.hook_z and mlp.hook_post are. "
            f"Pass effects=False"
        )
    width = d_model if weight is None else len(weight)
    if directions.shape[1] != width:
        raise ValueError(f"directions are {tuple(directions.shape)} and {hook!r} has {width} numbers; expected "
                         f"[unit, {width}]")  # fmt: skip
    return directions.float() if weight is None else directions.to(weight) @ weight


class Effects:
    """Direct effects of units scaled to norm 1 at their hook, less the mean over the vocabulary, as `output_tokens`.

    Attributes:
        random: Median and 95th percentile of the largest effect of a random direction, in standard deviations of its
            effects over the vocabulary ("spreads").
        written: What each unit at norm 1 adds to the residual stream, [unit, d_model].
        moved: Whether that is another vector than its direction.
    """

    def __init__(self, bridge: Any, hook: str, directions: Tensor) -> None:
        self._columns = unembedding(bridge)
        self.written = stream_directions(bridge, hook, _unit(directions.detach()).to(self._columns.device))
        self._columns = self._columns.to(self.written.dtype)
        self.moved = not _STREAM.match(hook)
        noise = torch.randn(_N_RANDOM, directions.shape[1], generator=torch.Generator().manual_seed(0))
        self._random = stream_directions(bridge, hook, _unit(noise).to(directions))
        peaks = self._peaks().quantile(torch.tensor([0.5, 0.95], dtype=torch.float64))
        self.random = (float(peaks[0]), float(peaks[1]))

    @property
    def block(self) -> int:
        """How many units are worth asking for at a time."""
        return max(1, _ROOM // self._columns.shape[1])

    def of(self, units: Sequence[int], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits `[unit, side, rank]`, promoted and suppressed, their token ids, and the spread of each unit."""
        effects = self._centred(self.written[torch.as_tensor(list(units), device=self.written.device)])
        k = min(k, effects.shape[1])
        up, down = effects.topk(k, dim=1), effects.topk(k, dim=1, largest=False)
        values, ids = (torch.stack(pair, 1).cpu().numpy() for pair in zip(up, down, strict=True))
        return values, ids, effects.std(1).cpu().numpy()

    def _centred(self, written: Tensor) -> Tensor:
        effects = written.to(self._columns) @ self._columns
        return effects - effects.mean(1, keepdim=True)

    def _peaks(self) -> Tensor:
        found = []
        for part in self._random.split(min(self.block, _N_RANDOM)):
            effects = self._centred(part)
            found.append((effects.amax(1) / effects.std(1)).double().cpu())
        return torch.cat(found)


class Nearest:
    """Cosines between directions.

    Attributes:
        note: Which.
    """

    def __init__(self, directions: Tensor, effects: Effects | None) -> None:
        self.note = "Cosine with the directions of the others."
        if effects is not None and effects.moved:
            # sparse groups of neurons are orthogonal to most others; what they write is not
            directions, self.note = effects.written, "Cosine of what they write to the residual stream."
        self._directions = _unit(directions.detach().float())
        self._nothing = self._directions.norm(dim=1) < 0.5  # a direction of length zero is near to none

    def of(self, units: Sequence[int], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and numbers of the `k` nearest other units of each, [unit, rank]; NaN (-1) where there is none."""
        chosen = torch.as_tensor(list(units), device=self._directions.device)
        cosines = self._directions[chosen] @ self._directions.T
        cosines[torch.arange(len(chosen)), chosen] = -torch.inf
        cosines[:, self._nothing] = -torch.inf
        cosines[self._nothing[chosen]] = -torch.inf
        values, ids = cosines.topk(min(k, len(self._directions)), dim=1)
        gone = values.isinf()
        return values.masked_fill(gone, torch.nan).cpu().numpy(), ids.masked_fill(gone, -1).cpu().numpy()


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
