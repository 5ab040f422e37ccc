"""Which depth of tinyworld-gpt makes the studies most telling? Compare trained candidates on the same prompts.

    python experiments/choose_depth.py runs/gpt4 runs/gpt6 runs/gpt8 --write data/models/tinyworld-gpt/depths.json

For each candidate: how well attribution patching (gradient times difference) approximates exact activation patching on
indirect-object prompts, by site; over how many heads the task is spread; in which layer what is known at the repeated
name has moved to the end; and which heads known from larger models have grown (induction, previous token, sinks).
Attribution is known to fail in depth (Kramar et al. 2024, arXiv:2403.00745), so a depth where it begins to fail,
while the model still does the task with few heads, has the most to show.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import interp
from interp import tinyworld

SITES = ("resid_pre", "attn_out", "mlp_out", "z")
THRESHOLD = 0.4  # attention mass that makes a head one of its kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", type=Path, nargs="+", help="model directories")
    parser.add_argument("--n", type=int, default=48, help="indirect-object prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a JSON file for the comparison, which the model's card shows")
    parser.add_argument("--verdict", default="", help="what was chosen and why, kept with the numbers")
    arguments = parser.parse_args()
    rows = [compare(path, arguments.n, arguments.seed) for path in arguments.candidates]
    for row in rows:
        print(json.dumps(row, indent=1))
    if arguments.write:
        arguments.write.write_text(json.dumps({"candidates": rows, "verdict": arguments.verdict}, indent=1) + "\n")


def compare(path: Path, n: int, seed: int) -> dict[str, Any]:
    """Everything that is weighed for one candidate."""
    bridge = interp.load_model(path)
    prompts = interp.prompts.ioi(bridge, n=n, seed=seed)
    metric = interp.metrics.logit_difference(prompts)
    row: dict[str, Any] = {"layers": bridge.cfg.n_layers, "prompts": n, **trained(path)}
    approximations = attribute(bridge, prompts, metric)
    for site in SITES:
        effects = interp.patching.activation_patch(bridge, prompts, metric, site=site)
        exact = effects.mean().values.ravel()
        approximate = approximations[site].ravel()
        row["clean logit difference"] = round(float(effects.clean.mean()), 2)
        row["corrupted logit difference"] = round(float(effects.corrupted.mean()), 2)
        row[site] = {
            "pearson": correlation(exact, approximate, "pearson"),
            "spearman": correlation(exact, approximate, "spearman"),
            "top-5 overlap": overlap(exact, approximate, 5),
            "mean absolute error / largest effect": round(
                float(np.abs(exact - approximate).mean() / np.abs(exact).max()), 3
            ),
        }
        if site == "z":
            row["heads"] = localisation(exact, effects, bridge.cfg.n_heads)
    stream = interp.patching.activation_patch(bridge, prompts, metric, positions=["s2", "end"]).recovery()
    for at, values in zip(("s2", "end"), stream.transpose("pos", "layer").values, strict=True):
        row[f"recovery of the stream at {at}"] = [round(float(value), 2) for value in values]
    row["kinds of heads"] = kinds(bridge, seed)
    return row


def trained(path: Path) -> dict[str, Any]:
    """How long the candidate was trained and how far it came, from its metrics.json."""
    metrics = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
    rows = [row for row in metrics["accuracy"] if row["kind"] == "all" and row["split"] == "heldout"]
    held_out = {row["family"]: row["accuracy"] for row in rows}
    two_hop = held_out.pop("two_hop")
    return {"tokens": metrics["tokens"], "lowest accuracy": min(held_out.values()), "two-hop held out": two_hop}


def attribute(bridge: Any, prompts: Any, metric: Any) -> dict[str, np.ndarray]:
    """Mean effect of patching each cell, to first order: gradient on the corrupted run times (clean - corrupted)."""
    layers = range(bridge.cfg.n_layers)
    names = {(site, layer): interp.hooks.hook_name(site, layer) for site in SITES for layer in layers}
    with torch.no_grad(), interp.hooks.reads(bridge, list(names.values())) as clean:
        bridge(prompts.clean)
    clean = dict(clean)
    embedded = interp.hooks.hook_name("resid_pre", 0)

    def differentiable(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().requires_grad_()

    with (
        interp.hooks.interventions(bridge, {embedded: differentiable}),
        interp.hooks.reads(bridge, list(names.values())) as corrupted,
        interp.hooks.gradients(bridge, list(names.values())) as gradient,
    ):
        metric(bridge(prompts.corrupted)).sum().backward()
    effects: dict[str, np.ndarray] = {}
    for site in SITES:
        # z is [batch, pos, head, d_head] and summed over positions, the others [batch, pos, d_model]
        product = [gradient[names[site, i]] * (clean[names[site, i]] - corrupted[names[site, i]]) for i in layers]
        cells = [p.sum((1, 3)) if site == "z" else p.sum(-1) for p in product]
        effects[site] = torch.stack([cell.mean(0) for cell in cells]).detach().cpu().numpy()
    return effects


def correlation(exact: np.ndarray, approximate: np.ndarray, kind: Literal["pearson", "spearman"]) -> float:
    """Correlation over cells."""
    return round(float(interp.stats.correlation(exact, approximate, kind=kind, n_resamples=1).estimate), 3)


def overlap(exact: np.ndarray, approximate: np.ndarray, k: int) -> float:
    """Share of the k largest effects (by size) that the approximation also ranks among its k largest."""
    top = [set(np.argsort(-np.abs(values))[:k].tolist()) for values in (exact, approximate)]
    return round(len(top[0] & top[1]) / k, 2)


def localisation(exact: np.ndarray, effects: Any, n_heads: int) -> dict[str, Any]:
    """How few heads carry the task: their recovery, and the effective number of heads (inverse participation)."""
    share = np.abs(exact) / np.abs(exact).sum()
    recovery = effects.recovery().values.ravel()
    order = np.argsort(-recovery)[:4]
    return {
        "effective number": round(float(1 / (share**2).sum()), 1),
        "of": int(exact.size),
        "largest recovery": {f"L{i // n_heads}H{i % n_heads}": round(float(recovery[i]), 2) for i in order},
    }


@torch.no_grad()
def kinds(bridge: Any, seed: int) -> dict[str, Any]:
    """Heads whose attention is mostly to the token after an earlier copy, to the token before, or to the first one."""
    rng = random.Random(seed)
    documents = [tinyworld.TABLE["induction"].draw(rng, kind="bare", length=12) for _ in range(32)]
    ids = torch.from_numpy(tinyworld.encode(documents).ids)
    names = [interp.hooks.hook_name("pattern", layer) for layer in range(bridge.cfg.n_layers)]
    with interp.hooks.reads(bridge, names) as patterns:
        bridge(ids)
    found: dict[str, Any] = {"induction": {}, "previous token": {}, "first token": {}}
    for layer, name in enumerate(names):
        mean = patterns[name].mean(0)  # [head, dest, src]
        dest = torch.arange(13, 24)  # the second copy, start token at 0
        scores = {
            "induction": mean[:, dest, dest - 11].mean(-1),
            "previous token": mean[:, dest, dest - 1].mean(-1),
            "first token": mean[:, 2:, 0].mean(-1),
        }
        for kind, values in scores.items():
            for head, value in enumerate(values.tolist()):
                if value > THRESHOLD:
                    found[kind][f"L{layer}H{head}"] = round(value, 2)
    return found


if __name__ == "__main__":
    main()
