"""The command line, on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import interp
from interp import cli
from tests.helpers import tiny_bridge, tiny_tokens


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny Llama in place of whatever `load_model` is asked for; records what it was asked."""
    bridge = tiny_bridge("llama")
    asked: dict[str, Any] = {}

    def load_model(source: str, **options: Any) -> Any:
        asked.update(source=source, **options)
        return bridge

    monkeypatch.setattr(interp, "load_model", load_model)
    return SimpleNamespace(bridge=bridge, asked=asked)


def test_help_names_every_command_and_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for command in ("models", "check", "study", "harvest", "train"):
        assert f"\n    {command} " in text
        assert f"interp {command}" in text.split("examples:")[1]


@pytest.mark.parametrize("command", ["models", "check", "study", "harvest", "train"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert f"interp {command}" in text.split("examples:")[1]
    assert max(map(len, text.splitlines())) <= 125


def test_the_installed_command_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "interp.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"interp {interp.__version__}\n"


def test_a_mistake_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "tinyworld-gtp"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("interp check: ")
    assert captured.err.count("\n") == 1
    assert "tinyworld-gtp" in captured.err


def test_an_unknown_command_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["patch"])
    assert stopped.value.code == 2
    assert "harvest" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--debug", "study", "nonsense"], ["study", "nonsense", "--debug"]])
def test_debug_shows_the_traceback(arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("interp.studies.discovery.studies_dir", lambda: tmp_path)
    with pytest.raises(ValueError, match="no study 'nonsense'"):
        cli.main(arguments)


def test_a_bug_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise AssertionError("this cannot be")

    monkeypatch.setattr(interp, "list_models", broken)
    assert cli.main(["models"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "interp models: this cannot be",
        "This looks like a bug. The same command with --debug shows where.",
    ]


def test_models_lists_the_embedded_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    text = capsys.readouterr().out
    names = list(interp.list_models()["name"])
    assert names
    assert all(name in text for name in names)


def test_check_prints_the_report_and_answers_by_status(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = interp.self_check(tiny.bridge)
    monkeypatch.setattr(interp, "self_check", lambda bridge: report if bridge is tiny.bridge else None)
    assert cli.main(["check", "some-model", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert tiny.asked == {"source": "some-model", "device": "cpu", "dtype": torch.bfloat16, "check": False}
    assert capsys.readouterr().out == f"{report}\n"
    monkeypatch.setattr(interp, "self_check", lambda bridge: SimpleNamespace(ok=False))
    assert cli.main(["check", "some-model"]) == 1


def test_harvest_writes_what_capture_sees(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = torch.randint(0, 60, (5, 7), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    hook, out = "blocks.1.hook_resid_post", str(tmp_path / "store")
    command = ["harvest", "some-model", "--tokens", str(tmp_path / "tokens.npy"), "--hooks", hook, "--out", out]

    assert cli.main([*command, "--dry-run"]) == 0
    assert "35 tokens" in capsys.readouterr().out
    assert not Path(out).exists()

    assert cli.main([*command, "--batch-size", "2", "--shard-tokens", "8"]) == 0
    assert "35 tokens" in capsys.readouterr().out
    store = interp.cache.ActivationStore(out)
    expected = interp.cache.capture(tiny.bridge, tokens, hook)[hook].flatten(0, 1)
    torch.testing.assert_close(store[hook][0:35], expected)

    assert cli.main([*command, "--no-resume"]) == 2
    assert "store" in capsys.readouterr().err
    assert cli.main([*command, "--batch-size", "2", "--shard-tokens", "8"]) == 0


def test_harvest_refuses_an_unknown_hook(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "tokens.npy", np.zeros((2, 3), dtype=np.int64))
    tokens, out = str(tmp_path / "tokens.npy"), str(tmp_path / "store")
    assert cli.main(["harvest", "m", "--tokens", tokens, "--hooks", "blocks.1.hook_resid_pots", "--out", out]) == 2
    error = capsys.readouterr().err
    assert "blocks.1.hook_resid_post" in error
    assert error.count("\n") == 1


def test_tokens_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    tokens = torch.arange(6).reshape(2, 3)
    np.save(tmp_path / "a.npy", tokens.numpy().astype(np.uint16))
    save_file({"tokens": tokens, "labels": tokens + 1}, tmp_path / "b.safetensors")
    save_file({"ids": tokens.int()}, tmp_path / "c.safetensors")
    for name in ("a.npy", "b.safetensors", "c.safetensors"):
        read = cli.read_tokens(tmp_path / name, None)
        assert read.dtype == torch.int64
        assert read.tolist() == tokens.tolist()


def letters(bos: int | None) -> Any:
    """A tokenizer whose tokens are characters."""

    def tokenize(text: str, **options: Any) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [ord(c) for c in text]}

    tokenize.bos_token_id = bos  # type: ignore[attr-defined]
    return SimpleNamespace(tokenizer=tokenize)


@pytest.mark.parametrize(("bos", "rows"), [(None, ["abcd", "efgh"]), (1, ["\x01abc", "\x01def", "\x01ghi"])])
def test_text_is_cut_into_rows(
    bos: int | None, rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("abcdefghij")
    tokens = cli.read_tokens(tmp_path / "text.txt", letters(bos), length=4)
    assert ["".join(map(chr, row)) for row in tokens.tolist()] == rows
    dropped = 10 - sum(len(row) for row in rows) + len(rows) * (bos is not None)
    assert f"dropped the last {dropped} of 10 tokens" in capsys.readouterr().err


def test_token_files_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc")
    (tmp_path / "rows.csv").write_text("1,2")
    np.save(tmp_path / "floats.npy", np.zeros((2, 3)))
    np.save(tmp_path / "flat.npy", np.zeros(3, dtype=np.int64))
    save_file({"a": torch.zeros(1, 1), "b": torch.zeros(1, 1)}, tmp_path / "two.safetensors")
    for name, message in {
        "nowhere.npy": "no file",
        "rows.csv": r"\.npy, \.safetensors or \.txt",
        "floats.npy": r"float64 of shape \(2, 3\); expected whole numbers",
        "flat.npy": r"shape \(3,\)",
        "two.safetensors": "holds a, b, but no tensor called 'tokens'",
        "text.txt": "--length 64",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            cli.read_tokens(tmp_path / name, letters(None))
    with pytest.raises(ValueError, match="3 tokens, too few for one row of 9"):
        cli.read_tokens(tmp_path / "text.txt", letters(None), length=9)


def test_length_is_for_text_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["harvest", "m", "--tokens", str(tmp_path / "x.npy"), "--hooks", "a", "--out", "s", "--length", "4"]
    assert cli.main(command) == 2
    assert "--length cuts text" in capsys.readouterr().err


def test_pickled_arrays_are_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        cli.read_tokens(tmp_path / "objects.npy", None)


def test_studies_are_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"cell_type": "markdown", "metadata": {}, "source": ["# A title\n", "\n", "**Question.** Why\n", "so?"]}
    second = {"cell_type": "code", "metadata": {}, "source": 'MODEL = "tinyworld-gpt"'}
    (tmp_path / "01_why.ipynb").write_text(json.dumps({"cells": [first, second]}))
    monkeypatch.setattr("interp.studies.discovery.studies_dir", lambda: tmp_path)
    assert cli.main(["study"]) == 0
    text = capsys.readouterr().out
    assert "01_why  [tinyworld-gpt]\n    A title. Why so?\n" in text
    assert cli.main(["study", "01", "--all"]) == 2
    assert "--all" in capsys.readouterr().err


@pytest.fixture
def training_file(tmp_path: Path) -> Any:
    """Writes a training file for a small store."""
    hook = "blocks.1.hook_mlp_out"
    interp.cache.harvest(tiny_bridge("llama"), tiny_tokens(8, 6), hook, tmp_path / "store", batch_size=4)

    def write(**changes: Any) -> str:
        values = {
            "out": "out",
            "hook": hook,
            "data": {"store": "store"},
            "dictionary": {"architecture": "topk", "n_latents": 12, "k": 2},
            "training": {"n_steps": 4, "batch_size": 8, "checkpoint_every": 2},
        }
        (tmp_path / "run.json").write_text(json.dumps({**values, **changes}))
        return str(tmp_path / "run.json")

    return write


def test_train_plans_trains_and_goes_on(training_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = training_file()
    assert cli.main(["train", file, "--dry-run"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert cli.main(["train", file]) == 0
    first = capsys.readouterr().out
    assert first.startswith(f"{tmp_path / 'out'}: step 4, loss ") and ", l0 " in first
    saved = tmp_path / "out" / "dictionary.safetensors"
    written, bits = saved.stat().st_mtime_ns, saved.read_bytes()
    assert cli.main(["train", file]) == 0  # finished: not again
    assert saved.stat().st_mtime_ns == written and capsys.readouterr().out == first
    assert cli.main(["train", file, "--no-resume", "--device", "cpu"]) == 0
    assert saved.stat().st_mtime_ns > written and saved.read_bytes() == bits
    assert cli.main(["train", file, "--out", str(tmp_path / "elsewhere")]) == 0
    assert interp.dictionaries.load_dictionary(tmp_path / "elsewhere").n_latents == 12


def test_train_runs_a_grid(training_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"dictionary.k": [2, 3], "seed": [0, 1]}
    file = training_file(grid=grid)
    assert cli.main(["train", file, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("tokens/s") == 4 and not (tmp_path / "out").exists()
    assert cli.main(["train", file, "--together"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 5 and all(" finished " in line for line in table[1:])
    assert interp.dictionaries.load_dictionary(tmp_path / "out" / "k=3,seed=1").settings()["k"] == 3
    wild = training_file(grid={"learning_rate": [1e-3, 1e38]}, out="wild", training={"n_steps": 9, "batch_size": 8})
    assert cli.main(["train", wild]) == 1
    printed = capsys.readouterr()
    assert " finished " in printed.out and " failed " in printed.out and "1 of 2 runs did not finish" in printed.err


def test_train_says_what_is_wrong_in_one_line(
    training_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[dict[str, Any], list[str], str]] = [
        ({"trainnig": {}}, [], "the file has no setting trainnig"),
        ({"hook": "blocks.9.hook_mlp_out"}, [], "blocks.9.hook_mlp_out is not among them"),
        ({}, ["--executor", "local"], "for files with a [grid]"),
        ({}, ["--resource", "mem_gb=4"], "for files with a [grid]"),
        ({}, ["--resource", "mem_gb"], "expected NAME=VALUE"),
    ]
    for changes, options, message in cases:
        assert cli.main(["train", training_file(**changes), *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert cli.main(["train", str(tmp_path / "nowhere.toml")]) == 2
    assert "no training file" in capsys.readouterr().err
    assert cli.main(["train", training_file(grid={"seed": [0]}), "--no-resume"]) == 2
    assert "--no-resume is for single runs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
