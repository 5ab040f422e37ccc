"""A harvest that is killed, runs out of disk, meets a NaN or is split over processes ends byte for byte the same."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import fresh_bridge, tiny_bridge, tiny_tokens

from interp.cache import ActivationStore, StoreError, harvest
from interp.cache import _manifest as manifest_module

ROOT = Path(__file__).resolve().parents[2]
HOOKS = ["blocks.0.mlp.hook_post", "blocks.1.hook_resid_post"]
OPTIONS: dict[str, Any] = {"batch_size": 3, "shard_tokens": 20}

SCRIPT = textwrap.dedent("""
    import os, sys, time
    sys.path.insert(0, {tests!r})
    import torch
    from helpers import tiny_bridge, tiny_tokens
    torch.set_num_threads(1)
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(40, 7)
    import interp.cache._manifest as manifest
    from interp.cache import harvest
    from interp.models import provenance
    whole, slow = manifest.write_parts, float(sys.argv[2])

    def in_steps(path, parts):  # writes slowly, so that kills fall into files as well as between them
        with path.open("wb") as file:
            for part in parts:
                for start in range(0, len(part), 512):
                    file.write(part[start : start + 512])
                    file.flush()
                    time.sleep(slow)

    if slow:
        manifest.write_parts = in_steps
    print("ready", flush=True)
    sys.stdin.readline()
    harvest(bridge, tokens, {hooks!r}, sys.argv[1], batch_size=3, shard_tokens=20, labels={{"code": range(40)}})
    print("done", flush=True)
""").format(tests=str(ROOT / "tests"), hooks=HOOKS)


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
    script, path = tmp_path / "run.py", tmp_path / "s"
    script.write_text(SCRIPT)
    moments, states = random.Random(5), []
    # started together, since importing takes most of the time; each waits for its turn
    runs = [start(script, path, delay) for delay in [0.002] * 5 + [0.0]]
    try:
        for run in runs:
            assert run.stdout is not None and run.stdout.readline() == "ready\n"
        for run in runs[:5]:
            assert run.stdin is not None
            run.stdin.write("\n")
            run.stdin.flush()
            time.sleep(moments.uniform(0.02, 0.35))
            run.send_signal(signal.SIGKILL)
            assert run.wait() == -signal.SIGKILL
            states.append(len(list(path.rglob("*.safetensors"))))
            if (path / "manifest.json").exists():
                with pytest.raises(StoreError, match="not finished"):
                    ActivationStore(path)
                partial = ActivationStore(path, partial=True)
                assert [problem for problem in partial.verify().problems if "manifest" not in problem] == []
        out, _ = runs[5].communicate("\n", timeout=60)
        assert out == "done\n"
    finally:
        for run in runs:
            run.kill()
            run.wait()
    assert states == sorted(states) and 0 < states[-1] < len(undisturbed) - 1, f"the kills missed the harvest: {states}"
    assert contents(path) == undisturbed


def start(script: Path, path: Path, slow: float) -> subprocess.Popen[str]:
    command = [sys.executable, str(script), str(path), str(slow)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
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
    bridge, tokens = fresh_bridge("llama"), tiny_tokens(10, 4)
    tokens[tokens == 59] = 58
    good = contents_of_run(bridge, tokens, tmp_path / "good")
    poisoned = tokens.clone()
    poisoned[7, 2] = 59
    bridge.original_model.get_input_embeddings().weight[59, 5] = value
    with pytest.raises(FloatingPointError) as raised:
        harvest(bridge, poisoned, HOOKS, tmp_path / "s", batch_size=2, shard_tokens=8)
    message = str(raised.value)
    assert "at example 7, position 2, token 59 'w59'" in message and "the model itself computes it" in message
    assert HOOKS[0] in message  # the first of them
    assert all(len(point.fwd_hooks) == 0 for point in bridge.hook_dict.values())
    assert ActivationStore(tmp_path / "s", partial=True).n_tokens == 24  # the three shards before example 7's
    bridge.original_model.get_input_embeddings().weight[59, 5] = 0.1
    kept = ActivationStore(tmp_path / "s", partial=True)[HOOKS[1]][:]
    assert torch.equal(kept, good[:24])


def contents_of_run(bridge: Any, tokens: torch.Tensor, path: Path) -> torch.Tensor:
    return harvest(bridge, tokens, HOOKS, path, batch_size=2, shard_tokens=8)[HOOKS[1]][:]


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
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.replace("sys.stdin.readline()", "").replace("print(", "0 and print("))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    alone, finished = tmp_path / "two", tmp_path / "resumed"
    # a store of which one process, killed, left every other shard
    harvest(tiny_bridge("llama"), tiny_tokens(40, 7), HOOKS, finished, **OPTIONS, labels={"code": range(40)})
    for file in list((finished / "shards").glob("*"))[::5]:
        file.unlink()
    for path in (alone, finished):
        done = subprocess.run(
            [*command, str(path), "0"], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert contents(path) == undisturbed
