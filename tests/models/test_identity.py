"""Geometry is what the modules are, and a revision changes exactly when the weights do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from interp.models import Geometry, geometry, load_model, provenance, require_eval
from tests.helpers import FAMILIES, MORE_FAMILIES, fresh_bridge, tiny_bridge, tiny_model, tiny_tokenizer, tiny_tokens
from tests.models.test_load import damaged, saved

GATED = ("llama", "gemma2", "qwen2", "qwen3", "mistral", "gemma3")
PARALLEL = ("neox", "phi", "gptj")


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_geometry(family: str) -> None:
    grouped = family in GATED
    learned = family in ("gpt2", "gpt_neo", "opt")
    assert geometry(tiny_bridge(family)) == Geometry(
        n_layers=4 if family == "gpt_neo" else 3,
        n_heads=4,
        n_kv_heads=2 if grouped else 4,
        d_model=32,
        d_head=8,
        d_mlp=48,
        d_vocab=60,
        n_ctx=64,
        norm="RMSNorm" if family in GATED else "LayerNorm",
        gated=family in GATED,
        grouped=grouped,
        parallel=family in PARALLEL,
        post_norm=family in ("gemma2", "gemma3"),
        positional="standard" if learned else "rotary",
        soft_cap=10.0 if family == "gemma2" else None,
        delegated_attention=family in ("gpt_neo", "gptj", "opt"),
        has_bos=family not in ("neox", "phi", "qwen2", "qwen3"),
    )


def test_geometry_looks_at_the_blocks_and_not_at_the_family() -> None:
    assert not geometry(tiny_bridge("neox", use_parallel_residual=False)).parallel


def test_provenance_is_json_and_complete() -> None:
    record = provenance(load_model(saved("llama"), check=False), seed=3, sites=["z"])
    assert json.loads(json.dumps(record)) == record
    assert record["model"] == "llama" and record["architecture"] == "LlamaForCausalLM"
    assert record["device"] in ("cpu", "cuda") and record["dtype"] == "float32" and record["weights_state"] == "raw"
    assert set(record["versions"]) == {"interp", "torch", "transformers", "transformer-lens", "python"}
    assert record["seed"] == 3 and record["sites"] == ["z"]


def test_revision_is_of_the_contents(tmp_path: Path) -> None:
    first = provenance(load_model(saved("llama"), check=False))["revision"]
    assert first.startswith("sha256:") and len(first) == 23
    again = provenance(load_model(damaged(tmp_path), check=False, dtype="bfloat16"))["revision"]
    assert again == first  # of the files, wherever they are and however they were loaded
    assert provenance(load_model(saved("gpt2"), check=False))["revision"] != first


def test_revision_in_memory_and_after_an_edit() -> None:
    def revision(seed: int) -> str:
        return provenance(load_model(tiny_model("gpt2", seed), tokenizer=tiny_tokenizer(), check=False))["revision"]

    assert revision(0).startswith("parameters:")
    assert revision(0) == revision(0) != revision(1)

    bridge = load_model(saved("llama"), check=False)
    untouched = provenance(bridge)["revision"]
    weight = bridge.original_model.get_input_embeddings().weight
    with torch.no_grad():
        weight += 1
    edited = provenance(bridge)["revision"]
    assert edited.startswith("parameters:") and edited != untouched  # the file no longer says what was measured
    with torch.no_grad():
        weight += 1
    assert provenance(bridge)["revision"] not in (edited, untouched)


def test_provenance_of_a_bridge_made_otherwise() -> None:
    record = provenance(tiny_bridge("neox"))
    assert record["model"] == "tiny-neox" and record["revision"].startswith("parameters:")


def test_running_does_not_change_the_revision() -> None:
    bridge = load_model(saved("gpt2"), check=False)
    before = provenance(bridge)["revision"]
    bridge(tiny_tokens())
    assert provenance(bridge)["revision"] == before


def test_require_eval() -> None:
    bridge = fresh_bridge("gpt2")
    require_eval(bridge)
    bridge.original_model.transformer.drop.train()
    with pytest.raises(RuntimeError, match=r"is in training mode; call bridge.eval\(\)"):
        require_eval(bridge)
