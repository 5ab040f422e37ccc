"""Tests of the drawing of circuits: boxes in their layers, every edge once, signs, what is left out, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from interp import plotting
from interp.plotting.circuits import COLOURS, KINDS

EDGES = [
    ("input", "a0.h1<q>", 1.0),
    ("input", "a1.h0<k>", -4.0),
    ("a0.h1", "a1.h0<v>", 0.5),
    ("a0.h1", "m1", -0.25),
    ("m0", "m1", 2.0),
    ("a1.h0", "logits", -1.0),
    ("m1", "logits", 3.0),
]


def frame(edges: Any = EDGES) -> pd.DataFrame:
    return pd.DataFrame(edges, columns=["writer", "reader", "score"])


def _escaped(edge: tuple[str, str, float]) -> str:
    """The name of an edge in plotly's markup."""
    return f"{edge[0]}->{edge[1]}".replace("<", "&lt;").replace(">", "&gt;")


def draw(table: pd.DataFrame, **options: Any) -> Any:
    return plotting.circuit_graph(table, title="A title", unit="logits", **options)


def drawn(figure: Any) -> dict[str, Any]:
    """The traces of edges by name."""
    return {t.name: t for t in figure.data if t.legendgroup and not t.showlegend}


def boxes(figure: Any) -> dict[str, tuple[float, float]]:
    """Where the names of boxes are, without the letters of their inputs."""
    return {n.text: (n.x, n.y) for n in figure.layout.annotations if n.xref == "x" and n.text not in "qkv"}


def rows(figure: Any) -> dict[str, float]:
    return dict(zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=True))


def test_nodes_are_in_their_layers() -> None:
    figure = draw(frame())
    places, heights = boxes(figure), rows(figure)
    assert set(places) == {"input", "a0.h1", "m0", "a1.h0", "m1", "logits"}
    order = ["input", "layer 0 heads", "layer 0 MLP", "layer 1 heads", "layer 1 MLP", "logits"]
    assert sorted(heights, key=heights.get) == order  # type: ignore[arg-type]
    for name, row in {"input": "input", "a0.h1": order[1], "m0": order[2], "m1": order[4], "logits": "logits"}.items():
        assert abs(places[name][1] - heights[row]) <= 6  # above the letters of its inputs
    assert places["m0"][0] == places["m1"][0] > max(places[name][0] for name in ("a0.h1", "a1.h0", "input"))


def test_heads_are_in_order_and_apart() -> None:
    heads = [7, 2, 11, 0, 5]
    figure = draw(frame([(f"a0.h{head}", "logits", 1.0) for head in heads]))
    at = [boxes(figure)[f"a0.h{head}"][0] for head in sorted(heads)]
    (nodes,) = (t for t in figure.data if t.name == "nodes")
    width = np.nanmax(nodes.x[:5]) - np.nanmin(nodes.x[:5])
    assert (np.diff(at) > width).all() and len({boxes(figure)[f"a0.h{head}"][1] for head in heads}) == 1


def test_every_edge_is_drawn_once_from_writer_to_reader() -> None:
    figure = draw(frame())
    lines, places, heights = drawn(figure), boxes(figure), rows(figure)
    names = [_escaped(edge) for edge in EDGES]
    assert sorted(lines) == sorted(names) and len([t for t in figure.data if t.legendgroup]) == len(EDGES) + len(
        {t.legendgroup for t in lines.values()}
    )
    for name, (writer, reader, score) in zip(names, EDGES, strict=True):
        line, head = lines[name], reader.partition("<")[0]
        assert line.x[0] == places[writer][0] and abs(line.x[-1] - places[head][0]) < 31
        assert line.y[0] < line.y[-1] and (np.diff(line.y) > 0).all()
        assert min(abs(line.y[0] - 15 - y) for y in heights.values()) < 1e-6
        assert f"{score:.4g} logits" in line.hovertemplate and name in line.hovertemplate
    q, k, v = (next(n.x for n in figure.layout.annotations if n.text == letter) for letter in "qkv")
    assert lines[names[0]].x[-1] == q and lines[names[1]].x[-1] == k and lines[names[2]].x[-1] == v


def test_signs_are_coloured_and_magnitudes_widened() -> None:
    lines = drawn(draw(frame()))
    for (writer, reader, score), line in zip(EDGES, (lines[n] for n in map(_escaped, EDGES)), strict=True):
        kind = reader.partition("<")[2][:1] or reader.rstrip("0123456789").replace("m", "mlp")
        assert line.line.color == COLOURS["positive" if score > 0 else "negative"]
        assert line.line.dash == KINDS[kind], (writer, reader)
    widths = [lines[_escaped(edge)].line.width for edge in sorted(EDGES, key=lambda edge: abs(edge[2]))]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    plain = drawn(draw(frame().drop(columns="score")))
    assert {line.line.color for line in plain.values()} == {COLOURS[""]}


def test_legend_switches_signs_and_kinds() -> None:
    figure = draw(frame())
    entries = {t.name: t.legendgroup for t in figure.data if t.showlegend}
    expected = ["q, positive", "v, positive", "mlp, positive", "logits, positive"]
    assert list(entries) == [*expected, "k, negative", "mlp, negative", "logits, negative"]
    assert set(entries.values()) == {t.legendgroup for t in drawn(figure).values()}


def test_what_is_left_out_is_said() -> None:
    figure = draw(frame(), max_edges=3)
    strongest = [edge for edge in EDGES if abs(edge[2]) >= 2]
    assert sorted(drawn(figure)) == sorted(map(_escaped, strongest))
    (note,) = (n.text for n in figure.layout.annotations if n.xref == "paper")
    assert note == "the 3 strongest of 7 edges; 4 are not drawn; the widest: 4 logits"
    (note,) = (n.text for n in draw(frame()).layout.annotations if n.xref == "paper")
    assert note == "7 edges; the widest: 4 logits"


def test_shared_keys_and_values_have_boxes_of_their_own() -> None:
    edges = [("input", "a0.h1<k>", 1.0), ("input", "a0.h2<q>", 1.0), ("a0.h2", "logits", 1.0), ("a0.h0", "m0", 1.0)]
    figure = draw(frame(edges), group=2)
    heights, places = rows(figure), boxes(figure)
    assert heights["input"] < heights["layer 0 keys, values"] < heights["layer 0 heads"] < heights["logits"]
    (joins,) = (
        t for t in figure.data if t.name == "shared"
    )  # key-value head 1 is of heads 2 and 3, and 3 is not drawn
    assert list(joins.x[:2]) == [places["a0.kv1"][0], places["a0.h2"][0]] and len(joins.x) == 3


def test_parallel_blocks_are_one_row() -> None:
    figure = draw(frame(EDGES), parallel=True)
    assert sorted(rows(figure), key=rows(figure).get) == [  # type: ignore[arg-type]
        "input", "layer 0 heads, MLP", "layer 1 heads, MLP", "logits",
    ]  # fmt: skip


def test_long_edges_go_round_boxes() -> None:
    """A straight line from the first head to the logits would pass behind the second."""
    figure = draw(frame([("a0.h0", "logits", 1.0), ("a0.h0", "a1.h0<q>", 1.0), ("a1.h0", "logits", 1.0)]))
    line, (x, y) = drawn(figure)["a0.h0-&gt;logits"], boxes(figure)["a1.h0"]
    assert not ((abs(line.x - x) < 30) & (abs(line.y - y) < 15)).any()
    low, high = figure.layout.xaxis.range
    assert low <= line.x.min() and line.x.max() <= high


def test_both_renderers_draw_it() -> None:
    figure = draw(frame())
    data = plotting.png_bytes(figure, renderer="matplotlib", scale=1)
    assert data.startswith(b"\x89PNG")


def test_refusals() -> None:
    with pytest.raises(ValueError, match="nothing to draw: the circuit has no edges"):
        draw(frame([]))
    with pytest.raises(ValueError, match="no scores that say which to draw"):
        draw(frame().drop(columns="score"), max_edges=3)
    with pytest.raises(ValueError, match=r"1 edges have no finite score, for instance input->m0"):
        draw(frame([("input", "m0", np.nan)]))
    with pytest.raises(ValueError, match="'mlp0' is no node"):
        draw(frame([("mlp0", "logits", 1.0)]))
    with pytest.raises(ValueError, match="'logits' reads the stream"):
        draw(frame([("logits", "m0", 1.0)]))
    with pytest.raises(ValueError, match=r"'a0.h1' writes to the stream"):
        draw(frame([("input", "a0.h1", 1.0)]))
    with pytest.raises(KeyError, match="no column 'reader'"):
        draw(frame().drop(columns="reader"))
    with pytest.raises(ValueError, match="max_edges=0"):
        draw(frame(), max_edges=0)
