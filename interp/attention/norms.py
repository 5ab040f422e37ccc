"""Norms by layer and position: residual stream, keys, values, and values as they are written to the stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp import stats
from interp.attention._activations import output_factor, query_key_hooks, reduce_activations, sizes, streams
from interp.hooks import hook_name
from interp.models import provenance
from interp.results import Result, labelled

Norm = Literal["residual", "key", "value", "output"]


@dataclass(frozen=True, eq=False, repr=False)
class NormProfile(Result):
    """L2 norms at every position, one sequence at a time.

    `values` is the norm of the residual stream, `(state, pos, example)`: state 0 enters block 0, state l + 1 leaves
    block l; the last one is before the final norm.

    Attributes:
        key, value: Norms of the cached keys and values, `(layer, kv_head, pos, example)`. Rotation does not change the
            norm of a key; keys are taken after their own norm in models that have one.
        output: Norm of the value after its head's part of W_O, `(layer, head, pos, example)`: what attending to the
            position writes.
    """

    key: xr.DataArray
    value: xr.DataArray
    output: xr.DataArray

    def of(self, which: Norm) -> xr.DataArray:
        """The norms by name."""
        known = {"residual": self.values, "key": self.key, "value": self.value, "output": self.output}
        if which not in known:
            raise ValueError(f"which={which!r}; expected one of {', '.join(known)}")
        return known[which]

    def ratio(self, which: Norm = "value", key: int = 0) -> xr.DataArray:
        """Norm at position `key` over the mean norm at the other positions, per example.

        Below 1 for values: the sink is drained. Above 1 for the residual stream: a peak.
        """
        norms = self.of(which)
        if not 0 <= key < norms.sizes["pos"]:
            raise ValueError(f"key={key} is not a position; expected 0 to {norms.sizes['pos'] - 1}")
        rest = norms.where(norms["pos"] != key).mean("pos")
        return (norms.sel(pos=key, drop=True) / rest).astype("float32").assign_attrs(unit="ratio to other positions")

    def peaks(self, factor: float | int = 3.0) -> pd.DataFrame:
        """Positions whose mean residual norm is at least `factor` times the median over positions of the same state:
        columns `state, pos, norm, ratio`, largest ratio first."""
        norms = self.values.mean("example")
        ratio = (norms / norms.median("pos")).rename("ratio").to_dataframe().reset_index()
        ratio["norm"] = norms.rename("norm").to_dataframe().reset_index()["norm"]
        found = ratio[ratio["ratio"] >= factor].sort_values("ratio", ascending=False, kind="stable")
        return found[["state", "pos", "norm", "ratio"]].reset_index(drop=True)

    def profile(self, which: Norm = "residual", key: int = 0, **interval: Any) -> pd.DataFrame:
        """Mean norm at `key` and at the other positions for every layer (or state), over heads and examples, with
        bootstrap intervals over examples: `layer | state, position, norm, low, high`."""
        norms = self.of(which)
        depth = str(norms.dims[0])
        parts = {f"position {key}": norms.sel(pos=key), "other positions": norms.where(norms["pos"] != key)}
        tables = []
        for name, part in parts.items():
            reduced = part.mean([dim for dim in part.dims if dim not in (depth, "example")])
            mean, low, high = stats.bootstrap_interval(reduced.transpose(depth, "example"), **interval)
            columns = {depth: norms[depth].values, "position": name, "norm": mean, "low": low, "high": high}
            tables.append(pd.DataFrame(columns))
        return pd.concat(tables, ignore_index=True)

    def plot(self, which: Norm = "residual", key: int = 0) -> Any:
        """Lines of `profile` over layers."""
        from interp.plotting import lines

        table = self.profile(which, key)
        names = {"residual": "Residual norm", "key": "Key norm", "value": "Value norm", "output": "Norm of value x W_O"}
        x = str(table.columns[0])
        return lines(table, x=x, y="norm", group="position", interval=("low", "high"), title=names[which], unit="norm",
                     x_title="state (blocks passed)" if x == "state" else "layer")  # fmt: skip

    def plot_ratio(self, which: Norm = "value", key: int = 0, *, clip: float | int = 0.01) -> Any:
        """Layer x head figure of `ratio`, colours cut at the `clip` and 1 - `clip` quantiles over heads."""
        from interp.plotting import heatmap

        ratio = self.ratio(which, key).mean("example", keep_attrs=True)
        if ratio.ndim != 2:
            raise ValueError(f"which={which!r} has no heads; use plot({which!r})")
        # 1 is neutral: half and twice the norm of the others are as far from it
        shown = np.log2(ratio.clip(*np.nanquantile(ratio, [clip, 1 - clip])))
        title = f"Norm of the {which} at position {key} over that at other positions"
        return heatmap(shown, title=title, unit="log2 ratio", hover={"ratio": ratio})


def norm_profile(bridge: Any, tokens: Int[Tensor, "batch pos"], *, batch_size: int | None = None) -> NormProfile:
    """Norms of the residual stream, keys and values at every position. Costs one forward.

    Raises:
        ValueError: If the tokens do not fit. RuntimeError: If the model is in training mode.

    Source:
        Residual, key and value norms: Gu et al. 2025 (arXiv:2410.10781), section 3 (they average over heads; here heads
        are kept). The value after W_O: Guo et al. 2024 (arXiv:2410.13835), without the biases, and before the
        post-norm of models that have one.
    """
    shape = sizes(bridge)
    reductions: dict[str, Any] = dict.fromkeys(streams(bridge), lambda stream: stream.norm(dim=-1))
    factors = {layer: output_factor(bridge, layer) for layer in range(shape.n_layers)}
    keys: dict[int, tuple[str, bool]] = {}
    for layer in range(shape.n_layers):
        _, keys[layer] = query_key_hooks(bridge, layer)
        reductions[keys[layer][0]] = lambda tensor: tensor.norm(dim=-1)
        reductions[hook_name("v", layer)] = lambda value, _factor=factors[layer]: torch.cat(
            [value.norm(dim=-1), _written(value, _factor)], dim=-1
        )
    found = reduce_activations(bridge, tokens, reductions, batch_size=batch_size)

    def by_head(tensor: Tensor) -> Tensor:  # [batch, pos, head] -> [head, pos, batch]
        return tensor.permute(2, 1, 0)

    key = [by_head(found[name].transpose(1, 2) if heads_first else found[name]) for name, heads_first in keys.values()]
    both = [by_head(found[hook_name("v", layer)]) for layer in range(shape.n_layers)]
    n, n_pos = tokens.shape
    places = {"pos": range(n_pos), "example": range(n)}
    kv = {"layer": range(shape.n_layers), "kv_head": range(shape.n_kv_heads), **places}
    heads = {"layer": range(shape.n_layers), "head": range(shape.n_heads), **places}
    state = {"state": range(shape.n_layers + 1), **places}
    record = provenance(bridge, method="norm_profile", n_examples=n, n_pos=n_pos, cost={"forwards": 1})
    streams_ = torch.stack([found[name].T for name in streams(bridge)])
    return NormProfile(
        labelled(streams_, list(state), state, unit="norm"),
        record,
        labelled(torch.stack(key), list(kv), kv, unit="norm"),
        labelled(torch.stack([part[: shape.n_kv_heads] for part in both]), list(kv), kv, unit="norm"),
        labelled(torch.stack([part[shape.n_kv_heads :] for part in both]), list(heads), heads, unit="norm"),
    )


def _written(value: Tensor, factor: Tensor) -> Tensor:
    """||v W_O|| of every query head, `[batch, pos, head]`, from values per key-value head."""
    group = factor.shape[0] // value.shape[2]
    expanded = value.repeat_interleave(group, dim=2)
    return torch.einsum("hrd,bphd->bphr", factor.to(value.device), expanded).norm(dim=-1)
