"""Does a neuron write what it reads? Angles between its input, gate and output weights, and classes made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.models import geometry, provenance, require_eval
from interp.neurons._sides import Side, side_vectors
from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd

IO_CLASSES = (
    "enrichment",
    "conditional enrichment",
    "proportional change",
    "orthogonal output",
    "conditional depletion",
    "depletion",
)
"""Classes of gated neurons; plain ones are enrichment, orthogonal output or depletion."""

_PAIRS: tuple[tuple[str, Side, Side], ...] = (
    ("in,out", "in", "out"),
    ("gate,out", "gate", "out"),
    ("gate,in", "gate", "in"),
)
_SHIFTS = 64  # neurons that each neuron is mismatched with
_COVERED = 0.95  # of mismatched cosines, by the bounds


@dataclass(frozen=True, eq=False, repr=False)
class IOSignature(Result):
    """Cosines between a neuron's weights, and its class.

    `values` (pair, layer, neuron) is the cosine of "in,out", "gate,out" and "gate,in" ("in,out" alone without a gate).
    Negating in and out together changes nothing that a gated neuron does. It leaves "in,out" as it is and negates the
    "gate,in" and "gate,out" of this neuron, so the sign of these two alone means nothing.

    Attributes:
        io_class: (layer, neuron) index into `IO_CLASSES`.
        typical: (layer, neuron) whether "gate,in" agrees with the two other cosines, as it must where all are near 1
            or -1, and need not where they just pass the threshold.
        bounds: (pair, layer, edge) the middle 95 % of the cosines of *mismatched* neurons of the layer (in of one, out
            of another): what cosines look like when they mean nothing.
        threshold: (pair, layer) what counts as not orthogonal.
    """

    io_class: xr.DataArray
    typical: xr.DataArray
    bounds: xr.DataArray
    threshold: xr.DataArray

    def table(self) -> pd.DataFrame:
        """One row per neuron: `layer`, `neuron`, a column per cosine, `io_class` and `typical`."""
        frame = self.values.to_dataset(dim="pair").to_dataframe().reset_index()
        frame["io_class"] = [IO_CLASSES[index] for index in self.io_class.values.reshape(-1)]
        frame["typical"] = self.typical.values.reshape(-1)
        return frame

    def counts(self) -> pd.DataFrame:
        """One row per layer and class: `neurons`, `share` of the layer, `atypical` (how many of them are)."""
        import pandas as pd

        rows = []
        for layer in self.values["layer"].values:
            of_layer, typical = self.io_class.sel(layer=layer).values, self.typical.sel(layer=layer).values
            for index, name in enumerate(IO_CLASSES):
                mine = of_layer == index
                rows.append((int(layer), name, int(mine.sum()), float(mine.mean()), int((mine & ~typical).sum())))
        return pd.DataFrame(rows, columns=["layer", "io_class", "neurons", "share", "atypical"])

    def beyond_chance(self) -> pd.DataFrame:
        """One row per pair and layer: mean cosine, and the share of neurons `below` and `above` the bounds of
        mismatched neurons. Each would be 2.5 % if a neuron's weights had nothing to do with each other."""
        import pandas as pd

        rows = []
        for pair in self.values["pair"].values:
            for layer in self.values["layer"].values:
                cosines = self.values.sel(pair=pair, layer=layer).values
                low, high = self.bounds.sel(pair=pair, layer=layer).values
                spread = (float((cosines < low).mean()), float((cosines > high).mean()))
                rows.append((str(pair), int(layer), float(cosines.mean()), *spread))
        return pd.DataFrame(rows, columns=["pair", "layer", "mean", "below", "above"])

    def plot(self) -> Any:
        """Figure: a panel per layer, cos(gate, out) on the x axis and cos(in, out) on the y axis, coloured by
        cos(gate, in); without a gate, cos(in, out) of every neuron by layer."""
        from interp.plotting import scatter, strip

        frame = self.table()
        if "gate,out" not in frame:
            groups = {f"layer {layer}": part["in,out"].to_numpy() for layer, part in frame.groupby("layer")}
            return strip(groups, title="Does a neuron write what it reads?", unit="cos(in, out)", reference=0)
        frame["panel"] = [f"layer {layer}" for layer in frame["layer"]]
        return scatter(
            frame,
            x="gate,out",
            y="in,out",
            colour="gate,in",
            column="panel",
            hover=("layer", "neuron", "io_class"),
            title="Does a neuron write what it reads?",
            x_title="cos(gate, out)",
            y_title="cos(in, out)",
            colour_title="cos(gate, in)",
            identity=False,
            correlation=False,
        )


def io_signature(
    bridge: Any,
    *,
    fold: bool = True,
    threshold: float | Literal["mismatched"] = 0.5,
    layers: Sequence[int] | None = None,
) -> IOSignature:
    """How what every neuron writes relates to what it reads. No forward (one over three tokens on the first call).

    A cosine above the threshold counts as +1, below its negative as -1, else as 0. With a gate:

    =========================  ===========  ============
    class                      cos(in,out)  cos(gate,out)
    =========================  ===========  ============
    enrichment                 +1           +1 or -1
    conditional enrichment     +1           0
    depletion                  -1           +1 or -1
    conditional depletion      -1           0
    proportional change        0            +1 or -1
    orthogonal output          0            0
    =========================  ===========  ============

    A neuron is typical if the third cosine, of gate and in, has the value that the product of the other two has
    (always, for orthogonal output). Without a gate only the first column counts.

    Args:
        fold: Put the gain of the norm that the MLP reads through into the reading weights, and that of a norm on its
            output into the writing weights (`side_vectors`).
        threshold: 0.5 as published, or `"mismatched"`: outside the middle 95 % of the cosines that mismatched neurons
            of the layer have, which asks for a direction beyond chance and not for a strong one.
        layers: All by default.

    Raises:
        ValueError: If the threshold is not between 0 and 1, a layer does not exist or has a single neuron, or the MLPs
            are of an unknown build.

    Source:
        Gerstner & Schuetze 2025 (arXiv:2505.17936) and their released code: these classes, 0.5, and bounds from
        mismatched neurons (there all pairs of a layer, here 64 partners each; the code's later name for enrichment and
        depletion is strengthening and weakening). Folding follows TransformerLens' loading, which they used; we do not
        centre what is written on RMSNorm models.
    """
    require_eval(bridge)
    if not isinstance(threshold, str) and not 0 < threshold < 1:
        raise ValueError(f"threshold must lie between 0 and 1, got {threshold}; or 'mismatched' for the layer's own")
    if isinstance(threshold, str) and threshold != "mismatched":
        raise ValueError(f"threshold must be a number or 'mismatched', got {threshold!r}")
    shape = geometry(bridge)
    chosen = list(range(shape.n_layers)) if layers is None else list(layers)
    if not chosen or not set(chosen) <= set(range(shape.n_layers)):
        raise ValueError(f"layers are {chosen}; {bridge.cfg.model_name} has layers 0 to {shape.n_layers - 1}")
    if shape.d_mlp < 2:
        raise ValueError(f"layers of {shape.d_mlp} neuron have no mismatched pairs to compare with")
    pairs = _PAIRS if shape.gated else _PAIRS[:1]
    cosines, bounds = [], []
    for layer in chosen:
        sides: dict[Side, Tensor] = {
            side: torch.nn.functional.normalize(side_vectors(bridge, layer, side, fold=fold).float(), dim=1)
            for side in ("in", "gate", "out")
            if side != "gate" or shape.gated
        }
        cosines.append(torch.stack([(sides[a] * sides[b]).sum(1) for _, a, b in pairs]).cpu())
        bounds.append(torch.stack([_mismatched(sides[a], sides[b]) for _, a, b in pairs]).cpu())
    values, edges = torch.stack(cosines, 1).numpy(), torch.stack(bounds, 1).numpy()  # [pair, layer, neuron], [.., edge]
    if threshold == "mismatched":
        signs = np.where(values > edges[..., 1:], 1, 0) - np.where(values < edges[..., :1], 1, 0)
        limits = np.abs(edges).max(-1)
    else:
        signs = np.where(values > threshold, 1, 0) - np.where(values < -threshold, 1, 0)
        limits = np.full(edges.shape[:2], threshold)
    classes, typical = _classify(signs)
    names, coords = [name for name, _, _ in pairs], {"layer": chosen, "neuron": np.arange(shape.d_mlp)}
    record = provenance(bridge, method="io_signature", fold=fold, threshold=threshold, layers=chosen)
    return IOSignature(
        labelled(values, ("pair", "layer", "neuron"), {"pair": names, **coords}, unit="cosine"),
        record,
        io_class=xr.DataArray(classes, dims=("layer", "neuron"), coords=coords),
        typical=xr.DataArray(typical, dims=("layer", "neuron"), coords=coords),
        bounds=labelled(
            edges,
            ("pair", "layer", "edge"),
            {"pair": names, "layer": chosen, "edge": ["low", "high"]},
            unit="cosine",
        ),
        threshold=labelled(limits, ("pair", "layer"), {"pair": names, "layer": chosen}, unit="cosine"),
    )


def _classify(signs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class and typicality of signs [pair, layer, neuron]."""
    write = signs[0]
    if len(signs) == 1:
        classes = np.select([write > 0, write < 0], [IO_CLASSES.index("enrichment"), IO_CLASSES.index("depletion")], 3)
        return classes.astype(np.int8), np.ones(write.shape, dtype=bool)
    gate = np.abs(signs[1])
    conditions = [
        (write > 0) & (gate > 0),
        (write > 0) & (gate == 0),
        (write == 0) & (gate > 0),
        (write == 0) & (gate == 0),
        (write < 0) & (gate == 0),
    ]
    classes = np.select(conditions, range(5), 5).astype(np.int8)
    typical = (signs[2] == write * signs[1]) | (classes == IO_CLASSES.index("orthogonal output"))
    return classes, typical


def _mismatched(a: Float[Tensor, "neuron d_model"], b: Float[Tensor, "neuron d_model"]) -> Float[Tensor, "2"]:
    """Bounds of the middle 95 % of cosines between row i of `a` and rows of `b` other than i."""
    n = len(a)
    shifts = torch.linspace(1, n - 1, min(_SHIFTS, n - 1)).round().long().unique()
    cosines = torch.stack([(a * b.roll(int(shift), 0)).sum(1) for shift in shifts]).flatten().cpu().double().numpy()
    return torch.as_tensor(np.quantile(cosines, [(1 - _COVERED) / 2, (1 + _COVERED) / 2]))
