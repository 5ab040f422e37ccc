"""The models that come with the package are found by name, with their checkpoints, without importing torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import interp
from interp.models import embedded, load_model
from tests.helpers import tiny_model, tiny_tokens
from tests.models.test_load import saved


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory with two models, one of them with two checkpoints that have no tokenizer of their own."""
    for name, family in (("small-gpt", "gpt2"), ("small-llama", "llama")):
        shutil.copytree(saved(family), tmp_path / "models" / name)
    for seed, step in ((1, "step-00010"), (2, "step-01000")):
        tiny_model("llama", seed, torch.float16).save_pretrained(
            tmp_path / "models" / "small-llama" / "checkpoints" / step
        )
    monkeypatch.setattr(embedded, "data_dir", lambda: tmp_path)
    return tmp_path


@pytest.mark.usefixtures("house")
def test_list_models() -> None:
    frame = interp.list_models().set_index("name")
    assert list(frame.index) == ["small-gpt", "small-llama"]
    row = frame.loc["small-llama"]
    assert (row.architecture, row.layers, row.d_model, row.heads, row.kv_heads) == ("LlamaForCausalLM", 3, 32, 4, 2)
    assert (row.vocabulary, row.context, row.checkpoints) == (60, 64, "step-00010, step-01000")
    assert row.parameters == sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    assert frame.loc["small-gpt"].kv_heads == 4 and frame.loc["small-gpt"].checkpoints == ""


@pytest.mark.usefixtures("house")
def test_names_and_checkpoints_load(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = tiny_tokens()
    with torch.no_grad():
        for name, family, seed in (("small-gpt", "gpt2", 0), ("small-llama@step-01000", "llama", 2)):
            bridge = load_model(name)
            assert bridge.cfg.model_name == name and bridge.W_E.dtype == torch.float32
            plain = tiny_model(family, seed)
            if "@" in name:  # kept in half precision, computed in single
                for parameter in plain.parameters():
                    parameter.copy_(parameter.half().float())
            torch.testing.assert_close(bridge(tokens), plain(tokens).logits, atol=1e-5, rtol=0)
            assert bridge.to_tokens("w3").tolist() == [[0, 3]]
    assert capsys.readouterr().out.count("self-check ok") == 2


@pytest.mark.usefixtures("house")
def test_unknown_checkpoints_and_names() -> None:
    with pytest.raises(
        FileNotFoundError, match="small-llama has no training checkpoint 'step-7'; it has step-00010, step-01000"
    ):
        load_model("small-llama@step-7")
    with pytest.raises(FileNotFoundError, match="small-gpt has no training checkpoint 'x'; it has none"):
        load_model("small-gpt@x")
    with pytest.raises(FileNotFoundError, match="did you mean the embedded model 'small-gpt'"):
        load_model("small-gtp")


@pytest.mark.usefixtures("house")
def test_an_embedded_name_goes_before_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(saved("neox"), elsewhere / "small-gpt")
    monkeypatch.chdir(elsewhere)
    assert load_model("small-gpt", check=False).cfg.architecture == "GPT2LMHeadModel"
    assert load_model("./small-gpt", check=False).cfg.architecture == "GPTNeoXForCausalLM"


def test_a_missing_house_is_an_empty_list_and_a_directed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "interp" / "models" / "embedded.py"))
    with pytest.raises(FileNotFoundError, match="reinstall the package, or train them"):
        embedded.data_dir()
    assert embedded.list_models().empty
    for home in ("data", "interp/_data"):  # the installed package goes first
        (tmp_path / home / "models").mkdir(parents=True)
        assert embedded.data_dir() == tmp_path / home


def test_listing_imports_no_torch() -> None:
    code = "import sys, interp; interp.list_models(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
