"""Tiny random models of every family the tests need, built from configs: nothing is downloaded.

Gains and biases are random too, so that a method which forgets one of them gives a wrong number instead of a right one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformer_lens import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES = ("gpt2", "llama", "neox", "gemma2")
"""LayerNorm with biases; RMSNorm, gated and grouped; parallel blocks; post-norm with soft caps."""

MORE_FAMILIES = ("qwen2", "qwen3", "mistral", "phi", "gpt_neo", "gptj", "opt", "gemma3")
"""Further families the field uses. `gpt_neo`, `gptj` and `opt` delegate attention: their patterns cannot be edited."""

D_VOCAB, D_MODEL, N_LAYERS, N_HEADS, N_KV_HEADS, D_HEAD, D_MLP, N_CTX = 60, 32, 3, 4, 2, 8, 48, 64

_GATED: dict[str, Any] = {
    "vocab_size": D_VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_KV_HEADS, "head_dim": D_HEAD, "intermediate_size": D_MLP, "max_position_embeddings": N_CTX,
}  # fmt: skip
_PLAIN: dict[str, Any] = {
    "vocab_size": D_VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS,
    "intermediate_size": D_MLP, "max_position_embeddings": N_CTX,
}  # fmt: skip
_GPT: dict[str, Any] = {
    "vocab_size": D_VOCAB, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_inner": D_MLP,
    "n_positions": N_CTX,
}  # fmt: skip

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT),
    "llama": ("llama", _GATED),
    "neox": ("gpt_neox", {**_PLAIN, "rotary_pct": 0.5}),
    "gemma2": (
        "gemma2",
        {
            **_GATED,
            "query_pre_attn_scalar": D_HEAD,
            "sliding_window": 16,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
    ),  # fmt: skip
    "qwen2": ("qwen2", {k: v for k, v in _GATED.items() if k != "head_dim"}),
    "qwen3": ("qwen3", _GATED),
    "mistral": ("mistral", {**_GATED, "sliding_window": 16}),
    "phi": ("phi", {**_PLAIN, "partial_rotary_factor": 0.5}),
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": D_VOCAB,
            "hidden_size": D_MODEL,
            "num_layers": 4,
            "num_heads": N_HEADS,
            "intermediate_size": D_MLP,
            "max_position_embeddings": N_CTX,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 16,
        },
    ),  # fmt: skip
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "opt": (
        "opt",
        {
            "vocab_size": D_VOCAB,
            "hidden_size": D_MODEL,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "ffn_dim": D_MLP,
            "max_position_embeddings": N_CTX,
            "word_embed_proj_dim": D_MODEL,
        },
    ),  # fmt: skip
    "gemma3": ("gemma3_text", {**_GATED, "query_pre_attn_scalar": D_HEAD, "sliding_window": 16}),
}
_ARCHITECTURES = {"gemma3": "Gemma3ForCausalLM", "gpt_neo": "GPTNeoForCausalLM"}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config_overrides: Any) -> Any:
    """A fresh random transformers model of the family, in evaluation mode, with weights large enough to matter."""
    kind, settings = _CONFIGS[family]
    config = AutoConfig.for_model(
        kind, **{**settings, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, **config_overrides}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():
            randomise(name, parameter)
    if family in _ARCHITECTURES:
        model.config.architectures = [_ARCHITECTURES[family]]
    return model.to(dtype)


@torch.no_grad()
def randomise(name: str, parameter: torch.Tensor) -> None:
    """Norm gains around one (around zero where the model adds the one), biases of 0.2, matrices of 0.2."""
    noise = torch.randn(parameter.shape)
    if parameter.ndim == 1 and name.endswith("weight"):
        parameter.copy_(parameter + 0.3 * noise)
    else:
        parameter.copy_(0.2 * noise)


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: `<bos>` (prepended), `<pad>`, `<unk>`, then the words `w3`, `w4`, ..."""
    words = ["<bos>", "<pad>", "<unk>", *(f"w{i}" for i in range(3, D_VOCAB))]
    raw: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.init_kwargs.update(name_or_path="tiny", add_bos_token=True)  # else TransformerLens loads it anew, by name
    return fast


def fresh_bridge(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config_overrides: Any
) -> TransformerBridge:
    """A bridge of its own around `tiny_model`: take this one when the test changes flags, weights or mode."""
    bridge = TransformerBridge.boot_transformers(
        f"tiny-{family}", hf_model=tiny_model(family, seed, dtype, **config_overrides), tokenizer=tiny_tokenizer(),
        device="cpu", dtype=dtype,
    )  # fmt: skip
    bridge.eval()
    bridge.requires_grad_(False)
    return bridge


@functools.cache
def tiny_bridge(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config_overrides: Any
) -> TransformerBridge:
    """The shared bridge of a family: frozen, in evaluation mode; leave its hooks and flags as you found them."""
    return fresh_bridge(family, seed, dtype, **config_overrides)


def tiny_tokens(batch: int = 2, pos: int = 9, seed: int = 0) -> torch.Tensor:
    """Random word ids [batch, pos] that begin with BOS."""
    tokens = torch.randint(3, D_VOCAB, (batch, pos), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 0
    return tokens
