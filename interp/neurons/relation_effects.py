"""Three claims about sets of neurons: effects add up (cumulativity), sets overlap (versatility), and, in
`AblationMatrix.interference`, taking one set out helps another task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from scipy.stats import hypergeom

from interp.models import geometry, provenance, require_eval
from interp.neurons._ablating import (
    MEASURES,
    UNITS,
    Control,
    Measure,
    Mode,
    Tasks,
    Where,
    check_ablation,
    control_sets,
    intact_scores,
    make_ablation,
    padded,
    set_scores,
)
from interp.neurons._clamp_edits import Neuron, check_neurons
from interp.neurons.activation_statistics import NeuronStatistics
from interp.results import Result, labelled
from interp.stats import adjust_p_values, bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class Cumulativity(Result):
    """Change of each task as more of its ranked neurons are ablated.

    Attributes:
        values: Ablated minus intact `[measure, kind, draw, task, count, example]`. Kinds: `"ranked"` (the best `count`
            neurons, draw 0 only), and the controls of the same neurons, nested in the same way. Tasks with fewer
            examples are NaN at the end.
        baseline: The intact model `[measure, task, example]`.
    """

    baseline: xr.DataArray

    def summary(self, measure: Measure = "logit_difference", *, seed: int = 0) -> pd.DataFrame:
        """One row per task, kind and count: intact level, mean change, and its 95 % interval over examples."""
        import pandas as pd

        mean = self._mean(measure)
        rows = []
        for task in mean["task"].values:
            intact = float(self.baseline.sel(measure=measure, task=task).mean())
            for kind in mean["kind"].values:
                cells = mean.sel(task=task, kind=kind).values.astype(np.float64)
                cells = cells[:, ~np.isnan(cells).all(0)]
                interval = bootstrap_interval(cells, seed=seed)
                rows += [
                    {"task": task, "kind": kind, "count": int(count), "intact": intact, "effect": float(a),
                     "low": float(b), "high": float(c)}
                    for count, a, b, c in zip(mean["count"].values, *interval, strict=True)
                ]  # fmt: skip
        return pd.DataFrame(rows)

    def shape(self, measure: Measure = "logit_difference", *, seed: int = 0) -> pd.DataFrame:
        """Per task, of the ranked neurons: the effect of the best neuron alone and of all, the share of the former in
        the latter with a 95 % interval over examples, and the smallest count that reaches half of the full effect."""
        import pandas as pd

        mean = self._mean(measure).sel(kind="ranked")
        counts = mean["count"].values
        rows = []
        for task in mean["task"].values:
            cells = mean.sel(task=task).values.astype(np.float64)
            cells = cells[:, ~np.isnan(cells).all(0)]
            n = cells.shape[1]
            draws = cells @ np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), 2000).T / n  # [count, draw]
            with np.errstate(invalid="ignore", divide="ignore"):
                share = np.where(draws[-1] != 0, draws[0] / draws[-1], np.nan)
            curve = cells.mean(1)
            reached = curve / curve[-1] >= 0.5 if curve[-1] != 0 else np.zeros(len(curve), bool)
            low, high = np.nanquantile(share, [0.025, 0.975]) if not np.isnan(share).all() else (np.nan, np.nan)
            rows.append({
                "task": task, f"first {counts[0]}": curve[0], f"all {counts[-1]}": curve[-1],
                "share of first": curve[0] / curve[-1] if curve[-1] != 0 else np.nan, "low": low, "high": high,
                "half at": int(counts[reached.argmax()]) if reached.any() else None,
            })  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, measure: Measure = "logit_difference", *, task: str | None = None) -> go.Figure:
        """Change against the number of ablated neurons; a line per kind, of one task or the mean over all."""
        from interp import plotting

        known = [str(name) for name in self.values["task"].values]
        if task is not None and task not in known:
            raise ValueError(f"no task {task!r}; the tasks are {', '.join(map(repr, known))}")
        frame = self._pooled(measure, known if task is None else [task])
        return plotting.lines(
            frame, x="count", group="kind", interval=("low", "high"), log_x=True, reference=0.0,
            title=f"Change as more neurons are ablated ({task or 'mean over tasks'})", x_title="neurons ablated",
            unit=f"change ({UNITS[measure]})",
        )  # fmt: skip

    def _pooled(self, measure: Measure, tasks: Sequence[str]) -> pd.DataFrame:
        """Mean over tasks, with an interval over the examples of each."""
        import pandas as pd

        mean = self._mean(measure)
        centre, drawn = 0.0, 0.0
        for seed, task in enumerate(tasks):
            cells = mean.sel(task=task).values.astype(np.float64)  # [kind, count, example]
            cells = cells[..., ~np.isnan(cells).all((0, 1))]
            n = cells.shape[-1]
            counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), 2000)
            centre, drawn = centre + cells.mean(-1) / len(tasks), drawn + cells @ counts.T / n / len(tasks)
        low, high = np.quantile(drawn, [0.025, 0.975], axis=-1)
        index = pd.MultiIndex.from_product([mean["kind"].values, mean["count"].values], names=["kind", "count"])
        columns = {"value": np.ravel(centre), "low": np.ravel(low), "high": np.ravel(high)}
        return pd.DataFrame(columns, index=index).reset_index()

    def _mean(self, measure: str) -> xr.DataArray:
        """Over draws, `[kind, task, count, example]`."""
        if measure not in MEASURES:
            raise ValueError(f"measure={measure!r}; expected one of {', '.join(map(repr, MEASURES))}")
        return self.values.sel(measure=measure, drop=True).mean("draw")


def cumulativity(
    bridge: Any,
    rankings: Mapping[str, Sequence[Neuron]],
    tasks: Tasks,
    *,
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    mode: Mode = "mean",
    positions: Where = "all",
    controls: Sequence[Control] = ("matched", "uniform"),
    n_controls: int = 3,
    statistics: NeuronStatistics | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Cumulativity:
    """Ablate the best 1, 2, 4, ... neurons of each task's ranking, on that task, beside nested sets of controls.

    Costs `counts x (1 + controls x n_controls) + 1` forwards over each task, rows of different sets in one batch, and
    one for the statistics. Options as in `ablation_matrix`.

    Args:
        rankings: Task to its neurons, best first (`Selectivity.sets`), found on other prompts than the task's.
        tasks: The same names.

    Raises:
        ValueError: If names differ, a ranking is shorter than the largest count, or an option does not fit.

    Source:
        Liu et al. 2025 (EMNLP): the effect grows with the number of deactivated neurons, no single one holds a fact.
        The nested matched controls, without which any growth passes for cumulativity, are added here.
    """
    require_eval(bridge)
    named, asked = check_ablation(bridge, rankings, tasks, mode, positions, controls, n_controls, batch_size)
    if set(named) != set(asked):
        raise ValueError(f"rankings are of {sorted(named)} and tasks of {sorted(asked)}; each task needs its ranking")
    sizes = sorted({int(count) for count in counts})
    if not sizes or sizes[0] < 1:
        raise ValueError(f"counts={list(counts)}; expected numbers of at least 1")
    if short := {name: len(neurons) for name, neurons in named.items() if len(neurons) < sizes[-1]}:
        raise ValueError(f"rankings have {short} neurons but counts goes to {sizes[-1]}")
    named = {name: neurons[: sizes[-1]] for name, neurons in named.items()}
    ablation, statistics = make_ablation(bridge, named, asked, mode, positions, statistics)
    n_draws = n_controls if controls else 1
    effects, levels, quality = [], [], {}
    whole = {name: [named[name]] for name in asked}
    for number, name in enumerate(asked):  # all of them before the first forward: a match may be refused
        for control in controls:
            drawn, quality[f"{control}: {name}"] = control_sets(
                statistics, named[name], control, n_controls, seed + number
            )
            whole[name] += drawn
    for name, prompts in asked.items():
        removed = [neurons[:count] for neurons in whole[name] for count in sizes]
        before = np.concatenate([intact_scores(bridge, one, batch_size) for one in prompts], -1)
        after = np.concatenate([set_scores(bridge, ablation, one, removed, batch_size) for one in prompts], -1)
        change = (after - before[:, None]).reshape(len(MEASURES), len(whole[name]), len(sizes), -1)
        placed = np.full((len(MEASURES), 1 + len(controls), n_draws, len(sizes), change.shape[-1]), np.nan, np.float32)
        placed[:, 0, 0] = change[:, 0]
        for kind in range(len(controls)):
            placed[:, 1 + kind] = change[:, 1 + kind * n_controls : 1 + (kind + 1) * n_controls]
        effects.append(placed)
        levels.append(before)
    length = max(part.shape[-1] for part in levels)
    values = np.moveaxis(padded(effects, length), -2, 3)  # the task before the count
    return Cumulativity(
        values=labelled(
            values, ("measure", "kind", "draw", "task", "count", "example"),
            {"measure": list(MEASURES), "kind": ["ranked", *controls], "draw": range(n_draws), "task": list(asked),
             "count": sizes},
        ),
        provenance=provenance(
            bridge, method="cumulativity", mode=mode, positions=positions, n_controls=n_draws, seed=seed, match=quality,
            rankings={name: [list(neuron) for neuron in neurons[: sizes[-1]]] for name, neurons in named.items()},
        ),
        baseline=labelled(
            padded(levels, length), ("measure", "task", "example"), {"measure": list(MEASURES), "task": list(asked)}
        ),
    )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Versatility(Result):
    """Neurons that sets share, beside what chance would give.

    Attributes:
        values: Shared neurons over all neurons of the two sets (Jaccard) `[set, other]`.
        shared: Number of shared neurons.
        expected: Mean number that random sets with as many neurons in every layer share.
        p_values: Chance of at least as many in such sets (hypergeometric, exact); NaN on the diagonal.
        sizes: `[set, layer]`: how many neurons of each layer a set has.
    """

    shared: xr.DataArray
    expected: xr.DataArray
    p_values: xr.DataArray
    sizes: xr.DataArray

    def summary(self) -> pd.DataFrame:
        """One row per pair of sets, most shared first; p-values Holm-adjusted over pairs."""
        import pandas as pd

        names = self.values["set"].values
        rows = [
            {"set": names[i], "other": names[j], "jaccard": float(self.values[i, j]), "shared": int(self.shared[i, j]),
             "expected": float(self.expected[i, j]), "p_value": float(self.p_values[i, j])}
            for i in range(len(names)) for j in range(i + 1, len(names))
        ]  # fmt: skip
        frame = pd.DataFrame(rows, columns=["set", "other", "jaccard", "shared", "expected", "p_value"])
        frame["p_value"] = adjust_p_values(frame["p_value"], method="holm")
        return frame.sort_values("jaccard", ascending=False, kind="stable").reset_index(drop=True)

    def plot(self) -> go.Figure:
        """Heat map of the overlaps, with shared and expected counts on hovering."""
        from interp import plotting

        return plotting.heatmap(
            self.values, title="Overlap of sets of neurons", unit="Jaccard", signed=False, origin="top",
            hover={"shared": self.shared.values, "expected": self.expected.values},
        )  # fmt: skip


def versatility(bridge: Any, sets: Mapping[str, Sequence[Neuron]]) -> Versatility:
    """How much sets of neurons overlap, against random sets with the same number of neurons in each layer. No forward.

    What overlap means depends on how the sets were found. Average precision of one relation *against the others* makes
    a neuron that serves two of them a mediocre detector of both, so it lowers overlap; against text without any
    relation it does not.

    Raises:
        ValueError: If there are fewer than two sets, or a set names a neuron that does not exist, or one twice.

    Source:
        Liu et al. 2025 (EMNLP) call neurons that several relations share versatile. The null is ours.
    """
    shape = geometry(bridge)
    if len(sets) < 2:
        raise ValueError(f"{len(sets)} sets of neurons; overlap needs at least two, by name")
    named = {str(name): set(check_neurons(neurons, shape, f"set {name!r}")) for name, neurons in sets.items()}
    per_layer = np.array(
        [[sum(layer == at for layer, _ in neurons) for at in range(shape.n_layers)] for neurons in named.values()]
    )
    n = len(named)
    jaccard, shared, expected, p_values = (np.full((n, n), np.nan) for _ in range(4))
    members = list(named.values())
    for i in range(n):
        for j in range(n):
            both = len(members[i] & members[j])
            shared[i, j], jaccard[i, j] = both, both / len(members[i] | members[j])
            expected[i, j] = (per_layer[i] * per_layer[j]).sum() / shape.d_mlp
            if i != j:
                p_values[i, j] = _at_least(both, shape.d_mlp, per_layer[i], per_layer[j])
    coords = {"set": list(named), "other": list(named)}
    dims = ("set", "other")
    return Versatility(
        values=labelled(jaccard, dims, coords, unit="Jaccard"),
        provenance=provenance(
            bridge, method="versatility",
            sets={name: sorted([list(neuron) for neuron in neurons]) for name, neurons in named.items()},
        ),
        shared=labelled(shared, dims, coords),
        expected=labelled(expected, dims, coords),
        p_values=labelled(p_values, dims, coords),
        sizes=labelled(per_layer, ("set", "layer"), {"set": list(named)}),
    )  # fmt: skip


def _at_least(shared: int, d_mlp: int, first: np.ndarray, second: np.ndarray) -> float:
    """P(at least `shared` common neurons) for independent random sets with these numbers in each layer."""
    total = np.ones(1)
    for a, b in zip(first, second, strict=True):
        total = np.convolve(total, hypergeom.pmf(np.arange(min(a, b) + 1), d_mlp, a, b))
    return float(min(total[shared:].sum(), 1.0))
