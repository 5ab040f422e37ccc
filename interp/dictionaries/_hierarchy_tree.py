"""The concept tree of a hierarchy of components, and its figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    import networkx as nx
    import plotly.graph_objects as go


def concept_tree(
    giving: list[Float[Tensor, "_ _"]],
    strengths: list[Float[Tensor, "_"]],
    root: int | None,
    threshold: float,
    max_children: int,
    prune: bool,
) -> nx.DiGraph:
    """Edges from coarse to fine; `giving[i][r, c]`: what component r of level i + 1 gives component c of the next."""
    import networkx as nx

    n_levels, n_roots = len(strengths), len(strengths[-1])
    if root is not None and not 0 <= root < n_roots:
        raise ValueError(f"root {root} is not one of the {n_roots} components of level {n_levels}")
    if not 0.0 < threshold <= 1.0 or max_children < 1:
        raise ValueError(f"threshold must be in (0, 1] and max_children at least 1; got {threshold} and {max_children}")
    graph: Any = nx.DiGraph()
    for number, values in enumerate(strengths):
        for component, strength in enumerate(values.tolist()):
            graph.add_node((number + 1, component), level=number + 1, component=component, strength=strength)
    for number, matrix in enumerate(giving):
        received = matrix.sum(0)
        for parent in range(matrix.shape[1]):
            values, children = matrix[:, parent].sort(descending=True, stable=True)
            for value, child in zip(values[:max_children].tolist(), children[:max_children].tolist(), strict=True):
                if value > 0.0 and value >= threshold * float(values[0]):
                    graph.add_edge((number + 2, parent), (number + 1, child), share=value / float(received[parent]))
    if prune:
        for node in sorted(graph.nodes):  # finest first, so that a chain is shortened from its end
            children = list(graph.successors(node))
            if len(children) != 1:
                continue
            (child,) = children
            share = graph.edges[node, child]["share"]
            graph.remove_edge(node, child)
            for grandchild in list(graph.successors(child)):
                graph.add_edge(node, grandchild, share=share * graph.edges[child, grandchild]["share"])
    roots = [(n_levels, component) for component in (range(n_roots) if root is None else [root])]
    reached = set(roots).union(*(nx.descendants(graph, node) for node in roots))
    return graph.subgraph(reached).copy()


def draw(graph: nx.DiGraph, labels: dict[tuple[int, int], str]) -> go.Figure:
    """Nodes in rows by level, each below the middle of its parents; the width of an edge is its share."""
    import plotly.graph_objects as go

    from interp.plotting.series import finish
    from interp.plotting.style import MAX_POINTS, PALETTE, escape

    unknown = set(labels) - set(graph.nodes)
    if unknown:
        raise ValueError(
            f"labels names {sorted(unknown)[:5]}, which are not in this tree; its nodes are (level, component)"
        )
    if graph.number_of_edges() + graph.number_of_nodes() > MAX_POINTS:
        raise ValueError(f"{graph.number_of_nodes()} nodes are too many to draw; give a root")
    rows = _rows(graph)
    place = {node: ((i + 0.5) / len(row), level) for level, row in rows.items() for i, node in enumerate(row)}
    figure: Any = go.Figure()
    for parent, child, share in graph.edges(data="share"):
        (x0, y0), (x1, y1) = place[parent], place[child]
        figure.add_trace(
            go.Scatter(
                x=[x0, x1], y=[y0, y1], mode="lines", showlegend=False, hoverinfo="skip",
                line={"color": "#9a9a9a", "width": 0.5 + 4.0 * share},
            )
        )  # fmt: skip
    for number, (level, row) in enumerate(sorted(rows.items(), reverse=True)):
        names = [labels.get(node, str(node[1])) for node in row]
        strengths = [graph.nodes[node]["strength"] for node in row]
        figure.add_trace(
            go.Scatter(
                x=[place[node][0] for node in row], y=[level] * len(row), mode="markers+text",
                text=[escape(name) for name in names], textposition="top center", textfont={"size": 10},
                customdata=[[node[0], node[1], strength] for node, strength in zip(row, strengths, strict=True)],
                hovertemplate="level %{customdata[0]}, component %{customdata[1]}<br>strength %{customdata[2]:.4g}"
                "<extra></extra>",
                marker={"size": 9, "color": PALETTE[number % len(PALETTE)]}, showlegend=False,
            )
        )  # fmt: skip
    figure.update_xaxes(visible=False, range=[0, 1])
    figure.update_yaxes(
        title="level (1 is the finest)", tickvals=sorted(rows), range=[min(rows) - 0.4, max(rows) + 0.5], showgrid=False
    )
    width = min(1600, max(480, 34 * max(len(row) for row in rows.values())))
    return finish(
        figure,
        title="components that make up coarser ones",
        width=width,
        height=120 + 130 * len(rows),
        margin={"l": 70, "r": 20, "t": 58, "b": 30},
        legend=None,
    )


def _rows(graph: nx.DiGraph) -> dict[int, list[tuple[int, int]]]:
    """The nodes of each level from left to right: by the mean place of their parents, so that edges cross less."""
    rows: dict[int, list[tuple[int, int]]] = {}
    place: dict[tuple[int, int], float] = {}
    for level in sorted({node[0] for node in graph.nodes}, reverse=True):
        row = sorted(node for node in graph.nodes if node[0] == level)
        above = {node: [place[parent] for parent in graph.predecessors(node)] for node in row}
        rows[level] = sorted(row, key=lambda node, above=above: sum(above[node]) / max(1, len(above[node])))
        place |= {node: (i + 0.5) / len(row) for i, node in enumerate(rows[level])}
    return rows
