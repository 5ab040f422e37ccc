"""Edges of a graph as the table that circuits are drawn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Bool
from torch import Tensor

from interp.patching.graph import Graph


def draw_edges(
    graph: Graph,
    mask: Bool[Tensor, "writer reader"],
    scores: xr.DataArray | None,
    *,
    max_edges: int,
    title: str,
    unit: str = "",
) -> Any:
    """Figure of the masked edges; scores are an array (writer, reader)."""
    import pandas as pd

    from interp.plotting import circuit_graph

    writers, readers = mask.nonzero().T.numpy()
    frame = pd.DataFrame({"writer": np.array(graph.writers)[writers], "reader": np.array(graph.readers)[readers]})
    if scores is not None:
        frame["score"] = scores.transpose("writer", "reader").values[writers, readers]
    return circuit_graph(frame, title=title, unit=unit, max_edges=max_edges, group=graph.group, parallel=graph.parallel)
