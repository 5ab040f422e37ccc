"""Drawings of sparse feature circuits: features in rows by the activation they are of, and the edges between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from interp.plotting.circuits import _BOX_HEIGHT, _THICKEST, _THINNEST, COLOURS, _curve, _Key, _Node
from interp.plotting.style import DIVERGING, FONT_SIZE, apply_layout, axis_style, escape

METRIC = "metric"
"""The name of the node at the top, into which edges may go."""

FILLS: dict[str, str] = {"positive": DIVERGING[6], "negative": DIVERGING[4], "": "#f4f4f4"}
"""Of nodes by the sign of their score; the last where there is none."""

_STEP = 102.0  # pixels from one box to the next
_BOX = 94.0
_RISE = 74.0
_GAP = 22.0  # between the columns of two positions
_WIDEST = 1500.0
_LETTERS = 17  # of a label that fit a box


def feature_graph(
    nodes: pd.DataFrame,
    edges: pd.DataFrame | None = None,
    *,
    title: str,
    unit: str = "",
    max_nodes: int = 40,
    max_edges: int = 60,
) -> go.Figure:
    """Figure of a feature circuit: one box for each latent, a triangle for what a dictionary leaves out (its error).

    Rows are activations, in the order of computation from below; where nodes have positions, columns are positions.
    Fill is blue where a node's score is positive and red where it is negative; so are edges by their weight, which also
    gives their width. Hovering shows names and numbers. Rows in which nothing is drawn are left out.

    Args:
        nodes: One row per node: `node` (its name, as in `edges`), `dictionary`, `row` (the place of that among the
            rows), `latent` (-1 is drawn as an error), and if there are any `score`, `label`, `pos` and `column` (the
            place of the position among the columns).
        edges: `upstream`, `downstream` (a name, or `"metric"` for the box at the top) and `weight`; those to nodes that
            are not drawn are left out. None for nodes alone.
        unit: Of scores and weights.
        max_nodes, max_edges: Draw this many, the strongest; the figure says how many it leaves out.

    Raises:
        KeyError: If a column is missing.
        ValueError: If there are no nodes, two have one name, or more than `max_nodes` have no scores to choose by.
    """
    frame = _chosen(nodes, max_nodes)
    links = _links(edges, set(frame["node"]), max_edges)
    scored = "score" in frame.columns
    to_metric = bool((links["downstream"] == METRIC).any())
    placed, columns, width, height = _place(frame, links)
    figure = go.Figure()
    largest = float(links["weight"].abs().max()) if len(links) else 1.0
    for upstream, downstream, weight in links[["upstream", "downstream", "weight"]].itertuples(index=False):
        x, y = _curve(placed, (str(upstream), 0, 0), (str(downstream), 0, 0), "", _BOX, width)
        name = escape(f"{upstream}->{downstream}")
        figure.add_scatter(
            x=x, y=y, mode="lines", name=name, showlegend=False, opacity=0.75, hovertemplate=f"{name}<br>{weight:.4g} "
            f"{escape(unit)}<extra></extra>",
            line={"color": COLOURS["positive" if weight >= 0 else "negative"],
                  "width": _THINNEST + (_THICKEST - _THINNEST) * abs(weight) / (largest or 1.0)},
        )  # fmt: skip
    _draw_nodes(figure, frame, placed, scored, unit)
    if to_metric:
        _metric_box(figure, placed[METRIC, 0, 0])
    _axes(figure, frame, placed, columns, width, height, to_metric)
    _legend(figure, frame, links)
    figure.add_annotation(
        text=escape(_summary(nodes, frame, edges, links, largest, unit)), x=0, xref="paper", xanchor="left", y=0,
        yref="paper", yanchor="top", yshift=-34 if columns else -10, showarrow=False, font={"size": FONT_SIZE - 1},
    )  # fmt: skip
    margin = {"l": 120, "r": 150, "t": 58, "b": 62 if columns else 40}
    return apply_layout(
        figure, title=title, width=int(width) + margin["l"] + margin["r"],
        height=int(height) + margin["t"] + margin["b"], margin=margin,
    )  # fmt: skip


def _chosen(nodes: pd.DataFrame, max_nodes: int) -> pd.DataFrame:
    if missing := [name for name in ("node", "dictionary", "row", "latent") if name not in nodes.columns]:
        raise KeyError(f"no column {missing[0]!r}; nodes are drawn from node, dictionary, row and latent")
    if nodes.empty:
        raise ValueError("nothing to draw: the circuit has no nodes")
    if nodes["node"].duplicated().any():
        raise ValueError(f"two nodes are called {nodes.loc[nodes['node'].duplicated(), 'node'].iloc[0]!r}")
    known = "score" in nodes.columns and bool(np.isfinite(nodes["score"].astype(float)).all())
    if len(nodes) <= max_nodes:
        return nodes if known or "score" not in nodes.columns else nodes.drop(columns="score")
    if not known:
        raise ValueError(
            f"{len(nodes)} nodes are more than max_nodes={max_nodes}, and they have no scores that say which to draw; "
            "raise max_nodes"
        )
    order = nodes["score"].abs().sort_values(ascending=False, kind="stable").index[:max_nodes]
    return nodes.loc[order]


def _links(edges: pd.DataFrame | None, drawn: set[str], max_edges: int) -> pd.DataFrame:
    """Edges between drawn nodes, weakest first, so that the strongest are on top."""
    if edges is None:
        return pd.DataFrame({"upstream": [], "downstream": [], "weight": []})
    if missing := [name for name in ("upstream", "downstream", "weight") if name not in edges.columns]:
        raise KeyError(f"no column {missing[0]!r}; edges have upstream, downstream and weight")
    inside = edges["downstream"].isin(drawn) | (edges["downstream"] == METRIC)
    within = edges.loc[(edges["upstream"].isin(drawn) & inside).to_numpy()]
    order = within["weight"].abs().sort_values(ascending=False, kind="stable").index[:max_edges]
    return within.loc[order[::-1]]


def _place(frame: pd.DataFrame, links: pd.DataFrame) -> tuple[dict[_Key, _Node], list[tuple[str, float]], float, float]:
    """Boxes by name; labels and centres of the columns; width and height in pixels."""
    places = frame.assign(column=frame["column"] if "column" in frame.columns else 0)
    rows = sorted(places["row"].unique())
    in_cell = places.groupby(["column", "row"]).size()
    used = sorted(places["column"].unique())
    widths = {column: float(in_cell[column].max()) for column in used}
    step = min(_STEP, (_WIDEST - _GAP * len(used)) / sum(widths.values()))
    placed: dict[_Key, _Node] = {}
    columns, left = [], 20.0
    for column in used:
        wide = widths[column] * step
        mine = places.loc[(places["column"] == column).to_numpy()]
        columns.append((str(mine["pos"].iloc[0]) if "pos" in mine.columns else "", left + wide / 2))
        for row, group in mine.groupby("row"):
            ordered = group.sort_values("latent", kind="stable")
            for i, name in enumerate(ordered["node"]):
                node = _Node(str(name), (int(row), 0), i)  # type: ignore[arg-type]
                node.x = left + wide / 2 + (i - (len(ordered) - 1) / 2) * step
                node.y = 30 + rows.index(row) * _RISE
                placed[str(name), 0, 0] = node
        left += wide + _GAP
    width = max(left - _GAP + 20, 360.0)
    above = [placed[str(name), 0, 0].x for name in links.loc[links["downstream"] == METRIC, "upstream"]]
    to_metric = bool(above)
    if to_metric:
        top = _Node(METRIC, (10**6, 0), 0)
        top.x, top.y = float(np.mean(above)), 30 + len(rows) * _RISE
        placed[METRIC, 0, 0] = top
    return placed, columns if "column" in frame.columns else [], width, 60 + (len(rows) - 1 + to_metric) * _RISE


def _draw_nodes(figure: go.Figure, frame: pd.DataFrame, placed: dict[_Key, _Node], scored: bool, unit: str) -> None:
    values = frame["score"] if "score" in frame.columns else frame["row"]
    signs = ["" if not scored else "positive" if score >= 0 else "negative" for score in values]
    errors = (frame["latent"] == -1).to_numpy()
    half, tall = _box_of(placed) / 2, _BOX_HEIGHT / 2
    for sign, fill in FILLS.items():
        for error in (False, True):
            x: list[float] = []
            y: list[float] = []
            for name, own, is_error in zip(frame["node"], signs, errors, strict=True):
                if own != sign or is_error != error:
                    continue
                node = placed[str(name), 0, 0]
                low, high = node.y - tall, node.y + tall
                if error:
                    x += [node.x - half * 0.8, node.x + half * 0.8, node.x, node.x - half * 0.8, np.nan]
                    y += [low, low, high + 6, low, np.nan]
                else:
                    x += [node.x - half, node.x + half, node.x + half, node.x - half, node.x - half, np.nan]
                    y += [low, low, high, high, low, np.nan]
            if x:
                figure.add_scatter(
                    x=x, y=y, mode="lines", fill="toself", fillcolor=fill, line={"color": "#444444", "width": 1},
                    name="errors" if error else "latents", showlegend=False, hoverinfo="skip",
                )  # fmt: skip
    hover = []
    for _, row in frame.iterrows():
        node = placed[str(row["node"]), 0, 0]
        label = str(row.get("label", "") or "")
        written = label if row["latent"] != -1 else ""  # a triangle has no room for it
        text = "error" if row["latent"] == -1 else str(row["latent"])
        note: dict[str, Any] = {"showarrow": False, "xref": "x", "yref": "y", "xanchor": "center", "yanchor": "middle"}
        size, lower = FONT_SIZE - 2, row["latent"] == -1
        figure.add_annotation(
            text=text, x=node.x, y=node.y + (6 if written else 0) - 6 * lower, font={"size": size}, **note
        )
        if written:
            short = written if len(written) <= _LETTERS else f"{written[: _LETTERS - 1]}…"
            at = {"x": node.x, "y": node.y - 8}
            figure.add_annotation(text=escape(short), font={"size": size - 2, "color": "#333333"}, **at, **note)
        score = f"<br>{row['score']:.4g} {escape(unit)}" if scored else ""
        hover.append(escape(str(row["node"])) + (f"<br>{escape(label)}" if label else "") + score)
    centres = [placed[str(name), 0, 0] for name in frame["node"]]
    figure.add_scatter(
        x=[node.x for node in centres], y=[node.y for node in centres], mode="markers", name="nodes", showlegend=False,
        marker={"size": 26, "opacity": 0}, text=hover, hovertemplate="%{text}<extra></extra>",
    )  # fmt: skip


def _box_of(placed: dict[_Key, _Node]) -> float:
    """Width of a box: as wide as the closest two of one row allow."""
    by_row: dict[float, list[float]] = {}
    for node in placed.values():
        by_row.setdefault(node.y, []).append(node.x)
    gaps = [float(np.diff(sorted(xs)).min()) for xs in by_row.values() if len(xs) > 1]
    return min([_BOX, *(gap - 6 for gap in gaps)])


def _metric_box(figure: go.Figure, node: _Node) -> None:
    half, tall = _BOX / 2, _BOX_HEIGHT / 2
    left, right, low, high = node.x - half, node.x + half, node.y - tall, node.y + tall
    figure.add_scatter(
        x=[left, right, right, left, left], y=[low, low, high, high, low], mode="lines", fill="toself",
        fillcolor="#ffffff", line={"color": "#444444", "width": 1.5}, name=METRIC, showlegend=False, hoverinfo="skip",
    )  # fmt: skip
    figure.add_annotation(text=METRIC, x=node.x, y=node.y, showarrow=False, font={"size": FONT_SIZE - 1})


def _axes(
    figure: go.Figure, frame: pd.DataFrame, placed: dict[_Key, _Node], columns: list[tuple[str, float]], width: float,
    height: float, to_metric: bool,
) -> None:  # fmt: skip
    names = dict(zip(frame["row"], frame["dictionary"].astype(str), strict=True))
    rows = {node.row[0]: node.y for node in placed.values()}
    ticks = {y: escape(names.get(row, METRIC)) for row, y in rows.items()}
    if to_metric:
        ticks[placed[METRIC, 0, 0].y] = ""
    bare: dict[str, Any] = {"showgrid": False, "zeroline": False, "showline": False, "ticks": ""}
    xs = [trace.x for trace in figure.data]  # type: ignore[attr-defined]
    left = min([0.0, *(float(np.nanmin(x)) - 8 for x in xs)])
    right = max([width, *(float(np.nanmax(x)) + 8 for x in xs)])
    figure.update_yaxes(
        axis_style("", range=[0, height], tickvals=list(ticks), ticktext=list(ticks.values()), **bare)
    )  # fmt: skip
    figure.update_xaxes(
        axis_style(
            "position" if columns else "", range=[left, right], tickvals=[x for _, x in columns],
            ticktext=[escape(label) for label, _ in columns], showticklabels=bool(columns), **bare,
        )
    )  # fmt: skip
    for (_, first), (_, second) in zip(columns, columns[1:], strict=False):
        del first
        wide = [node.x for node in placed.values() if node.name != METRIC and node.x < second - 1]
        ahead = [node.x for node in placed.values() if node.name != METRIC and node.x > max(wide) + 1]
        figure.add_vline((max(wide) + min(ahead)) / 2, line={"color": "#e4e4e4", "width": 1}, layer="below")
    figure.update_layout(hovermode="closest")


def _legend(figure: go.Figure, frame: pd.DataFrame, links: pd.DataFrame) -> None:
    """Entries for what shapes and colours say; they draw nothing."""
    marks: list[tuple[str, dict[str, Any]]] = [("latent", {"symbol": "square", "color": "#f4f4f4"})]
    if (frame["latent"] == -1).any():
        marks.append(("error", {"symbol": "triangle-up", "color": "#f4f4f4"}))
    if "score" in frame.columns:
        marks += [(f"score {sign}", {"symbol": "square", "color": FILLS[sign]}) for sign in ("positive", "negative")]
    for name, marker in marks:
        marker = {**marker, "size": 12, "line": {"color": "#444444", "width": 1}}
        figure.add_scatter(x=[np.nan], y=[np.nan], mode="markers", marker=marker, name=name, showlegend=True)
    for sign in ("positive", "negative") if len(links) else ():
        if ((links["weight"] >= 0) == (sign == "positive")).any():
            line = {"color": COLOURS[sign], "width": 3}
            figure.add_scatter(x=[np.nan], y=[np.nan], mode="lines", line=line, name=f"edge {sign}", showlegend=True)
    figure.update_layout(legend={"x": 1.02, "y": 1})


def _summary(
    nodes: pd.DataFrame, frame: pd.DataFrame, edges: pd.DataFrame | None, links: pd.DataFrame, largest: float, unit: str
) -> str:
    total, text = 0 if edges is None else len(edges), f"{len(frame)} nodes"
    if len(nodes) > len(frame):
        text = f"the {len(frame)} strongest of {len(nodes)} nodes"
    if len(links):
        text += f", {len(links)} edges" if len(links) == total else f", the {len(links)} strongest of {total} edges"
        text += f"; the widest: {largest:.3g} {unit}".rstrip()
    return text
