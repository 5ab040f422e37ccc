"""Running a study: fresh kernel, one parameter, and a verdict for every assert."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from interp.studies.discovery import Study, parameters_cell, python_of

Status = Literal["passed", "failed", "not reached"]

ENVIRONMENT = {"INTERP_PROGRESS": "0", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Progress bars are for people who wait; in a report they are noise."""


@dataclass(frozen=True)
class Check:
    """One assert of a study: the index of its cell, its source, and what became of it."""

    cell: int
    source: str
    status: Status


@dataclass(frozen=True)
class StudyRun:
    """A study that was run.

    Attributes:
        model: What `MODEL` was; None if the study has no such parameter.
        seconds: Wall time, the start of the kernel included.
        checks: Every assert in the order of the notebook.
        error: The exception that stopped the run in one line, None if every cell ran.
        notebook: The executed notebook (an `nbformat` node), up to where it stopped.
        page: File name for its page and its files, without ending.
    """

    study: Study
    model: str | None
    seconds: float
    checks: tuple[Check, ...]
    error: str | None
    notebook: Any
    page: str

    def count(self, status: Status) -> int:
        return sum(check.status == status for check in self.checks)

    @property
    def ok(self) -> bool:
        """Whether every cell ran, and with it every assert passed."""
        return self.error is None

    @property
    def verdict(self) -> str:
        """One line, such as `12 asserts passed` or `3 asserts passed, 1 failed, 8 not reached`."""
        passed, failed, missed = self.count("passed"), self.count("failed"), self.count("not reached")
        parts = [f"{passed} assert{'' if passed == 1 else 's'} passed"] if self.checks else ["no asserts"]
        parts += [f"{failed} failed"] if failed else []
        parts += ["stopped by an error"] if self.error and not failed else []
        parts += [f"{missed} not reached"] if missed else []
        return ", ".join(parts)


def run_study(
    study: Study,
    out: str | os.PathLike[str],
    *,
    model: str | None = None,
    update: bool = False,
    timeout: float | None = None,
) -> StudyRun:
    """Run a study from the top in a fresh kernel and say what became of each of its asserts.

    The run stops at the first error, which is returned and not raised. Files that the notebook writes with relative
    paths land in `out/PAGE.files`. The notebook itself is left alone unless `update` is set.

    Args:
        model: Replaces the notebook's `MODEL`: an embedded name, a directory or a hub id.
        update: Write the outputs into the notebook if every cell ran.
        timeout: Longest time for one cell in seconds.

    Raises:
        ValueError: If `model` is given but the notebook has no `MODEL`, or together with `update`.
        ImportError: If the `notebook` extra is not installed.
    """
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    except ImportError as missing:
        raise ImportError(
            f"running studies needs the notebook extra: pip install 'interp[notebook]' ({missing})"
        ) from None

    if update and model is not None:
        raise ValueError(f"update keeps the notebook's own MODEL ({study.model!r}); leave model={model!r} out")
    notebook: Any = nbformat.read(study.path, as_version=4)
    if model is not None:
        _inject(notebook, study, model)
    page = study.name if model in (None, study.model) else f"{study.name}--{_slug(str(model))}"
    folder = Path(out) / f"{page}.files"
    folder.mkdir(parents=True, exist_ok=True)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    reached = [0]
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        on_cell_start=lambda cell, cell_index: reached.append(cell_index),
    )
    error = None
    start = time.perf_counter()
    try:
        # In a thread and a loop of its own, closed at the end: the caller may be a notebook, whose loop is running.
        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(asyncio.run, client.async_execute(env={**os.environ, **ENVIRONMENT})).result()
    except CellExecutionError as stopped:
        error = f"{stopped.ename}: {_first_line(stopped.evalue)}".rstrip(": ")
    except (CellTimeoutError, DeadKernelError) as stopped:
        error = f"{type(stopped).__name__}: {_first_line(str(stopped))}"
    seconds = time.perf_counter() - start
    if not any(folder.iterdir()):
        folder.rmdir()
    checks = _checks(notebook, _stopped_at(notebook, reached[-1]) if error else None)
    clean(notebook)
    if update and error is None:
        partial = study.path.with_suffix(".partial")
        nbformat.write(notebook, partial)
        partial.replace(study.path)
    return StudyRun(study, model or study.model, seconds, checks, error, notebook, page)


def run_studies(
    studies: Sequence[Study],
    out: str | os.PathLike[str],
    *,
    models: Sequence[str | None] = (None,),
    update: bool = False,
    timeout: float | None = None,
    jobs: int = 1,
    report: Callable[[StudyRun], None] = lambda run: None,
) -> list[StudyRun]:
    """Run every study on every model, `jobs` at a time; `report` is called as each one ends.

    `None` among `models` stands for each notebook's own. Other arguments as for `run_study`.
    """

    def one(pair: tuple[Study, str | None]) -> StudyRun:
        study, model = pair
        run = run_study(study, out, model=model, update=update, timeout=timeout)
        report(run)
        return run

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return list(pool.map(one, [(study, model) for study in studies for model in models]))


def clean(notebook: Any) -> None:
    """Take out of an executed notebook, in place, what changes between runs and says nothing: counts, widgets."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        cell.execution_count = None
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)


def _inject(notebook: Any, study: Study, model: str) -> None:
    from nbformat.v4 import new_code_cell

    at = parameters_cell(notebook.cells)
    if at is None:
        raise ValueError(f"{study.name} has no MODEL parameter, so it cannot run on {model!r}")
    # A directory is meant from where the command was typed, but the kernel runs elsewhere.
    value = str(Path(model).resolve()) if Path(model).is_dir() else model
    cell = new_code_cell(f"MODEL = {value!r}", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(at + 1, cell)


def _checks(notebook: Any, stopped_at: tuple[int, int, str] | None) -> tuple[Check, ...]:
    """The asserts of all cells: passed before the line that stopped the run, not reached after it."""
    checks: list[Check] = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        try:
            tree = ast.parse(python_of(cell))
        except SyntaxError:  # the kernel says so, too: the cell is the one that stopped the run
            continue
        for node in sorted((n for n in ast.walk(tree) if isinstance(n, ast.Assert)), key=lambda n: n.lineno):
            lines = python_of(cell).splitlines()[node.lineno - 1 : node.end_lineno]
            source = " ".join(line.strip() for line in lines)
            checks.append(Check(index, source, _status(index, node, stopped_at)))
    return tuple(checks)


def _status(index: int, node: ast.Assert, stopped_at: tuple[int, int, str] | None) -> Status:
    if stopped_at is None or index < stopped_at[0]:
        return "passed"
    cell, line, kind = stopped_at
    last = node.end_lineno or node.lineno
    if index == cell and line and last < line:
        return "passed"
    if index == cell and node.lineno <= line <= last and kind == "AssertionError":
        return "failed"
    return "not reached"


def _stopped_at(notebook: Any, cell: int) -> tuple[int, int, str]:
    """(cell, line in the cell, exception) of what ended the run in `cell`.

    The line is 0 and the exception empty where the kernel left no traceback (a timeout, a kernel that died).
    """
    for output in notebook.cells[cell].get("outputs", []):
        if output.output_type == "error":
            text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output.traceback))
            arrow = re.search(r"^-+> ?(\d+)", text, re.MULTILINE)  # the cell's own frame comes first
            return cell, int(arrow.group(1)) if arrow else 0, output.ename
    return cell, 0, ""


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _slug(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", Path(model).name if Path(model).is_dir() else model).strip("-")
