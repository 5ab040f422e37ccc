"""Which architecture finds planted features, and do the usual metrics rank dictionaries as the truth does?

    python experiments/sae_planted.py --write data/sae_planted

The small planted problem (width 64, 128 unit features, each firing with chance .03, amplitudes from .5 to 1.5: 3.84 of
them at a time), every architecture over the range of its sparsity setting and five seeds of data and weights.
`runs.csv` has one row per dictionary; a run that was stopped goes on with those that are missing. About half an hour on
one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from interp import dictionaries

SEEDS = range(5)
TRAINING: dict[str, Any] = {"n_steps": 1500, "batch_size": 512, "learning_rate": 3e-3}
BUDGETS = (2, 4, 8, 16)  # active latents per token: 3.84 are true
COEFFICIENTS = {"relu": (0.01, 0.03, 0.1, 0.3), "gated": (0.01, 0.03, 0.1, 0.3), "jumprelu": (0.003, 0.01, 0.03, 0.1)}
STEERED = ("relu", "gated", "jumprelu")
BUDGETED = ("topk", "batch_topk")


def grid() -> list[dict[str, Any]]:
    """Every architecture with every setting: how its sparsity is set, and to what."""
    fixed = [
        {"architecture": name, "by": "coefficient", "setting": value}
        for name in COEFFICIENTS
        for value in COEFFICIENTS[name]
    ]
    steered = [{"architecture": name, "by": "target L0", "setting": value} for name in STEERED for value in BUDGETS]
    return (
        fixed
        + steered
        + [{"architecture": name, "by": "k", "setting": value} for name in BUDGETED for value in BUDGETS]
    )


def config(cell: dict[str, Any], seed: int) -> dictionaries.TrainingConfig:
    """The training of one cell of the grid."""
    settings = {"architecture": cell["architecture"], "n_latents": 128, "seed": seed}
    target = float(cell["setting"]) if cell["by"] == "target L0" else None
    if cell["by"] != "target L0":
        settings[cell["by"]] = cell["setting"]
    return dictionaries.TrainingConfig(settings, target_l0=target, seed=seed, **TRAINING)


@torch.no_grad()
def score(sae: dictionaries.Dictionary, source: dictionaries.PlantedSource) -> dict[str, float]:
    """The usual metrics on fresh data, and the truth."""
    x, strengths = source.sample(20_000, seed=1)
    latents = sae.encode(x)
    rebuilt = sae.decode(latents, x)
    fvu = float((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum())
    bias = float(rebuilt.square().sum() / (x * rebuilt).sum())
    found = {"l0": float((latents != 0).float().sum(1).mean()), "fvu": fvu, "reconstruction_bias": bias}
    found |= {"dead": float((latents == 0).all(0).float().mean()), **dictionaries.recovery(sae.W_dec, source.features)}
    return found | best_latents(latents, strengths > 0)


def best_latents(latents: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    """Mean over planted features of the F1 of the latent that best tells when the feature is on."""
    on = (latents != 0).float()
    hits = true.float().T @ on
    f1 = 2 * hits / (true.sum(0)[:, None] + on.sum(0)).clamp(min=1)
    return {"best_f1": float(f1.max(1).values.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--write", type=Path, required=True, help="folder of runs.csv")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.write.mkdir(parents=True, exist_ok=True)
    file = args.write / "runs.csv"
    keys = ["architecture", "by", "setting", "seed"]
    done = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=keys)
    finished = {tuple(row) for row in done[keys].itertuples(index=False)}
    for seed in SEEDS:
        source = dictionaries.PlantedSource(seed=seed)
        for cell in grid():
            key = {**cell, "setting": float(cell["setting"]), "seed": seed}
            if tuple(key.values()) in finished:
                continue
            sae = dictionaries.train(config(cell, seed), source)
            done = pd.concat([done, pd.DataFrame([key | score(sae, source)])], ignore_index=True)
            done.to_csv(file.with_suffix(".part"), index=False, float_format="%.6g")
            file.with_suffix(".part").replace(file)
            print(done.iloc[-1].to_dict(), flush=True)


if __name__ == "__main__":
    main()
