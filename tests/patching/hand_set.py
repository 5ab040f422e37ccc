"""Models set by hand whose circuits are known: induction by two attention heads, and XOR of two moved bits."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor

from interp.prompts import Prompts
from tests.patching.test_known_answers import blank, bridge_of

D = 24  # width of the stream, and of heads, whose dimensions 0 and D / 2 turn by one radian per position
N_TOKENS = 6
TOKEN, CONSTANT, COPY, OUT, IDLE = 0, 6, 7, 13, 19  # where things lie in the stream
STEEP = 100.0

INDUCTION = ("input->a0.h0<v>", "a0.h0->a1.h0<k>", "input->a1.h0<q>", "input->a1.h0<v>", "a1.h0->logits")
"""What differs between the prompts of `induction_prompts` and reaches the answer; the queries and keys of a0.h0 read
positions, which do not differ."""
XOR = ("input->a0.h0<v>", "input->a0.h1<v>", "a0.h0->m1", "a0.h1->m1", "m1->logits")


def _blank() -> Any:
    model = blank(d_model=D, d_vocab=N_TOKENS, n_layers=2, n_heads=2, d_mlp=2)
    config = model.config
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e30}  # only the first pair of dimensions turns
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, TOKEN : TOKEN + N_TOKENS] = torch.eye(N_TOKENS)
        model.model.embed_tokens.weight[:, CONSTANT] = 1
        model.lm_head.weight[:, OUT : OUT + N_TOKENS] = torch.eye(N_TOKENS)
    return model


def _looks_back(attention: Any, head: int, offset: int) -> None:
    """The head attends `offset` positions back: query and key are constants that positions turn."""
    angle = torch.tensor(float(offset))
    attention.q_proj.weight[head * D, CONSTANT] = STEEP
    attention.k_proj.weight[head * D, CONSTANT] = angle.cos()
    attention.k_proj.weight[head * D + D // 2, CONSTANT] = angle.sin()


@torch.no_grad()
def induction() -> Any:
    """Two attention layers, no MLP, two idle heads: after `A B ... A` the logit of B. For at most five tokens."""
    model = _blank()
    first, second = (layer.self_attn for layer in model.model.layers)
    _looks_back(first, 0, 1)
    first.o_proj.weight[COPY : COPY + N_TOKENS, TOKEN : TOKEN + N_TOKENS] = torch.eye(N_TOKENS)
    match = slice(1, 1 + N_TOKENS)  # dimensions of the head that do not turn
    second.q_proj.weight[match, TOKEN : TOKEN + N_TOKENS] = 12 * torch.eye(N_TOKENS)
    second.k_proj.weight[match, COPY : COPY + N_TOKENS] = torch.eye(N_TOKENS)
    second.o_proj.weight[OUT : OUT + N_TOKENS, TOKEN : TOKEN + N_TOKENS] = 5 * torch.eye(N_TOKENS)
    generator = torch.Generator().manual_seed(0)
    for attention in (first, second):  # the other heads move things about that nothing reads
        attention.q_proj.weight[D:] = torch.randn(D, D, generator=generator)
        attention.k_proj.weight[D:] = torch.randn(D, D, generator=generator)
        attention.o_proj.weight[IDLE:, D:] = torch.randn(D - IDLE, D, generator=generator)
    return bridge_of(model)


def induction_prompts() -> Prompts:
    """`x A B y A` against `x D C y D`: the answer is B in one and C in the other."""
    orders = list(permutations(range(N_TOKENS)))[::97]
    clean = torch.tensor([[x, a, b, y, a] for x, y, a, b, _, _ in orders])
    corrupted = torch.tensor([[x, d, c, y, d] for x, y, _, _, c, d in orders])
    answers, wrong = (torch.tensor([order[i] for order in orders]) for i in (3, 4))
    return Prompts(clean, corrupted, answers, wrong, {"end": torch.full((len(orders),), 4)}, name="induction")


@torch.no_grad()
def xor() -> Any:
    """Two heads move two bits to the last position, where the second MLP makes their XOR: the logit of token 1."""
    model = _blank()
    first = model.model.layers[0].self_attn
    for head, offset in ((0, 2), (1, 1)):
        _looks_back(first, head, offset)
        first.o_proj.weight[COPY + head, head * D + TOKEN + 1] = 1
    mlp = model.model.layers[1].mlp
    mlp.up_proj.weight[:, CONSTANT] = 1
    mlp.gate_proj.weight[:, COPY : COPY + 2] = 1
    mlp.gate_proj.weight[:, CONSTANT] = torch.tensor([0.5, -0.75])  # relu(s + 1/2) - 2 relu(s - 3/4): 1/2, 1, 0
    mlp.down_proj.weight[OUT + 1] = torch.tensor([1.0, -2.0])
    return bridge_of(model)


def xor_prompts() -> Prompts:
    """All pairs of bits before `=`, with the one or the other turned over; the answer is their XOR."""
    clean, corrupted = [], []
    for x, y in product((0, 1), repeat=2):
        clean += [[x, y, 2]] * 2
        corrupted += [[1 - x, y, 2], [x, 1 - y, 2]]
    tokens = torch.tensor(clean)
    answer = tokens[:, 0] ^ tokens[:, 1]
    end = torch.full((len(clean),), 2)
    return Prompts(tokens, torch.tensor(corrupted), answer, 1 - answer, {"end": end}, name="xor")


def xor_metric(prompts: Prompts) -> Any:
    """The logit of token 1 where the answer is 1, its negative where it is 0."""
    sign = 2.0 * prompts.answers - 1

    def signed(logits: Tensor) -> Tensor:
        return sign * logits[:, -1, 1]

    return signed
