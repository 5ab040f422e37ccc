"""What `test_data_parallel.py` trains, in one process there and in two under torchrun: `python THIS FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.dictionaries import _files
from interp.dictionaries._run import Run
from interp.dictionaries.architectures import ARCHITECTURES
from interp.dictionaries.sources import LiveSource, TensorSource
from interp.dictionaries.training import train
from interp.dictionaries.training_config import TrainingConfig
from tests.helpers import tiny_bridge, tiny_tokens

D, H, N, STEPS = 8, 24, 24, 20
IN, OUT = "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"

# Everything that looks at a batch as a whole: normalising constants, thresholds, budgets, densities, dead latents, the
# auxiliary losses' variances, the controller, resampling.
CASES: dict[str, dict[str, Any]] = {
    "relu": {"architecture": "relu", "coefficient": 0.1, "normalisation": "mean_norm"},
    "relu_resampled": {"architecture": "relu", "coefficient": 3.0, "normalisation": "mean_norm"},
    "relu_controlled": {"architecture": "relu", "coefficient": 0.01, "decoder": "unit"},
    "gated": {"architecture": "gated", "coefficient": 0.1},
    "jumprelu": {"architecture": "jumprelu", "coefficient": 0.1, "threshold_start": 0.8, "dead_coefficient": 0.1},
    "jumprelu_tanh": {"architecture": "jumprelu", "penalty": "tanh", "coefficient": 0.1},
    "jumprelu_ratio": {"architecture": "jumprelu", "penalty": "ratio", "target_l0": 3, "coefficient": 1.0},
    "jumprelu_quadratic": {"architecture": "jumprelu", "penalty": "quadratic", "target_l0": 3, "coefficient": 0.1},
    "topk": {"architecture": "topk", "k": 2, "normalisation": "mean_square"},
    "topk_saelens": {"architecture": "topk", "k": 2, "aux": "saelens", "decoder": "rescaled"},
    "transcoder": {"architecture": "topk", "k": 2, "target_hook": OUT, "skip": True},
    "batch_topk": {"architecture": "batch_topk", "k": 1.5},
    "batch_topk_rescaled": {"architecture": "batch_topk", "k": 2, "decoder": "rescaled"},
    "matryoshka": {"architecture": "matryoshka", "k": 2, "widths": [5, 11, H]},
    "mutual_choice": {"architecture": "mutual_choice", "k": 2, "density_rate": 0.2},
    "feature_choice": {"architecture": "feature_choice", "k": 2, "exponent": 0.7},
    "gradient": {"architecture": "gradient", "k": 2},
}
SINGLE = [name for name in CASES if name in ARCHITECTURES or name == "transcoder"]
TRAINING: dict[str, dict[str, Any]] = {
    "relu": {"bias_start": "geometric_median"},
    "relu_resampled": {"resample_every": 5, "learning_rate": 0.03, "dead_after": 1},
    "relu_controlled": {"target_l0": 3.0},
    "gated": {"target_l0": 3.0},
    "jumprelu": {"target_l0": 3.0, "dead_after": 1},
}
LIVE = ("topk", "gradient")


class Slopes(TensorSource):
    """Activations with a made-up gradient of a loss at them."""

    gradient_of = IN

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        for batch in super().batches(batch_size, seed=seed, start=start):
            yield {**batch, "gradient": batch[IN].sin()}


class Cut(TensorSource):
    """Stops everything before batch 13."""

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        for number, batch in enumerate(super().batches(batch_size, seed=seed, start=start), start):
            if number == 13:
                raise KeyboardInterrupt
            yield batch


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    # unlike each other, so that the halves of a batch are too
    scale = torch.linspace(0.2, 3.0, 200, dtype=torch.float64)[:, None]
    x = torch.randn(200, D, generator=draws, dtype=torch.float64) * scale + 0.3
    y = torch.tanh(x @ torch.randn(D, D, generator=draws, dtype=torch.float64))
    return {IN: x.to(dtype), OUT: y.to(dtype)}


def config(name: str, dtype: torch.dtype, **options: Any) -> TrainingConfig:
    settings = {"n_latents": H, "hook": IN, "dtype": str(dtype).removeprefix("torch."), **CASES[name]}
    standard: dict[str, Any] = {"n_steps": STEPS, "batch_size": N, "learning_rate": 1e-3, "dead_after": 2 * N}
    return TrainingConfig(settings, **{**standard, "log_every": 5, **TRAINING.get(name, {}), **options})


def live(name: str) -> LiveSource:
    """Seven texts per buffer: no whole number of them for each of two processes."""
    gradient = OUT if name == "gradient" else None
    return LiveSource(tiny_bridge("llama"), tiny_tokens(21, 10), (OUT,), texts_per_buffer=7, gradient_of=gradient)


def train_all(folder: Path) -> None:
    for dtype in (torch.float32, torch.float64):
        for name in SINGLE if dtype == torch.float32 else CASES:
            source = (Slopes if name == "gradient" else TensorSource)(tensors(dtype))
            train(config(name, dtype), source, path=folder / f"{name}_{dtype}".replace("torch.", ""))
    for name in LIVE:
        settings = config(name, torch.float32)
        settings = replace(settings, dictionary={**settings.dictionary, "hook": OUT, "normalisation": "mean_norm"})
        train(settings, live(name), path=folder / f"{name}_live")


def refusals(folder: Path) -> dict[str, str]:
    """What two processes say to what they cannot do."""
    rank, x, found = int(os.environ["RANK"]), TensorSource(tensors(torch.float32)), {}

    def note(what: str, work: Any) -> None:
        try:
            work()
        except Exception as error:
            found[what] = f"{type(error).__name__}: {error}"

    def drift() -> None:
        settle = Run.save

        def save(self: Run) -> None:
            if rank:
                self.dictionary.b_dec.data[0] += 1e-7
            settle(self)

        Run.save = save
        try:
            train(config("topk", torch.float32), x, path=folder / "drift")
        finally:
            Run.save = settle

    note("odd", lambda: train(config("topk", torch.float32, batch_size=25), x))
    note("settings", lambda: train(config("topk", torch.float32, seed=rank), x))
    note("disk", lambda: train(config("topk", torch.float32), x, path=folder / ("topk_float32" if rank else "other")))
    note("drift", drift)
    return found


def main(folder: Path) -> None:
    rank, written = int(os.environ["RANK"]), []
    write = _files.save_file

    def noted(found: Any, path: str, metadata: Any) -> None:
        written.append(path)
        write(found, path, metadata)

    _files.save_file = noted
    train_all(folder)
    batch_topk = config("batch_topk", torch.float32, checkpoint_every=4)
    try:
        train(batch_topk, Cut(tensors(torch.float32)), path=folder / "killed")
    except KeyboardInterrupt:
        train(batch_topk, TensorSource(tensors(torch.float32)), path=folder / "killed")
    alone = folder / "begun_by_one"  # twelve steps are there already
    found = train(batch_topk, TensorSource(tensors(torch.float32)), path=alone)
    report = {"written": len(written), "peers": found.peers.size, "refusals": refusals(folder)}
    (folder / f"report_{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
