"""The best contexts of every unit, kept while batches of scores stream by."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.neurons._largest import NONE, Once, Side, first_of_each, keyed, ranked
from interp.prompts._tokens import token_strings
from interp.results import labelled

_CHUNK = 2**25  # numbers ranked at a time


class Search:
    """The best contexts of every unit among those pushed so far."""

    def __init__(self, n: int, window: tuple[int, int], side: Side, once: Once) -> None:
        self.n = n
        self.side: Side = side
        self.once: Once = once
        self.offsets = torch.arange(-window[0], window[1] + 1)
        self.found: list[Tensor] = []  # values, row, pos [unit, n]; tokens, scores [unit, n, offset]
        self.rows = 0
        self.seen: list[Tensor] = []
        self.counts = np.zeros((2, 0), dtype=np.int64)

    def push(self, scores: Tensor, tokens: Tensor, kept: Tensor, directions: Tensor | None) -> None:
        """Rank a batch of rows that come after those pushed before."""
        self._count(tokens, kept)
        groups = self._groups(tokens) if self.once == "context" else None
        whole = len(scores) == tokens.numel()
        width = scores.shape[1] if directions is None else len(directions)
        step = max(1, _CHUNK // tokens.numel())
        parts = []
        for start in range(0, width, step):
            if directions is None:
                part = scores[:, start : start + step].float()
            else:
                part = scores.float() @ directions[start : start + step].detach().cpu().float().T
            if not torch.isfinite(part).all():
                row, unit = (~torch.isfinite(part)).nonzero()[0].tolist()
                raise ValueError(f"the score of unit {start + unit} at row {row} is {float(part[row, unit])}")
            if not whole:
                filled = torch.full((tokens.numel(), part.shape[1]), torch.nan)
                filled[kept.flatten()] = part
                part = filled
            parts.append(self._best(part, tokens, kept, groups))
        new = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        new[1] = torch.where(new[1] >= 0, new[1] + self.rows, -1)
        self.rows += len(tokens)
        self.found = new if not self.found else self._merged(new)

    def _best(self, scores: Tensor, tokens: Tensor, kept: Tensor, groups: Tensor | None) -> list[Tensor]:
        n_pos = tokens.shape[1]
        keys = torch.where(kept.flatten()[:, None], keyed(scores, self.side), NONE)
        if groups is not None:
            keys = first_of_each(keys, groups)
        elif self.once == "row":
            keys = first_of_each(keys, torch.arange(tokens.numel()) // n_pos)
        place, there = ranked(keys, self.n)
        safe = place.clamp_min(0)
        row, pos = safe // n_pos, safe % n_pos
        around = pos[..., None] + self.offsets
        inside = (around >= 0) & (around < n_pos) & there[..., None]
        flat = (row[..., None] * n_pos + around).clamp(0, tokens.numel() - 1)
        unit = torch.arange(scores.shape[1])[:, None, None].expand_as(flat)
        return [
            torch.where(there, scores.T.gather(1, safe), torch.nan),
            torch.where(there, row, -1),
            torch.where(there, pos, -1),
            torch.where(inside, tokens.flatten()[flat], -1),
            torch.where(inside, scores[flat, unit], torch.nan),
        ]

    def _merged(self, new: list[Tensor]) -> list[Tensor]:
        # those found before stand first: they are earlier in the corpus and win ties
        both = [torch.cat(pair, 1) for pair in zip(self.found, new, strict=True)]
        keys = torch.where(both[1] >= 0, keyed(both[0], self.side), NONE)
        order = keys.argsort(dim=1, descending=True, stable=True)
        if self.once == "context":
            context = both[3].gather(1, order[..., None].expand_as(both[3]))[..., self.offsets <= 0]
            # in parts: all pairs of all units at once would be many times the batch
            parts = [(part[:, :, None] == part[:, None]).all(-1).tril(-1).any(-1) for part in context.split(1024)]
            repeated = torch.cat(parts)  # of a better one
            order = order.gather(1, repeated.long().argsort(dim=1, stable=True))
            keys = keys.gather(1, order)
            left = torch.where(repeated.sort(dim=1, stable=True).values, NONE, keys)
        else:
            left = keys.gather(1, order)
        order = order[:, : self.n]
        gone = (left[:, : self.n] == NONE)[..., None]
        picked = [
            tensor.gather(1, order if tensor.ndim == 2 else order[..., None].expand(-1, -1, tensor.shape[2]))
            for tensor in both
        ]
        empty = (torch.nan, -1, -1, -1, torch.nan)
        return [
            torch.where(gone if tensor.ndim == 3 else gone[..., 0], blank, tensor)
            for tensor, blank in zip(picked, empty, strict=True)
        ]

    def _groups(self, tokens: Tensor) -> Tensor:
        around = torch.arange(tokens.shape[1])[:, None] + self.offsets[self.offsets <= 0]
        contexts = torch.where(around >= 0, tokens[:, around.clamp_min(0)], -1).flatten(0, 1)
        return torch.unique(contexts, dim=0, return_inverse=True)[1]

    def _count(self, tokens: Tensor, kept: Tensor) -> None:
        after = tokens[:, 1:][kept[:, :-1]]
        size = max(self.counts.shape[1], int(tokens.max()) + 1)
        counts = np.zeros((2, size), dtype=np.int64)
        counts[:, : self.counts.shape[1]] = self.counts
        for which, ids in enumerate((tokens[kept], after)):
            counts[which] += np.bincount(ids.numpy(), minlength=size)
        self.counts = counts

    def reorder(self, order: Tensor) -> None:
        self.found = [tensor[order] for tensor in self.found]

    def fields(self, coords: dict[str, Any], unit: str, bridge: Any) -> dict[str, Any]:
        """What a `TopContexts` is made of, but for provenance."""
        values, row, pos, tokens, scores = self.found
        ids = sorted(set(tokens.flatten().tolist()) - {-1})
        texts = {} if bridge is None or bridge.tokenizer is None else token_strings(bridge.tokenizer, ids)
        named = {-1: "", **{i: texts.get(i, f"#{i}") for i in ids}}
        at = int((self.offsets == 0).nonzero())
        own = [[named[i] for i in line] for line in tokens[:, :, at].tolist()]
        shape = ("unit", "rank")
        coords = {
            **coords,
            "row": (shape, row.int().numpy()),
            "pos": (shape, pos.int().numpy()),
            "token": (shape, np.array(own, dtype=str).reshape(row.shape)),
        }
        around = {"offset": self.offsets.tolist()}
        return {
            "values": labelled(values, shape, coords, unit=unit),
            "tokens": xr.DataArray(tokens.int().numpy(), dims=(*shape, "offset"), coords=around),
            "scores": labelled(scores, (*shape, "offset"), around),
            "counts": xr.DataArray(self.counts, dims=("which", "id"), coords={"which": ["current", "next"]}),
            "strings": {str(i): text for i, text in texts.items()},
        }

    def settings(self) -> dict[str, Any]:
        """The options of the search, for provenance."""
        window = [-int(self.offsets[0]), int(self.offsets[-1])]
        return {"n": self.n, "window": window, "side": self.side, "once": self.once}
