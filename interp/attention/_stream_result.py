"""Results of the streaming route, and the results of the dense routes made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from interp.attention._stream_rows import Request
from interp.attention.entropy import EntropyScores
from interp.attention.head_scores import HeadScores
from interp.attention.sinks import MIN_QUERIES, SinkScores
from interp.models import provenance
from interp.results import Result, labelled

COLUMNS = ("importance", "self_attention", "column_entropy", "column_max")
_PATTERN_SCORES = ("previous_token", "current_token", "duplicate_token", "induction")


@dataclass(frozen=True, eq=False, repr=False)
class AttentionStream(Result):
    """Statistics of attention from `stream_statistics`.

    `values` is the mean over the rows that were measured, `(statistic, layer, head, example)`. The statistics are those
    of `streaming_statistics`.

    Attributes:
        rows: Statistics of every row, `(statistic, layer, head, dest, example)`, those kept.
        importance: Mean attention to each key from the queries that can see it, `(layer, head, key, example)`.
        self_attention: The diagonal of the pattern, likewise.
        column_entropy: Nats, of every column scaled to sum to 1, likewise.
        column_max: The largest weight a key gets, likewise.
    """

    rows: xr.DataArray
    importance: xr.DataArray
    self_attention: xr.DataArray
    column_entropy: xr.DataArray
    column_max: xr.DataArray

    def of_rows(self, dest: Sequence[int]) -> xr.DataArray:
        """Means over a group of queries, `(statistic, layer, head, example)`: of the statistics whose rows were kept.

        Rows in which a statistic has nothing to measure (a key set not seen yet) are left out of its mean.
        """
        n_pos = self.rows.sizes["dest"]
        places = [int(place) for place in dest]
        if not places or min(places) < 0 or max(places) >= n_pos:
            raise ValueError(f"dest={places[:5]} must name at least one of the positions 0 to {n_pos - 1}")
        group = self.rows.sel(dest=places)
        return group.drop_sel(statistic="top", errors="ignore").mean("dest", keep_attrs=True)

    def by_kv_head(self) -> xr.DataArray:
        """`values` averaged over the heads that share keys and values, `(statistic, layer, kv_head, example)`."""
        n_heads, n_kv_heads = self.values.sizes["head"], int(self.provenance["n_kv_heads"])
        group = self.values["head"] // (n_heads // n_kv_heads)
        grouped = self.values.assign_coords(kv_head=("head", group.values)).groupby("kv_head").mean(skipna=False)
        return grouped.transpose("statistic", "layer", "kv_head", "example").astype("float32")

    def sink_scores(self) -> SinkScores:
        """The result of `sink_scores`: flags, rates, sinks at any position."""
        off = self.values.sel(statistic="off_sequence", drop=True)
        record = {**self.provenance, "method": "sink_scores"}
        return SinkScores(self.importance, record, self.self_attention, off)

    def entropy_scores(self, *, min_queries: int = MIN_QUERIES) -> EntropyScores:
        """The result of `attention_entropy`; `min_queries` as there."""
        n_pos = int(self.provenance["n_pos"])
        if not 2 <= min_queries <= n_pos:
            raise ValueError(f"min_queries={min_queries} must be 2 to {n_pos}, the length of the tokens")
        kept = slice(0, n_pos - min_queries + 1)
        queries = torch.arange(n_pos, 0, -1)[kept]
        columns = _tensor(self.column_entropy)[:, :, kept] / queries.log()[:, None]
        # importance without the diagonal: of two columns that differ by less than rounding either may be the key
        later = _tensor(self.importance).double()[:, :, kept] * queries[:, None]
        later = (later - _tensor(self.self_attention).double()[:, :, kept]) / (queries - 1)[:, None]
        parts = {
            "row": self._mean("entropy"),
            "row_normalised": self._mean("entropy_normalised"),
            "column_normalised": columns.nan_to_num(-1.0).amax(2),
            "key": later.nan_to_num(-1.0).argmax(2).float(),
        }
        unmeasured = parts["row"].isnan()
        values = torch.stack([part.masked_fill(unmeasured, torch.nan) for part in parts.values()])
        coords = {"measure": list(parts), **{dim: self.values[dim].values for dim in ("layer", "head", "example")}}
        record = {**self.provenance, "method": "attention_entropy", "min_queries": min_queries}
        return EntropyScores(labelled(values, list(coords), coords), record)

    def head_scores(self) -> HeadScores:
        """The result of `pattern_scores` (`measure="mean"`) for what was streamed of previous and current token,
        duplicate tokens and induction."""
        names = [name for name in _PATTERN_SCORES if name in self.values["statistic"].values]
        if not names:
            raise ValueError("nothing to score was streamed; ask for offsets=(0, 1) or targets")
        values = self.values.sel(statistic=names).rename(statistic="score").assign_attrs(unit="attention weight")
        return HeadScores(values, {**self.provenance, "method": "pattern_scores", "scores": names, "measure": "mean"})

    def plot(self, statistic: str = "entropy") -> Any:
        """Layer x head figure of the mean of one statistic."""
        from interp.plotting import layer_head

        known = [str(name) for name in self.values["statistic"].values]
        if statistic not in known:
            raise ValueError(f"no statistic {statistic!r}; there is {', '.join(known)}")
        mean = self.values.sel(statistic=statistic, drop=True).mean("example")
        unit = _UNITS.get(statistic, "attention weight")
        limit = 1 if unit == "attention weight" else None
        title = f"Attention, {statistic.replace('_', ' ')}: mean over rows"
        return layer_head(mean, title=title, unit=unit, signed=statistic == "lse", limit=limit)

    def _mean(self, statistic: str) -> Tensor:
        return _tensor(self.values.sel(statistic=statistic))


@dataclass(frozen=True, eq=False, repr=False)
class AttentionRows(Result):
    """Whole rows of attention at some queries, `(layer, head, dest, key, example)`; rows may sum to less than 1."""

    def plot(self, dest: int | None = None) -> Any:
        """Layer x head figure of the largest weight of one row, the last by default."""
        from interp.plotting import layer_head

        place = int(self.values["dest"].values[-1]) if dest is None else dest
        values = self.values.sel(dest=place, drop=True).mean("example").max("key")
        title = f"Largest attention weight of query {place}"
        return layer_head(values, title=title, unit="attention weight", signed=False, limit=1)


_UNITS = {"entropy": "nats", "lse": "logits", "support": "keys", "distance": "positions",
          "entropy_normalised": "share of the largest possible"}  # fmt: skip


def stream_result(
    bridge: Any,
    tokens: Tensor,
    found: Mapping[int, Sequence[Mapping[str, Any]]],
    request: Request,
    kept: Sequence[str],
    **options: Any,
) -> AttentionStream:
    """The result from `{layer: [summary of each batch]}`."""
    n, n_pos = tokens.shape
    n_layers, n_heads = int(bridge.cfg.n_layers), int(bridge.cfg.n_heads)
    means = [name for name in request.names() if name != "top"]
    coords = {"layer": range(n_layers), "head": range(n_heads), "example": range(n)}

    def assembled(kind: str, dim: str | None, labels: Sequence[str] | None = None) -> xr.DataArray:
        own = [n_layers, n_heads, *([n_pos] if dim else []), n]
        values = torch.full([*([len(labels)] if labels else []), *own], torch.nan)
        for layer, batches in found.items():
            for i, label in enumerate(labels or [kind]):
                source = [batch[kind][label] if labels else batch[kind] for batch in batches]
                cells = torch.cat(source).movedim(0, -1)
                if labels:
                    values[i, layer] = cells
                else:
                    values[layer] = cells
        dims = [*(["statistic"] if labels else []), "layer", "head", *([dim] if dim else []), "example"]
        places = {"statistic": list(labels or []), **{d: list(c) for d, c in coords.items()}, dim: list(range(n_pos))}
        unit = None if labels else "nats" if kind == "column_entropy" else "mean attention weight"
        return labelled(values, dims, {name: places[name] for name in dims}, unit=unit)

    bos = getattr(bridge.tokenizer, "bos_token_id", None)
    record = provenance(
        bridge,
        method="stream_statistics",
        n_examples=n,
        n_pos=n_pos,
        n_kv_heads=int(getattr(bridge.cfg, "n_key_value_heads", None) or n_heads),
        first_is_bos=None if bos is None else float((tokens[:, 0] == bos).float().mean()),
        recent=request.recent,
        offsets=list(request.offsets),
        sets=list(request.sets),
        targets=list(request.targets),
        cost={"forwards": 1},
        **options,
    )
    columns = {name: assembled(name, "key") for name in COLUMNS}
    return AttentionStream(assembled("means", None, means), record, assembled("rows", "dest", kept), **columns)


def row_result(bridge: Any, values: Tensor, places: Sequence[int], tokens: Tensor) -> AttentionRows:
    """The result from rows [layer, head, dest, key, example]."""
    dims = ("layer", "head", "dest", "key", "example")
    coords = {dim: list(range(size)) for dim, size in zip(dims, values.shape, strict=True)} | {"dest": list(places)}
    n, n_pos = tokens.shape
    record = provenance(bridge, method="attention_rows", n_examples=n, n_pos=n_pos, cost={"forwards": 1})
    return AttentionRows(labelled(values, dims, coords, unit="attention weight"), record)


def _tensor(values: xr.DataArray) -> Tensor:
    return torch.from_numpy(values.values)
