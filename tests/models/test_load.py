"""Every way in gives the same frozen model, and every trap on the way is an error that says what to do."""

from __future__ import annotations

import copy
import functools
import json
import socket
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import interp
from interp.models import load_model
from tests.helpers import FAMILIES, MORE_FAMILIES, tiny_bridge, tiny_model, tiny_tokenizer, tiny_tokens

ALL = FAMILIES + MORE_FAMILIES


@functools.cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def saved(family: str) -> Path:
    """The directory of a tiny model with its tokenizer, as save_pretrained writes it."""
    directory = Path(_kept().name) / family
    tiny_model(family).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def damaged(tmp_path: Path, *, without: str = "", family: str = "llama") -> Path:
    """A copy of a model directory from which the files that start so are missing."""
    for path in saved(family).iterdir():
        if not (without and path.name.startswith(without)):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("family", ALL)
def test_directory_route_gives_the_plain_models_logits(family: str) -> None:
    bridge, tokens = load_model(saved(family), check=False), tiny_tokens()
    with torch.no_grad():
        expected = tiny_model(family)(tokens).logits.log_softmax(-1)
        torch.testing.assert_close(bridge(tokens).log_softmax(-1), expected, atol=2e-5, rtol=0)
    assert not any(module.training for module in bridge.original_model.modules())
    assert not any(parameter.requires_grad for parameter in bridge.parameters())


@pytest.mark.parametrize("family", ALL)
def test_memory_route_gives_the_plain_models_logits_and_leaves_it_alone(family: str) -> None:
    model, tokens = tiny_model(family).train(), tiny_tokens()
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    attention = model.config._attn_implementation
    bridge = load_model(model, tokenizer=tiny_tokenizer(), check=False)
    with torch.no_grad():
        expected = tiny_model(family)(tokens).logits.log_softmax(-1)
        torch.testing.assert_close(bridge(tokens).log_softmax(-1), expected, atol=2e-5, rtol=0)
        bridge.original_model.get_input_embeddings().weight.zero_()
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert [type(module) for module in model.modules()] == kinds
    assert model.config._attn_implementation == attention
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not bridge.training


def test_paths_as_text_relative_and_with_a_deceptive_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory called like an alias in TransformerLens becomes a hub id if its bare name gets that far."""
    home = tmp_path / "gpt2-small"
    home.mkdir()
    damaged(home, family="gpt2")
    monkeypatch.chdir(tmp_path)
    for source in ("gpt2-small", "./gpt2-small", str(home), Path("gpt2-small")):
        bridge = load_model(source, check=False)
        assert bridge.cfg.d_model == 32 and bridge.cfg.model_name == "gpt2-small"


def test_loading_a_directory_touches_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection was tried: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert interp.self_check(load_model(saved("llama"), check=False)).ok


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("tokenizer", r"has no tokenizer files .*; it holds .*config.json.*pass tokenizer="),
        ("config.json", r"has no config.json; it holds .*model.safetensors.*save_pretrained"),
        ("model", r"has a config.json but no weights"),
    ],
)
def test_a_directory_with_a_part_missing_is_refused(tmp_path: Path, without: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        load_model(damaged(tmp_path, without=without))


def test_other_things_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no directory .*nowhere"):
        load_model(tmp_path / "nowhere")
    directory = damaged(tmp_path)
    with pytest.raises(ValueError, match="is a file; pass the directory"):
        load_model(directory / "model.safetensors")
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="placeholder of git-lfs, not weights; run `git lfs pull`"):
        load_model(directory)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="names 2 shards, missing model-00002-of-00002.safetensors"):
        load_model(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(ValueError, match=r"encoder-decoder model \(t5\)"):
        load_model(directory)
    (directory / "config.json").rename(directory / "adapter_config.json")
    with pytest.raises(ValueError, match="holds an adapter, not a model; merge it"):
        load_model(directory)


def test_objects_that_are_no_model_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot load a int; expected an embedded name"):
        load_model(3)
    with pytest.raises(ValueError, match="is wrapped in a bridge already"):
        load_model(tiny_bridge("llama"))
    with pytest.raises(ValueError, match="is wrapped in a bridge already"):
        load_model(tiny_bridge("llama").original_model, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="no unembedding.*AutoModelForCausalLM"):
        load_model(tiny_model("llama").model, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="Linear is no causal language model"):
        load_model(torch.nn.Linear(2, 2), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="has no tokenizer; pass tokenizer="):
        load_model(tiny_model("llama"))


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    home, directory = tmp_path / "tokenizer", tmp_path / "model"
    directory.mkdir()
    damaged(directory, without="tokenizer")
    tiny_tokenizer().save_pretrained(home)
    for tokenizer in (tiny_tokenizer(), home, str(home)):
        bridge = load_model(directory, tokenizer=tokenizer, check=False)
        assert bridge.to_tokens("w5 w6").tolist() == [[0, 5, 6]]
    with pytest.raises(FileNotFoundError, match="holds no tokenizer files"):
        load_model(directory, tokenizer=directory)
    with pytest.raises(ValueError, match="tokenizer is a dict; expected a transformers tokenizer or a directory"):
        load_model(directory, tokenizer={})


@pytest.mark.parametrize("source", ["memory", "hub", "bare"])
def test_tokenizers_made_in_memory_or_named_after_a_hub_model(source: str) -> None:
    """TransformerLens reloads a tokenizer from where it came from: nowhere, or the hub."""
    raw = tiny_tokenizer().backend_tokenizer
    if source == "bare":  # neither end nor padding token: TransformerLens would add one past the vocabulary
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", unk_token="<unk>")
    else:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, bos_token="<bos>", eos_token="<bos>", pad_token="<pad>"
        )
    if source == "hub":
        tokenizer.init_kwargs["name_or_path"] = "nobody/nothing"
    kept = dict(tokenizer.init_kwargs), tokenizer.eos_token, len(tokenizer)
    bridge = load_model(tiny_model("gpt2"), tokenizer=tokenizer, check=False)
    assert bridge.to_tokens("w5 w6").tolist() == [[0, 5, 6]]
    assert bridge.to_string(bridge.to_tokens("w5 w6")[0, 1:]) == "w5 w6"
    assert max(bridge.tokenizer.get_vocab().values()) < 60
    assert (dict(tokenizer.init_kwargs), tokenizer.eos_token, len(tokenizer)) == kept  # the caller's is untouched


def test_bos_is_added_once_whatever_the_tokenizer_does_itself(tmp_path: Path) -> None:
    directory = damaged(tmp_path)
    for adds in (True, False):
        tokenizer = AutoTokenizer.from_pretrained(directory, add_bos_token=adds)
        bridge = load_model(directory, tokenizer=tokenizer, check=False)
        assert bridge.to_tokens("w3 w4").tolist() == [[0, 3, 4]], adds


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.float32), ("bfloat16", torch.bfloat16), ("fp16", torch.float16), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize("route", ["directory", "memory"])
def test_dtype_is_applied_and_recorded(dtype, expected: torch.dtype, route: str) -> None:
    model = tiny_model("llama")
    source = saved("llama") if route == "directory" else model
    bridge = load_model(source, tokenizer=tiny_tokenizer(), dtype=dtype, check=False)
    assert {parameter.dtype for parameter in bridge.original_model.parameters()} == {expected}
    assert bridge.cfg.dtype == expected
    rotary = [buffer for name, buffer in bridge.original_model.named_buffers() if "inv_freq" in name]
    assert rotary and {buffer.dtype for buffer in rotary} == {torch.float32}  # angles in half precision would be wrong
    assert next(model.parameters()).dtype == torch.float32
    assert bridge(tiny_tokens()).dtype == expected


def test_a_model_in_memory_keeps_its_own_dtype_and_the_record_says_so() -> None:
    bridge = load_model(tiny_model("gpt2", dtype=torch.bfloat16), tokenizer=tiny_tokenizer(), check=False)
    assert bridge.cfg.dtype == torch.bfloat16
    assert interp.models.provenance(bridge)["dtype"] == "bfloat16"


def test_options_that_cannot_be_honoured_raise_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype='float7' is not known; expected one of float32"):
        load_model(tmp_path, dtype="float7")
    with pytest.raises(ValueError, match="int8 is not a floating-point type"):
        load_model(tmp_path, dtype=torch.int8)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device is available here"):
            load_model(tmp_path, device="cuda")
    with pytest.raises(RuntimeError, match="device"):
        load_model(tmp_path, device="gpu0")


@pytest.mark.parametrize("family", ALL)
def test_processed_weights_give_the_same_predictions_and_are_recorded(family: str) -> None:
    tokens = tiny_tokens()
    raw, folded = load_model(saved(family), check=False), load_model(saved(family), processed=True, check=False)
    with torch.no_grad():
        torch.testing.assert_close(folded(tokens).log_softmax(-1), raw(tokens).log_softmax(-1), atol=2e-5, rtol=0)
    assert interp.models.provenance(raw)["weights_state"] == "raw"
    assert interp.models.provenance(folded)["weights_state"] == "processed"
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert not folded.training


def test_processing_folds_the_final_norm() -> None:
    folded = load_model(saved("llama"), processed=True, check=False)
    raw = load_model(saved("llama"), check=False)
    assert not torch.allclose(folded.W_U, raw.W_U)
    gain = (
        raw.original_model.model.norm.weight
        if hasattr(raw.original_model.model.norm, "weight")
        else raw.ln_final.weight
    )
    expected = raw.W_U * gain[:, None]
    torch.testing.assert_close(folded.W_U, expected - expected.mean(-1, keepdim=True), atol=1e-5, rtol=0)


def test_one_line_is_printed_and_only_if_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    load_model(saved("gemma2"))
    out, err = capfd.readouterr()
    assert out.count("\n") == 1 and err == ""
    assert out.startswith("gemma2: 3 layers, d_model 32, 4 heads on 2 key-value heads, RMSNorm before and after")
    assert "self-check ok" in out
    load_model(saved("gemma2"), check=False, processed=True)
    assert capfd.readouterr().out == ""


def test_the_progress_bars_of_transformers_are_as_they_were() -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    try:
        for wanted in (True, False):
            (logging.enable_progress_bar if wanted else logging.disable_progress_bar)()
            load_model(saved("gpt2"))
            assert logging.is_progress_bar_enabled() == wanted
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_a_model_that_was_differentiated_can_be_wrapped() -> None:
    model = tiny_model("gpt2").train()
    model(tiny_tokens()).logits.sum().backward()
    bridge = load_model(model, tokenizer=tiny_tokenizer(), check=False)
    assert all(parameter.grad is None for parameter in bridge.original_model.parameters())
    assert next(model.parameters()).grad is not None


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_by_default_and_where_asked(family: str) -> None:
    assert next(load_model(saved(family), check=False).original_model.parameters()).device.type == "cuda"
    assert load_model(saved(family), device="cpu", check=False).W_E.device.type == "cpu"
    for dtype in ("float32", "bfloat16"):
        assert interp.self_check(load_model(saved(family), dtype=dtype, check=False)).ok
    kept = load_model(tiny_model(family), tokenizer=tiny_tokenizer(), check=False)
    assert kept.W_E.device.type == "cpu"
    assert (
        load_model(tiny_model(family), tokenizer=tiny_tokenizer(), device="cuda", check=False).W_E.device.type == "cuda"
    )
