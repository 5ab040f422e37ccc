"""Control neurons: of the same layer, as often active, as strongly, and with output weights as long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.neurons._clamp_edits import Neuron
from interp.neurons.activation_statistics import NeuronStatistics
from interp.results import Result, labelled

_QUANTITIES = ("distance", "frequency_difference", "scale_ratio", "norm_ratio", "layer_distance")


@dataclass(frozen=True, eq=False, repr=False)
class MatchedNeurons(Result):
    """Control neurons and how well they match: `values` are `(neuron, draw, quantity)`.

    Quantities: `distance` (of the standardised features), `frequency_difference` (share of positions, control minus
    neuron), `scale_ratio` and `norm_ratio` (control over neuron: root mean square activation, length of the output
    weights), and `layer_distance`, the mean distance to all admissible neurons of the layer: what a neuron picked
    evenly would have.

    Attributes:
        controls: Index, in the same layer, of the control of each neuron in each draw: `(neuron, draw)`.
    """

    controls: xr.DataArray

    def draw(self, k: int) -> dict[Neuron, Neuron]:
        """The control of each neuron in draw `k`."""
        layers = self.controls["layer"].values
        own, other = self.controls["index"].values, self.controls.values[:, k]
        return {(int(a), int(b)): (int(a), int(c)) for a, b, c in zip(layers, own, other, strict=True)}

    def table(self) -> pd.DataFrame:
        """One row per neuron and draw: `layer, neuron, draw, control` and the quantities."""
        wide = self.values.to_dataframe("value")["value"].unstack("quantity")[list(_QUANTITIES)].reset_index()
        frame = pd.DataFrame(
            {
                "layer": np.repeat(self.controls["layer"].values, self.controls.shape[1]),
                "neuron": np.repeat(self.controls["index"].values, self.controls.shape[1]),
                "draw": np.tile(self.controls["draw"].values, len(self.controls)),
                "control": self.controls.values.reshape(-1),
            }
        )
        return frame.join(wide[list(_QUANTITIES)])


def match_neurons(
    statistics: NeuronStatistics,
    neurons: Sequence[Neuron],
    *,
    n: int = 5,
    pool: int | None = None,
    labels: Int[Tensor, "layer neuron"] | None = None,
    exclude: Sequence[Neuron] = (),
    seed: int = 0,
) -> MatchedNeurons:
    """Random control neurons for each neuron: drawn from its nearest neighbours in the same layer. No forward.

    Near in three features, each standardised over the layer: arcsine square root of the activation frequency, log root
    mean square activation, log length of the output weights. None of the neurons, nor of `exclude`, is a control, and
    no control is used twice within a draw, so that a draw of controls for a set is a set of the same size. The draws of
    one neuron are distinct.

    Args:
        n: Draws per neuron.
        pool: How many nearest neighbours each draw is made from; `2 n` by default, `n` takes the nearest.
        labels: Decoded token of every neuron; a control must have another one than its neuron.

    Raises:
        ValueError: If a layer has not enough neurons left, a neuron was not measured, or sizes do not fit.

    Source:
        The controls asked for in criticism of clamp experiments without any; the features are ours.
    """
    pairs = statistics._measured(neurons)
    if not pairs or len(set(pairs)) < len(pairs):
        raise ValueError(f"neurons={pairs}: expected at least one, none twice")
    pool = 2 * n if pool is None else pool
    if n < 1 or pool < n:
        raise ValueError(f"n={n} draws from a pool of {pool}; expected n of at least 1 and pool of at least n")
    shape = statistics.values.shape[:2]
    if labels is not None and tuple(labels.shape) != shape:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; expected [layer, neuron] = {shape}")
    rng = np.random.default_rng(seed)
    taken = {*pairs, *((int(layer), int(index)) for layer, index in exclude)}
    used: dict[int, set[Neuron]] = {k: set() for k in range(n)}
    features = {layer: _features(statistics, layer) for layer in {layer for layer, _ in pairs}}
    controls = np.empty((len(pairs), n), np.int64)
    values = np.empty((len(pairs), n, len(_QUANTITIES)))
    frequency, rms, norm = (statistics.column(name) for name in ("frequency", "rms", "output_norm"))
    for row, (layer, index) in enumerate(pairs):
        distance = np.linalg.norm(features[layer] - features[layer][index], axis=1)
        free = np.array([(layer, i) not in taken for i in range(shape[1])])
        if labels is not None:
            free &= labels[layer].cpu().numpy() != int(labels[layer, index])
        near = np.flatnonzero(free)
        near = near[np.argsort(distance[near], kind="stable")]
        ordinary = distance[near].mean() if len(near) else np.nan
        candidates = [*rng.permutation(near[:pool]), *near[pool:]]
        chosen: list[int] = []
        for draw in range(n):
            found = next((c for c in candidates if c not in chosen and (layer, int(c)) not in used[draw]), None)
            if found is None:
                raise ValueError(
                    f"layer {layer} has {len(near)} neurons that may stand as controls, too few for {n} draws for "
                    f"each of {len(pairs)} neurons; use a smaller n or fewer neurons"
                )
            chosen.append(int(found))
            used[draw].add((layer, int(found)))
        controls[row] = chosen
        values[row] = np.stack(
            [
                distance[chosen], frequency[layer, chosen] - frequency[layer, index],
                _ratio(rms[layer, chosen], float(rms[layer, index])),
                _ratio(norm[layer, chosen], float(norm[layer, index])),
                np.full(n, ordinary),
            ],
            1,
        )  # fmt: skip
    coords: Mapping[str, Any] = {
        "neuron": [f"L{layer} N{index}" for layer, index in pairs],
        "draw": range(n),
        "layer": ("neuron", [layer for layer, _ in pairs]),
        "index": ("neuron", [index for _, index in pairs]),
    }
    return MatchedNeurons(
        values=labelled(values, ("neuron", "draw", "quantity"), {**coords, "quantity": list(_QUANTITIES)}),
        provenance={**statistics.provenance, "n": n, "pool": pool, "seed": seed, "other_labels": labels is not None},
        controls=xr.DataArray(controls, dims=("neuron", "draw"), coords=coords),
    )


def _features(statistics: NeuronStatistics, layer: int) -> np.ndarray:
    """`[neuron, feature]`, each of unit variance over the layer; a feature that does not vary says nothing."""
    frequency, rms, norm = (
        statistics.column(name)[layer].astype(np.float64) for name in ("frequency", "rms", "output_norm")
    )
    raw = np.stack([np.arcsin(np.sqrt(frequency)), _log(rms), _log(norm)], 1)
    spread = raw.std(0)
    return raw / np.where(spread > 1e-9, spread, np.inf)


def _log(values: np.ndarray) -> np.ndarray:
    # from a thousandth of the median up: the logarithm of a dead neuron must not stretch the scale for all others
    return np.log(np.maximum(values, max(1e-3 * float(np.median(values)), np.finfo(np.float32).tiny)))


def _ratio(above: np.ndarray, below: float) -> np.ndarray:
    return above / below if below > 0 else np.full(len(above), np.nan)
