"""How sinks arise in training: attention to one position, the norm of its value and its residual peak by checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.attention._activations import sizes
from interp.attention.norms import norm_profile
from interp.attention.sinks import EPSILON, sink_scores
from interp.models import load_model, provenance
from interp.results import Result, labelled

Measure = Literal["importance", "value_ratio", "output_ratio"]


@dataclass(frozen=True, eq=False, repr=False)
class SinkDynamics(Result):
    """One position over training: `(measure, step, layer, head, example)`.

    Measures: `importance`, mean attention to the position; `value_ratio` and `output_ratio`, norm of its value, before
    and after W_O, over that at the other positions.

    Attributes:
        peak: Norm of the residual stream at the position over the mean of the others, `(step, state, example)`.
    """

    peak: xr.DataArray

    def rates(self, epsilon: float | int = EPSILON) -> xr.DataArray:
        """Sink rate of the position by step."""
        return (self.values.sel(measure="importance", drop=True) > epsilon).mean(["layer", "head", "example"])

    def plot(self, measure: Measure = "importance", *, top: int = 4) -> Any:
        """Lines over steps for the `top` heads with the largest final importance and for the mean of the others.

        The axis is split: step 0, then steps on a logarithmic scale.
        """
        final = self.values.sel(measure="importance").isel(step=-1).mean("example")
        flat = final.stack(cell=("layer", "head"))
        order = np.argsort(-flat.values, kind="stable")
        cells = flat["cell"].values[order]
        values = self.values.sel(measure=measure, drop=True).mean("example").stack(cell=("layer", "head"))
        named = {f"L{layer}H{head}": values.sel(cell=(layer, head), drop=True) for layer, head in cells[:top]}
        if len(cells) > top:
            named["mean of the others"] = values.isel(cell=order[top:])
            named["mean of the others"] = named["mean of the others"].mean("cell")
        position = self.provenance["key"]
        title = {
            "importance": f"Attention to position {position} during training",
            "value_ratio": f"Value norm at position {position} over that at others, during training",
            "output_ratio": f"Norm of value x W_O at position {position} over that at others, during training",
        }[measure]
        return _split_lines(named, "head", title, "mean attention weight" if measure == "importance" else "ratio")

    def plot_peak(self) -> Any:
        """Lines over steps for every state: how much the stream at the position outgrows the others."""
        means = self.peak.mean("example")
        named = {f"after {int(state)} blocks": means.sel(state=state, drop=True) for state in means["state"]}
        title = f"Residual norm at position {self.provenance['key']} over that at others, during training"
        return _split_lines(named, "state", title, "ratio")


def sink_dynamics(
    models: Mapping[int, Any],
    tokens: Int[Tensor, "batch pos"],
    *,
    key: int = 0,
    batch_size: int | None = None,
) -> SinkDynamics:
    """The sink statistics of one position in a series of checkpoints. Costs two forwards per checkpoint.

    Args:
        models: Training step to a loaded model or to anything that `interp.load_model` takes; these are loaded one at a
            time.
        tokens: Token ids, the same for all.

    Raises:
        ValueError: If there are no models, or they differ in size. Others as `sink_scores`.

    Source:
        The quantities whose growth Guo et al. 2024 (arXiv:2410.13835) follow: attention, value norm, residual norm.
    """
    if not models:
        raise ValueError("sink_dynamics got no models; pass a mapping from training step to model")
    steps = sorted(int(step) for step in models)
    if not 0 <= key < tokens.shape[1]:
        raise ValueError(f"key={key} is not a position of these tokens; expected 0 to {tokens.shape[1] - 1}")
    measured, peaks, found, record, names = [], [], {}, {}, []
    for step in steps:
        model = models[step]
        bridge = model if hasattr(model, "blocks") else load_model(model, check=False)
        shape = sizes(bridge)
        found[step] = (shape.n_layers, shape.n_heads)
        if found[step] != found[steps[0]]:
            raise ValueError(f"step {step} has (layers, heads) {found[step]} and step {steps[0]} {found[steps[0]]}")
        scores = sink_scores(bridge, tokens, keys=[key], batch_size=batch_size)
        norms = norm_profile(bridge, tokens, batch_size=batch_size)
        value = norms.ratio("value", key).values.repeat(shape.n_heads // shape.n_kv_heads, axis=1)
        measured.append(np.stack([scores.values.sel(key=key).values, value, norms.ratio("output", key).values]))
        peaks.append(norms.ratio("residual", key).values)
        record = provenance(bridge)
        names.append(record["model"])
    n_layers, n_heads = found[steps[0]]
    coords = {
        "measure": ["importance", "value_ratio", "output_ratio"],
        "step": steps,
        "layer": range(n_layers),
        "head": range(n_heads),
        "example": range(len(tokens)),
    }
    states = {"step": steps, "state": range(n_layers + 1), "example": range(len(tokens))}
    n, n_pos = tokens.shape
    settings = {"models": names, "n_examples": n, "n_pos": n_pos, "key": key, "cost": {"forwards": 2 * len(steps)}}
    return SinkDynamics(
        labelled(np.stack(measured, axis=1), list(coords), coords),
        {**record, "method": "sink_dynamics", **settings},
        labelled(np.stack(peaks), list(states), states, unit="ratio to other positions"),
    )


def _split_lines(named: Mapping[str, xr.DataArray], group: str, title: str, unit: str) -> Any:
    """Lines over `step` on a split axis: step 0 on the left, then a logarithmic scale."""
    import pandas as pd

    from interp.plotting import lines

    steps = next(iter(named.values()))["step"].values
    positive = steps[steps > 0]
    if len(positive) == 0:
        raise ValueError(f"there is no step but {steps.tolist()}; a course needs at least one after 0")
    first = float(np.log10(positive[0]))
    room = max(0.1 * (float(np.log10(positive[-1])) - first), 0.15)
    place = {int(step): float(np.log10(step)) if step > 0 else first - 2 * room for step in steps}
    tables = [
        pd.DataFrame({group: name, "place": [place[int(step)] for step in steps], "value": line.values})
        for name, line in named.items()
    ]
    figure = lines(pd.concat(tables, ignore_index=True), x="place", group=group, title=title, unit=unit,
                   x_title="training step (0, then logarithmic)", width=820)  # fmt: skip
    # every other label where there are many, the last always
    labelled_steps = [int(step) for i, step in enumerate(steps) if step == 0 or (len(steps) - 1 - i) % 2 == 0]
    figure.update_xaxes(
        tickmode="array", tickvals=[place[s] for s in labelled_steps], ticktext=[str(s) for s in labelled_steps]
    )
    if 0 in place:
        figure.add_annotation(x=first - room, y=0, xref="x", yref="paper", text="//", showarrow=False, yanchor="middle")
    return figure
