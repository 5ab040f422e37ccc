"""Neurons held at a value: in any forward, while text is written, and measured over doses against controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.hooks import generate, interventions
from interp.models import geometry, provenance, require_eval
from interp.neurons._clamp_edits import (
    Mode,
    Neuron,
    Positions,
    Site,
    check_neurons,
    check_tokens,
    choice,
    clamp_edits,
    position_mask,
    site_hook,
)
from interp.neurons._clamp_options import Controls, check_controls, doses_of, reading_of, units_of
from interp.neurons._dosing import Doses, Measured, Reading, groups_of, measure
from interp.neurons.activation_statistics import NeuronStatistics, neuron_statistics
from interp.neurons.dose_response import DoseResponse
from interp.neurons.matching import match_neurons
from interp.results import labelled
from interp.types import Metric


@contextmanager
def clamped(
    bridge: Any,
    neurons: Sequence[Neuron],
    value: Any = None,
    *,
    mode: Mode = "set",
    site: Site = "post",
    positions: Positions = None,
) -> Iterator[None]:
    """Every forward inside the context runs with these neurons clamped, all together.

    Args:
        neurons: Pairs `(layer, index)`.
        value: One number, or one per neuron: what the activation is set to (`"set"`), multiplied by (`"scale"`) or
            raised by (`"add"`). Not for `"ablate"`, which sets 0; ablate to a mean with `mode="set"`.
        site: `"post"` is the activation that the output weights read (after the gate's product): the value is what the
            neuron has, whatever its inputs say. `"pre"` is what the nonlinearity reads (in a gated MLP the gate's
            side); `"pre_linear"` the other factor of a gated MLP: the gate still decides.
        positions: None is every position; an int or a list the same in every row; a tensor `[batch]` or `[batch, k]`
            those of each row. Negative ones count from the end. They are positions of the forward: where a cached
            prefix is continued, a forward begins after it (`generate_clamped` knows where it is).

    Raises:
        ValueError: If a neuron, the site or the mode does not exist, numbers do not fit the neurons, or a forward has
            no such position.
    """
    choice("mode", mode, get_args(Mode))
    choice("site", site, get_args(Site))
    pairs = check_neurons(neurons, geometry(bridge))
    with interventions(bridge, clamp_edits(bridge, pairs, value, mode, site, positions)):
        yield


def generate_clamped(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    n_tokens: int,
    neurons: Sequence[Neuron],
    value: Any = None,
    *,
    mode: Mode = "set",
    site: Site = "post",
    positions: Literal["all", "prompt", "generated", "last"] = "all",
    **sampling: Any,
) -> Int[Tensor, "batch written"]:
    """What the model writes while neurons are clamped: prompts and new tokens, [batch, pos + n_tokens].

    Args:
        positions: Which part of the text is clamped: see `interp.hooks.generate`. `"last"` is every position that
            predicts a new token.
        **sampling: `temperature`, `top_k`, `top_p`, `seed`, `stop` of `interp.hooks.generate`; greedy by default.

    Cost: one forward over the prompts and one per further token.

    Raises:
        ValueError: As `clamped` and `interp.hooks.generate`, before any forward.

    Source:
        Davies 2025, "Decoding specialised feature neurons in LLMs with the final projection layer", lets Llama-3.1-8B
        write with the "dog" neuron clamped; we know of no stated value or position.
    """
    choice("mode", mode, get_args(Mode))
    choice("site", site, get_args(Site))
    require_eval(bridge)
    edits = clamp_edits(bridge, check_neurons(neurons, geometry(bridge)), value, mode, site)
    return generate(bridge, tokens, n_tokens, edits=edits, positions=positions, **sampling)


def clamp(
    bridge: Any,
    tokens: Int[Tensor, "example pos"],
    neurons: Sequence[Neuron] | Mapping[str, Sequence[Neuron]],
    values: Sequence[float | int] | Literal["quantiles"] | None,
    metric: Metric | None = None,
    *,
    labels: Sequence[int] | Int[Tensor, "unit"] | None = None,
    mode: Mode = "set",
    site: Site = "post",
    positions: Positions = None,
    read: int | Int[Tensor, "example"] | None = None,
    controls: Sequence[Controls] = ("matched", "random"),
    n_controls: int = 3,
    statistics: NeuronStatistics | None = None,
    seed: int = 0,
    memory_budget: int = 2**28,
    progress: bool = False,
) -> DoseResponse:
    """What each neuron (or set of neurons) does at each dose, example by example, beside its controls.

    Effects are clamped minus unclamped: positive values mean that the clamp raises the metric. Exact, nothing is
    linearised. Controls of a neuron are random neurons of its layer that are as often and as strongly active and write
    vectors as long (`match_neurons`), given the same levels (quantiles: their own); and pushes of the stream that
    leaves its layer along a random direction, as long at each position as the change that the clamp makes there and
    backwards where that points against what the neuron writes.

    Costs, in whole forwards: one of all examples; a row per unit, arm and level of the positions from the first clamped
    one on, through the layers above the neuron's (see `provenance["cost"]`); and one pass for the statistics, where
    they are needed and not given.

    Args:
        neurons: Pairs `(layer, index)`, clamped one at a time; or named sets of them, each clamped together.
        values: Levels, the same numbers for all neurons; `"quantiles"`: each neuron's own 0, 50, 90, 99 and 99.9 %
            quantile and twice its maximum (`mode="set"` and `site="post"` only); None for `"ablate"`.
        metric: Logits `[example, pos, d_vocab]` to one number per example. One of `interp.metrics` that reads one
            position is far cheaper than a plain callable, which needs whole logits of all examples at once. None takes
            the label's log-probability.
        labels: A token per neuron (or set): what it is said to write. Without, label columns are NaN.
        mode, site, positions: As in `clamped`.
        read: The position at which labels and KL are read; the metric's own by default, or else the last.
        controls: Which kinds; `()` for none.
        n_controls: Draws of each kind.
        statistics: For quantiles and matching; measured on `tokens`, at all positions, if not given. Better taken on
            more text than a few prompts.
        seed: Of the controls.
        memory_budget: Bytes that one forward may take, roughly.

    Raises:
        ValueError: Before any forward, if an option cannot be honoured. RuntimeError: If the model is in training mode.

    Source:
        Davies 2025 clamps a neuron found by its decoded token and reads that token's probability, without controls;
        levels at quantiles, matched neurons, random directions and the rank of the label among all tokens are added.
    """
    require_eval(bridge)
    shape = geometry(bridge)
    tokens = check_tokens(bridge, tokens)
    units = units_of(neurons, shape)
    doses = doses_of(values, mode, site)
    reading = reading_of(metric, labels, read, len(units), tokens, shape)
    where = position_mask(positions, *tokens.shape)
    check_controls(controls, n_controls, units)
    members = list(dict.fromkeys(neuron for unit in units.values() for neuron in unit))
    layers = sorted({layer for layer, _ in members})
    for layer in layers:
        site_hook(bridge, site, layer)
    if statistics is not None:
        statistics.check_model(bridge)
        doses.check(statistics)
    if statistics is None and ("matched" in controls or doses.numbers is None):
        statistics = neuron_statistics(bridge, tokens, layers=layers)
    draws, quality = [], None
    if "matched" in controls:
        assert statistics is not None
        matched = match_neurons(statistics, members, n=n_controls, seed=seed)
        draws = [matched.draw(k) for k in range(n_controls)]
        quality = matched.values.rename(neuron="control")
    n_random = n_controls if "random" in controls else 0
    groups, means = groups_of(list(units.values()), draws, doses, statistics, mode)
    measured = measure(
        bridge, tokens, where, reading, groups, n_random, shape,
        mode=mode, site=site, seed=seed, memory_budget=memory_budget, progress=progress,
    )  # fmt: skip
    means = torch.cat([means, means[:, :1].expand(-1, n_random, -1)], 1)
    settings = {
        "neurons": {name: [list(neuron) for neuron in unit] for name, unit in units.items()},
        "metric": reading.name,
        "mode": mode, "site": site, "levels": doses.names, "controls": list(controls), "n_controls": n_controls,
        "matched": [[[*own, *other] for own, other in draw.items()] for draw in draws], "seed": seed,
        "cost": measured.work.summary(tokens, shape.n_layers),
    }  # fmt: skip
    sets = isinstance(neurons, Mapping)
    return _result(bridge, units, sets, reading, doses, measured, means, quality, settings)


def _result(
    bridge: Any,
    units: Mapping[str, list[Neuron]],
    sets: bool,
    reading: Reading,
    doses: Doses,
    measured: Measured,
    means: Tensor,
    quality: xr.DataArray | None,
    settings: dict[str, Any],
) -> DoseResponse:
    n_matched = 0 if quality is None else quality.sizes["draw"]
    kinds = ["clamped", *["matched"] * n_matched, *["random"] * (means.shape[1] - 1 - n_matched)]
    numbered = [f"{kind} {1 + kinds[:i].count(kind)}" if kind != "clamped" else kind for i, kind in enumerate(kinds)]
    dim = "set" if sets else "neuron"
    dims = (dim, "arm", "level", "example")
    ids = [-1] * len(units) if reading.labels is None else reading.labels.tolist()
    coords: dict[str, Any] = {
        dim: list(units),
        "arm": numbered,
        "kind": ("arm", kinds),
        "level": doses.names,
        "label": (dim, ids),
        "label_token": (dim, [_text(bridge, token) for token in ids]),
    }
    if not sets:
        coords |= {part: (dim, [unit[0][i] for unit in units.values()]) for i, part in enumerate(("layer", "index"))}
    values = measured.label_log_prob if reading.metric is None else measured.metric

    def array(tensor: Tensor, unit: str) -> xr.DataArray:
        return labelled(tensor, dims[: tensor.ndim], coords, unit=unit)

    return DoseResponse(
        values=array(values, reading.unit),
        provenance=provenance(bridge, **settings),
        doses=array(means, "activation"),
        label_log_prob=array(measured.label_log_prob, "nats"),
        label_rank=array(measured.label_rank, "tokens"),
        kl=array(measured.kl, "nats"),
        baseline=labelled(measured.baseline, ("example",), unit=reading.unit),
        match_quality=quality,
    )


def _text(bridge: Any, token: int) -> str:
    if token < 0:
        return ""
    tokenizer = getattr(bridge, "tokenizer", None)
    return str(token) if tokenizer is None else tokenizer.decode([token])
