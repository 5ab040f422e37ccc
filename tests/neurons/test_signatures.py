"""Planted classes, an independent formula, invariances, and every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from helpers import D_MLP, D_MODEL, FAMILIES, N_LAYERS, fresh_bridge, tiny_bridge

from interp.neurons._sides import side_vectors
from interp.neurons.signatures import IO_CLASSES, IOSignature, io_signature

GATED = ("llama", "gemma2")


def _plant(bridge, layer: int, rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """Write (in, gate, out) vectors into the first neurons; the weights are views of the model's own."""
    block = bridge.blocks[layer].mlp
    with torch.no_grad():
        for i, (read, gate, write) in enumerate(rows):
            block.W_in[:, i] = read
            block.W_gate[:, i] = gate
            block.W_out[i] = write


@pytest.mark.parametrize("family", FAMILIES)
def test_cosines_are_those_of_the_weights(family):
    bridge = tiny_bridge(family)
    found = io_signature(bridge)
    sides = {"in": 0, "out": 1} if family not in GATED else {"in": 0, "gate": 1, "out": 2}
    assert found.values.sizes == {"pair": len(sides) if len(sides) == 3 else 1, "layer": N_LAYERS, "neuron": D_MLP}
    for pair in found.values["pair"].values:
        a, b = str(pair).split(",")
        for layer in range(N_LAYERS):
            u, v = side_vectors(bridge, layer, a), side_vectors(bridge, layer, b)
            expected = torch.nn.functional.cosine_similarity(u, v, dim=1)
            np.testing.assert_allclose(found.values.sel(pair=pair, layer=layer), expected, atol=1e-5)


@pytest.mark.parametrize("family", GATED)
def test_planted_neurons_get_their_class(family):
    bridge = fresh_bridge(family)
    e = torch.eye(D_MODEL)
    a, b, c = e[0], e[1], e[2]
    near = 0.8 * a + 0.6 * b
    planted = {
        "enrichment": (a, a, a),
        "conditional enrichment": (a, b, a),
        "proportional change": (b, -a, a),
        "orthogonal output": (a, a, b),
        "conditional depletion": (a, b, -a),
        "depletion": (a, a, -a),
    }
    # in and out negated together is the same neuron; the gate's sign is free within a class
    twins = {name: (-read, gate, -write) for name, (read, gate, write) in planted.items()}
    atypical = [(a, near, near), (c, c, a)]
    _plant(bridge, 1, [*planted.values(), *twins.values(), *atypical])
    found = io_signature(bridge, fold=False)
    table = found.table().query("layer == 1").set_index("neuron")
    assert table.loc[:11, "io_class"].tolist() == [*planted, *twins]
    assert table.loc[:11, "typical"].all()
    assert table.loc[12, "io_class"] == "enrichment"
    counts = found.counts()
    assert counts.groupby("layer")["neurons"].sum().tolist() == [D_MLP] * N_LAYERS
    assert set(counts["io_class"]) == set(IO_CLASSES)


def test_atypical_is_when_the_third_cosine_disagrees():
    bridge = fresh_bridge("llama")
    e = torch.eye(D_MODEL)
    # in and gate are both 0.7 from out, on opposite sides of it: their own cosine is about 0
    left, right = 0.7 * e[0] + 0.714 * e[1], 0.7 * e[0] - 0.714 * e[1]
    _plant(bridge, 0, [(left, right, e[0]), (left, left, e[0])])
    table = io_signature(bridge, fold=False).table()
    assert table["io_class"].iloc[:2].tolist() == ["enrichment", "enrichment"]
    assert table["typical"].iloc[:2].tolist() == [False, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_changes_the_cosines_where_gains_matter(family):
    bridge = tiny_bridge(family)
    raw, folded = io_signature(bridge, fold=False), io_signature(bridge)
    assert float(np.abs(raw.values - folded.values).max()) > 0.01


def test_random_weights_lie_within_the_bounds_of_mismatched_ones():
    bridge = tiny_bridge("llama")
    found = io_signature(bridge)
    spread = found.beyond_chance()
    assert (spread[["below", "above"]].mean() < 0.07).all()
    # the bounds themselves: those of a random cosine in D_MODEL dimensions, about +-2 / sqrt(d)
    assert np.abs(np.abs(found.bounds) - 1.96 / D_MODEL**0.5).max() < 0.08
    assert found.table()["io_class"].eq("orthogonal output").mean() > 0.95
    loose = io_signature(bridge, threshold="mismatched")
    assert loose.table()["io_class"].eq("orthogonal output").mean() < 0.97
    np.testing.assert_allclose(loose.threshold.max(), np.abs(found.bounds).max())


def test_every_mismatched_pair_counts_in_a_small_layer():
    bridge = tiny_bridge("llama")
    unit = torch.nn.functional.normalize
    a, b = (unit(side_vectors(bridge, 2, side), dim=1) for side in ("in", "out"))
    cosines = (a @ b.T)[~torch.eye(D_MLP, dtype=torch.bool)].double().numpy()
    expected = np.quantile(cosines, [0.025, 0.975])
    np.testing.assert_allclose(io_signature(bridge).bounds.sel(pair="in,out", layer=2), expected, atol=1e-5)


def test_result_round_trip_subset_and_figures(tmp_path):
    found = io_signature(tiny_bridge("llama"), layers=[2])
    assert found.values["layer"].values.tolist() == [2]
    loaded = IOSignature.load(found.save(tmp_path / "io.nc"))
    xr.testing.assert_identical(loaded.io_class, found.io_class)
    xr.testing.assert_identical(loaded.typical, found.typical)
    assert loaded.provenance["threshold"] == 0.5
    assert found.plot().data
    assert io_signature(tiny_bridge("gpt2")).plot().data
    assert list(io_signature(tiny_bridge("gpt2")).values["pair"].values) == ["in,out"]


def test_errors(unchecked):
    bridge = tiny_bridge("llama")
    with pytest.raises(ValueError, match="threshold must lie between 0 and 1, got 5.0"):
        io_signature(bridge, threshold=5.0)
    with pytest.raises(ValueError, match="a number or 'mismatched', got 'random'"):
        io_signature(bridge, threshold="random")  # pyright: ignore
    with pytest.raises(ValueError, match=r"layers are \[7\].*layers 0 to 2"):
        io_signature(bridge, layers=[7])
