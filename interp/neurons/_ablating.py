"""Many ablations of neurons at once: each row of a batch has neurons of its own taken out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.hooks import Edit, hook_name, interventions
from interp.hooks.names import device_of
from interp.metrics import ExampleMetric, accuracy, answer_log_prob, logit_difference
from interp.models import geometry
from interp.neurons._clamp_edits import Neuron, check_neurons
from interp.neurons.activation_statistics import NeuronStatistics, neuron_statistics
from interp.neurons.matching import match_neurons
from interp.prompts import Prompts

Mode = Literal["zero", "mean"]
Where = Literal["all", "end"]
Control = Literal["matched", "uniform"]
Measure = Literal["accuracy", "log_prob", "logit_difference"]
Tasks = Mapping[str, Prompts | Sequence[Prompts]]
MEASURES = {"accuracy": accuracy, "log_prob": answer_log_prob, "logit_difference": logit_difference}
UNITS = {"accuracy": "fraction correct", "log_prob": "nats", "logit_difference": "logits"}
_BATCH_TOKENS = 4096


@runtime_checkable
class Engine(Protocol):
    """Runs prompts with sets of neurons changed, many sets in one batch."""

    def edits(self, bridge: Any, prompts: Prompts, chosen: Sequence[Sequence[Neuron]], which: Tensor, example: Tensor
              ) -> Mapping[str, Edit]: ...  # fmt: skip


@dataclass(frozen=True)
class Ablation:
    """Neurons are set to a number.

    Attributes:
        fill: That number, per neuron `[layer, neuron]`.
        where: Positions at which they are.
    """

    fill: Float[Tensor, "layer neuron"]
    where: Where

    def edits(
        self, bridge: Any, prompts: Prompts, chosen: Sequence[Sequence[Neuron]], which: Tensor, example: Tensor
    ) -> Mapping[str, Edit]:
        """Of a batch whose row i has the neurons `chosen[which[i]]` ablated in example `example[i]`."""
        device = device_of(bridge)
        used, row_of = which.unique(return_inverse=True)
        masks: dict[int, Tensor] = {}
        for row, number in enumerate(used.tolist()):
            for layer, index in chosen[number]:
                if layer not in masks:
                    masks[layer] = torch.zeros(len(used), self.fill.shape[1], dtype=torch.bool)
                masks[layer][row, index] = True
        at = ablated_positions(prompts, self.where)[example].to(device)
        return {
            hook_name("neuron", layer): _replace(mask[row_of].to(device), at, self.fill[layer])
            for layer, mask in masks.items()
        }


@dataclass(frozen=True)
class Shift:
    """Value vectors (rows of W_out) are moved: hook_post times the change is added to what the output weights give.

    Attributes:
        change: By number of the set and neuron, the change of its value vector `[d_model]`.
        layer_hook: Name of the output of the output weights, per layer.
    """

    change: Callable[[int, Neuron], Float[Tensor, " d_model"]]
    layer_hook: Callable[[int], str]

    def edits(
        self, bridge: Any, prompts: Prompts, chosen: Sequence[Sequence[Neuron]], which: Tensor, example: Tensor
    ) -> Mapping[str, Edit]:
        """Of a batch whose row i has the value vectors of `chosen[which[i]]` moved."""
        parts: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}  # layer: rows, neurons, changes of each set
        for number in which.unique().tolist():
            rows = (which == number).nonzero().flatten()
            for layer in sorted({layer for layer, _ in chosen[number]}):
                here = [neuron for neuron in chosen[number] if neuron[0] == layer]
                change = torch.stack([self.change(number, neuron) for neuron in here])
                parts.setdefault(layer, []).append((rows, torch.tensor([index for _, index in here]), change))
        edits: dict[str, Edit] = {}
        for layer, changes in parts.items():
            held: list[Tensor] = []
            edits[hook_name("neuron", layer)] = _hold(held)
            edits[self.layer_hook(layer)] = _add_changes(held, changes)
        return edits


def _hold(held: list[Tensor]) -> Edit:
    def edit(post: Tensor) -> Tensor:
        held[:] = [post]
        return post

    return edit


def _add_changes(held: list[Tensor], changes: list[tuple[Tensor, Tensor, Tensor]]) -> Edit:
    def edit(written: Tensor) -> Tensor:
        post, new = held.pop(), written.clone()
        flat = new.reshape(*post.shape[:2], -1)  # some families (OPT) join batch and position here
        for rows, neurons, change in changes:
            rows, neurons = rows.to(post.device), neurons.to(post.device)
            flat[rows] += post[rows][:, :, neurons] @ change.to(post)
        return new

    return edit


@torch.no_grad()
def set_scores(
    bridge: Any, engine: Engine, prompts: Prompts, chosen: Sequence[Sequence[Neuron]], batch_size: int | None
) -> np.ndarray:
    """Every measure `[measure, set, example]` with each set of neurons changed."""
    n, n_pos = prompts.clean.shape
    metrics = [make(prompts) for make in MEASURES.values()]
    found = np.empty((len(MEASURES), len(chosen) * n), np.float32)
    size = batch_size or max(1, _BATCH_TOKENS // n_pos)
    for start in range(0, len(chosen) * n, size):
        place = torch.arange(start, min(start + size, len(chosen) * n))
        which, example = place // n, place % n
        with interventions(bridge, engine.edits(bridge, prompts, chosen, which, example)):
            logits = last_logits(bridge, prompts, example)
        for number, metric in enumerate(metrics):
            found[number, place.numpy()] = _score(metric, logits, example)
    return found.reshape(len(MEASURES), len(chosen), n)


def _replace(mask: Bool[Tensor, "row neuron"], at: Bool[Tensor, "row pos"], fill: Float[Tensor, " neuron"]) -> Edit:
    def edit(post: Tensor) -> Tensor:
        return torch.where(mask[:, None, :] & at[:, :, None], fill.to(post), post)

    return edit


def _score(metric: ExampleMetric, logits: Tensor, example: Tensor) -> np.ndarray:
    return metric.select(example).at(logits).float().cpu().numpy()


def last_logits(bridge: Any, prompts: Prompts, example: Tensor) -> Float[Tensor, "row d_vocab"]:
    """Logits at position `end` of some examples; no other position is unembedded."""
    device = device_of(bridge)
    end = prompts.positions["end"][example]
    kept, place = end.unique(return_inverse=True)
    logits = bridge(prompts.clean[example].to(device), logits_to_keep=kept.to(device))
    return logits[torch.arange(len(example), device=device), place.to(device)]


def intact_scores(bridge: Any, prompts: Prompts, batch_size: int | None) -> np.ndarray:
    """Every measure `[measure, example]`."""
    metrics = [make(prompts) for make in MEASURES.values()]
    size = batch_size or max(1, _BATCH_TOKENS // prompts.clean.shape[1])
    found = np.empty((len(MEASURES), len(prompts)), np.float32)
    with torch.no_grad():
        for start in range(0, len(prompts), size):
            example = torch.arange(start, min(start + size, len(prompts)))
            logits = last_logits(bridge, prompts, example)
            for number, metric in enumerate(metrics):
                found[number, example.numpy()] = _score(metric, logits, example)
    return found


def ablated_positions(prompts: Prompts, where: Where) -> Bool[Tensor, "example pos"]:
    """Which positions an ablation changes: all, or the one at which the answer is predicted."""
    n, n_pos = prompts.clean.shape
    if where == "all":
        return torch.ones(n, n_pos, dtype=torch.bool)
    return torch.arange(n_pos)[None, :] == prompts.positions["end"][:, None]


def make_ablation(
    bridge: Any, named: Mapping[str, Sequence[Neuron]], tasks: Mapping[str, Sequence[Prompts]], mode: Mode,
    where: Where, statistics: NeuronStatistics | None,
) -> tuple[Ablation, NeuronStatistics]:  # fmt: skip
    """What to put in, and the statistics that controls are matched by: of these prompts unless they are given."""
    statistics = statistics_for(bridge, tasks, where, statistics)
    means = torch.from_numpy(np.ascontiguousarray(statistics.column("mean")))
    if mode == "mean":
        known = [layer for layer, row in enumerate(means.tolist()) if not np.isnan(row).all()]
        for name, neurons in named.items():
            if missing := [neuron for neuron in neurons if bool(means[neuron].isnan())]:
                raise ValueError(
                    f"set {name!r} has neurons without a mean to put in, {missing[:5]}: statistics are of layers "
                    f'{known}; call neuron_statistics with the others among layers=, or use mode="zero"'
                )
    fill = torch.zeros_like(means) if mode == "zero" else means
    return Ablation(fill.to(device_of(bridge)), where), statistics


def statistics_for(
    bridge: Any, tasks: Mapping[str, Sequence[Prompts]], where: Where, statistics: NeuronStatistics | None
) -> NeuronStatistics:
    """Those given, if they are of this model, or else of the prompts of the tasks."""
    if statistics is None:
        return prompt_statistics(bridge, [one for sets in tasks.values() for one in sets], where)
    statistics.check_model(bridge)
    return statistics


def prompt_statistics(bridge: Any, prompts: Sequence[Prompts], where: Where) -> NeuronStatistics:
    """Statistics of every neuron at the positions that are ablated. Shorter prompts are padded on the right, where
    no counted position sees it."""
    length = max(one.clean.shape[1] for one in prompts)
    pad = torch.nn.functional.pad
    tokens = torch.cat([pad(one.clean, (0, length - one.clean.shape[1])) for one in prompts])
    masks = [pad(ablated_positions(one, where), (0, length - one.clean.shape[1])) for one in prompts]
    return neuron_statistics(bridge, tokens, mask=torch.cat(masks), quantiles=(0.5,))


def control_sets(
    statistics: NeuronStatistics, neurons: Sequence[Neuron], control: Control, n: int, seed: int
) -> tuple[list[list[Neuron]], dict[str, float]]:
    """`n` control sets, the i-th of each standing for neuron i, and how well they match on average.

    `"matched"`: see `match_neurons`. `"uniform"`: any neurons of the measured layers but these.
    """
    if control == "matched":
        matched = match_neurons(statistics, neurons, n=n, seed=seed)
        quality = matched.values.median(("neuron", "draw")).to_series().to_dict()
        return [[matched.draw(k)[neuron] for neuron in neurons] for k in range(n)], quality
    rng = np.random.default_rng(seed)
    scale = statistics.column("rms")
    free = np.argwhere(~np.isnan(scale))
    taken = set(neurons)
    pool = [(int(layer), int(index)) for layer, index in free if (int(layer), int(index)) not in taken]
    if len(pool) < len(neurons):
        raise ValueError(f"{len(pool)} neurons are left for uniform controls of {len(neurons)}; use a smaller set")
    draws = [[pool[i] for i in rng.choice(len(pool), len(neurons), replace=False)] for _ in range(n)]
    ratio = [scale[b] / scale[a] for draw in draws for a, b in zip(neurons, draw, strict=True) if scale[a] > 0]
    return draws, {"scale_ratio": float(np.median(ratio)) if ratio else float("nan")}


def check_ablation(
    bridge: Any, sets: Mapping[str, Sequence[Neuron]], tasks: Tasks, mode: str, where: str, controls: Sequence[str],
    n_controls: int, batch_size: int | None,
) -> tuple[dict[str, list[Neuron]], dict[str, tuple[Prompts, ...]]]:  # fmt: skip
    """Sets and tasks in one form, once every option is known to make sense."""
    if mode not in ("zero", "mean"):
        raise ValueError(f'mode={mode!r}; expected "zero" or "mean"')
    if where not in ("all", "end"):
        raise ValueError(f'positions={where!r}; expected "all" or "end"')
    if unknown := [control for control in controls if control not in ("matched", "uniform")]:
        raise ValueError(f'controls={unknown}; expected "matched", "uniform", both, or none')
    if controls and n_controls < 1:
        raise ValueError(f"n_controls={n_controls}; expected at least 1, or controls=()")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1, or None")
    if not sets or not tasks:
        raise ValueError(f"{len(sets)} sets of neurons and {len(tasks)} tasks; expected at least one of each, by name")
    shape = geometry(bridge)
    checked = {str(name): check_neurons(neurons, shape, f"set {name!r}") for name, neurons in sets.items()}
    return checked, check_tasks(bridge, tasks)


def check_tasks(bridge: Any, tasks: Tasks) -> dict[str, tuple[Prompts, ...]]:
    """Tasks as tuples of prompts that this model can read."""
    named = {str(name): (given,) if isinstance(given, Prompts) else tuple(given) for name, given in tasks.items()}
    for name, prompts in named.items():
        if not prompts:
            raise ValueError(f"task {name!r} has no prompts")
        for one in prompts:
            one.check(bridge)
    return named


def padded(parts: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Arrays with different numbers of examples (last axis), stacked along a new axis before it; NaN at the end."""
    return np.stack(
        [np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, length - part.shape[-1])], constant_values=np.nan)
         for part in parts], -2,
    )  # fmt: skip
