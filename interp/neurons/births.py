"""When in training does a neuron get the label it ends with?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.models import geometry, provenance, require_eval
from interp.neurons._label_lists import (
    Score,
    check_options,
    displaced,
    label_lists,
    label_texts,
    null_draws,
    null_tops,
    prepared,
    require_alike,
    sides_of,
    specificity,
    token_strings,
)
from interp.neurons._sides import Side, side_vectors, unembedding
from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd

CURVES = ("measured", "displaced", "shuffled")


@dataclass(frozen=True, eq=False, repr=False)
class LabelBirths(Result):
    """The training step at which every neuron's label is born.

    `values` (side, layer, neuron): the first checkpoint from which on the top token is the final one at every
    checkpoint; the last checkpoint for neurons that got it only then. NaN, and not counted in any share, for neurons
    that end (almost) zero and so have no label; one that is zero at a checkpoint does not have its label there.

    Attributes:
        agreement: (curve, side, step, layer) share of neurons that have their final label at a checkpoint: "measured";
            "displaced", what is left of the final labels when the final weights are moved as far as the checkpoint is
            away but in random directions; "shuffled", what labels dealt out anew within the layer would give.
        has_final: (side, step, layer, neuron) whether the label is the final one.
        q_values: (side, step, layer, neuron) of the best score against rotated vectors, corrected over the side.
        label_ids: (side, layer, neuron) the final labels, -1 for none.
        tokens: Strings of the tokens, empty without a tokenizer.
    """

    agreement: xr.DataArray
    has_final: xr.DataArray
    q_values: xr.DataArray
    label_ids: xr.DataArray
    tokens: list[str]

    def table(self) -> pd.DataFrame:
        """One row per side and neuron: `birth`, `label`, `q_value` at the end, `first_specific` (first checkpoint with
        q below 0.05, NaN if none)."""
        frame = self.to_dataframe().rename(columns={"value": "birth"})
        frame["label"] = label_texts(self.label_ids.values.reshape(-1), self.tokens)
        frame["q_value"] = self.q_values.isel(step=-1).values.reshape(-1)
        specific = (self.q_values < 0.05).values
        first = self.q_values["step"].values[specific.argmax(1)]
        frame["first_specific"] = np.where(specific.any(1), first, np.nan).reshape(-1)
        return frame

    def by_step(self, *, specific: bool | None = None) -> pd.DataFrame:
        """One row per side and step: `born`, the share of labels born by then; `has_final`; `displaced` and `shuffled`
        (over all neurons); `specific`, the share of neurons with q below 0.05 at that step.

        Args:
            specific: Only neurons that are specific at the end (True) or not (False), in `born` and `has_final`.
        """
        import pandas as pd

        rows = []
        for side in self.values["side"].values:
            births = self.values.sel(side=side).values
            q = self.q_values.sel(side=side)
            final = q.isel(step=-1).values < 0.05
            chosen = ~np.isnan(births) & (np.ones_like(final) if specific is None else final == specific)
            for step in q["step"].values:
                has = self.has_final.sel(side=side, step=step).values
                rest = self.agreement.sel(side=side, step=step).mean("layer")
                now = q.sel(step=step).values
                now = now[~np.isnan(now)]
                rows.append(
                    {
                        "side": str(side),
                        "step": int(step),
                        "neurons": int(chosen.sum()),
                        "born": float((births[chosen] <= step).mean()) if chosen.any() else np.nan,
                        "has_final": float(has[chosen].mean()) if chosen.any() else np.nan,
                        "displaced": float(rest.sel(curve="displaced")),
                        "shuffled": float(rest.sel(curve="shuffled")),
                        "specific": float((now < 0.05).mean()) if len(now) else np.nan,
                    }
                )
        return pd.DataFrame(rows)

    def plot(self) -> Any:
        """Figure: share of neurons with their final label by training step, a line per side, with what a random
        displacement of the same size leaves (mean of the sides). Step 0 is drawn at 1."""
        import pandas as pd

        from interp.plotting import lines

        frame: Any = self.by_step()
        frame["step"] = frame["step"].clip(lower=1)
        measured = frame.assign(what=frame["side"], value=frame["has_final"])
        floor = frame.groupby("step", as_index=False)["displaced"].mean()
        floor = floor.rename(columns={"displaced": "value"}).assign(what="random displacement")
        return lines(
            pd.concat([measured, floor]),
            x="step",
            group="what",
            title="Neurons that have their final label",
            unit="share of neurons",
            x_title="training step",
            log_x=True,
        )


@torch.no_grad()
def label_births(
    bridges_by_step: Mapping[int, Any],
    *,
    weights: Side | Sequence[Side] | None = None,
    score: Score = "centred_cosine",
    fold: bool = True,
    seed: int = 0,
    memory_budget: int = 2**28,
) -> LabelBirths:
    """When the final label of every neuron appears for good, over the checkpoints of a training run.

    Every checkpoint is decoded with its own unembedding, so a label can come from either. A label that is there from
    the start was not learnt; one that does not outlive a random displacement of the size of the later training owes its
    late birth to its small margin. No forward. Cost in products of neurons and vocabulary: 3 per side and checkpoint.

    Args:
        bridges_by_step: Models by training step, or functions of no argument that load one: these are called when it
            is their turn (the last step first), and only two models are held at a time.
        weights: `"in"`, `"gate"`, `"out"`, several of them, or all that the model has.
        score: What tokens are ranked by (`compare`).
        fold: Put norm gains into vectors and unembedding.
        seed: Of null rotations and displacements.
        memory_budget: Bytes for a tile of scores.

    Raises:
        ValueError: If there are fewer than two checkpoints, or their shapes or vocabularies differ.

    Source:
        Base against tuned is Davies 2025 (arXiv:2501.02688); births over checkpoints, and both floors, are ours.

    Example:
        >>> steps = (0, 529, 3906)
        >>> models = {step: interp.load_model(f"tinyworld-llama@step-{step:05}", check=False) for step in steps}
        >>> interp.neurons.label_births(models).plot()
    """
    steps = sorted(bridges_by_step)
    if len(steps) < 2:
        raise ValueError(f"{len(steps)} checkpoint; births need at least two, by step: {{0: bridge, 100: bridge, ...}}")
    last = _load(bridges_by_step[steps[-1]])
    require_eval(last)
    sides, shape = sides_of(last, weights), geometry(last)
    check_options(score, 1, shape.d_vocab)
    final_head = unembedding(last, fold=fold)
    grid = (len(sides), len(steps), shape.n_layers, shape.d_mlp)
    ids, tops = torch.zeros(grid, dtype=torch.int32), torch.full(grid, torch.nan)
    draws = null_draws(shape.n_layers, shape.d_mlp, score)
    null = torch.full((*grid[:3], draws * shape.d_mlp), torch.nan)
    stays = torch.zeros(grid, dtype=torch.bool)
    for n, step in reversed(list(enumerate(steps))):  # from the end, whose labels the others are compared with
        bridge = last if step == steps[-1] else _load(bridges_by_step[step])
        require_eval(bridge)
        require_alike([last, bridge], [f"step {steps[-1]}", f"step {step}"])
        raw = unembedding(bridge, fold=fold).to(final_head)
        head = prepared(raw, score)
        noisy = prepared(displaced(final_head.T, raw.T, seed + n).T.contiguous(), score)
        for i, side in enumerate(sides):
            for layer in range(shape.n_layers):
                rows = side_vectors(bridge, layer, side, fold=fold).to(final_head)
                values, found = label_lists(rows, head, 1, score, memory_budget)
                ids[i, n, layer], tops[i, n, layer] = found[:, 0], values[:, 0]
                null[i, n, layer] = null_tops(rows, head, score, seed + draws * layer, draws, memory_budget)
                end = side_vectors(last, layer, side, fold=fold)
                draw = seed + len(steps) * (1 + i * shape.n_layers + layer) + n
                moved = displaced(end, rows, draw)
                _, left = label_lists(moved, noisy, 1, score, memory_budget)
                stays[i, n, layer] = left[:, 0] == ids[i, -1, layer]
    alive = ids[:, -1:] >= 0
    has_final = (ids == ids[:, -1:]) & alive
    stable = has_final.flip(1).long().cumprod(1).sum(1)  # checkpoints at the end that all have the final label
    first = (len(steps) - stable).clamp_max(len(steps) - 1)
    births = torch.tensor(steps, dtype=torch.float32)[first].masked_fill(~alive[:, 0], torch.nan)
    shuffled = torch.tensor(
        [[[_chance(ids[i, n, layer], ids[i, -1, layer]) for layer in range(grid[2])] for n in range(grid[1])]
         for i in range(grid[0])]
    )  # fmt: skip
    shares = [same.float().masked_fill(~alive, torch.nan).nanmean(-1) for same in (has_final, stays)]
    curves = torch.stack([*shares, shuffled])
    q_values = np.stack(
        [[specificity(tops[i, n], null[i, n], score) for n in range(len(steps))] for i in range(len(sides))]
    )
    coords = {"side": sides, "layer": np.arange(shape.n_layers), "neuron": np.arange(shape.d_mlp)}
    all_coords = {**coords, "step": steps}
    dims = ("side", "step", "layer", "neuron")
    record = provenance(last, method="label_births", steps=steps, score=score, fold=fold, seed=seed)
    return LabelBirths(
        labelled(births, ("side", "layer", "neuron"), coords, unit="training step"),
        record,
        agreement=labelled(
            curves,
            ("curve", "side", "step", "layer"),
            {"curve": list(CURVES), "side": sides, "step": steps, "layer": coords["layer"]},
            unit="share of neurons",
        ),
        has_final=xr.DataArray(has_final.numpy(), dims=dims, coords=all_coords),
        q_values=labelled(q_values, dims, all_coords),
        label_ids=xr.DataArray(ids[:, -1].numpy(), dims=("side", "layer", "neuron"), coords=coords),
        tokens=token_strings(last),
    )


def _load(model: Any | Callable[[], Any]) -> Any:
    """A bridge is callable too: only what is no module is taken for a function that loads one."""
    return model if isinstance(model, torch.nn.Module) else model()


def _chance(labels: Tensor, final: Tensor) -> float:
    """Expected agreement when the labels of a layer are dealt out anew among its neurons that end with one."""
    labels, final = labels[final >= 0], final[final >= 0]
    if len(final) == 0:
        return float("nan")
    size = int(torch.maximum(labels.max(), final.max())) + 1
    counts = [torch.bincount(ids[ids >= 0], minlength=size).double() / len(ids) for ids in (labels, final)]
    return float((counts[0] * counts[1]).sum())
