"""How well do cheap scores stand in for exact activation patching as a model gets deeper?

    python experiments/depth_study.py train --arch gpt --layers 2 4 8 12
    python experiments/depth_study.py train --arch llama --layers 2 4 8 12
    python experiments/depth_study.py compare .cache/depth/gpt-2 .cache/depth/gpt-4 ... --write data/depth_study

`train` makes small models of one width, one mixture of text and one number of tokens that differ in depth alone: 10 to
35 minutes each on one core of a busy machine. `compare` patches each exactly on indirect-object prompts and scores the
same cells by every method: agreement over all cells and layer by layer, each backward rule alone, and which kind of
module is to blame (`linearised.py`). A model that has not learned the task is recorded as such and not compared.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import linearised
import numpy as np
import pandas as pd
import torch
import train_tinyworld as training
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import interp
from interp.patching import Rules

WORK = Path(".cache/depth")
SIZE = training.Size(d_model=64, heads=4, kv_heads=2, d_mlp_gpt=256, d_mlp_llama=176, context=32)
BATCH = 32  # rows of one step; with rows of 128 tokens no model had learned to copy a name after 5 million
SHARES = {  # of the words; mostly people, with enough else that a model is not one circuit
    "ioi": 0.36,
    "mention": 0.10,  # as in the embedded models, which learned no indirect objects without it
    "pronoun": 0.10,
    "induction": 0.12,
    "facts": 0.08,
    "two_hop": 0.08,
    "agreement": 0.08,
    "greater_than": 0.04,
    "docstring": 0.04,
}
ARCHITECTURES = {"GPT2LMHeadModel": "gpt", "LlamaForCausalLM": "llama"}
CORRUPTIONS = ("s2_io_flip", "abc")
LEARNED = 0.9  # lower bound of the share of prompts on which answer beats foil; below it a model is not compared
METHODS: dict[str, dict[str, Any]] = {
    "AtP": {"method": "gradient"},
    "IG": {"method": "integrated_gradients", "steps": 5},
    "IG with RelP": {"method": "integrated_gradients", "steps": 5, "rules": "relp"},
    "RelP": {"method": "relp"},
    "RelP + AH": {"method": "relp_ah"},
    "CP-LRP": {"method": "cp_lrp"},
    "AttnLRP": {"method": "attnlrp"},
    "GIM": {"method": "gim"},
    "LN alone": {"method": Rules(norm="LN")},
    "Identity alone": {"method": Rules(activation="Identity")},
    "Half alone": {"method": Rules(gate="Half")},
    "AH alone": {"method": Rules(attention="AH")},
    "LN and AH": {"method": Rules(norm="LN", attention="AH")},
    "temperature alone": {"method": Rules(attention="temperature")},
}
LINEAR: dict[str, tuple[linearised.Kind, ...]] = {  # all three kinds at once would be attribution patching
    "norm": ("norm",),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "attention and mlp": ("attention", "mlp"),
}
MODEL = ["arch", "layers", "seed"]  # the columns that name a model
BY_LAYER = ("AtP", "IG", "RelP", "RelP + AH", "GIM")
TABLES = ("models", "agreement", "layers", "modules")
TOP, RESAMPLES = 5, 1000


def main() -> None:
    arguments = _parser().parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    if arguments.command == "train":
        for layers in arguments.layers:
            train(arguments, layers)
        return
    for directory in arguments.directories:
        write(compare(directory, arguments.n, arguments.prompt_seed, arguments.modules), arguments.write)


def train(arguments: argparse.Namespace, layers: int, size: training.Size = SIZE) -> Path:
    """One model in a directory that `interp.load_model` reads. A finished one is left alone, a stopped one goes on."""
    name = f"{arguments.arch}-{layers}" + (f"-seed{arguments.seed}" if arguments.seed else "")
    directory = arguments.work / name
    if (directory / "trained.json").exists():
        print(f"{directory} is trained", flush=True)
        return directory
    torch.manual_seed(arguments.seed)
    model = training.build(arguments.arch, layers, size)
    bank = training.cached_bank(arguments.tokens, 0, arguments.work, SHARES, size.context)
    fitting = argparse.Namespace(
        **{**vars(arguments), "name": name, "out": directory, "resume": True, "checkpoints": 0, "layers": layers}
    )
    print(f"{name}: {model.num_parameters():,} parameters, {bank.ids.size:,} tokens", flush=True)
    minutes = training.fit(model, bank, fitting, BATCH)
    training.save(model, directory, half=False)
    record = {
        "architecture": type(model).__name__,
        "layers": layers,
        "parameters": model.num_parameters(),
        "tokens": int(bank.ids.size),
        "seed": arguments.seed,
        "lr": arguments.lr,
        "answer_weight": arguments.answer_weight,
        "minutes": round(minutes, 1),
        **size._asdict(),
    }
    (directory / "trained.json").write_text(json.dumps(record, indent=1) + "\n")
    return directory


def compare(directory: Path, n: int, seed: int, modules: int) -> dict[str, list[dict[str, Any]]]:
    """Everything that is measured of one model: rows of each table. The last takes the first `modules` prompts."""
    trained = json.loads((directory / "trained.json").read_text())
    bridge = interp.load_model(directory, check=False)
    plain = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    name = {"arch": ARCHITECTURES[trained["architecture"]], "layers": trained["layers"], "seed": trained["seed"]}
    tables: dict[str, list[dict[str, Any]]] = {table: [] for table in TABLES}
    for corruption in CORRUPTIONS:
        prompts = interp.prompts.ioi(bridge, n=n, seed=seed, template=0, corruption=corruption)
        metric = interp.metrics.logit_difference(prompts)
        head = {**name, "corruption": corruption}
        task = performance(bridge, prompts, metric)
        tables["models"].append({**head, **task, **{key: trained[key] for key in ("parameters", "tokens", "minutes")}})
        print({**head, **task}, flush=True)
        if not task["learned"]:
            continue
        exact = {
            site: interp.patching.activation_patch(bridge, prompts, metric, site=site) for site in linearised.SITES
        }
        for method, how in METHODS.items():
            if method == "Half alone" and name["arch"] == "gpt":
                continue  # without a gate it is the gradient again
            scores = interp.patching.attribution_patch(bridge, prompts, metric, sites=linearised.SITES, **how)
            for site in linearised.SITES:
                at = {**head, "site": site, "method": method}
                tables["agreement"].append(at | agreement(exact[site], scores[site]))
                if method in BY_LAYER:
                    tables["layers"] += [at | row for row in by_layer(exact[site], scores[site])]
        few = prompts[:modules]
        for site in linearised.SITES if modules else ():
            true = _cells(exact[site])[:, :modules]
            for linear, kinds in LINEAR.items():
                effects = linearised.effects(plain, few, interp.metrics.logit_difference(few), site, kinds)
                row = {**head, "site": site, "linear": linear}
                tables["modules"].append(row | compared(true, effects.reshape(-1, len(few))))
    return tables


def performance(bridge: Any, prompts: Any, metric: Any) -> dict[str, Any]:
    """Whether the model does the task: logit differences, and how often the answer beats the foil and all words."""
    with torch.no_grad():
        logits, corrupted = bridge(prompts.clean), metric(bridge(prompts.corrupted))
    clean = metric(logits)
    right = interp.stats.proportion_interval(int((clean > 0).sum()), len(clean))
    return {
        "clean": float(clean.mean()),
        "corrupted": float(corrupted.mean()),
        "right": float(right.estimate),
        "right_low": float(right.low),
        "right_high": float(right.high),
        "right_corrupted": float((corrupted > 0).float().mean()),
        "first_of_all_words": float(interp.metrics.accuracy(prompts)(logits).float().mean()),
        "learned": bool(right.low >= LEARNED),
    }


def agreement(exact: Any, scores: Any) -> dict[str, float]:
    """The statistics of `interp.patching.agreement` and the relative error, each with its interval over examples."""
    found = interp.patching.agreement(exact, scores, k=TOP, n_resamples=RESAMPLES)
    row: dict[str, float] = {}
    for statistic in ("pearson", "spearman", "precision", "sign"):
        row[statistic] = getattr(found, statistic)
        row[f"{statistic}_low"], row[f"{statistic}_high"] = found.interval(statistic)
    errors = compared(_cells(exact), _cells(scores))
    row |= {key: value for key, value in errors.items() if not key.startswith("pearson")}
    return row | {key: scores.provenance["cost"][key] for key in ("forwards", "backwards")}


def by_layer(exact: Any, scores: Any) -> list[dict[str, float]]:
    """Agreement over the positions of each layer, and the share of all exact effects that lies there."""
    total = float(np.abs(exact.mean().values).sum())
    rows = []
    for layer in exact.values.layer.values:
        a, b = (effects.values.sel(layer=layer).transpose("pos", "example").values for effects in (exact, scores))
        share = float(np.abs(a.mean(1)).sum()) / total
        rows.append({"layer": int(layer), "share": share, **compared(a, b)})
    return rows


def compared(exact: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Three comparisons of mean effects over cells `[cell, example]`, with percentile intervals over examples.

    Pearson; the error, which is the sum of |score - exact| over the sum of |exact|; and the slope of the line through
    the origin that fits scores to exact effects best. A correlation is blind to scores that are all too small, the
    other two are not.
    """
    n = exact.shape[1]
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n
    weights = np.concatenate([np.full((1, n), 1 / n), counts]).T
    a, b = exact.astype(float) @ weights, scores.astype(float) @ weights  # [cell, resample], the first is the estimate
    with np.errstate(invalid="ignore", divide="ignore"):
        error, slope = np.abs(a - b).sum(0) / np.abs(a).sum(0), (a * b).sum(0) / (a * a).sum(0)
        a, b = a - a.mean(0), b - b.mean(0)
        pearson = (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))
    row: dict[str, float] = {}
    for name, values in (("pearson", pearson), ("error", error), ("slope", slope)):
        row[name] = float(values[0])
        drawn = values[1:][np.isfinite(values[1:])]  # constant cells correlate with nothing
        low, high = np.quantile(drawn, [0.025, 0.975]) if len(drawn) else (np.nan, np.nan)
        row[f"{name}_low"], row[f"{name}_high"] = float(low), float(high)
    return row


def _cells(effects: Any) -> np.ndarray:
    """Effects as `[layer * pos, example]`."""
    values = effects.values.transpose("layer", "pos", "example").values
    return values.reshape(-1, values.shape[-1])


def write(tables: dict[str, list[dict[str, Any]]], directory: Path) -> None:
    """The tables as CSV. What they held of these models before is replaced, what they held of others is kept."""
    directory.mkdir(parents=True, exist_ok=True)
    models = {tuple(row[key] for key in MODEL) for row in tables["models"]}
    for name, rows in tables.items():
        file = directory / f"{name}.csv"
        frame: Any = pd.DataFrame(rows)
        if file.exists():
            old: Any = pd.read_csv(file)
            frame = pd.concat(
                [old[[row not in models for row in zip(*(old[key] for key in MODEL), strict=True)]], frame]
            )
        if len(frame):
            frame = frame.sort_values(MODEL, kind="stable")
            frame.to_csv(file, index=False, float_format="%.4g")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("train", help="train the models")
    make.add_argument("--arch", choices=("gpt", "llama"), required=True)
    make.add_argument("--layers", type=int, nargs="+", default=(2, 4, 8, 12))
    make.add_argument("--tokens", type=int, default=5_000_000)
    make.add_argument("--lr", type=float, default=3e-3)
    make.add_argument("--answer-weight", type=float, default=5.0)
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--work", type=Path, default=WORK)
    measure = commands.add_parser("compare", help="patch them exactly and score them by every method")
    measure.add_argument("directories", type=Path, nargs="+", help="made by `train`")
    measure.add_argument("--n", type=int, default=64, help="prompts")
    measure.add_argument("--modules", type=int, default=32, help="prompts for the slowest table; 0 leaves it out")
    measure.add_argument("--prompt-seed", type=int, default=0)
    measure.add_argument("--write", type=Path, default=Path("data/depth_study"))
    for command in (make, measure):
        command.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    main()
