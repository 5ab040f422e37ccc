"""Drawings of feature circuits: what is drawn, where, in which colour and width, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from interp.plotting import feature_graph, png_bytes
from interp.plotting.circuits import COLOURS
from interp.plotting.feature_circuits import FILLS


def nodes(**columns: Any) -> pd.DataFrame:
    """Two rows of features at two positions, strongest first."""
    frame = pd.DataFrame(
        {
            "node": ["1.mlp_out/7@3", "0.attn_out/2@1", "0.attn_out/error@1", "0.attn_out/5@3"],
            "dictionary": ["1.mlp_out", "0.attn_out", "0.attn_out", "0.attn_out"],
            "row": [3, 0, 0, 0],
            "latent": [7, 2, -1, 5],
            "score": [-2.0, 1.0, -0.5, 0.25],
            "label": ["plural subject of the sentence", "", "x", "<b>"],
            "pos": ["3 verb", "1 dogs", "1 dogs", "3 verb"],
            "column": [3, 1, 1, 3],
        }
    )
    return frame.assign(**columns)


EDGES = pd.DataFrame(
    {
        "upstream": ["0.attn_out/2@1", "0.attn_out/error@1", "1.mlp_out/7@3", "0.attn_out/9@1"],
        "downstream": ["1.mlp_out/7@3", "1.mlp_out/7@3", "metric", "1.mlp_out/7@3"],
        "weight": [0.5, -0.25, -2.0, 9.0],
    }
)


def texts(figure: Any) -> list[str]:
    return [note.text for note in figure.layout.annotations]


def edges_of(figure: Any) -> dict[str, Any]:
    return {trace.name: trace for trace in figure.data if "->" in (trace.name or "").replace("&gt;", ">")}


def test_nodes_lie_in_rows_and_columns() -> None:
    figure = feature_graph(nodes(), EDGES, title="A circuit", unit="logits")
    (dots,) = [trace for trace in figure.data if trace.name == "nodes"]
    x, y = np.array(dots.x), np.array(dots.y)
    assert y[0] > y[1] == y[2] == y[3]  # two rows in use, the later above
    assert x[2] < x[1] < x[3] and x[0] == x[3]  # the error first; one column for each position
    rows = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    assert rows[y[0]] == "1.mlp_out" and rows[y[1]] == "0.attn_out" and len(rows) == 3
    assert list(figure.layout.xaxis.ticktext) == ["1 dogs", "3 verb"]
    assert figure.layout.xaxis.title.text == "position" and figure.layout.title.text == "A circuit"
    shown = texts(figure)
    assert {"7", "2", "5", "error", "metric"} <= set(shown)
    assert any(text.startswith("plural sub") and text.endswith("…") for text in shown) and "&lt;b&gt;" in shown
    assert "x" not in shown and "x" in dots.text[2]  # a triangle has no room for a label; hovering has
    assert "plural subject of the sentence" in dots.text[0] and "-2 logits" in dots.text[0]


def test_shapes_and_colours_say_kind_and_sign() -> None:
    figure = feature_graph(nodes(), EDGES, title="")
    shapes = [trace for trace in figure.data if trace.fill == "toself" and trace.name != "metric"]
    found = {(trace.name, trace.fillcolor): np.isnan(np.array(trace.x, dtype=float)).sum() for trace in shapes}
    assert found == {
        ("latents", FILLS["positive"]): 2,
        ("latents", FILLS["negative"]): 1,
        ("errors", FILLS["negative"]): 1,
    }
    corners = [len(trace.x) for trace in shapes if trace.name == "errors"]
    assert corners == [5]  # a triangle, closed, and a gap
    drawn = edges_of(figure)
    assert len(drawn) == 3  # the one from a node that is not drawn is left out
    colours = {name: trace.line.color for name, trace in drawn.items()}
    widths = {name: trace.line.width for name, trace in drawn.items()}
    up = [name for name in drawn if "attn_out/2" in name][0]
    assert colours[up] == COLOURS["positive"] and sorted(widths.values())[-1] == pytest.approx(6)
    assert widths[up] == pytest.approx(1 + 5 * 0.5 / 2)
    names = {trace.name for trace in figure.data if trace.showlegend}
    assert names == {"latent", "error", "score positive", "score negative", "edge positive", "edge negative"}
    assert any("3 edges" not in text and "the 3 strongest of 4 edges; the widest: 2" in text for text in texts(figure))


def test_the_strongest_are_drawn() -> None:
    figure = feature_graph(nodes(), EDGES, title="", max_nodes=2, max_edges=1)
    (dots,) = [trace for trace in figure.data if trace.name == "nodes"]
    assert len(dots.x) == 2 and list(edges_of(figure)) == ["1.mlp_out/7@3-&gt;metric"]
    assert any("the 2 strongest of 4 nodes" in text for text in texts(figure))
    alone = feature_graph(nodes().drop(columns=["pos", "column", "score", "label"]), title="")
    assert not edges_of(alone) and "metric" not in texts(alone) and not alone.layout.xaxis.showticklabels
    assert {trace.fillcolor for trace in alone.data if trace.fill} == {FILLS[""]}
    unknown = feature_graph(nodes(score=[np.nan, 1, 1, 1]), title="")
    assert {trace.fillcolor for trace in unknown.data if trace.fill} == {FILLS[""]}


def test_thirty_nodes_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "row": rng.integers(0, 8, 30),
            "latent": np.arange(30),
            "column": rng.integers(0, 5, 30),
            "score": rng.normal(size=30),
        }
    )
    frame["dictionary"] = [f"{row}.x" for row in frame["row"]]
    frame["pos"] = frame["column"].astype(str)
    frame["node"] = [f"{d}/{i}@{p}" for d, i, p in zip(frame["dictionary"], frame["latent"], frame["pos"], strict=True)]
    figure = feature_graph(frame, title="")
    (dots,) = [trace for trace in figure.data if trace.name == "nodes"]
    x, y = np.array(dots.x), np.array(dots.y)
    boxes = [trace for trace in figure.data if trace.name == "latents"]
    wide = max(float(np.nanmax(np.diff(np.array(trace.x, dtype=float)))) for trace in boxes)
    for i in range(30):
        for j in range(i):
            assert y[i] != y[j] or abs(x[i] - x[j]) >= wide + 4
    assert figure.layout.width < 1900 and png_bytes(figure)[:4] == b"\x89PNG"


@pytest.mark.usefixtures("unchecked")
def test_what_is_refused() -> None:
    with pytest.raises(KeyError, match="no column 'row'"):
        feature_graph(nodes().drop(columns="row"), title="")
    with pytest.raises(KeyError, match="no column 'weight'"):
        feature_graph(nodes(), EDGES.drop(columns="weight"), title="")
    with pytest.raises(ValueError, match="nothing to draw"):
        feature_graph(nodes().iloc[:0], title="")
    with pytest.raises(ValueError, match="two nodes are called 'a'"):
        feature_graph(nodes(node=["a", "a", "b", "c"]), title="")
    with pytest.raises(ValueError, match="4 nodes are more than max_nodes=3"):
        feature_graph(nodes().drop(columns="score"), title="", max_nodes=3)
