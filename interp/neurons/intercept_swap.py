"""Putting one task's intercept in the place of another's: does the model answer the other question?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.hooks import hook_name, interventions, no_retained_graph
from interp.hooks.edits import Edit
from interp.hooks.names import device_of
from interp.models import provenance, require_eval
from interp.neurons._mlp_parts import as_sets, groups_of
from interp.neurons.mlp_decomposition import MLPDecomposition
from interp.prompts import Prompts
from interp.results import Result, labelled
from interp.stats import bootstrap_interval

CONDITIONS = ("intact", "swapped", "removed", "random")
QUANTITIES = ("own", "other", "own_first", "other_first", "own_set", "other_set")


@dataclass(frozen=True, eq=False, repr=False)
class InterceptSwap(Result):
    """What prompts of one task answer with the intercept of another: `(source, target, condition, quantity, example)`.

    Conditions: `intact`; `swapped`, the source task's intercept taken away and the target's added; `removed`, the
    first half of that alone; `random`, the change of `swapped` turned into a random direction of the same length.

    Quantities: `own`, the log-probability of the example's own answer (nats); `other`, that of the answer that the
    target task has for the same entity; `own_first` and `other_first`, whether it is the most likely token of all;
    `own_set` and `other_set`, the log of the probability that all answers of the task have together.

    NaN for a task with itself and after the last example of a task.
    """

    def table(self, quantity: str = "other_set") -> pd.DataFrame:
        """One row per pair of tasks and condition: mean change against `intact` with its 95 % interval over examples.

        Columns `source, target, condition, change, low, high, n`.
        """
        if quantity not in QUANTITIES:
            raise KeyError(f"no quantity {quantity!r}; there are {', '.join(QUANTITIES)}")
        values = self.values.sel(quantity=quantity)
        rows = []
        for source in values.coords["source"].values:
            for target in values.coords["target"].values:
                if source == target:
                    continue
                cell = values.sel(source=source, target=target)
                for condition in CONDITIONS[1:]:
                    change = (cell.sel(condition=condition) - cell.sel(condition="intact")).values
                    change = change[~np.isnan(change)]
                    interval = bootstrap_interval(change)
                    rows.append({"source": str(source), "target": str(target), "condition": condition,
                                 "change": float(interval.estimate), "low": float(interval.low),
                                 "high": float(interval.high), "n": len(change)})  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, quantity: str = "other_set") -> Any:
        """Change of a quantity for every pair of tasks, beside its controls."""
        from interp.plotting import bars

        table = self.table(quantity)
        table["pair"] = table["source"] + " to " + table["target"]
        unit = "share of examples" if quantity.endswith("first") else "log-probability (nats)"
        return bars(
            table, x="pair", y="change", group="condition", interval=("low", "high"),
            title=f"Change of {quantity} when the intercept is swapped", unit=f"change of {unit}",
        )  # fmt: skip


def swap_intercepts(
    bridge: Any,
    tasks: Mapping[str, Prompts | Sequence[Prompts]],
    decompositions: MLPDecomposition | Sequence[MLPDecomposition],
    *,
    by: str | None = None,
    allow_seen: bool = False,
    batch_size: int = 64,
    seed: int = 0,
) -> InterceptSwap:
    """Exchange the task-aware intercepts of one or more MLPs at `end`, and see whether the other question is answered.

    If the intercept is the task's function ("give the capital") and the heads its argument, then adding
    `b_target - b_source` to what the MLP writes makes the model name what the target task has for the same entity. A
    causal test of the decomposition, which by itself is a regression. In early layers the intercept also holds what the
    last word of the prompts is: to tell the task from its words, give prompts of all tasks that end in the same word,
    to the fit as well. Costs one forward of the prompts, and two more
    per task that they are compared with, and one.

    Args:
        tasks: Prompts of the fitted tasks, about other entities than those fitted on. An example takes part in a pair
            if the target task has an answer for its entity.
        decompositions: Of one or several layers; all are swapped at once.
        by: The label that names the entity; by default `country`, else `subject`.
        allow_seen: Also take entities that the intercepts were fitted on.

    Raises:
        ValueError: If tasks were not fitted, entities were seen, a layer comes twice, or a pair of tasks shares no
            entity. RuntimeError: In training mode.

    Source:
        Ours; the decomposition is that of Lv et al. 2024 (arXiv:2403.19521).
    """
    require_eval(bridge)
    sets = as_sets(bridge, tasks)
    fits = [decompositions] if isinstance(decompositions, MLPDecomposition) else list(decompositions)
    if len(sets) < 2 or not fits:
        raise ValueError(f"a swap needs two tasks and a decomposition; got {len(sets)} tasks and {len(fits)}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1")
    if len({fit.layer for fit in fits}) < len(fits):
        raise ValueError(f"decompositions are of layers {[fit.layer for fit in fits]}; give each layer once")
    entities = {task: groups_of(some, by, task) for task, some in sets.items()}
    for fit in fits:
        _check_fit(bridge, fit, entities, allow_seen)
    known = {
        task: dict(zip(entities[task], [int(a) for one in some for a in one.answers], strict=True))
        for task, some in sets.items()
    }
    names = list(sets)
    pairs = [(a, b) for a in names for b in names if a != b]
    for a, b in pairs:
        if not set(entities[a]) & set(known[b]):
            raise ValueError(f"tasks {a!r} and {b!r} have no entity in common, so no answer to wait for")
    width = max(len(groups) for groups in entities.values())
    shape = (len(names), len(names), len(CONDITIONS), len(QUANTITIES), width)
    values = torch.full(shape, torch.nan)
    generator = torch.Generator().manual_seed(seed)
    for a in names:
        intact = _answers(bridge, sets[a], {}, batch_size)
        removed = _answers(bridge, sets[a], {fit.layer: -_intercept(fit, a) for fit in fits}, batch_size)
        own = torch.tensor([int(t) for one in sets[a] for t in one.answers])
        for b in names:
            if a == b:
                continue
            delta = {fit.layer: _intercept(fit, b) - _intercept(fit, a) for fit in fits}
            noise = {layer: torch.randn(len(d), generator=generator) for layer, d in delta.items()}
            noise = {layer: d.norm() * noise[layer] / noise[layer].norm() for layer, d in delta.items()}
            found = [intact, *(_answers(bridge, sets[a], change, batch_size) for change in (delta, noise))]
            found.insert(2, removed)
            other = torch.tensor([known[b].get(entity, -1) for entity in entities[a]])
            for place, log_probs in enumerate(found):
                cell = _quantities(
                    log_probs, own, other, sorted(set(known[a].values())), sorted(set(known[b].values()))
                )
                values[names.index(a), names.index(b), place, :, : len(own)] = cell
    coords = {"source": names, "target": names, "condition": list(CONDITIONS), "quantity": list(QUANTITIES)}
    record = provenance(
        bridge, method="swap_intercepts", layers=[fit.layer for fit in fits],
        basis=[fit.provenance["basis"] for fit in fits],
        allow_seen=allow_seen, seed=seed, cost={"forwards": 2 + 2 * (len(names) - 1)},
    )  # fmt: skip
    return InterceptSwap(labelled(values, (*coords, "example"), coords), record)


def _check_fit(bridge: Any, fit: MLPDecomposition, entities: Mapping[str, list[Any]], allow_seen: bool) -> None:
    fitted = [str(task) for task in fit.intercepts.coords["task"].values]
    if missing := sorted(set(entities) - set(fitted)):
        raise ValueError(f"tasks {missing} are not in the decomposition of layer {fit.layer}, which has {fitted}")
    if not fit.provenance["intercept"]:
        raise ValueError(f"the decomposition of layer {fit.layer} was made with intercept=False: nothing to swap")
    if fit.intercepts.sizes["d_model"] != int(bridge.cfg.d_model) or fit.layer >= int(bridge.cfg.n_layers):
        raise ValueError(f"the decomposition of layer {fit.layer} was made on a model of another shape")
    for task, groups in entities.items():
        seen = sorted({str(group) for group in groups} & set(fit.entities[task]))
        if seen and not allow_seen:
            raise ValueError(
                f"task {task!r}: {len(seen)} entities were fitted on ({', '.join(seen[:5])}); test on others "
                "(split_entities makes two halves), or pass allow_seen=True"
            )


def _intercept(fit: MLPDecomposition, task: str) -> Tensor:
    return torch.from_numpy(fit.intercepts.sel(task=task).values.copy())


def _answers(bridge: Any, prompts: Sequence[Prompts], added: Mapping[int, Tensor], batch_size: int) -> Tensor:
    """Log-probabilities `[example, d_vocab]` at `end` with vectors added there to the MLPs of some layers."""
    out = []
    for one in prompts:
        for start in range(0, len(one), batch_size):
            tokens = one.clean[start : start + batch_size]
            end = one.positions["end"][start : start + batch_size]
            rows = torch.arange(len(tokens))
            edits: dict[str, Edit] = {}
            for layer, vector in added.items():

                def add(acts: Tensor, _vector: Tensor = vector, _rows: Tensor = rows, _end: Tensor = end) -> Tensor:
                    new = acts.clone()
                    new[_rows, _end] = new[_rows, _end] + _vector.to(acts)
                    return new

                edits[hook_name("mlp_out", layer)] = add
            with torch.no_grad(), no_retained_graph(bridge), interventions(bridge, edits):
                logits = bridge(tokens.to(device_of(bridge)))
            out.append(logits.cpu()[rows, end].float().log_softmax(-1))
    return torch.cat(out)


def _quantities(log_probs: Tensor, own: Tensor, other: Tensor, own_set: list[int], other_set: list[int]) -> Tensor:
    """`[quantity, example]`, NaN where the target task has no answer for the entity."""
    rows = torch.arange(len(log_probs))
    first = log_probs.argmax(-1)
    cell = torch.stack(
        [
            log_probs[rows, own],
            log_probs[rows, other.clamp_min(0)],
            (first == own).float(),
            (first == other).float(),
            log_probs[:, own_set].logsumexp(-1),
            log_probs[:, other_set].logsumexp(-1),
        ]
    )
    return torch.where(other >= 0, cell, torch.nan)
