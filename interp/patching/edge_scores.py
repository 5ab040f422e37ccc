"""The result of edge attribution: what every edge of a model carries towards a metric, example by example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import xarray as xr

from interp.patching.graph import Graph
from interp.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from interp.patching.path_patching import EdgeEffects


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(Result):
    """Estimated change of a metric when one edge carries what the other run has there, for every edge and example.

    `values` is in the metric's own unit, with dimensions `(writer, reader, example)`, or `(writer, reader, pos,
    example)`, and NaN where the writer's output is not in the stream that the reader reads. Positive: the edge's
    value from the other run raises the metric. Under `"denoise"` that is the clean value in the corrupted run, under
    `"noise"` the corrupted value in the clean run, where edges that carry the answer are negative.

    Attributes:
        clean: The metric on the clean prompts, by example.
        corrupted: The metric on the corrupted prompts, by example.
        direction: `"denoise"` or `"noise"`.
        value: What goes in: `"swap"`, `"zero"` or `"mean"`.
        metric: Name of the metric; its unit is `values.attrs["unit"]`.
    """

    clean: xr.DataArray
    corrupted: xr.DataArray
    direction: str
    value: str
    metric: str

    @property
    def graph(self) -> Graph:
        """The graph whose writers and readers the coordinates name."""
        return Graph(**self.provenance["graph"])

    @property
    def method(self) -> str:
        """How the scores were estimated, such as `"gradient"` or `"relp"`."""
        return str(self.provenance["method"])

    def mean(self) -> xr.DataArray:
        """Mean score over examples, for every edge, NaN where there is none."""
        return self.values.mean("example", keep_attrs=True)

    def nodes(self) -> xr.DataArray:
        """Scores of writers: sums over the readers of their edges, for every example.

        Equal to what `attribution_patch` gives with the same options for the stream entering block 0 (`input`), the
        heads' `z` and the MLPs' `mlp_out`: an edge's score is its share of the writer's.
        """
        return self.values.sum("reader", skipna=True, keep_attrs=True)

    def between(self, writers: str | Sequence[str], readers: str | Sequence[str]) -> xr.DataArray:
        """Sum over the edges from any of these writers to any of these readers. Raises ValueError for a name that is
        not one."""
        chosen: dict[str, list[str]] = {}
        for axis, given in (("writer", writers), ("reader", readers)):
            names = [given] if isinstance(given, str) else list(given)
            known = getattr(self.graph, f"{axis}s")
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"no {axis} {unknown[0]!r}; see scores.graph.{axis}s, which begin with {known[:4]}")
            chosen[axis] = names
        return self.values.sel(chosen).sum(["writer", "reader"], skipna=True, keep_attrs=True)

    def effects(self, edges: Iterable[str] | None = None) -> EdgeEffects:
        """The scores of these edges (all by default), summed over positions, as the `Effects` that `path_patch` gives
        of them: `agreement(path_patch(bridge, p, m, edges), scores.effects(edges))`."""
        from interp.patching.path_patching import EdgeEffects

        names = self.graph.edges() if edges is None else [str(edge) for edge in edges]
        writers, readers = zip(*(self.graph.place(edge) for edge in names), strict=True)
        values = self.values.isel(
            writer=xr.DataArray(list(writers), dims="edge"), reader=xr.DataArray(list(readers), dims="edge")
        )
        if "pos" in values.dims:
            values = values.sum("pos", keep_attrs=True)
        values = values.drop_vars(["writer", "reader"]).assign_coords(edge=names).transpose("edge", "example")
        return EdgeEffects(
            values, {**self.provenance, "site": "edge"}, self.clean, self.corrupted, self.direction, "edge", self.value,
            self.metric,
        )  # fmt: skip

    def to_dataframe(self) -> pd.DataFrame:
        """One row per edge and example (and position): `edge`, the dimensions, and `value`."""
        return self._named(super().to_dataframe().dropna(subset=["value"]).reset_index(drop=True))

    def top(
        self, k: int = 5, *, by: Literal["abs", "max", "min"] = "abs", reduce: str | Sequence[str] | None = "example"
    ) -> pd.DataFrame:
        """The `k` strongest edges, best first, as `Result.top`, with their names in a column `edge`."""
        return self._named(super().top(k, by=by, reduce=reduce))

    def summed(self) -> xr.DataArray:
        """Mean over examples of the sum over positions: one score for every edge, (writer, reader)."""
        mean = self.mean()
        return mean.sum("pos", skipna=False, keep_attrs=True) if "pos" in mean.dims else mean

    def plot(self) -> Any:
        """Figure of the mean over examples (and sum over positions): a map of writers and readers, or, for a model with
        too many of them, the drawing that `draw` makes of the strongest edges."""
        from interp.plotting import MAX_CELLS, heatmap

        scores = self.summed()
        if scores.size > MAX_CELLS:
            return self.draw()
        return heatmap(scores, title=self._title, unit=f"{self.metric}, {scores.attrs['unit']}")

    def draw(self, k: int = 60) -> Any:
        """Figure of the `k` strongest edges, wherever they are, between nodes in their layers; `Circuit.plot` draws
        those of a circuit."""
        from interp.patching._drawing import draw_edges

        unit = str(self.values.attrs.get("unit", ""))
        return draw_edges(self.graph, self.graph.exists, self.summed(), max_edges=k, title=self._title, unit=unit)

    @property
    def _title(self) -> str:
        return f"{self.method} scores of edges ({self.direction}, {self.value})"

    def __repr__(self) -> str:
        """What was estimated how, on what, and how it was measured."""
        sizes = " x ".join(f"{name} {size}" for name, size in self.values.sizes.items())
        return (
            f"EdgeScores({sizes}; {self.graph.n_edges} edges; {self.method}; {self.direction}, {self.value}; metric "
            f"{self.metric} in {self.values.attrs.get('unit', '?')}; {self.provenance.get('model', 'unknown model')})"
        )

    def _named(self, frame: pd.DataFrame) -> pd.DataFrame:
        if {"writer", "reader"} <= set(frame.columns):
            frame.insert(0, "edge", frame["writer"].astype(str) + "->" + frame["reader"].astype(str))
        return frame
