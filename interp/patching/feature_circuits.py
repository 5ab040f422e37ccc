"""Sparse feature circuits: which latents and errors of several dictionaries a behaviour needs, and what joins them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import xarray as xr

from interp.patching._cells import choice
from interp.patching.feature_scores import FeatureEffects, names_of, places
from interp.results import Result

if TYPE_CHECKING:
    import pandas as pd

FeatureSelection: TypeAlias = Literal["top", "random"]
"""`"top"`: the strongest nodes. `"random"`: nodes drawn from those with any score that is not 0, a control."""


@dataclass(frozen=True, eq=False, repr=False)
class FeatureCircuit(Result):
    """A set of features, `values` Bool (node, pos) or (node) over all nodes of the dictionaries, and edges among them.

    Everything that is a node and not in it is ablated when it is evaluated (`feature_faithfulness`). Names and
    coordinates are those of `FeatureEffects`. Sets combine as Python's do: `a | b`, `a & b`, `a - b`; `node in
    circuit`, `len(circuit)` and iteration are about its nodes, by name.

    Attributes:
        scores: Mean effect of every node, NaN where none is known.
        edges: `{"upstream": name, "downstream": name or "metric", "weight": mean over examples}`, strongest first.
    """

    scores: xr.DataArray
    edges: list[dict[str, Any]] = field(default_factory=list)

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that are in, in the order of computation."""
        every = names_of(self.values)
        return [every[i] for i in np.flatnonzero(self.values.values.ravel())]

    @property
    def share(self) -> float:
        """Nodes that are in, as a share of all."""
        return len(self) / self.values.size

    def complement(self) -> FeatureCircuit:
        """All the other nodes, without edges."""
        return replace(self, values=~self.values, edges=[])

    def jaccard(self, other: FeatureCircuit) -> float:
        """Nodes in both over nodes in either: 1 for equal circuits (two empty ones included), 0 for disjoint ones."""
        mine, its = self.values.values, self._same(other)
        either = int((mine | its).sum())
        return int((mine & its).sum()) / either if either else 1.0

    def subset(self, nodes: Iterable[str]) -> FeatureCircuit:
        """The circuit of these nodes of the same dictionaries, with the edges among them. Raises ValueError for a name
        that is none."""
        chosen = [str(node) for node in nodes]
        values = np.zeros(self.values.size, dtype=bool)
        values[places(self.values, chosen)] = True
        return self._with(values.reshape(self.values.shape))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per node that is in, strongest first: `node`, `dictionary`, `layer`, `latent` (-1: the error), `pos`
        where nodes have positions, and `score`."""
        order = self.scores.rename("score").transpose(*self.values.dims).to_dataframe(dim_order=list(self.values.dims))
        frame = order.reset_index()
        frame = frame.loc[self.values.values.ravel()].assign(node=self.nodes)
        columns = ["node", "dictionary", "layer", "latent", *(["pos"] if "pos" in frame.columns else []), "score"]
        return frame.loc[frame["score"].abs().sort_values(ascending=False, kind="stable").index, columns].reset_index(
            drop=True
        )

    def plot(
        self,
        *,
        names: Mapping[str, str] | None = None,
        max_nodes: int = 40,
        max_edges: int = 60,
        title: str | None = None,
    ) -> Any:
        """Figure of the circuit: nodes in rows by layer and activation, from below, with its strongest edges.

        Args:
            names: What nodes stand for, by name with or without position, such as labels of latents: written in the
                box below the name.
            max_nodes, max_edges: Draw this many, the strongest; the figure says how many it leaves out.
        """
        import pandas as pd

        from interp.plotting import feature_graph

        frame = self.to_dataframe()
        labels = dict(names or {})
        frame["label"] = [labels.get(node, labels.get(node.partition("@")[0], "")) for node in frame["node"]]
        order = {record["name"]: i for i, record in enumerate(self.provenance["dictionary"])}
        frame["row"] = frame["dictionary"].map(order)
        if "pos" in self.values.dims:
            positions, tokens = self.values["pos"].values.tolist(), self.scores.coords.get("token")
            frame["column"] = frame["pos"].map({pos: i for i, pos in enumerate(positions)})
            if tokens is not None:
                frame["pos"] = [f"{pos} {tokens.sel(pos=pos).item()}" for pos in frame["pos"]]
        columns = ["upstream", "downstream", "weight"]
        return feature_graph(
            frame, pd.DataFrame(self.edges, columns=columns), max_nodes=max_nodes, max_edges=max_edges,
            unit=str(self.scores.attrs.get("unit", "")),
            title=f"Circuit of {len(self)} features" if title is None else title,
        )  # fmt: skip

    def __len__(self) -> int:
        return int(self.values.sum())

    def __iter__(self) -> Iterator[str]:
        return iter(self.nodes)

    def __contains__(self, node: str) -> bool:
        return bool(self.values.values.ravel()[places(self.values, [node])][0])

    def __or__(self, other: FeatureCircuit) -> FeatureCircuit:
        return self._with(self.values.values | self._same(other))

    def __and__(self, other: FeatureCircuit) -> FeatureCircuit:
        return self._with(self.values.values & self._same(other))

    def __sub__(self, other: FeatureCircuit) -> FeatureCircuit:
        return self._with(self.values.values & ~self._same(other))

    def __repr__(self) -> str:
        some = ", ".join(self.to_dataframe()["node"][:4])
        more = ", ..." if len(self) > 4 else ""
        return (
            f"FeatureCircuit({len(self)} of {self.values.size} nodes, {len(self.edges)} edges: {some}{more}; "
            f"{self.provenance.get('model', 'unknown model')})"
        )

    def _with(self, mask: np.ndarray) -> FeatureCircuit:
        new = replace(self, values=self.values.copy(data=mask), edges=[])
        within = {*new.nodes, "metric"}
        kept = [edge for edge in self.edges if edge["upstream"] in within and edge["downstream"] in within]
        return replace(new, edges=kept)

    def _same(self, other: FeatureCircuit) -> np.ndarray:
        """The other's mask; raises ValueError if it is over other nodes."""
        if not isinstance(other, FeatureCircuit) or names_of(self.values) != names_of(other.values):
            raise ValueError(
                f"{other!r} is not over the nodes of {self!r}: sets combine if they are of the same dictionaries, "
                "latents and positions"
            )
        return other.values.values


def select_features(
    effects: FeatureEffects,
    size: float | int | None = None,
    *,
    threshold: float | int | None = None,
    absolute: bool = True,
    how: FeatureSelection = "top",
    seed: int = 0,
) -> FeatureCircuit:
    """The circuit of the nodes with the largest effects (means over examples); costs no forward.

    Args:
        effects: Of `feature_effects`.
        size: Number of nodes, or, as a float, their share of all.
        threshold: In place of a size: all nodes of at least this effect, in the metric's unit (Marks et al. use .1).
        absolute: By magnitude; else the nodes that the answer needs first (most negative under noising).
        how: `"random"` draws nodes from those that score anything, as a control of the same size.
        seed: For `"random"`.

    Raises:
        ValueError: If not exactly one of `size` and `threshold` is given, or either is out of range.
    """
    if (size is None) == (threshold is None):
        raise ValueError(f"give one of size={size} and threshold={threshold}")
    choice("how", how, get_args(FeatureSelection))
    mean = effects.mean()
    order, support = ranked(effects, absolute=absolute, how=how, seed=seed)
    n = int((support >= float(threshold)).sum()) if threshold is not None else nodes_of(size, mean.size)
    mask = np.zeros(mean.size, dtype=bool)
    mask[order[:n]] = True
    about = {
        **effects.provenance,
        "select": {"size": n, "threshold": threshold, "absolute": absolute, "how": how, "seed": seed},
    }
    return FeatureCircuit(mean.copy(data=mask.reshape(mean.shape)), about, mean)


def ranked(effects: FeatureEffects, *, absolute: bool, how: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of all nodes in the order in which they are taken, and what they are ranked by."""
    mean = np.nan_to_num(effects.mean().values.ravel().astype(float))
    support = np.abs(mean) if absolute else mean * (-1 if effects.direction == "noise" else 1)
    if how == "top":
        return np.argsort(-support, kind="stable"), support
    live = (effects.values.values != 0).any(-1).ravel()
    drawn = np.random.default_rng(seed).random(len(mean))
    return np.lexsort((drawn, ~live)), support


def nodes_of(size: Any, n_nodes: int) -> int:
    """The number of nodes that a size stands for: an int itself, a float its share of all."""
    n = round(size * n_nodes) if isinstance(size, float) else int(size)
    if not (0 < size <= 1 if isinstance(size, float) else 0 <= size <= n_nodes):
        raise ValueError(f"size={size}: expected a number of nodes up to {n_nodes:,}, or a share above 0 and up to 1.0")
    return n
