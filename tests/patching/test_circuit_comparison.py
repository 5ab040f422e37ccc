"""Stability across resamples and agreement with a known circuit, by brute force."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from interp import results
from interp.patching import Circuit, CircuitStability, UnstableCircuit, circuit_auroc, circuit_stability, select_circuit
from tests.patching.test_circuits import GROUPED, PLAIN, random_scores, scores


def test_scores_that_agree_are_stable() -> None:
    found = random_scores(PLAIN, n=1)
    same = scores(PLAIN, torch.tensor(found.values.values).expand(-1, -1, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stable = circuit_stability(same, [5, 20], n_resamples=10)
    assert np.allclose(stable.values.values, 1)
    assert stable.core()[5] == select_circuit(found, 5)


@pytest.mark.parametrize("how", ["top", "greedy"])
def test_overlap_by_brute_force(how: Any) -> None:
    found = random_scores(GROUPED, n=4, seed=3)
    with pytest.warns(UnstableCircuit, match=r"overlap by .* at 12 edges .* below 0.8"):
        stability = circuit_stability(found, [12], how=how, n_resamples=15, seed=4, prune=False)
    draws = np.random.default_rng(4).multinomial(4, np.full(4, 1 / 4), size=15)
    circuits = [select_circuit(found.values.dot(_weights(w)), 12, how=how, prune=False, graph=GROUPED) for w in draws]
    overlaps = [a.jaccard(b) for a, b in itertools.combinations(circuits, 2)]
    expected = [np.mean(overlaps), *np.quantile(overlaps, [0.025, 0.975])]
    assert np.allclose(stability.values.sel(size=12).values, expected, atol=1e-6)
    often = np.mean([circuit.mask.numpy() for circuit in circuits], axis=0)
    assert np.allclose(stability.frequency.sel(size=12).values, often)
    assert stability.core(0.5)[12].mask.numpy().tolist() == (often >= 0.5).tolist()


def _weights(counts: np.ndarray) -> Any:
    return xr.DataArray((counts / counts.sum()).astype(np.float32), dims="example")


@pytest.mark.filterwarnings("ignore::interp.patching.UnstableCircuit")
def test_stability_is_saved_drawn_and_checked(tmp_path: Any) -> None:
    found = random_scores(PLAIN, n=4)
    stability = circuit_stability(found, [0.1, 0.5], n_resamples=5)
    again = results.load(stability.save(tmp_path / "stability.nc"))
    assert isinstance(again, CircuitStability)
    assert again.core(0.4) == stability.core(0.4)
    assert stability.plot().layout.yaxis.title.text == "Jaccard overlap"
    with pytest.raises(ValueError, match="at least 2 examples"):
        circuit_stability(random_scores(PLAIN, n=1), [5])
    with pytest.raises(ValueError, match="none twice"):
        circuit_stability(found, [5, 5])


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_auroc_is_the_share_of_pairs_ranked_right(absolute: bool, direction: str) -> None:
    truth = Circuit.of(PLAIN, PLAIN.edges()[::7])
    values = torch.randn(*PLAIN.exists.shape, 5, generator=torch.Generator().manual_seed(1)).round(decimals=0)  # ties
    found = scores(PLAIN, values, direction)
    mean = found.mean().values * (-1 if direction == "noise" else 1)
    mean = np.abs(mean) if absolute else mean
    inside, outside = mean[truth.mask.numpy()], mean[truth.complement().mask.numpy()]
    expected = np.mean((inside[:, None] > outside) + 0.5 * (inside[:, None] == outside))
    area = circuit_auroc(found, truth, absolute=absolute, n_resamples=200)
    assert float(area.estimate) == pytest.approx(expected)
    assert area.low < area.high
    assert 0 <= area.low <= 1


def test_auroc_of_circuits_counts_missing_edges_as_misses() -> None:
    """Half of the true edges at no false one, and nothing more until everything: the rest is a straight line."""
    truth = Circuit.of(PLAIN, ["input->m0", "m0->logits"])
    half = Circuit.of(PLAIN, ["input->m0"])
    assert float(circuit_auroc([half], truth).estimate) == pytest.approx(0.75)
    assert float(circuit_auroc([truth], truth).estimate) == 1
    assert float(circuit_auroc([truth.complement()], truth).estimate) == 0
    scored = random_scores(PLAIN, n=3)
    nested = [select_circuit(scored, n, prune=False) for n in range(PLAIN.n_edges + 1)]
    assert float(circuit_auroc(nested, truth).estimate) == pytest.approx(float(circuit_auroc(scored, truth).estimate))


def test_auroc_needs_a_circuit_to_compare_with() -> None:
    found = random_scores(PLAIN)
    for truth in (Circuit.of(PLAIN), Circuit.full(PLAIN)):
        with pytest.raises(ValueError, match="ROC curve needs some in and some out"):
            circuit_auroc(found, truth)
    with pytest.raises(ValueError, match="the known circuit is of"):
        circuit_auroc(found, Circuit.of(GROUPED, ["input->m0"]))
    with pytest.raises(ValueError, match="the known circuit is of"):
        circuit_auroc([Circuit.of(GROUPED, ["input->m0"])], Circuit.of(PLAIN, ["input->m0"]))
