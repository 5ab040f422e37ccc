"""How few neurons a model needs per token: what the weak ones carry, and how many can go at what loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor

from interp.hooks import interventions, no_retained_graph
from interp.hooks.names import device_of
from interp.models import provenance
from interp.neurons._cett import GRID, tails_of, truncation
from interp.neurons._kept import kept_tokens
from interp.results import Result, labelled
from interp.stats import Interval, bootstrap_interval, ratio_interval


@dataclass(frozen=True, eq=False, repr=False)
class Sparsity(Result):
    """Share of a layer's neurons that stay on when the tail below a threshold is cut: `(layer, example)`.

    Attributes:
        thresholds: Per layer, in units of |activation| * ||W_out||.
        errors: CETT that this threshold reaches on the tokens it was chosen on, per layer.
    """

    thresholds: xr.DataArray
    errors: xr.DataArray

    def table(self) -> pd.DataFrame:
        """Columns `layer, kept, low, high, threshold, cett`: share of neurons on with its interval over examples."""
        kept = bootstrap_interval(self.values.values)
        return pd.DataFrame(
            {"layer": self.values.coords["layer"].values, "kept": kept.estimate, "low": kept.low, "high": kept.high,
             "threshold": self.thresholds.values, "cett": self.errors.values}
        )  # fmt: skip

    def plot(self) -> Any:
        """Share of neurons on by layer, with 95 % intervals over examples."""
        from interp.plotting import bars

        return bars(
            self.table(), x="layer", y="kept", interval=("low", "high"), title="Neurons that stay on",
            unit="share of neurons",
        )  # fmt: skip


def cett(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    level: float | int = 0.2,
    *,
    keep: Bool[Tensor, "batch pos"] | None = None,
    skip_bos: bool = True,
    batch_size: int = 32,
) -> Sparsity:
    """The share of neurons that stay on when each layer gives up the same part of its MLP's output.

    Per layer, the largest threshold such that the neurons at or below it together write at most `level` of the length
    of what all neurons write (mean over tokens). The model is not changed. Costs one forward; keeps the activations of
    all layers in memory.

    Raises:
        ValueError: If `level` is not in [0, 1], or tokens or options do not fit. RuntimeError: In training mode.

    Source:
        Luo et al. 2024, "Sparsing Law" (arXiv:2411.02335), CETT. Thresholds are quantiles in steps of 1/1024 of the
        magnitudes in place of an even grid of 65,536; output biases, which belong to no neuron, are left out of the
        length; in post-norm models it is taken before that norm.
    """
    kept = kept_tokens(bridge, tokens, keep, skip_bos, batch_size)
    if not 0 <= level <= 1:
        raise ValueError(f"level={level}; expected a part of the output, from 0 to 1")
    tails = tails_of(bridge, tokens, kept, batch_size)
    found = [tail.threshold(float(level)) for tail in tails.values()]
    values = np.full((len(found), len(tokens)), np.nan, dtype=np.float32)
    counts = kept.sum(1).numpy()
    rows = np.repeat(np.arange(len(tokens)), counts)
    for layer, tail in tails.items():
        on = (tail.magnitudes > found[layer][0]).float().mean(1).numpy()
        sums = np.bincount(rows, weights=on, minlength=len(tokens))
        values[layer] = np.divide(sums, counts, out=np.full(len(tokens), np.nan), where=counts > 0)
    record = provenance(
        bridge, method="cett", level=float(level), n_tokens=int(kept.sum()), skip_bos=skip_bos, grid=GRID,
        largest_fall=max(tail.falls() for tail in tails.values()), cost={"forwards": 1},
    )  # fmt: skip
    return Sparsity(**_sparsity(values, found, range(len(tokens))), provenance=record)


@dataclass(frozen=True, eq=False, repr=False)
class PPLSparsity(Sparsity):
    """`Sparsity` at which perplexity rises by a given percentage; `values` are of the report split.

    Attributes:
        losses: Mean loss per example of the report split in nats, `(run, example)`: `intact` and `sparse`; coordinate
            `n_tokens`, the tokens predicted.
        search: Every level tried on the search split: `(step, quantity)` with `level`, `ratio` (of perplexities,
            sparse over intact) and `kept`, in order of level.
        level: The CETT level chosen.
        reached: False if even the largest level tried stays below the rise that was asked for.
    """

    losses: xr.DataArray
    search: xr.DataArray
    level: float
    reached: bool

    def ratio(self, confidence: float = 0.95) -> Interval:
        """Perplexity sparse over intact on the report split, with its interval over examples."""
        rise = self.losses.sel(run="sparse").values - self.losses.sel(run="intact").values
        counts = self.losses.coords["n_tokens"].values
        return Interval(*(np.exp(end) for end in ratio_interval(rise * counts, counts, confidence=confidence)))

    def monotone(self) -> bool:
        """Whether perplexity rose with the level at every step tried, as the search assumes."""
        return bool((np.diff(self.search.sel(quantity="ratio").values) >= 0).all())


def ppl_sparsity(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    p: float | int = 1.0,
    *,
    split: float | int = 0.5,
    steps: int = 10,
    keep: Bool[Tensor, "batch pos"] | None = None,
    skip_bos: bool = True,
    batch_size: int = 32,
    seed: int = 0,
) -> PPLSparsity:
    """The share of neurons that must stay on if perplexity may rise by `p` percent.

    One level of CETT for all layers is found by bisection: each level gives every layer a threshold (see `cett`),
    the neurons below are set to zero, and the rise of perplexity is measured, all on the search split. Shares and the
    rise are then reported on examples that the search has not seen. Costs `steps` + 3 forwards of the search split and
    2 of the other.

    Args:
        p: Rise allowed, in percent.
        split: Share of the examples to search on; drawn with `seed`.
        steps: Halvings of the interval of levels: 10 leave it 1/1024 wide.
        keep: Tokens that count, for CETT and as tokens to be predicted.
        skip_bos: Leave out BOS tokens, for both.

    Raises:
        ValueError: If an option, the tokens or the sizes of the splits do not fit. RuntimeError: In training mode.

    Source:
        Luo et al. 2024 (arXiv:2411.02335), PPL-p% sparsity (published: p = 1, level to 1e-6, same text for search and
        report). The two splits, and the check that perplexity rises with the level (`monotone`), are ours.
    """
    kept = kept_tokens(bridge, tokens, keep, skip_bos, batch_size)
    if not 0 < p < math.inf:
        raise ValueError(f"p={p}; expected a rise in percent, above 0")
    if not 0 < split < 1:
        raise ValueError(f"split={split}; expected a share of the examples to search on, between 0 and 1")
    if steps < 1:
        raise ValueError(f"steps={steps}; expected at least 1")
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    cut = round(len(tokens) * split)
    parts = [order[:cut].sort().values, order[cut:].sort().values]
    for name, rows in zip(("search", "report"), parts, strict=True):
        if not len(rows) or not bool(kept[rows][:, 1:].any(1).all()):
            raise ValueError(
                f"the {name} split has {len(rows)} of {len(tokens)} examples, and each needs a token to predict after "
                "its first; give more examples, or another split or keep"
            )
    chosen = _search(bridge, tokens[parts[0]], kept[parts[0]], float(p), steps, batch_size)
    report, mask = tokens[parts[1]], kept[parts[1]]
    intact, _ = _run(bridge, report, mask, {}, batch_size)
    sparse, on = _run(bridge, report, mask, {i: found[0] for i, found in enumerate(chosen.found)}, batch_size)
    predicted = ("example", mask[:, 1:].sum(1).numpy())
    losses = labelled(
        torch.stack([intact, sparse]), ("run", "example"),
        {"run": ["intact", "sparse"], "example": parts[1].tolist(), "n_tokens": predicted}, unit="nats",
    )  # fmt: skip
    search = labelled(
        np.array(chosen.tried), ("step", "quantity"), {"quantity": ["level", "ratio", "kept"]}, unit="share"
    )
    record = provenance(
        bridge, method="ppl_sparsity", p=float(p), split=float(split), steps=steps, seed=seed, skip_bos=skip_bos,
        grid=GRID, n_tokens=int(kept.sum()), largest_fall=chosen.fall,
        cost={"forwards_search_split": len(chosen.tried) + 2, "forwards_report_split": 2},
    )  # fmt: skip
    return PPLSparsity(
        **_sparsity(on.numpy(), chosen.found, parts[1].tolist()), provenance=record, losses=losses, search=search,
        level=chosen.level, reached=chosen.reached,
    )  # fmt: skip


class _Chosen(NamedTuple):
    level: float
    found: list[tuple[float, float]]  # threshold and CETT per layer
    tried: list[tuple[float, float, float]]
    reached: bool
    fall: float


def _search(bridge: Any, tokens: Tensor, kept: Tensor, p: float, steps: int, batch_size: int) -> _Chosen:
    tails = tails_of(bridge, tokens, kept, batch_size)
    intact, _ = _run(bridge, tokens, kept, {}, batch_size)
    weights = kept[:, 1:].sum(1).double()
    tried: list[tuple[float, float, float]] = []

    def ratio(level: float) -> float:
        thresholds = {layer: tail.threshold(level)[0] for layer, tail in tails.items()}
        loss, on = _run(bridge, tokens, kept, thresholds, batch_size)
        rise = float(((loss - intact).double() * weights).sum() / weights.sum())
        tried.append((level, math.exp(min(rise, 80.0)), float(on.mean())))
        return tried[-1][1]

    low, high = 0.0, 1.0
    reached = ratio(high) > 1 + p / 100
    if not reached:
        low = high
    for _ in range(steps if reached else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) <= 1 + p / 100 else (low, middle)
    found = [tail.threshold(low) for tail in tails.values()]
    return _Chosen(low, found, sorted(tried), reached, max(tail.falls() for tail in tails.values()))


def _run(
    bridge: Any, tokens: Tensor, kept: Tensor, thresholds: dict[int, float], batch_size: int
) -> tuple[Tensor, Tensor]:
    """Mean loss per example, and with thresholds the share of neurons on per layer and example (over kept tokens)."""
    losses, shares = [], []
    for start in range(0, len(tokens), batch_size):
        rows, mask = tokens[start : start + batch_size], kept[start : start + batch_size]
        notes: dict[int, Tensor] = {}
        with torch.no_grad(), no_retained_graph(bridge), interventions(bridge, truncation(bridge, thresholds, notes)):
            logits = bridge(rows.to(device_of(bridge)))[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].to(logits.device).flatten(), reduction="none"
        )
        loss, counts = loss.reshape(len(rows), -1).cpu() * mask[:, 1:], mask[:, 1:].sum(1)
        losses.append(loss.sum(1) / counts)
        if notes:
            on = torch.stack([notes[layer].reshape(mask.shape) for layer in sorted(notes)])
            shares.append((on * mask).sum(-1) / mask.sum(1))
    return torch.cat(losses), torch.cat(shares, 1) if shares else torch.empty(0, len(tokens))


def _sparsity(values: np.ndarray, found: list[tuple[float, float]], examples: Any) -> dict[str, Any]:
    coords = {"layer": range(len(found)), "example": examples}
    layers = {"layer": range(len(found))}
    return {
        "values": labelled(values, ("layer", "example"), coords, unit="share of neurons"),
        "thresholds": labelled(np.array([t for t, _ in found]), ("layer",), layers),
        "errors": labelled(np.array([e for _, e in found]), ("layer",), layers),
    }
