"""Integrated gradients between two activations, one dictionary at a time: runs in which a single activation lies on the
line from what it is to what goes in, and everything above follows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interp import hooks
from interp.patching._backward import Graph, Key, Runner, wide
from interp.patching._latent_sites import LatentSite
from interp.patching._passes import START, Passes, Scores


@dataclass(frozen=True)
class LinePasses(Passes):
    """Passes whose coefficients are mean gradients along lines; `where` is empty and `line` is set.

    The latents f and the error of a dictionary move together, each along its own line. As what is rebuilt is affine in
    them, the activation itself moves along the line between its two ends, so that no encoder is run on the way.
    """

    @property
    def keys(self) -> tuple[Key, ...]:
        """What is rebuilt, and the streams that enter the blocks in which that is."""
        streams: dict[Key, None] = {("resid_pre", place.layer): None for place, _ in self.latents}
        return tuple({START: None, **streams, **{place.key: None for place, _ in self.latents}})

    @property
    def cost(self) -> dict[str, int]:
        """Passes of all examples. Blocks below a dictionary are not run again, which is not counted here."""
        assert self.line is not None
        points = len(self.latents) * len(self.line[0])
        return {"forwards": 2 + points, "backwards": points}

    def _chunk(self, runner: Runner, rows: Tensor, at_once: int, means: dict[Key, Tensor], scores: Scores) -> None:
        other: Graph | None = None
        if self.value != "mean":
            wanted = (self.keys, self.inputs) if self.value == "swap" else ((), ())
            other = runner.plain(self.other[rows], rows, *wanted)
            scores.other[rows] = other.scores.to(scores.other)
        base = runner.plain(self.base[rows], rows, extra=self.inputs)
        scores.base[rows] = base.scores.to(scores.base)
        for (place, where), moved in zip(self.latents, self._latent_changes(base, other, means), strict=True):
            end = self._end(place, base, other, means)
            gradient = self._along_activation(runner, rows, place, base, end, at_once)
            units = place.scores(moved, gradient, together=where.units is None)
            found = torch.einsum("srp,rpu->sur", where.spots[:, rows].to(units), units)
            scores.values[place.dictionary][0, ..., rows] = found.to(scores.values[place.dictionary])

    def _end(self, place: LatentSite, base: Graph, other: Graph | None, means: dict[Key, Tensor]) -> Tensor:
        """The activation at the far end of the line."""
        own = base.values[place.key]
        if other is None:
            return means[place.key].expand_as(own)
        if self.value == "swap":
            return other.values[place.key]
        x = base.extra[place.hook].flatten(2)
        with torch.no_grad():
            return place.dictionary.decode(torch.zeros_like(place.encode(x)), x).reshape(own.shape)

    def _along_activation(
        self, runner: Runner, rows: Tensor, place: LatentSite, base: Graph, end: Tensor, at_once: int
    ) -> Tensor:
        """Weighted mean of the gradients at the activation, over the points of the line."""
        assert self.line is not None
        only = replace(runner, keys=(place.key,))
        own, stream = wide(base.values[place.key]), base.values["resid_pre", place.layer]
        total: Any = 0
        points = torch.tensor(self.line[0], dtype=torch.float64).split(at_once)
        weights = torch.tensor(self.line[1], dtype=torch.float64).split(at_once)
        for point, weight in zip(points, weights, strict=True):
            along = point.to(own).view(-1, *[1] * own.ndim)
            moved = torch.lerp(own.unsqueeze(0), wide(end).unsqueeze(0), along).flatten(0, 1)
            moved = moved.to(base.values[place.key].dtype)
            start = stream.repeat(len(point), *[1] * (stream.ndim - 1))
            with hooks.interventions(self.bridge, {place.target: lambda _, _new=moved: _new}):
                graph = only.graph(start, rows.repeat(len(point)), layer=place.layer)
            found, _ = graph.gradients(weight.repeat_interleave(len(rows)))
            total = total + wide(found[place.key]).unflatten(0, (len(point), -1)).sum(0)
        return total
