"""Figures of every kind, made from small arrays with known values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import xarray as xr

from interp import plotting

TOKENS = ["<bos>", " Mary", " and", " John", " &amp;", " Mary", " $5$", "\n"]


@pytest.fixture(autouse=True)
def _global_template_is_left_alone() -> Iterator[None]:
    import plotly.io as pio

    before = pio.templates.default
    pio.templates.default = "ggplot2"  # a loud one, which must not leak into our figures either
    yield
    try:
        assert pio.templates.default == "ggplot2"
    finally:
        pio.templates.default = before


@pytest.fixture(scope="session")
def effects() -> xr.DataArray:
    """Layer x position with one unmeasured cell; the value at [l, p] is (-1)^p (10 l + p) / 10."""
    layer, pos = np.meshgrid(range(5), range(len(TOKENS)), indexing="ij")
    values = ((-1.0) ** pos * (10 * layer + pos) / 10).astype(np.float32)
    values[1, 2] = np.nan
    return xr.DataArray(values, dims=("layer", "pos"), coords={"layer": range(5), "token": ("pos", TOKENS)})


@pytest.fixture(scope="session")
def table() -> pd.DataFrame:
    """Two lines over six layers with intervals, one value missing."""
    rows = []
    for name, slope in (("denoise", 1.0), ("random head", -0.5)):
        for layer in range(6):
            value = float("nan") if (name, layer) == ("denoise", 3) else slope * layer
            rows.append({"layer": layer, "value": value, "low": value - 0.25, "high": value + 0.5, "direction": name})
    return pd.DataFrame(rows)


@pytest.fixture(scope="session")
def figures(effects: xr.DataArray, table: pd.DataFrame) -> dict[str, go.Figure]:
    """One figure of every kind."""
    heads = xr.DataArray(effects.values[:, :4], dims=("layer", "head"))
    interval = ("low", "high")
    words = {"title": "A title", "unit": "logits"}
    attention = plotting.attention_view(np.tril(np.ones((3, 4, 4))) / 4, list("abcd"))
    return {
        "heatmap": plotting.heatmap(abs(effects), signed=False, **words),
        "layer_position": plotting.layer_position(effects, **words),
        "layer_head": plotting.layer_head(heads, label_top=2, **words),
        "heatmaps": plotting.heatmaps({"resid_pre": effects, "attn_out": 2 * effects, "z": heads}, **words),
        "lines": plotting.lines(table, x="layer", group="direction", interval=interval, reference=1, **words),
        "log lines": plotting.lines(
            pd.DataFrame({"n": [1, 10, 1000], "value": [1.0, 2.0, 3.0]}),
            x="n",
            log_x=True,
            log_y=True,
            reference=2,
            **words,
        ),
        "bars": plotting.bars(table, x="layer", group="direction", interval=interval, **words),
        "horizontal bars": plotting.bars(
            table[:3], x="layer", interval=interval, horizontal=True, reference=0.5, **words
        ),
        "strip": plotting.strip(
            {"clean": [1.0, 2.0, 3.0], "corrupted": [0.0, np.nan]}, interval=[[1, 3], [-1, 1]], **words
        ),
        "scatter": plotting.scatter(
            effects.to_dataframe(name="effect").reset_index(), x="layer", y="effect", colour="pos", title="A title"
        ),
        "attention": attention.figure(),
        "circuit": plotting.circuit_graph(
            pd.DataFrame({"writer": ["input", "a0.h0"], "reader": ["a0.h0<q>", "logits"], "score": [1.0, -2.0]}),
            **words,
        ),
    }
