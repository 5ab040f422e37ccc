"""Exact path patching: replace what edges carry, one or any set at a time, and measure what the model makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from interp.models import provenance
from interp.patching._backward import metric_name
from interp.patching._batches import Split
from interp.patching._cells import Positions, cells, choice
from interp.patching._circuit_runs import run_replaced
from interp.patching._measure import checked
from interp.patching._resume import Reader
from interp.patching._wiring import wiring
from interp.patching.effects import Effects, Quantity
from interp.patching.graph import Graph
from interp.results import labelled
from interp.types import DIRECTIONS, Direction, Metric

EdgeValue = Literal["swap", "mean", "zero", "resample"]
Edges = str | Iterable[str]


@dataclass(frozen=True, eq=False, repr=False)
class EdgeEffects(Effects):
    """`Effects` of edges: `values` has the dimensions `(edge, example)`; a coordinate names an edge, or a set of
    them that was replaced together."""

    def plot(self, of: Quantity = "effect") -> Any:
        """Bars of the mean over examples with its interval, in the order of the edges."""
        from interp.plotting import bars

        found = self.interval(of=of)
        unit = f"{self.metric}, {found['estimate'].attrs['unit']}" if of == "effect" else "recovery"
        title = f"{of.capitalize()} of edges ({self.method}; {self.direction}, {self.value})"
        return bars(found, x="edge", y="estimate", interval=("low", "high"), title=title, unit=unit, horizontal=True)


def path_patch(
    bridge: Any,
    prompts: Any,
    metric: Metric,
    edges: Edges | Mapping[str, Edges],
    *,
    direction: Direction = "denoise",
    value: EdgeValue = "swap",
    positions: Positions = None,
    seed: int = 0,
    memory_budget: int = 2**30,
    batch_size: int | None = None,
    progress: bool = False,
) -> EdgeEffects:
    """The exact change of a metric when edges carry what the other run has there, and all else follows from that.

    A replaced edge shows its reader the stream of this very run, with the writer's present output exchanged for that of
    the other run. The reader is computed from that, norm included, and whatever reads its output sees the change, over
    edges that are not replaced. In models with post-norms a reader sees the norm of the sum of heads in which the
    replaced ones are exchanged. Nothing is approximated or frozen, so all edges from a writer together are patching
    its output, and all edges into a reader give it the input that it has in the other run.

    Costs a forward of all examples for each edge or set, and two more (three for `"mean"` and `"resample"`).

    Args:
        bridge, prompts, metric: As for `activation_patch`.
        edges: One edge, such as `"a0.h1->m2"` (see `Graph`), or several, each replaced alone. Or a mapping from names
            to edges or sequences of them that are replaced together. `*` stands for anything:
            `{"all of a0.h1": "a0.h1->*"}`; in a list, each edge that it matches is replaced alone.
        direction: `"denoise"` carries clean values in the corrupted run, `"noise"` the reverse.
        value: What replaced edges carry: `"swap"`, what the other run has on the same example; `"mean"`, its mean over
            examples, position by position; `"resample"`, what it has on another example; `"zero"`, nothing (the bias of
            an attention's output is no head's, and stays).
        positions: The positions at which edges are replaced: names, numbers, or all (None).
        seed: Of the examples that `"resample"` takes.
        memory_budget: Bytes that activations may take beside the model.
        batch_size: Most rows (sets x examples) of one forward; by default what the budget allows.
        progress: Show a progress bar.

    Returns:
        `EdgeEffects` with dimensions `(edge, example)`: patched minus baseline, positive where it raises the metric.

    Raises:
        ValueError: For an edge that does not exist, an unknown option, or a model whose readers are not linear in the
            norm of the stream. RuntimeError: In training mode.

    Source:
        The form in which circuits are evaluated: Conmy et al. 2023 (arXiv:2304.14997). Path patching of Wang et al.
        2022 (arXiv:2211.00593), section 3.1, goes along whole paths: a head, directly into the queries of another,
        whose change is then followed. Of one edge that is the same.

    Example:
        >>> best = interp.patching.edge_attribution(bridge, p, m).top(20)["edge"]
        >>> interp.patching.path_patch(bridge, p, m, best).summary()
    """
    choice("direction", direction, DIRECTIONS)
    choice("value", value, get_args(EdgeValue))
    shape = checked(bridge, prompts, metric, "z")
    n = len(prompts)
    if value in ("mean", "resample") and n < 2:
        raise ValueError(f"value={value!r} needs other examples, but there is 1; use value='swap' or 'zero'")
    where = cells(prompts, "mlp_out", shape, axes=None, positions=positions, layers=None, neurons=None)
    wired = wiring(bridge)
    names, masks = _masks(wired.graph, edges)
    base, other = (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
    reader = Reader(metric, torch.arange(n), n)
    split = Split.of(bridge, shape, reader, base.shape[1], memory_budget, batch_size)
    ran = run_replaced(
        wired, base, other, reader, split, masks, ablation=value, seed=seed, progress=progress,
        positions=None if positions is None else where.spots.any(0),
    )  # fmt: skip
    unit = str(getattr(metric, "unit", "metric"))
    record = provenance(
        bridge,
        method="path_patch",
        direction=direction,
        value=value,
        site="edge",
        edges={name: wired.graph.edges(mask) for name, mask in zip(names, masks, strict=True)},
        graph=asdict(wired.graph),
        positions=[str(label) for label in where.labels],
        seed=seed if value == "resample" else None,
        prompts={"name": prompts.name, "seed": prompts.seed, "n": n, "tokens": int(prompts.clean.shape[1])},
        metric={"name": metric_name(metric), "unit": unit},
        cost={"forwards": ran.forwards},
    )
    coords = {"edge": names, "example": list(range(n))}
    values = labelled(ran.values - ran.base, ["edge", "example"], coords, unit=unit)
    ends = {"denoise": (ran.other, ran.base), "noise": (ran.base, ran.other)}[direction]
    clean, corrupted = (labelled(end, ["example"], {"example": coords["example"]}, unit=unit) for end in ends)
    return EdgeEffects(values, record, clean, corrupted, direction, "edge", value, metric_name(metric))


def _masks(graph: Graph, edges: Edges | Mapping[str, Edges]) -> tuple[list[str], Bool[Tensor, "set writer reader"]]:
    """Names of what is replaced together, and the masks of their edges."""
    if isinstance(edges, Mapping):
        sets = {
            str(name): graph.mask([chosen] if isinstance(chosen, str) else chosen) for name, chosen in edges.items()
        }
    else:
        given: Sequence[str] = [edges] if isinstance(edges, str) else list(edges)
        sets = {edge: graph.mask([edge]) for name in given for edge in graph.edges(graph.mask([name]))}
    if not sets or not all(bool(mask.any()) for mask in sets.values()):
        raise ValueError(
            "edges= names no edge to replace; pass names such as 'input->m0', or a mapping to lists of them"
        )
    return list(sets), torch.stack(list(sets.values()))
