"""Running circuits: every edge outside of each is replaced, one forward for a circuit, several circuits in a batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.patching._backward import Graph, Runner
from interp.patching._batches import Split
from interp.patching._edge_replacement import Written, recording, replacing, written
from interp.patching._resume import Reader
from interp.patching._wiring import Wiring
from interp.patching.activation import derangement
from interp.patching.rules import Rules

Ablation: TypeAlias = Literal["swap", "mean", "zero", "resample"]
"""What replaced edges carry: what the other run has there on the same example, its mean over examples position by
position, nothing, or what it has on another example."""


@dataclass(frozen=True)
class Ran:
    """The metric of every run.

    Attributes:
        values: With the edges of each mask replaced.
        base: Of the run whose edges are replaced.
        other: Of the other run as it is.
        forwards: Forwards of all examples that it took.
    """

    values: Float[Tensor, "circuit example"]
    base: Float[Tensor, "example"]
    other: Float[Tensor, "example"]
    forwards: int


@torch.no_grad()
def run_replaced(
    wiring: Wiring,
    base: Int[Tensor, "example pos"],
    other: Int[Tensor, "example pos"],
    reader: Reader,
    split: Split,
    masks: Bool[Tensor, "circuit writer reader"],
    *,
    ablation: Ablation = "swap",
    positions: Bool[Tensor, "example pos"] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Ran:
    """The metric on `base` with the masked edges replaced by what writers write on `other`.

    Costs a forward for each mask, one for each of the two runs, and one more for `"mean"` and `"resample"`. Masks that
    replace nothing are not run.
    """
    bridge, n = wiring.bridge, len(base)
    at_once = _rows(split, wiring)
    n_examples = n if reader.whole else min(n, at_once)
    per_pass = max(1, at_once // n_examples)
    runner = Runner(bridge, reader, (), Rules(), split.device)
    source = _source(wiring, other, ablation, n_examples, split.device, seed)
    values, ends = torch.zeros(len(masks), n), (torch.zeros(n), torch.zeros(n))
    live = masks.flatten(1).any(1)
    chunks = torch.arange(n).split(n_examples)
    silent = not progress or os.environ.get("INTERP_PROGRESS") == "0"
    with tqdm(total=int(live.sum()) * len(chunks), disable=silent, desc="circuits") as bar:
        for rows in chunks:
            ends[0][rows] = _numbers(runner.plain(base[rows], rows))
            with recording(bridge, wiring) as record:
                ends[1][rows] = _numbers(runner.plain(other[rows], rows))
            replacement = source(rows, record())
            values[(~live).nonzero(), rows] = ends[0][rows]
            # splitting no masks would give one empty part
            for some in live.nonzero().flatten().split(per_pass) if bool(live.any()) else ():
                where = None if positions is None else positions[rows]
                everyone = rows.repeat(len(some))
                with replacing(bridge, wiring, replacement, masks[some], where):
                    scores = _numbers(runner.plain(base[everyone], everyone))
                values[some.unsqueeze(1), rows] = scores.view(len(some), -1)
                bar.update(len(some))
    forwards = int(live.sum()) + 2 + (ablation in ("mean", "resample"))
    return Ran(values, *ends, forwards)


def _rows(split: Split, wiring: Wiring) -> int:
    """Most rows (circuits x examples) of a pass."""
    g, graph = split.geometry, wiring.graph
    kept = 2 * len(graph.writers) + 2 * g.n_layers + 6 * g.n_heads  # vectors per position: written, reads, inputs
    each = split.row_bytes(split.n_pos, split.n_pos) + split.item * split.n_pos * g.d_model * kept
    return split.rows_at_once(each, "replace edges", "fewer prompts")


def _source(
    wiring: Wiring, other: Tensor, ablation: Ablation, n_rows: int, device: torch.device, seed: int
) -> Callable[[Tensor, Written], Written]:
    """What replaced edges carry, as a function of the rows and of what the other run wrote on them."""
    bridge = wiring.bridge
    if ablation == "swap":
        return lambda rows, own: own
    if ablation == "zero":
        return lambda rows, own: own.zeros()
    if ablation == "resample":
        donors = derangement(len(other), torch.Generator().manual_seed(seed))
        return lambda rows, own: written(bridge, wiring, other[donors[rows]].to(device))
    total: Written | None = None
    for rows in torch.arange(len(other)).split(n_rows):
        part = written(bridge, wiring, other[rows].to(device)).map(lambda x: _wide(x).sum(0, keepdim=True))
        total = part if total is None else total.plus(part)
    assert total is not None
    mean = total.map(lambda x: x / len(other))

    def spread(rows: Tensor, own: Written) -> Written:
        return mean.map(lambda x: x.to(own.input.dtype).expand(len(rows), *x.shape[1:]))

    return spread


def _numbers(run: Graph) -> Tensor:
    return run.scores.detach().float().cpu()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
