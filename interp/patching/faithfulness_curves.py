"""How much of a model's behaviour circuits keep, over their sizes: the curve, its integrals and their intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import xarray as xr

from interp.patching._size_curves import SizeCurve
from interp.patching.circuits import Circuit
from interp.patching.graph import Graph


@dataclass(frozen=True, eq=False, repr=False)
class FaithfulnessCurve(SizeCurve):
    """The metric of circuits of edges, `values` (circuit, example), in its own unit, and the faithfulness that follows.

    f(C) = (m(C) - m(empty)) / (m(model) - m(empty)) as a ratio of means over examples: 1 is as good as the whole model,
    0 as good as no circuit. See `faithfulness` for how circuits are run.

    Along `circuit` lie `share`, the size that was asked for as a share of the graph's edges, and `n_edges`, the edges
    there really are (fewer after pruning).

    Attributes:
        model: The metric of the whole model on the clean prompts, by example.
        empty: The metric with every edge ablated, by example.
        metric: Name of the metric; its unit is `values.attrs["unit"]`.
        ablation: What ablated edges carry.
        of: `"circuit"`: the edges outside of each circuit were ablated; `"complement"`: those in it were.
        edges: The circuits, Bool (circuit, writer, reader).
    """

    _size: ClassVar[tuple[str, str, str]] = ("share", "share of edges", "circuits")

    edges: xr.DataArray

    @property
    def graph(self) -> Graph:
        """The graph of the circuits."""
        return Graph(**self.provenance["graph"])

    @property
    def circuits(self) -> list[Circuit]:
        """The circuits, in order."""
        return [Circuit(self.graph, torch.tensor(mask)) for mask in self.edges.values]

    def __repr__(self) -> str:
        shares, means = self.values["share"].values, self.values.mean("example").values
        points = ", ".join(f"{share:.2g}: {mean:.3g}" for share, mean in zip(shares[:12], means[:12], strict=True))
        return (
            f"FaithfulnessCurve({len(shares)} {self.of}s x {self.values.sizes['example']} examples; {self.ablation} "
            f"ablation; {self.metric} in {self.values.attrs.get('unit', '?')}: model {float(self.model.mean()):.3g}, "
            f"empty circuit {float(self.empty.mean()):.3g}, at share of edges {points}; "
            f"{self.provenance.get('model', 'unknown model')})"
        )
