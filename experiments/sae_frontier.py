"""How well do architectures rebuild a model's activations at the same sparsity, and how well do their latents tell
concepts?

    python experiments/sae_frontier.py tinyworld-llama --write data/sae_frontier

Autoencoders of one width on one residual stream of an embedded model, every architecture at several budgets and over
seeds, all on the same batches of one harvest and evaluated on text that none of them saw. `runs.csv` has one row per
dictionary; a run that was stopped goes on with the dictionaries that are missing. About an hour on one core.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import interp
from interp import dictionaries, tinyworld
from interp.cache import harvest

LAYER, N_LATENTS = 1, 512
TARGETS = (8, 16, 32)
SEEDS = range(5)
TRAINING: dict[str, Any] = {"n_steps": 1500, "batch_size": 256, "learning_rate": 1e-3, "warmup_steps": 50,
                            "bias_start": "mean"}  # fmt: skip
METRICS = (
    "l0",
    "fvu",
    "ce_rise",
    "ce_score_zero",
    "ce_score_mean",
    "kl_spliced",
    "dead",
    "dense",
    "reconstruction_bias",
    "cosine",
)


def shape(architecture: str, target: int, seed: int, hook: str) -> dict[str, Any]:
    """Settings of one dictionary. Budgets where the architecture has one; others are steered to a target L0."""
    common = {"architecture": architecture, "n_latents": N_LATENTS, "hook": hook, "seed": seed}
    # thresholds move by the learning rate: they arrive in time where the mean squared norm is 1
    common["normalisation"] = "mean_square" if architecture == "jumprelu" else "mean_norm"
    return common | ({"k": target} if architecture in ("topk", "batch_topk", "matryoshka") else {})


def config(architecture: str, target: int, seed: int, hook: str) -> dictionaries.TrainingConfig:
    settings = shape(architecture, target, seed, hook)
    steered = None if "k" in settings else float(target)
    return dictionaries.TrainingConfig(settings, target_l0=steered, seed=seed, **TRAINING)


def labelled_rows(bridge: Any, hook: str, seed: int, n: int = 208) -> tuple[Any, Any]:
    """Rows of documents of every family, and the documents."""
    rng = random.Random(f"{seed}")
    drawn = [tinyworld.sample(tinyworld.FAMILIES[i % len(tinyworld.FAMILIES)], rng) for i in range(n)]
    batch = tinyworld.encode(drawn)
    special = [tinyworld.IDS[word] for word in tinyworld.SPECIAL]
    return dictionaries.token_rows(bridge, torch.tensor(batch.ids), hook, skip_tokens=special), batch


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--write", type=Path, required=True, help="folder of runs.csv")
    parser.add_argument("--architectures", nargs="+", default=["relu", "gated", "topk", "batch_topk", "jumprelu"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    bridge = interp.load_model(args.model)
    hook = f"blocks.{LAYER}.hook_resid_post"
    text, unseen = (torch.tensor(tinyworld.bank(n, seed=s).ids.astype("int64")) for n, s in ((400_000, 1), (20_000, 2)))
    train_rows, train_batch = labelled_rows(bridge, hook, 10)
    test_rows, test_batch = labelled_rows(bridge, hook, 11)
    masks = dictionaries.label_masks(train_rows, train_batch.labels, min_documents=4)
    held = dictionaries.label_masks(test_rows, test_batch.labels, min_tokens=10)
    args.write.mkdir(parents=True, exist_ok=True)
    file = args.write / "runs.csv"
    done = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=["model", "architecture", "target", "seed"])
    with tempfile.TemporaryDirectory() as folder:
        store = harvest(bridge, text, hook, Path(folder) / "store", skip_tokens=[tinyworld.IDS["<bos>"]])
        for seed in SEEDS:
            for architecture in args.architectures:
                for target in TARGETS:
                    key = {"model": args.model, "architecture": architecture, "target": target, "seed": seed}
                    if len(done) and bool((done[list(key)] == pd.Series(key)).all(axis=1).any()):
                        continue
                    sae = dictionaries.train(config(architecture, target, seed, hook), store).folded()
                    report = dictionaries.evaluate(sae, bridge, unseen)
                    row = (
                        key
                        | {name: report[name] for name in METRICS}
                        | concepts(sae, train_rows, test_rows, masks, held)
                    )
                    done = pd.concat([done, pd.DataFrame([row])], ignore_index=True)
                    done.to_csv(file.with_suffix(".part"), index=False, float_format="%.6g")
                    file.with_suffix(".part").replace(file)
                    print(row, flush=True)


def concepts(sae: Any, train: Any, test: Any, masks: Any, held: Any) -> dict[str, float]:
    """Mean AUROC over labels of the best latent and of the best five, and the mean share of absorbed tokens."""
    found = dictionaries.detect_concepts(train, test, masks, held, {"SAE": [sae.encode]}, k=(1, 5), baselines=())
    means = found.mean().sel(detector="SAE").mean("label")
    absorbed = dictionaries.absorption(sae, train, {name: mask for name, mask in masks.items() if name in held})
    shares = absorbed.values.mean("label")
    return {
        "auroc_1": float(means.sel(k=1)),
        "auroc_5": float(means.sel(k=5)),
        "split": float(shares.sel(statistic="split")),
        "absorbed": float(shares.sel(statistic="absorbed")),
        "absorbed_fraction": float(shares.sel(statistic="fraction")),
    }


if __name__ == "__main__":
    main()
