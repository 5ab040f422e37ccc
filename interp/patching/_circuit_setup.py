"""What the methods that evaluate circuits share: checks before anything runs, the runs, and their record."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from interp.models import provenance
from interp.patching._backward import metric_name
from interp.patching._batches import Split
from interp.patching._circuit_runs import Ablation, Ran, run_replaced
from interp.patching._measure import checked
from interp.patching._resume import Reader
from interp.patching._wiring import Wiring
from interp.patching._wiring import wiring as find_wiring
from interp.patching.circuits import Circuit
from interp.patching.graph import graph_of


def wired(bridge: Any, prompts: Any, metric: Any, ablation: str, circuits: list[Circuit]) -> Wiring:
    """The model's wiring; raises before anything runs."""
    checked(bridge, prompts, metric, "z")
    graph = graph_of(bridge)
    for circuit in circuits:
        if circuit.graph != graph:
            raise ValueError(f"the circuit is of {circuit.graph}, but the model's graph is {graph}")
    if ablation in ("mean", "resample") and len(prompts) < 2:
        raise ValueError(
            f"ablation={ablation!r} needs other examples, but there is {len(prompts)}; pass more prompts or use "
            "ablation='swap' or 'zero'"
        )
    return find_wiring(bridge)


def run(
    wiring: Wiring,
    prompts: Any,
    metric: Any,
    ablated: Tensor,
    ablation: Ablation,
    *,
    seed: int,
    memory_budget: int,
    batch_size: int | None,
    progress: bool,
) -> Ran:
    """The circuits' runs: what is masked is ablated in the clean run."""
    n = len(prompts)
    reader = Reader(metric, torch.arange(n), n)
    shape = checked(wiring.bridge, prompts, metric, "z")
    split = Split.of(wiring.bridge, shape, reader, prompts.clean.shape[1], memory_budget, batch_size)
    return run_replaced(
        wiring,
        prompts.clean,
        prompts.corrupted,
        reader,
        split,
        ablated,
        ablation=ablation,
        seed=seed,
        progress=progress,
    )


def record_of(wiring: Wiring, prompts: Any, metric: Any, ran: Ran, **settings: Any) -> dict[str, Any]:
    """The provenance of a result about circuits."""
    return provenance(
        wiring.bridge,
        **settings,
        direction="noise",
        graph=asdict(wiring.graph),
        corrupted=float(ran.other.mean()),
        prompts={"name": prompts.name, "seed": prompts.seed, "n": len(prompts), "tokens": int(prompts.clean.shape[1])},
        metric={"name": metric_name(metric), "unit": str(getattr(metric, "unit", "metric"))},
        cost={"forwards": ran.forwards},
    )
