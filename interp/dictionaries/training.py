"""Training dictionaries: several in one pass over the data, resumable to the bit, with a target L0 if wanted.

A run with a path keeps `state.safetensors` (weights, Adam's moments, counts, controller, history) beside it, replaced
as a whole; killed at any moment, it goes on from the last one and ends with the same bits as if it had not been. At the
end `dictionary.safetensors` is written (see `load_dictionary`), normalising constants beside the weights. The same
bits are promised on a CPU; sums on a GPU are not in a fixed order.

Under `torchrun` the processes share every batch and end with what one would have, up to the order of sums: each has an
equal part of the tokens of `batch_size`, gradients and statistics are averaged, budgets that belong to a batch are
spent over all of it, a live model runs on each process's share of the texts, and the first process writes the files.
All call `train` with the same arguments; `paths` are on a disk that all of them see. (`accelerate launch` starts a
single process where it finds no GPU; `torchrun --nproc-per-node N` starts N.)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from interp.dictionaries._parallel import Peers, local_device, peers_for, shared_source
from interp.dictionaries._run import Run
from interp.dictionaries.architectures import build
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.sources import Source, as_source
from interp.dictionaries.training_config import TrainingConfig


class TrainingDiverged(RuntimeError):
    """A loss that is not a number; the message says where the last good state is."""


def train(
    config: TrainingConfig,
    activations: Any,
    *,
    path: str | Path | None = None,
    resume: bool = True,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Dictionary:
    """Train one dictionary.

    Args:
        config: What and how.
        activations: A tensor [token, width] (for transcoders a pair: inputs, targets), an `ActivationStore` that holds
            the hooks, or a `LiveSource`.
        path: Folder for checkpoints and the result; nothing is written without.
        resume: Go on from the checkpoint there; False starts anew.
        device: Where to train; where the activations are by default (a store's are on the CPU, a live model's where it
            runs).

    Returns:
        The dictionary in normalised units, as trained; `folded()` gives one for raw activations without constants, and
        `.metadata["history"]` the curves: a list of entries with step, loss, l0, fvu, dead, rate and coefficient.

    Raises:
        ValueError: For settings or data that do not fit, or a checkpoint of other settings or data, before any step.
        TrainingDiverged: If a loss, a gradient or a weight is not finite; what was learned before is in the checkpoint.
    """
    return train_many([config], activations, paths=[path], resume=resume, device=device, progress=progress)[0]


def train_many(
    configs: Sequence[TrainingConfig],
    activations: Any,
    *,
    paths: Sequence[str | Path | None] | None = None,
    resume: bool = True,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> list[Dictionary]:
    """Train several dictionaries on the same batches, each read once: seeds, widths, architectures, coefficients.

    They must agree on `batch_size`, `n_steps` and `seed`, which make the batches, and the source must give all their
    hooks. See `train`.
    """
    runs, source, peers = _prepare(configs, activations, paths, resume, device)
    first = configs[0]
    start = min(run.step for run in runs)
    shown = None if progress and peers.first else True
    bar = tqdm(total=first.n_steps, initial=start, desc="training", unit="step", disable=shown)
    with bar:
        batches = source.batches(first.batch_size, seed=first.seed, start=start)
        for step in range(start, first.n_steps):
            batch = next(batches)
            for run in runs:
                if run.step == step:
                    _advance(run, batch, runs)
            bar.set_postfix_str(str(runs[0]), refresh=False)
            bar.update()
    for run in runs:
        run.finish()
    peers.wait()  # until the results are on disk
    return [run.dictionary for run in runs]


@dataclass(frozen=True)
class Estimate:
    """What a training run will take, from a few steps that were run and thrown away.

    Attributes:
        seconds: For all steps.
        parameters: Trained numbers, of all dictionaries.
        bytes: Weights, gradients and Adam's moments, of all dictionaries; activations of a batch come on top.
    """

    seconds: float
    parameters: int
    bytes: int
    tokens_per_second: float

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:.1f} min" if self.seconds > 90 else f"{self.seconds:.0f} s"
        return (
            f"about {minutes} at {self.tokens_per_second:,.0f} tokens/s, {self.bytes / 2**20:,.0f} MiB for the weights"
        )


def dry_run(
    configs: TrainingConfig | Sequence[TrainingConfig],
    activations: Any,
    *,
    steps: int = 3,
    device: str | torch.device | None = None,
) -> Estimate:
    """Time and memory of a training run, from `steps` steps after a first one; writes nothing, changes nothing."""
    many = [configs] if isinstance(configs, TrainingConfig) else list(configs)
    if steps < 1:
        raise ValueError(f"steps={steps}; expected at least 1")
    runs, source, _ = _prepare(many, activations, None, False, device)
    batches = source.batches(many[0].batch_size, seed=many[0].seed)
    began = 0.0
    for i in range(steps + 1):
        if i == 1:
            began = time.perf_counter()
        batch = next(batches)
        for run in runs:
            run.advance(batch)
    per_step = (time.perf_counter() - began) / steps
    parameters = sum(p.numel() for run in runs for p in run.dictionary.parameters())
    size = sum(p.numel() * p.element_size() for run in runs for p in run.dictionary.parameters())
    return Estimate(per_step * many[0].n_steps, parameters, 4 * size, many[0].batch_size / per_step)


def _advance(run: Run, batch: Any, runs: Sequence[Run]) -> None:
    try:
        run.advance(batch)
    except FloatingPointError as error:
        for other in runs:  # what the others have learned is not lost with it
            if other is not run and other.path is not None and other.saved != other.step:
                other.save()
        kept = f"; the state of step {run.saved} is in {run.path}" if run.saved is not None else ""
        raise TrainingDiverged(
            f"step {run.step}: {error}{kept}. Lower the learning rate ({run.config.learning_rate:g}), or look at the "
            f"activations of this batch"
        ) from error


def _prepare(
    configs: Sequence[TrainingConfig],
    activations: Any,
    paths: Sequence[str | Path | None] | None,
    resume: bool,
    device: str | torch.device | None,
) -> tuple[list[Run], Source, Peers]:
    if not configs:
        raise ValueError("no configurations: nothing to train")
    first = configs[0]
    for name in ("batch_size", "n_steps", "seed"):
        if len({getattr(config, name) for config in configs}) > 1:
            raise ValueError(
                f"configurations differ in {name} ({', '.join(str(getattr(c, name)) for c in configs)}): dictionaries "
                f"trained together share their batches; train the others by themselves"
            )
    folders = [None] * len(configs) if paths is None else [None if p is None else Path(p) for p in paths]
    if len(folders) != len(configs):
        raise ValueError(f"{len(folders)} paths for {len(configs)} configurations; expected one each")
    named = [folder for folder in folders if folder is not None]
    if len(set(named)) != len(named):
        raise ValueError(f"two configurations write to one folder: {', '.join(map(str, named))}")
    pairs = {(c.dictionary.get("hook", ""), c.dictionary.get("target_hook")) for c in configs}
    sources = [as_source(activations, *pair) for pair in sorted(pairs, key=str)]
    if len(sources) > 1 and isinstance(activations, (Tensor, tuple)):
        raise ValueError(f"dictionaries of several hooks ({sorted(map(str, pairs))}) need a store or a LiveSource")
    source = sources[0] if len(sources) == 1 else _joined(sources, activations)
    example = next(iter(source.batches(first.batch_size, seed=first.seed)))
    size = {name: tensor.shape[1] for name, tensor in example.items()}
    device = next(iter(example.values())).device if device is None else local_device(device)
    assert device is not None
    peers = peers_for(device, first.batch_size)
    source = shared_source(source, peers)
    runs = []
    for config, folder in zip(configs, folders, strict=True):
        settings = dict(config.dictionary)
        hook, target = settings.get("hook", ""), settings.get("target_hook")
        settings = _sized(settings, "d_in", size[hook])
        if target is not None:
            settings = _sized(settings, "d_out", size[target])
        dictionary = build(settings, device=device)
        if dictionary.needs_gradient:
            _check_gradient(dictionary, source)
        settled = replace(config, dictionary=settings)
        runs.append(Run(settled, dictionary, source, folder, resume=resume, peers=peers))
    return runs, source, peers


def _check_gradient(dictionary: Dictionary, source: Source) -> None:
    place = dictionary.hook if dictionary.target_hook is None else dictionary.target_hook
    given = getattr(source, "gradient_of", None)
    if given != place:
        found = "activations alone" if given is None else f"that at {given!r}"
        raise ValueError(
            f"a {dictionary.architecture} dictionary is trained with the gradient of the model's loss at {place!r}, "
            f"and this {type(source).__name__} gives {found}; run the model while training: "
            f"LiveSource(bridge, tokens, names, gradient_of={place!r})"
        )


def _joined(sources: list[Source], activations: Any) -> Source:
    """One source of all hooks: of a store its columns, of others themselves."""
    from interp.dictionaries.sources import StoreSource

    if isinstance(sources[0], StoreSource):
        names = tuple(dict.fromkeys(name for source in sources for name in source.hooks))
        return StoreSource(sources[0].store, names)
    return sources[0]


def _sized(settings: dict[str, Any], name: str, width: int) -> dict[str, Any]:
    if settings.get(name, width) != width:
        raise ValueError(f"{name}={settings[name]}, but the activations are {width} wide")
    return {**settings, name: width}
