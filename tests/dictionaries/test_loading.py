"""Files: our own and those of SAELens 6.54.12, read and written, and refused when they are not what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from interp.dictionaries.architectures import ARCHITECTURES
from interp.dictionaries.loading import load_dictionary, save_dictionary
from interp.dictionaries.topk import TopKSAE
from tests.dictionaries.test_architectures import data, make
from tests.helpers import D_MODEL, tiny_bridge, tiny_tokens

GOLDEN = Path(__file__).parent / "data" / "sae_lens"
SAVED = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


def read(name: str, **options: Any) -> Any:
    return load_dictionary(GOLDEN / name, **options)


@pytest.mark.parametrize("name", SAVED)
def test_what_sae_lens_saved_encodes_and_decodes_as_there(name: str) -> None:
    """A1: within 1e-5 of its own latents and reconstructions."""
    target = {"target_hook": "blocks.0.hook_mlp_out"} if "transcoder" in name else {}
    dictionary = read(name, **target)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    with torch.no_grad():
        assert torch.allclose(dictionary.encode(expected["inputs"]), expected["latents"], atol=1e-5)
        assert torch.allclose(dictionary(expected["inputs"]), expected["reconstruction"], atol=1e-5)
    assert float(expected["latents"].abs().max()) > 0.5
    assert dictionary.hook == "blocks.0.hook_resid_pre"


@pytest.mark.parametrize("name", SAVED)
def test_what_we_write_has_its_keys_and_types(name: str, tmp_path: Path) -> None:
    target = {"target_hook": "blocks.0.hook_mlp_out"} if "transcoder" in name else {}
    save_dictionary(read(name, **target), tmp_path, format="saelens")
    theirs, ours = (load_file(folder / "sae_weights.safetensors") for folder in (GOLDEN / name, tmp_path))
    assert theirs.keys() == ours.keys()
    folded = name == "topk_rescaled"  # the norms are in the weights afterwards
    for key, value in theirs.items():
        assert value.dtype == ours[key].dtype and value.shape == ours[key].shape
        assert folded or torch.equal(value, ours[key]), key
    old, new = (json.loads((folder / "cfg.json").read_text()) for folder in (GOLDEN / name, tmp_path))
    assert set(old) <= set(new)
    same = set(old) - {"metadata", "rescale_acts_by_decoder_norm"}
    assert {key: old[key] for key in same} == {key: new[key] for key in same}
    again = load_dictionary(tmp_path, **target)
    x = load_file(GOLDEN / name / "expected.safetensors")["inputs"]
    with torch.no_grad():
        assert torch.allclose(again(x), read(name, **target)(x), atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("format", ["interp", "saelens"])
def test_every_architecture_survives_a_file(architecture: str, format: Any, tmp_path: Path) -> None:
    dictionary = make(architecture, normalisation="mean_norm", hook="blocks.0.hook_mlp_out")
    save_dictionary(dictionary, tmp_path, format=format)
    again = load_dictionary(tmp_path)
    x = data(5)
    with torch.no_grad():
        exact = format == "interp"
        assert torch.allclose(again.encode(x), dictionary.encode(x), atol=0 if exact else 1e-5, rtol=0)
        assert torch.allclose(again(x), dictionary(x), atol=0 if exact else 1e-5, rtol=0)
    assert again.hook == dictionary.hook
    if format == "interp":
        assert again.settings() == dictionary.settings() and type(again) is type(dictionary)
    elif architecture in ("batch_topk", "matryoshka", "mutual_choice", "feature_choice"):
        assert again.architecture == "jumprelu"


def test_settings_of_older_versions_are_understood(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "topk", tmp_path / "old")
    config = {
        "d_in": 16, "d_sae": 32, "dtype": "torch.float32", "hook_point": "blocks.0.hook_resid_pre",
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "normalize_activations": False,
        "apply_b_dec_to_input": True,
    }  # fmt: skip
    (tmp_path / "old" / "cfg.json").write_text(json.dumps(config))
    x = data(1, 16)
    old, new = load_dictionary(tmp_path / "old"), read("topk")
    assert old.hook == new.hook and torch.equal(old(x), new(x))
    (tmp_path / "old" / "cfg.json").write_text(json.dumps({**config, "activation_fn_str": "tanh-relu"}))
    with pytest.raises(ValueError, match="'tanh-relu' is unknown"):
        load_dictionary(tmp_path / "old")
    shutil.copytree(GOLDEN / "jumprelu", tmp_path / "log")
    weights = load_file(tmp_path / "log" / "sae_weights.safetensors")
    weights["log_threshold"] = weights.pop("threshold").log()
    save_file(weights, tmp_path / "log" / "sae_weights.safetensors")
    assert torch.allclose(load_dictionary(tmp_path / "log")(x), read("jumprelu")(x), atol=1e-5)


def broken(tmp_path: Path, config: dict[str, Any] | None = None, **weights: Any) -> Path:
    folder = tmp_path / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(GOLDEN / "standard", folder)
    if config is not None:
        (folder / "cfg.json").write_text(json.dumps({**json.loads((folder / "cfg.json").read_text()), **config}))
    tensors = load_file(folder / "sae_weights.safetensors")
    for name, change in weights.items():
        tensors[name] = change(tensors[name]) if name in tensors else change(None)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def test_files_that_are_not_what_they_say_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"W_enc .* is \(32, 16\), .*looks transposed"):
        load_dictionary(broken(tmp_path, W_enc=lambda w: w.T))
    with pytest.raises(ValueError, match=r"architecture 'temporal': .* tokens before it; readable are standard"):
        load_dictionary(broken(tmp_path, {"architecture": "temporal"}))
    with pytest.raises(ValueError, match="normalisation 'covariance_whitening'"):
        load_dictionary(broken(tmp_path, {"normalize_activations": "covariance_whitening"}))
    with pytest.raises(ValueError, match="scaling_factor from 3 to 3"):
        load_dictionary(broken(tmp_path, scaling_factor=lambda _: torch.full((32,), 3.0)))
    assert load_dictionary(broken(tmp_path, scaling_factor=lambda _: torch.ones(32))).n_latents == 32
    with pytest.raises(ValueError, match=r"unknown \['threshold'\]"):
        load_dictionary(broken(tmp_path, threshold=lambda _: torch.ones(32)))
    folder = broken(tmp_path)
    (folder / "sae_weights.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged"):
        load_dictionary(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(ValueError, match="no known format .found: expected"):
        load_dictionary(folder)
    with pytest.raises(FileNotFoundError, match="nothing at"):
        load_dictionary(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is for transcoders"):
        read("standard", target_hook="blocks.0.hook_mlp_out")


def test_dictionaries_that_sae_lens_lacks_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    transcoder = make("topk", hook="a", target_hook="b", d_out=5)
    with pytest.raises(ValueError, match="no topk transcoders"):
        save_dictionary(transcoder, tmp_path / "new", format="saelens")
    with pytest.raises(ValueError, match="no threshold yet"):
        save_dictionary(ARCHITECTURES["batch_topk"](6, 8, k=2), tmp_path / "new", format="saelens")
    assert not (tmp_path / "new").exists()


def test_a_model_tells_a_wrong_hook_and_a_transposed_square(tmp_path: Path) -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    sae = TopKSAE(D_MODEL, D_MODEL, k=D_MODEL, hook="blocks.1.hook_mlp_out")
    with torch.no_grad():  # an orthogonal matrix and its inverse, whose negative parts are cut by b_enc
        q = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(0)))[0]
        sae.W_enc.copy_(q)
        sae.W_dec.copy_(q.T)
        sae.b_enc.fill_(100.0)
        sae.b_dec.copy_(-100 * q.T.sum(0))
        sae.subtract_bias = False
    save_dictionary(sae, tmp_path / "right")
    good = load_dictionary(tmp_path / "right", bridge=bridge, tokens=tokens)
    assert good.metadata["check"]["fvu"] < 1e-4 and good.metadata["check"]["l0"] == D_MODEL
    with torch.no_grad():
        sae.W_enc.copy_(q.T)
    save_dictionary(sae, tmp_path / "turned")
    with pytest.raises(ValueError, match="does not rebuild .*wrong hook, orientation"):
        load_dictionary(tmp_path / "turned", bridge=bridge, tokens=tokens)
    with pytest.raises(ValueError, match="another model or hook"):
        load_dictionary(tmp_path / "right", hook="blocks.1.mlp.hook_post", bridge=bridge, tokens=tokens)
    with pytest.raises(KeyError, match="blocks.7"):
        load_dictionary(tmp_path / "right", hook="blocks.7.hook_mlp_out", bridge=bridge, tokens=tokens)
    with pytest.raises(ValueError, match="both a bridge and tokens"):
        load_dictionary(tmp_path / "right", bridge=bridge)
