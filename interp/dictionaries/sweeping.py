"""Independent training runs (layers, seeds, widths, coefficients): one after the other here, or as jobs of submitit.

Every run has a folder of its own with `run.json`, which is a training file: a job trains what it says, and
`interp train FOLDER/run.json` does the same by hand. What happened is read off the folders, so that a sweep can be
looked at from anywhere (`Sweep.open`) and given again: finished runs are not redone, others go on.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from safetensors import safe_open

from interp.dictionaries._run import RESULT, STATE, _differences
from interp.dictionaries._sweep_job import ERROR, RUN, SweepJob, train_group, write_json
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.loading import load_dictionary
from interp.dictionaries.training_config import TrainingConfig
from interp.dictionaries.training_file import TrainingData, check_dictionary, training_record

Executor = Literal["in_process", "local", "slurm"]
_JOBS = "_jobs"


class SweepFailed(RuntimeError):
    """Some runs of a sweep ended in an error; the others are done, and `sweep` is all of them."""

    def __init__(self, message: str, sweep: Sweep) -> None:
        super().__init__(message)
        self.sweep = sweep


@dataclass(frozen=True)
class Sweep:
    """Runs in a folder.

    Attributes:
        names: Of the runs, each a folder below `folder`.
        jobs: Those of submitit that train them, if this process submitted any.
    """

    folder: Path
    names: tuple[str, ...]
    jobs: tuple[Any, ...] = field(default=(), repr=False)

    @classmethod
    def open(cls, folder: str | Path) -> Sweep:
        """The sweep in a folder, whoever started it.

        Raises:
            FileNotFoundError: If there is none.
        """
        folder = Path(folder)
        found = {p.parent.name for name in (RUN, STATE, RESULT) for p in folder.glob(f"*/{name}")}
        if not found:
            raise FileNotFoundError(f"there are no runs in {folder}")
        return cls(folder, tuple(sorted(found)))

    def __getitem__(self, name: str) -> Dictionary:
        """The dictionary of a finished run.

        Raises:
            KeyError: If there is no such run, or it is not finished, saying how far it is.
        """
        if name not in self.names:
            raise KeyError(f"the sweep has no run {name!r}; it has {', '.join(self.names)}")
        if not (self.folder / name / RESULT).exists():
            row = self.status().set_index("run").loc[name]
            raise KeyError(f"run {name!r} is {row['state']}, at step {row['step']}; its dictionary is not there yet")
        return load_dictionary(self.folder / name)

    def status(self) -> pd.DataFrame:
        """A row per run: state (`"finished"`, `"failed"`, `"started"` once there is a checkpoint, `"waiting"`), steps
        done, the last entry of its history (loss, l0, fvu, dead, coefficient) and the last line of its error."""
        rows = []
        for name in self.names:
            folder = self.folder / name
            finished = (folder / RESULT).exists()
            record = _record(folder / STATE)
            error = "" if finished or not (folder / ERROR).exists() else (folder / ERROR).read_text(encoding="utf-8")
            state = "finished" if finished else "failed" if error else "started" if record else "waiting"
            last = {k: v for k, v in (record.get("history") or [{}])[-1].items() if k in _SHOWN}
            rows.append(
                {"run": name, "state": state, "step": record.get("step", 0), **dict.fromkeys(_SHOWN), **last}
                | {"error": (error.strip().splitlines() or [""])[-1]}
            )
        return pd.DataFrame(rows)

    def wait(self) -> Sweep:
        """Itself, once all jobs have ended.

        Raises:
            SweepFailed: If a run is not finished then, with what it said.
        """
        return self._ended([])

    def _ended(self, problems: list[str]) -> Sweep:
        for job in self.jobs:
            try:
                job.results()
            except Exception as error:  # of whatever kind: the runs' own folders say what became of them
                problems.append(f"{type(error).__name__}, see {job.paths.stderr}")
        table = self.status()
        missing = table[table["state"] != "finished"]
        if len(missing):
            what = [f"{r.run}: {r.error or f'stopped at step {r.step}'}" for r in missing.itertuples()]
            raise SweepFailed(
                f"{len(missing)} of {len(table)} runs did not finish: {'; '.join(what + problems)}. The same call "
                f"again goes on with these",
                self,
            )
        return self


_SHOWN = ("loss", "l0", "fvu", "dead", "coefficient")


def sweep(
    configs: Mapping[str, TrainingConfig],
    data: Any,
    folder: str | Path,
    *,
    executor: Executor = "in_process",
    together: bool = False,
    at_once: int | None = None,
    processes: int = 1,
    device: str | None = None,
    resources: Mapping[str, Any] | None = None,
    wait: bool = True,
    progress: bool = False,
) -> Sweep:
    """Train runs that do not depend on each other. One that fails does not stop the others.

    Args:
        configs: What to train, by name (see `grid`); a run goes into `folder`/name.
        data: `TrainingData`, which every job opens for itself; in this process also whatever `train` takes.
        executor: `"in_process"`, one after the other; `"local"`, processes of this machine; `"slurm"`, jobs of a
            cluster. The latter two need submitit, which keeps its logs and pickles in `folder`/_jobs.
        together: Train runs that agree on batch_size, n_steps and seed in one pass over the data (`train_many`), as one
            job: a live model then runs once for all of them. Give it again when going on.
        at_once: Jobs at the same time: 1 on this machine by default, as many as the cluster likes on one.
        processes: Per run, which share every batch (see `train`): tasks per node of the job.
        device: Where to train; see `train`.
        resources: Parameters of `submitit.AutoExecutor`: `timeout_min` (a day by default; a job that is stopped by the
            cluster goes on from its checkpoint), `gpus_per_node`, `cpus_per_task`, `mem_gb`, `slurm_partition`, ...
        wait: Until all have ended; False returns once jobs are submitted, `"slurm"` only.

    Raises:
        ValueError: Before anything is written or trained, for settings that no dictionary has, names that are no
            folders, a folder that holds other runs of these names, or options that the executor has not.
        ImportError: If submitit is needed and not there.
        SweepFailed: After all have ended, if one has not finished.
    """
    folder = Path(folder).absolute()
    _check(configs, data, executor, at_once, processes, resources, wait)
    build_executor = None if executor == "in_process" else _submitit().AutoExecutor
    for config in configs.values():
        check_dictionary(config)
    shared = isinstance(data, TrainingData)
    found = Sweep(folder, tuple(configs))
    records = _records(configs, data, folder) if shared else {}
    pool = None if build_executor is None else build_executor(folder=folder / _JOBS, cluster=executor)
    if pool is not None:
        _ask(pool, executor, len(configs), at_once, processes, resources or {})
    for name, record in records.items():
        if not (folder / name / RUN).exists():
            write_json(folder / name / RUN, record)
    groups = [names for names in _groups(configs, together) if not (shared and _all_finished(folder, names))]
    if pool is None:
        problems: list[str] = []
        for names in groups:
            paths = [folder / name for name in names]
            own = None if shared else ([configs[name] for name in names], data)
            try:
                train_group(paths, device=device, own=own, progress=progress)
            except Exception as error:  # the others are still to be trained
                problems.append(f"{type(error).__name__}: {error}")
        return found._ended(problems)
    todo = [SweepJob(tuple(str(folder / name) for name in names), device, processes) for names in groups]
    if not todo:
        return found
    if executor == "slurm":
        with pool.batch():  # one array of jobs
            jobs = [pool.submit(job) for job in todo]
        submitted = Sweep(folder, found.names, tuple(jobs))
        return submitted.wait() if wait else submitted
    return Sweep(folder, found.names, tuple(_queued(pool, todo, at_once or 1))).wait()


def _ask(pool: Any, executor: str, n: int, at_once: int | None, processes: int, resources: Mapping[str, Any]) -> None:
    asked: dict[str, Any] = {"timeout_min": 24 * 60, "name": "interp", "tasks_per_node": processes}
    if executor == "slurm":
        asked["slurm_array_parallelism"] = at_once or n
    else:  # submitit hides all GPUs from a local job that asks for none
        asked["gpus_per_node"] = torch.cuda.device_count()
    try:
        pool.update_parameters(**{**asked, **resources})
    except (NameError, AssertionError) as error:  # how submitit refuses names and types
        raise ValueError(f"resources={dict(resources)} are not what submitit takes: {error}") from error


def _check(
    configs: Mapping[str, TrainingConfig],
    data: Any,
    executor: str,
    at_once: int | None,
    processes: int,
    resources: Mapping[str, Any] | None,
    wait: bool,
) -> None:
    if not configs:
        raise ValueError("no configurations: nothing to train")
    if bad := [
        name for name in configs if not re.fullmatch(r"[A-Za-z0-9.+=,-][A-Za-z0-9_.+=,-]*", name) or ".." in name
    ]:
        raise ValueError(f"{', '.join(map(repr, bad))} cannot be folders: letters, digits and _.+=,- make a name")
    if executor not in ("in_process", "local", "slurm"):
        raise ValueError(f'executor={executor!r}; expected "in_process", "local" or "slurm"')
    if processes < 1 or (at_once is not None and at_once < 1):
        raise ValueError(f"processes={processes}, at_once={at_once}; expected at least 1")
    if executor == "in_process":
        if processes > 1 or at_once not in (None, 1) or resources:
            raise ValueError(
                f"processes={processes}, at_once={at_once}, resources={resources} are for jobs; in_process trains one "
                f"run after the other here (all of it under torchrun to share batches)"
            )
    elif not isinstance(data, TrainingData):
        raise ValueError(
            f"data is a {type(data).__name__}, which a job elsewhere cannot open; describe it by "
            f"TrainingData(store=...) "
            f'or TrainingData(model=..., tokens=...), or use executor="in_process"'
        )
    if isinstance(data, TrainingData) and (
        bad := [name for name in configs if not configs[name].dictionary.get("hook")]
    ):
        raise ValueError(f'{", ".join(map(repr, bad))} name no hook to read: dictionary={{..., "hook": ...}}')
    if not wait and executor != "slurm":
        raise ValueError(f'wait=False with executor={executor!r}: only jobs of "slurm" go on by themselves')


def _records(configs: Mapping[str, TrainingConfig], data: TrainingData, folder: Path) -> dict[str, dict[str, Any]]:
    """What goes into `run.json` of every run, if nothing else is there."""
    records = {name: training_record(config, data) for name, config in configs.items()}
    for name, record in records.items():
        file = folder / name / RUN
        if file.exists() and (there := json.loads(file.read_text(encoding="utf-8"))) != record:
            raise ValueError(
                f"{folder / name} belongs to other settings: {_differences(there, record)}. Choose another name or "
                f"folder, or delete it"
            )
        if not file.exists() and ((folder / name / STATE).exists() or (folder / name / RESULT).exists()):
            raise ValueError(f"{folder / name} holds a run that was not made by a sweep; choose another name or folder")
    return records


def _groups(configs: Mapping[str, TrainingConfig], together: bool) -> list[list[str]]:
    found: dict[Any, list[str]] = {}
    for name, config in configs.items():
        key = (config.batch_size, config.n_steps, config.seed) if together else name
        found.setdefault(key, []).append(name)
    return list(found.values())


def _all_finished(folder: Path, names: Iterable[str]) -> bool:
    return all((folder / name / RESULT).exists() for name in names)


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ImportError(
            "jobs need submitit, which is not installed: pip install 'interp[cluster]', or use executor=\"in_process\""
        ) from error
    return submitit


def _queued(pool: Any, todo: list[SweepJob], at_once: int) -> list[Any]:
    """All jobs, once the last has been started; submitit itself would start all of them at the same time."""
    jobs: list[Any] = []
    for job in todo:
        while sum(not submitted.done() for submitted in jobs) >= at_once:
            time.sleep(0.1)
        jobs.append(pool.submit(job))
    return jobs


def _record(path: Path) -> dict[str, Any]:
    """The record of a state, without its tensors."""
    if not path.exists():
        return {}
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {})["interp"])
