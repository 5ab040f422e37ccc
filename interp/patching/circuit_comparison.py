"""How far a circuit can be trusted: whether other prompts give the same one, and whether it is the known one."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import torch
import xarray as xr
from scipy.stats import rankdata
from torch import Tensor

from interp.patching._cells import choice
from interp.patching.circuits import Circuit, Selection, edges_of, ranking, supports
from interp.patching.edge_scores import EdgeScores
from interp.patching.graph import Graph
from interp.results import Result, labelled
from interp.stats import Interval

STABLE = 0.8
"""Mean Jaccard overlap across resamples below which a circuit is called unstable."""


class UnstableCircuit(UserWarning):
    """Other prompts of the same kind would have given another circuit."""


@dataclass(frozen=True, eq=False, repr=False)
class CircuitStability(Result):
    """Overlap of the circuits that resamples of the examples give, `values` (size, bound).

    Jaccard overlap (edges in both over edges in either) of every pair of resamples: its mean (`estimate`), and the
    percentiles of the pairs (`low`, `high`).

    Attributes:
        frequency: How often each edge was selected, as a share of the resamples, (size, writer, reader).
        n_resamples: Resamples of the examples.
    """

    frequency: xr.DataArray
    n_resamples: int

    @property
    def graph(self) -> Graph:
        """The graph of the circuits."""
        return Graph(**self.provenance["graph"])

    def core(self, share: float | int = 0.95) -> dict[int, Circuit]:
        """The edges selected in at least this share of the resamples, by size asked for."""
        exists = self.graph.exists
        return {
            int(size): Circuit(self.graph, exists & torch.tensor(self.frequency.sel(size=size).values >= share - 1e-6))
            for size in self.values["size"].values
        }

    def plot(self) -> Any:
        """Figure of the mean overlap over size with the percentiles of pairs, and a line at 0.8."""
        from interp.plotting import lines

        table: Any = self.values.to_pandas()
        frame = table.reset_index()
        frame = frame[frame["size"] > 0]
        return lines(
            frame, x="size", y="estimate", interval=("low", "high"), title="Overlap of circuits across resamples",
            unit="Jaccard overlap", x_title="edges asked for", reference=STABLE, log_x=len(frame) > 1,
        )  # fmt: skip


def circuit_stability(
    scores: EdgeScores,
    sizes: Sequence[float | int],
    *,
    how: Selection = "top",
    absolute: bool = True,
    prune: bool = True,
    n_resamples: int = 100,
    level: float = 0.95,
    seed: int = 0,
) -> CircuitStability:
    """Whether other prompts of the kind would give the same circuits: select them on resamples of the examples.

    Every resample draws as many examples with replacement, averages their scores and selects circuits as
    `select_circuit` does. No forward. Warns (`UnstableCircuit`) where the mean overlap is below 0.8.

    Args:
        scores: Of `edge_attribution`, with at least two examples.
        sizes: Numbers of edges or shares of all, as for `select_circuit`.
        n_resamples: At least 2; published recommendations ask for 100.

    Raises:
        ValueError: If there are fewer than two examples or resamples, or an option is out of range.

    Source:
        Bootstrap stability of circuits: arXiv:2510.00845, whose bar of 0.8 over 100 resamples this is. Overlap between
        resamples is lower than between independent sets of as many prompts where scores are noisy: each resample holds
        about two thirds of the examples.
    """
    choice("how", how, get_args(Selection))
    n = scores.values.sizes["example"]
    if n < 2 or n_resamples < 2:
        raise ValueError(f"stability needs at least 2 examples and 2 resamples, got {n} and {n_resamples}")
    graph, _ = supports(scores, absolute=absolute)
    counts = [edges_of(size, graph) for size in sizes]
    if not counts or len(set(counts)) < len(counts):
        raise ValueError(f"sizes={list(sizes)} stand for {counts} edges; give at least one size, and none twice")
    selected = np.zeros((len(counts), n_resamples, graph.exists.numel()), dtype=bool)
    for i, weights in enumerate(_resamples(n, n_resamples, seed)):
        support = _resampled(scores, weights, absolute)
        order = torch.tensor(ranking(graph, support, how))
        for j, count in enumerate(counts):
            mask = torch.zeros(graph.exists.numel(), dtype=torch.bool)
            mask[order[:count]] = True
            circuit = Circuit(graph, mask.view(graph.exists.shape))
            selected[j, i] = (circuit.pruned() if prune else circuit).mask.flatten().numpy()
    pairs = [_pairs(of_size) for of_size in selected]
    tail = [(1 - level) / 2, (1 + level) / 2]
    table = np.stack([[overlap.mean(), *np.quantile(overlap, tail)] for overlap in pairs])
    if (low := table[:, 0] < STABLE).any():
        listed = ", ".join(f"{table[j, 0]:.2f} at {counts[j]} edges" for j in np.flatnonzero(low))
        warnings.warn(
            f"circuits from resampled prompts overlap by {listed} (Jaccard, mean of pairs), below {STABLE}: other "
            "prompts of this kind give other circuits. Use more prompts, or report only the edges of .core()",
            UnstableCircuit,
            stacklevel=2,
        )
    frequency = selected.mean(1).reshape(len(counts), *graph.exists.shape)
    coords = {"size": counts, "writer": list(graph.writers), "reader": list(graph.readers)}
    settings = {"how": how, "absolute": absolute, "prune": prune, "seed": seed, "level": level, "n_examples": n}
    return CircuitStability(
        labelled(
            table, ["size", "bound"], {"size": counts, "bound": ["estimate", "low", "high"]}, unit="Jaccard overlap"
        ),
        {
            **scores.provenance,
            "scores": scores.method,
            "method": "circuit_stability",
            "graph": asdict(graph),
            **settings,
        },
        labelled(frequency, ["size", "writer", "reader"], coords, unit="share of resamples"),
        n_resamples,
    )


def circuit_auroc(
    found: EdgeScores | xr.DataArray | Sequence[Circuit],
    truth: Circuit,
    *,
    absolute: bool = True,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """How well scores, or circuits of several sizes, tell the edges of a known circuit from the others: area under the
    ROC curve.

    1: every true edge is ranked above every other; 0.5: chance. For scores it is the share of pairs of a true and
    another edge in which the true one is ranked higher, a tie counting half. For circuits it is the area under the
    points that they make, with (0, 0) and (1, 1). A true edge that no circuit has is a miss at every size.

    Returns:
        The estimate, and for scores of two examples or more its bootstrap interval over examples; else NaN bounds.

    Raises:
        ValueError: If the known circuit is empty or full, or the graphs differ.

    Source:
        Mueller et al. 2025 (arXiv:2504.13151) take it from circuits of ten sizes; their published code counts a true
        edge that is missing from the hypothesis as found, which is not done here.
    """
    graph = truth.graph
    real = truth.mask[graph.exists].numpy()
    if not real.any() or real.all():
        raise ValueError(
            f"the known circuit has {real.sum()} of {len(real)} edges; a ROC curve needs some in and some out"
        )
    nothing = np.asarray(np.nan)
    if isinstance(found, (EdgeScores, xr.DataArray)):
        own, support = supports(found, absolute=absolute, graph=graph)
        if own != graph:
            raise ValueError(f"the scores are of {own}, the known circuit is of {graph}")
        estimate = np.asarray(_ranked_area(support[graph.exists].numpy(), real))
        if isinstance(found, xr.DataArray) or (n := found.values.sizes["example"]) < 2:
            return Interval(estimate, nothing, nothing)
        draws = [
            _ranked_area(_resampled(found, weights, absolute)[graph.exists].numpy(), real)
            for weights in _resamples(n, n_resamples, seed)
        ]
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
        return Interval(estimate, np.asarray(low), np.asarray(high))
    points = {(0.0, 0.0), (1.0, 1.0)}
    for circuit in found:
        if circuit.graph != graph:
            raise ValueError(f"a circuit is of {circuit.graph}, the known circuit is of {graph}")
        inside = circuit.mask[graph.exists].numpy()
        points.add((float(inside[~real].mean()), float(inside[real].mean())))
    x, y = np.array(sorted(points)).T
    return Interval(np.asarray(np.trapezoid(y, x)), nothing, nothing)


def _resamples(n: int, n_resamples: int, seed: int) -> np.ndarray:
    """Weights of examples, [resample, example]."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples) / n


def _resampled(scores: EdgeScores, weights: np.ndarray, absolute: bool) -> Tensor:
    """What edges are ranked by on one resample."""
    values = scores.values if "pos" not in scores.values.dims else scores.values.sum("pos", skipna=False)
    table = values.transpose("writer", "reader", "example").values @ weights.astype(np.float32)
    support = torch.tensor(table) * (-1 if scores.direction == "noise" else 1)
    return torch.where(scores.graph.exists, support.abs() if absolute else support, -torch.inf)


def _pairs(selected: np.ndarray) -> np.ndarray:
    """Jaccard overlap of every pair of rows; of two empty ones 1."""
    member = selected.astype(np.float32)
    shared = member @ member.T
    size = member.sum(1)
    either = size[:, None] + size[None] - shared
    first, second = np.triu_indices(len(selected), 1)
    return np.where(either > 0, shared / np.maximum(either, 1), 1.0)[first, second]


def _ranked_area(support: np.ndarray, real: np.ndarray) -> float:
    ranks, n_real = rankdata(support), int(real.sum())
    return float((ranks[real].sum() - n_real * (n_real + 1) / 2) / (n_real * (len(real) - n_real)))
