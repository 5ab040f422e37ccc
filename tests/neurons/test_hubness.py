"""Hub tokens and the spread of labels, on label lists whose answer is known."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
import xarray as xr
from helpers import tiny_bridge

from interp.neurons.decoding import decode
from interp.neurons.hubs import Hubness, hubness
from interp.neurons.nulls import rotation_null


def _top(vectors: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return (vectors @ tokens.T).argmax(1)


def test_counts_shares_and_entropy_by_hand():
    labels = np.array([[3, 3, 3], [3, 0, 1]])  # six neurons of two layers
    row = hubness(labels, d_vocab=200, share=0.01).table().iloc[0]
    assert (row["neurons"], row["labels"]) == (6, 3)
    assert row["top_share"] == pytest.approx(5 / 6)  # 1 % of 200 tokens is 2: four neurons and one
    assert row["entropy"] == pytest.approx(-(4 / 6 * np.log2(4 / 6) + 2 / 6 * np.log2(1 / 6)))


def test_labels_drawn_evenly_have_no_hubs_and_match_their_baseline():
    labels = np.random.default_rng(0).integers(0, 500, 3000)
    found = hubness(labels, d_vocab=500)
    row = found.table().iloc[0]
    assert row["hubs"] == 0
    assert row["top_share"] == pytest.approx(row["top_share_even"], rel=0.1)
    assert row["entropy"] == pytest.approx(row["entropy_even"], abs=0.02)
    assert row["entropy_even"] < np.log2(500) - 0.05  # few neurons: even labels are not at the maximum either
    assert list(found.hubs().columns) == ["side", "token", "string", "neurons", "share"]


def test_a_long_token_direction_is_a_hub_and_the_rotation_says_why():
    # Token 5 is ten times as long as the others, so it wins dot products; token 9 is what 60 neurons read.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.nn.functional.normalize(torch.randn(300, 24, generator=generator), dim=1)
    vectors = torch.randn(900, 24, generator=generator)
    vectors[:60] = 4 * tokens[9] + 0.3 * vectors[:60]
    tokens[5] *= 10
    labels, null = _top(vectors, tokens), _top(rotation_null(vectors, 1), tokens)
    assert {5, 9} <= set(hubness(labels, 300).hubs()["token"])
    against_null = hubness(labels, 300, null_labels=null).hubs()
    assert set(against_null["token"]) == {9}
    assert against_null["neurons"].iloc[0] >= 60
    unit = torch.nn.functional.normalize(tokens, dim=1)
    assert 5 not in set(hubness(_top(vectors, unit), 300).hubs()["token"])


def _atlas() -> types.SimpleNamespace:
    ids = np.array([[[1, 1, 1, 1], [1, 1, 1, -1]], [[0, 1, 2, 3], [4, 5, 6, 7]]], dtype=np.int32)
    dims = ("side", "layer", "neuron")
    return types.SimpleNamespace(
        label_ids=xr.DataArray(ids, dims=dims, coords={"side": ["in", "out"], "layer": [0, 1], "neuron": range(4)}),
        token_strings=[f"w{i}" for i in range(50)],
        provenance={"model": "tiny"},
    )


def test_an_atlas_gives_a_row_per_side_and_neurons_not_decoded_are_left_out(tmp_path):
    found = hubness(_atlas())
    table = found.table().set_index("side")
    assert table.loc["in", "neurons"] == 7
    assert table.loc["in", "top_share"] == 1
    assert table.loc["out", "neurons"] == 8
    assert table.loc["out", "hubs"] == 0
    assert found.hubs("in")[["token", "string", "neurons"]].values.tolist() == [[1, "w1", 7]]
    assert found.hubs("out").empty
    assert found.provenance["model"] == "tiny"
    loaded = Hubness.load(found.save(tmp_path / "hubs.nc"))
    xr.testing.assert_identical(loaded.is_hub, found.is_hub)
    assert loaded.table().equals(found.table())
    assert "in" in {trace.name for trace in found.plot().data}


def test_a_real_atlas():
    bridge = tiny_bridge("llama")
    atlas = decode(bridge, weights=["in", "out"], null=None)
    table = hubness(atlas).table().set_index("side")
    for side in ("in", "out"):
        labels = atlas.label_ids.sel(side=side).values.ravel()
        counts = np.bincount(labels, minlength=60)
        assert table.loc[side, "labels"] == (counts > 0).sum()
        assert table.loc[side, "top_share"] == pytest.approx(counts.max() / len(labels))


def test_errors():
    with pytest.raises(ValueError, match="need d_vocab"):
        hubness(np.array([1, 2]))
    with pytest.raises(ValueError, match="label 60 is not below d_vocab 50"):
        hubness(np.array([60]), 50)
    with pytest.raises(ValueError, match="every id is negative"):
        hubness(np.array([-1, -1]), 50)
    with pytest.raises(ValueError, match="labels are float64"):
        hubness(np.array([1.0]), 50)
    with pytest.raises(ValueError, match="share must lie between 0 and 1, got 1.5"):
        hubness(np.array([1]), 50, share=1.5)
    with pytest.raises(ValueError, match="no side 'gate'"):
        hubness(_atlas()).hubs("gate")
