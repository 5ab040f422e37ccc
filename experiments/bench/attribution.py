"""Attribution patching against a plain forward and backward pass, and against TransformerLens, in one process.

    python experiments/bench/run.py --only attribution

`passes` are times of a plain forward and backward pass of the whole batch, which is what scores of any kind cannot be
had for less than. Scores of every site are taken at once: residual streams, outputs, heads' queries, keys, values,
outputs and patterns, neurons. TransformerLens scores one pair at a time, and heads and MLPs only; the same scores are
compared, at every position, and `difference` is the largest between the two beside the largest score.
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
from interp.models import data_dir
from interp.patching import attribution_patch
from interp.types import SITES

START = "blocks.0.hook_resid_pre"
MOST_PASSES, LEAST_SPEED_UP = 4.0, 2.6


def main(device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    bridge, prompts, name = case(device, quick)
    metric, repeats = logit_difference(prompts), 2 if quick else 7
    plain, _ = timed(device, repeats, lambda: forward_and_backward(bridge, prompts, metric))
    kinds: dict[str, dict[str, Any]] = {
        "gradient, all sites": {"sites": SITES},
        "gradient, default sites": {},
        "relp, all sites": {"sites": SITES, "method": "relp"},
        "integrated gradients (5), all sites": {"sites": SITES, "method": "integrated_gradients"},
        "gradient with QK fix, all sites": {"sites": SITES, "qk_fix": True},
        "GradDrop, all sites": {"sites": SITES, "grad_drop": True},
    }
    rows: list[dict[str, Any]] = []
    for kind, options in kinds.items():
        seconds, found = timed(device, repeats, lambda o=options: attribution_patch(bridge, prompts, metric, **o))
        record = next(iter(found.values())).provenance
        rows.append(
            {
                "what": f"{kind}; {name}",
                "cells": sum(effects.mean().size for effects in found.values()),
                "forwards": record["cost"]["forwards"],
                "backwards": record["cost"]["backwards"],
                "seconds": round(seconds, 4),
                "passes": round(seconds / plain, 2),
                "target": f"<= {MOST_PASSES:g}" if kind == "gradient, all sites" else "",
            }
        )
    rows.append(against_peer(device, bridge, prompts, metric, name, repeats))
    return rows


def case(device: str, quick: bool) -> tuple[Any, Any, str]:
    """The embedded model on indirect-object prompts; where there is none, a random one of its shape."""
    n = 8 if quick else 64
    if (data_dir() / "models" / "tinyworld-gpt").is_dir():
        bridge = interp.load_model("tinyworld-gpt", device=device, check=False)
        prompts = interp.prompts.ioi(bridge, n=n)
        return bridge, prompts, f"tinyworld-gpt, {len(prompts)} x {prompts.clean.shape[1]}"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=128, n_head=8, vocab_size=378)).eval()
    bridge = interp.load_model(model.to(torch.device(device)), tokenizer=interp.tinyworld.tokenizer(), check=False)  # pyright: ignore[reportArgumentType]
    prompts = interp.prompts.ioi(bridge, n=n)
    return bridge, prompts, f"random model, {len(prompts)} x {prompts.clean.shape[1]}"


def forward_and_backward(bridge: Any, prompts: Any, metric: Any) -> Tensor:
    """Gradient of the metric at the embeddings, with nothing but the model's own work. Parameters are frozen."""
    device = next(iter(bridge.original_model.parameters())).device
    started: list[Tensor] = []

    def start(tensor: Tensor, *, hook: Any) -> Tensor:
        started[:] = [tensor.detach().requires_grad_()]
        return started[0]

    with hooks.no_retained_graph(bridge), bridge.hooks(fwd_hooks=[(START, start)]):
        total = metric(bridge(prompts.corrupted.to(device), use_cache=False)).sum()
        return torch.autograd.grad(total, started)[0]


def against_peer(device: str, bridge: Any, prompts: Any, metric: Any, name: str, repeats: int) -> dict[str, Any]:
    """Heads and MLPs at every position, by both."""

    axes = {"z": ("layer", "pos", "head"), "mlp_out": ("layer", "pos")}

    def ours() -> dict[str, Tensor]:
        found = attribution_patch(bridge, prompts, metric, sites=("z", "mlp_out"), axes=axes)  # type: ignore[arg-type]
        return {site: torch.tensor(effects.mean().values) for site, effects in found.items()}

    theirs, expected = timed(device, 1, lambda: peer(bridge, prompts))
    seconds, found = timed(device, repeats, ours)
    difference = max(float((found[key] - expected[key]).abs().max()) for key in expected)
    return {
        "what": f"heads and MLPs at every position; {name}",
        "cells": sum(scores.numel() for scores in expected.values()),
        "seconds": round(seconds, 4),
        "TransformerLens s": round(theirs, 2),
        "speed-up": round(theirs / seconds, 1),
        "target": f">= {LEAST_SPEED_UP:g}",
        "difference": f"{difference:.1e}",
        "largest score": round(max(float(scores.abs().max()) for scores in expected.values()), 3),
    }


def peer(bridge: Any, prompts: Any) -> dict[str, Tensor]:
    """Mean scores of heads [layer, pos, head] and MLPs [layer, pos] by TransformerLens, one pair at a time."""
    tl: Any = importlib.import_module("transformer_lens.tools.analysis.attribution_patching")
    device = next(iter(bridge.original_model.parameters())).device
    n, n_pos = prompts.clean.shape
    heads = torch.zeros(bridge.cfg.n_layers, n_pos, bridge.cfg.n_heads)
    mlps = torch.zeros(bridge.cfg.n_layers, n_pos)
    bridge.requires_grad_(True)  # it starts its graph at the parameters
    try:
        for i in range(n):
            pair = prompts[i : i + 1]
            metric = logit_difference(pair)
            tokens = (pair.clean.to(device), pair.corrupted.to(device))
            with hooks.no_retained_graph(bridge):
                found = tl.attribution_patch(bridge, *tokens, lambda logits, m=metric: m(logits).sum())
            for node, score in found.node_scores.items():
                if node.kind == "attn_head_out":
                    heads[node.layer, node.position, node.head] += score / n
                elif node.kind == "mlp_out":
                    mlps[node.layer, node.position] += score / n
    finally:
        bridge.requires_grad_(False)
    return {"z": heads, "mlp_out": mlps}


def timed(device: str, repeats: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """Fewest seconds, and the result. CPU time where the CPU computes: other programs on the machine do not count."""
    on_cpu = torch.device(device).type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    seconds, result = [], run()  # the first call probes the model
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
