"""Exact evaluation of circuits: ablate every edge outside of one in a single forward, and see what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import xarray as xr
from torch import Tensor

from interp.patching._backward import metric_name
from interp.patching._cells import choice
from interp.patching._circuit_runs import Ablation, Ran
from interp.patching._circuit_setup import record_of, run, wired
from interp.patching.circuits import Circuit, Selection, edges_of, ranking, supports
from interp.patching.edge_scores import EdgeScores
from interp.patching.faithfulness_curves import FaithfulnessCurve
from interp.results import labelled
from interp.types import Metric

SIZES: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the edges at which MIB evaluates circuits."""


def faithfulness(
    bridge: Any,
    prompts: Any,
    metric: Metric,
    circuits: EdgeScores | Circuit | Sequence[Circuit] | Mapping[str, Circuit],
    *,
    sizes: Sequence[float | int] = SIZES,
    how: Selection = "top",
    absolute: bool = True,
    prune: bool = True,
    ablation: Ablation = "mean",
    of: Literal["circuit", "complement"] = "circuit",
    seed: int = 0,
    memory_budget: int = 2**30,
    batch_size: int | None = None,
    progress: bool = False,
) -> FaithfulnessCurve:
    """The metric on the clean prompts with every edge outside of a circuit ablated, for every circuit and example.

    A reader sees the stream of its own run, with what came over ablated edges replaced; readers are computed in order,
    so that a node inside the circuit works on what the circuit gives it. The full circuit is the model on the clean
    prompts, the empty one under `"swap"` the model on the corrupted ones, under `"mean"` a model that reads the same
    average stream whatever the prompt. Biases of attention's output belong to no
    edge and stay. Where attention's output is normalised before it is added, each reader sees the norm of the heads'
    sum with its ablated heads replaced.

    Costs one forward for each circuit (about a third dearer than a plain one, and batched where there is room), two for
    the plain runs, and under the ablations other than `"swap"` one more for the empty circuit.

    Args:
        bridge, prompts, metric: As for `activation_patch`.
        circuits: A circuit, several, or several by label; or the scores of `edge_attribution`, from which circuits of
            `sizes` are selected.
        sizes, how, absolute, prune: With scores: as for `select_circuit`. Sizes that stand for the same number of edges
            are evaluated each.
        ablation: What ablated edges carry. `"mean"`: the mean of what their writer writes at this position over the
            corrupted prompts, that of the example itself included; a head's is the mean before any post-norm. It leaves
            what all prompts share in place, and means what it says where the same position plays the same part in
            every prompt, as in prompts of one template. `"swap"`: what the writer writes on the corrupted prompt of
            the same example, as MIB does, so that only what differs within the pair is ablated. `"zero"`: nothing.
            `"resample"`: what it writes on another corrupted prompt. Circuits depend on it (Miller et al. 2024, arXiv:
            2407.08734): give scores of the same kind, `edge_attribution(..., value="mean")` for `"mean"`.
        of: `"complement"` ablates the edges in each circuit instead: what the rest of the model can still do. A circuit
            is complete where that is near 0 (Marks et al. 2024).
        seed: For `"resample"`.
        memory_budget: Bytes that activations may take beside the model; batches are sized to fit.
        batch_size: Most rows (circuits x examples) of one forward; by default what the budget allows.
        progress: Show a progress bar.

    Returns:
        `FaithfulnessCurve`; the circuits are in the order given.

    Raises:
        ValueError: If an option is unknown or does not fit, a circuit is of another graph, the model does not add up
            (see the message), or the budget is too small.
        RuntimeError: If the model is in training mode.

    Source:
        Wang et al. 2022 (arXiv:2211.00593), who take means over a corrupted distribution too, template by template and
        of nodes, not of edges; faithfulness as the ratio of Marks et al. 2024 (arXiv:2403.19647) and
        Mueller et al. 2025 (arXiv:2504.13151). Keys and values shared by a group of heads are one reader here, where
        EAP-IG's code gives every query head its own.

    Example:
        >>> scores = interp.patching.edge_attribution(bridge, p, m, direction="noise", value="mean")
        >>> interp.patching.faithfulness(bridge, p, m, scores, how="greedy").summary()
    """
    choice("ablation", ablation, get_args(Ablation))
    choice("of", of, ("circuit", "complement"))
    chosen, shares, source = _circuits(circuits, sizes, how, absolute, prune)
    asked = {"seed": seed, "memory_budget": memory_budget, "batch_size": batch_size, "progress": progress}
    wiring = wired(bridge, prompts, metric, ablation, list(chosen.values()))
    exists, kept = wiring.graph.exists, torch.stack([circuit.mask for circuit in chosen.values()])
    ablated = exists & ~kept if of == "circuit" else kept
    everything = ablation != "swap" and not bool((ablated == exists).flatten(1).all(1).any())
    ran = run(wiring, prompts, metric, torch.cat([ablated, exists[None]]) if everything else ablated, ablation, **asked)
    empty = _empty(ran, ablated, exists, ablation)
    n, labels = len(prompts), list(chosen)
    unit = str(getattr(metric, "unit", "metric"))
    coords = {
        "circuit": labels,
        "share": ("circuit", shares),
        "n_edges": ("circuit", [len(circuit) for circuit in chosen.values()]),
        "example": list(range(n)),
    }
    by_example = {"example": list(range(n))}
    edges = xr.DataArray(
        kept.numpy(), dims=("circuit", "writer", "reader"),
        coords={"circuit": labels, "writer": list(wiring.graph.writers), "reader": list(wiring.graph.readers)},
    )  # fmt: skip
    about = record_of(
        wiring, prompts, metric, ran, method="faithfulness", ablation=ablation, of=of, seed=seed, **source
    )
    return FaithfulnessCurve(
        labelled(ran.values[: len(chosen)], ["circuit", "example"], coords, unit=unit),
        about,
        labelled(ran.base, ["example"], by_example, unit=unit),
        labelled(empty, ["example"], by_example, unit=unit),
        metric_name(metric),
        ablation,
        of,
        edges,
    )


def _circuits(
    given: EdgeScores | Circuit | Sequence[Circuit] | Mapping[str, Circuit],
    sizes: Sequence[float | int],
    how: Selection,
    absolute: bool,
    prune: bool,
) -> tuple[dict[str, Circuit], list[float], dict[str, Any]]:
    """The circuits by label, the share of edges asked for, and what to remember of where they come from."""
    if isinstance(given, EdgeScores):
        choice("how", how, get_args(Selection))
        graph, support = supports(given, absolute=absolute)
        order = torch.tensor(ranking(graph, support, how))
        chosen: dict[str, Circuit] = {}
        shares = []
        for size in sizes:
            mask = torch.zeros_like(graph.exists).flatten()
            mask[order[: edges_of(size, graph)]] = True
            circuit = Circuit(graph, mask.view(graph.exists.shape))
            label = f"{size:.3%}".replace(".000%", "%") if isinstance(size, float) else f"{size} edges"
            chosen[label] = circuit.pruned() if prune else circuit
            shares.append(float(size) if isinstance(size, float) else size / graph.n_edges)
        if not chosen or len(chosen) < len(shares):
            raise ValueError(f"sizes={list(sizes)} must name at least one size, and none twice")
        scored = {"method": given.method, "direction": given.direction, "value": given.value}
        source = {"scores": scored, "how": how, "absolute": absolute, "prune": prune}
        return chosen, shares, source
    if isinstance(given, Circuit):
        given = {"circuit": given}
    named = given if isinstance(given, Mapping) else {str(i): circuit for i, circuit in enumerate(given)}
    if not named or not all(isinstance(circuit, Circuit) for circuit in named.values()):
        raise ValueError("circuits must be EdgeScores, a Circuit, or at least one of them in a list or a dictionary")
    return dict(named), [circuit.share for circuit in named.values()], {}


def _empty(ran: Ran, ablated: Tensor, exists: Tensor, ablation: str) -> Tensor:
    """The metric with every edge ablated: the corrupted run under `"swap"`, else a run of its own."""
    if ablation == "swap":
        return ran.other
    if len(ran.values) > len(ablated):
        return ran.values[-1]
    return ran.values[int((ablated == exists).flatten(1).all(1).nonzero()[0])]
