"""A training file says what is trained, or says what is wrong with it before anything is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interp.dictionaries import training_file
from interp.dictionaries.training import train
from interp.dictionaries.training_config import TrainingConfig
from interp.dictionaries.training_file import TrainingData, grid, hooks_of, read_training_file, training_record
from tests.helpers import tiny_bridge, tiny_tokens

HOOK, TARGET = "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"
GOOD: dict[str, Any] = {
    "out": "runs/a",
    "model": "tiny",
    "hook": HOOK,
    "data": {"tokens": "tokens.npy", "texts_per_buffer": 4},
    "dictionary": {"architecture": "topk", "n_latents": 12, "k": 2},
    "training": {"n_steps": 3, "batch_size": 8, "decay": 0, "clip": None},
}


def write(folder: Path, values: Any, name: str = "run.json") -> Path:
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder / name


def changed(**changes: Any) -> dict[str, Any]:
    values = json.loads(json.dumps(GOOD))
    for path, value in changes.items():
        table, _, name = path.rpartition("__")
        (values[table] if table else values)[name] = value
    return values


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomli may be missing")
def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    text = f"""
        out = "runs/a"
        model = "tiny"
        hook = "{HOOK}"
        [data]
        tokens = "tokens.npy"
        texts_per_buffer = 4
        [dictionary]
        architecture = "topk"
        n_latents = 12
        k = 2
        [training]
        n_steps = 3
        batch_size = 8
        decay = 0
        clip = inf
    """
    toml = read_training_file(write(tmp_path, text, "run.toml"))
    assert toml == read_training_file(write(tmp_path, changed(training__clip=float("inf"))))
    assert toml.out == tmp_path / "runs" / "a" and toml.hooks == [HOOK]
    assert toml.data == TrainingData(model="tiny", tokens=str(tmp_path / "tokens.npy"), texts_per_buffer=4)
    expected = {**GOOD["dictionary"], "hook": HOOK}
    assert toml.runs[""] == TrainingConfig(expected, n_steps=3, batch_size=8, decay=0.0, clip=float("inf"))


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    path = write(tmp_path / "deep", changed(model="../model", data__tokens="/elsewhere/t.npy", out="../out"))
    file = read_training_file(path)
    assert file.data.model == str(tmp_path / "model") and file.data.tokens == "/elsewhere/t.npy"
    assert file.out.resolve() == tmp_path / "out"
    assert read_training_file(path, out=tmp_path / "other").out == tmp_path / "other"


def test_a_run_is_written_as_it_is_read(tmp_path: Path) -> None:
    file = read_training_file(write(tmp_path, changed(target_hook=TARGET, training__target_l0=None)))
    (tmp_path / "copy").mkdir()
    again = read_training_file(write(tmp_path / "copy", training_record(file.runs[""], file.data)))
    assert again.runs == file.runs and again.data == file.data and again.out == tmp_path / "copy"
    assert again.runs[""].clip is None  # null is not the default
    store = TrainingData(store=str(tmp_path / "store"))
    third = read_training_file(write(tmp_path / "copy", training_record(file.runs[""], store)))
    assert third.data == store and third.hooks == [HOOK, TARGET]


def test_a_record_is_good_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_training_file(write(tmp_path, GOOD)).runs[""]
    monkeypatch.chdir(tmp_path)
    record = training_record(run, TrainingData(model="tiny", tokens="tokens.npy"))
    assert record["data"]["tokens"] == str(tmp_path / "tokens.npy") and record["model"] == "tiny"
    assert training_record(run, TrainingData(store="store"))["data"] == {"store": str(tmp_path / "store")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, "the file has no setting modle; there are out, model, hook"),
        ({"data__batch": 3}, "data has no setting batch"),
        ({"training__epochs": 3}, "training has no setting epochs; there are n_steps"),
        ({"dictionary__kk": 3}, "topk dictionaries do not take these settings.*kk"),
        ({"dictionary__k": 13}, "k=13; expected a whole number from 1 to 12"),
        ({"dictionary__k": "2"}, "topk dictionaries do not take these settings|k"),
        ({"dictionary__architecture": "top"}, "architecture='top' is unknown"),
        ({"dictionary__hook": "x"}, r"\[dictionary\] has hook: hook and target_hook stand at the top"),
        ({"dictionary__d_in": 8}, r"\[dictionary\] has d_in"),
        ({"training__n_steps": "many"}, "n_steps is 'many'; expected int"),
        ({"training__n_steps": 2.5}, "n_steps is 2.5; expected int"),
        ({"training__seed": True}, "seed is True; expected int"),
        ({"training__learning_rate": -1}, "learning_rate=-1.0"),
        ({"data__length": "64"}, "length is '64'; expected int"),
        ({"data": {"store": "s"}}, "a store holds activations already, so model would not be used"),
        ({"data": {"length": 3}}, "tokens=None, store=None: training needs data.store, or a model"),
        ({"data": "s"}, "data is 's'; expected a table"),
        ({"hook": 3}, "hook is 3; expected text"),
        ({"grid": {"k": [1]}}, "has no k"),
        ({"grid": {"dictionary.k": 3}}, "dictionary.k is 3; expected a list"),
        ({"grid": {"dictionary.k": [2, 99]}}, "k=99"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as found:
        read_training_file(write(tmp_path, changed(**change)))
    assert str(tmp_path / "run.json") in str(found.value)


@pytest.mark.parametrize("name", ["hook", "data", "dictionary", "out"])
def test_what_is_missing_is_said(name: str, tmp_path: Path) -> None:
    values = {key: value for key, value in GOOD.items() if key != name}
    with pytest.raises(ValueError, match=f"{name} is missing"):
        read_training_file(write(tmp_path, values))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no training file"):
        read_training_file(tmp_path / "nowhere.toml")
    with pytest.raises(ValueError, match=r"ends in \.toml or \.json, not in '\.yaml'"):
        read_training_file(write(tmp_path, GOOD, "run.yaml"))
    with pytest.raises(ValueError, match="run.json.*line 1"):
        read_training_file(write(tmp_path, "{"))
    with pytest.raises(ValueError, match=r"expected a table of settings"):
        read_training_file(write(tmp_path, [1]))


def test_a_grid_is_every_combination(tmp_path: Path) -> None:
    values = changed(grid={"dictionary.k": [2, 3], "seed": [0, 1], "hook": [HOOK, TARGET]})
    runs = read_training_file(write(tmp_path, values)).runs
    assert len(runs) == 8 and list(runs)[:2] == [f"k=2,seed=0,hook={HOOK}", f"k=2,seed=0,hook={TARGET}"]
    one = runs[f"k=3,seed=1,hook={TARGET}"]
    assert (one.seed, one.dictionary["seed"], one.dictionary["k"], one.dictionary["hook"]) == (1, 1, 3, TARGET)
    assert hooks_of(runs.values()) == [HOOK, TARGET]
    base = runs[f"k=2,seed=0,hook={HOOK}"]
    rates = grid(base, {"learning_rate": [1, 0.5], "betas": [[0.0, 0.9]]})
    assert list(rates) == ["learning_rate=1,betas=0.0-0.9", "learning_rate=0.5,betas=0.0-0.9"]
    assert rates["learning_rate=1,betas=0.0-0.9"].learning_rate == 1.0
    named = grid(base, {"seed": [0], "dictionary.seed": [4]})
    assert list(named) == ["seed=0,dictionary.seed=4"] and named["seed=0,dictionary.seed=4"].dictionary["seed"] == 4
    for axes, message in (
        ({}, "needs values"),
        ({"seed": []}, "needs values"),
        ({"dictionary": [{}]}, "is no axis of a grid"),
        ({"training.seed": [1]}, "is no axis of a grid"),
        ({"dictionary.hook": ["a/b", "a b"]}, "both called 'hook=a_b'"),
    ):
        with pytest.raises(ValueError, match=message):
            grid(base, axes)


def test_a_model_and_its_tokens_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, asked = tiny_bridge("llama"), []
    monkeypatch.setattr(training_file, "load_model", lambda *names, **options: asked.append((names, options)) or bridge)
    file = read_training_file(write(tmp_path, GOOD))
    with pytest.raises(FileNotFoundError, match="tokens.npy"):
        file.data.open(file.hooks)
    assert not asked  # before the model
    np.save(tmp_path / "tokens.npy", tiny_tokens(8, 6).numpy())
    source: Any = file.data.open(file.hooks, device="cpu")
    assert asked == [(("tiny",), {"device": "cpu", "dtype": None, "check": False})]
    assert source.names == (HOOK,) and source.texts_per_buffer == 4 and source.tokens.shape == (8, 6)
    with pytest.raises(KeyError, match="blocks.1.hook_mlp_out"):
        file.data.open(["blocks.1.hook_mlp_outt"])
    trained = train(file.runs[""], source)
    assert trained.d_in == 32 and bool(torch.isfinite(trained.W_dec).all())


def test_every_setting_of_the_data_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, asked = tiny_bridge("llama"), []
    monkeypatch.setattr(training_file, "load_model", lambda *_, **options: asked.append(options) or bridge)
    monkeypatch.setattr(training_file, "read_tokens", lambda *_, **options: asked.append(options) or tiny_tokens(8, 6))
    data = {**GOOD["data"], "length": 6, "skip_first": 3, "dtype": "bfloat16"}
    np.save(tmp_path / "tokens.npy", tiny_tokens(8, 6).numpy())
    source: Any = read_training_file(write(tmp_path, changed(data=data))).open()
    assert [options.get("dtype", options.get("length")) for options in asked] == ["bfloat16", 6]
    assert source.skip_first == 3


def test_gradient_dictionaries_get_their_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_file, "load_model", lambda *_, **__: tiny_bridge("llama"))
    np.save(tmp_path / "tokens.npy", tiny_tokens(8, 6).numpy())
    values = changed(dictionary__architecture="gradient", target_hook=TARGET)
    file = read_training_file(write(tmp_path, values))
    source: Any = file.open()
    assert source.gradient_of == TARGET
    train(file.runs[""], source)
    two = read_training_file(write(tmp_path, {**values, "grid": {"target_hook": [TARGET, HOOK]}}))
    with pytest.raises(ValueError, match="a model is differentiated at one hook at a time"):
        two.open()
