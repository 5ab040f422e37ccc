"""Where a latent of attention outputs comes from: through the values of the heads, back to latents of earlier layers.

Direct attribution says how much of a pre-activation a head brings from a source position. What stands there is the
residual stream, a sum of terms; with the scale of the norm before attention held, the value is linear in each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.cache._reading import check_tokens
from interp.dictionaries._head_reading import chosen_latents, head_layer
from interp.dictionaries._head_runs import destinations, token_texts
from interp.dictionaries._recursion import Table
from interp.dictionaries._recursive_tables import figure, frame, numbered, paths
from interp.dictionaries._recursive_walk import Walk
from interp.dictionaries._upstream import placed
from interp.dictionaries.dictionary import Dictionary
from interp.models import provenance, require_eval
from interp.results import Result, labelled

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False, repr=False)
class RecursiveAttribution(Result):
    """Contributions of terms of the residual stream to one latent's pre-activation at one position per example.

    `values (row)` are in units of the pre-activation; `to_dataframe()` names them. Rows that are not `split` sum to
    `preactivation - bias` per example; those that are were taken apart into the rows of a node, whose sum they are.

    Attributes:
        nodes: (node, field): `example`, `parent` (a node, -1 for none), `dictionary` (place in `upstream`, -1 for the
            attributed one), `latent`, `pos`. The first are the attributed latent in each example.
        node_weights: (node), what of the pre-activation goes through each; all of it for the first.
        preactivation, bias, activation: (example), of the attributed latent.
        parts: What the coordinate `part` of a row counts: label, kind, hook, and the dictionary of a latent or -1.
            Kinds: `embedding`, `attention`, `head`, `mlp`, `latent`, `error`, `bias`, `skip`.
        tokens: Texts of the tokens of each example.
    """

    nodes: xr.DataArray
    node_weights: xr.DataArray
    preactivation: xr.DataArray
    bias: xr.DataArray
    activation: xr.DataArray
    parts: list[list[Any]]
    tokens: list[list[str]]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per contribution.

        Columns: `example, depth, path` (the latents it was reached through, none at depth 1), `component, kind, hook,
        latent` (-1 for none), `head` (of the reading layer, -1 for a bias of a latent), `src, token, contribution,
        split, node`.
        """
        return frame(self)

    def leaves(self) -> pd.DataFrame:
        """The rows that were not split further, which sum to `preactivation - bias`."""
        found = self.to_dataframe()
        return found.loc[~found["split"].to_numpy(dtype=bool)].reset_index(drop=True)

    def top(
        self,
        k: int = 10,
        *,
        by: Literal["abs", "max", "min"] = "abs",
        reduce: str | Sequence[str] | None = ("head", "path"),
    ) -> pd.DataFrame:
        """The `k` largest contributions, best first, of those that were not split.

        Args:
            reduce: Columns that are summed over: of `head`, `src`, `path` and `example`; None for single rows.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        over = {reduce} if isinstance(reduce, str) else set(reduce or ())
        if unknown := over - {"head", "src", "path", "example"}:
            raise ValueError(f"reduce={sorted(unknown)}; contributions are summed over head, src, path or example")
        over |= {"token"} if over & {"src", "example"} else set()
        over |= {"src"} if "example" in over else set()
        over |= {"node", "depth"} if "path" in over else set()
        columns = [name for name in self.to_dataframe().columns if name not in over | {"contribution", "split"}]
        summed = self.leaves().groupby(columns, sort=False).agg({"contribution": "sum"}).reset_index()
        size = {"abs": -summed["contribution"].abs(), "max": -summed["contribution"], "min": summed["contribution"]}[by]
        return summed.loc[size.sort_values(kind="stable").index[:k]].reset_index(drop=True)

    def by_kind(self) -> pd.DataFrame:
        """Per example and kind of term: signed sum, and the sum of sizes after heads are added up."""
        found = self.leaves()
        spots = ["example", "kind", "component", "latent", "src"]
        joined = found.groupby(spots, sort=False).agg({"contribution": "sum"}).reset_index()
        joined["size"] = joined["contribution"].abs()
        return joined.groupby(["example", "kind"], sort=False).agg({"contribution": "sum", "size": "sum"}).reset_index()

    def gap(self) -> xr.DataArray:
        """Sum of all rows that were not split plus bias less pre-activation, (example)."""
        kept = ~self.values["split"].values.astype(bool)
        at, n = self.values["example"].values[kept], self.preactivation.sizes["example"]
        total = np.bincount(at, self.values.values[kept].astype(np.float64), minlength=n)
        return (self.bias.astype("float64") + total - self.preactivation).astype("float32")

    def completeness(self) -> float:
        """The largest gap, as a share of the largest pre-activation in size (or of the largest row, if larger)."""
        size = max(float(abs(self.preactivation).max()), float(abs(self.values).max()), 1e-30)
        return float(abs(self.gap()).max()) / size

    def paths(self, k: int = 10, *, example: int | None = None) -> pd.DataFrame:
        """The `k` largest chains from a term to the latent, with the head that brings most of each step.

        Columns `example, contribution, depth, path`; steps read from the attributed latent back, `<-[H2]-` for head 2.
        Contributions are summed over all heads.
        """
        return paths(self, k, example)

    def plot(self, k: int = 15, *, example: int = 0) -> go.Figure:
        """Bars of the `k` terms that bring most, heads and paths summed, coloured by kind: error nodes stand out."""
        return figure(self, k, example)


@torch.no_grad()
def recursive_attribution(
    bridge: Any,
    dictionary: Dictionary,
    tokens: Int[Tensor, "example pos"],
    latent: int,
    *,
    position: int | Int[Tensor, " example"] = -1,
    upstream: Sequence[Dictionary] = (),
    depth: int = 1,
    heads: bool = False,
    branches: int | None = None,
    batch_size: int = 16,
    max_rows: int = 2_000_000,
) -> RecursiveAttribution:
    """What each term of the stream brings, by head and source position, to a latent's pre-activation at one position.

    The stream that attention reads is embedding (and position embedding) plus what attention and MLP of every earlier
    layer added. A dictionary of `upstream` splits the term it rebuilds into the latents that are on, what its decoder
    adds without them, and its error. Everything but the terms is held as it is on these tokens: attention patterns,
    the scales of norms (before attention, and behind it in post-norm models), of tokens in dictionaries that normalise
    by token, and which latents are on. Contributions are then exact and complete, as a sum. They are direct: what a
    term does through an MLP or through queries and keys is part of other terms, or held. Costs one forward, up to the
    dictionary's layer.

    With `depth` above 1 latents of `upstream` that read `hook_z` are split in the same way at their source, down to
    `depth` levels. What goes through a latent is shared out as its own pre-activation is: its bias is a term of its
    own, and where the latent is not its pre-activation (gated dictionaries) the ratio of the two is held. Where heads
    nearly cancel with the bias, shares are large and of both signs.

    Args:
        dictionary: It reads `hook_z`.
        latent: Which of its latents.
        position: The destination: one for all examples, or [example].
        upstream: Dictionaries of terms of earlier layers: of `hook_z` or `hook_attn_out`, of `hook_mlp_out`
            (transcoders as well), one per term; or of the very `hook_resid_pre` that attention of the layer reads,
            whose terms then stand for all others there.
        depth: Levels; 1 does not split latents onward.
        heads: Split attention of earlier layers without a dictionary into its heads and a bias.
        branches: Most latents split onward per example and level, those with the largest contributions; the rest stay
            whole, and the sum complete. None for all.
        batch_size: Examples per forward.
        max_rows: Refuse tables longer than this before they are built.

    Raises:
        KeyError, ValueError: If options do not fit, or a dictionary of `upstream` has no part in what is read; after
            the first forward, if on this model heads are not pattern times values, values not a product of the normed
            stream, or the stream not the sum of its terms; or the table is longer than `max_rows`.
        RuntimeError: In training mode.

    Source:
        Kissane et al. 2024 (arXiv:2406.17759), recursive direct feature attribution. Levels, error nodes and the sum
        of everything are ours.
    """
    require_eval(bridge)
    check_tokens(bridge, tokens)
    latent = chosen_latents(dictionary, [latent])[0]
    for name, value, least in (("depth", depth, 1), ("branches", branches, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value}; expected at least {least}")
    layer = head_layer(bridge, dictionary)
    above = placed(bridge, list(upstream), layer, depth)
    if isinstance(position, Tensor) and tuple(position.shape) != (len(tokens),):
        raise ValueError(f"position has shape {tuple(position.shape)}; expected one per example, [{len(tokens)}]")
    where, _ = destinations(position, tokens)
    walk = Walk(bridge, dictionary, latent, layer, above, depth, heads, branches, Table(max_rows))
    pre = torch.cat([
        walk.run(tokens[start : start + batch_size], where[start : start + batch_size, 0], start)
        for start in range(0, len(tokens), batch_size)
    ])  # fmt: skip
    record = provenance(
        bridge, method="recursive_attribution", latent=latent, layer=layer, depth=depth, heads=heads,
        branches=branches, position=where[:, 0].tolist(), dictionary=dictionary.settings(),
        upstream=[one.dictionary.settings() for one in above], n_forwards=-(-len(tokens) // batch_size),
    )  # fmt: skip
    bias = dictionary._preactivations(dictionary.W_enc.new_zeros(dictionary.d_in))[latent]
    numbers = [array[:, latent] for array in (pre, dictionary.activate(pre))]
    by_example = [
        labelled(array, ("example",), {"example": np.arange(len(tokens))}, unit=unit)
        for array, unit in zip(
            (numbers[0], bias.expand(len(tokens)), numbers[1]),
            ("pre-activation", "pre-activation", "activation"),
            strict=True,
        )
    ]
    return RecursiveAttribution(
        *numbered(walk.table, torch.cat(walk.nodes), torch.cat(walk.weights), record),
        *by_example,
        parts=[list(part) for part in walk.table.parts],
        tokens=token_texts(bridge, tokens).tolist(),
    )
