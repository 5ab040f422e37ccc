"""The runner of the benchmarks, on benchmarks made here."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import interp

RUN = Path(interp.__file__).resolve().parents[1] / "experiments" / "bench" / "run.py"


@pytest.fixture
def run(tmp_path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("bench_run", RUN)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.HERE = tmp_path
    (tmp_path / "speed.py").write_text(
        "def main(device, quick):\n"
        "    return [{'what': 'a|b', 'seconds': 0.123456}, {'what': device, 'quick': quick}]\n"
    )
    (tmp_path / "_helper.py").write_text("")
    return module


def test_results_are_a_table_and_a_file(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "single.py").write_text("def main(device, quick):\n    return {'rate': 123456.7}\n")
    assert run.main(["--quick", "--out", str(tmp_path / "out")]) == 0
    stored = json.loads((tmp_path / "out" / "results-cpu-quick.json").read_text())
    assert stored["benchmarks"]["speed"]["rows"][1] == {"what": "cpu", "quick": True}
    assert stored["machine"]["torch"]
    text = (tmp_path / "out" / "results-cpu-quick.md").read_text()
    assert "| what | seconds | quick |\n| ---- | ------- | ----- |\n| a\\|b | 0.1235  |       |" in text
    assert "| 123,457 |" in text
    assert "not to be quoted" in text
    assert "| a\\|b | 0.1235" in capsys.readouterr().out


def test_a_failing_benchmark_does_not_stop_the_others(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("def main(device, quick):\n    raise RuntimeError('no')\n")
    assert run.main(["--out", str(tmp_path)]) == 1
    assert list(json.loads((tmp_path / "results-cpu.json").read_text())["benchmarks"]) == ["speed"]
    assert "Failed: broken" in capsys.readouterr().err


def test_unknown_names_and_devices_are_refused(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="no benchmark sped; there are speed"):
        run.main(["--only", "sped"])
    with pytest.raises(SystemExit):
        run.main(["--device", "nonsense"])
    assert "--device nonsense is not available" in capsys.readouterr().err


def test_every_benchmark_of_the_folder_has_a_main() -> None:
    modules = [path for path in RUN.parent.glob("*.py") if path != RUN and not path.stem.startswith("_")]
    assert modules
    for path in modules:
        functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        (main,) = [node for node in functions if node.name == "main"]
        assert [argument.arg for argument in main.args.args + main.args.kwonlyargs] == ["device", "quick"], path.name
