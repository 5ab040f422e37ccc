"""Attention-only models with hand-set weights: a previous-token head, planted retrieval heads, decoys.

A GPT-2 whose MLPs are zero. The residual stream is a one-hot token, a one-hot position and a buffer for the previous
token, so the LayerNorm is the same affine map at every position; queries and keys match with weights so large that each
softmax is one-hot to rounding. Every score is therefore known in advance.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import torch
from transformer_lens import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM

from interp.attention import Needle, Needles
from tests.helpers import tiny_tokenizer

D_VOCAB, N_POS, D_HEAD, N_HEADS, N_LAYERS = 48, 64, 64, 6, 3
D_MODEL = D_HEAD * N_HEADS  # 384: token, position, previous token and room
TOKEN, POSITION, PREVIOUS = 0, 64, 128  # where each one-hot begins
SHARP = 60.0
ANSWER = 12  # tokens of the needle, all different

RETRIEVAL, HALF = "retrieval", "half"
DECOYS = ("offset", "second", "outside", "self", "previous", "sink", "random")
"""Heads that must score 0: attends one place too far; has the right place second; attends to the right token in a copy
of the needle outside it; three that never look there; random weights."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which head does what, by (layer, head)."""

    roles: dict[tuple[int, int], str]

    def heads(self, *roles: str) -> list[tuple[int, int]]:
        return [head for head, role in self.roles.items() if role in roles]


def small_gpt2(name: str, **sizes: int) -> Any:
    """A bridge of a GPT-2 of these sizes, in evaluation mode, whose weights a test then sets."""
    config = AutoConfig.for_model(
        "gpt2", **sizes, n_inner=8,
        bos_token_id=0, eos_token_id=0, pad_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=model, tokenizer=tiny_tokenizer(), device="cpu", dtype=torch.float32
    )
    bridge.eval()
    bridge.requires_grad_(False)
    return bridge


@functools.cache
def _bridge() -> Any:
    return small_gpt2(
        "planted", vocab_size=D_VOCAB, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=N_POS
    )


@torch.no_grad()
def planted_model(seed: int = 0, *, copies: bool = True) -> tuple[Any, Plan]:
    """The bridge, its weights set anew, and who does what. One bridge for all: use it before the next call.

    Args:
        copies: Without, the retrieval heads look at the right place but write nothing, and the model says token 2.
    """
    rng = random.Random(f"planted {seed}")
    bridge = _bridge()
    weights = dict(bridge.original_model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in weights.items():
        norm = ("ln_1" in name or "ln_2" in name or "ln_f" in name) and name.endswith("weight")
        parameter.fill_(1.0 if norm else 0.0)
    # the first layer finds the previous token; any later one may retrieve
    roles: dict[tuple[int, int], str] = {(0, rng.randrange(N_HEADS)): "previous source"}
    free = [(layer, head) for layer in range(1, N_LAYERS) for head in range(N_HEADS)]
    rng.shuffle(free)
    for role in (RETRIEVAL, HALF, *DECOYS):
        roles[free.pop()] = role
    eye = torch.eye(D_MODEL)
    embed, place, unembed = _parameter(bridge, "wte"), _parameter(bridge, "wpe"), _parameter(bridge, "lm_head")
    embed[:, TOKEN : TOKEN + D_VOCAB] = torch.eye(D_VOCAB)
    place[:, POSITION : POSITION + N_POS] = torch.eye(N_POS)
    unembed[:, TOKEN : TOKEN + D_VOCAB] = 0  # what a token says is what heads wrote in the last part
    out = D_MODEL - 64
    unembed[:, out : out + D_VOCAB] = torch.eye(D_VOCAB)
    if not copies:
        embed[:, out + 2] = 0.5
    for (layer, head), role in roles.items():
        q, k, v, o = (torch.zeros(D_MODEL, D_HEAD) for _ in range(4))
        token, position, previous = (eye[:, start : start + 64] for start in (TOKEN, POSITION, PREVIOUS))
        shift = torch.zeros(D_HEAD, D_HEAD)
        shift[range(1, D_HEAD), range(D_HEAD - 1)] = 1  # position p asks for p - 1
        first = torch.zeros(D_MODEL, D_HEAD)
        first[POSITION, 0] = 1
        if role in ("previous source", "previous"):
            q, k = position @ shift, position
            if role == "previous source":
                v, o = token, 0.072 * previous  # undoes the norm: the buffer is one-hot too
        elif role in (RETRIEVAL, HALF, "second", "outside"):
            asked = token.clone()
            if role == HALF:  # odd tokens ask for nothing, so every other token of a needle is reached
                asked[TOKEN + 1 : TOKEN + D_VOCAB : 2] = 0
            q, k = asked, previous.clone()
            # of two copies the later one (the needle), but for the decoy, which takes the earlier; position adds little
            slope = torch.linspace(0, 0.3, N_POS) * (-1 if role == "outside" else 1)
            k[POSITION : POSITION + N_POS, D_HEAD - 1] = slope + (0.4 if role == "outside" else 0)
            q[TOKEN : TOKEN + D_VOCAB, D_HEAD - 1] = 1
            if role in (HALF, "second"):  # the first position: below a match, above the rest; or above the match
                k[POSITION, D_HEAD - 1] = 0.6 if role == HALF else 2.0
            if role == RETRIEVAL and copies:
                v, o = token, 0.1 * eye[:, out : out + 64]
        elif role == "offset":  # asks for what follows the next token: needles count upwards
            q, k = token.roll(1, dims=1), previous.clone()
            k[POSITION : POSITION + N_POS, D_HEAD - 1] = torch.linspace(0, 0.3, N_POS)
            q[TOKEN : TOKEN + D_VOCAB, D_HEAD - 1] = 1
        elif role == "self":
            q, k = position, position
        elif role == "sink":
            q[TOKEN : TOKEN + D_VOCAB, 0] = 1
            k = first
        else:
            q, k = (torch.randn(D_MODEL, D_HEAD, generator=generator) * 0.3 for _ in range(2))
        _set_head(bridge, layer, head, q * SHARP, k, v, o)
    return bridge, Plan(roles)


def planted_needles(n: int = 4, seed: int = 0) -> Needles:
    """Haystack, a copy of the needle that is not it, haystack, the needle, haystack, and the token that asks for it."""
    rng = random.Random(f"planted needles {seed}")
    samples = []
    for _ in range(n):
        first = 2 * rng.randint(2, 12)  # even, as the half head asks for what follows even tokens
        needle = list(range(first, first + 1 + ANSWER))
        hay = [token for token in range(3, D_VOCAB) if token not in needle]
        sizes = [rng.randint(2, 9), rng.randint(2, 9)]
        sizes.append(20 - sum(sizes))  # all of one length, so that they share a forward
        before, between, after = ([rng.choice(hay) for _ in range(size)] for size in sizes)
        tokens = [0, *before, *needle, *between, *needle, *after, first]
        start = 1 + sizes[0] + len(needle) + sizes[1]
        span = (start + 1, start + 1 + ANSWER)
        labels = {"copy": 1 + sizes[0]}
        samples.append(
            Needle(torch.tensor(tokens), (start, span[1]), span, tuple(needle[1:]), len(tokens), 0.5, labels)
        )
    return Needles(tuple(samples), name="planted", seed=seed)


def _parameter(bridge: Any, part: str) -> torch.Tensor:
    found = [
        p for name, p in bridge.original_model.named_parameters() if f"{part}." in name and name.endswith("weight")
    ]
    assert len(found) >= 1, part
    return found[0]


def _set_head(bridge: Any, layer: int, head: int, q: Any, k: Any, v: Any, o: Any) -> None:
    attention = bridge.blocks[layer].attn
    for name, weight in (("W_Q", q), ("W_K", k), ("W_V", v)):
        getattr(attention, name)[head].copy_(weight)
    attention.W_O[head].copy_(o.T)
