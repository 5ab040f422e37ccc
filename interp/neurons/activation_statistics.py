"""How often, how strongly and with which sign every neuron is active on a text: exact, layer after layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.hooks import hook_name, reads, run_until
from interp.models import geometry, provenance, require_eval
from interp.neurons._clamp_edits import Neuron, check_neurons, check_tokens
from interp.results import Result, labelled

_BATCH_TOKENS = 4096
_COLUMNS = 256  # neurons whose quantiles are taken at once: bounds the copy that sorting makes


@dataclass(frozen=True, eq=False, repr=False)
class NeuronStatistics(Result):
    """Statistics of the activations of every neuron: `values` are `(layer, neuron, statistic)`.

    Statistics: `frequency` (share of positions with |activation| above the layer's threshold), `positive` and
    `negative` (shares of either sign; what is left is exactly 0), `mean`, `rms`, `min`, `max`, one `q..` per quantile
    (in percent), and `output_norm`, the length of the neuron's output weights. Layers that were not asked for are NaN.
    """

    def of(self, neurons: Sequence[Neuron]) -> pd.DataFrame:
        """One row per neuron: `layer, neuron` and every statistic.

        Raises:
            ValueError: If a neuron does not exist or its layer was not measured.
        """
        pairs = self._measured(neurons)
        layers, indices = zip(*pairs, strict=True)
        rows = self.values.values[list(layers), list(indices)]
        return pd.DataFrame({"layer": layers, "neuron": indices}).join(
            pd.DataFrame(rows, columns=list(self.values["statistic"].values))
        )

    def column(self, statistic: str) -> np.ndarray:
        """One statistic of all neurons, `[layer, neuron]`."""
        known = list(self.values["statistic"].values)
        if statistic not in known:
            raise KeyError(f"no statistic {statistic!r}; there are {', '.join(known)}")
        return self.values.values[..., known.index(statistic)]

    def check_model(self, bridge: Any) -> None:
        """Raise a ValueError unless these are statistics of this model: of its shape and its weights."""
        shape = geometry(bridge)
        if self.values.shape[:2] != (shape.n_layers, shape.d_mlp):
            raise ValueError(
                f"statistics are of {self.values.shape[0]} layers of {self.values.shape[1]} neurons; this model has "
                f"{shape.n_layers} of {shape.d_mlp}"
            )
        check_revision(bridge, self, "statistics are", "call neuron_statistics on this model")

    def _measured(self, neurons: Sequence[Neuron]) -> list[Neuron]:
        n_layers, n_neurons = self.values.shape[:2]
        pairs = [(int(layer), int(index)) for layer, index in neurons]
        for layer, index in pairs:
            if not (0 <= layer < n_layers and 0 <= index < n_neurons):
                raise ValueError(
                    f"neuron {(layer, index)} does not exist: layers 0 to {n_layers - 1}, neurons 0 to {n_neurons - 1}"
                )
            if np.isnan(self.values.values[layer, index, 0]):
                raise ValueError(f"layer {layer} was not measured; call neuron_statistics with it among layers=")
        return pairs

    def plot(self, statistic: str = "frequency") -> Any:
        """One statistic's distribution over the neurons of each layer."""
        from interp.plotting import lines

        shares = np.linspace(0, 1, 101)
        column = self.column(statistic)
        table = pd.concat(
            pd.DataFrame(
                {"share": 100 * shares, "value": np.quantile(column[layer], shares), "layer": f"layer {layer}"}
            )
            for layer in range(len(column))
            if not np.isnan(column[layer]).any()
        )
        return lines(
            table, x="share", group="layer", title=f"{statistic} over the neurons of each layer", unit=statistic,
            x_title="neurons with at most this value (%)",
        )  # fmt: skip


def check_revision(bridge: Any, result: Any, what: str, instead: str) -> None:
    """Refuse a result of other weights than this model's: checkpoints and seeds of one model have one shape.

    The revision decides, as it names the weights (a commit, or a hash of them): one model may be loaded by a name and
    by a path. A result without one, made by hand, passes.
    """
    theirs = getattr(result, "provenance", {})
    if "revision" not in theirs:
        return
    own = provenance(bridge)
    if theirs["revision"] != own["revision"]:
        raise ValueError(
            f"{what} of {theirs.get('model')} at {theirs['revision']}, but this model is {own['model']} at "
            f"{own['revision']} (parameters that were changed or moved since loading are another revision); {instead}"
        )


def neuron_statistics(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    *,
    layers: Sequence[int] | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    quantiles: Sequence[float | int] = (0, 0.5, 0.9, 0.99, 0.999),
    threshold: float | int | None = None,
    batch_size: int | None = None,
    memory_budget: int = 2**30,
    progress: bool = False,
) -> NeuronStatistics:
    """Statistics of every neuron's activation (`hook_post`: what the output weights read) over positions of text.

    Exact: the activations of as many layers as fit are kept in float32, reduced and freed. Costs one pass over the
    tokens for each such group of layers (none runs past its group); `provenance["passes"]` says how many.

    Args:
        layers: Layers to measure; all by default.
        mask: Positions that count; all by default. Leave out padding, and a BOS on which some neurons are enormous.
        quantiles: Of the activation, with sign, linearly interpolated (0 is the minimum).
        threshold: |activation| above which a neuron counts as active. None takes the root mean square activation of
            the layer's median neuron: gated and GELU neurons are never exactly 0, and a few are enormous.
        batch_size: Rows per forward.
        memory_budget: Bytes for kept activations.

    Raises:
        ValueError: If an option does not fit, or the activations of one layer exceed the budget.
    """
    require_eval(bridge)
    tokens = check_tokens(bridge, tokens)
    shape = geometry(bridge)
    chosen = list(range(shape.n_layers)) if layers is None else [int(layer) for layer in layers]
    check_neurons([(layer, 0) for layer in chosen], shape, "layers (as neuron 0 of each)")
    levels = [float(q) for q in quantiles]
    if any(not 0 <= q <= 1 for q in levels) or len(set(levels)) < len(levels):
        raise ValueError(f"quantiles={levels}; expected different numbers from 0 to 1")
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold={threshold}; expected None or a number of at least 0")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1, or None")
    if mask is not None and (mask.shape != tokens.shape or not bool(mask.any())):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and keeps {int(mask.sum())} positions; expected the shape of tokens, "
            f"{tuple(tokens.shape)}, and at least one"
        )
    n_positions = tokens.numel() if mask is None else int(mask.sum())
    per_layer = 4 * n_positions * shape.d_mlp
    if per_layer > memory_budget:
        raise ValueError(
            f"the activations of one layer at {n_positions} positions take {per_layer:,} bytes, memory_budget is "
            f"{memory_budget:,}; raise it, or use fewer tokens"
        )
    at_once = min(len(chosen), memory_budget // per_layer)
    groups = [sorted(chosen)[i : i + at_once] for i in range(0, len(chosen), at_once)]
    names = [
        "frequency", "positive", "negative", "mean", "rms", "min", "max", *(f"q{100 * q:g}" for q in levels),
        "output_norm",
    ]  # fmt: skip
    values = np.full((shape.n_layers, shape.d_mlp, len(names)), np.nan)
    thresholds: dict[int, float] = {}
    for group in groups:
        for layer, rows in _activations(bridge, tokens, mask, group, batch_size, n_positions, shape, progress).items():
            cut = float(np.median(_rms(rows))) if threshold is None else float(threshold)
            norms = bridge.blocks[layer].mlp.W_out.detach().double().norm(dim=1).cpu().numpy()
            values[layer] = np.concatenate([_reduce(rows, levels, cut), norms[:, None]], 1)
            thresholds[layer] = cut
    return NeuronStatistics(
        values=labelled(values, ("layer", "neuron", "statistic"), {"layer": range(shape.n_layers), "statistic": names}),
        provenance=provenance(
            bridge,
            positions=n_positions,
            quantiles=levels,
            thresholds={str(layer): cut for layer, cut in sorted(thresholds.items())},
            passes=len(groups),
        ),
    )


def _activations(
    bridge: Any,
    tokens: Tensor,
    mask: Tensor | None,
    group: list[int],
    batch_size: int | None,
    n_positions: int,
    shape: Any,
    progress: bool,
) -> dict[int, np.ndarray]:
    """`[position, d_mlp]` float32 of each layer, from one pass."""
    hooks = {layer: hook_name("neuron", layer) for layer in group}
    kept = {layer: np.empty((n_positions, shape.d_mlp), np.float32) for layer in group}
    size = batch_size or max(1, _BATCH_TOKENS // tokens.shape[1])
    silent = not progress or os.environ.get("INTERP_PROGRESS") == "0"
    done = 0
    with torch.no_grad():
        for start in tqdm(range(0, len(tokens), size), disable=silent, desc="neuron statistics"):
            rows = slice(start, start + size)
            with reads(bridge, list(hooks.values())) as found:
                run_until(bridge, tokens[rows], max(group) + 1)
            keep = torch.ones_like(tokens[rows], dtype=torch.bool) if mask is None else mask[rows].to(tokens.device)
            n = int(keep.sum())
            for layer, name in hooks.items():
                kept[layer][done : done + n] = found[name][keep].float().cpu().numpy()
            done += n
    return kept


def _rms(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("pn,pn->n", rows, rows, dtype=np.float64) / len(rows))


def _reduce(rows: np.ndarray, levels: list[float], cut: float) -> np.ndarray:
    """`[neuron, statistic]`, without the norm of the output weights."""
    parts = []
    for start in range(0, rows.shape[1], _COLUMNS):
        part = rows[:, start : start + _COLUMNS]
        precise = part.astype(np.float64)
        parts.append(
            np.stack(
                [
                    (np.abs(part) > cut).mean(0), (part > 0).mean(0), (part < 0).mean(0), precise.mean(0),
                    _rms(part), part.min(0), part.max(0),
                    *np.quantile(precise, levels, axis=0),
                ],
                1,
            )
        )  # fmt: skip
    return np.concatenate(parts)
