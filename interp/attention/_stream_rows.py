"""Accumulators of attention statistics: fed with blocks of rows of a pattern, they never need the whole of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Target = Literal["duplicate_token", "induction"]
TARGETS: tuple[Target, ...] = get_args(Target)

BASE = ("entropy", "entropy_normalised", "max", "top", "support", "distance", "recent", "off_sequence", "lse")
"""Statistics of every row that are always taken."""

_OFF = 1e-4  # mass on no key below this is rounding: as in `interp.attention.row_entropy`


@dataclass(frozen=True)
class Request:
    """What is taken of every row beside `BASE`: see `streaming_statistics`."""

    offsets: tuple[int, ...] = (0, 1)
    recent: int = 64
    sets: Mapping[str, Tensor] = field(default_factory=dict)  # [key] or [batch, key]
    targets: tuple[Target, ...] = ()
    tokens: Tensor | None = None  # [batch, key], for the targets

    def names(self) -> list[str]:
        """The statistics of every row, in the order of results."""
        return [*BASE, *map(offset_name, self.offsets), *self.sets, *self.targets]

    def part(self, first: int, end: int) -> Request:
        """The request for some of the examples."""
        sets = {name: mask if len(mask) == 1 else mask[first:end] for name, mask in self.sets.items()}
        return replace(self, sets=sets, tokens=None if self.tokens is None else self.tokens[first:end])


def offset_name(offset: int) -> str:
    return {0: "current_token", 1: "previous_token"}.get(offset, f"offset_{offset}")


def make_request(
    n_pos: int,
    *,
    offsets: Sequence[int],
    recent: int,
    sets: Mapping[str, Any] | None,
    targets: Sequence[Any],
    tokens: Tensor | None,
    batch: int,
) -> Request:
    """The request, checked."""
    if wrong := [offset for offset in offsets if not 0 <= offset < n_pos]:
        raise ValueError(f"offsets {wrong} point outside {n_pos} positions; expected 0 (itself) to {n_pos - 1}")
    if recent < 1:
        raise ValueError(f"recent={recent} must be at least 1: how many of the last keys count, the query's included")
    if unknown := [name for name in targets if name not in TARGETS]:
        raise ValueError(f"no target {unknown[0]!r}; expected some of {', '.join(TARGETS)}")
    if targets and tokens is None:
        raise ValueError(f"targets {list(targets)} are found by equal tokens; give tokens= [batch, pos] as well")
    masks = {name: _mask(name, keys, n_pos, batch) for name, keys in (sets or {}).items()}
    request = Request(tuple(offsets), recent, masks, tuple(targets), tokens)
    names = request.names()
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"the names {twice} are used twice; give other names to the key sets, and every offset once")
    return request


def _mask(name: str, keys: Any, n_pos: int, batch: int) -> Tensor:
    """A key set as a mask [1 or batch, key], from a mask or from positions."""
    if isinstance(keys, Tensor) and keys.dtype == torch.bool:
        mask = keys if keys.ndim == 2 else keys[None]
        if tuple(mask.shape) not in ((1, n_pos), (batch, n_pos)):
            raise ValueError(f"key set {name!r} is a mask {tuple(keys.shape)}; expected ({n_pos},) or "
                             f"({batch}, {n_pos}), or a list of positions")  # fmt: skip
        return mask
    places = [int(key) for key in keys]
    if not places or min(places) < 0 or max(places) >= n_pos:
        raise ValueError(f"key set {name!r} has positions {places[:5]}; expected at least one, of 0 to {n_pos - 1}")
    mask = torch.zeros(1, n_pos, dtype=torch.bool)
    mask[0, places] = True
    return mask


def precise_sum(values: Tensor) -> Tensor:
    """Sum over the last axis, rounded only within runs of 32; float64, at a fraction of the cost of casting first."""
    if values.device.type == "mps":
        return values.sum(-1)
    whole = values.shape[-1] // 32 * 32
    runs = values[..., :whole].unflatten(-1, (-1, 32)).sum(-1)
    return runs.double().sum(-1) + values[..., whole:].sum(-1)


class RowBlocks:
    """Statistics of a pattern [batch, head, dest, src] from its rows, block by block.

    `rows` [batch, head, dest] per statistic, `columns` [batch, head, src]; what was not fed is NaN in rows.
    """

    def __init__(self, batch: int, heads: int, n_pos: int, request: Request, device: torch.device, dtype: torch.dtype):
        self.request, self.n_pos = request, n_pos
        wide = torch.float32 if device.type == "mps" else torch.float64
        sums = torch.zeros(3, batch, heads, n_pos, dtype=wide, device=device)
        self.sum, self.entropy, self.self_attention = sums
        self.peak = torch.zeros(batch, heads, n_pos, dtype=dtype, device=device)
        nan = torch.full((len(request.names()), batch, heads, n_pos), torch.nan, dtype=dtype, device=device)
        self.rows = dict(zip(request.names(), nan, strict=True))
        self.sets = {name: mask.to(device) for name, mask in request.sets.items()}
        self.tokens = None if request.tokens is None else request.tokens.to(device)

    def update(self, pattern: Tensor, start: int, *, first_key: int = 0, lse: Tensor | None = None) -> None:
        """Take in rows [batch, head, row, key]: queries from `start` on, keys from `first_key` to the last query."""
        end = start + pattern.shape[-2]
        place = torch.arange(start, end, device=pattern.device, dtype=pattern.dtype)
        back = torch.arange(end - first_key - 1, -1, -1, device=pattern.device, dtype=pattern.dtype)  # from the last
        tiny = torch.finfo(pattern.dtype).tiny
        entropy = pattern.clamp_min(tiny).log_().mul_(pattern).neg_()  # special.entr takes six times as long on a CPU
        total = precise_sum(pattern)
        rest = torch.where(1 - total > _OFF, 1 - total, 0)
        row_entropy = (precise_sum(entropy) + torch.special.entr(rest)).to(pattern.dtype)
        mass, off = total.to(pattern.dtype), (1 - total).to(pattern.dtype)
        top, index = pattern.max(-1)
        square = torch.linalg.vector_norm(pattern, dim=-1).square() + rest.square().to(pattern.dtype)
        distance = pattern @ back - (end - 1 - place) * mass
        taken = {
            "entropy": row_entropy,
            "entropy_normalised": torch.where(place > 0, row_entropy / (place + 1).log(), torch.nan),
            "max": top,
            "top": (index + first_key).to(pattern.dtype),
            "support": 1 / square,
            "distance": (distance / mass).clamp_min(0),
            "recent": self._recent(pattern, start, first_key),
            "off_sequence": off,
            **self._sets(pattern, start, first_key),
            **self._offsets(pattern, start, first_key),
        }
        if lse is not None:
            taken["lse"] = lse.to(pattern.dtype)
        keys = slice(first_key, end)
        self.sum[..., keys] += pattern.sum(-2)
        self.entropy[..., keys] += entropy.sum(-2)
        del entropy
        taken.update(self._targets(pattern, start, first_key))
        for name, values in taken.items():
            self.rows[name][..., start:end] = values
        self.self_attention[..., start:end] = pattern.diagonal(start - first_key, -2, -1)
        self.peak[..., keys] = torch.maximum(self.peak[..., keys], pattern.amax(-2))

    def importance(self) -> Tensor:
        """Column sums over the number of queries that can see the key."""
        queries = torch.arange(self.n_pos, 0, -1, device=self.sum.device, dtype=self.sum.dtype)
        return self.sum / queries

    def column_entropy(self) -> Tensor:
        """Entropy in nats of every column scaled to sum to 1: log c + (sum of entr) / c, c being the column's sum."""
        return torch.where(self.sum > 0, self.sum.log() + self.entropy / self.sum, torch.nan)

    def summary(self, kept: Sequence[str]) -> dict[str, Any]:
        """On the CPU: `means` over the measured rows [batch, head], `rows` [batch, head, dest] of the statistics kept,
        and the columns [batch, head, src]."""
        return {
            "means": {name: row.nanmean(-1).cpu() for name, row in self.rows.items() if name != "top"},
            "rows": {name: self.rows[name].cpu() for name in kept},
            "importance": self.importance().float().cpu(),
            "self_attention": self.self_attention.float().cpu(),
            "column_entropy": self.column_entropy().float().cpu(),
            "column_max": self.peak.cpu(),
        }

    def _recent(self, pattern: Tensor, start: int, first_key: int) -> Tensor:
        rows = pattern.shape[-2]
        low = max(start - self.request.recent + 1, first_key)
        near = pattern[..., low - first_key :]
        place = torch.arange(start, start + rows, device=pattern.device)
        key = torch.arange(low, start + rows, device=pattern.device)
        band = place[:, None] - key[None, :] < self.request.recent
        return (near * band).sum(-1)

    def _offsets(self, pattern: Tensor, start: int, first_key: int) -> dict[str, Tensor]:
        found = {}
        for offset in self.request.offsets:
            mass = torch.full_like(pattern[..., 0], torch.nan)
            rows = pattern.shape[-2]
            exists = max(0, offset - start)  # rows before have no such key
            mass[..., exists:] = 0
            kept = max(exists, offset + first_key - start)  # rows between attend to it no longer: it left the window
            if kept < rows:
                mass[..., kept:] = pattern.diagonal(start - offset - first_key, -2, -1)[..., -(rows - kept) :]
            found[offset_name(offset)] = mass
        return found

    def _sets(self, pattern: Tensor, start: int, first_key: int) -> dict[str, Tensor]:
        if not self.sets:
            return {}
        end = start + pattern.shape[-2]
        found = {}
        for name, mask in self.sets.items():
            keys = mask[:, first_key:end].to(pattern.dtype)[:, None, :, None]
            seen = mask[:, :end].long().cumsum(-1)[:, start:end] > 0
            mass = (pattern @ keys).squeeze(-1)
            found[name] = torch.where(seen[:, None], mass, torch.nan)
        return found

    def _targets(self, pattern: Tensor, start: int, first_key: int) -> dict[str, Tensor]:
        if not self.request.targets:
            return {}
        assert self.tokens is not None
        end = start + pattern.shape[-2]
        place = torch.arange(start, end, device=pattern.device)
        key = torch.arange(0, end, device=pattern.device)
        found = {}
        for name in self.request.targets:
            # duplicates: the same token before; induction: the keys whose predecessor is the same token
            shift = int(name == "induction")
            equal = self.tokens[:, start:end, None] == self.tokens[:, None, :end].roll(shift, -1)
            if shift:
                equal[..., 0] = False
                equal &= key <= place[:, None]
            else:
                equal &= key < place[:, None]
            mass = torch.stack([(pattern[:, head] * equal[..., first_key:]).sum(-1) for head in
                                range(pattern.shape[1])], 1)  # fmt: skip
            found[name] = torch.where(equal.any(-1)[:, None], mass, torch.nan)
        return found
