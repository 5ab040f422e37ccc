"""Independent runs: here, as processes, and as what a cluster would be asked for."""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp.cache import harvest
from interp.dictionaries import _sweep_job
from interp.dictionaries._sweep_job import SweepJob, train_group
from interp.dictionaries.sources import TensorSource
from interp.dictionaries.sweeping import Sweep, SweepFailed, sweep
from interp.dictionaries.training import train
from interp.dictionaries.training_config import TrainingConfig
from interp.dictionaries.training_file import TrainingData, grid, read_training_file
from tests.helpers import tiny_bridge, tiny_tokens

HOOK, OTHER = "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"


def base(**options: Any) -> TrainingConfig:
    settings = {"architecture": "topk", "n_latents": 12, "k": 2, "hook": HOOK}
    return TrainingConfig(settings, **{"n_steps": 6, "batch_size": 8, "log_every": 2, "checkpoint_every": 2, **options})


def activations() -> Tensor:
    return torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("harvest") / "store"
    harvest(tiny_bridge("llama"), tiny_tokens(8, 6), [HOOK, OTHER], path, batch_size=4)
    return str(path)


def written(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}


def test_runs_are_what_they_are_alone_and_are_not_redone(store: str, tmp_path: Path) -> None:
    runs = grid(base(), {"dictionary.k": [2, 3], "seed": [0, 1]})
    data = TrainingData(store=store)
    found = sweep(runs, data, tmp_path)
    for name, config in runs.items():
        expected = train(config, data.open([HOOK]))
        assert torch.equal(found[name].W_dec, expected.W_dec)
        assert read_training_file(tmp_path / name / "run.json").runs[""] == config
    table = found.status()
    assert list(table["run"]) == list(runs) and set(table["state"]) == {"finished"} and set(table["step"]) == {6}
    assert bool((table["fvu"] > 0).all()) and bool((table["l0"] <= [2, 2, 3, 3]).all())
    before = written(tmp_path)
    assert sweep(runs, data, tmp_path).status().equals(table)
    assert written(tmp_path) == before
    (tmp_path / "k=3,seed=0" / "dictionary.safetensors").unlink()
    more = runs | grid(base(), {"dictionary.k": [4], "seed": [0]})
    assert set(sweep(more, data, tmp_path).status()["state"]) == {"finished"}
    after = written(tmp_path)
    assert {name for name in after if after[name] != before.get(name)} == {
        "k=3,seed=0/dictionary.safetensors",
        "k=4,seed=0/dictionary.safetensors",
        "k=4,seed=0/state.safetensors",
    }
    assert Sweep.open(tmp_path).names == tuple(sorted(more))


def test_together_they_share_the_batches(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = grid(base(), {"dictionary.hook": [HOOK, OTHER], "dictionary.k": [2, 3]}) | {"slow": base(n_steps=7)}
    passes: list[int] = []
    inner = _sweep_job.train_group
    monkeypatch.setattr(
        "interp.dictionaries.sweeping.train_group",
        lambda folders, **o: (passes.append(len(folders)), inner(folders, **o)),
    )
    found = sweep(runs, TrainingData(store=store), tmp_path, together=True)
    assert passes == [4, 1]
    name = f"hook={OTHER},k=3"
    assert torch.equal(found[name].W_dec, train(runs[name], TrainingData(store=store).open([OTHER])).W_dec)


def test_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    wild = base(learning_rate=1e38, clip=None)
    source = TensorSource({HOOK: activations()})
    with pytest.raises(SweepFailed, match="1 of 3 runs did not finish: wild: .*TrainingDiverged: step") as failed:
        sweep({"a": base(), "wild": wild, "b": base(seed=1)}, source, tmp_path)
    table = failed.value.sweep.status().set_index("run")
    assert list(table["state"]) == ["finished", "failed", "finished"]
    assert "TrainingDiverged" in table.loc["wild", "error"]
    with pytest.raises(KeyError, match="'wild' is failed, at step"):
        failed.value.sweep["wild"]
    with pytest.raises(KeyError, match="no run 'c'; it has a, wild, b"):
        failed.value.sweep["c"]
    (tmp_path / "wild" / "state.safetensors").unlink(missing_ok=True)
    mended = sweep({"wild": base(seed=2)}, source, tmp_path)
    assert mended.status()["state"].item() == "finished" and not (tmp_path / "wild" / "error.txt").exists()


def test_two_processes_never_train_into_one_folder(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(SweepFailed, match="a is being trained by another process"):
            sweep({"a": base()}, TensorSource({HOOK: activations()}), tmp_path)
    assert not (tmp_path / "a" / "error.txt").exists()  # the other one may be doing well
    assert sweep({"a": base()}, TensorSource({HOOK: activations()}), tmp_path).status()["state"].item() == "finished"


@pytest.mark.dist
@pytest.mark.slow
def test_a_process_of_this_machine_does_the_same(store: str, tmp_path: Path) -> None:
    runs = grid(base(), {"dictionary.k": [2, 3]})
    found = sweep(runs, TrainingData(store=store), tmp_path, executor="local", together=True)
    assert len(found.jobs) == 1 and set(found.status()["state"]) == {"finished"}
    for name, config in runs.items():
        assert torch.equal(found[name].W_dec, train(config, TrainingData(store=store).open([HOOK])).W_dec)
    before = written(tmp_path)
    assert not sweep(runs, TrainingData(store=store), tmp_path, executor="local", together=True).jobs
    assert written(tmp_path) == before


class Pool:
    """What submitit's local executor is to a sweep, without its processes."""

    def __init__(self) -> None:
        self.running: list[int] = []
        self.most, self.parameters, self.jobs = 0, {}, []

    def __call__(self, folder: Path, cluster: str) -> Pool:
        assert cluster == "local" and folder.name == "_jobs"
        return self

    def update_parameters(self, **parameters: Any) -> None:
        self.parameters |= parameters

    def submit(self, job: SweepJob) -> Any:
        pool, left = self, [3]
        pool.jobs.append(job)
        pool.running.append(1)
        pool.most = max(pool.most, sum(pool.running))
        at = len(pool.running) - 1

        class Submitted:
            def done(self) -> bool:
                left[0] -= 1
                if left[0] == 0:
                    job()
                    pool.running[at] = 0
                return left[0] <= 0

            def results(self) -> None:
                while not self.done():
                    pass

        return Submitted()


@pytest.mark.parametrize("at_once", [None, 2])
def test_so_many_processes_at_once_and_no_more(
    at_once: int | None, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import submitit

    pool = Pool()
    monkeypatch.setattr(submitit, "AutoExecutor", pool)
    runs = grid(base(), {"seed": [0, 1, 2]})
    found = sweep(
        runs, TrainingData(store=store), tmp_path, executor="local", at_once=at_once, resources={"timeout_min": 5}
    )
    assert pool.most == (at_once or 1) and set(found.status()["state"]) == {"finished"}
    assert pool.parameters["timeout_min"] == 5 and pool.parameters["gpus_per_node"] == torch.cuda.device_count()
    assert [Path(job.folders[0]).name for job in pool.jobs] == list(runs)


def test_a_cluster_is_asked_for_an_array_of_jobs(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With commands of SLURM that write down what they are given; no job runs."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": "", "sbatch": f'cp "$1" {tmp_path}/script.sh; echo "Submitted batch job 4242"'}.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    runs = grid(base(), {"seed": [0, 1, 2]})
    found = sweep(
        runs,
        TrainingData(store=store),
        tmp_path / "runs",
        executor="slurm",
        at_once=2,
        processes=4,
        resources={"slurm_partition": "gpu", "gpus_per_node": 4, "timeout_min": 90},
        wait=False,
    )
    script = (tmp_path / "script.sh").read_text()
    for line in ("--partition=gpu", "--gpus-per-node=4", "--ntasks-per-node=4", "--time=90", "--array=0-2%2"):
        assert f"#SBATCH {line}\n" in script, line
    assert "submitit.core._submit" in script and sys.executable in script
    assert [job.job_id for job in found.jobs] == ["4242_0", "4242_1", "4242_2"]
    assert set(found.status()["state"]) == {"waiting"} and Sweep.open(tmp_path / "runs").names == found.names
    job = found.jobs[1].submission().function
    assert job == SweepJob((str(tmp_path / "runs" / "seed=1"),), None, 4)
    # where a cluster stops a job, the same one goes in again
    assert job.checkpoint().function == job
    for name, value in {"slurm_memory": 1, "mem_gb": "much"}.items():
        with pytest.raises(ValueError, match=name.removeprefix("slurm_")):
            sweep(runs, TrainingData(store=store), tmp_path / "r", executor="slurm", resources={name: value})


def test_a_job_of_several_tasks_finds_its_peers(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"JOB_ID": "77", "NTASKS": "4", "JOB_NUM_NODES": "1", "NODEID": "0", "GLOBALID": "3", "LOCALID": "3"}
    for name, value in {"SUBMITIT_EXECUTOR": "local", **{f"SUBMITIT_LOCAL_{k}": v for k, v in own.items()}}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what the job sets is taken back
    seen: dict[str, str] = {}
    monkeypatch.setattr(_sweep_job, "train_group", lambda *_, **__: seen.update(os.environ))
    SweepJob((str(tmp_path),), None, 4)()
    expected = {"MASTER_ADDR": "127.0.0.1", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    assert {name: seen[name] for name in expected} == expected and 20_000 <= int(seen["MASTER_PORT"]) < 60_000


def test_only_the_first_process_writes_what_went_wrong(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(FileNotFoundError):
        train_group([tmp_path / "a"])
    assert not (tmp_path / "a").exists()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(FileNotFoundError):
        train_group([tmp_path / "a"])
    assert "no training file" in (tmp_path / "a" / "error.txt").read_text()


def test_what_cannot_be_is_refused_before_anything_is_written(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    data, folder = TrainingData(store=store), tmp_path / "runs"
    one = {"a": base()}
    bad = replace(base(), dictionary={**base().dictionary, "k": 99})
    hookless = {"a": replace(base(), dictionary={"architecture": "topk", "n_latents": 12, "k": 2})}
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        ({}, data, {}, "nothing to train"),
        ({"a/b": base()}, data, {}, "'a/b' cannot be folders"),
        ({"_jobs": base()}, data, {}, "'_jobs' cannot be folders"),
        ({"b": bad}, data, {}, "k=99"),
        (hookless, data, {}, "'a' name no hook"),
        (one, data, {"executor": "condor"}, "executor='condor'"),
        (one, data, {"processes": 2}, "in_process trains one run after the other"),
        (one, data, {"resources": {"mem_gb": 1}}, "in_process trains one run after the other"),
        (one, data, {"wait": False}, "wait=False with executor='in_process'"),
        (one, activations(), {"executor": "local"}, r"data is a Tensor.*TrainingData\(store=...\)"),
        (one, data, {"executor": "local", "at_once": 0}, "at_once=0"),
    ]
    for configs, given, options, message in cases:
        with pytest.raises(ValueError, match=message):
            sweep(configs, given, folder, **options)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        with pytest.raises(ImportError, match=r"pip install 'interp\[cluster\]'"):
            sweep(one, data, folder, executor="local")
    with pytest.raises(FileNotFoundError, match="no runs in"):
        Sweep.open(folder)
    assert not folder.exists()


def test_folders_of_other_runs_are_left_alone(store: str, tmp_path: Path) -> None:
    data = TrainingData(store=store)
    sweep({"a": base()}, data, tmp_path)
    before = written(tmp_path)
    with pytest.raises(ValueError, match="a belongs to other settings: training.n_steps is 6 there and 9 here"):
        sweep({"new": base(), "a": base(n_steps=9)}, data, tmp_path)
    train(base(), activations(), path=tmp_path / "own")
    with pytest.raises(ValueError, match="own holds a run that was not made by a sweep"):
        sweep({"own": base()}, data, tmp_path)
    assert not (tmp_path / "new").exists() and {k: v for k, v in written(tmp_path).items() if k in before} == before
    assert json.loads((tmp_path / "a" / "run.json").read_text())["training"]["n_steps"] == 6
