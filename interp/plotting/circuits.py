"""Drawings of circuits: nodes in their layers from the input at the bottom to the logits at the top, edges between."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from interp.plotting.style import DIVERGING, FONT_SIZE, apply_layout, axis_style, escape

KINDS: dict[str, str] = {"q": "solid", "k": "dash", "v": "dot", "mlp": "solid", "logits": "solid"}
"""What an edge goes into, and how its line is dashed."""

COLOURS: dict[str, str] = {"positive": DIVERGING[8], "negative": DIVERGING[2], "": "#555555"}
"""Of edges by the sign of their score; the last where there are no scores."""

_NAME = re.compile(r"a(?P<layer>\d+)\.h(?P<head>\d+)(<(?P<kind>[qkv])>)?|m(?P<mlp>\d+)|input|logits")
_WIDEST = 1300  # pixels that a row of boxes may take
_TALLEST = 1500  # pixels that the rows may take
_BOX_HEIGHT = 30
_POINTS = 24  # of a curve: hovering finds its points and not what is between them
_BOWS = (0, 30, -30, 60, -60, 100, -100, 150, -150, 210, -210, 280, -280)  # pixels by which an edge may go round boxes
_ROOM = 100  # pixels at either side of the boxes that edges may use
_THINNEST, _THICKEST = 1.0, 6.0

_Key = tuple[str, int, int]  # kind, layer, head


@dataclass
class _Node:
    """A box: its row from below, its place in the row, and which of its inputs are drawn."""

    name: str
    row: tuple[int, int]
    order: int
    ports: set[str] = field(default_factory=set)
    x: float = 0.0
    y: float = 0.0


def circuit_graph(
    edges: pd.DataFrame,
    *,
    title: str,
    unit: str = "",
    max_edges: int = 60,
    group: int = 1,
    parallel: bool = False,
) -> go.Figure:
    """Figure of the edges of a circuit: heads and MLPs as boxes in their layers, joined from writer to reader.

    Edges are blue where their score is positive and red where it is negative, wider the larger it is, and dashed by
    what they go into; the letters q, k and v in a box are where its edges arrive. Entries of the legend switch edges
    of a sign and kind off and on; hovering shows an edge's name and score. Rows in which nothing is drawn are left out.

    Args:
        edges: One row per edge: `writer` and `reader` by the names of `interp.patching.Graph` (`"a0.h1"`, `"m0"`,
            `"a1.h0<k>"`, ...), and `score` if there is one.
        unit: Of the scores.
        max_edges: Draw this many, the strongest; the figure says how many it leaves out. A still picture is legible
            with about 60.
        group: Query heads that share a key-value head. Above 1, keys and values have boxes of their own below the
            heads, joined by thin grey lines to those of their heads that are drawn.
        parallel: Attention and MLP of a block read the same stream, and are drawn in one row.

    Raises:
        KeyError: If there is no column `writer` or `reader`.
        ValueError: If there are no edges, a name is not of that form, a score is not finite, or there are more than
            `max_edges` edges and no scores to choose by.
    """
    total, scored = len(edges), "score" in edges.columns
    frame = _strongest(edges, max_edges)
    nodes: dict[_Key, _Node] = {}
    names = list(zip(frame["writer"].astype(str), frame["reader"].astype(str), strict=True))
    ends = [(_writer(writer), *_reader(reader, group)) for writer, reader in names]
    for writer, reader, kind in ends:
        for key in (writer, reader):
            nodes.setdefault(key, _node(key, group, parallel))
        nodes[reader].ports.add(kind)
    width, height, box = _place(nodes)
    figure = go.Figure()
    _join_groups(figure, nodes, group)
    scores = frame["score"].to_numpy(dtype=float) if scored else np.ones(total)
    largest = np.abs(scores).max() or 1.0
    used: dict[tuple[str, str], None] = {}
    for (writer, reader, kind), score, edge in zip(ends, scores, names, strict=True):
        sign = "" if not scored else "positive" if score >= 0 else "negative"
        used[sign, kind] = None
        x, y = _curve(nodes, writer, reader, kind, box, width)
        name = escape("->".join(edge))
        figure.add_scatter(
            x=x, y=y, mode="lines", name=name, legendgroup=f"{sign} {kind}", showlegend=False, opacity=0.8,
            line={"color": COLOURS[sign], "dash": KINDS[kind],
                  "width": _THINNEST + (_THICKEST - _THINNEST) * abs(score) / largest if scored else 1.8},
            hovertemplate=name + (f"<br>{score:.4g} {escape(unit)}" if scored else "") + "<extra></extra>",
        )  # fmt: skip
    _boxes(figure, nodes, box)
    xs = np.concatenate([trace.x for trace in figure.data])  # type: ignore[attr-defined]
    left, right = min(0.0, float(np.nanmin(xs)) - 8), max(width, float(np.nanmax(xs)) + 8)
    _legend(figure, used)
    rows = {node.row: node.y for node in nodes.values()}
    figure.update_xaxes(visible=False, showgrid=False, zeroline=False, showline=False, showticklabels=False)
    figure.update_layout(xaxis={"range": [left, right]}, hovermode="closest")
    figure.update_yaxes(
        axis_style(
            "", range=[0, height], showgrid=False, zeroline=False, showline=False, ticks="",
            tickvals=list(rows.values()), ticktext=[_row_name(row, group, parallel) for row in rows],
        )
    )  # fmt: skip
    text = f"{total} edge{'s' * (total != 1)}"
    if total > len(frame):
        text = f"the {len(frame)} strongest of {total} edges; {total - len(frame)} are not drawn"
    if scored:
        text += f"; the widest: {largest:.3g} {unit}".rstrip()
    figure.add_annotation(
        text=escape(text), x=0, xref="paper", xanchor="left", y=0, yref="paper", yanchor="top", yshift=-10,
        showarrow=False, font={"size": FONT_SIZE - 1},
    )  # fmt: skip
    heading = "into, sign of score" if scored else "into"
    figure.update_layout(legend={"title": {"text": escape(heading), "font": {"size": FONT_SIZE}}, "x": 1.02, "y": 1})
    margin = {"l": 130, "r": 40 + max(130, 8 * len(heading)), "t": 58, "b": 40}
    return apply_layout(
        figure, title=title, width=int(right - left) + margin["l"] + margin["r"],
        height=int(height) + margin["t"] + margin["b"], margin=margin,
    )  # fmt: skip


def _strongest(edges: pd.DataFrame, max_edges: int) -> pd.DataFrame:
    """The edges to draw, weakest first, so that the strongest are on top."""
    if missing := [column for column in ("writer", "reader") if column not in edges.columns]:
        raise KeyError(f"no column {missing[0]!r}; a circuit is drawn from writer, reader and, if there is one, score")
    if edges.empty:
        raise ValueError("nothing to draw: the circuit has no edges")
    if max_edges < 1:
        raise ValueError(f"max_edges={max_edges} must be at least 1")
    if "score" not in edges.columns:
        if len(edges) > max_edges:
            raise ValueError(
                f"{len(edges)} edges are more than max_edges={max_edges}, and there are no scores that say which to "
                "draw; pass scores, or raise max_edges"
            )
        return edges
    if len(wrong := edges[~np.isfinite(edges["score"].astype(float))]):
        raise ValueError(
            f"{len(wrong)} edges have no finite score, for instance {'->'.join(wrong.iloc[0][['writer', 'reader']])}"
        )
    order = edges["score"].abs().sort_values(ascending=False, kind="stable").index[:max_edges]
    return edges.loc[order[::-1]]


def _parsed(name: str) -> re.Match[str]:
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no node; nodes are called like 'input', 'a0.h1', 'a0.h1<q>', 'm0' and 'logits'")
    return found


def _writer(name: str) -> _Key:
    found = _parsed(name)
    if name == "logits" or found["kind"]:
        raise ValueError(f"{name!r} reads the stream; edges begin at 'input', heads as 'a0.h1' and MLPs as 'm0'")
    if found["head"]:
        return "head", int(found["layer"]), int(found["head"])
    return ("mlp", int(found["mlp"]), 0) if found["mlp"] else ("input", -1, 0)


def _reader(name: str, group: int) -> tuple[_Key, str]:
    """The box that an edge goes into, and as what."""
    found = _parsed(name)
    if name == "input" or (found["head"] and not found["kind"]):
        raise ValueError(f"{name!r} writes to the stream; edges end at inputs as 'a0.h1<q>' and 'm0', and at 'logits'")
    if found["kind"]:
        box = "shared" if group > 1 and found["kind"] in "kv" else "head"
        return (box, int(found["layer"]), int(found["head"])), found["kind"]
    return (("mlp", int(found["mlp"]), 0), "mlp") if found["mlp"] else (("logits", -1, 0), "logits")


def _node(key: _Key, group: int, parallel: bool) -> _Node:
    kind, layer, head = key
    if kind == "shared":
        return _Node(f"a{layer}.h{head}", (layer, 0), head * group)
    if kind == "head":
        return _Node(f"a{layer}.h{head}", (layer, 1), head)
    if kind == "mlp":
        return _Node(f"m{layer}", (layer, 1 if parallel else 2), 0)
    return _Node(kind, (-1, 0) if kind == "input" else (10**6, 0), 0)


def _row_name(row: tuple[int, int], group: int, parallel: bool) -> str:
    layer, part = row
    if layer == -1 or layer == 10**6:
        return "input" if layer == -1 else "logits"
    return f"layer {layer} " + ("keys, values", "heads, MLP" if parallel else "heads", "MLP")[part]


def _place(nodes: dict[_Key, _Node]) -> tuple[float, float, float]:
    """Give every box its centre, in pixels; the size of all, and the width of a box. MLPs are in a column at the right,
    so that what passes them by does not pass through heads."""
    rows: dict[tuple[int, int], list[_Node]] = {}
    for key, node in nodes.items():
        if key[0] != "mlp":
            rows.setdefault(node.row, []).append(node)
    most = max((len(row) for row in rows.values()), default=1)
    step = min(84.0, _WIDEST / most)
    middle = most * step / 2
    for row in rows.values():
        for i, node in enumerate(sorted(row, key=lambda node: node.order)):
            node.x = 30 + middle + (i - (len(row) - 1) / 2) * step
    heights = sorted({node.row for node in nodes.values()})
    rise = max(_BOX_HEIGHT + 16.0, min(80.0, _TALLEST / len(heights)))
    mlps = [node for key, node in nodes.items() if key[0] == "mlp"]
    for node in mlps:
        node.x = 30 + most * step + 50
    for node in nodes.values():
        node.y = 30 + heights.index(node.row) * rise
    width = 60 + most * step + (110 if mlps else 0)
    return max(width, 320.0), 60 + (len(heights) - 1) * rise, min(62.0, step - 6)


def _port(node: _Node, kind: str, box: float) -> float:
    """Where edges of a kind enter a box."""
    return node.x + {"q": -0.3, "k": 0.0, "v": 0.3}.get(kind, 0.0) * box


def _curve(
    nodes: dict[_Key, _Node], writer: _Key, reader: _Key, kind: str, box: float, width: float
) -> tuple[np.ndarray, np.ndarray]:
    """From the top of one box to the bottom of the other, past as few boxes as may be."""
    start, end = nodes[writer], nodes[reader]
    x0, x1 = start.x, _port(end, kind, box)
    y0, y1 = start.y + _BOX_HEIGHT / 2, end.y - _BOX_HEIGHT / 2
    bend = 0.35 * (y1 - y0)
    y = _bezier(y0, y0 + bend, y1 - bend, y1)
    between = [node for node in nodes.values() if start.y < node.y < end.y]
    found: list[tuple[int, np.ndarray]] = []
    for bow in _BOWS:
        x = _bezier(x0, x0 + bow, x1 + bow, x1)
        if bow and not -_ROOM < x.min() <= x.max() < width + _ROOM:
            continue
        near = [(abs(x - node.x) < box / 2 + 3) & (abs(y - node.y) < _BOX_HEIGHT / 2 + 2) for node in between]
        found.append((sum(bool(hit.any()) for hit in near), x))
        if not found[-1][0]:
            break
    return min(found, key=lambda curve: curve[0])[1], y


def _bezier(a: float, b: float, c: float, d: float) -> np.ndarray:
    t = np.linspace(0, 1, _POINTS)
    return (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d


def _join_groups(figure: go.Figure, nodes: dict[_Key, _Node], group: int) -> None:
    """Thin lines from shared keys and values to the heads that share them."""
    x: list[float] = []
    y: list[float] = []
    for (kind, layer, shared), node in nodes.items():
        for head in range(shared * group, (shared + 1) * group) if kind == "shared" else ():
            if (mine := nodes.get(("head", layer, head))) is not None:
                x += [node.x, mine.x, np.nan]
                y += [node.y, mine.y, np.nan]
    if x:
        line = {"color": "#bbbbbb", "width": 1.2}
        figure.add_scatter(x=x, y=y, mode="lines", name="shared", line=line, showlegend=False, hoverinfo="skip")


def _boxes(figure: go.Figure, nodes: dict[_Key, _Node], box: float) -> None:
    x: list[float] = []
    y: list[float] = []
    for node in nodes.values():
        left, right, low, high = node.x - box / 2, node.x + box / 2, node.y - _BOX_HEIGHT / 2, node.y + _BOX_HEIGHT / 2
        x += [left, right, right, left, left, np.nan]
        y += [low, low, high, high, low, np.nan]
    figure.add_scatter(
        x=x, y=y, mode="lines", fill="toself", fillcolor="#f4f4f4", line={"color": "#444444", "width": 1},
        name="nodes", showlegend=False, hoverinfo="skip",
    )  # fmt: skip
    small = FONT_SIZE - 2 if box >= 50 else FONT_SIZE - 4
    for (kind, _, _), node in nodes.items():
        ports = sorted(node.ports & set("qkv"), key="qkv".index)
        label = node.name if box >= 40 else node.name.rpartition(".")[2]
        if kind == "shared":
            label = label.replace("h", "kv")
        note = {"showarrow": False, "xref": "x", "yref": "y", "xanchor": "center", "yanchor": "middle"}
        figure.add_annotation(text=label, x=node.x, y=node.y + (6 if ports else 0), font={"size": small}, **note)
        for port in ports:
            at = {"x": _port(node, port, box), "y": node.y - 8}
            figure.add_annotation(text=port, font={"size": small - 2, "color": "#666666"}, **at, **note)


def _legend(figure: go.Figure, used: dict[tuple[str, str], None]) -> None:
    """Entries that switch the edges of a sign and kind; they draw nothing."""
    for sign in COLOURS:
        for kind in KINDS:
            if (sign, kind) in used:
                into: dict[str, Any] = {"name": f"{kind}, {sign}" if sign else kind, "legendgroup": f"{sign} {kind}"}
                line = {"color": COLOURS[sign], "dash": KINDS[kind], "width": 3}
                figure.add_scatter(x=[np.nan], y=[np.nan], mode="lines", line=line, showlegend=True, **into)
