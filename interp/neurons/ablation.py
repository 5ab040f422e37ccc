"""What each set of neurons is needed for: every set ablated on every task, beside control sets of the same size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.models import provenance, require_eval
from interp.neurons._ablating import (
    MEASURES,
    UNITS,
    Control,
    Engine,
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
from interp.neurons._clamp_edits import Neuron
from interp.neurons.activation_statistics import NeuronStatistics
from interp.prompts import Prompts
from interp.results import Result, labelled
from interp.stats import adjust_p_values, bootstrap_interval, paired_test

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class AblationMatrix(Result):
    """Change of every task when each set of neurons is ablated.

    Attributes:
        values: Ablated minus intact `[measure, set, task, example]`: negative means the neurons helped. Measures:
            `"accuracy"` (0 or 1: the answer has the largest logit), `"log_prob"` of the answer in nats, and
            `"logit_difference"` to the foil, which alone is not flat where the model is sure. Tasks with fewer examples
            than the largest are NaN at the end.
        controls: The same for control sets `[measure, control, draw, set, task, example]`.
        baseline: The intact model `[measure, task, example]`.
    """

    controls: xr.DataArray
    baseline: xr.DataArray

    def difference(self, control: Control = "matched", measure: Measure = "logit_difference") -> xr.DataArray:
        """Effect of each set minus the mean effect of its control sets `[set, task, example]`, example by example."""
        self._check(measure, control)
        mean = self.controls.sel(measure=measure, control=control, drop=True).mean("draw")
        return self.values.sel(measure=measure, drop=True) - mean

    def summary(self, measure: Measure = "logit_difference", *, seed: int = 0) -> pd.DataFrame:
        """One row per set and task: intact level, effect with its 95 % interval over examples, and for each control the
        mean effect of its sets, the lowest and highest of them, the difference with interval and p-value.

        p-values are of sign flips over examples, Holm-adjusted over the table (per control). They say that these
        neurons differ from the control sets that were drawn.
        """
        import pandas as pd

        self._check(measure)
        effects = self.values.sel(measure=measure)
        rows = []
        for name in effects["set"].values:
            for task in effects["task"].values:
                cell = _measured(effects.sel(set=name, task=task))
                mean, low, high = (float(x) for x in bootstrap_interval(cell, seed=seed))
                baseline = float(self.baseline.sel(measure=measure, task=task).mean())
                row = {"set": name, "task": task, "own": name == task, "intact": baseline, "effect": mean, "low": low,
                       "high": high}  # fmt: skip
                for control in self.controls["control"].values:
                    draws = self.controls.sel(measure=measure, control=control, set=name, task=task).mean("example")
                    paired = _measured(self.difference(control, measure).sel(set=name, task=task))
                    gap, gap_low, gap_high = (float(x) for x in bootstrap_interval(paired, seed=seed))
                    row |= {
                        str(control): float(draws.mean()), f"{control}_lowest": float(draws.min()),
                        f"{control}_highest": float(draws.max()), f"beyond_{control}": gap,
                        f"beyond_{control}_low": gap_low, f"beyond_{control}_high": gap_high,
                        f"p_{control}": float(paired_test(paired, seed=seed)),
                    }  # fmt: skip
                rows.append(row)
        frame = pd.DataFrame(rows)
        for control in self.controls["control"].values:
            frame[f"p_{control}"] = adjust_p_values(frame[f"p_{control}"], method="holm")
        return frame

    def interference(
        self, measure: Measure = "logit_difference", *, control: Control = "matched", seed: int = 0
    ) -> pd.DataFrame:
        """The cells off the diagonal in which ablation *improves* the task, strongest first.

        Sets and tasks of one name are the diagonal. A cell is listed if its interval lies above zero;
        `beyond_control` is true if the difference to the control sets lies above zero too, since taking any neurons out
        can make an answer likelier. At an intact accuracy of 1 only `"log_prob"` can rise.
        """
        frame = self.summary(measure, seed=seed)
        frame = frame[~frame["own"] & (frame["low"] > 0)]
        frame = frame.assign(beyond_control=frame[f"beyond_{control}_low"] > 0)
        kept = ["set", "task", "intact", "effect", "low", "high", control, f"beyond_{control}", f"p_{control}",
                "beyond_control"]  # fmt: skip
        return frame[kept].sort_values("effect", ascending=False, kind="stable").reset_index(drop=True)

    def specificity(self, measure: Measure = "logit_difference", *, seed: int = 0) -> pd.DataFrame:
        """Per set that has a task of its name: effect on its own task, mean effect on the others, and their difference
        with a 95 % interval (examples of every task resampled; tasks count alike). Negative: the own task is hurt more.
        """
        import pandas as pd

        self._check(measure)
        effects = self.values.sel(measure=measure)
        rows = []
        for name in [name for name in effects["set"].values if name in effects["task"].values]:
            resampled, means = {}, {}
            for task in effects["task"].values:
                cell = _measured(effects.sel(set=name, task=task))
                counts = np.random.default_rng(seed).multinomial(len(cell), np.full(len(cell), 1 / len(cell)), 2000)
                resampled[task], means[task] = counts @ cell / len(cell), cell.mean()
            others = [task for task in means if task != name]
            if not others:
                raise ValueError("there is one task only; specificity compares a set's own task with others")
            gap = resampled[name] - np.mean([resampled[task] for task in others], 0)
            low, high = np.quantile(gap, [0.025, 0.975])
            away = float(np.mean([means[task] for task in others]))
            rows.append({"set": name, "own": float(means[name]), "others": away, "difference": means[name] - away,
                         "low": low, "high": high})  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, measure: Measure = "logit_difference", *, beyond: Control | None = None) -> go.Figure:
        """Heat map of the mean change, ablated sets down, tasks across; `beyond="matched"`: minus that of controls."""
        from interp import plotting

        self._check(measure, beyond)
        shown = self.values.sel(measure=measure, drop=True) if beyond is None else self.difference(beyond, measure)
        low, high = (np.empty(shown.shape[:2]) for _ in range(2))
        for i in range(shown.shape[0]):
            for j in range(shown.shape[1]):
                _, low[i, j], high[i, j] = bootstrap_interval(_measured(shown[i, j]))
        title = f"Effect of sets of neurons on tasks ({self.provenance['mode']})"
        title += "" if beyond is None else f", beyond {beyond} controls"
        return plotting.heatmap(
            shown.mean("example"), title=title, unit=UNITS[measure], origin="top", hover={"low": low, "high": high}
        )

    def _check(self, measure: str, control: str | None = None) -> None:
        if measure not in MEASURES:
            raise ValueError(f"measure={measure!r}; expected one of {', '.join(map(repr, MEASURES))}")
        if control is not None and control not in (known := list(self.controls["control"].values)):
            raise ValueError(f"no control {control!r} was run; there is {', '.join(map(repr, known)) or 'none'}")


def ablation_matrix(
    bridge: Any,
    sets: Mapping[str, Sequence[Neuron]],
    tasks: Tasks,
    *,
    mode: Mode = "mean",
    positions: Where = "all",
    controls: Sequence[Control] = ("matched", "uniform"),
    n_controls: int = 5,
    statistics: NeuronStatistics | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> AblationMatrix:
    """Ablate each set of neurons on each task, and sets of control neurons as large.

    All neurons of a set are ablated together, `hook_post` replaced by zero or the neuron's mean; everything above sees
    it. Identify the sets on other entities, and better other wordings, than the tasks ask about (`relation_prompts`).
    Costs one forward over every task's prompts per set and control set, `sets x (1 + controls x n_controls) + 1`, with
    rows of different sets in one batch; and one for the statistics.

    Args:
        sets: Name to neurons `(layer, index)`.
        tasks: Name to prompts; several where wordings differ in length. The clean prompts are asked.
        mode: `"zero"` takes the neuron out of the range it is ever in, for neurons that are not about zero at rest;
            `"mean"` puts in its mean over the ablated positions of all tasks (or of `statistics`).
        positions: `"all"`, or only the `"end"`, where the answer is predicted.
        controls: `"matched"`: same layer, about as often active, as strongly, with as long output weights
            (`match_neurons`); `"uniform"`: any neurons, most of which do little.
        n_controls: Control sets of each kind.
        statistics: `neuron_statistics` of other text, for means and matching.

    Raises:
        ValueError: If a set, task or option does not fit, or a layer has too few neurons to match.

    Source:
        Liu et al. 2025 (EMNLP), *On Relation-Specific Neurons in Large Language Models*: neurons are deactivated (zero,
        all positions) and compared with random ones. Means and magnitude-matched controls are added here: neurons that
        are large break more than random ones whatever they know.
    """
    require_eval(bridge)
    named, asked = check_ablation(bridge, sets, tasks, mode, positions, controls, n_controls, batch_size)
    ablation, statistics = make_ablation(bridge, named, asked, mode, positions, statistics)
    return measure_sets(
        bridge, ablation, named, asked, controls, n_controls, statistics, batch_size, seed,
        method="ablation_matrix", mode=mode, positions=positions,
    )  # fmt: skip


def measure_sets(
    bridge: Any, engine: Engine, named: Mapping[str, Sequence[Neuron]], asked: Mapping[str, Sequence[Prompts]],
    controls: Sequence[Control], n_controls: int, statistics: NeuronStatistics, batch_size: int | None, seed: int,
    *, repeats: int = 1, **settings: Any,
) -> AblationMatrix:  # fmt: skip
    """Every set and its controls on every task, whatever is done to the neurons; each set `repeats` times, averaged."""
    chosen, quality = [neurons for neurons in named.values() for _ in range(repeats)], {}
    for control in controls:
        for number, (name, neurons) in enumerate(named.items()):
            drawn, quality[f"{control}: {name}"] = control_sets(statistics, neurons, control, n_controls, seed + number)
            chosen += drawn
    n_sets, n_own, n_draws = len(named), len(named) * repeats, n_controls if controls else 0
    effects, levels = [], []
    for prompts in asked.values():
        before = np.concatenate([intact_scores(bridge, one, batch_size) for one in prompts], -1)
        after = np.concatenate([set_scores(bridge, engine, one, chosen, batch_size) for one in prompts], -1)
        levels.append(before)
        effects.append(after - before[:, None])
    length = max(part.shape[-1] for part in levels)
    changes = padded(effects, length)  # [measure, set, task, example]
    own = changes[:, :n_own].reshape(len(MEASURES), n_sets, repeats, len(asked), length).mean(2)
    drawn = changes[:, n_own:].reshape(len(MEASURES), len(controls), n_sets, n_draws, len(asked), length)
    coords = {"measure": list(MEASURES), "set": list(named), "task": list(asked)}
    return AblationMatrix(
        values=labelled(own, ("measure", "set", "task", "example"), coords),
        provenance=provenance(
            bridge, **settings, n_controls=n_draws, seed=seed,
            sets={name: [list(neuron) for neuron in neurons] for name, neurons in named.items()},
            examples={name: sum(len(one) for one in prompts) for name, prompts in asked.items()}, match=quality,
        ),
        controls=labelled(
            drawn.transpose(0, 1, 3, 2, 4, 5), ("measure", "control", "draw", "set", "task", "example"),
            {**coords, "control": list(controls), "draw": list(range(n_draws))},
        ),
        baseline=labelled(
            padded(levels, length), ("measure", "task", "example"), {key: coords[key] for key in ("measure", "task")}
        ),
    )  # fmt: skip


def _measured(cell: xr.DataArray) -> np.ndarray:
    values = cell.values.astype(np.float64)
    return values[~np.isnan(values)]
