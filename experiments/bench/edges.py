"""Edge attribution against the passes it needs, and against TransformerLens, in one process.

    python experiments/bench/run.py --only edges

A random model of GPT-2 small's shape and one pair of 15 tokens that differ everywhere: 32,491 edges at 15 positions.
`passes` are a plain forward of each prompt and one backward pass, which scores of any kind cannot be had for less than;
`beyond` is what all the scores take besides. TransformerLens keeps each score as an object; it is timed on the whole
of the same pair. `speed-up` compares whole calls, of which the passes alone allow no more than `at most`, and
`speed-up beyond` leaves the passes out of both. `difference` is the largest between the two scores of an edge and
position. Several threads that wait for each other count as CPU time: use one on a machine that is shared.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import interp
from interp import hooks
from interp.metrics import logit_difference
from interp.patching.edges import edge_attribution
from interp.patching.path_patching import path_patch
from interp.prompts import Prompts

START = "blocks.0.hook_resid_pre"
MOST_SECONDS, LEAST_SPEED_UP = 1.0, 50.0
N_POS = 15


def main(device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    bridge, prompts, name = case(device, quick)
    metric, repeats = logit_difference(prompts), 2 if quick else 5
    edge_attribution(bridge, prompts, metric)  # probes of the model, made once
    edge_attribution(bridge, prompts, metric, method="relp")
    plain, _ = timed(device, repeats, lambda: passes(bridge, prompts, metric))
    kinds: dict[str, dict[str, Any]] = {
        "gradient, by position": {"per_position": True},
        "gradient, summed over positions": {},
        "relp, by position": {"per_position": True, "method": "relp"},
        "integrated gradients (5), by position": {"per_position": True, "method": "integrated_gradients"},
    }
    rows, ours, mine = [], 0.0, None
    for kind, options in kinds.items():
        seconds, found = timed(device, repeats, lambda o=options: edge_attribution(bridge, prompts, metric, **o))
        if not rows:
            ours, mine = seconds, found
        rows.append(
            {
                "what": f"{kind}; {name}",
                "scores": int(found.values.notnull().sum()),
                "seconds": round(seconds, 3),
                "passes": round(plain, 3),
                "beyond": round(seconds - plain, 3),
                "target": f"<= {MOST_SECONDS:g}" if not rows else "",
            }
        )
    rows.append(against_peer(device, bridge, prompts, mine, ours, plain, name))
    best = mine.top(10, reduce=["example"])["edge"].unique() if mine is not None else []
    seconds, _ = timed(device, 1, lambda: path_patch(bridge, prompts, metric, list(best)))
    rows.append({"what": f"exact, {len(best)} edges one at a time; {name}", "seconds": round(seconds, 3)})
    return rows


def case(device: str, quick: bool) -> tuple[Any, Prompts, str]:
    """A random model of GPT-2 small's shape (a smaller one if quick) and a pair of random prompts."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"n_layer": 3, "n_embd": 96, "n_head": 6, "vocab_size": 2000} if quick else {}
    model = GPT2LMHeadModel(GPT2Config(**size)).eval()
    bridge = interp.load_model(model.to(torch.device(device)), tokenizer=interp.tinyworld.tokenizer(), check=False)  # pyright: ignore[reportArgumentType]
    bridge.cfg.default_prepend_bos = False  # any tokens will do
    clean, corrupted = torch.randint(0, 300, (2, 1, N_POS)).unbind(0)
    prompts = Prompts(clean, corrupted, torch.tensor([1]), torch.tensor([2]), name="one random pair")
    return bridge, prompts, f"{'a small model' if quick else 'GPT-2 small shape'}, 1 x {N_POS}"


def passes(bridge: Any, prompts: Prompts, metric: Any) -> Tensor:
    """A forward of each prompt and the gradient at the embeddings, with nothing but the model's own work."""
    device = next(iter(bridge.original_model.parameters())).device
    started: list[Tensor] = []

    def start(tensor: Tensor, *, hook: Any) -> Tensor:
        started[:] = [tensor.detach().requires_grad_()]
        return started[0]

    with torch.no_grad():
        bridge(prompts.clean.to(device), use_cache=False, logits_to_keep=1)
    with hooks.no_retained_graph(bridge), bridge.hooks(fwd_hooks=[(START, start)]):
        total = metric(bridge(prompts.corrupted.to(device), use_cache=False)).sum()
        return torch.autograd.grad(total, started)[0]


def against_peer(
    device: str, bridge: Any, prompts: Prompts, mine: Any, ours: float, plain: float, name: str
) -> dict[str, Any]:
    """The same scores by TransformerLens."""
    tl: Any = importlib.import_module("transformer_lens.tools.analysis.attribution_patching")
    answer, foil = int(prompts.answers[0]), int(prompts.foils[0])
    bridge.requires_grad_(True)  # as it must be for theirs
    seconds, found = timed(
        device,
        1,
        lambda: tl.attribution_patch(
            bridge,
            prompts.clean,
            prompts.corrupted,
            lambda logits: logits[0, -1, answer] - logits[0, -1, foil],
            config=tl.EdgeAttributionConfig(granularity="edge"),
        ),
    )
    bridge.requires_grad_(False)
    scores, graph = mine.values.isel(example=0).values, mine.graph
    writers = {name: place for place, name in enumerate(graph.writers)}
    readers = {name: place for place, name in enumerate(graph.readers)}
    worst = 0.0
    for (writer, reader), score in found.edge_scores.items():
        place = writers[name_of(writer)], readers[name_of(reader)], writer.position
        worst = max(worst, abs(float(score) - float(scores[place])))
    return {
        "what": f"every edge and position; {name}",
        "scores": len(found.edge_scores),
        "seconds": round(ours, 3),
        "TransformerLens s": round(seconds, 1),
        "speed-up": round(seconds / ours, 1),
        "at most": round(seconds / plain, 1),
        "speed-up beyond": round((seconds - plain) / (ours - plain), 1),
        "target": f">= {LEAST_SPEED_UP:g}",
        "difference": f"{worst:.1e}",
        "largest score": f"{float(mine.values.max()):.2g}",
    }


def name_of(node: Any) -> str:
    """What a node of TransformerLens is called here."""
    if node.kind in ("embed", "logits"):
        return {"embed": "input", "logits": "logits"}[node.kind]
    if node.kind.startswith("mlp"):
        return f"m{node.layer}"
    part = "" if node.kind == "attn_head_out" else f"<{node.kind[0]}>"
    return f"a{node.layer}.h{node.head}{part}"


def timed(device: str, repeats: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """Fewest seconds of some runs, and the result. CPU time where the CPU computes: other programs do not count."""
    on_cpu = torch.device(device).type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    best, result = float("inf"), None
    for _ in range(repeats):
        start = clock()
        result = run()
        if not on_cpu:
            torch.cuda.synchronize(device)
        best = min(best, clock() - start)
    return best, result
