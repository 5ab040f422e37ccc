"""Mode "official" against values that the released code computed; how they were made is in data/snmf_official.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from interp.dictionaries import SNMF

ALWAYS = -1e300  # every iteration counts as an improvement, so that the last pair is returned
INITS = ("random", "svd", "kmeans")


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "data" / "snmf_official.safetensors")


def official(start: Tensor | str, n_iter: int, n_components: int = 5, sparsity: float = 0.1, **options: float) -> SNMF:
    settings = {"tol": ALWAYS, "seed": 3} | options
    return SNMF(n_components, init=start, sparsity=sparsity, max_iter=n_iter, mode="official", **settings)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("n_iter", [1, 50])
def test_factors_are_those_of_the_released_code(values: dict[str, Tensor], init: str, n_iter: int) -> None:
    found = official(values[f"{init}.start"], n_iter).fit(values["A"])
    assert found.n_iter_ == n_iter
    assert relative(found.components_, values[f"{init}.components_{n_iter}"]) < 1e-9
    assert relative(found.activations_, values[f"{init}.activations_{n_iter}"]) < 1e-9
    assert found.loss_ == pytest.approx(float(values[f"{init}.losses"][n_iter - 1]), rel=1e-9)
    assert found.history_ == pytest.approx(values[f"{init}.losses"][:n_iter].tolist(), rel=1e-9)


@pytest.mark.parametrize("init", INITS)
def test_the_same_seed_gives_the_same_start(values: dict[str, Tensor], init: str) -> None:
    found = official(init, 1).fit(values["A"])
    assert relative(found.components_, values[f"{init}.components_1"]) < 1e-9


@pytest.mark.parametrize("init", INITS)
def test_losses_in_single_precision(values: dict[str, Tensor], init: str) -> None:
    found = official(values[f"{init}.start"].float(), 50).fit(values["A"].float())
    assert found.components_.dtype == torch.float32
    assert found.history_ == pytest.approx(values[f"{init}.losses"].tolist(), rel=1e-3)


def test_equal_magnitudes_are_all_kept_there_and_counted_here(values: dict[str, Tensor]) -> None:
    start = values["ties.start"]
    there = official(start, 1, n_components=4, sparsity=0.25).fit(values["ties.A"])
    assert relative(there.components_, values["ties.components_1"]) < 1e-9
    assert int((there.components_ != 0).sum(1).max()) > 2
    here = SNMF(4, init=start, sparsity=0.25, max_iter=1, repair=False).fit(values["ties.A"])
    assert int((here.components_ != 0).sum(1).max()) == 2


def test_the_best_pair_is_returned_and_patience_counts(values: dict[str, Tensor]) -> None:
    losses = values["svd.losses"]
    assert int(losses.argmin()) < 49  # it rises again, so that best and last differ
    found = official(values["svd.start"], 50, tol=0.0).fit(values["A"])
    assert found.best_iter_ == int(losses.argmin()) and found.loss_ == pytest.approx(float(losses.min()), rel=1e-9)
    short = official(values["svd.start"], 50, tol=1e9, patience=7).fit(values["A"])
    assert short.n_iter_ == 8  # the first improves on nothing at all, seven do not improve by enough
