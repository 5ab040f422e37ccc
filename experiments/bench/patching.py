"""Exact patching against TransformerLens' `get_act_patch_block_every`, in one process, at equal results.

    python experiments/bench/run.py --only patching

Full (layer x position) sweeps of resid_pre, attn_out and mlp_out, with the logit difference as metric. TransformerLens
runs one forward per cell; its time does not depend on the tokens. Ours does: pairs that agree up to some token, as
indirect-object prompts do, need no work at the positions before it. So there are also pairs that differ everywhere.
`forwards` are forward-equivalents (one block on one token, over those of a forward of all prompts): `one per cell`,
what `ran`, and `minimum`, the blocks from the patch on at the positions from the first changed one on. `difference` is
the largest between the two, of the mean metric of a patched run, beside its largest effect.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import interp
from interp.metrics import logit_difference
from interp.models import data_dir
from interp.patching import Effects, activation_patch
from interp.prompts import Prompts

SITES = ("resid_pre", "attn_out", "mlp_out")
TARGET = 3.0


def main(device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    rows = []
    for name, bridge, prompts in cases(device, quick):
        metric = logit_difference(prompts)
        sweep(bridge, prompts[:1], logit_difference(prompts[:1]), layers=[0])  # probes of the model, made once
        # the large model's minutes are their own average; the small one's seconds are taken three times
        repeats = 1 if bridge.cfg.d_model > 256 else 3
        ours, found = timed(device, repeats, lambda b=bridge, p=prompts, m=metric: sweep(b, p, m))
        theirs, expected = timed(device, repeats, lambda b=bridge, p=prompts: peer(b, p))
        rows.append(row(name, prompts, theirs, ours, expected, found))
    return rows


def cases(device: str, quick: bool) -> Iterator[tuple[str, Any, Prompts]]:
    """A trained small model on indirect-object prompts, and a random one of GPT-2 small's shape."""
    if (data_dir() / "models" / "tinyworld-gpt").is_dir():
        bridge = interp.load_model("tinyworld-gpt", device=device)
        prompts = interp.prompts.ioi(bridge, n=4 if quick else 16)
        yield "tinyworld-gpt, indirect object", bridge, prompts
        yield "tinyworld-gpt, all tokens differ", bridge, scrambled(prompts)
    size = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 2000} if quick else {}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**size)).eval().to(torch.device(device))  # pyright: ignore[reportArgumentType]
    bridge = interp.load_model(model, tokenizer=interp.tinyworld.tokenizer(), check=False)  # any will do
    clean = torch.randint(100, bridge.cfg.d_vocab, (8, 15), generator=torch.Generator().manual_seed(0))
    clean[:, 0] = bridge.tokenizer.bos_token_id
    prompts = Prompts(clean, clean.clone(), clean[:, 1], clean[:, 2])
    name = f"random GPT-2 ({model.config.n_layer} layers, {model.config.n_embd}), all tokens differ"
    yield name, bridge, scrambled(prompts)


def scrambled(prompts: Prompts) -> Prompts:
    """The same clean prompts, corrupted at every token but the first."""
    corrupted = prompts.clean.clone()
    corrupted[:, 1:] = prompts.clean[:, 1:].flip(0).roll(1, 1)
    return dataclasses.replace(prompts, corrupted=corrupted)


def sweep(bridge: Any, prompts: Prompts, metric: Any, layers: list[int] | None = None) -> dict[str, Effects]:
    return {site: activation_patch(bridge, prompts, metric, site=site, layers=layers) for site in SITES}  # type: ignore[arg-type]


@torch.no_grad()
def peer(bridge: Any, prompts: Prompts) -> Tensor:
    """The mean metric of every patched run, [site, layer, pos], by TransformerLens."""
    tl: Any = importlib.import_module("transformer_lens.patching")
    metric = logit_difference(prompts)
    device = next(iter(bridge.original_model.parameters())).device
    names = tuple(f"hook_{site}" for site in SITES)
    _, cache = bridge.run_with_cache(prompts.clean.to(device), names_filter=lambda name: name.endswith(names))
    bar = tl.tqdm
    tl.tqdm = functools.partial(bar, disable=True)
    try:
        return tl.get_act_patch_block_every(
            bridge, prompts.corrupted.to(device), cache, lambda x: metric(x).mean()
        ).cpu()
    finally:
        tl.tqdm = bar


def row(
    name: str, prompts: Prompts, theirs: float, ours: float, expected: Tensor, found: dict[str, Effects]
) -> dict[str, Any]:
    patched = torch.stack([torch.tensor((e.mean() + e.baseline.mean()).values) for e in found.values()])
    effect = torch.stack([torch.tensor(e.mean().values) for e in found.values()]).abs().max()
    cost = [e.provenance["cost"] for e in found.values()]
    return {
        "prompts": f"{name}: {len(prompts)} x {prompts.clean.shape[1]}",
        "cells": sum(c["cells"] for c in cost),
        "TransformerLens s": round(theirs, 2),
        "interp s": round(ours, 2),
        "speed-up": round(theirs / ours, 2),
        "target": TARGET,
        "forwards: one per cell": round(sum(c["forwards_one_per_cell"] for c in cost)),
        "ran": round(sum(c["forward_equivalents"] for c in cost), 1),
        "minimum": round(sum(c["forward_equivalents_minimum"] for c in cost), 1),
        "difference": f"{float((patched - expected).abs().max()):.1e}",
        "largest effect": round(float(effect), 3),
    }


def timed(device: str, repeats: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """Fewest seconds, and the result. CPU time where the CPU computes: other programs on the machine do not count."""
    on_cpu = torch.device(device).type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    seconds, result = [], None
    for _ in range(repeats):
        start = clock()
        result = run()
        if not on_cpu:
            torch.cuda.synchronize(device)
        seconds.append(clock() - start)
    return min(seconds), result


if __name__ == "__main__":
    for line in main(quick=True):
        print(line)
