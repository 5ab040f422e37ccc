"""A job of a sweep: trains what the `run.json` of some folders say, and leaves errors beside them."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN, ERROR, LOCK = "run.json", "error.txt", ".lock"


@dataclass(frozen=True)
class SweepJob:
    """What submitit calls, in a process elsewhere; plain values, since it travels as a pickle."""

    folders: tuple[str, ...]
    device: str | None
    processes: int

    def __call__(self) -> None:
        if self.processes > 1:
            _join_processes()
        train_group([Path(folder) for folder in self.folders], device=self.device)

    def checkpoint(self) -> Any:
        """What submitit submits in place of a job that the cluster stops: the same, which goes on from its state."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def train_group(
    folders: Sequence[Path],
    *,
    device: str | None = None,
    own: tuple[Sequence[Any], Any] | None = None,
    progress: bool = False,
) -> None:
    """Train runs in one pass over the data; what goes wrong is written to those that are not finished, and raised.

    Args:
        own: Configurations and activations that are at hand; read from the folders by default.
    """
    # a job that only waits, or the process that submits, needs none of this
    from interp.dictionaries._run import RESULT
    from interp.dictionaries.training import train_many
    from interp.dictionaries.training_file import read_training_file

    first = os.environ.get("RANK", "0") == "0"
    with ExitStack() as locks:
        if first:
            for folder in folders:
                locks.enter_context(_locked(folder))
                (folder / ERROR).unlink(missing_ok=True)
        try:
            if own is None:
                files = [read_training_file(folder / RUN) for folder in folders]
                configs = [file.runs[""] for file in files]
                data = files[0].data.open_for(configs, device=device)
            else:
                configs, data = own
            train_many(configs, data, paths=list(folders), device=device, progress=progress)
        except BaseException:
            for folder in folders if first else ():
                if not (folder / RESULT).exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / ERROR).write_text(traceback.format_exc(), encoding="utf-8")
            raise


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """The whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _join_processes() -> None:
    """What torchrun would have put into the environment, from what submitit knows."""
    from submitit import JobEnvironment

    job = JobEnvironment()
    alone = job.num_nodes == 1
    number = int.from_bytes(str(job.job_id).encode(), "little")
    os.environ.update(
        MASTER_ADDR="127.0.0.1" if alone else job.hostnames[0],
        MASTER_PORT=str(20_000 + number % 40_000),
        RANK=str(job.global_rank),
        WORLD_SIZE=str(job.num_tasks),
        LOCAL_RANK=str(job.local_rank),
        LOCAL_WORLD_SIZE=str(job.num_tasks // job.num_nodes),
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two processes never train into one folder. Let go by the system when the process ends, however it does."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(f"{folder} is being trained by another process; wait for it, or stop it") from error
        yield
