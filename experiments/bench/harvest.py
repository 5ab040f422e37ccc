"""Harvesting to disk against a plain transformers forward of the same model on the same batches, and its memory.

    python experiments/bench/run.py --only harvest

For each model: tokens per second of `transformers` (logits of every batch, nothing kept), of a harvest whose hook is
in the first quarter of the layers, and of one whose hook is the last layer's output. Harvesting includes hashing and
writing. Runs alternate and the fastest of each counts. `share computed` is the part of a plain forward's
multiplications that the harvest needs, so `harvest / plain` could reach its inverse. Peak memory is that of the
process (of tensors on a GPU), model included, while harvesting N and 4 N tokens.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import interp
from interp.models import data_dir, geometry

TARGETS = {"first quarter": 1.2, "last layer": 0.7}


class Case(NamedTuple):
    name: str
    plain: Any  # the transformers model
    bridge: Any
    tokens: torch.Tensor
    batch_size: int


def main(device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    return [row for case in cases(device, quick) for row in measure(case, repeats=2 if quick else 3)]


def cases(device: str, quick: bool) -> list[Case]:
    n = (1 if quick else 2) * (8 if device == "cpu" else 64)
    found = []
    for name in ("tinyworld-gpt", "tinyworld-llama"):
        if (data_dir() / "models" / name).is_dir():
            plain: Any = AutoModelForCausalLM.from_pretrained(data_dir() / "models" / name)
            plain.eval().to(device)
            bridge = interp.load_model(name, device=device)
            found.append(case(name, plain, bridge, examples=64 * n, pos=64, batch_size=64))
    size: dict[str, Any] = {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 5000} if quick else {}
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(**size))
    plain.eval().to(device)
    bridge = interp.load_model(plain, tokenizer=interp.tinyworld.tokenizer(), check=False)  # any will do
    shape = f"random GPT-2 ({plain.config.n_layer} layers, {plain.config.n_embd})"
    return [*found, case(shape, plain, bridge, examples=n, pos=128, batch_size=8)]


def case(name: str, plain: Any, bridge: Any, *, examples: int, pos: int, batch_size: int) -> Case:
    high = geometry(bridge).d_vocab
    tokens = torch.randint(0, high, (examples, pos), generator=torch.Generator().manual_seed(0))
    return Case(name, plain, bridge, tokens, batch_size)


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    sizes = geometry(case.bridge)
    layers = {"first quarter": max(0, sizes.n_layers // 4 - 1), "last layer": sizes.n_layers - 1}
    hooks = {where: f"blocks.{layer}.hook_resid_post" for where, layer in layers.items()}
    runs: dict[str, Callable[[], None]] = {"plain": lambda: forward_plain(case)}
    runs |= {where: lambda hook=hook: harvest(case, hook, case.tokens) for where, hook in hooks.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(timed(run, case.plain.device))
    plain = min(times["plain"])
    rows = []
    for where, hook in hooks.items():
        seconds = min(times[where])
        once = peak_memory(lambda hook=hook: harvest(case, hook, case.tokens), case.plain.device)
        many = peak_memory(lambda hook=hook: harvest(case, hook, case.tokens.repeat(4, 1)), case.plain.device)
        rows.append(
            {
                "model": case.name,
                "hook": hook,
                "batch": f"{case.batch_size} x {case.tokens.shape[1]}",
                "plain tokens/s": round(case.tokens.numel() / plain),
                "harvest tokens/s": round(case.tokens.numel() / seconds),
                "harvest / plain": round(plain / seconds, 2),
                "target": f">= {TARGETS[where]}",
                "share computed": round(share(case, layers[where]), 2),
                "N": case.tokens.numel(),
                "peak memory at N (MB)": round(once / 1e6),
                "peak memory at 4 N (MB)": round(many / 1e6),
            }
        )
    return rows


@torch.no_grad()
def forward_plain(case: Case) -> None:
    for batch in case.tokens.split(case.batch_size):
        case.plain(batch.to(case.plain.device))


def harvest(case: Case, hook: str, tokens: torch.Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        interp.cache.harvest(
            case.bridge,
            tokens,
            hook,
            Path(folder) / "store",
            batch_size=case.batch_size,
            shard_tokens=case.tokens.numel() // 4,
        )


def share(case: Case, layer: int) -> float:
    """Weights that a token is multiplied by up to this layer, over those of the whole forward."""
    sizes = geometry(case.bridge)
    block = sum(weight.numel() for name, weight in case.plain.named_parameters() if ".0." in name and weight.ndim == 2)
    return (layer + 1) * block / (sizes.n_layers * block + sizes.d_model * sizes.d_vocab)


def timed(run: Callable[[], None], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(run: Callable[[], None], device: torch.device) -> float:
    """Bytes held at the highest point while running, model included: by the process, or by tensors on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device)
    highest, done = resident(), threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return highest


def resident() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0  # not Linux: the columns of memory stay at zero
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    for row in main(quick=True):
        print(row)
