"""Massive activations, the sinks they mark, and outlier metrics: everything that is seen without attention patterns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.attention._activations import reduce_activations, sizes, streams
from interp.attention._patterns import check_tokens
from interp.hooks import hook_name
from interp.models import provenance
from interp.results import Result, labelled
from interp.types import Site

ABSOLUTE, RATIO = 100.0, 1000.0
MAX_FOUND = 10_000


@dataclass(frozen=True, eq=False, repr=False)
class MassiveActivations(Result):
    """The largest activations of the residual stream, and those that meet the criterion of massive ones.

    `values` has dimensions `(statistic, state, example)`, statistics `top 1`, `top 2`, `top 3`, `median`: magnitudes
    over all positions and channels of the sequence. State 0 enters block 0, state l + 1 leaves block l.

    Attributes:
        massive: The activations that meet both clauses, with their sign, `(found)`; coordinates `example`, `state`,
            `pos`, `d_model` and `ratio` (to the median) along `found`.
    """

    massive: xr.DataArray

    def found(self) -> pd.DataFrame:
        """A row per massive activation and sequence: `example, state, pos, d_model, value, ratio`."""
        frame = self.massive.rename("value").to_dataframe().reset_index(drop=True)
        return frame[["example", "state", "pos", "d_model", "value", "ratio"]]

    def places(self) -> pd.DataFrame:
        """A row per state, position and channel with the number of sequences and the mean value, most frequent
        first."""
        grouped = self.found().groupby(["state", "pos", "d_model"])["value"].agg(["size", "mean"]).reset_index()
        grouped = grouped.rename(columns={"size": "n_examples", "mean": "value"})
        return grouped.sort_values(["n_examples", "state"], ascending=[False, True], kind="stable").reset_index(
            drop=True
        )

    def channels(self) -> list[int]:
        """Channels that hold massive activations, most frequent first."""
        return [int(channel) for channel in self.found()["d_model"].value_counts().index]

    def states(self) -> list[int]:
        """States (blocks passed) that hold massive activations."""
        return sorted({int(state) for state in self.found()["state"]})

    def plot(self) -> Any:
        """Lines over states: top three magnitudes and the median, means over sequences."""
        from interp.plotting import lines

        means = self.values.mean("example")
        title = "Largest magnitudes in the residual stream"
        return lines(means, x="state", group="statistic", title=title, unit="magnitude", x_title="blocks passed")


@dataclass(frozen=True, eq=False, repr=False)
class ResidualSinks(Result):
    """How strongly a few channels stand out at every position: max |x_d| / rms(x), `(state, pos, example)`.

    `flags` gives the sink tokens; no attention pattern is read. States as in `MassiveActivations`.
    """

    def flags(self) -> xr.DataArray:
        """1 where the score is above the threshold (strictly), else 0."""
        return (self.values > float(self.provenance["threshold"])).astype("float32")

    def plot(self) -> Any:
        """State x position figure of the mean score over sequences."""
        from interp.plotting import heatmap

        title = f"Largest of channels {self.provenance['channels']} over the root mean square"
        return heatmap(self.values.mean("example"), title=title, unit="max |x| / rms", signed=False)


@dataclass(frozen=True, eq=False, repr=False)
class OutlierMetrics(Result):
    """Infinity norm and kurtosis of activations, `(metric, site, layer, example)`."""

    def summary(self) -> pd.DataFrame:
        """By site: `inf_norm`, the largest over layers of the mean over sequences; `kurtosis` and `kurtosis_max`, the
        mean and the largest over layers of the mean over sequences."""
        means = self.values.mean("example")
        inf, kurtosis = means.sel(metric="inf_norm"), means.sel(metric="kurtosis")
        return pd.DataFrame(
            {
                "site": means["site"].values,
                "inf_norm": inf.max("layer").values,
                "kurtosis": kurtosis.mean("layer").values,
                "kurtosis_max": kurtosis.max("layer").values,
            }
        )

    def plot(self, metric: str = "kurtosis") -> Any:
        """Lines over layers, one per site."""
        from interp.plotting import lines

        means = self.values.sel(metric=metric, drop=True).mean("example")
        title = f"{metric} of activations by layer"
        return lines(means, x="layer", group="site", title=title, unit=metric)


def massive_activations(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    *,
    absolute: float | int | None = ABSOLUTE,
    ratio: float | int | None = RATIO,
    max_found: int = MAX_FOUND,
    batch_size: int | None = None,
) -> MassiveActivations:
    """Activations of the residual stream that are huge in number and against the median of their state.

    Some models show them only with BOS, so measure with and without. Small models rarely reach the absolute clause
    (Pythia-14M: 83 times the median); pass `absolute=None` to judge by the ratio alone. Costs one forward.

    Args:
        absolute: Magnitude to exceed; None leaves this clause out.
        ratio: Least multiple of the median magnitude of the same sequence and state; None leaves this clause out.
        max_found: Refuse to list more than this many.

    Raises:
        ValueError: If tokens do not fit, both clauses are left out, or more than `max_found` activations meet them.
        RuntimeError: In training mode.

    Source:
        Sun et al. 2024 (arXiv:2402.17762), section 2: |a| > 100 and about 1000 times the median. Their figure averages
        the top three over 10 sequences of full length, and leaves out the state that enters block 0.
    """
    if absolute is None and ratio is None:
        raise ValueError("absolute and ratio are both None, so every activation would be massive; give at least one")
    if any(limit is not None and limit <= 0 for limit in (absolute, ratio)):
        raise ValueError(f"absolute={absolute} and ratio={ratio} must be positive, or None")
    check_tokens(bridge, tokens)
    n, n_pos = tokens.shape
    n_states = sizes(bridge).n_layers + 1
    found: list[list[Tensor]] = [[] for _ in range(n_states)]
    rows_seen = [0] * n_states

    def reducer(state: int) -> Any:
        def reduce(stream: Float[Tensor, "batch pos d_model"]) -> Tensor:
            flat = stream.abs().flatten(1)
            median = flat.median(dim=1).values
            where = torch.ones_like(flat, dtype=torch.bool)
            if absolute is not None:
                where &= flat > absolute
            if ratio is not None:
                where &= flat >= ratio * median[:, None]
            row, place = torch.nonzero(where, as_tuple=True)
            _check_count(sum(map(len, found[state])) + len(row), max_found, state)
            width = stream.shape[-1]
            value = stream.flatten(1)[row, place]
            columns = [row + rows_seen[state], place // width, place % width, value, value.abs() / median[row]]
            found[state].append(torch.stack([column.double() for column in columns], dim=1).cpu())
            rows_seen[state] += len(stream)
            return torch.cat([flat.topk(3, dim=1).values, median[:, None]], dim=1)

        return reduce

    hooks = streams(bridge)
    kept = reduce_activations(
        bridge, tokens, {name: reducer(state) for state, name in enumerate(hooks)}, batch_size=batch_size
    )
    table = torch.cat([torch.cat(parts) for parts in found])  # [found, (example, pos, d_model, value, ratio)]
    _check_count(len(table), max_found, None)
    state = torch.cat([torch.full((sum(map(len, parts)),), i) for i, parts in enumerate(found)])
    index = {"example": table[:, 0].long(), "state": state, "pos": table[:, 1].long(), "d_model": table[:, 2].long()}
    coords: dict[str, Any] = {name: ("found", column.numpy()) for name, column in index.items()}
    coords["ratio"] = ("found", table[:, 4].float().numpy())
    values = torch.stack([kept[name] for name in hooks])  # [state, batch, statistic]
    axes = {
        "statistic": ["top 1", "top 2", "top 3", "median"],
        "state": range(n_states),
        "example": range(n),
    }
    record = _record(bridge, tokens, "massive_activations", absolute=absolute, ratio=ratio)
    return MassiveActivations(
        labelled(values.permute(2, 0, 1), list(axes), axes, unit="magnitude"),
        record,
        labelled(table[:, 3], ["found"], coords, unit="activation"),
    )


def residual_sinks(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    channels: Sequence[int],
    *,
    threshold: float | int = 20.0,
    batch_size: int | None = None,
) -> ResidualSinks:
    """Sink tokens found from the residual stream alone: where one of a few channels dwarfs the rest of its state.

    The channels are those of the massive activations (`massive_activations(...).channels()`). The score is bounded by
    the square root of the width, so small models need a smaller threshold. Costs one forward and no pattern.

    Raises:
        ValueError: If tokens or channels do not fit, or the threshold cannot be reached at this width.
        RuntimeError: In training mode.

    Source:
        Kang et al. 2025 (arXiv:2503.03321): RMS-normalised states without the gain, threshold 20, channels 1415 and
        2533 for LLaMA2-7B.
    """
    shape = sizes(bridge)
    chosen = [int(channel) for channel in channels]
    if not chosen or any(not 0 <= channel < shape.d_model for channel in chosen):
        raise ValueError(f"channels={chosen}; expected at least one of 0 to {shape.d_model - 1}")
    bound = math.sqrt(shape.d_model)
    if not 0 < threshold < bound:
        raise ValueError(
            f"threshold={threshold} cannot be passed: |x| / rms(x) is at most sqrt({shape.d_model}) = {bound:.1f} here"
        )

    def reduce(stream: Tensor) -> Tensor:
        rms = stream.square().mean(-1).sqrt()
        return stream[..., chosen].abs().amax(-1) / rms.clamp_min(1e-30)

    hooks = streams(bridge)
    kept = reduce_activations(bridge, tokens, dict.fromkeys(hooks, reduce), batch_size=batch_size)
    check_tokens(bridge, tokens)
    n, n_pos = tokens.shape
    coords = {"state": range(len(hooks)), "pos": range(n_pos), "example": range(n)}
    record = _record(bridge, tokens, "residual_sinks", channels=chosen, threshold=float(threshold))
    values = torch.stack([kept[name].T for name in hooks])
    return ResidualSinks(labelled(values, list(coords), coords, unit="max |x| / rms"), record)


def kurtosis(activation: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Fourth central moment over the fourth power of the standard deviation, of each row flattened: 3 for a Gaussian.

    Source:
        Bondarenko et al. 2023 (arXiv:2306.12929), as released: the deviation is the unbiased one, 1e-6 is added to its
        fourth power, and 3 is not subtracted.
    """
    flat = activation.flatten(1).double()
    centred = flat - flat.mean(1, keepdim=True)
    return centred.pow(4).mean(1) / (flat.std(1).pow(4) + 1e-6)


def outlier_metrics(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    *,
    sites: Sequence[Site] = ("attn_out", "mlp_out", "resid_post"),
    batch_size: int | None = None,
) -> OutlierMetrics:
    """How hard a model would be to quantise: largest magnitude and kurtosis of its activations. Costs one forward.

    Raises:
        ValueError: If tokens do not fit. KeyError: If a site does not exist on this model. RuntimeError: In training
        mode.

    Source:
        Bondarenko et al. 2023 (arXiv:2306.12929), table 2 and appendix: max infinity norm and average kurtosis. Their
        text speaks of the output of attention layers, their script also reports the other two sites.
    """
    n_layers = sizes(bridge).n_layers
    names = {(site, layer): hook_name(site, layer) for site in sites for layer in range(n_layers)}
    if not names:
        raise ValueError("sites is empty; expected some of 'attn_out', 'mlp_out', 'resid_post'")

    def reduce(activation: Tensor) -> Tensor:
        return torch.stack([activation.abs().flatten(1).amax(1).double(), kurtosis(activation)], dim=1)

    kept = reduce_activations(bridge, tokens, dict.fromkeys(names.values(), reduce), batch_size=batch_size)
    values = torch.stack([torch.stack([kept[names[site, layer]] for layer in range(n_layers)]) for site in sites])
    coords = {
        "metric": ["inf_norm", "kurtosis"],
        "site": list(sites),
        "layer": range(n_layers),
        "example": range(len(tokens)),
    }
    record = _record(bridge, tokens, "outlier_metrics", sites=list(sites))
    return OutlierMetrics(labelled(values.permute(3, 0, 1, 2), list(coords), coords), record)


def _check_count(count: int, limit: int, state: int | None) -> None:
    if count > limit:
        where = "" if state is None else f" in state {state} alone"
        raise ValueError(
            f"{count} activations meet the criterion{where}, more than max_found={limit}: it is too mild to call them "
            f"massive. Raise absolute= or ratio=, or max_found="
        )


def _record(bridge: Any, tokens: Tensor, method: str, **settings: Any) -> dict[str, Any]:
    check_tokens(bridge, tokens)
    n, n_pos = tokens.shape
    return provenance(bridge, method=method, n_examples=n, n_pos=n_pos, cost={"forwards": 1}, **settings)
