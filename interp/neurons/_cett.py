"""How much of an MLP's output the neurons below a threshold carry, and the threshold that leaves a given part out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from interp.cache import capture
from interp.hooks import hook_name
from interp.hooks.edits import Edit
from interp.neurons._sides import side_vectors

GRID = 1024
"""Thresholds tried per layer: the quantiles of the magnitudes at steps of 1/1024, from 0 to the largest."""


class Tails:
    """The neurons of one layer on some tokens, split by magnitude |a_i| * ||W_out[i]||.

    CETT, the cumulative error of tail truncation, of a threshold: the length of what the neurons at or below it write
    together, over the length of what all write, mean over tokens. 0 where only exact zeros are left out, 1 where
    everything is.
    """

    def __init__(self, acts: Tensor, values: Tensor) -> None:
        self.acts, self.values = acts.float(), values.float()  # [token, neuron], [neuron, d_model]
        self.magnitudes = self.acts.abs() * self.values.norm(dim=1)
        self.total = (self.acts @ self.values).norm(dim=1)
        flat = self.magnitudes.flatten()
        flat = flat[:: max(1, flat.numel() // 2**22)].sort().values
        ranks = (torch.arange(1, GRID + 1) * len(flat) / GRID).ceil().long() - 1
        # a hair above what was seen, so that the last bit of a magnitude never decides
        self.grid = torch.cat([torch.zeros(1), flat[ranks][:-1], self.magnitudes.max().reshape(1)]) * (1 + 1e-5)
        self.known: dict[int, float] = {}

    def error(self, at: int) -> float:
        """CETT of the threshold `grid[at]`."""
        if at not in self.known:
            left_out = torch.where(self.magnitudes <= self.grid[at], self.acts, 0.0)
            part = (left_out @ self.values).norm(dim=1)
            self.known[at] = float((part / self.total.clamp_min(1e-30)).mean())
        return self.known[at]

    def threshold(self, level: float) -> tuple[float, float]:
        """The largest threshold of the grid that a bisection finds with CETT up to `level`, and that CETT."""
        low, high = 0, GRID
        if self.error(high) <= level + 1e-6:
            return float(self.grid[high]), self.error(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.error(middle) <= level else (low, middle)
        return float(self.grid[low]), self.error(low)

    def falls(self) -> float:
        """The largest fall of CETT between thresholds tried, from a lower to a higher one: bisection assumes 0."""
        tried = [self.known[at] for at in sorted(self.known)]
        return max((before - after for before, after in zip(tried, tried[1:], strict=False)), default=0.0)


def tails_of(bridge: Any, tokens: Tensor, kept: Tensor, batch_size: int) -> dict[int, Tails]:
    """Every layer's neurons on the kept tokens. One forward."""
    n_layers = int(bridge.cfg.n_layers)
    hooks = [hook_name("neuron", layer) for layer in range(n_layers)]
    values = [side_vectors(bridge, layer, "out", fold=False).float().cpu() for layer in range(n_layers)]
    parts: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for start in range(0, len(tokens), batch_size):
        part = slice(start, start + batch_size)
        for hook, acts in capture(bridge, tokens[part], hooks, device="cpu").items():
            parts[hook].append(acts[kept[part]].float())
    return {layer: Tails(torch.cat(parts[hook]), values[layer]) for layer, hook in enumerate(hooks)}


def truncation(bridge: Any, thresholds: Mapping[int, float], notes: dict[int, Tensor] | None = None) -> dict[str, Edit]:
    """Edits that set the neurons whose magnitude is at or below their layer's threshold to zero.

    `notes` is filled with the share of neurons left on by layer, `[batch, pos]`, in every forward.
    """
    edits: dict[str, Edit] = {}
    for layer, threshold in thresholds.items():
        lengths = side_vectors(bridge, layer, "out", fold=False).float().norm(dim=1)

        def cut(acts: Tensor, _lengths: Tensor = lengths, _threshold: float = threshold, _layer: int = layer) -> Tensor:
            on = acts.float().abs() * _lengths > _threshold
            if notes is not None:
                notes[_layer] = on.float().mean(-1).cpu()
            return torch.where(on, acts, torch.zeros_like(acts))

        edits[hook_name("neuron", layer)] = cut
    return edits
