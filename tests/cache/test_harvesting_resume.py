"""A harvest that is killed, runs out of disk, meets a NaN or is split over processes ends byte for byte the same."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.cache import ActivationStore, StoreError, harvest
from interp.cache import _manifest as manifest_module
from tests.helpers import fresh_bridge, tiny_bridge, tiny_tokens

ROOT = Path(__file__).resolve().parents[2]
HOOKS = ["blocks.0.mlp.hook_post", "blocks.1.hook_resid_post"]
OPTIONS: dict[str, Any] = {"batch_size": 3, "shard_tokens": 20}

PREAMBLE = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch
from tests.helpers import tiny_bridge, tiny_tokens
torch.set_num_threads(1)
import interp.cache._manifest as manifest
from interp.cache import harvest
bridge, tokens = tiny_bridge("llama"), tiny_tokens(40, 7)

def run(path):
    harvest(bridge, tokens, {HOOKS!r}, path, batch_size=3, shard_tokens=20, labels={{"code": range(40)}})
"""

KILLED = """
import random, signal

def in_steps(path, parts):  # a step is reported after each small piece, so that kills fall into files too
    with path.open("wb") as file:
        for part in parts:
            for start in range(0, len(part), 512):
                file.write(part[start : start + 512])
                file.flush()
                os.write(report, b".")
                time.sleep(0.001)

manifest.write_parts = in_steps
moments = random.Random(5)
for _ in range(5):
    progress, report = os.pipe()
    child = os.fork()  # imports are not paid for again
    if child == 0:
        run(sys.argv[1])
        os._exit(7)
    for _ in range(moments.randrange(1, 50)):
        os.read(progress, 1)
    time.sleep(moments.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, f"finished before it was killed: {status}"
    os.close(progress)
    os.close(report)
"""


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("undisturbed") / "s"
    harvest(tiny_bridge("llama"), tiny_tokens(40, 7), HOOKS, path, **OPTIONS, labels={"code": range(40)})
    return contents(path)


@pytest.mark.slow
def test_killed_five_times_at_random_moments(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "s"
    killed = python(["-c", PREAMBLE + KILLED, str(path)])
    assert killed.returncode == 0, killed.stderr[-3000:]
    with pytest.raises(StoreError, match="not finished"):
        ActivationStore(path)
    partial = ActivationStore(path, partial=True)
    assert 0 < partial.n_tokens < 280 and all("not finished" in problem for problem in partial.verify().problems)
    harvest(tiny_bridge("llama"), tiny_tokens(40, 7), HOOKS, path, **OPTIONS, labels={"code": range(40)})
    assert contents(path) == undisturbed


def python(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


class Killed(BaseException):
    """Stands for a kill: nothing may catch it and tidy up."""


def test_stopped_at_every_single_write(tmp_path: Path) -> None:
    """Wherever the process vanishes, leaving half a file, the next run ends with the same bytes."""
    bridge, tokens, write = tiny_bridge("llama"), tiny_tokens(8, 7), manifest_module.write_parts
    harvest(bridge, tokens, HOOKS, tmp_path / "undisturbed", **OPTIONS)
    expected, steps = contents(tmp_path / "undisturbed"), 0
    n_writes = 14  # three shards of three files and a record, and the manifest before and after

    def vanish(file: Path, parts: Iterable[Any]) -> None:
        nonlocal steps
        if steps == fatal:
            file.write_bytes(b"".join(bytes(part) for part in parts)[:100])
            raise Killed
        steps += 1
        write(file, parts)

    for fatal in range(n_writes):
        path, steps = tmp_path / str(fatal), 0
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(manifest_module, "write_parts", vanish)
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process removes no temporary file
            harvest(bridge, tokens, HOOKS, path, **OPTIONS)
        assert len(list(path.rglob("*.tmp"))) == 1
        harvest(bridge, tokens, HOOKS, path, **OPTIONS)
        assert contents(path) == expected


@pytest.mark.parametrize("background", [0, 5, 11])
def test_a_full_disk_leaves_a_resumable_store(
    background: int, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge, tokens, path = tiny_bridge("llama"), tiny_tokens(40, 7), tmp_path / "s"
    write, left = manifest_module.write_parts, background + 1

    def limited(file: Path, parts: Iterable[Any]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        write(file, parts)

    monkeypatch.setattr(manifest_module, "write_parts", limited)
    with pytest.raises(
        OSError, match="No space left on device.*kept in .*call harvest again with the same arguments"
    ) as raised:
        harvest(bridge, tokens, HOOKS, path, **OPTIONS, labels={"code": range(40)})
    assert raised.value.errno == errno.ENOSPC
    assert list(path.rglob("*.tmp")) == []
    assert ActivationStore(path, partial=True).n_tokens == 20 * (background // 4)
    monkeypatch.undo()
    harvest(bridge, tokens, HOOKS, path, **OPTIONS, labels={"code": range(40)})
    assert contents(path) == undisturbed


def test_a_real_write_that_fails(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """The system itself refuses files above a size, as a full disk or a quota would."""
    resource = pytest.importorskip("resource")
    bridge, tokens, path = tiny_bridge("llama"), tiny_tokens(40, 7), tmp_path / "s"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (3000, before[1])
    )  # more than a row of tokens, less than a shard of a hook
    try:
        with pytest.raises(OSError, match="File too large.*call harvest again"):
            harvest(bridge, tokens, HOOKS, path, **OPTIONS, labels={"code": range(40)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    harvest(bridge, tokens, HOOKS, path, **OPTIONS, labels={"code": range(40)})
    assert contents(path) == undisturbed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stop_with_hook_and_token(value: float, tmp_path: Path) -> None:
    # read before the first attention, which multiplies even later positions by zero and so spreads not-a-numbers to all
    bridge, tokens, hooks = fresh_bridge("llama"), tiny_tokens(10, 4), ["blocks.0.hook_resid_pre", HOOKS[1]]
    tokens[tokens == 59] = 58
    options: dict[str, Any] = {"batch_size": 2, "shard_tokens": 8}
    good = harvest(bridge, tokens, hooks, tmp_path / "good", **options)
    revision = good.provenance["revision"]
    tokens[7, 2] = 59
    bridge.original_model.get_input_embeddings().weight[59, 5] = value
    with pytest.raises(FloatingPointError) as raised:
        harvest(bridge, tokens, hooks, tmp_path / "s", **options)
    assert f"'{hooks[0]}' at example 7, position 2, token 59 'w59' is {value}" in str(raised.value)
    assert "the model itself computes it (in float32)" in str(raised.value)
    assert all(len(point.fwd_hooks) == 0 for point in bridge.hook_dict.values())
    kept = ActivationStore(tmp_path / "s", partial=True)
    assert kept.n_tokens == 24 and kept.provenance["revision"] != revision  # the three shards before example 7's
    assert torch.equal(kept[hooks[1]][:], good[hooks[1]][:24])


def test_overflow_of_float16_is_told_from_infinity(tmp_path: Path) -> None:
    bridge, tokens = fresh_bridge("llama"), tiny_tokens(4, 4)
    bridge.original_model.get_input_embeddings().weight[int(tokens[3, 1]), 0] = 1e5
    with pytest.raises(
        FloatingPointError,
        match=r"has the value 1000\d\d.*beyond the range of float16 \(65504\).*bfloat16 or torch.float32",
    ):
        harvest(bridge, tokens, "blocks.0.hook_resid_post", tmp_path / "s", dtype=torch.float16)
    store = harvest(bridge, tokens, "blocks.0.hook_resid_post", tmp_path / "b", dtype=torch.bfloat16)
    assert store.n_tokens == 16


def test_an_error_in_the_stream_keeps_what_was_finished(tmp_path: Path) -> None:
    bridge, items = tiny_bridge("llama"), [tiny_tokens(4, 5, seed) for seed in range(4)]

    def broken() -> Iterable[Any]:
        yield from items[:2]
        raise ConnectionError("the data server went away")

    with pytest.raises(ConnectionError):
        harvest(bridge, broken(), HOOKS, tmp_path / "s", **OPTIONS)
    assert ActivationStore(tmp_path / "s", partial=True).n_tokens == 40
    harvest(bridge, iter(items), HOOKS, tmp_path / "s", **OPTIONS)
    harvest(bridge, iter(items), HOOKS, tmp_path / "whole", **OPTIONS)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_give_the_same_store(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    script, fresh, damaged = tmp_path / "run.py", tmp_path / "two", tmp_path / "resumed"
    script.write_text(PREAMBLE + "for path in sys.argv[1:]:\n    run(path)\n")
    # the second is a store of which a process that was killed left gaps
    harvest(tiny_bridge("llama"), tiny_tokens(40, 7), HOOKS, damaged, **OPTIONS, labels={"code": range(40)})
    for file in sorted((damaged / "shards").iterdir())[::5]:
        file.unlink()
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = python([*two, str(script), str(fresh), str(damaged)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(fresh) == undisturbed
    assert contents(damaged) == undisturbed
