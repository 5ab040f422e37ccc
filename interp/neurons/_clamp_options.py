"""The options of `clamp`, checked and made into what the measurement needs. No forward is run here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from interp.models import Geometry
from interp.neurons._clamp_edits import Mode, Neuron, Site, check_neurons, choice
from interp.neurons._dosing import LEVELS, Doses, Reading

Controls = Literal["matched", "random"]


def units_of(neurons: Any, shape: Geometry) -> dict[str, list[Neuron]]:
    if isinstance(neurons, Mapping):
        if not neurons:
            raise ValueError("neurons is an empty mapping; give at least one named set of pairs (layer, index)")
        return {str(name): check_neurons(members, shape, f"the set {name!r}") for name, members in neurons.items()}
    return {f"L{layer} N{index}": [(layer, index)] for layer, index in check_neurons(neurons, shape)}


def doses_of(values: Any, mode: Mode, site: Site) -> Doses:
    choice("mode", mode, get_args(Mode))
    choice("site", site, get_args(Site))
    if mode == "ablate":
        if values is not None:
            raise ValueError(f"mode='ablate' sets neurons to 0, so values must be None; got {values!r}")
        return Doses(["ablated"], torch.zeros(1))
    if isinstance(values, str):
        choice("values", values, ["quantiles"])
        if mode != "set" or site != "post":
            raise ValueError(
                f"values='quantiles' are quantiles of the activation at site='post', to be set; got mode={mode!r} and "
                f"site={site!r}. Give numbers instead"
            )
        return Doses([name if factor == 1 else f"{factor} {name}" for name, factor in LEVELS.items()], None)
    numbers = torch.as_tensor([] if values is None else values, dtype=torch.float32).detach().cpu()
    if numbers.ndim != 1 or len(numbers) == 0 or not bool(numbers.isfinite().all()):
        raise ValueError(f"values={values!r}; expected a list of finite numbers, the levels, or 'quantiles'")
    if len(numbers.unique()) < len(numbers):
        raise ValueError(f"values={values!r} names a level twice")
    return Doses(numbers.double().tolist(), numbers)


def reading_of(metric: Any, labels: Any, read: Any, n_units: int, tokens: Tensor, shape: Geometry) -> Reading:
    n, n_pos = tokens.shape
    if metric is None and labels is None:
        raise ValueError("give a metric, or labels= (a token per neuron), whose log-probability is then the metric")
    size = len(metric) if metric is not None and hasattr(metric, "select") else n
    if size != n:
        raise ValueError(f"the metric was built for {size} examples but tokens has {n} rows")
    own = getattr(metric, "positions", None)
    if read is None:
        read = -1 if own is None else own
    at = torch.as_tensor(read).detach().cpu().long()
    at = at.expand(n) if at.ndim == 0 else at
    if tuple(at.shape) != (n,) or bool(((at < -n_pos) | (at >= n_pos)).any()):
        raise ValueError(f"read={read!r}: expected one position of {n_pos}, or one for each of the {n} examples")
    if labels is not None:
        labels = torch.as_tensor(labels).detach().cpu().long()
        if tuple(labels.shape) != (n_units,) or int(labels.min()) < 0 or int(labels.max()) >= shape.d_vocab:
            raise ValueError(
                f"labels={labels.tolist()}; expected a token id from 0 to {shape.d_vocab - 1} for each of the "
                f"{n_units} neurons or sets"
            )
    return Reading(metric, at % n_pos, labels)


def check_controls(controls: Any, n_controls: int, units: Mapping[str, list[Neuron]]) -> None:
    if isinstance(controls, str) or set(controls) - set(get_args(Controls)):
        raise ValueError(f"controls={controls!r}; expected a list of {', '.join(map(repr, get_args(Controls)))}, or ()")
    if n_controls < 1:
        raise ValueError(f"n_controls={n_controls}; expected at least 1. For none at all use controls=()")
    deep = [name for name, unit in units.items() if len({layer for layer, _ in unit}) > 1]
    if "random" in controls and deep:
        raise ValueError(
            f"the set {deep[0]!r} has neurons in several layers, so that no one direction of the stream stands for it; "
            f"use controls=('matched',)"
        )
