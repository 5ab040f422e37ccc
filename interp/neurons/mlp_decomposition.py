"""An MLP at the answer position as a few scalars on the heads before it and one vector per task."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from interp.models import provenance, require_eval
from interp.neurons._mlp_parts import Basis, Parts, as_sets, groups_of, mlp_parts, source_layers
from interp.neurons._sides import unembedding
from interp.prompts import Prompts
from interp.results import Result, labelled


@dataclass(frozen=True, eq=False, repr=False)
class MLPDecomposition(Result):
    """`mlp_out ~ sum_h w_h * head_h + b` per task: `values (task, regressor)` are the scalars w.

    w > 0: the MLP adds more of what the head wrote; w < 0: it takes it back.

    Attributes:
        intercepts: b, `(task, d_model)`, in units of the residual stream; 0 without an intercept.
        r2: `(task, measure, fold)`. `train` and `heldout`: share explained of the variance about the mean of the
            training examples, which is what the intercept alone explains; `heldout_energy`: of the squared length,
            intercept included; `shuffled`: `heldout` with the heads of other examples. A fold holds entities out.
        direct: Direct logits (mean over vocabulary 0) of the answers of a task, mean over its distinct answers, from
            the parts fitted to a task: `(part, task, answers_of)`, part `intercept` or `regressors` (mean over
            examples).
        own: Direct logit of an example's own answer less the mean of the task's answers, `(part, task)`.
        layer: The MLP's.
        answers: Task to its distinct answer token ids.
        entities: Task to the entities fitted on.
    """

    intercepts: xr.DataArray
    r2: xr.DataArray
    direct: xr.DataArray
    own: xr.DataArray
    layer: int
    answers: dict[str, list[int]]
    entities: dict[str, list[str]]

    def decode(self, bridge: Any, k: int = 10, *, contrast: bool = False) -> pd.DataFrame:
        """The `k` tokens that each task's intercept raises most, by direct logit with the scale of the prompts.

        Args:
            contrast: Decode the intercept less the mean intercept of all tasks: what is particular to the task.

        Returns:
            Columns `task, rank, token, text, logit`.
        """
        vectors = torch.from_numpy(self.intercepts.values)
        if contrast:
            if len(vectors) < 2:
                raise ValueError("contrast=True needs the intercepts of two tasks or more; this has one")
            vectors = vectors - vectors.mean(0)
        rows = []
        weights = unembedding(bridge, fold=True).float().cpu()
        for task, vector in zip(self.intercepts.coords["task"].values, vectors, strict=True):
            logits = vector @ weights / self.provenance["scale"][str(task)]
            top = (logits - logits.mean()).topk(k)
            for rank, (value, token) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
                text = f"#{token}" if bridge.tokenizer is None else bridge.tokenizer.decode([token])
                rows.append({"task": str(task), "rank": rank, "token": token, "text": text, "logit": value})
        return pd.DataFrame(rows)

    def summary(self) -> pd.DataFrame:
        """One row per task: mean R2 of each measure over folds."""
        return self.r2.mean("fold").to_dataframe("r2")["r2"].unstack("measure").reset_index()

    def plot(self) -> Any:
        """Weights of the regressors by task."""
        from interp.plotting import heatmap

        return heatmap(self.values, title=f"Weights of the MLP of layer {self.layer} on its inputs", unit="weight")


def decompose_mlp(
    bridge: Any,
    layer: int,
    tasks: Mapping[str, Prompts | Sequence[Prompts]],
    *,
    basis: Basis = "heads",
    intercept: bool = True,
    ridge: float | int = 0.0,
    folds: int = 5,
    by: str | None = None,
    seed: int = 0,
) -> MLPDecomposition:
    """Fit, per task, what the MLP of a layer adds at `end` by scalars on what heads wrote there plus one vector.

    Least squares over all examples and all coordinates of the stream: H scalars and, with `intercept`, d_model numbers
    that are the same for every example of the task. R2 is measured on entities that were held out. Parts are what is
    added to the stream: after the norm, in post-norm models. Costs one forward of the prompts.

    Args:
        tasks: Name to prompts (several of them where lengths differ), such as `distinct_facts(bridge)`.
        basis: `"heads"`: the heads of the same layer. `"all_heads"`: of all layers that reach this MLP. `"resid"`: two
            regressors, the stream that enters the block and what its attention adds.
        ridge: Penalty on the scalars, as a share of the mean diagonal of their normal equations; the intercept is free.
        folds: Parts that the entities are divided into, with `seed`.
        by: The label that names the entity; by default `country`, else `subject`.

    Raises:
        ValueError: If options, labels or the number of entities do not fit; in parallel blocks, whose heads do not feed
            the MLP beside them, unless `basis="all_heads"`; if head outputs do not add up on this model.
        RuntimeError: In training mode.

    Source:
        Lv et al. 2024 (arXiv:2403.19521): regression of an MLP's output on head outputs with a task-aware intercept.
        Held-out entities, the shuffled control and R2 about the mean are ours.
    """
    require_eval(bridge)
    sets = as_sets(bridge, tasks)
    n_layers = int(bridge.cfg.n_layers)
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer={layer} is not a layer of this model; expected 0 to {n_layers - 1}")
    source_layers(bridge, layer, basis)
    if not 0 <= ridge < np.inf:
        raise ValueError(f"ridge={ridge}; expected a number from 0")
    if folds < 2:
        raise ValueError(f"folds={folds}; expected at least 2, so that something is held out")
    entities = {task: groups_of(some, by, task) for task, some in sets.items()}
    for task, groups in entities.items():
        if len(set(groups)) < folds:
            raise ValueError(f"task {task!r} is about {len(set(groups))} entities, which cannot make {folds} folds")
    answers = {task: sorted({int(a) for one in some for a in one.answers}) for task, some in sets.items()}
    weights = unembedding(bridge, fold=True).double().cpu()
    fitted: dict[str, tuple[Tensor, Tensor]] = {}
    r2, direct, own, scales, names = [], [], [], {}, []
    for task, some in sets.items():
        parts = mlp_parts(bridge, some, layer, basis)
        w, b = fitted[task] = _fit(parts.mlp, parts.regressors, intercept, float(ridge))
        r2.append(_held_out(parts, entities[task], intercept, float(ridge), folds, seed))
        scales[task], names = float(parts.scale.mean()), parts.names
        wrote = torch.einsum("r,nrd->nd", w, parts.regressors)
        logits = {"intercept": b[None] @ weights, "regressors": wrote @ weights}
        targets = torch.cat([one.answers for one in some])
        direct.append([])
        own.append([])
        for found in logits.values():
            found = (found - found.mean(-1, keepdim=True)) / scales[task]
            direct[-1].append([float(found[:, ids].mean()) for ids in answers.values()])
            picked = found.expand(len(targets), -1)[torch.arange(len(targets)), targets]
            own[-1].append(float((picked - found[:, answers[task]].mean(-1)).mean()))
    names_of = {"task": list(sets), "part": ["intercept", "regressors"], "answers_of": list(sets)}
    coords = {"task": list(sets), "regressor": names}
    record = provenance(
        bridge, method="decompose_mlp", layer=layer, basis=basis, intercept=intercept, ridge=float(ridge), folds=folds,
        seed=seed, by=by, scale=scales, n_examples={task: len(groups) for task, groups in entities.items()},
        cost={"forwards": 1},
    )  # fmt: skip
    measures = ["train", "heldout", "heldout_energy", "shuffled"]
    return MLPDecomposition(
        labelled(torch.stack([w for w, _ in fitted.values()]), ("task", "regressor"), coords, unit="weight"),
        record,
        intercepts=labelled(torch.stack([b for _, b in fitted.values()]), ("task", "d_model"), {"task": list(sets)}),
        r2=labelled(np.array(r2), ("task", "measure", "fold"), {"task": list(sets), "measure": measures}),
        direct=labelled(np.array(direct), ("task", "part", "answers_of"), names_of, unit="logits"),
        own=labelled(np.array(own), ("task", "part"), {key: names_of[key] for key in ("task", "part")}, unit="logits"),
        layer=layer,
        answers=answers,
        entities={task: sorted({str(group) for group in groups}) for task, groups in entities.items()},
    )


def _fit(mlp: Tensor, regressors: Tensor, intercept: bool, ridge: float) -> tuple[Tensor, Tensor]:
    """Scalars `[regressor]` and the intercept `[d_model]`."""
    mean_mlp, mean_reg = mlp.mean(0), regressors.mean(0)
    if not intercept:
        mean_mlp, mean_reg = torch.zeros_like(mean_mlp), torch.zeros_like(mean_reg)
    y, x = mlp - mean_mlp, regressors - mean_reg
    gram = torch.einsum("nrd,nsd->rs", x, x)
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    w = torch.linalg.pinv(gram, hermitian=True) @ torch.einsum("nrd,nd->r", x, y)
    return w, mean_mlp - torch.einsum("r,rd->d", w, mean_reg)


def _held_out(
    parts: Parts, groups: list[Hashable], intercept: bool, ridge: float, folds: int, seed: int
) -> list[list[float]]:
    order = sorted(set(groups), key=str)
    random.Random(seed).shuffle(order)
    fold_of = {group: place % folds for place, group in enumerate(order)}
    fold = torch.tensor([fold_of[group] for group in groups])
    shuffle = torch.randperm(len(fold), generator=torch.Generator().manual_seed(seed))
    out: list[list[float]] = [[], [], [], []]
    for k in range(folds):
        train, test = fold != k, fold == k
        mean = parts.mlp[train].mean(0)
        for place, regressors in ((0, parts.regressors), (3, parts.regressors[shuffle])):
            w, b = _fit(parts.mlp[train], regressors[train], intercept, ridge)
            error = (parts.mlp - torch.einsum("r,nrd->nd", w, regressors) - b).pow(2).sum(-1)
            about = (parts.mlp - mean).pow(2).sum(-1)
            if place == 0:
                out[0].append(float(1 - error[train].sum() / about[train].sum()))
                out[1].append(float(1 - error[test].sum() / about[test].sum()))
                out[2].append(float(1 - error[test].sum() / parts.mlp[test].pow(2).sum()))
            else:
                out[3].append(float(1 - error[test].sum() / about[test].sum()))
    return out
