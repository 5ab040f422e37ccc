"""Two processes under torchrun train what one trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.dictionaries import _files
from interp.dictionaries._parallel import ALONE, Peers, local_device, peers_for
from interp.dictionaries.allocation import Active, density_quotas, per_batch, per_latent
from interp.dictionaries.architectures import ARCHITECTURES
from interp.dictionaries.sources import TensorSource
from interp.dictionaries.training import train
from tests.dictionaries import parallel_cases
from tests.dictionaries.parallel_cases import CASES, LIVE, SINGLE, Cut, config, tensors, train_all

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the same runs by one process and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    with pytest.raises(KeyboardInterrupt):
        x = Cut(tensors(torch.float32))
        train(config("batch_topk", torch.float32, checkpoint_every=4), x, path=two / "begun_by_one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, parallel_cases.__file__, str(two)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-5000:]
    train_all(one)
    return one, two


def state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return _files.read_tensors(folder / "state.safetensors")


def compare(one: Path, two: Path, tolerance: float) -> None:
    (expected, record), (found, again) = state(one), state(two)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.allclose(value, found[name], rtol=0, atol=tolerance), name
    moved = expected["dictionary.W_dec"] - torch.zeros(())
    assert float(moved.abs().max()) > 0.01
    assert record["step"] == again["step"] and record["config"] == again["config"]
    for entry, other in zip(record["history"], again["history"], strict=True):
        assert entry.keys() == other.keys()
        for what, number in entry.items():
            assert other[what] == pytest.approx(number, rel=10 * tolerance, abs=10 * tolerance), what


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_trains(name: str, trained: tuple[Path, Path]) -> None:
    """Weights, thresholds, densities, Adam's moments, silent tokens and the curves, after 20 steps."""
    one, two = trained
    # thresholds of JumpReLU are float32 whatever the rest is
    compare(one / f"{name}_float64", two / f"{name}_float64", 1e-7 if "jumprelu" in name else 1e-10)
    if name in SINGLE:
        compare(one / f"{name}_float32", two / f"{name}_float32", 1e-5)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", LIVE)
def test_a_live_model_runs_on_each_process_s_share(name: str, trained: tuple[Path, Path]) -> None:
    one, two = trained
    compare(one / f"{name}_live", two / f"{name}_live", 1e-5)


@pytest.mark.dist
@pytest.mark.slow
def test_the_cases_exercise_what_they_name(trained: tuple[Path, Path]) -> None:
    """A statistic that never differs between the halves of a batch would not need to be shared."""
    one, _ = trained
    assert {settings["architecture"] for settings in CASES.values()} == set(ARCHITECTURES)
    histories = {name: state(one / f"{name}_float64")[1]["history"] for name in CASES}
    for name in ("topk", "topk_saelens", "batch_topk", "matryoshka", "mutual_choice"):
        assert any(entry.get("loss_aux", 0.0) > 0 for entry in histories[name]), name
    assert any(entry.get("loss_dead", 0.0) > 0 for entry in histories["jumprelu"])
    for name in ("relu_controlled", "gated", "jumprelu"):
        assert len({entry["coefficient"] for entry in histories[name]}) > 1, name
    plain = train(config("relu_resampled", torch.float64, resample_every=None), TensorSource(tensors(torch.float64)))
    assert not torch.allclose(plain.W_dec, state(one / "relu_resampled_float64")[0]["dictionary.W_dec"])


@pytest.mark.dist
@pytest.mark.slow
def test_the_first_process_writes_and_both_resume(trained: tuple[Path, Path]) -> None:
    _, two = trained
    reports = [json.loads((two / f"report_{rank}.json").read_text()) for rank in (0, 1)]
    assert reports[0]["written"] > 2 * len(CASES) and reports[1]["written"] == 0
    assert [report["peers"] for report in reports] == [1, 1]  # by itself again, once trained
    expected = state(two / "batch_topk_float32")[0]
    killed = state(two / "killed")[0]
    assert all(torch.equal(value, killed[name]) for name, value in expected.items())
    handed_over = state(two / "begun_by_one")[0]
    assert all(torch.allclose(value, handed_over[name], rtol=0, atol=1e-5) for name, value in expected.items())


@pytest.mark.dist
@pytest.mark.slow
def test_processes_that_do_not_agree_are_refused(trained: tuple[Path, Path]) -> None:
    _, two = trained
    for rank in (0, 1):
        refusals = json.loads((two / f"report_{rank}.json").read_text())["refusals"]
        assert "batch_size=25 cannot be shared equally by 2 processes" in refusals["odd"]
        assert (
            "different settings or data" in refusals["settings"] and "interp.dictionaries.sweep" in refusals["settings"]
        )
        assert "do all see the same disk?" in refusals["disk"]
        assert "RuntimeError: the 2 processes that torchrun started have different weights" in refusals["drift"]
    assert not (two / "drift").exists()


@dataclass(frozen=True)
class Simulated(Peers):
    """One of several processes in this one: what the others send was noted before."""

    sent: list[Tensor] = field(default_factory=list)

    def gathered(self, part: Tensor) -> Tensor:
        if len(self.sent) < self.size:
            self.sent.append(part)
            return part.expand(self.size, *part.shape)
        return torch.stack(self.sent)


def shares(size: int, work: Any) -> list[Active]:
    """What each of `size` processes finds."""
    sent: list[Tensor] = []
    for rank in range(size):
        work(Simulated(rank, size, sent))
    return [work(Simulated(rank, size, sent)) for rank in range(size)]


def joined(parts: list[Active], n: int) -> set[tuple[int, int]]:
    found = [(int(t) + i * n, int(h)) for i, part in enumerate(parts) for t, h in zip(*part, strict=True)]
    assert len(set(found)) == len(found)
    for part in parts:
        order = part.tokens * 1000 + part.latents
        assert bool((order.diff() > 0).all())
    return set(found)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("per_token", [0.1, 1, 2.5, 4])
def test_a_batch_s_budget_is_spent_as_one_process_spends_it(size: int, per_token: float) -> None:
    for seed in range(5):
        scores = torch.randn(6 * size, 4, generator=torch.Generator().manual_seed(seed))
        scores[:6] += 5.0 * (seed % 2)  # all of it may belong to the first process
        expected = per_batch(scores, int(per_token * len(scores)))
        halves = scores.split(6)
        parts = shares(size, lambda peers, halves=halves: peers.per_batch(halves[peers.rank], per_token))
        assert joined(parts, 6) == {(int(t), int(h)) for t, h in zip(*expected, strict=True)}


@pytest.mark.parametrize("size", [2, 3])
def test_every_latent_chooses_among_everyone_s_tokens(size: int) -> None:
    for seed in range(5):
        draws = torch.Generator().manual_seed(seed)
        scores = torch.randn(6 * size, 4, generator=draws)
        quotas = density_quotas(torch.rand(4, generator=draws, dtype=torch.float64), 9 * size, 6 * size)
        expected = per_latent(scores, quotas)
        given = (scores.split(6), quotas)
        parts = shares(size, lambda peers, given=given: peers.per_latent(given[0][peers.rank], given[1]))
        assert joined(parts, 6) == {(int(t), int(h)) for t, h in zip(*expected, strict=True)}


def test_ties_spend_the_budget_and_no_more() -> None:
    scores = torch.ones(6, 4)
    parts = shares(2, lambda peers: peers.per_batch(scores[peers.rank * 3 :][:3], 1.5))
    assert len(joined(parts, 3)) == 9
    quotas = torch.tensor([5, 1, 0, 3])
    parts = shares(2, lambda peers: peers.per_latent(scores[peers.rank * 3 :][:3], quotas))
    latents = torch.cat([part.latents for part in parts])
    assert torch.bincount(latents, minlength=4).tolist() == quotas.tolist()


def test_a_process_by_itself_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert peers_for("cpu", 7) is ALONE
    x = torch.randn(4, 3)
    assert ALONE.mean(x) is x and ALONE.sum(x) is x and ALONE.lowest(x) is x and ALONE.own(x) is x
    assert local_device("cuda") == "cuda" and local_device(None) is None


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_device("cuda") == local_device(None) == "cuda:1"
    assert local_device("cuda:0") == "cuda:0" and local_device("cpu") == "cpu"
