"""Exact evaluation of a circuit on one pair, in plain forwards, in one process.

    python experiments/bench/run.py --only circuits

A random model of GPT-2 small's shape and one pair of 15 tokens. `plain` is a forward of the pair's clean prompt, logits
at every position included, as a user would run it. Evaluating a circuit takes a run of each prompt and one pass in
which every edge outside of it is ablated, out of 32,491; `per circuit` shares the runs of the prompts among ten.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import interp
from interp.metrics import logit_difference
from interp.patching import Circuit, faithfulness
from interp.patching.graph import graph_of
from interp.prompts import Prompts

MOST_FORWARDS = 5.0
N_POS = 15


def main(device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    bridge, prompts, name = case(device, quick)
    metric, graph = logit_difference(prompts), graph_of(bridge)
    options: dict[str, Any] = {"ablation": "swap", "memory_budget": 2**32}  # there is no mean over one pair
    generator = torch.Generator().manual_seed(0)

    def drawn(share: float) -> Circuit:
        return Circuit(graph, graph.exists & (torch.rand(graph.exists.shape, generator=generator) < share))

    single = [drawn(share) for share in (0.01, 0.5)]
    cases: dict[str, Any] = {f"{len(circuit)} of {graph.n_edges} edges kept": circuit for circuit in single}
    cases["ten circuits at once"] = [drawn(share / 10) for share in range(10)]
    rows: list[dict[str, Any]] = []
    for what, circuits in cases.items():
        found: list[Any] = []

        def evaluate(circuits: Any = circuits, found: list[Any] = found) -> None:
            found.append(faithfulness(bridge, prompts, metric, circuits, **options))

        seconds, plain = timed(device, 2 if quick else 5, evaluate, lambda: forward(bridge, prompts))
        n_circuits = len(circuits) if isinstance(circuits, list) else 1
        rows.append(row(f"{what}; {name}", found[-1], n_circuits, seconds, plain))
    return rows


def case(device: str, quick: bool) -> tuple[Any, Prompts, str]:
    """A random model of GPT-2 small's shape (a third of its layers if quick) and a pair of random prompts."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_layer": 4} if quick else {}
    model = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    bridge = interp.load_model(model.to(torch.device(device)), tokenizer=interp.tinyworld.tokenizer(), check=False)  # pyright: ignore[reportArgumentType]
    clean = torch.randint(2, 300, (1, N_POS))
    clean[0, 0] = 1  # BOS
    corrupted = clean.clone()
    corrupted[0, [3, 8]] = clean[0, [3, 8]] + 1
    prompts = Prompts(clean, corrupted, torch.tensor([1]), torch.tensor([2]), name="one random pair")
    return bridge, prompts, f"{'4 layers of ' if quick else ''}GPT-2 small's shape, {N_POS} tokens"


@torch.no_grad()
def forward(bridge: Any, prompts: Prompts) -> None:
    bridge(prompts.clean.to(next(iter(bridge.original_model.parameters())).device), use_cache=False)


def row(what: str, found: Any, n_circuits: int, seconds: float, plain: float) -> dict[str, Any]:
    return {
        "what": what,
        "forwards": found.provenance["cost"]["forwards"],
        "seconds": round(seconds, 4),
        "plain forward s": round(plain, 4),
        "plain forwards": round(seconds / plain, 2),
        "per circuit": round(seconds / plain / n_circuits, 2),
        "target": f"<= {MOST_FORWARDS:g}" if n_circuits == 1 else "",
    }


def timed(device: str, repeats: int, *runs: Callable[[], Any]) -> list[float]:
    """Fewest seconds of each, taken in turns, so that a machine that slows down does so for all. CPU time where the CPU
    computes: other programs on the machine do not count."""
    on_cpu = torch.device(device).type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    seconds: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, taken in zip(runs, seconds, strict=True):
            start = clock()
            run()
            if not on_cpu:
                torch.cuda.synchronize(device)
            if repeat:  # the first call probes the model
                taken.append(clock() - start)
    return [min(taken) for taken in seconds]


if __name__ == "__main__":
    for line in main(quick=True):
        print(line)
