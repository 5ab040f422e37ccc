"""Running rows on from the middle of a run, and turning their logits into numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import hooks
from interp.patching._batches import Batch


@dataclass(frozen=True)
class Reader:
    """Scores batches in which rows are examples, repeated or reordered.

    Attributes:
        metric: One of `interp.metrics` can `.select` examples; a plain callable knows none, so each of its batches must
            hold all examples, in order.
        examples: The example that each row of the sweep is scored as.
        n_examples: How many examples there are.
    """

    metric: Any
    examples: Int[Tensor, "row"]
    n_examples: int

    @property
    def whole(self) -> bool:
        """Whether batches must hold all examples in order."""
        return not hasattr(self.metric, "select")

    @property
    def read(self) -> Tensor | None:
        """The one position read in each example, where only that one need be unembedded; else None."""
        if self.whole or not hasattr(self.metric, "at"):
            return None
        return getattr(self.metric, "positions", None)

    def read_of(self, rows: Int[Tensor, "batch"]) -> Int[Tensor, "batch"]:
        """The position read in each of these rows of the sweep."""
        assert self.read is not None
        return self.read.cpu()[self.examples[rows]]

    def score(self, logits: Tensor, rows: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """One number per row, on the CPU. `logits` are [batch, d_vocab] where `read` is set, else [batch, pos,
        d_vocab]."""
        return self.differentiable(logits, rows).detach().float().cpu()

    def differentiable(self, logits: Tensor, rows: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """As `score`, with the graph, on the device and in the metric's own dtype."""
        if self.whole:
            parts = [self.metric(part) for part in logits.split(self.n_examples)]
            expected: tuple[int, ...] = (self.n_examples,)
        else:
            metric = self.metric.select(self.examples[rows])
            parts = [metric(logits) if self.read is None else metric.at(logits)]
            expected = (len(rows),)
        for part in parts:
            if not isinstance(part, Tensor) or tuple(part.shape) != expected:
                got = f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(
                    f"the metric returned {got} for logits of {expected[0]} examples; it must give one number per "
                    f"example, shape {expected}: means are taken later"
                )
        return torch.cat(parts)


class Resume:
    """Runs rows on from inside a run that is known, and scores them. Exists as long as that run is kept.

    Attributes:
        baseline: Scores of the rows as they are.
    """

    def __init__(
        self, bridge: Any, reader: Reader, rows: Tensor, last_resid: Tensor, cache: hooks.PrefixCache | None
    ) -> None:
        self.bridge, self.reader, self.rows, self.cache = bridge, reader, rows, cache
        self.last = len(bridge.blocks) - 1
        self.last_mlp = f"blocks.{self.last}.mlp.hook_in"
        self.narrow = False
        n, n_pos = last_resid.shape[:2]
        nothing = torch.zeros(n, dtype=torch.long)
        every = Batch(nothing, nothing, torch.arange(n), 0, n_pos)
        self.baseline = self(last_resid, self.last, every)
        if not torch.isfinite(self.baseline).all():
            bad = rows[~torch.isfinite(self.baseline)].tolist()
            raise ValueError(f"the metric is not finite on the run to be patched, in rows {bad[:8]}")
        self.narrow = reader.read is not None and self._can_be_narrow(last_resid, every)

    def __call__(
        self, resid: Tensor, layer: int, batch: Batch, *, last_mlp_edited: bool = False
    ) -> Float[Tensor, "batch"]:
        """Scores of the rows of a batch whose stream entering `layer` is `resid`."""
        rows, device = self.rows[batch.row], resid.device
        options: dict[str, Any] = {}
        at = where = torch.empty(0)
        if self.reader.read is not None:
            at = (self.reader.read_of(rows) - batch.start).to(device)
            options["logits_to_keep"], where = at.unique(return_inverse=True)
        with self._last_mlp_at(at) if self.narrow and not last_mlp_edited else nullcontext():
            if batch.start and self.cache is not None:
                prefix = self.cache.crop(batch.start)
                logits = hooks.run_suffix(self.bridge, resid, prefix, rows=batch.row, start_layer=layer, **options)
            else:
                logits = hooks.run_from(self.bridge, resid, layer, use_cache=False, **options)
        if self.reader.read is not None:
            logits = logits[torch.arange(len(logits), device=device), where]
        return self.reader.score(logits, rows)

    @contextmanager
    def _last_mlp_at(self, at: Tensor) -> Iterator[None]:
        """The last MLP runs at the position read alone. Its output is broadcast over positions: wrong at those nobody
        reads.

        In a model of L layers the last MLP is two thirds of a block out of (L + 1) / 2 that a cell costs on average.
        """

        def narrow(tensor: Tensor, *, hook: Any) -> Tensor:
            if tensor.shape[1] == 1:
                return tensor
            return tensor[torch.arange(len(tensor), device=tensor.device), at].unsqueeze(1)

        with self.bridge.hooks(fwd_hooks=[(self.last_mlp, narrow)]):
            yield

    def _can_be_narrow(self, last_resid: Tensor, every: Batch) -> bool:
        """Whether this model's last MLP can run at one position; some flatten rows and positions, and fail."""
        if not hooks.names(self.bridge, self.last_mlp):
            return False
        self.narrow = True
        try:
            scores = self(last_resid, self.last, every)
        except RuntimeError:
            return False
        return torch.allclose(scores, self.baseline, rtol=1e-3, atol=1e-4)
