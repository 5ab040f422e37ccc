"""Decoding of all neurons of a model beside the machine's own matrix products.

    python experiments/bench/run.py --only decoding

Random weights at the shape of GPT-2 small (36,864 neurons, 50,257 tokens, 768 dimensions), on a GPU also at that of
Llama-3.1-8B (458,752 neurons, 128,256 tokens, 4,096 dimensions, bfloat16). `s` is one call of `interp.neurons.decode`
for one side with lists of ten of both signs, everything included but what is done once per model (the hash of its
weights, the strings of its tokens). `GFLOP/s` counts the products of the scores only (with a null: twice as many).
`product` is the rate of the same machine, measured in the same minute, at nothing but products of one layer with the
unembedding, as large as the device likes them; `share` is the quotient. `extra MiB` is the largest memory in use above
what was there before. Without a GPU the last row is a projection from the published rates of one: peak 989 TFLOP/s in
bfloat16 of which 65 % are reached, 4.8 TB/s, each tile written once and read twice in float32.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from _measuring import measured
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import interp
from interp.neurons import decode

TARGET, LIMIT_MIB, LIMIT_S = 0.7, 512, 5
LLAMA = {"neurons": 458_752, "tokens": 128_256, "d": 4096}


def main(device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    on_gpu = torch.device(device).type == "cuda"
    size: dict[str, Any] = {"n_layer": 1, "vocab_size": 8192, "n_embd": 256, "n_head": 4} if quick else {}
    bridge = wrapped(GPT2LMHeadModel(GPT2Config(**size)), device)
    rows = list(model("GPT-2 small" if not quick else "small", bridge, device, torch.float32))
    del bridge
    if not on_gpu:
        return [*rows, projection()]
    bridge = wrapped(llama(quick, device), device)
    return [*rows, *model("Llama-3.1-8B" if not quick else "small", bridge, device, torch.bfloat16)]


def model(case: str, bridge: Any, device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    budget = 2**28 if torch.device(device).type == "cpu" else 2**33
    n_layers, d = int(bridge.cfg.n_layers), int(bridge.cfg.d_model)
    d_mlp, d_vocab = interp.models.geometry(bridge).d_mlp, int(bridge.W_U.shape[1])
    decode(bridge, layers=[0], null=None, dtype=dtype, memory_budget=budget)  # what is done once per model
    for null in (None, "rotation"):
        own = product_rate(d_mlp, d_vocab, d, device, dtype)
        seconds, extra, _ = measured(
            device,
            lambda null=null: decode(bridge, null=null, dtype=dtype, memory_budget=budget),
            time.perf_counter,  # it is compared with a rate by the clock: run it alone
        )
        own = (own + product_rate(d_mlp, d_vocab, d, device, dtype)) / 2
        rate = (2 if null else 1) * 2 * n_layers * d_mlp * d_vocab * d / seconds / 1e9
        yield {
            "case": case, "null": null or "", "neurons": n_layers * d_mlp, "tokens": d_vocab, "d": d,
            "dtype": str(dtype).removeprefix("torch."), "s": round(seconds, 2), "GFLOP/s": round(rate),
            "product": round(own), "share": round(rate / own, 3), "target": TARGET,
            "extra MiB": "" if extra is None else round(extra), "limit MiB": LIMIT_MIB,
        }  # fmt: skip


def product_rate(n: int, v: int, d: int, device: str, dtype: torch.dtype) -> float:
    """GFLOP/s of the vectors of a layer times blocks of the unembedding, best of three."""
    left = torch.randn(n, d, device=device).to(dtype)
    right = torch.randn(d, min(v, 8192), device=device).to(dtype)
    out = torch.empty(n, right.shape[1], device=device, dtype=dtype)

    def products() -> None:
        for _ in range(6):
            torch.mm(left, right, out=out)

    best = min(measured(device, products, time.perf_counter)[0] for _ in range(3))
    return 6 * 2 * n * right.shape[1] * d / best / 1e9


def projection() -> dict[str, Any]:
    cells = LLAMA["neurons"] * LLAMA["tokens"]
    products = 2 * cells * LLAMA["d"]
    seconds = products / (0.65 * 989e12) + 3 * 4 * cells / 4.8e12
    return {
        "case": "Llama-3.1-8B, projected", **LLAMA, "dtype": "bfloat16", "s": round(seconds, 2),
        "GFLOP/s": round(products / seconds / 1e9), "target": f"{LIMIT_S} s",
    }  # fmt: skip


def wrapped(model: Any, device: str) -> Any:
    return interp.load_model(model.eval().to(device), tokenizer=interp.tinyworld.tokenizer(), check=False)


def llama(quick: bool, device: str) -> Any:
    config = LlamaConfig(
        vocab_size=8192 if quick else LLAMA["tokens"], hidden_size=512 if quick else LLAMA["d"],
        intermediate_size=1024 if quick else 14336, num_hidden_layers=1 if quick else 32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=128,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


if __name__ == "__main__":
    for row in main(quick=True):
        print(row)
