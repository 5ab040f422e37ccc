"""Dictionaries of heads' outputs with weights and biases that matter, and a model whose two heads are set by hand."""

from __future__ import annotations

from typing import Any

import torch

from interp.dictionaries import (
    BatchTopKSAE,
    Dictionary,
    GatedSAE,
    JumpReLUSAE,
    ReLUSAE,
    TopKSAE,
    token_rows,
)
from tests.helpers import D_HEAD, D_MODEL, fresh_bridge, tiny_tokens

KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "relu, mean norm": (ReLUSAE, {"normalisation": "mean_norm"}),
    "topk, rescaled, mean square": (TopKSAE, {"k": 5, "decoder": "rescaled", "normalisation": "mean_square"}),
    "topk, layer norm, rescaled": (TopKSAE, {"k": 5, "decoder": "rescaled", "normalisation": "layer_norm"}),
    "gated": (GatedSAE, {"detach_decoder": False}),
    "jumprelu, constant norm": (JumpReLUSAE, {"normalisation": "constant_norm", "threshold_start": 0.2}),
    "batch topk, layer norm": (BatchTopKSAE, {"k": 5, "normalisation": "layer_norm", "subtract_bias": False}),
}
"""Every way of normalising, every form of pre-activations."""


def made(
    bridge: Any, hook: str, kind: str = "relu, mean norm", *, seed: int = 0, n: int = 24, **options: Any
) -> Dictionary:
    """A random dictionary of a hook, with biases, rows of different lengths, constants estimated and latents on."""
    cls, given = KINDS[kind]
    given = {**given, **options}
    reads = token_rows(bridge, tiny_tokens(4, 9), hook).values
    dictionary = cls(reads.shape[1], n, hook=hook, decoder_norm=1.0, seed=seed, dtype=reads.dtype, **given)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            noise = torch.randn(parameter.shape, generator=draws).to(parameter)
            if name == "W_dec":
                parameter.mul_(0.5 + noise[:, :1].abs())
            elif name == "W_skip":
                parameter.copy_(0.3 * noise)
            elif name != "W_enc":
                parameter.add_(0.2 * noise)
        if isinstance(dictionary, BatchTopKSAE):
            dictionary.threshold.fill_(0.1)
        if isinstance(dictionary, JumpReLUSAE):
            dictionary.threshold.clamp_(min=0.05)
    targets = None
    if dictionary.is_transcoder:
        targets = token_rows(bridge, tiny_tokens(4, 9), str(dictionary.target_hook)).values
    dictionary.estimate_normalisation(reads, targets)
    return dictionary


X, FILLER, MARK, END = 10, 11, 12, 13  # token ids
HEAD, LATER, READS, CARRIES = 1, 2, 3, 4  # heads of layers 0 and 1, the attributed latent, the one on the way


def copier() -> Any:
    """A GPT-2 that copies in two steps: MARK looks at X with head 1 of layer 0, END at MARK with head 2 of layer 1.

    The first writes what X has to a direction of its own, which the values of the second read. Everything else is zero.
    """
    bridge = fresh_bridge("gpt2")
    model = bridge.original_model
    directions = torch.zeros(5, D_MODEL)  # mean zero, so that centring does nothing
    for i in range(5):
        directions[i, 2 * i], directions[i, 2 * i + 1] = 1.0, -1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and "ln_" in name and name.endswith("weight")
            parameter.fill_(1.0 if norm else 0.0)
        embedding = bridge.embed.weight
        embedding[0] = 0.5 * directions[4]  # not in the text: for probes of what edits do to logits
        for token, direction in ((X, 0), (FILLER, 1), (MARK, 2), (END, 3)):
            embedding[token] = directions[direction]
        for layer, head, query, key, value in ((0, HEAD, 2, 0, 0), (1, LATER, 3, 2, 4)):
            attention = bridge.blocks[layer].attn
            attention.W_Q[head, :, 0] = 20 * directions[query]
            attention.W_K[head, :, 0] = 20 * directions[key]
            attention.W_V[head, :, 1] = directions[value]
            attention.W_O[head, 1] = directions[4]
    return bridge


def copying_dictionary(layer: int, head: int, latent: int) -> Dictionary:
    """One latent that is the value which a head has carried; all others are off."""
    dictionary = ReLUSAE(D_MODEL, 8, hook=f"blocks.{layer}.attn.hook_z")
    with torch.no_grad():
        dictionary.W_enc.zero_()
        dictionary.W_dec.zero_()
        dictionary.W_enc[head * D_HEAD + 1, latent] = 1.0
        dictionary.W_dec[latent, head * D_HEAD + 1] = 1.0
    return dictionary


def copied_tokens() -> torch.Tensor:
    """X at 2, MARK at 4, END at 6."""
    return torch.tensor([[FILLER, FILLER, X, FILLER, MARK, FILLER, END]])
