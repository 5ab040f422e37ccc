"""Which edges of a circuit it cannot do without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import xarray as xr

from interp.patching._backward import metric_name
from interp.patching._cells import choice
from interp.patching._circuit_runs import Ablation
from interp.patching._circuit_setup import record_of, run, wired
from interp.patching.circuits import Circuit
from interp.results import Result, labelled
from interp.stats import bootstrap_interval
from interp.types import Metric

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class Minimality(Result):
    """What a circuit loses with each of its edges, `values` (edge, example): m(circuit) - m(circuit without the edge).

    In the metric's own unit. Positive: the edge helps; near 0: the circuit does as well without it, and is not minimal
    in that edge (but two edges that stand in for each other both show 0).

    Attributes:
        circuit: The metric of the circuit, by example.
        model: The metric of the whole model, by example.
        metric: Name of the metric.
        ablation: What ablated edges carry.
    """

    circuit: xr.DataArray
    model: xr.DataArray
    metric: str
    ablation: str

    def interval(self, level: float = 0.95, *, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
        """One row per edge, largest loss first: `edge`, `loss`, and its bootstrap interval `low`, `high`."""
        import pandas as pd

        cells = self.values.transpose("edge", "example").values
        found = bootstrap_interval(cells, confidence=level, n_resamples=n_resamples, seed=seed)
        frame = pd.DataFrame(
            {"edge": self.values["edge"].values, "loss": found.estimate, "low": found.low, "high": found.high}
        )
        return frame.sort_values("loss", ascending=False, kind="stable", ignore_index=True)

    def plot(self, k: int = 30) -> Any:
        """Figure of the loss with each of the `k` edges that matter most, with its interval."""
        from interp.plotting import bars

        frame = self.interval()
        frame = frame.loc[frame["loss"].abs().sort_values(ascending=False).index[:k]].sort_values("loss")
        return bars(
            frame,
            x="edge",
            y="loss",
            interval=("low", "high") if frame["low"].notna().all() else None,
            title=f"Loss without each edge ({self.ablation} ablation)",
            unit=f"{self.metric}, {self.values.attrs.get('unit', '')}",
            horizontal=True,
        )


def minimality(
    bridge: Any,
    prompts: Any,
    metric: Metric,
    circuit: Circuit,
    *,
    ablation: Ablation = "mean",
    seed: int = 0,
    memory_budget: int = 2**30,
    batch_size: int | None = None,
    progress: bool = False,
) -> Minimality:
    """What a circuit loses with each of its edges: circuits with one edge less, evaluated exactly.

    Costs one forward per edge, one for the circuit and two for the plain runs; options and errors as for
    `faithfulness`.

    Source:
        Wang et al. 2022 (arXiv:2211.00593), section 4, who drop a node from the circuit less a set that is searched
        for; here a single edge from the whole circuit, so that edges which stand in for each other are not found.
    """
    choice("ablation", ablation, get_args(Ablation))
    if not isinstance(circuit, Circuit) or not len(circuit):
        raise ValueError(f"minimality needs a Circuit with edges, got {circuit!r}")
    wiring = wired(bridge, prompts, metric, ablation, [circuit])
    ablated = (wiring.graph.exists & ~circuit.mask).repeat(len(circuit) + 1, 1, 1)
    for i, (writer, reader) in enumerate(circuit.mask.nonzero().tolist()):
        ablated[i + 1, writer, reader] = True
    asked = {"seed": seed, "memory_budget": memory_budget, "batch_size": batch_size, "progress": progress}
    ran = run(wiring, prompts, metric, ablated, ablation, **asked)
    unit, examples = str(getattr(metric, "unit", "metric")), {"example": list(range(len(prompts)))}
    about = record_of(wiring, prompts, metric, ran, method="minimality", ablation=ablation, seed=seed)
    return Minimality(
        labelled(ran.values[0] - ran.values[1:], ["edge", "example"], {"edge": circuit.edges, **examples}, unit=unit),
        about,
        labelled(ran.values[0], ["example"], examples, unit=unit),
        labelled(ran.base, ["example"], examples, unit=unit),
        metric_name(metric),
        ablation,
    )
