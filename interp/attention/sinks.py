"""Attention sinks: how much attention every key receives from the queries that can see it, and where that is a sink."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp import stats
from interp.attention._patterns import check_layers, check_tokens, reduce_patterns
from interp.models import provenance
from interp.results import Result, labelled

EPSILON = 0.3
"""Threshold of the published sink rates."""

MIN_QUERIES = 16
"""Queries that a key must be seen by before it is called a sink: an average over fewer says little."""


def sink_importance(pattern: Float[Tensor, "*batch dest src"], *, diagonal: bool = True) -> Float[Tensor, "*batch src"]:
    """Mean attention that each key gets from the queries that can see it: column sum over their number.

    Args:
        pattern: Causal attention patterns of whole sequences; rows may sum to less than 1.
        diagonal: Count the attention of a token to itself. Without it only later queries count, and the last key, which
            no later query sees, is NaN.

    Source:
        The importance score of Gu et al. 2025 (arXiv:2410.10781), section 3; ACT (Yu et al. 2024) and the plots of
        Guo et al. 2024 use the same statistic. Positions here count from 0.
    """
    n_pos = pattern.shape[-1]
    if pattern.shape[-2] != n_pos:
        raise ValueError(
            f"the pattern is {tuple(pattern.shape)}: {pattern.shape[-2]} queries and {n_pos} keys. A column of a part "
            f"of the queries (decoding with a cache) is not the statistic; run the whole sequence"
        )
    if pattern.dtype != torch.float64:
        pattern = pattern.float()  # half precision cannot count the queries, nor add up their weights
    columns = pattern.sum(-2)
    queries = torch.arange(n_pos, 0, -1, device=pattern.device, dtype=pattern.dtype)
    if diagonal:
        return columns / queries
    columns = columns - pattern.diagonal(dim1=-2, dim2=-1)
    return torch.where(queries > 1, columns / (queries - 1), torch.nan)


@dataclass(frozen=True, eq=False, repr=False)
class SinkScores(Result):
    """Importance of every key for every head, one sequence at a time.

    `values` is the mean attention to the key from the queries that can see it, itself included, with dimensions
    `(layer, head, key, example)`. At key 0 it lies between 1 / n and 1.

    Attributes:
        self_attention: The diagonal of the pattern, of the same dimensions: what `diagonal=False` takes out.
        off_sequence: Mean share of a row that falls on no key (learned sinks, masks), `(layer, head, example)`.
    """

    self_attention: xr.DataArray
    off_sequence: xr.DataArray

    def queries(self, *, diagonal: bool = True) -> xr.DataArray:
        """How many queries see each key; without the diagonal, how many later ones."""
        key = self.values["key"]
        n = int(self.provenance["n_pos"])
        return (n - key if diagonal else n - 1 - key).astype("float32").rename(None)

    def importance(self, *, diagonal: bool = True) -> xr.DataArray:
        """`values`, or the same without what each token gives itself (the last key is then NaN)."""
        if diagonal:
            return self.values
        later = self.queries(diagonal=False)
        columns = self.values * self.queries() - self.self_attention
        return (columns / later.where(later > 0)).transpose(*self.values.dims).astype("float32")

    def flags(self, epsilon: float | int = EPSILON, *, diagonal: bool = True, min_queries: int = 1) -> xr.DataArray:
        """1 where the importance is above `epsilon` (strictly), 0 where not, NaN for keys seen by too few queries.

        The defaults are the published statistic. Near the end of a sequence it cannot be told from self-attention: a
        head that only attends to itself scores 1, 1/2, 1/3 on the last three keys. For sinks beyond position 0 use
        `diagonal=False` and `min_queries` (see `sinks`).

        Args:
            min_queries: Number of queries (later ones, with `diagonal=False`) below which a key is not judged.
        """
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon={epsilon} must lie between 0 and 1: it is a mean attention weight")
        if min_queries < 1:
            raise ValueError(f"min_queries={min_queries} must be at least 1")
        importance = self.importance(diagonal=diagonal)
        judged = importance.notnull() & (self.queries(diagonal=diagonal) >= min_queries)
        flags = (importance > epsilon).astype("float32").where(judged).transpose(*self.values.dims)
        return flags.assign_attrs(unit="share of sequences")

    def rates(self, epsilon: float | int = EPSILON, *, diagonal: bool = True, min_queries: int = 1) -> xr.DataArray:
        """Sink rate of every key, `(key)`: share of layers, heads and sequences in which it is a sink."""
        flags = self.flags(epsilon, diagonal=diagonal, min_queries=min_queries)
        return flags.mean(["layer", "head", "example"], keep_attrs=True)

    def rate(self, key: int = 0, epsilon: float | int = EPSILON, **interval: Any) -> stats.Interval:
        """Sink rate of one key over all heads, with its bootstrap interval over sequences (see `stats`)."""
        return stats.bootstrap_interval(self._at(self.flags(epsilon), key).mean(["layer", "head"]), **interval)

    def head_rates(self, key: int = 0, epsilon: float | int = EPSILON) -> xr.DataArray:
        """Share of sequences in which the key is a sink of the head, `(layer, head)`."""
        return self._at(self.flags(epsilon), key).mean("example", keep_attrs=True)

    def sinks(
        self,
        epsilon: float | int = EPSILON,
        *,
        diagonal: bool = False,
        min_queries: int = MIN_QUERIES,
        share: float | int = 0.5,
    ) -> Any:
        """Table of the sinks at any position: a row for every layer, head and key flagged in at least `share` of the
        sequences, strongest first.

        With the guards of this method heads that attend to themselves, to their neighbours or evenly have none.
        Columns: `layer, head, key, rate, importance`.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share={share} must be above 0 and at most 1: a share of sequences")
        rate = self.flags(epsilon, diagonal=diagonal, min_queries=min_queries).mean("example")
        table = rate.rename("rate").to_dataframe().reset_index()
        strength = self.importance(diagonal=diagonal).mean("example").rename("importance").to_dataframe().reset_index()
        table["importance"] = strength["importance"]
        found = table[table["rate"] >= share].sort_values(["rate", "importance"], ascending=False, kind="stable")
        return found[["layer", "head", "key", "rate", "importance"]].reset_index(drop=True)

    def plot(self, key: int = 0, epsilon: float | int = EPSILON) -> Any:
        """Layer x head figure of the sink rate of one key."""
        from interp.plotting import layer_head

        hover = {"importance": self._at(self.values, key).mean("example")}
        title = f"Sink rate of position {key} (importance > {epsilon:g})"
        rates = self.head_rates(key, epsilon)
        return layer_head(rates, title=title, unit="sink rate", signed=False, limit=1, hover=hover)

    def _at(self, values: xr.DataArray, key: int) -> xr.DataArray:
        measured = self.values["key"].values.tolist()
        if key not in measured:
            raise ValueError(f"key={key} was not measured; there is {measured[0]} to {measured[-1]}")
        return values.sel(key=key, drop=True)


def sink_scores(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    *,
    layers: Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> SinkScores:
    """How much attention every key gets in every head: the importance score, from which sink rates follow.

    The published rates are `sink_scores(bridge, tokens).rates()` on natural text cut to its first 64 tokens: a flag per
    sequence and head, then the mean. Position 0 is whatever the tokens begin with: BOS for Llama, a word for GPT-2;
    measure with and without (`provenance["first_is_bos"]`). Rates fall with the length of the sequence, and below 10
    tokens even uniform attention exceeds 0.3 at position 0. Interventions that are active are seen. Costs one forward.

    Args:
        bridge: A model in evaluation mode.
        tokens: Token ids, all rows the same length and none padded: padding would be counted as queries.
        layers: Layers to measure, all by default; the others are NaN.
        keys: Positions to keep, all by default; memory is layers x heads x keys x sequences numbers, twice.
        batch_size: Rows per forward.

    Raises:
        ValueError: If the tokens, layers or keys do not fit, or the model's patterns cannot be read.
        RuntimeError: If the model is in training mode.

    Source:
        Gu et al. 2025 (arXiv:2410.10781), section 3, epsilon 0.3, 64 tokens, 100 sequences. Their script keeps all
        patterns of all sequences in memory; here each layer's is reduced inside the forward. `flags` adds a variant
        without the diagonal and a least number of queries, which they do not have.
    """
    check_tokens(bridge, tokens)
    n, n_pos = tokens.shape
    chosen = list(range(n_pos)) if keys is None else [int(key) for key in keys]
    if wrong := [key for key in chosen if not 0 <= key < n_pos]:
        raise ValueError(f"keys {wrong[:5]} are not positions of these tokens; expected 0 to {n_pos - 1}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"keys={keys} must name at least one position, and each once")

    def reduce(layer: int, pattern: Tensor) -> dict[str, Tensor]:
        return {
            "importance": sink_importance(pattern)[..., chosen],
            "self": pattern.diagonal(dim1=-2, dim2=-1)[..., chosen],
            "off": 1 - pattern.sum(-1).mean(-1),
        }

    found = reduce_patterns(bridge, tokens, reduce, layers=check_layers(bridge, layers), batch_size=batch_size)
    n_layers, n_heads = int(bridge.cfg.n_layers), int(bridge.cfg.n_heads)
    coords = {"layer": range(n_layers), "head": range(n_heads), "example": range(n)}

    def assembled(name: str, dims: Sequence[str]) -> xr.DataArray:
        size = (n_layers, n_heads, *([len(chosen)] if "key" in dims else []), n)
        values = torch.full(size, torch.nan)
        for layer, parts in found.items():
            values[layer] = parts[name].movedim(0, -1)
        own = {dim: list(chosen if dim == "key" else coords[dim]) for dim in dims}
        return labelled(values, dims, own, unit="mean attention weight")

    bos = getattr(bridge.tokenizer, "bos_token_id", None)
    record = provenance(
        bridge,
        method="sink_scores",
        n_examples=n,
        n_pos=n_pos,
        first_is_bos=None if bos is None else float((tokens[:, 0] == bos).float().mean()),
        cost={"forwards": 1},
    )
    dims = ["layer", "head", "key", "example"]
    return SinkScores(
        assembled("importance", dims),
        record,
        assembled("self", dims),
        assembled("off", ["layer", "head", "example"]),
    )
