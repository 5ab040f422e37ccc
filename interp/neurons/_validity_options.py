"""The options of `validate`, checked and made into labels, neurons, positions and doses. No forward is run here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.models import Geometry
from interp.neurons._clamp_edits import Neuron, check_neurons
from interp.neurons._sides import Side
from interp.neurons.activation_statistics import NeuronStatistics, check_revision

Tail = Literal["larger", "upper", "lower"]


@dataclass(frozen=True)
class Labels:
    """What an atlas says of one side: token (-1: undecoded), the sign of its score, z of its score."""

    token: Int[Tensor, "layer neuron"]
    sign: Float[Tensor, "layer neuron"]
    z: Float[Tensor, "layer neuron"]


def labels_of(bridge: Any, atlas: Any, sides: Sequence[Side] | None, shape: Geometry) -> dict[Side, Labels]:
    own = isinstance(atlas, Mapping)
    known: list[Any] = list(atlas) if own else [str(side) for side in atlas.values["side"].values]
    chosen: list[Side] = known if sides is None else list(sides)
    if not chosen or set(chosen) - set(known):
        raise ValueError(f"sides={sides!r}; expected some of those in the atlas: {', '.join(map(repr, known))}")
    found: dict[Side, Labels] = {}
    for side in chosen:
        if own:
            token = torch.as_tensor(atlas[side]).long()
            sign, z = torch.ones(token.shape), torch.full(token.shape, torch.nan)
        else:
            arrays = (getattr(atlas, name).sel(side=side).values for name in ("label_ids", "values", "z"))
            token, score, z = (torch.from_numpy(np.array(array)) for array in arrays)
            token, sign = token.long(), torch.where(score < 0, -1.0, 1.0)
        if tuple(token.shape) != (shape.n_layers, shape.d_mlp) or int(token.max()) >= shape.d_vocab:
            raise ValueError(
                f"the labels of side {side!r} are {tuple(token.shape)}, up to token {int(token.max())}; this model has "
                f"{shape.n_layers} layers of {shape.d_mlp} neurons and {shape.d_vocab} tokens. Is the atlas of another?"
            )
        found[side] = Labels(token, sign.float(), z.float())
    if not own:
        check_revision(bridge, atlas, "the atlas is", "decode this model")
    return found


def chosen_neurons(neurons: Iterable[Neuron] | None, labels: dict[Side, Labels], shape: Geometry) -> list[Neuron]:
    decoded = torch.stack([label.token >= 0 for label in labels.values()]).all(0)
    if neurons is None:
        pairs = [(int(layer), int(index)) for layer, index in decoded.nonzero()]
    else:
        pairs = check_neurons(neurons, shape)
    missing = [pair for pair in pairs if not bool(decoded[pair])]
    if missing or not pairs:
        what = f"neurons {missing[:5]}" if pairs else "neurons of any layer"
        raise ValueError(f"the atlas has no label for {what}; decode their layers, or leave these neurons out")
    return pairs


def labelled_neurons(chosen: list[Neuron], labels: dict[Side, Labels]) -> dict[int, Int[Tensor, "labelled"]]:
    """Of each layer that is judged, the neurons with a label on every side: one of them stands in for each."""
    decoded = torch.stack([label.token >= 0 for label in labels.values()]).all(0)
    found = {layer: decoded[layer].nonzero()[:, 0] for layer in sorted({layer for layer, _ in chosen})}
    for layer, some in found.items():
        if len(some) < 2:
            raise ValueError(
                f"layer {layer} has a label on every side for {len(some)} neuron only, and each is compared with "
                "another one of its layer; expected at least two: give more labels, judge fewer sides, or leave it out"
            )
    return found


def positions_of(positions: Any, n: int, n_pos: int) -> Int[Tensor, "example"]:
    at = torch.as_tensor(positions).detach().cpu()
    if at.is_floating_point() or at.ndim > 1 or (at.ndim == 1 and len(at) != n):
        raise ValueError(f"positions={positions!r}; expected one position, or one for each of the {n} examples")
    if bool(((at < -n_pos) | (at >= n_pos)).any()):
        raise ValueError(f"positions={positions!r}: tokens have {n_pos} positions, so {-n_pos} to {n_pos - 1}")
    return (at % n_pos).long().expand(n)


def check_dose(
    bridge: Any, dose: Any, quantile: Any, columns: dict[str, str], statistics: NeuronStatistics | None
) -> None:
    if dose is not None:
        if not np.isfinite(dose):
            raise ValueError(f"dose={dose} is not finite")
        if statistics is not None:
            raise ValueError(
                "dose= is the same number for all neurons, so statistics= would not be used; give one of them"
            )
        return
    if not 0.5 < quantile <= 1:
        raise ValueError(f"quantile={quantile}; expected above 0.5 and at most 1. For the lower side use tail='lower'")
    if statistics is None:
        return
    statistics.check_model(bridge)
    known = statistics.values["statistic"].values
    if missing := [name for name in columns.values() if name not in known]:
        raise ValueError(
            f"statistics have no {missing[0]!r}; call neuron_statistics with quantiles={quantile} and its mirror, "
            f"{1 - quantile:g}"
        )


def doses_of(
    dose: Any, tail: Tail, columns: dict[str, str], statistics: NeuronStatistics | None, shape: Geometry
) -> Float[Tensor, "layer neuron"]:
    if dose is not None:
        return torch.full((shape.n_layers, shape.d_mlp), float(dose))
    assert statistics is not None
    upper, lower = (torch.from_numpy(statistics.column(columns[which]).copy()) for which in ("upper", "lower"))
    if tail == "larger":
        return torch.where(upper.abs() >= lower.abs(), upper, lower)
    return upper if tail == "upper" else lower
