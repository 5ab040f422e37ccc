"""Many steered versions of a few prompts at once: rows of one batch, run from the layer that is steered on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries._steering_edits import Mode, Positions, at_positions, make_edit
from interp.dictionaries.vectors import SteeringVector
from interp.hooks import interventions, layer_of, run_from, run_until
from interp.hooks.names import device_of

BUDGET = 2**28  # bytes of activations and logits of one forward, when the number of rows is left open


class SteeredRows:
    """Prompts read at their last position under any vector and strength.

    What lies below the steered layer is computed once per prompt. The same forward over the unsteered rows gives
    `base`, the log-probabilities to compare with.

    Attributes:
        base: Unsteered log-probabilities at the read position of each prompt, [example, d_vocab], float32.
        forwards: Forwards run so far, partial ones included.
    """

    def __init__(
        self,
        bridge: Any,
        tokens: Int[Tensor, "example pos"],
        vectors: Sequence[SteeringVector],
        *,
        mode: Mode = "add",
        positions: Positions = "all",
        lengths: Int[Tensor, " example"] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.bridge, self.hook = bridge, vectors[0].hook
        self.mode: Mode = mode
        self.positions: Positions = positions
        self.vectors = torch.stack([vector.values for vector in vectors])
        device = device_of(bridge)
        self.tokens = tokens.to(device)
        n, n_pos = tokens.shape
        self.at = (torch.full((n,), n_pos) if lengths is None else lengths.cpu().long()) - 1
        layer = layer_of(bridge, self.hook)
        self.layer = min(layer, len(bridge.blocks) - 1) if layer is not None and layer >= 0 else None
        self.forwards = 0
        self.batch_size = batch_size or rows_per_forward(bridge, n_pos)
        with torch.no_grad():
            self.entering = None
            if self.layer is not None:
                parts = [run_until(bridge, part, self.layer) for part in self.tokens.split(self.batch_size)]
                self.entering = torch.cat(parts)
                self.forwards += len(parts)
            rows = torch.arange(n)
            self.base = self._log_probs(rows, None, None)

    def __len__(self) -> int:
        return len(self.tokens)

    def log_probs(
        self, which: Int[Tensor, " row"], strengths: Float[Tensor, " row"], examples: Int[Tensor, " row"]
    ) -> Float[Tensor, "row d_vocab"]:
        """Log-probabilities at the read position: row r is prompt `examples[r]` under vector `which[r]`."""
        with torch.no_grad():
            return self._log_probs(examples, which, strengths)

    def divergence(
        self, which: Int[Tensor, " curve"], strengths: Float[Tensor, " curve"]
    ) -> Float[Tensor, "curve example"]:
        """KL(unsteered || steered) in nats for every prompt."""
        n = len(self)
        found = []
        examples = torch.arange(n).repeat(len(which))
        rows = torch.arange(len(which)).repeat_interleave(n)
        for part in torch.arange(len(rows)).split(self.batch_size):
            steered = self.log_probs(which[rows[part]], strengths[rows[part]], examples[part])
            base = self.base[examples[part].to(self.base.device)]
            found.append((base.exp() * (base - steered)).sum(-1).clamp_min(0).cpu())
        return torch.cat(found).reshape(len(which), n)

    def _log_probs(self, examples: Tensor, which: Tensor | None, strengths: Tensor | None) -> Tensor:
        found = []
        for part in torch.arange(len(examples)).split(self.batch_size):
            edits = {}
            if which is not None and strengths is not None:
                edit = make_edit(self.vectors[which[part]], strengths[part], self.mode)
                edits = {self.hook: at_positions(edit, self._read_positions(examples[part]), None)}
            with interventions(self.bridge, edits):
                found.append(self._run(examples[part]))
        return torch.cat(found)

    def _read_positions(self, examples: Tensor) -> Positions:
        if not (isinstance(self.positions, str) and self.positions == "last"):
            return self.positions
        return torch.arange(self.tokens.shape[1])[None] == self.at[examples][:, None]

    def _run(self, examples: Tensor) -> Tensor:
        device = self.tokens.device
        rows = examples.to(device)
        keep, where = self.at[examples].to(device).unique(return_inverse=True)
        self.forwards += 1
        if self.layer is None or self.entering is None:
            logits = self.bridge(self.tokens[rows], logits_to_keep=keep)
        else:
            logits = run_from(self.bridge, self.entering[rows], self.layer, logits_to_keep=keep, use_cache=False)
        return logits[torch.arange(len(rows), device=device), where].float().log_softmax(-1)


def rows_per_forward(bridge: Any, n_pos: int, *, read: int = 1) -> int:
    """Rows that fit the budget, when so many positions are unembedded."""
    cfg = bridge.cfg
    per_token = 12 * int(cfg.d_model) + 4 * int(cfg.d_mlp) + 2 * int(cfg.n_heads) * n_pos
    return max(1, BUDGET // (4 * (n_pos * per_token + 4 * read * int(cfg.d_vocab))))
