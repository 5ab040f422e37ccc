"""Attention statistics at long context: blocks of rows against the dense pattern, memory and time against length.

    python experiments/bench/run.py --only attention

One layer of random queries, keys and values (64 dimensions per head), then a whole random Llama. `streaming` makes and
reduces blocks of rows; `dense` makes the pattern and takes the same statistics of it, as long as it fits. `extra MiB`
is the largest memory in use above what was there before: resident memory on a CPU (Linux only), allocated memory on a
GPU. `attention s` is one call of torch's fused attention over the same tensors, which gives no statistics at all; for a
model, one plain forward of the bridge, where it fits. `difference` is the largest between the routes, of the importance
of any key.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from _measuring import measured
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import interp
from interp.attention import (
    column_entropy,
    row_entropy,
    sink_importance,
    sink_scores,
    stream_statistics,
    streaming_statistics,
)

D_HEAD = 64
DENSE_UP_TO = 2**31  # bytes of one dense pattern, of which several copies are made
PER_HEAD_MIB, LAYER_MIB = 128, 1024


def main(device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    on_cpu = torch.device(device).type == "cpu"
    rows = []
    for n_pos in (512, 1024) if quick else (1024, 4096, 8192, 16384, 32768):
        rows += one_layer(device, heads=1, n_pos=n_pos)
    if not on_cpu:
        rows += one_layer(device, heads=32, n_pos=1024 if quick else 32768)
    for n_pos in (256,) if quick else (1024, 4096, 16384):
        rows += model(device, n_pos)
    return rows


@torch.no_grad()
def one_layer(device: str, heads: int, n_pos: int) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n_pos, D_HEAD, generator=generator).to(device) for _ in range(3))
    warm = (t[:, :, :256] for t in (q, k, v))
    streaming_statistics(*warm)
    fused, _, _ = measured(device, lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    seconds, extra, found = measured(device, lambda: streaming_statistics(q, k, v))
    case = {"case": f"{heads} head{'s' * (heads > 1)}", "T": n_pos}
    limit = PER_HEAD_MIB if heads == 1 else LAYER_MIB
    yield line(case, "streaming", seconds, extra, fused) | {"limit MiB": limit}
    if 4 * heads * n_pos**2 <= DENSE_UP_TO:
        seconds, extra, expected = measured(device, lambda: dense(q, k, v))
        difference = float((found.importance - expected).abs().max())
        yield line(case, "dense", seconds, extra, fused) | {"difference": f"{difference:.1e}"}


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The main statistics and the output from the whole pattern."""
    scores = q @ k.transpose(-1, -2) * D_HEAD**-0.5
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    pattern = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    for statistic in (row_entropy, column_entropy):
        statistic(pattern)
    for reduced in (pattern.max, pattern.sum, pattern.norm):
        reduced(dim=-1)
    pattern.amax(-2)
    torch.matmul(pattern, v)
    return sink_importance(pattern)


@torch.no_grad()
def model(device: str, n_pos: int) -> Iterator[dict[str, Any]]:
    bridge = llama(device)
    tokens = torch.randint(3, int(bridge.cfg.d_vocab), (1, n_pos), generator=torch.Generator().manual_seed(0))
    stream_statistics(bridge, tokens[:, :64])  # probes of the model, made once
    seconds, extra, found = measured(device, lambda: stream_statistics(bridge, tokens, keep=["max"]))
    case = {"case": f"Llama, {bridge.cfg.n_layers} layers of {bridge.cfg.n_heads} heads", "T": n_pos}
    if 4 * int(bridge.cfg.n_heads) * n_pos**2 > DENSE_UP_TO:
        yield line(case, "streaming", seconds, extra, None)
        return
    forward, _, _ = measured(device, lambda: bridge(tokens.to(device)))
    yield line(case, "streaming", seconds, extra, forward)
    seconds, extra, expected = measured(device, lambda: sink_scores(bridge, tokens))
    difference = float(abs(found.importance - expected.values).max())
    yield line(case, "dense (importance only)", seconds, extra, forward) | {"difference": f"{difference:.1e}"}


@functools.cache
def llama(device: str) -> Any:
    config = LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=32768,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().to(torch.device(device))  # pyright: ignore[reportArgumentType]
    return interp.load_model(model, tokenizer=interp.tinyworld.tokenizer(), check=False)


def line(case: dict[str, Any], route: str, seconds: float, extra: float | None, fused: float | None) -> dict[str, Any]:
    return {
        **case,
        "route": route,
        "s": round(seconds, 2),
        "extra MiB": "" if extra is None else round(extra, 1),
        "limit MiB": "",
        "attention s": "" if fused is None else round(fused, 3),
        "ratio": "" if fused is None else round(seconds / fused, 1),
        "difference": "",
    }


if __name__ == "__main__":
    for row in main(quick=True):
        print(row)
