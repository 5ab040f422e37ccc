"""Files of other libraries: what SAELens reads from them, formulas written out for each layout, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.cache import capture
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.loading import load_dictionary, save_dictionary
from tests.dictionaries.foreign_files import CASES, D_IN, N_LATENTS, arrays, contents, draws, place, write
from tests.helpers import D_MODEL, FAMILIES, tiny_bridge, tiny_model, tiny_tokens

H, T = "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out"
Arrays = dict[str, np.ndarray]


def outputs(dictionary: Dictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return dictionary.encode(x), dictionary(x)


@pytest.mark.parametrize("case", CASES)
def test_as_sae_lens_reads_it(case: str, tmp_path: Path) -> None:
    """A2: latents and reconstructions within 1e-5 of SAELens 6.54.12, the format found by itself."""
    dictionary = load_dictionary(place(case, tmp_path))
    expected = arrays(case)
    latents, rebuilt = outputs(dictionary, expected["expected/inputs"])
    assert torch.allclose(latents, expected["expected/latents"], atol=1e-5)
    reconstruction = expected["expected/reconstruction"]
    if case == "gemma_scope_embedding":  # there b_dec stays in units of the embeddings before they are multiplied
        b_dec = expected[next(name for name in expected if name.endswith("/b_dec"))]
        reconstruction = reconstruction + (D_IN**0.5 - 1) * b_dec
    assert torch.allclose(rebuilt, reconstruction, atol=1e-5)
    assert torch.allclose(outputs(dictionary.folded(), expected["expected/inputs"])[1], reconstruction, atol=1e-5)
    assert 0.5 < float((latents != 0).sum(1).float().mean()) < N_LATENTS - 1
    assert case.startswith(dictionary.metadata["format"])
    again = load_dictionary(save_dictionary(dictionary, tmp_path / "again", format="saelens"))
    assert torch.allclose(outputs(again, expected["expected/inputs"])[1], reconstruction, atol=1e-5)
    # SAELens names the stream before the norm; the file says the norm's output
    moved = {"blocks.2.hook_mlp_in": "blocks.2.mlp.hook_in"}
    assert dictionary.hook == moved.get(CASES[case]["hook"], CASES[case]["hook"])
    assert dictionary.is_transcoder == ("transcoder" in case or case == "circuit_tracer")


# Formulas written out for each layout, from the arrays as they lie in the files.


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def best(x: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros_like(x)
    for row, out in zip(x, kept, strict=True):
        chosen = np.argsort(-row)[:k]
        out[chosen] = row[chosen]
    return kept


def jump(x: np.ndarray, threshold: np.ndarray | float) -> np.ndarray:
    return np.where(x > threshold, relu(x), 0)


def gemma_scope(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    f = jump(x @ a["w_enc"] + a["b_enc"], a["threshold"])
    return f, f @ a["w_dec"] + a["b_dec"] + (x @ a["affine_skip_connection"] if "affine_skip_connection" in a else 0)


def llama_scope(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = 8**0.5 / 1.7
    f = jump(scale * x @ a["encoder.weight"].T + a["encoder.bias"], 0.3 * scale)
    return f, (f @ a["decoder.weight"].T + a["decoder.bias"]) / scale


def llama_scope_with_norms(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    norms = np.linalg.norm(a["decoder.weight"], axis=0)
    into, out = 8**0.5 / 2.5, 8**0.5 / 0.9
    pre = into * x @ a["encoder.weight"].T + a["encoder.bias"]
    f = np.where(pre * norms / out > 0.25, pre, 0)
    return f, (f @ a["decoder.weight"].T + a["decoder.bias"]) / out


def auto_encoder(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    f = relu((x - a["bias"]) @ a["encoder.weight"].T + a["encoder.bias"])
    return f, f @ a["decoder.weight"].T + a["bias"]


def auto_encoder_new(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    f = relu(x @ a["encoder.weight"].T + a["encoder.bias"])
    return f, f @ a["decoder.weight"].T + a["decoder.bias"]


def gated(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pre = (x - a["decoder_bias"]) @ a["encoder.weight"].T
    f = np.where(pre + a["gate_bias"] > 0, relu(np.exp(a["r_mag"]) * pre + a["mag_bias"]), 0)
    return f, f @ a["decoder.weight"].T + a["decoder_bias"]


def top_k(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    f = best(relu((x - a["b_dec"]) @ a["encoder.weight"].T + a["encoder.bias"]), 4)
    return f, f @ a["decoder.weight"].T + a["b_dec"]


def batch_top_k(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    f = jump((x - a["b_dec"]) @ a["encoder.weight"].T + a["encoder.bias"], float(a["threshold"]))
    return f, f @ a["decoder.weight"].T + a["b_dec"]


def jump_relu(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    f = jump(x @ a["W_enc"] + a["b_enc"], a["threshold"])
    return f, f @ a["W_dec"] + a["b_dec"]


def matryoshka(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    f = jump((x - a["b_dec"]) @ a["W_enc"] + a["b_enc"], float(a["threshold"]))
    return f, f @ a["W_dec"] + a["b_dec"]


def backup(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As in training, on normalised activations; the latents of a finished file are larger by the constant."""
    f, rebuilt = batch_top_k(a, x / 3.0)
    return 3.0 * f, 3.0 * rebuilt


def sparsify(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    f = best(relu((x - a["b_dec"]) @ a["encoder.weight"].T + a["encoder.bias"]), 3)
    return f, f @ a["W_dec"] + a["b_dec"]


def sparsify_transcoder(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    f = best(relu(x @ a["encoder.weight"].T + a["encoder.bias"]), 3)
    return f, f @ a["W_dec"] + a["b_dec"] + (x @ a["W_skip"].T if "W_skip" in a else 0)


def hook_z(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    f = relu((x - a["b_dec"]) @ a["W_enc"] + a["b_enc"])
    return f, f @ a["W_dec"] + a["b_dec"]


def circuit_tracer(a: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    pre = x @ a["W_enc"].T + a["b_enc"]
    f = jump(pre, a["activation_function.threshold"]) if "activation_function.threshold" in a else relu(pre)
    return f, f @ a["W_dec"] + a["b_dec"] + (x @ a["W_skip"].T if "W_skip" in a else 0)


D = "dictionary_learning_"
AS_SAE_LENS: dict[str, Any] = {
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope,
    "gemma_scope_2_transcoder": gemma_scope,
    "llama_scope": llama_scope,
    f"{D}AutoEncoder": auto_encoder,
    f"{D}GatedAutoEncoder": gated,
    f"{D}AutoEncoderTopK": top_k,
    f"{D}BatchTopKSAE": batch_top_k,
    f"{D}JumpReluAutoEncoder": jump_relu,
    f"{D}MatryoshkaBatchTopKSAE": matryoshka,
    "hook_z": hook_z,
    "circuit_tracer": circuit_tracer,
}


def linears(seed: int, **others: tuple[int, ...]) -> dict[str, Tensor]:
    shapes = {"encoder__weight": (N_LATENTS, D_IN), "encoder__bias": (N_LATENTS,)}
    return draws(seed, **shapes, **others)


def sparse_coder(seed: int, **others: tuple[int, ...]) -> dict[str, Tensor]:
    return linears(seed, W_dec=(N_LATENTS, D_IN), b_dec=(D_IN,), **others)


def llama_files(place_in: str, place_out: str) -> dict[str, Any]:
    config = {
        "d_model": D_IN, "d_sae": N_LATENTS, "hook_point_in": place_in, "hook_point_out": place_out,
        "act_fn": "jumprelu", "jump_relu_threshold": 0.25, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 2.5, "out": 0.9}, "sparsity_include_decoder_norm": True,
    }  # fmt: skip
    weights = linears(1, decoder__weight=(D_IN, N_LATENTS), decoder__bias=(D_IN,))
    return {"L1/hyperparams.json": config, "L1/checkpoints/final.safetensors": weights}


def backup_file() -> dict[str, Any]:
    ae = linears(2, decoder__weight=(D_IN, N_LATENTS), b_dec=(D_IN,))
    ae |= {"k": torch.tensor(4), "threshold": torch.tensor(0.2)}
    config = {"dict_class": "BatchTopKSAE", "layer": 1, "submodule_name": "resid_post_layer_1", "steps": None}
    optimizer = {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]}
    return {"run/ae.pt": {"step": 700, "ae": ae, "optimizer": optimizer, "config": config, "norm_factor": 3.0}}


def coder_files(folder: str, tensors: dict[str, Tensor], **config: Any) -> dict[str, Any]:
    settings = {"activation": "topk", "d_in": D_IN, "expansion_factor": 32, "num_latents": N_LATENTS, "k": 3, **config}
    return {f"{folder}/cfg.json": settings, f"{folder}/sae.safetensors": tensors}


YAML = 'model_kind: set\nfeature_input_hook: "mlp.hook_in"  \nfeature_output_hook: mlp.hook_out\nscan:\n- x\n'
TRANSCODER: dict[str, tuple[int, ...]] = {
    "W_enc": (N_LATENTS, D_IN), "W_dec": (N_LATENTS, D_IN), "b_enc": (N_LATENTS,), "b_dec": (D_IN,),
}  # fmt: skip
OTHERS: dict[str, tuple[dict[str, Any], str, Any, str]] = {  # files, what is loaded, formula, hook
    "llama_scope_norms": (llama_files("blocks.1.hook_a", "blocks.1.hook_a"), "L1", llama_scope_with_norms, "hook_a"),
    "llama_scope_transcoder": (
        llama_files("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"),
        "L1/checkpoints/final.safetensors",
        llama_scope_with_norms,
        "ln2.hook_normalized",
    ),
    "dictionary_learning_backup": (backup_file(), "run/ae.pt", backup, "hook_resid_post"),
    "dictionary_learning_new": (
        {"run/ae.pt": linears(3, decoder__weight=(D_IN, N_LATENTS), decoder__bias=(D_IN,))},
        "run",
        auto_encoder_new,
        "",
    ),
    "sparsify": (coder_files("layers.1", sparse_coder(4)), "layers.1", sparsify, "hook_resid_post"),
    "sparsify_mlp": (
        coder_files("h.1.mlp", sparse_coder(5), num_latents=0, expansion_factor=2.5),
        "h.1.mlp/sae.safetensors",
        sparsify,
        "mlp.hook_out",
    ),
    "sparsify_transcoder": (
        coder_files("gpt_neox.layers.1.mlp", sparse_coder(6), transcode=True),
        "gpt_neox.layers.1.mlp",
        sparsify_transcoder,
        "mlp.hook_in",
    ),
    "sparsify_skip": (
        coder_files("layers.1.mlp", sparse_coder(7, W_skip=(D_IN, D_IN)), transcode=True, skip_connection=True),
        "layers.1.mlp",
        sparsify_transcoder,
        "mlp.hook_in",
    ),
    "circuit_tracer_jump": (
        {
            "set/config.yaml": YAML,
            "set/layer_1.safetensors": draws(
                8, **TRANSCODER, W_skip=(D_IN, D_IN), activation_function__threshold=(N_LATENTS,)
            ),
        },
        "set/layer_1.safetensors",
        circuit_tracer,
        "mlp.hook_in",
    ),
}


def check(dictionary: Dictionary, tensors: dict[str, Tensor], formula: Any, x: Tensor) -> None:
    latents, rebuilt = outputs(dictionary, x)
    expected = formula({name: tensor.double().numpy() for name, tensor in tensors.items()}, x.double().numpy())
    assert np.abs(latents.double().numpy() - expected[0]).max() < 1e-5
    assert np.abs(rebuilt.double().numpy() - expected[1]).max() < 1e-5
    assert 0.5 < (expected[0] != 0).sum(1).mean() < N_LATENTS - 1


@pytest.mark.parametrize("case", AS_SAE_LENS)
def test_as_the_formula_says_of_what_sae_lens_reads(case: str, tmp_path: Path) -> None:
    tensors = next(c for c in contents(case).values() if isinstance(c, dict) and "arrays" not in c and is_tensors(c))
    check(load_dictionary(place(case, tmp_path)), tensors, AS_SAE_LENS[case], arrays(case)["expected/inputs"])


def is_tensors(content: dict[str, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in content.values())


@pytest.mark.parametrize("case", OTHERS)
def test_as_the_formula_says(case: str, tmp_path: Path) -> None:
    files, loads, formula, hook = OTHERS[case]
    write(tmp_path, files)
    dictionary = load_dictionary(tmp_path / loads)
    tensors = next(iter(files.values())) if case.startswith("dictionary") else list(files.values())[-1]
    x = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(9))
    check(dictionary, tensors.get("ae", tensors), formula, x)
    assert dictionary.hook == (f"blocks.1.{hook}" if hook else "")
    targets = {"llama_scope_transcoder": "blocks.1.hook_mlp_out"}
    assert dictionary.target_hook == targets.get(case, T if hook == "mlp.hook_in" else None)
    if case == "dictionary_learning_backup":
        assert dictionary.metadata["backup_step"] == 700 and dictionary.metadata["norm_factor"] == 3.0


def test_a_batch_top_k_without_threshold_raises_where_the_others_let_all_through(tmp_path: Path) -> None:
    files = backup_file()
    files["run/ae.pt"]["ae"]["threshold"] = torch.tensor(-1.0)
    write(tmp_path, files)
    with pytest.raises(ValueError, match="no threshold yet"):
        load_dictionary(tmp_path / "run").encode(torch.zeros(1, D_IN))


def test_places_that_only_a_path_or_the_caller_knows(tmp_path: Path) -> None:
    file = tmp_path / "somewhere" / "any.npz"
    write(tmp_path, {"somewhere/any.npz": next(iter(contents("gemma_scope").values()))})
    assert load_dictionary(file).hook == "" and not load_dictionary(file).is_transcoder
    transcoder = load_dictionary(file, hook=H, target_hook=T)
    assert (transcoder.hook, transcoder.target_hook) == (H, T)
    assert load_dictionary(place("gemma_scope", tmp_path), hook=H).hook == H
    embedding = load_dictionary(file, hook="hook_embed")  # the same as if the path had said so
    assert torch.allclose(embedding.W_enc * D_IN**0.5, load_dictionary(file).W_enc)
    named = load_dictionary(place("gemma_scope_transcoder", tmp_path))
    assert named.target_hook == "blocks.2.hook_mlp_out"
    write(tmp_path, {"alone/layer_3.safetensors": draws(1, **TRANSCODER)})
    with pytest.raises(ValueError, match="does not say where it reads and writes.*pass hook="):
        load_dictionary(tmp_path / "alone" / "layer_3.safetensors")
    assert load_dictionary(tmp_path / "alone" / "layer_3.safetensors", hook=H, target_hook=T).target_hook == T


def changed(files: dict[str, Any], settings: dict[str, Any] | None = None, **tensors: Any) -> dict[str, Any]:
    """Files with other settings, and with arrays replaced, added, or (None) left out."""
    new = {}
    for name, content in files.items():
        if isinstance(content, dict) and is_tensors(content):
            content = {k: v for k, v in {**content, **tensors}.items() if v is not None}
        elif isinstance(content, dict) and settings:
            content = {**content, **settings}
        new[name] = content
    return new


WIDE, TALL = torch.ones(D_IN, N_LATENTS), torch.ones(N_LATENTS, D_IN)
LLAMA, CODER = OTHERS["llama_scope_norms"][0], OTHERS["sparsify"][0]
HOOK_Z, GEMMA_2 = contents("hook_z"), contents("gemma_scope_2")
TRACER = {"set/config.yaml": YAML, "set/layer_1.safetensors": draws(8, **TRANSCODER)}
RUN = contents(f"{D}AutoEncoder")
SAE = contents("saelens_old_standard")
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {  # files, what is loaded, message
    "npz turned": (changed(contents("gemma_scope"), w_enc=TALL), "", r"W_enc in .* is \(20, 8\).*looks transposed"),
    "npz unknown": (changed(contents("gemma_scope"), s=torch.ones(3)), "", "no Gemma Scope file .* unknown s"),
    "npz missing": (changed(contents("gemma_scope"), threshold=None), "", "has no threshold; it has"),
    "gemma 2 turned": (changed(GEMMA_2, w_dec=WIDE), "", r"W_dec in .* is \(8, 20\).*looks transposed"),
    "gemma 2 function": (changed(GEMMA_2, {"architecture": "topk"}), "", "architecture 'topk'; .*'jump_relu'"),
    "gemma 2 many layers": (changed(GEMMA_2, w_dec=torch.ones(N_LATENTS, 3, D_IN)), "", "writes into 3 layers"),
    "gemma 2 hook": (changed(GEMMA_2, {"hf_hook_point_in": "model.norm.output"}), "", "'model.norm.output', whose"),
    "gemma 2 skip": (changed(GEMMA_2, affine_skip_connection=torch.eye(D_IN)), "", "belongs to a transcoder"),
    "llama turned": (changed(LLAMA, **{"encoder.weight": WIDE}), "L1", r"W_enc in .* is \(20, 8\).*looks transposed"),
    "llama decoder turned": (changed(LLAMA, **{"decoder.weight": TALL}), "L1", r"\(20, 8\) for 20 latents; it looks"),
    "llama function": (changed(LLAMA, {"act_fn": "prolu"}), "L1", "activation function 'prolu'; readable are jumprelu"),
    "llama glu": (changed(LLAMA, {"use_glu_encoder": True}), "L1", "has a gated linear encoder"),
    "llama norm": (changed(LLAMA, {"norm_activation": "batch-wise"}), "L1", "norm_activation 'batch-wise'"),
    "llama no norm": (changed(LLAMA, {"dataset_average_activation_norm": None}), "L1", "not their average norm"),
    "llama no bias": (changed(LLAMA, **{"decoder.bias": None}), "L1", "no decoder.bias, which hyperparams.json says"),
    "run turned": (changed(RUN, **{"encoder.weight": WIDE}), "", r"W_enc in .* is \(20, 8\).*looks transposed"),
    "run class": (changed(RUN, {"trainer": {"dict_class": "CrossCoder"}}), "", "holds a CrossCoder; readable are Auto"),
    "run other class": (changed(RUN, {"trainer": {"dict_class": "AutoEncoderTopK", "k": 2}}), "", "has no b_dec"),
    "run ambiguous": ({"ae.pt": contents(f"{D}AutoEncoderTopK")["lm_sae/AutoEncoderTopK/ae.pt"]}, ".", "fit several"),
    "run nothing": ({"ae.pt": {"pre_bias": torch.ones(3)}}, ".", "pre_bias, which fit no class"),
    "run transcoder": (changed(RUN, {"buffer": {"io": "in_and_out"}}), "", "is to be a transcoder"),
    "coder function": (changed(CODER, {"activation": "groupmax"}), "layers.1", "activation 'groupmax'; readable is"),
    "coder signed": (changed(CODER, {"signed": True}), "layers.1", "signed=True: latents of both signs"),
    "coder skip": (changed(CODER, W_skip=torch.eye(D_IN)), "layers.1", "has a skip connection, but is an autoencoder"),
    "coder turned": (changed(CODER, W_dec=WIDE), "layers.1", r"W_dec in .* is \(8, 20\).*looks transposed"),
    "coder module": ({k.replace("layers.1", "lm_head"): v for k, v in CODER.items()}, "lm_head", "'lm_head.output'"),
    "z turned": (changed(HOOK_Z, W_enc=TALL), "", r"W_enc in .* is \(20, 8\).*looks transposed"),
    "z hook": (changed(HOOK_Z, {"act_name": "blocks.1.hook_mlp_out"}), "", "'blocks.1.hook_mlp_out'; this layout is"),
    "tracer turned": (changed(TRACER, W_enc=WIDE), "set/layer_1.safetensors", r"\(20, 8\).*looks transposed"),
    "tracer folder": ({**TRACER, "set/layer_0.safetensors": draws(1, **TRANSCODER)}, "set", "holds 2 transcoders"),
    "tracer many layers": (
        {"clt/W_dec_0.safetensors": {"W_dec_0": torch.ones(N_LATENTS, 3, D_IN)}},
        "clt/W_dec_0.safetensors",
        "part of a cross-layer transcoder",
    ),
    "search": (changed(SAE, {"architecture": "matching_pursuit"}), "", "by a search, not by an encoder"),
    "signs": (changed(SAE, {"architecture": "abstopk"}), "", "latents are of both signs"),
    "head": (changed(SAE, {"hook_point_head_index": 3}), "", "is for head 3 alone"),
    "nothing known": ({"x/weights.bin.json": {"a": 1}}, "x", r"no known format \(found: weights.bin.json\); known are"),
}  # fmt: skip
DEFAULT = {
    "npz": "gemma_scope", "gemma 2": "gemma_scope_2", "run": f"{D}AutoEncoder", "z": "hook_z",
    "search": "saelens_old_standard", "signs": "saelens_old_standard", "head": "saelens_old_standard",
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_cannot_be_right_are_refused(case: str, tmp_path: Path) -> None:
    files, loads, message = REFUSED[case]
    write(tmp_path, files)
    if not loads:
        loads = CASES[next(known for prefix, known in DEFAULT.items() if case.startswith(prefix))]["loads"]
    with pytest.raises(ValueError, match=message):
        load_dictionary(tmp_path / loads)


class Trap:
    """An object whose loading creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_files_that_could_run_code_or_are_damaged_are_not_loaded(tmp_path: Path) -> None:
    torch.save({"encoder.weight": Trap(tmp_path / "sprung")}, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="can run any code"):
        load_dictionary(tmp_path)
    np.savez(tmp_path / "params.npz", w_enc=np.array([Trap(tmp_path / "sprung")], dtype=object))
    with pytest.raises(ValueError, match="objects other than arrays"):
        load_dictionary(tmp_path / "params.npz")
    assert not (tmp_path / "sprung").exists()
    for name in ("ae.pt", "params.npz", "layer_0.safetensors"):
        (tmp_path / name).write_bytes(b"torn")
        with pytest.raises(ValueError, match="damaged"):
            load_dictionary(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing at"):
        load_dictionary(tmp_path / "gone.npz")
    with pytest.raises(FileNotFoundError, match="there is no .*hyperparams|there is no .*config"):
        load_dictionary(tmp_path, format="llama_scope")


def test_a_checkpoint_of_sae_lens_brings_the_constant_of_its_normalisation(tmp_path: Path) -> None:
    files = contents("saelens_checkpoint_TopK")
    files["checkpoint/cfg.json"]["normalize_activations"] = "expected_average_only_in"
    write(tmp_path, {**files, "checkpoint/activation_scaler.json": {"scaling_factor": 2.0, "has_whitening": False}})
    scaled = load_dictionary(tmp_path / "checkpoint")
    x = arrays("saelens_checkpoint_TopK")["expected/inputs"]
    plain = load_dictionary(place("saelens_checkpoint_TopK", tmp_path / "plain"))
    assert torch.allclose(outputs(scaled, x)[0], outputs(plain, 2 * x)[0], atol=1e-5)
    assert torch.allclose(outputs(scaled, x)[1], outputs(plain, 2 * x)[1] / 2, atol=1e-5)


# On a model.


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_the_hooks_that_their_names_stand_for(family: str) -> None:
    from interp.dictionaries._foreign import hook_of_module

    model, bridge, tokens = tiny_model(family), tiny_bridge(family), tiny_tokens()
    stem = {"gpt2": "transformer.h.1", "neox": "gpt_neox.layers.1"}.get(family, "model.layers.1")
    attention = {"gpt2": "attn", "neox": "attention"}.get(family, "self_attn")
    embed = {"gpt2": "transformer.wte", "neox": "gpt_neox.embed_in"}.get(family, "model.embed_tokens")
    points = [
        f"{stem}.output",
        f"{stem}.mlp.input",
        f"{stem}.mlp.output",
        f"{stem}.{attention}.output",
        f"{embed}.output",
    ]
    if family in ("llama", "gemma2"):
        points.append(f"{stem}.self_attn.o_proj.input")
    if family == "gemma2":
        points += [f"{stem}.pre_feedforward_layernorm.output", f"{stem}.post_feedforward_layernorm.output"]
    seen: dict[str, Tensor] = {}

    def keep(point: str) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            value = inputs[0] if point.endswith("input") else output
            seen[point] = value[0] if isinstance(value, tuple) else value

        return hook

    for point in points:
        model.get_submodule(point.rsplit(".", 1)[0]).register_forward_hook(keep(point))
    with torch.no_grad():
        model(tokens)
    for point in points:
        name = hook_of_module(point, Path("cfg.json"))
        found = capture(bridge, tokens, [name])
        assert torch.allclose(next(iter(found.values())).flatten(2), seen[point], atol=1e-5), point


def heads_out(family: str) -> tuple[Any, Tensor, Tensor]:
    """A model, texts, and the matrix [d_model, d_model] from the heads' outputs to those of attention."""
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    matrix = tiny_model(family).get_submodule("model.layers.1.self_attn.o_proj").weight
    return bridge, tokens, matrix.detach()  # [out, in]


def test_a_model_tells_square_matrices_turned_round(tmp_path: Path) -> None:
    """A skip connection is square whatever else is; here it does all the work, and the latents none."""
    bridge, tokens, matrix = heads_out("llama")
    shapes = {"encoder__weight": (5, D_MODEL), "encoder__bias": (5,), "W_dec": (5, D_MODEL), "b_dec": (D_MODEL,)}
    silent = {name: torch.zeros_like(tensor) for name, tensor in draws(0, **shapes).items()}
    settings = {"d_in": D_MODEL, "num_latents": 5, "transcode": True, "skip_connection": True}
    places = {
        "hook": "blocks.1.attn.hook_z",
        "target_hook": "blocks.1.hook_attn_out",
        "bridge": bridge,
        "tokens": tokens,
    }
    write(tmp_path, coder_files("layers.1.mlp", {**silent, "W_skip": matrix}, **settings))
    good = load_dictionary(tmp_path / "layers.1.mlp", **places)
    assert good.metadata["check"]["fvu"] < 1e-8 and good.metadata["check"]["l0"] == 0
    write(tmp_path, coder_files("layers.1.mlp", {**silent, "W_skip": matrix.T}, **settings))
    with pytest.raises(ValueError, match=r"FVU .* it would pass with W_skip transposed \(FVU"):
        load_dictionary(tmp_path / "layers.1.mlp", **places)
    with pytest.raises(ValueError, match="does not rebuild 'blocks.0.hook_attn_out'"):
        load_dictionary(tmp_path / "layers.1.mlp", **{**places, "target_hook": "blocks.0.hook_attn_out"}, max_fvu=0.5)


def orthogonal() -> Tensor:
    return torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(0)))[0]


def test_a_square_encoder_turned_round_is_found_out(tmp_path: Path) -> None:
    q = orthogonal()
    weights = {"W_enc": q, "W_dec": q.T, "b_enc": torch.full((D_MODEL,), 50.0), "threshold": torch.zeros(D_MODEL)}
    weights["b_dec"] = -50 * q.T.sum(0)  # every latent is on, and their sum is the input
    options = {"hook": "blocks.1.hook_resid_post", "bridge": tiny_bridge("llama"), "tokens": tiny_tokens()}
    write(tmp_path, {"params.npz": weights})
    check = load_dictionary(tmp_path, **options).metadata["check"]
    assert check["fvu"] < 1e-4 and check["l0"] == D_MODEL
    write(tmp_path, {"params.npz": {**weights, "W_enc": q.T}})
    with pytest.raises(ValueError, match=r"it would pass with W_enc transposed \(FVU [^)]*\)$|W_dec transposed"):
        load_dictionary(tmp_path, **options, max_fvu=0.5)
    write(tmp_path, {"params.npz": {**weights, "W_enc": 3 * torch.flip(q, (1,))}})
    with pytest.raises(ValueError, match="looks like this$"):  # turning helps nothing
        load_dictionary(tmp_path, **options, max_fvu=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_outputs_are_checked_on_every_family(family: str, tmp_path: Path) -> None:
    bridge, tokens, q = tiny_bridge(family), tiny_tokens(), orthogonal()
    weights = {"W_enc": torch.cat((q, -q), 1), "W_dec": torch.cat((q.T, -q.T)), "b_enc": torch.zeros(2 * D_MODEL)}
    weights["b_dec"] = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    config = {"act_name": "blocks.1.attn.hook_z", "act_size": D_MODEL, "dict_size": 2 * D_MODEL}
    write(tmp_path, {"z.pt": weights, "z_cfg.json": config})
    found = load_dictionary(tmp_path / "z.pt", bridge=bridge, tokens=tokens)
    assert found.metadata["check"]["fvu"] < 1e-6 and found.metadata["check"]["l0"] == pytest.approx(D_MODEL)
    write(tmp_path, {"z_cfg.json": {**config, "act_name": "blocks.9.attn.hook_z"}})
    with pytest.raises(KeyError, match=r"blocks\.9"):
        load_dictionary(tmp_path / "z.pt", bridge=bridge, tokens=tokens)


def test_a_transcoder_must_say_where_it_writes_before_it_is_checked(tmp_path: Path) -> None:
    files = contents("saelens_old_standard")
    files["old/cfg.json"] |= {"architecture": "transcoder", "d_out": D_IN, "apply_b_dec_to_input": False}
    files["old/sae_weights.safetensors"].pop("scaling_factor")
    write(tmp_path, files)
    assert load_dictionary(tmp_path / "old").target_hook == ""
    with pytest.raises(ValueError, match="does not say which hook its transcoder rebuilds; pass target_hook"):
        load_dictionary(tmp_path / "old", bridge=tiny_bridge("llama"), tokens=tiny_tokens())
