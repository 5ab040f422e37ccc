"""Finding, running and reporting studies, on notebooks made here."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from interp import cli
from interp.studies import (
    Check,
    Study,
    StudyRun,
    find_study,
    list_studies,
    run_studies,
    run_study,
    studies_dir,
    write_report,
)
from interp.studies.discovery import read_study
from interp.studies.report import card_figure

# The smallest PNG: one transparent pixel.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="

HEAD = "# {title}\n\n**Question.** Which *head*\nmoves it?\n\n**Paper.** Somebody 2022, section 3."
DRAW = (
    "from base64 import b64decode\nfrom IPython.display import Image\n"
    f"Image(b64decode({PIXEL!r}))"
)  # fmt: skip


def notebook(path: Path, *cells: str | dict[str, Any], title: str = "A title") -> Path:
    """Write a study: strings become code cells behind a first Markdown cell; dictionaries are taken as they are."""

    def cell(index: int, given: str | dict[str, Any]) -> dict[str, Any]:
        made = {"cell_type": "code", "metadata": {}, "source": given} if isinstance(given, str) else given
        made = {"id": f"cell{index}", "metadata": {}, **made}
        return made | ({"execution_count": None, "outputs": []} if made["cell_type"] == "code" else {})

    head: dict[str, Any] = {"cell_type": "markdown", "source": HEAD.format(title=title)}
    made = [cell(i, given) for i, given in enumerate([head, *cells])]
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("studies")
    notebook(
        made / "01_good.ipynb",
        'MODEL = "tiny"',
        "import os, sys\nprint('on', MODEL, os.environ['INTERP_PROGRESS'])\nopen('kept.txt', 'w').write('x')",
        "assert MODEL, 'a model'\nfor n in range(2):\n    assert n < 2",
        DRAW,
        "from IPython.display import HTML\nHTML('<b>bold</b><script>1</script>')",
        "5 < 6",
        title="Good & <plain>",
    )
    notebook(
        made / "02_bad.ipynb",
        "assert True",
        "assert 1 == 1\nassert (\n    2 ==\n    3\n), 'two is not three'\nassert 4",
        "assert 5",
    )
    notebook(made / "03_broken.ipynb", "assert True", "%precision 2\nraise RuntimeError('no such thing')", "assert 5")
    return made


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("reports")
    seen: list[str] = []
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = run_studies(list_studies(folder), out, jobs=2, report=lambda run: seen.append(run.study.name))
    assert sorted(seen) == ["01_good", "02_bad", "03_broken"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # notebooks are left alone
    return {"out": out, "runs": done, "index": write_report(done, out)}


def test_a_study_says_what_it_is(folder: Path) -> None:
    study = list_studies(folder)[0]
    assert (study.name, study.title, study.model) == ("01_good", "Good & <plain>", "tiny")
    assert study.question == "Which *head* moves it?"
    assert study.paper == "Somebody 2022, section 3."


def test_studies_are_found_by_number_name_and_path(folder: Path) -> None:
    expected = list_studies(folder)[1]
    for name in ("02", "bad", "02_bad", str(folder / "02_bad.ipynb")):
        assert find_study(name, folder) == expected
    with pytest.raises(ValueError, match="did you mean 'good'"):
        find_study("godo", folder)
    with pytest.raises(ValueError, match="there are: 01_good, 02_bad, 03_broken"):
        find_study("zzz", folder)
    with pytest.raises(ValueError, match="no notebook at"):
        find_study(str(folder / "04.ipynb"), folder)


def test_an_ambiguous_number_is_refused(tmp_path: Path) -> None:
    notebook(tmp_path / "01_one.ipynb")
    notebook(tmp_path / "01_two.ipynb")
    with pytest.raises(ValueError, match="'01' names 2 studies: 01_one, 01_two"):
        find_study("01", tmp_path)


def test_notebooks_that_are_no_studies_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.ipynb").write_text("hello")
    with pytest.raises(ValueError, match="is not a Jupyter notebook"):
        read_study(tmp_path / "text.ipynb")
    path = notebook(tmp_path / "mute.ipynb")
    path.write_text(path.read_text().replace("Question", "Answer"))
    with pytest.raises(ValueError, match=r"'\*\*Question.\*\*'"):
        read_study(path)


def test_the_embedded_studies_follow_the_convention() -> None:
    studies = list_studies()
    assert studies
    assert studies_dir().is_dir()
    for study in studies:
        assert study.model, f"{study.name} has no MODEL parameter"
        assert study.paper, f"{study.name} names no paper"


def test_every_assert_gets_its_verdict(runs: dict[str, Any]) -> None:
    good, bad, broken = runs["runs"]
    assert [c.status for c in good.checks] == ["passed", "passed"]
    assert good.checks[0] == Check(3, "assert MODEL, 'a model'", "passed")
    assert good.ok
    assert good.verdict == "2 asserts passed"

    assert [c.status for c in bad.checks] == ["passed", "passed", "failed", "not reached", "not reached"]
    assert bad.checks[2].source == "assert ( 2 == 3 ), 'two is not three'"
    assert bad.error == "AssertionError: two is not three"
    assert bad.verdict == "2 asserts passed, 1 failed, 2 not reached"
    assert not bad.ok

    assert [c.status for c in broken.checks] == ["passed", "not reached"]
    assert broken.error == "RuntimeError: no such thing"
    assert broken.verdict == "1 assert passed, stopped by an error, 1 not reached"
    assert not broken.ok


def test_the_model_is_a_parameter(folder: Path, runs: dict[str, Any], tmp_path: Path) -> None:
    good = runs["runs"][0]
    assert (good.model, good.page) == ("tiny", "01_good")
    assert good.notebook.cells[2].outputs[0].text == "on tiny 0\n"
    other = run_study(good.study, tmp_path, model="some/other")
    assert (other.model, other.page) == ("some/other", "01_good--some-other")
    assert [c.outputs[0].text for c in other.notebook.cells if "print" in c.source] == ["on some/other 0\n"]
    assert other.notebook.cells[2].metadata.tags == ["injected-parameters"]
    with pytest.raises(ValueError, match="02_bad has no MODEL parameter"):
        run_study(find_study("02", folder), tmp_path, model="x")


def test_a_model_directory_is_given_by_its_absolute_path(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    run = run_study(find_study("01", folder), tmp_path / "out", model="./model")
    assert [c.outputs[0].text for c in run.notebook.cells if "print" in c.source] == [f"on {tmp_path / 'model'} 0\n"]
    assert run.page == "01_good--model"


def test_files_of_a_study_are_kept_and_linked(runs: dict[str, Any]) -> None:
    out = runs["out"]
    assert (out / "01_good.files" / "kept.txt").read_text() == "x"
    assert 'href="01_good.files/kept.txt"' in (out / "01_good.html").read_text()
    assert not (out / "02_bad.files").exists()


def test_the_front_page_has_a_card_per_study(runs: dict[str, Any]) -> None:
    page = runs["index"].read_text()
    assert page.count('<a class="card"') == 3
    assert "Good &amp; &lt;plain&gt;" in page
    assert "Which <em>head</em> moves it?" in page
    assert f"data:image/png;base64,{PIXEL}" in page
    assert "2 asserts passed, 1 failed, 2 not reached" in page
    assert "AssertionError: two is not three" in page
    assert re.search(r"<span class=\"run\"><span class=\"model\">tiny</span> \d+ s", page)


def test_pages_need_no_network(runs: dict[str, Any]) -> None:
    for path in runs["out"].glob("*.html"):
        page = path.read_text()
        loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
        assert all(re.match(r"data:|#|[\w.-]+(/[\w.-]+)?$", link) for link in loaded), loaded
        assert "@import" not in page
        assert "url(" not in page


def test_a_study_page_shows_code_outputs_and_checks(runs: dict[str, Any]) -> None:
    page = (runs["out"] / "01_good.html").read_text()
    assert "on tiny 0" in page
    assert f'<img src="data:image/png;base64,{PIXEL}"' in page
    assert 'srcdoc="&lt;b&gt;bold' in page  # a view with a script is kept apart from the page
    assert page.count('class="mark passed"') == 2
    bad = (runs["out"] / "02_bad.html").read_text()
    assert bad.count('class="mark failed"') == 1
    assert "two is not three" in bad
    assert "\x1b[" not in bad


def fake_run(*outputs: dict[str, Any], tags: tuple[str, ...] = ()) -> StudyRun:
    """A run of a study with one output per cell; the last cell has the tags."""
    from nbformat.v4 import new_code_cell, new_notebook, new_output

    cells = [new_code_cell("x", outputs=[new_output("display_data", data=data)]) for data in outputs]
    cells[-1].metadata["tags"] = list(tags)
    study = Study("s", Path("s.ipynb"), "s", "q", "", "m")
    return StudyRun(study, "m", 1.0, (), None, new_notebook(cells=cells), "s")


def test_the_card_shows_the_tagged_figure() -> None:
    first, second = {"image/png": "AAAA"}, {"image/png": "BB\nBB"}
    assert card_figure(fake_run(first, second).notebook) == "AAAA"
    assert card_figure(fake_run(first, second, tags=("card",)).notebook) == "BBBB"
    assert card_figure(fake_run({"text/plain": "1"}).notebook) is None


def test_a_plotly_figure_is_there_as_picture_and_as_data(tmp_path: Path) -> None:
    figure = {
        "data": [{"type": "scatter", "x": [1, 2], "y": [3, 4]}],
        "layout": {"title": {"text": "Effect</script>"}, "width": 300, "height": 200},
    }
    run = fake_run({"application/vnd.plotly.v1+json": figure})  # without a PNG: one is drawn
    write_report([run], tmp_path)
    page = (tmp_path / "s.html").read_text()
    picture = re.search(r'<img src="data:image/png;base64,([^"]+)"', page)
    assert picture is not None
    assert base64.b64decode(picture.group(1)).startswith(b"\x89PNG")
    data = re.search(r'<script type="application/json">(.+?)</script>', page)
    assert data is not None
    assert json.loads(data.group(1)) == figure
    assert '<script src="plotly.min.js">' in page
    assert (tmp_path / "plotly.min.js").stat().st_size > 1_000_000
    assert picture.group(1) in (tmp_path / "index.html").read_text()


def test_no_figures_no_plotly(runs: dict[str, Any]) -> None:
    assert not (runs["out"] / "plotly.min.js").exists()


def test_update_keeps_outputs_and_is_stable(tmp_path: Path) -> None:
    path = notebook(tmp_path / "01_s.ipynb", 'MODEL = "tiny"', "print(MODEL)", "1 + 1")
    study = read_study(path)
    run_study(study, tmp_path / "out", update=True)
    once = path.read_bytes()
    cells = json.loads(once)["cells"]
    assert cells[2]["outputs"][0]["text"] == ["tiny\n"]
    assert cells[3]["outputs"][0]["data"]["text/plain"] == ["2"]
    assert all(cell.get("execution_count") is None for cell in cells)
    assert json.loads(once)["metadata"]["language_info"] == {"name": "python"}
    run_study(study, tmp_path / "out", update=True)
    assert path.read_bytes() == once
    with pytest.raises(ValueError, match="update keeps the notebook's own MODEL"):
        run_study(study, tmp_path / "out", update=True, model="other")


def test_update_leaves_a_failing_notebook_alone(tmp_path: Path) -> None:
    path = notebook(tmp_path / "01_s.ipynb", "print(1)", "assert False")
    before = path.read_bytes()
    assert not run_study(read_study(path), tmp_path / "out", update=True).ok
    assert path.read_bytes() == before


def test_outputs_of_an_earlier_run_are_not_reported(tmp_path: Path) -> None:
    path = notebook(tmp_path / "01_s.ipynb", "1 / 0", "print('late')")
    content = json.loads(path.read_text())
    content["cells"][2]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["stale\n"]}]
    path.write_text(json.dumps(content))
    run = run_study(read_study(path), tmp_path / "out")
    assert run.error == "ZeroDivisionError: division by zero"
    assert run.notebook.cells[2].outputs == []


@pytest.mark.parametrize(
    ("source", "error"),
    [("import time\ntime.sleep(60)", "CellTimeoutError"), ("import os\nos._exit(1)", "DeadKernelError")],
)
def test_a_cell_that_hangs_or_dies_is_reported(source: str, error: str, tmp_path: Path) -> None:
    path = notebook(tmp_path / "01_s.ipynb", "assert True", f"{source}\nassert True", "assert True")
    run = run_study(read_study(path), tmp_path / "out", timeout=3.0)
    assert run.error is not None
    assert run.error.startswith(error)
    assert [c.status for c in run.checks] == ["passed", "not reached", "not reached"]
    assert "stopped by an error" in write_report([run], tmp_path / "out").read_text()


def test_the_command_runs_studies_and_answers_by_status(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = str(folder / "01_good.ipynb"), str(folder / "02_bad.ipynb")
    assert cli.main(["study", good, "--model", "a", "--model", "b", "--jobs", "2", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("2 asserts passed") == 2
    assert (tmp_path / "01_good--a.html").is_file()
    assert cli.main(["study", bad, "--out", str(tmp_path)]) == 1
    assert "AssertionError: two is not three" in capsys.readouterr().out
    assert (tmp_path / "index.html").is_file()
