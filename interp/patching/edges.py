"""Edge attribution: estimate what every edge between a writer and a reader of the stream does to a metric."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import torch

from interp.models import provenance
from interp.patching._backward import differentiable, metric_name
from interp.patching._batches import Split, progress_bar
from interp.patching._cells import Positions, cells, choice
from interp.patching._edge_parts import blocks_of
from interp.patching._edge_passes import EdgePasses
from interp.patching._measure import checked
from interp.patching._quadrature import Points, quadrature
from interp.patching._resume import Reader
from interp.patching.attribution import (
    _REFERENCE,
    Method,
    _check_metric,
    _check_model,
    _check_slope,
    _completeness,
    _rules,
)
from interp.patching.edge_scores import EdgeScores
from interp.patching.graph import graph_of
from interp.patching.rules import Preset, Rules
from interp.results import labelled
from interp.types import DIRECTIONS, Direction, Metric


def edge_attribution(
    bridge: Any,
    prompts: Any,
    metric: Metric,
    *,
    method: Method | Rules = "gradient",
    direction: Direction = "denoise",
    value: Literal["swap", "zero", "mean"] = "swap",
    positions: Positions = None,
    per_position: bool = False,
    steps: int = 5,
    points: Points = "gauss_legendre",
    rules: Preset | Rules | None = None,
    memory_budget: int = 2**30,
    batch_size: int | None = None,
    progress: bool = False,
) -> EdgeScores:
    """Estimates of what `path_patch` would measure for every edge of a model, all from one backward pass.

    The score of an edge is (what its writer adds to the stream in the other run - in the run that is patched) times the
    gradient of the metric at the reader's input, summed over the width and over positions: positive where carrying the
    other run's value along that edge alone raises the metric. The gradient at a reader's input is that at its queries,
    keys, values or MLP input, taken back through its matrix and the norm before it; a backward rule, with its factors
    for queries, keys and values, replaces it as in `attribution_patch`, and where a rule holds attention patterns the
    edges into queries and keys score exactly 0. What a head adds to the stream of a model with post-norms is taken to
    first order in the run that is differentiated. So the scores of a writer's edges sum to its node's score, for
    every method and family (`EdgeScores.nodes`).

    Costs two forwards and one backward pass of all examples; integrated gradients two forwards and `steps` forward and
    backward passes. No flags of the bridge are needed or changed.

    Args:
        bridge, prompts, metric, method, direction, value, steps, points, rules: As for `attribution_patch`.
        positions: The positions whose scores count: names, numbers, or all (None). An edge joins one position of the
            stream; what moves information between positions is inside the heads.
        per_position: Keep the scores of positions apart, in a dimension `pos`; else they are summed.
        memory_budget: Bytes that activations may take beside the model and the result; batches are sized to fit.
        batch_size: Most rows (examples x steps) of one forward; by default what the budget allows.
        progress: Show a progress bar.

    Returns:
        `EdgeScores` with dimensions `(writer, reader, example)`, or `(writer, reader, pos, example)`; NaN where there
        is no edge. `provenance` as for `attribution_patch`.

    Raises:
        ValueError: As `attribution_patch`. `UnsupportedModule` (a ValueError) if a rule does not fit the model, or if
            its queries, keys, values and MLP inputs are not linear in the norm of its stream.
        RuntimeError: If the model is in training mode.

    Source:
        Syed, Rager & Conmy 2023, "Attribution patching outperforms automated circuit discovery" (arXiv:2310.10348):
        the gradient of the clean run (`direction="noise"`). With integrated gradients, Hanna et al. 2024
        (arXiv:2403.17806), who take the left sum (`points="left"`) in what is `"denoise"` here, average over examples
        and have one reader for each query head also of grouped keys and values.

    Example:
        >>> scores = interp.patching.edge_attribution(bridge, p, m, method="relp")
        >>> scores.top(10)
    """
    chosen = _rules(method, rules, points=points, steps=steps, value=value)
    choice("direction", direction, DIRECTIONS)
    choice("value", value, _REFERENCE)
    shape = checked(bridge, prompts, metric, "z")
    where = cells(prompts, "mlp_out", shape, axes=None, positions=positions, layers=None, neurons=None)
    _check_model(bridge, shape, qk_fix=False, grad_drop=False, n_examples=len(prompts), value=value)
    base, other = (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
    reader = Reader(metric, torch.arange(len(prompts)), len(prompts))
    _check_metric(reader, shape, base.shape[1])
    split = Split.of(bridge, shape, reader, base.shape[1], memory_budget, batch_size)
    line = quadrature(points, steps) if method == "integrated_gradients" else None
    graph, blocks = graph_of(bridge), blocks_of(bridge, chosen)
    passes = EdgePasses(bridge, graph, blocks, split, base, other, value, where.spots, per_position, chosen, line)
    passes.check()
    with differentiable(bridge), progress_bar(progress, len(prompts), "edges") as bar:
        edges, scores = passes.run(bar.update)
    if line is None:
        _check_slope(metric, scores, direction)
    n, unit = len(prompts), str(getattr(metric, "unit", "metric"))
    record = provenance(
        bridge,
        method=method if isinstance(method, str) else "custom",
        rules=chosen.to_dict(),
        direction=direction,
        value=value,
        reference=_REFERENCE[value],
        graph=asdict(graph),
        positions=[str(label) for label in where.labels],
        steps=None if line is None else steps,
        points=None if line is None else points,
        completeness=_completeness(scores) if value == "swap" else None,
        prompts={"name": prompts.name, "seed": prompts.seed, "n": n, "tokens": int(prompts.clean.shape[1])},
        metric={"name": metric_name(metric), "unit": unit},
        cost=passes.cost,
    )
    dims = ["writer", "reader", "pos", "example"]
    coords: dict[str, Any] = {
        "writer": list(graph.writers),
        "reader": list(graph.readers),
        "example": list(range(n)),
    }
    if per_position:
        coords["pos"] = where.labels
        if where.tokens is not None:
            coords["token"] = ("pos", where.tokens)
        values = labelled(edges, dims, coords, unit=unit)
    else:
        values = labelled(edges.squeeze(2), [dim for dim in dims if dim != "pos"], coords, unit=unit)
    ends = {"denoise": (scores.other, scores.base), "noise": (scores.base, scores.other)}[direction]
    clean, corrupted = (labelled(end, ["example"], {"example": coords["example"]}, unit=unit) for end in ends)
    return EdgeScores(values, record, clean, corrupted, direction, value, metric_name(metric))
