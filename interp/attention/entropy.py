"""Entropy of attention rows and columns, and heads whose pattern is a clean vertical stripe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.attention._activations import sizes
from interp.attention._patterns import check_tokens, reduce_patterns
from interp.attention.sinks import MIN_QUERIES, sink_importance
from interp.models import provenance
from interp.results import Result, labelled


def row_entropy(pattern: Float[Tensor, "*batch dest src"]) -> Float[Tensor, "*batch dest"]:
    """Entropy of every row in nats. Mass that is on no key (learned sinks) counts as one more key: nothing is
    renormalised."""
    entropy = torch.special.entr(pattern).sum(-1)
    rest = 1 - pattern.sum(-1)
    return entropy + torch.where(rest > 1e-4, torch.special.entr(rest.clamp_min(0)), 0)  # less is rounding


def column_entropy(pattern: Float[Tensor, "*batch dest src"]) -> Float[Tensor, "*batch src"]:
    """Entropy in nats of every column, scaled to sum to 1, over the queries that see the key: high where all of them
    attend to it alike. NaN for a column without attention."""
    total = pattern.sum(-2, keepdim=True)
    share = torch.where(total > 0, pattern / total, torch.nan)
    return torch.special.entr(share).sum(-2)


@dataclass(frozen=True, eq=False, repr=False)
class EntropyScores(Result):
    """Entropy of attention by head, `(measure, layer, head, example)`.

    Measures: `row`, nats, mean over rows; `row_normalised`, row entropy over the log of the number of keys seen, mean
    over the rows after the first: 0 for one key, 1 for even attention; `column_normalised`, column entropy over the log
    of the number of queries, the largest of the columns; `key`, the position with the largest importance.
    """

    def stripes(self, *, row_below: float | int, column_above: float | int) -> pd.DataFrame:
        """Heads with low row entropy and one evenly attended column: all their queries look at one key.

        The row entropy does most of the work: where one key takes most of every row, the faint columns are even too.
        Columns `layer, head, row_normalised, column_normalised, key` (the most frequent one); sharpest rows first.
        """
        means = self.values.mean("example").to_dataset("measure").to_dataframe().reset_index()
        keys = self.values.sel(measure="key").stack(cell=("layer", "head")).transpose("cell", "example")
        means["key"] = [int(np.bincount(row.astype(int)).argmax()) if row[0] >= 0 else -1 for row in keys.values]
        chosen = (means["row_normalised"] < row_below) & (means["column_normalised"] > column_above)
        columns = ["layer", "head", "row_normalised", "column_normalised", "key"]
        return means.loc[chosen, columns].sort_values("row_normalised", kind="stable").reset_index(drop=True)

    def plot(self, measure: str = "row_normalised") -> Any:
        """Layer x head figure of one measure."""
        from interp.plotting import layer_head

        values = self.values.sel(measure=measure, drop=True).mean("example")
        unit = "nats" if measure == "row" else "share of the largest possible"
        limit = 1 if measure.endswith("normalised") else None
        title = f"Attention entropy ({measure.replace('_', ', ')})"
        return layer_head(values, title=title, unit=unit, signed=False, limit=limit)


def attention_entropy(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    *,
    layers: Sequence[int] | None = None,
    min_queries: int = MIN_QUERIES,
    batch_size: int | None = None,
) -> EntropyScores:
    """Row and column entropies of every head. Costs one forward.

    Args:
        min_queries: Columns seen by fewer queries are left out of the maximum; the last few would win it by chance.

    Raises:
        ValueError: If the tokens do not fit or are shorter than `min_queries`, or patterns cannot be read.
        RuntimeError: In training mode.

    Source:
        Row entropy: Zhai et al. 2023 (arXiv:2303.06296). The normalised variants and their detector: Guo et al. 2024
        (arXiv:2410.13835), as released; columns scaled to sum to 1 and `min_queries` are ours.
    """
    check_tokens(bridge, tokens)
    n, n_pos = tokens.shape
    if not 2 <= min_queries <= n_pos:
        raise ValueError(f"min_queries={min_queries} must be 2 to {n_pos}, the length of the tokens")
    counts = torch.arange(1, n_pos + 1, dtype=torch.float32)

    def reduce(_layer: int, pattern: Tensor) -> Tensor:
        log = counts.to(pattern.device).log()
        rows = row_entropy(pattern)
        kept = n_pos - min_queries + 1
        columns = (column_entropy(pattern)[..., :kept] / log.flip(0)[:kept]).nan_to_num(-1.0)
        largest = columns.amax(-1)
        place = sink_importance(pattern, diagonal=False)[..., :kept].nan_to_num(-1.0).argmax(-1)
        even = (rows[..., 1:] / log[1:]).mean(-1)
        return torch.stack([rows.mean(-1), even, largest, place.float()], dim=1)

    found = reduce_patterns(bridge, tokens, reduce, layers=layers, batch_size=batch_size)
    shape = sizes(bridge)
    values = torch.full((4, shape.n_layers, shape.n_heads, n), torch.nan)
    for layer, part in found.items():
        values[:, layer] = part.permute(1, 2, 0)
    coords = {
        "measure": ["row", "row_normalised", "column_normalised", "key"],
        "layer": range(shape.n_layers),
        "head": range(shape.n_heads),
        "example": range(n),
    }
    record = provenance(
        bridge, method="attention_entropy", n_examples=n, n_pos=n_pos, min_queries=min_queries, cost={"forwards": 1}
    )
    return EntropyScores(labelled(values, list(coords), coords), record)
