"""Attention-only models with hand-set heads of every classic kind, at random places: what each scores is known.

As in `planted`: the stream is a one-hot token, a one-hot position, a buffer for the previous token and one for what
heads say, and matches are so sharp that every softmax is one-hot to rounding.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch

from interp.prompts import Prompts
from tests.attention.planted import small_gpt2

D_VOCAB, N_POS, D_HEAD, N_HEADS, N_LAYERS = 48, 64, 64, 6, 3
D_MODEL = D_HEAD * N_HEADS
TOKEN, POSITION, PREVIOUS, SAYS, CONSTANT = 0, 64, 128, 192, 320
SHARP = 2000.0
IO, S1, S2, END = 3, 5, 8, 11

ROLES = {
    "source": ["previous token"],
    "previous": ["previous token"],
    "current": ["current token"],
    "sink": ["sink"],
    "duplicate": ["current token", "duplicate token"],
    "induction": ["induction", "sink", "copying"],
    "copier": ["copying"],
    "suppressor": ["suppression"],
    "successor": ["successor"],
    "mover": ["name mover", "copying"],
    "subject": ["subject reader"],
    "skip": [],
    "blind induction": ["induction", "sink"],
}
"""Kind of head to the roles that a report should give it. The source writes what an induction head matches; the
duplicate head looks at its own token where there is no earlier copy, induction heads at position 0; the skip head looks
two tokens back; the blind one looks where an induction head does and writes nothing. All other heads are uniform."""


@functools.cache
def _bridge() -> Any:
    return small_gpt2(
        "classic", vocab_size=D_VOCAB, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=N_POS
    )


@torch.no_grad()
def planted_heads(seed: int = 0) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The bridge, its weights set anew, and where each kind of head is. One bridge for all: use it before the next
    call."""
    rng, bridge = random.Random(f"classic {seed}"), _bridge()
    for name, parameter in bridge.original_model.named_parameters():
        norm = any(part in name for part in ("ln_1", "ln_2", "ln_f")) and name.endswith("weight")
        parameter.fill_(1.0 if norm else 0.0)
    weights = {part: _parameter(bridge, part) for part in ("wte", "wpe", "lm_head")}
    weights["wte"][:, TOKEN : TOKEN + D_VOCAB] = torch.eye(D_VOCAB)
    weights["wte"][:, CONSTANT] = 1
    weights["wpe"][:, POSITION : POSITION + N_POS] = torch.eye(N_POS)
    weights["lm_head"][:, SAYS : SAYS + D_VOCAB] = torch.eye(D_VOCAB)
    later = [(layer, head) for layer in range(1, N_LAYERS) for head in range(N_HEADS)]
    first = [(0, head) for head in range(N_HEADS)]
    rng.shuffle(later)
    rng.shuffle(first)
    anywhere = {"source", "previous", "current", "sink", "duplicate", "skip"}  # these need only tokens and positions
    places: dict[str, tuple[int, int]] = {"source": first.pop()}
    for kind in [kind for kind in ROLES if kind not in anywhere]:
        places[kind] = later.pop()
    free = first + later
    rng.shuffle(free)
    places |= {kind: free.pop() for kind in ROLES if kind in anywhere and kind != "source"}
    for kind, (layer, head) in places.items():
        attention = bridge.blocks[layer].attn
        for name, weight in zip(("W_Q", "W_K", "W_V", "W_O"), _head(kind), strict=True):
            getattr(attention, name)[head].copy_(weight)
    return bridge, places


def text(n: int = 8, pos: int = 40, seed: int = 0) -> torch.Tensor:
    """Rows of different tokens after BOS: text in which nothing repeats."""
    generator = torch.Generator().manual_seed(seed)
    rows = [2 + torch.randperm(D_VOCAB - 2, generator=generator)[: pos - 1] for _ in range(n)]
    return torch.cat([torch.zeros(n, 1, dtype=torch.long), torch.stack(rows)], 1)


def repeats(n: int = 8, length: int = 12, times: int = 4, seed: int = 0) -> torch.Tensor:
    rows = text(n, length + 1, seed)
    return torch.cat([rows, *[rows[:, 1:]] * (times - 1)], 1)


def names(n: int = 8, seed: int = 0) -> Prompts:
    """Indirect-object prompts of these models: a name at IO, another at S1 and S2, the end at END."""
    clean = text(n, END + 1, seed)
    clean[:, S2] = clean[:, S1]
    places = {name: torch.full((n,), at) for name, at in (("io", IO), ("s1", S1), ("s2", S2), ("end", END))}
    return Prompts(
        clean, clean.clone(), answers=clean[:, IO].clone(), foils=clean[:, S1].clone(), positions=places, name="names"
    )


def _head(kind: str) -> tuple[torch.Tensor, ...]:
    """W_Q, W_K, W_V [d_model, d_head] and W_O [d_head, d_model]."""
    eye, zero = torch.eye(D_MODEL), torch.zeros(D_MODEL, D_HEAD)
    token, place, before, says = (eye[:, start : start + 64] for start in (TOKEN, POSITION, PREVIOUS, SAYS))
    always = zero.clone()
    always[CONSTANT, D_HEAD - 1] = 1  # every query says the same there
    if kind in ("source", "previous", "skip"):
        q, k = place @ _shift(-2 if kind == "skip" else -1), place.clone()
    elif kind == "current":
        q, k = place.clone(), place.clone()
    elif kind == "sink":
        q, k = always, _wants(0)
    elif kind == "mover":
        q, k = always, _wants(IO)
    elif kind == "subject":
        q, k = always, _wants(S1)
    elif kind == "duplicate":
        q, k = token + always, token.clone()
        k[POSITION : POSITION + N_POS, D_HEAD - 1] = torch.linspace(0.5, 0, N_POS)  # the earliest copy wins
    elif kind in ("induction", "blind induction"):
        q, k = token + always, before + 0.5 * _wants(0)  # at position 0 where nothing matches, as trained ones do
    else:
        q, k = zero, zero
    v, o = zero, zero
    if kind == "source":
        v, o = token, before
    elif kind in ("copier", "induction", "mover"):
        v, o = token, says
    elif kind == "suppressor":
        v, o = token, -says
    elif kind == "successor":
        v, o = token, says @ _shift(1).T
    return q * SHARP, k, v / 14, o.T  # 14 is a one-hot after the norm: heads write about as much as they read


def _wants(at: int) -> torch.Tensor:
    k = torch.zeros(D_MODEL, D_HEAD)
    k[POSITION + at, D_HEAD - 1] = 1
    return k


def _shift(by: int) -> torch.Tensor:
    """[i, i + by] = 1."""
    return torch.diag(torch.ones(D_HEAD - abs(by)), by)


def _parameter(bridge: Any, part: str) -> torch.Tensor:
    found = [p for name, p in bridge.original_model.named_parameters() if f"{part}." in name]
    assert len(found) == 1, part
    return found[0]
