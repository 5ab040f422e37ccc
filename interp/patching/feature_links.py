"""Edges of feature circuits: what one feature makes of another, along the paths that pass through no third one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import xarray as xr

from interp.models import provenance
from interp.patching._backward import differentiable, metric_name
from interp.patching._batches import Split, progress_bar
from interp.patching._cells import Cells, choice
from interp.patching._feature_links import ERROR_UNIT, Cell, LinkPasses
from interp.patching._latent_places import latent_site
from interp.patching._measure import checked
from interp.patching._quadrature import Points, quadrature
from interp.patching._resume import Reader
from interp.patching.attribution import _REFERENCE, _check_metric, _shut
from interp.patching.feature_attribution import Dictionaries, ordered
from interp.patching.feature_circuits import FeatureCircuit
from interp.patching.feature_evaluation import check_dictionaries, spots_of
from interp.patching.feature_scores import ERROR
from interp.patching.rules import Preset, Rules, resolve_rules
from interp.results import Result, labelled
from interp.types import DIRECTIONS, Direction, Metric

if TYPE_CHECKING:
    import pandas as pd

EdgeMethod: TypeAlias = Literal["gradient", "relp", "relp_ah", "cp_lrp", "attnlrp", "gim", "integrated_gradients"]
METRIC = "metric"
"""What the edges that end the circuit go into."""


@dataclass(frozen=True, eq=False, repr=False)
class FeatureEdges(Result):
    """Effects along edges between features, `values` (upstream, downstream, example), NaN where there is none.

    An edge's weight is the part of the upstream node's score that goes to the downstream node directly: the change of
    the one, times the derivative of the other along paths through no other node (latent or error of any of the
    dictionaries), times the coefficient of the other. The last downstream node is the metric itself. Under the
    gradient and the backward rules all edges out of a node sum to its score, if they go to all nodes.

    Attributes:
        nodes: The score of every upstream node, (upstream, example).
        metric: Name of the metric; its unit is `values.attrs["unit"]`.
        direction, value: As of `FeatureEffects`.
    """

    nodes: xr.DataArray
    metric: str
    direction: str
    value: str

    def mean(self) -> xr.DataArray:
        """Mean over examples of every edge."""
        return self.values.mean("example", keep_attrs=True)

    def elsewhere(self) -> xr.DataArray:
        """What of each node's score its edges here do not carry, (upstream, example): under the gradient and the
        backward rules that which goes through nodes that were not asked for."""
        return (self.nodes - self.values.sum("downstream", skipna=True)).assign_attrs(self.nodes.attrs)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per edge that exists, strongest first: `upstream`, `downstream`, `weight` (mean over examples)."""
        frame = self.mean().rename("weight").to_dataframe().reset_index()[["upstream", "downstream", "weight"]]
        frame = frame.dropna().loc[lambda rows: rows["weight"] != 0]
        return frame.loc[frame["weight"].abs().sort_values(ascending=False, kind="stable").index].reset_index(drop=True)

    def top(
        self, k: int = 5, *, by: Literal["abs", "max", "min"] = "abs", reduce: str | Sequence[str] | None = "example"
    ) -> pd.DataFrame:
        """The `k` strongest edges, best first, with their names in a column `edge`."""
        frame = super().top(k, by=by, reduce=reduce)
        frame.insert(0, "edge", frame["upstream"].astype(str) + "->" + frame["downstream"].astype(str))
        return frame

    def circuit(
        self, circuit: FeatureCircuit, *, threshold: float | int | None = None, k: int | None = None
    ) -> FeatureCircuit:
        """The circuit with these edges: those of at least `threshold` (Marks et al. use .01), or the `k` strongest."""
        if (threshold is None) == (k is None):
            raise ValueError(f"give one of threshold={threshold} and k={k}")
        frame = self.to_dataframe()
        chosen = frame.index < k if k is not None else frame["weight"].abs().to_numpy() >= threshold
        return replace(circuit, edges=frame.loc[chosen].to_dict("records"))

    def plot(self) -> Any:
        """Figure of the mean over examples: a map of upstream and downstream nodes."""
        from interp.plotting import heatmap

        title = f"{self.provenance['method']} edges between features ({self.direction}, {self.value})"
        return heatmap(self.mean(), title=title, unit=f"{self.metric}, {self.values.attrs['unit']}")

    def __repr__(self) -> str:
        n = int(np.isfinite(self.mean().values).sum())
        return (
            f"FeatureEdges({n} edges of {self.nodes.sizes['upstream']} nodes x {self.values.sizes['example']} examples;"
            f" {self.provenance['method']}; {self.direction}, {self.value}; {self.metric} in "
            f"{self.values.attrs.get('unit', '?')}; {self.provenance.get('model', 'unknown model')})"
        )


def feature_edges(
    bridge: Any,
    prompts: Any,
    metric: Metric,
    dictionaries: Dictionaries,
    circuit: FeatureCircuit,
    *,
    method: EdgeMethod | Rules = "relp",
    direction: Direction = "noise",
    value: Literal["swap", "zero", "mean"] = "swap",
    steps: int = 10,
    points: Points = "left",
    rules: Preset | Rules | None = None,
    memory_budget: int = 2**30,
    batch_size: int | None = None,
    progress: bool = False,
) -> FeatureEdges:
    """Edges between all nodes of a circuit, and from them into the metric.

    The weight of u -> d is (coefficient of d) x (derivative of d by u, all other activations with dictionaries held
    still) x (change of u), summed over the positions of both: what of u's score reaches the metric through d as the
    next node. With the gradient or backward rules, for every node u,

        score(u) = edge(u -> metric) + sum of edge(u -> d) over all nodes d of all dictionaries,

    exactly, whatever the dictionaries: latents and error of a dictionary together are its activation. Paths that pass
    parts of the model without a dictionary belong to the edge. Sums over upstream nodes need not give the score of d:
    to first order only do the changes of all parts below make up that of d.

    Costs one forward and backward for each node but those of the first dictionary (up to its block; several nodes are
    run side by side where there is room), and three forwards and two backwards besides; integrated gradients as much
    more as `feature_effects` takes for the coefficients.

    Args:
        bridge, prompts, metric, dictionaries: As for `feature_effects`; all dictionaries cut, also those of which no
            node is in the circuit.
        circuit: The nodes, of `select_features`.
        method, direction, value, steps, points, rules: As for `feature_effects`, and best the same as there. Backward
            rules govern the derivatives between nodes too; integrated gradients the coefficients only, as in the paper.
        memory_budget, batch_size, progress: As for `attribution_patch`.

    Returns:
        `FeatureEdges`; `edges.circuit(circuit, k=30)` is the circuit with its strongest edges.

    Raises:
        ValueError: If an option is unknown or does not fit, the circuit is empty or of other dictionaries, or the
            budget is too small.
        RuntimeError: If the model is in training mode.

    Source:
        Marks et al. 2024 (arXiv:2403.19647), section 3, vector-Jacobian products for one downstream node at a time.
        Their edges go between neighbouring submodules; here between any two, and the metric is a node.

    Example:
        >>> nodes = interp.patching.select_features(scores, 30)
        >>> edges = interp.patching.feature_edges(bridge, p, m, saes, nodes)
        >>> edges.circuit(nodes, k=40).plot()
    """
    if not isinstance(method, Rules):
        choice("method", method, get_args(EdgeMethod))
    choice("direction", direction, DIRECTIONS)
    choice("value", value, _REFERENCE)
    choice("points", points, get_args(Points))
    along = method == "integrated_gradients"
    if rules is not None and not along:
        raise ValueError(
            f"rules= replaces the gradient of integrated gradients; here method={method!r}: pass them there"
        )
    chosen = resolve_rules(("gradient" if rules is None else rules) if along else method)  # type: ignore[arg-type]
    shape = checked(bridge, prompts, metric, "resid_pre")
    if value == "mean" and len(prompts) < 2:
        raise ValueError("value='mean' needs other examples, but there is 1; pass more prompts or use value='swap'")
    if not isinstance(circuit, FeatureCircuit) or not len(circuit):
        raise ValueError(f"edges are between the nodes of a FeatureCircuit, which must have some; got {circuit!r}")
    named = ordered(bridge, dictionaries)
    places = {name: latent_site(bridge, sae, None) for name, sae in named.items()}
    if blocked := [place.title for place in places.values() if place.site in _shut(chosen)]:
        raise ValueError(f"no relevance reaches the {blocked[0]} under these rules; use 'relp' or 'gradient'")
    check_dictionaries(circuit.provenance["dictionary"], places)
    spots = spots_of(prompts, circuit.values, circuit.provenance)
    where = tuple(
        (place, Cells(("latent", "pos"), (place.layer,), spots, [], None, place.chosen)) for place in places.values()
    )
    base, other = (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
    reader = Reader(metric, torch.arange(len(prompts)), len(prompts))
    _check_metric(reader, shape, base.shape[1])
    split = Split.of(bridge, shape, reader, base.shape[1], memory_budget, batch_size)
    passes = LinkPasses(
        bridge, split, base, other, value, {}, chosen, quadrature(points, steps) if along else None, (), False, where,
        _cells_of(circuit.values, list(places)),
    )  # fmt: skip
    passes.check()
    with differentiable(bridge), progress_bar(progress, len(prompts), "feature edges") as bar:
        edges, own, scores = passes.links(bar.update)
    unit, names, n = str(getattr(metric, "unit", "metric")), circuit.nodes, len(prompts)
    record = provenance(
        bridge,
        method=method if isinstance(method, str) else "custom",
        rules=chosen.to_dict(),
        direction=direction,
        value=value,
        reference=_REFERENCE[value],
        steps=steps if along else None,
        points=points if along else None,
        dictionary=circuit.provenance["dictionary"],
        base=float(scores.base.mean()),
        prompts={"name": prompts.name, "seed": prompts.seed, "n": n, "tokens": int(prompts.clean.shape[1])},
        metric={"name": metric_name(metric), "unit": unit},
        cost=passes.cost,
    )
    examples = {"example": list(range(n))}
    return FeatureEdges(
        labelled(
            edges, ["upstream", "downstream", "example"],
            {"upstream": names, "downstream": [*names, METRIC], **examples}, unit=unit,
        ),
        record,
        labelled(own, ["upstream", "example"], {"upstream": names, **examples}, unit=unit),
        metric_name(metric),
        direction,
        value,
    )  # fmt: skip


def _cells_of(mask: xr.DataArray, names: list[str]) -> tuple[Cell, ...]:
    """The nodes of a circuit as places among the dictionaries, spots and units, in the order of its `nodes`."""
    flat = mask.values.reshape(mask.sizes["node"], -1)
    places, latents = [names.index(name) for name in mask["dictionary"].values], mask["latent"].values
    return tuple(
        (places[node], int(spot), ERROR_UNIT if latents[node] == ERROR else int(latents[node]))
        for node, spot in zip(*np.nonzero(flat), strict=True)
    )
