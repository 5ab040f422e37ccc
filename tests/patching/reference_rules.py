"""The rules a second time, by another route: plain functions on the weights of a transformers model.

No hooks and no bridge: each module is written as the product of its input and constants, and what is constant is
wrapped in `const`. Used to check the engine; slow, and only for GPT-2 and Llama.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from interp.patching import Rules


def const(x: Tensor) -> Tensor:
    return x.detach()


def logits_of(model: Any, stream: Tensor, rules: Rules) -> Tensor:
    """Logits [batch, pos, d_vocab] from the stream that enters block 0, in float64, under the rules."""
    if model.config.model_type == "gpt2":
        for block in model.transformer.h:
            stream = stream + _gpt2_attention(block.attn, layer_norm(block.ln_1, stream, rules), rules, model.config)
            pre = block.mlp.c_fc(layer_norm(block.ln_2, stream, rules))
            stream = stream + block.mlp.c_proj(activation(gelu_tanh, pre, rules))
        return model.lm_head(layer_norm(model.transformer.ln_f, stream, rules))
    cos, sin = model.model.rotary_emb(stream, torch.arange(stream.shape[1])[None])
    for block in model.model.layers:
        normed = rms_norm(block.input_layernorm, stream, rules)
        stream = stream + _llama_attention(block.self_attn, normed, rules, model.config, cos.double(), sin.double())
        normed = rms_norm(block.post_attention_layernorm, stream, rules)
        stream = stream + block.mlp.down_proj(product(block.mlp.gate_proj(normed), block.mlp.up_proj(normed), rules))
    return model.lm_head(rms_norm(model.model.norm, stream, rules))


def layer_norm(module: Any, x: Tensor, rules: Rules) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    sigma = (centred.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()
    return centred / (const(sigma) if rules.norm == "LN" else sigma) * module.weight + module.bias


def rms_norm(module: Any, x: Tensor, rules: Rules) -> Tensor:
    sigma = (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
    return x / (const(sigma) if rules.norm == "LN" else sigma) * module.weight


def gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def activation(function: Any, x: Tensor, rules: Rules) -> Tensor:
    # no pre-activation of a random model is exactly 0, so the ratio itself can be used here
    return x * const(function(x) / x) if rules.activation == "Identity" else function(x)


def product(gate: Tensor, linear: Tensor, rules: Rules) -> Tensor:
    active = activation(torch.nn.functional.silu, gate, rules)
    if rules.gate == "detach":
        return const(active) * linear
    whole = active * linear
    return whole / 2 + const(whole / 2) if rules.gate == "Half" else whole


def attend(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
    """q, k, v [batch, head, pos, d_head] to [batch, pos, head * d_head]."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    n = scores.shape[-1]
    scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
    pattern = scores.softmax(-1)
    if rules.attention == "AH":
        pattern = const(pattern)
    if rules.attention == "temperature":
        other = 2 * (scores / 2).softmax(-1)
        pattern = other + const(pattern - other)
    return (pattern @ v).transpose(1, 2).flatten(2)


def scaled(x: Tensor, factor: float | int) -> Tensor:
    return factor * x + const((1 - factor) * x)


def _gpt2_attention(module: Any, x: Tensor, rules: Rules, config: Any) -> Tensor:
    parts = module.c_attn(x).chunk(3, -1)
    q, k, v = (
        scaled(part, factor).unflatten(-1, (config.n_head, -1)).transpose(1, 2)
        for part, factor in zip(parts, rules.qkv, strict=True)
    )
    return module.c_proj(attend(q, k, v, rules))


def _llama_attention(module: Any, x: Tensor, rules: Rules, config: Any, cos: Tensor, sin: Tensor) -> Tensor:
    def heads(part: Tensor, factor: float | int) -> Tensor:
        split = scaled(part, factor).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        return split.repeat_interleave(config.num_attention_heads // split.shape[1], 1)

    def rotate(y: Tensor) -> Tensor:
        first, second = y.chunk(2, -1)
        return y * cos + torch.cat([-second, first], -1) * sin

    q, k, v = (
        heads(linear(x), factor)
        for linear, factor in zip((module.q_proj, module.k_proj, module.v_proj), rules.qkv, strict=True)
    )
    return module.o_proj(attend(rotate(q), rotate(k), v, rules))
