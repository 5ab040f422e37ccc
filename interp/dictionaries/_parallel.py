"""Processes that `torchrun` started and that train one dictionary together, each on its part of every batch.

What one process would compute from a batch is computed here from the parts: means and sums over tokens, the smallest
value, and the choice of active latents when the budget belongs to the whole batch. Gradients are averaged before they
are clipped, so that all processes take the same step of Adam. They start from the same seeds; `check_same` finds out if
they ever disagree.

In a single process (`ALONE`) everything is what it was, to the bit, and nothing is communicated.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from interp.dictionaries.allocation import Active, per_batch, per_latent

if TYPE_CHECKING:
    from interp.dictionaries.dictionary import Dictionary
    from interp.dictionaries.sources import LiveSource, Source


@dataclass(frozen=True)
class Peers:
    """This process (`rank` of `size`) among those that share its batches. Every method is called by all of them."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    def own(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch."""
        if self.size == 1:
            return batch
        n = len(batch) // self.size
        return batch[self.rank * n : (self.rank + 1) * n]

    def sum(self, part: Tensor) -> Tensor:
        return self._reduced(part, dist.ReduceOp.SUM)

    def mean(self, part: Tensor) -> Tensor:
        """Mean over processes: over tokens, if `part` is one, since parts are of one size."""
        return part if self.size == 1 else self.sum(part) / self.size

    def lowest(self, part: Tensor) -> Tensor:
        return self._reduced(part, dist.ReduceOp.MIN)

    def gathered(self, part: Tensor) -> Tensor:
        """Everyone's tensors of one shape, [process, ...]."""
        if self.size == 1:
            return part[None]
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.stack(parts)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            self.sum(torch.zeros(1, device=_device()))

    def mean_with_own_gradient(self, part: Tensor) -> Tensor:
        """The mean over processes, differentiable in this process's part. Gradients that are averaged over processes
        afterwards are then those of the mean."""
        return part if self.size == 1 else part + (self.mean(part.detach()) - part.detach())

    def spread(self, rows: Tensor) -> Tensor:
        """Squared distance from the batch's mean, summed over the width, averaged over tokens."""
        return self.mean((rows - self.mean(rows.mean(0))).square().sum(-1).mean())

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by the mean of everyone's."""
        for parameter in parameters if self.size > 1 else ():
            if parameter.grad is not None:
                parameter.grad.copy_(self.mean(parameter.grad))

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite by what the first process has."""
        for tensor in tensors if self.size > 1 else ():
            own = tensor.detach().to(_device()).contiguous()  # normalising constants are on the CPU
            dist.broadcast(own, 0)
            with torch.no_grad():
                tensor.copy_(own)

    def per_batch(self, scores: Tensor, per_token: float | int) -> Active:
        """This process's share of the `per_token` x n best entries of a batch of n tokens, wherever they are."""
        budget = int(per_token * len(scores) * self.size)
        if self.size == 1:
            return per_batch(scores, budget)
        n_latents = scores.shape[1]
        best = scores.reshape(-1).topk(min(budget, scores.numel()), sorted=False)
        n = len(best.values)  # no process can have more of them than this
        chosen = self.gathered(best.values).reshape(-1).topk(budget, sorted=False).indices
        mine = chosen[(chosen >= self.rank * n) & (chosen < (self.rank + 1) * n)] - self.rank * n
        flat = best.indices[mine].sort().values
        return Active(flat // n_latents, flat % n_latents)

    def per_latent(self, scores: Tensor, quotas: Tensor) -> Active:
        """This process's share of every latent's best tokens, `quotas[latent]` of the whole batch."""
        if self.size == 1:
            return per_latent(scores, quotas)
        n_latents, most = scores.shape[1], int(quotas.max())
        best = scores.topk(min(most, len(scores)), dim=0)  # [n, latent]
        n = len(best.values)
        top = self.gathered(best.values).reshape(-1, n_latents).topk(most, dim=0).indices  # [most, latent], best first
        kept = torch.arange(most, device=scores.device)[:, None] < quotas.to(scores.device)
        tokens = best.indices.gather(0, top % n)
        latents = torch.arange(n_latents, device=scores.device).expand(most, -1)
        flat = (tokens * n_latents + latents)[kept & (top // n == self.rank)].sort().values
        return Active(flat // n_latents, flat % n_latents)

    def check_same(self, what: str, value: Any) -> None:
        """Refuse to go on if processes differ in something plain, or in tensors.

        Raises:
            RuntimeError: In all of them.
        """
        if self.size == 1:
            return
        seen = self.gathered(_digest(value).to(_device()))
        if bool((seen != seen[0]).any()):
            raise RuntimeError(
                f"the {self.size} processes that torchrun started have different {what}, so they cannot train one "
                f"dictionary together. Independent runs are for interp.dictionaries.sweep, without torchrun"
            )

    def _reduced(self, part: Tensor, how: Any) -> Tensor:
        if self.size == 1:
            return part
        whole = part.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, how)
        return whole


ALONE = Peers()


def peers_for(device: str | torch.device, batch_size: int) -> Peers:
    """Those that torchrun started, ready to talk; `ALONE` where it did not.

    Raises:
        ValueError: If they cannot share batches of this size.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    from accelerate import PartialState  # not needed, and slow to import, in a single process

    state = PartialState(cpu=torch.device(device).type == "cpu")
    if _device().type != torch.device(device).type:
        raise ValueError(
            f"these processes talk to each other through {_device().type}, and cannot train on {device}: "
            f"pass device={_device().type!r}"
        )
    if batch_size % state.num_processes:
        raise ValueError(
            f"batch_size={batch_size} cannot be shared equally by {state.num_processes} processes; take a multiple"
        )
    return Peers(state.process_index, state.num_processes)


def local_device(device: str | torch.device | None) -> str | torch.device | None:
    """This process's own GPU, where "cuda" or nothing is said under torchrun; the device itself otherwise."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or int(os.environ.get("WORLD_SIZE", "1")) < 2 or not torch.cuda.is_available():
        return device
    plain = device is None or (torch.device(device).type == "cuda" and torch.device(device).index is None)
    return f"cuda:{int(rank) % torch.cuda.device_count()}" if plain else device


@contextmanager
def together(dictionary: Dictionary, peers: Peers) -> Iterator[None]:
    """A step inside sees the whole batch through `dictionary.peers`; outside a dictionary is by itself again."""
    dictionary.peers = peers
    try:
        yield
    finally:
        dictionary.peers = ALONE


def shared_source(source: Source, peers: Peers) -> Source:
    """The same batches, the work shared where there is any: every process runs a live model on its part of the texts.

    Other sources are read in full by every process, which keeps its part.
    """
    from interp.dictionaries.sources import LiveSource

    if peers.size == 1 or not isinstance(source, LiveSource):
        return source
    return _shared_live(source, peers)


def _shared_live(source: LiveSource, peers: Peers) -> Source:
    from interp.dictionaries.sources import LiveSource

    class SharedLiveSource(LiveSource):
        def _read(self, tokens: Tensor) -> dict[str, Tensor]:
            each = -(-len(tokens) // peers.size)
            rows = torch.arange(each) + peers.rank * each
            found = super()._read(tokens[rows.clamp(max=len(tokens) - 1)])  # the last ones are read twice, then cut
            return {name: peers.gathered(value).flatten(0, 1)[: len(tokens)] for name, value in found.items()}

    return SharedLiveSource(**{name: getattr(source, name) for name in source.__dataclass_fields__})


def _device() -> torch.device:
    from accelerate import PartialState

    device = PartialState().device
    assert device is not None
    return device


def _digest(value: Any) -> Tensor:
    """A few bytes that hardly anything else has."""
    state = hashlib.sha256()
    if isinstance(value, Mapping) and all(isinstance(item, Tensor) for item in value.values()):
        for name, tensor in sorted(value.items()):
            bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            state.update(name.encode() + bits.numpy().tobytes())
    else:
        state.update(json.dumps(value, sort_keys=True).encode())
    return torch.tensor(list(state.digest()), dtype=torch.uint8)
