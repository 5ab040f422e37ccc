"""How often each neuron is on, and how many are on at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor

from interp.cache import capture
from interp.hooks import hook_name, resolve
from interp.models import geometry, provenance
from interp.neurons._kept import kept_tokens
from interp.results import Result, labelled


@dataclass(frozen=True, eq=False, repr=False)
class Firing(Result):
    """Share of a layer's neurons that are on at a token, mean over the tokens of each example: `(layer, example)`.

    Attributes:
        rates: Share of tokens at which each neuron is on, `(layer, neuron)`.
    """

    rates: xr.DataArray

    def silent(self) -> pd.DataFrame:
        """Neurons that are never on, and those that always are: columns `layer, never, always`, as shares."""
        rates = self.rates.values
        never, always = (rates == 0).mean(1), (rates == 1).mean(1)
        return pd.DataFrame({"layer": self.rates.coords["layer"].values, "never": never, "always": always})

    def plot(self) -> Any:
        """Firing rates of the neurons of each layer, from the least to the most active."""
        from interp.plotting import lines

        share = np.linspace(0, 100, 101)
        tables = [
            pd.DataFrame({"share": share, "value": np.quantile(row, share / 100), "layer": f"layer {layer}"})
            for layer, row in enumerate(self.rates.values)
        ]
        return lines(
            pd.concat(tables), x="share", group="layer", title="How often the neurons of each layer are on",
            unit="share of tokens", x_title="neurons with at most this rate (%)",
        )  # fmt: skip


def firing(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    *,
    threshold: float | int = 0.0,
    keep: Bool[Tensor, "batch pos"] | None = None,
    skip_bos: bool = True,
    batch_size: int = 32,
) -> Firing:
    """How many neurons are on at a token, and how often each is. Costs one forward.

    Args:
        threshold: A neuron is on where |activation| is above it. 0 counts what is not exactly zero, which says
            something of ReLU only: GELU and gated neurons are next to never exactly zero (see `ppl_sparsity`).
        keep: Tokens that count; all by default.
        skip_bos: Leave out BOS tokens.

    Raises:
        ValueError: If tokens or options do not fit, or nothing is left to count. RuntimeError: In training mode.

    Source:
        Li et al. 2023, "The lazy neuron phenomenon" (arXiv:2210.06313): share of non-zeros after ReLU.
    """
    kept = kept_tokens(bridge, tokens, keep, skip_bos, batch_size)
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold={threshold}; expected a number from 0, compared with |activation|")
    shape = geometry(bridge)
    hooks = [resolve(bridge, hook_name("neuron", layer)) for layer in range(shape.n_layers)]
    shares = torch.full((shape.n_layers, len(tokens)), torch.nan)
    counts = torch.zeros(shape.n_layers, shape.d_mlp, dtype=torch.float64)
    for start in range(0, len(tokens), batch_size):
        part = slice(start, start + batch_size)
        found = capture(bridge, tokens[part], hooks, device="cpu")
        for layer, hook in enumerate(hooks):
            on = (found[hook].float().abs() > threshold) & kept[part][..., None]
            counts[layer] += on.sum((0, 1))
            shares[layer, part] = on.float().mean(-1).sum(1) / kept[part].sum(1)  # NaN for an example without tokens
    coords = {"layer": range(shape.n_layers), "example": range(len(tokens))}
    rates = labelled(counts / int(kept.sum()), ("layer", "neuron"), {"layer": range(shape.n_layers)})
    settings = {
        "method": "firing", "threshold": float(threshold), "n_tokens": int(kept.sum()), "skip_bos": skip_bos,
        "cost": {"forwards": 1},
    }  # fmt: skip
    return Firing(
        labelled(shares, tuple(coords), coords, unit="share of neurons"), provenance(bridge, **settings), rates
    )
