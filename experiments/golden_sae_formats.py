"""What SAELens makes of other libraries' files: small synthetic ones of every layout that it reads, written once.

SAELens 6.54 cannot be imported beside TransformerLens 4.3, so this runs in an environment of its own:

    python -m venv peer && peer/bin/pip install sae_lens==6.54.12 transformer-lens==3.9.0
    peer/bin/python experiments/golden_sae_formats.py tests/dictionaries/data/foreign

Written are `files.json` (for every case its files, settings as they are, arrays by name; what is loaded; versions) and
`arrays.safetensors` (the arrays as `case/file/name`, and inputs, latents and reconstructions as `case/expected/...`).
No pickles are kept: the files themselves are made again from these two, by this script and by the tests.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import saes  # type: ignore[import-not-found]
from sae_lens.loading import pretrained_sae_loaders as loaders  # type: ignore[import-not-found]
from sae_lens.registry import get_sae_class  # type: ignore[import-not-found]
from safetensors.torch import save_file
from torch import Tensor

D_IN, N_LATENTS, N = 8, 20, 32
Case = dict[str, Any]
"""`loads`, the path to read; `files`, settings, text or arrays by name; `call`, SAELens' loader and its arguments, or
`sae`, which makes one from a folder; `scale`, the norm that SAELens keeps in its registry and folds in."""


def main(folder: Path) -> None:
    made_by = {package: version(package) for package in ("sae_lens", "transformer-lens", "torch")}
    record: dict[str, Any] = {"made_by": made_by, "cases": {}}
    arrays: dict[str, Tensor] = {}
    for seed, (name, case) in enumerate({**cases(), **checkpoints()}.items()):
        with tempfile.TemporaryDirectory() as place:
            write(Path(place), case["files"])
            sae = case["sae"](Path(place)) if "sae" in case else read(Path(place), *case["call"])
        if "scale" in case:
            sae.fold_activation_norm_scaling_factor(case["scale"])
        sae.turn_off_forward_pass_hook_z_reshaping()  # the inputs are flat
        x = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(100 + seed))
        with torch.no_grad():
            expected = {"inputs": x, "latents": sae.encode(x), "reconstruction": sae(x)}
        arrays |= {f"{name}/expected/{key}": value for key, value in expected.items()}
        files = {}
        for file, content in case["files"].items():
            tensors = isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values())
            files[file] = {"arrays": sorted(content)} if tensors else {"content": content}
            arrays |= {f"{name}/{file}/{key}": value for key, value in content.items()} if tensors else {}
        record["cases"][name] = {"loads": case["loads"], "hook": sae.cfg.metadata.hook_name, "files": files}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone().contiguous() for name, value in arrays.items()}, folder / "arrays.safetensors")
    (folder / "files.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write(root: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".json", ".yaml"):
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        elif path.suffix == ".npz":
            np.savez(path, **{key: value.numpy() for key, value in content.items()})
        elif path.suffix == ".safetensors":
            save_file({key: value.contiguous() for key, value in content.items()}, path)
        else:
            torch.save(content, path)


def read(root: Path, loader: str, repo: str, folder: str, overrides: dict[str, Any]) -> Any:
    """SAELens' own loader on these files, in place of a download."""

    def local(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        path = root / repo_id.split("/")[-1] / (subfolder or "") / filename
        if not path.exists():
            raise loaders.EntryNotFoundError(f"no {path}")
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {k: list(v.shape) for k, v in loaders.load_safetensors_weights(local(repo_id, filename)).items()}

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = local, shapes
    config, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader](repo, folder, "cpu", False, overrides)
    config = loaders.handle_config_defaulting(config)
    kind, settings = get_sae_class(config["architecture"])
    sae = kind(settings.from_dict(config))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    return sae


class Draws:
    """Random arrays of one case."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return 0.5 * torch.randn(*shape, generator=self.generator)

    def columns(self, names: str) -> dict[str, Tensor]:
        """Encoder [d_in, n_latents], decoder [n_latents, d_in], biases and thresholds under the given names."""
        shapes = ((D_IN, N_LATENTS), (N_LATENTS, D_IN), (N_LATENTS,), (D_IN,), (N_LATENTS,))
        found = {name: self(*shape) for name, shape in zip(names.split(), shapes, strict=False)}
        return {name: value.abs() if name == "threshold" else value for name, value in found.items()}

    def linears(self, **others: Tensor) -> dict[str, Tensor]:
        return {
            "encoder.weight": self(N_LATENTS, D_IN),
            "encoder.bias": self(N_LATENTS),
            "decoder.weight": self(D_IN, N_LATENTS),
            **others,
        }


def cases() -> dict[str, Case]:
    sizes = {"d_in": D_IN, "d_sae": N_LATENTS}
    found: dict[str, Case] = {}
    for seed, (name, repo, folder) in enumerate(
        (
            ("gemma_scope", "gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_5"),
            ("gemma_scope_attention", "gemma-scope-2b-pt-att", "layer_1/width_16k/average_l0_5"),
            ("gemma_scope_embedding", "gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"),
            ("gemma_scope_transcoder", "gemma-scope-2b-pt-transcoders", "layer_2/width_16k/average_l0_7"),
        )
    ):
        transcoder = "transcoder" in name
        names = f"{'W' if transcoder else 'w'}_enc {'W' if transcoder else 'w'}_dec b_enc b_dec threshold"
        overrides = {**sizes, "d_out": D_IN} if transcoder else {**sizes, "normalize_activations": "none"}
        found[name] = {
            "files": {f"{repo}/{folder}/params.npz": Draws(seed).columns(names)},
            "call": ("gemma_2_transcoder" if transcoder else "gemma_2", f"google/{repo}", folder, overrides),
            "loads": f"{repo}/{folder}",
        }
    lower = "w_enc w_dec b_enc b_dec threshold"
    repo, folder = "gemma-scope-2-1b-pt", "resid_post_all/layer_2_width_16k_l0_small"
    hooks = {"hf_hook_point_in": "model.layers.2.output", "hf_hook_point_out": "model.layers.2.output"}
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "width": N_LATENTS, "l0": 5}
    found["gemma_scope_2"] = {
        "files": {
            f"{repo}/{folder}/config.json": {**config, **hooks, "type": "sae"},
            f"{repo}/{folder}/params.safetensors": Draws(10).columns(lower),
        },
        "call": ("gemma_3", f"google/{repo}", folder, {}),
        "loads": f"{repo}/{folder}",
    }
    folder = "transcoder_all/layer_2_width_16k_l0_small_affine"
    norms = ("model.layers.2.pre_feedforward_layernorm.output", "model.layers.2.post_feedforward_layernorm.output")
    hooks = {"hf_hook_point_in": norms[0], "hf_hook_point_out": norms[1], "affine_connection": True}
    draws = Draws(11)
    found["gemma_scope_2_transcoder"] = {
        "files": {
            f"{repo}/{folder}/config.json": {**config, **hooks, "type": "transcoder"},
            f"{repo}/{folder}/params.safetensors": draws.columns(lower) | {"affine_skip_connection": draws(D_IN, D_IN)},
        },
        "call": ("gemma_3", f"google/{repo}", folder, {}),
        "loads": f"{repo}/{folder}",
    }
    found |= llama_scope() | dictionary_learning()
    draws = Draws(30)
    config = {"act_size": D_IN, "dict_size": N_LATENTS, "act_name": "blocks.1.attn.hook_z", "layer": 1, "site": "z"}
    found["hook_z"] = {
        "files": {
            "attn-saes/L1_Hcat_z_cfg.json": config,
            "attn-saes/L1_Hcat_z.pt": draws.columns("W_enc W_dec b_enc b_dec"),
        },
        "call": ("connor_rob_hook_z", "ckkissane/attn-saes", "L1_Hcat_z.pt", {}),
        "loads": "attn-saes/L1_Hcat_z.pt",
    }
    draws = Draws(31)
    rows = draws.columns("W_enc W_dec b_enc b_dec")
    text = 'model_name: "Qwen/Qwen3-0.6B"\nfeature_input_hook: "mlp.hook_in"\nfeature_output_hook: "hook_mlp_out"\n'
    sizes_text = f"d_model:\n  value: {D_IN}\nd_feature:\n  value: {N_LATENTS}\nbatch_size:\n  value: 128\n"
    found["circuit_tracer"] = {
        "files": {
            "qwen3-0.6b-transcoders/config.yaml": text,
            "qwen3-0.6b-transcoders/wandb-config.yaml": sizes_text,
            "qwen3-0.6b-transcoders/layer_1.safetensors": {**rows, "W_enc": rows["W_enc"].T.contiguous()},
        },
        "call": ("mwhanna_transcoder", "mwhanna/qwen3-0.6b-transcoders", "layer_1.safetensors", {}),
        "loads": "qwen3-0.6b-transcoders/layer_1.safetensors",
    }
    return found


def llama_scope() -> dict[str, Case]:
    norm = 1.7
    config = {
        "d_model": D_IN, "hook_point_in": "blocks.1.hook_resid_post", "hook_point_out": "blocks.1.hook_resid_post",
        "act_fn": "jumprelu", "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": False,
        "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False,
    }  # fmt: skip
    draws, repo, folder = Draws(20), "Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L1R-8x"
    settings = {"d_sae": N_LATENTS, "jump_relu_threshold": 0.3, "top_k": 50}
    settings |= {"dataset_average_activation_norm": {"in": norm, "out": norm}}
    found: dict[str, Case] = {
        "llama_scope": {
            "files": {
                f"{repo}/{folder}/hyperparams.json": {**config, **settings},
                f"{repo}/{folder}/checkpoints/final.safetensors": draws.linears(**{"decoder.bias": draws(D_IN)}),
            },
            "call": ("llama_scope", f"fnlp/{repo}", folder, {"dtype": "float32"}),
            "loads": f"{repo}/{folder}",
            "scale": D_IN**0.5 / norm,
        }
    }
    draws, repo, folder = Draws(21), "Llama-Scope-R1-Distill", "800M-Slimpajama-0-OpenR1-Math-220k/L1R"
    others = {
        "decoder.bias": draws(D_IN),
        "log_jumprelu_threshold": draws(N_LATENTS),
        "dataset_average_activation_norm.blocks.1.hook_resid_post": torch.tensor(norm),
    }
    weights = draws.linears(**others)
    found["llama_scope_distilled"] = {
        "files": {
            f"{repo}/{folder}/config.json": {**config, "d_sae": N_LATENTS, "expansion_factor": N_LATENTS / D_IN},
            f"{repo}/{folder}/sae_weights.safetensors": weights,
        },
        "call": ("llama_scope_r1_distill", f"fnlp/{repo}", folder, {"d_sae": N_LATENTS}),
        "loads": f"{repo}/{folder}",
        "scale": D_IN**0.5 / float(torch.tensor(norm)),
    }
    return found


def dictionary_learning() -> dict[str, Case]:
    draws = Draws(22)
    plain = "W_enc W_dec b_enc b_dec"
    threshold = torch.tensor(0.3)
    k = torch.tensor(4)
    gated = {name: draws(N_LATENTS) for name in ("r_mag", "gate_bias", "mag_bias")}
    gated |= {name: value for name, value in draws.linears().items() if name != "encoder.bias"}
    classes = {
        "AutoEncoder": draws.linears(bias=draws(D_IN)),
        "GatedAutoEncoder": {**gated, "decoder_bias": draws(D_IN)},
        "AutoEncoderTopK": draws.linears(b_dec=draws(D_IN), k=k, threshold=threshold),
        "BatchTopKSAE": draws.linears(b_dec=draws(D_IN), k=k, threshold=threshold),
        "JumpReluAutoEncoder": draws.columns(f"{plain} threshold"),
        "MatryoshkaBatchTopKSAE": {
            **draws.columns(plain), "k": k, "threshold": threshold, "group_sizes": torch.tensor([5, 15]),
        },
    }  # fmt: skip
    found: dict[str, Case] = {}
    for name, tensors in classes.items():
        trainer = {
            "dict_class": name, "activation_dim": D_IN, "dict_size": N_LATENTS, "layer": 1, "lm_name": "EleutherAI/x",
            "submodule_name": "resid_post_layer_1", **({"k": 4} if "k" in tensors else {}),
        }  # fmt: skip
        folder = f"lm_sae/{name}"
        found[f"dictionary_learning_{name}"] = {
            "files": {
                f"{folder}/config.json": {"trainer": trainer, "buffer": {"ctx_len": 128, "io": "out"}},
                f"{folder}/ae.pt": tensors,
            },
            "call": ("dictionary_learning_1", "canrager/lm_sae", name, {}),
            "loads": folder,
        }
    return found


def checkpoints() -> dict[str, Case]:
    """SAELens' own folders in the middle of training, and as versions before 6 wrote them."""
    common = {"d_in": D_IN, "d_sae": N_LATENTS, "device": "cpu", "dtype": "float32"}
    found: dict[str, Case] = {}
    for seed, (kind, options) in enumerate(
        (
            ("BatchTopK", {"k": 4.5, "rescale_acts_by_decoder_norm": True}),
            ("MatryoshkaBatchTopK", {"k": 4, "matryoshka_widths": [5, 20]}),
            ("TopK", {"k": 4, "rescale_acts_by_decoder_norm": True}),
            ("JumpReLU", {}),
        )
    ):
        sae = getattr(saes, f"{kind}TrainingSAE")(getattr(saes, f"{kind}TrainingSAEConfig")(**common, **options))
        draws = Draws(40 + seed)
        with torch.no_grad():
            for name, parameter in sorted(sae.named_parameters()):
                value = draws(*parameter.shape)
                parameter.copy_(value.abs() if "threshold" in name else value)
            if "BatchTopK" in kind:
                sae.topk_threshold.fill_(0.4)
        sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
        with tempfile.TemporaryDirectory() as place:
            sae.save_model(f"{place}/checkpoint")
            sae.save_inference_model(f"{place}/finished")
            finished = saes.SAE.load_from_disk(f"{place}/finished")
            config = json.loads(Path(place, "checkpoint/cfg.json").read_text())
            weights = loaders.load_safetensors_weights(f"{place}/checkpoint/sae_weights.safetensors")
        found[f"saelens_checkpoint_{kind}"] = {
            "files": {"checkpoint/cfg.json": config, "checkpoint/sae_weights.safetensors": weights},
            "sae": lambda _, finished=finished: finished,
            "loads": "checkpoint",
        }
    old = {
        "d_in": D_IN, "d_sae": N_LATENTS, "dtype": "torch.float32", "device": "cpu",
        "hook_point": "blocks.1.attn.hook_q", "hook_point_layer": 1, "hook_point_head_index": None,
        "normalize_activations": None, "use_ghost_grads": False, "model_name": "none", "context_size": 128,
    }  # fmt: skip
    for seed, (name, options) in enumerate(
        (
            ("standard", {"activation_fn_str": "relu", "finetuning_scaling_factor": False}),
            ("topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "normalize_activations": False}),
            ("jumprelu", {"architecture": "jumprelu", "activation_fn_str": "relu", "apply_b_dec_to_input": False}),
            ("layer_norm", {"activation_fn_str": "relu", "normalize_activations": "layer_norm"}),
        )
    ):
        names = "W_enc W_dec b_enc b_dec" + (" threshold" if name == "jumprelu" else "")
        weights = Draws(50 + seed).columns(names)
        if name == "standard":
            weights["scaling_factor"] = torch.ones(N_LATENTS)
        found[f"saelens_old_{name}"] = {
            "files": {"old/cfg.json": {**old, **options}, "old/sae_weights.safetensors": weights},
            "sae": lambda root: saes.SAE.load_from_disk(root / "old"),
            "loads": "old",
        }
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
