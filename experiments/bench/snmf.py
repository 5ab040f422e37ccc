"""SNMF against the released algorithm: time of an iteration, memory, error reached, planted atoms found.

    python experiments/bench/run.py --only snmf

`released` is that algorithm written here from its description: explicit inverse, winner-take-all by threshold, dense
products, the whole product formed for the loss. `multiplicative` is this package's solver kept to the same rule
(`explore=max_iter`, no repair); `block updates` is the rule that takes over; `default` is what `SNMF(...)` does. Runs
alternate in one process and the fastest of each counts. `extra memory` is resident memory above what the data take.
An iteration is one of the loop alone: starts, products that a fit makes once, and the least squares
activations that `fit` ends with are not in it. `error` is the squared error over the data's sum of squares;
`loss / fp64` compares the loss that the loop reported for its best pair with the squared error of that pair in fp64
(for `released`: the last pair). Planted rows: unit atoms of 6 of 256 neurons, about three active per token,
noise 0.01; `atoms found` counts those with a cosine above 0.95 to a component, in the best of five starts by loss.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.dictionaries import SNMF
from interp.dictionaries._snmf_fit import Settings, fit_standard
from interp.dictionaries._snmf_steps import Data, kept_neurons


def main(device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    rows = speed(device, *((512, 800, 20, 5) if quick else (3072, 4000, 100, 20)))
    rows += quality(device, *((256, 600, 10) if quick else (1024, 4000, 50)))
    for seed in range(1 if quick else 5):
        rows.append(planted_row(device, seed))
    return rows


def speed(device: str, d_neurons: int, n_tokens: int, n_components: int, n_iter: int) -> list[dict[str, Any]]:
    """The same iterations from the same start, timed and weighed."""
    data = activations(d_neurons, n_tokens, device)
    start = torch.rand(n_tokens, n_components, generator=torch.Generator().manual_seed(0)).to(device)
    columns, codes = data.T.contiguous(), start.T.contiguous()
    found: dict[str, tuple[float, Tensor, Tensor]] = {}
    prepared = Data(data)
    assert prepared.total > 0.0 and len(prepared.columns)  # once per fit and not per iteration; memory counts them

    def ours(explore: int) -> tuple[float, Tensor, Tensor]:
        # The loop alone: fit() also makes starts and settles activations, which the released loop does not.
        fit = fit_standard(
            prepared, codes, Settings(kept_neurons(0.01, d_neurons), n_iter, explore, n_iter + 1, 0.0, False)
        )
        assert len(fit.history) == n_iter  # the time is that of all of them
        return fit.history[fit.best_iteration], fit.components, fit.codes  # the loss of exactly this pair

    runs: dict[str, Callable[[], None]] = {
        "released": lambda: found.update(released=released(columns, start, 0.01, n_iter)),
        "multiplicative": lambda: found.update(multiplicative=ours(n_iter)),
        "block updates": lambda: found.update({"block updates": ours(0)}),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(3):
        for name, run in runs.items():
            seconds = timed(run, device)
            if number:  # the first is for warming up
                times[name].append(seconds / n_iter)
    total = float(data.double().square().sum())
    rows = []
    for name, run in runs.items():
        prepared = Data(data)
        loss, components, last = found[name]
        exact = squared_error(data, components, last.T if name != "released" else last)
        rows.append(
            {
                "what": f"{name}, {n_iter} iterations",
                "data": f"{n_tokens} x {d_neurons}, K {n_components}",
                "ms / iteration": round(1e3 * min(times[name]), 1),
                "speed-up": round(min(times["released"]) / min(times[name]), 2),
                "target": ">= 1.5" if name == "multiplicative" else "",
                "extra memory (MB)": round(extra_memory(run, device) / 1e6),
                "error": round(exact / total, 4),
                "loss / fp64 - 1": f"{loss / exact - 1:.0e}",
            }
        )
    return rows


def quality(device: str, d_neurons: int, n_tokens: int, n_components: int) -> list[dict[str, Any]]:
    """What each reaches when left to stop by itself, and how long that takes."""
    data = activations(d_neurons, n_tokens, device)
    rows = []
    for name, options in {
        "released, k-means start": {"mode": "official"},
        "released, random start": {"mode": "official", "init": "random"},
        "default": {},
        "default, no repair": {"repair": False},
        "default, batches of 1000": {"batch_size": 1000},
    }.items():
        snmf = SNMF(n_components, sparsity=0.02, **options)
        seconds = timed(lambda snmf=snmf: snmf.fit(data), device)
        rows.append(
            {
                "what": f"{name}, until it stops",
                "data": f"{n_tokens} x {d_neurons}, K {n_components}",
                "iterations": snmf.n_iter_,
                "seconds": round(seconds, 1),
                "error": round(snmf.relative_loss_, 4),
                "duplicate pairs": len(snmf.duplicates_),
            }
        )
    return rows


def planted_row(device: str, seed: int) -> dict[str, Any]:
    data, atoms = planted(seed)
    data = data.to(device)
    row: dict[str, Any] = {"what": f"planted, data seed {seed}", "data": "2000 x 256, K 20"}
    for name, options in {
        "": {},
        " (released, random)": {"mode": "official", "init": "random", "max_iter": 400},
        " (released, k-means)": {"mode": "official", "max_iter": 400},
    }.items():
        starts = [SNMF(20, sparsity=6 / 256, seed=start, **options).fit(data) for start in range(5)]
        cosines = [best_cosines(snmf.components_, atoms) for snmf in starts]
        best = min(range(5), key=lambda start: starts[start].loss_)
        row[f"MMCS of the best of 5{name}"] = round(float(cosines[best].mean()), 3)
        row[f"atoms found{name}"] = f"{int((cosines[best] > 0.95).sum())} of 20"
        row[f"MMCS of one start{name}"] = round(float(torch.stack(cosines).mean()), 3)
    return row


@torch.no_grad()
def released(columns: Tensor, start: Tensor, sparsity: float, n_iter: int) -> tuple[float, Tensor, Tensor]:
    """The released loop on data [neuron, token]. Returns the last loss and the pair it belongs to, as ours lie."""
    keep, codes = max(1, math.ceil(sparsity * len(columns))), start.clone()
    eye = torch.eye(codes.shape[1], device=codes.device)
    best_loss, best = float("inf"), (codes, codes)
    loss, features = float("inf"), codes
    for _ in range(n_iter):
        features = columns @ codes @ torch.linalg.inv(codes.T @ codes + 1e-6 * eye)
        size = features.abs()
        features = features * (size >= torch.topk(size, keep, dim=0).values[-1])
        norms = codes.norm(dim=0, keepdim=True).clamp_min(1e-8)
        codes, features = codes / norms, features * norms
        cross, inner = columns.T @ features, features.T @ features
        up = (cross.abs() + cross) / 2 + codes @ ((inner.abs() - inner) / 2)
        down = (cross.abs() - cross) / 2 + codes @ ((inner.abs() + inner) / 2) + 1e-6
        codes = codes * torch.sqrt(up / down)
        loss = float(torch.norm(columns - features @ codes.T, p="fro") ** 2)
        if loss < best_loss - 1e-4:
            best_loss, best = loss, (features.clone(), codes.clone())
    del best
    return loss, features.T, codes


def activations(d_neurons: int, n_tokens: int, device: str) -> Tensor:
    """Overlapping groups of neurons, heavy-tailed, with as much again that no group explains."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(200, d_neurons, generator=generator)
    atoms *= torch.rand(200, d_neurons, generator=generator) < 0.02
    codes = torch.rand(n_tokens, 200, generator=generator).pow(3) * (
        torch.rand(n_tokens, 200, generator=generator) < 0.1
    )
    signal = codes @ atoms
    noise = torch.randn(n_tokens, d_neurons, generator=generator)
    return (signal + noise * float(signal.std()) / 2).to(device)


def planted(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.zeros(20, 256)
    for atom in atoms:
        where = torch.randperm(256, generator=generator)[:6]
        atom[where] = torch.randn(6, generator=generator)
    atoms /= atoms.norm(dim=1, keepdim=True)
    active = torch.rand(2000, 20, generator=generator) < 3 / 20
    codes = active * torch.rand(2000, 20, generator=generator)
    return codes @ atoms + 0.01 * torch.randn(2000, 256, generator=generator), atoms


def best_cosines(components: Tensor, atoms: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(components, dim=1)
    return (atoms @ unit.T).abs().amax(1)


def squared_error(data: Tensor, components: Tensor, codes: Tensor) -> float:
    return float((data.double() - codes.to(data).double() @ components.to(data).double()).square().sum())


def timed(run: Callable[[], Any], device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def extra_memory(run: Callable[[], None], device: str) -> float:
    """Bytes above what was held before, at the highest point: of the process (Linux only), or of tensors on a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    before = highest = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return highest - before


def resident() -> int:
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    for row in main(quick=True):
        print(row)
