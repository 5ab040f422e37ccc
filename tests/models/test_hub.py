"""Hub ids: the local cache first, a quick refusal without a network, directed errors. Nothing is downloaded."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

import interp
from interp.models import hub, load_model
from tests.helpers import tiny_tokens
from tests.models.test_load import saved

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put_in_cache(cache: Path, repo: str, family: str = "llama") -> Path:
    """What a download leaves behind: refs/main with the commit, and the snapshot."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    shutil.copytree(saved(family), snapshot)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network answers; what it says is up to the test."""
    monkeypatch.setattr(hub, "_told_offline", lambda: False)
    monkeypatch.setattr(hub, "_reachable", lambda: True)


def test_a_cached_model_loads_offline_and_knows_its_commit(cache: Path) -> None:
    put_in_cache(cache, "owner/tiny")
    for name in ("owner/tiny", f"owner/tiny@{COMMIT}"):
        bridge = load_model(name, check=False)
        assert bridge.cfg.model_name == name
        record = interp.models.provenance(bridge)
        assert (record["model"], record["revision"]) == (name, COMMIT)
        assert bridge(tiny_tokens()).isfinite().all()


def test_offline_is_said_within_a_second(cache: Path) -> None:
    started = time.perf_counter()
    with pytest.raises(
        FileNotFoundError, match=r"'openai-community/gpt2' is not in the local cache and HF_HUB_OFFLINE is set"
    ) as caught:
        load_model("openai-community/gpt2")
    assert time.perf_counter() - started < 2  # about 0.01 s; room for a busy machine
    assert "interp.list_models()" in str(caught.value) and "hf download openai-community/gpt2" in str(caught.value)


@pytest.mark.parametrize("silent", ["name", "connection"])
def test_a_network_that_does_not_answer_is_noticed_within_a_second(
    cache: Path, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    """Without HF_HUB_OFFLINE the libraries would retry for three quarters of a minute."""

    def never(*args, timeout: float | None = None, **kwargs):
        time.sleep(3 if silent == "name" else min(timeout or 3, 3))
        raise TimeoutError

    monkeypatch.setattr(hub, "_told_offline", lambda: False)
    monkeypatch.setattr(socket, "create_connection", never)
    started = time.perf_counter()
    with pytest.raises(FileNotFoundError, match="the hub does not answer"):
        load_model("owner/name")
    assert time.perf_counter() - started < 2  # 0.6 s; room for a busy machine


def test_the_proxy_is_what_must_answer_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def connect(address, timeout):
        asked.append(address)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(socket, "create_connection", connect)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert hub._reachable()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    assert hub._reachable()
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example:3129")
    assert hub._reachable()
    assert asked == [("huggingface.co", 443), ("proxy.example", 3128), ("proxy.example", 3129)]


def test_an_incomplete_cache_is_not_taken_for_a_model(cache: Path) -> None:
    snapshot = put_in_cache(cache, "owner/tiny")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="'owner/tiny' is not in the local cache"):
        load_model("owner/tiny")


def fail_with(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def model_info(self, repo, **kwargs):
        response_of = getattr(errors, "Response", httpx.Response)
        request_of = __import__(response_of.__module__.split(".")[0]).Request
        raise kind("no", response=response_of(403, request=request_of("GET", "https://huggingface.co")))  # type: ignore[call-arg]

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


@pytest.mark.usefixtures("online")
def test_gated_models_say_how_to_get_in_and_what_to_use_instead(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, errors.GatedRepoError)
    with pytest.raises(PermissionError) as caught:
        load_model("meta-llama/Llama-3.2-1B")
    message = str(caught.value)
    assert message.startswith(
        "meta-llama/Llama-3.2-1B is gated. Accept its terms at https://huggingface.co/meta-llama/Llama-3.2-1B"
    )
    assert "set HF_TOKEN" in message and "SmolLM2" in message


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "the hub has no model 'owner/name', or it is private"),
        (errors.RevisionNotFoundError, "owner/name has no revision 'v9'"),
        (errors.HfHubHTTPError, "could not download owner/name: HfHubHTTPError"),
    ],
)
def test_other_refusals_of_the_hub(
    cache: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str
) -> None:
    fail_with(monkeypatch, kind)
    with pytest.raises(FileNotFoundError, match=message):
        load_model("owner/name@v9")


@pytest.mark.usefixtures("online")
def test_a_download_fetches_one_set_of_weights_and_nothing_else(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "tokenizer.json",
        "README.md",
    ]
    there += ["original/consolidated.00.pth", "onnx/config.json", "modeling_own.py", "tf_model.h5"]
    fetched: list[list[str]] = []

    def model_info(self, repo, **kwargs):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in there])

    def snapshot_download(repo, *, revision, allow_patterns):
        fetched.append(allow_patterns)
        return str(put_in_cache(cache, repo))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    bridge = load_model("owner/tiny", check=False, dtype="bfloat16")
    assert fetched == [["model.safetensors", "config.json", "tokenizer.json"]]
    assert bridge.W_E.dtype == torch.bfloat16
    there.remove("model.safetensors")
    assert "pytorch_model.bin" in hub._needed(there, code=False)
    assert "modeling_own.py" in hub._needed(there, code=True)


def test_mistyped_embedded_names_are_recognised(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "near_names", lambda name: ["tinyworld-gpt"])
    with pytest.raises(FileNotFoundError, match="did you mean the embedded model 'tinyworld-gpt'"):
        load_model("tinyworld-gtp")
    with pytest.raises(
        ValueError, match=r"'tinyworld gpt' is neither an embedded model, a directory nor a hub id .*did you mean"
    ):
        load_model("tinyworld gpt")
