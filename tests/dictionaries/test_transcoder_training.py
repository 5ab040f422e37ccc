"""Transcoders of a sparse MLP whose units are known; `experiments/bench/planted.py` has the full size (A13)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.planted import PlantedMLP, recovery
from interp.dictionaries.training import train_many
from interp.dictionaries.training_config import TrainingConfig

MLP = PlantedMLP(width=24, n_units=32, density=0.05)
WITH_LINEAR = PlantedMLP(width=24, n_units=32, density=0.05, linear=1.0)


def trained(source: PlantedMLP, *kinds: dict[str, Any]) -> list[Dictionary]:
    base = {"n_latents": 32, "hook": "in", "target_hook": "out", "architecture": "batch_topk", "k": 2}
    steps: dict[str, Any] = {"n_steps": 700, "batch_size": 256, "learning_rate": 3e-3}
    return train_many([TrainingConfig({**base, **kind}, **steps) for kind in kinds], source)


def test_the_mlp_is_what_it_says() -> None:
    x, y, on = WITH_LINEAR.sample(20_000)
    by_hand = torch.stack([(x @ w - WITH_LINEAR.threshold).clamp(min=0) for w in WITH_LINEAR.W_in.T], 1)
    assert torch.allclose(by_hand, on, atol=1e-5)
    expected = by_hand @ WITH_LINEAR.W_out + x @ WITH_LINEAR.linear_map
    assert torch.allclose(y, expected, atol=1e-4)
    assert float((on > 0).float().mean()) == pytest.approx(0.05, abs=0.003)
    assert torch.allclose(WITH_LINEAR.W_in.norm(dim=0), torch.ones(32)) and WITH_LINEAR.W_in.shape == (24, 32)
    assert float((x @ WITH_LINEAR.linear_map).square().mean()) == pytest.approx(1.0, rel=0.15)
    a, b = (next(MLP.batches(6, seed=1, start=start)) for start in (2, 2))
    assert torch.equal(a["in"], b["in"]) and torch.equal(a["out"], b["out"])
    assert not torch.equal(a["in"], next(MLP.batches(6, seed=2, start=2))["in"])
    with pytest.raises(ValueError, match="density=0.0"):
        PlantedMLP(density=0.0)


def test_a_transcoder_finds_the_units() -> None:
    (found,) = trained(MLP, {})
    written, read = recovery(found.W_dec, MLP.W_out), recovery(found.W_enc.T, MLP.W_in.T)
    assert written["mmcs"] > 0.9 and read["mmcs"] > 0.9, (written, read)  # short training; chance is about 0.45
