"""An attention-only model whose heads do exactly what is asked of them: sinks of known strength, and heads that are
none."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformer_lens import TransformerBridge, TransformerBridgeConfig

N_LAYERS, N_HEADS, N_POS, D_HEAD, N_CONTENT = 4, 8, 64, 64, 8
BOS, DELIMITER, D_VOCAB = 0, 1, 12
CONSTANT, TYPE, POSITION = 0, 1, 3  # where the stream holds a one, the two token types, the position
CONTENT = POSITION + N_POS
D_MODEL = CONTENT + N_CONTENT
CONTROLS = ("uniform", "self", "previous", "local")
LAST_SINK = N_POS - 1 - 16  # a sink after it is seen by fewer than 16 later queries


@dataclass(frozen=True)
class Plant:
    """A head with a constant attention logit on one key: BOS, the delimiter, or a position."""

    layer: int
    head: int
    kind: str
    position: int  # of kind "position" only
    logit: float


def planted_bridge() -> Any:
    """The model without heads: every one attends evenly and writes noise where no query or key reads."""
    config = TransformerBridgeConfig(
        d_model=D_MODEL, d_head=D_HEAD, n_layers=N_LAYERS, n_heads=N_HEADS, n_ctx=N_POS, d_vocab=D_VOCAB,
        attn_only=True, normalization_type=None, positional_embedding_type="standard", act_fn="relu", seed=0,
    )  # fmt: skip
    boot: Any = TransformerBridge  # boot_native is added at run time
    bridge = boot.boot_native(config, device="cpu").eval()
    bridge.requires_grad_(False)
    return bridge


@torch.no_grad()
def plant(bridge: Any, seed: int, n_plants: int) -> list[Plant]:
    """Write `n_plants` sinks into random heads and controls into all others; returns the sinks."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    _embeddings(bridge, generator)
    cells = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
    rng.shuffle(cells)
    plants = []
    for i, (layer, head) in enumerate(cells):
        if i < n_plants:
            kind = ("bos", "delimiter", "position")[i % 3]
            logit = math.log(N_POS) + rng.uniform(0.5, 4)
            plants.append(Plant(layer, head, kind, rng.randint(1, LAST_SINK), logit))
            query, key = _sink(plants[-1])
        else:
            query, key = control(CONTROLS[i % len(CONTROLS)])
        _write(bridge, layer, head, query, key, generator, drained=i < n_plants)
    return plants


def planted_tokens(n: int, seed: int) -> Tensor:
    """BOS, content, and one delimiter per row at a place of its own."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, D_VOCAB, (n, N_POS), generator=generator)
    tokens[:, 0] = BOS
    tokens[torch.arange(n), torch.randint(1, LAST_SINK + 1, (n,), generator=generator)] = DELIMITER
    return tokens


def sink_key(plant: Plant, tokens: Tensor) -> Tensor:
    """The position of the planted sink in every row."""
    if plant.kind == "delimiter":
        return (tokens == DELIMITER).int().argmax(1)
    return torch.full((len(tokens),), 0 if plant.kind == "bos" else plant.position)


def control(kind: str) -> tuple[Tensor, Tensor]:
    """Query and key maps `[d_head, d_model]` of a head that attends evenly, to itself, to the previous token, or evenly
    to the last four."""
    query, key = torch.zeros(D_HEAD, D_MODEL), torch.zeros(D_HEAD, D_MODEL)
    offsets = {"uniform": (), "self": (0,), "previous": (1,), "local": (0, 1, 2, 3)}[kind]
    place = torch.arange(N_POS)
    query[place, POSITION + place] = 1.0
    for offset in offsets:
        key[place[offset:], POSITION + place[: N_POS - offset]] = 30.0 * math.sqrt(D_HEAD)
    return query, key


def _sink(plant: Plant) -> tuple[Tensor, Tensor]:
    query, key = torch.zeros(D_HEAD, D_MODEL), torch.zeros(D_HEAD, D_MODEL)
    query[0, CONSTANT] = 1.0
    column = {"bos": TYPE, "delimiter": TYPE + 1, "position": POSITION + plant.position}[plant.kind]
    key[0, column] = plant.logit * math.sqrt(D_HEAD)
    return query, key


def _embeddings(bridge: Any, generator: torch.Generator) -> None:
    tokens, positions = torch.zeros(D_VOCAB, D_MODEL), torch.zeros(N_POS, D_MODEL)
    tokens[:, CONSTANT] = 1.0
    tokens[BOS, TYPE] = tokens[DELIMITER, TYPE + 1] = 1.0
    tokens[:, CONTENT:] = torch.randn(D_VOCAB, N_CONTENT, generator=generator)
    positions[torch.arange(N_POS), POSITION + torch.arange(N_POS)] = 1.0
    named = dict(bridge.original_model.named_parameters())
    named["tok_embed._original_component.weight"].copy_(tokens)
    named["pos._original_component.weight"].copy_(positions)


def _write(
    bridge: Any, layer: int, head: int, query: Tensor, key: Tensor, generator: torch.Generator, *, drained: bool
) -> None:
    named = dict(bridge.original_model.named_parameters())
    rows = slice(head * D_HEAD, (head + 1) * D_HEAD)
    at = f"layers.{layer}._original_component.attn._original_component."
    value = 0.1 * torch.randn(D_HEAD, D_MODEL, generator=generator)
    if drained:
        value[:] = 0
    for part, weight in {"q": query, "k": key, "v": value}.items():
        named[f"{at}{part}._original_component.weight"][rows].copy_(weight)
        named[f"{at}{part}._original_component.bias"][rows].zero_()
    out = torch.zeros(D_MODEL, D_HEAD)
    out[CONTENT:] = 0.1 * torch.randn(N_CONTENT, D_HEAD, generator=generator)
    named[f"{at}o._original_component.weight"][:, rows].copy_(out)
    named[f"{at}o._original_component.bias"].zero_()
