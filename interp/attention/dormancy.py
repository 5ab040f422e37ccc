"""Dormant heads: they attend to the sink and do nothing in one domain of text, and work in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from interp import stats
from interp.attention._activations import sizes
from interp.attention._patterns import check_layers, check_tokens, reduce_patterns
from interp.attention.calibration import group_heads
from interp.attention.sink_interventions import cut_heads
from interp.hooks import no_retained_graph
from interp.hooks.names import device_of
from interp.models import provenance, require_eval
from interp.results import Result, labelled

GAP, QUIET, ACTIVE = 0.4, 0.001, 0.01
"""Least gap of sink mass; largest loss change where a head is dormant, and what it must exceed where it is active."""

_BUDGET = 2**26  # bytes of the float32 logits of one forward when the number of rows is left open


def dormant_in(
    sink_mass: ArrayLike,
    loss_change: ArrayLike,
    *,
    gap: float | int = GAP,
    quiet: float | int = QUIET,
    active: float | int = ACTIVE,
) -> NDArray[np.int64]:
    """Which heads are dormant in one of two domains: 0 or 1 for the domain in which each is, -1 for none.

    A head is dormant in a domain if its mean mass on the sink is higher there than in the other by at least `gap`,
    cutting it changes the loss there by at most `quiet` in magnitude, and raises it in the other by more than `active`.

    Args:
        sink_mass, loss_change: `[2, ...]`, domains first; loss changes in nats per token. NaN selects nothing.

    Source:
        A criterion fitted to Guo et al. 2024 (arXiv:2410.13835), who give none: in layer 16 of Llama-2-7B, Wikipedia
        against GitHub, it selects head 25 alone (sink mass 0.949 and 0.251; loss change -0.0001 and +0.027).
    """
    mass, change = np.asarray(sink_mass, dtype=np.float64), np.asarray(loss_change, dtype=np.float64)
    if mass.shape != change.shape or mass.shape[:1] != (2,):
        raise ValueError(
            f"sink_mass {mass.shape} and loss_change {change.shape}; expected both [2, ...], domains first"
        )
    if not (gap > 0 and 0 <= quiet <= active):
        raise ValueError(f"gap={gap}, quiet={quiet}, active={active}; expected gap > 0 and 0 <= quiet <= active")
    found = np.full(mass.shape[1:], -1)
    for domain in (0, 1):
        higher = mass[domain] - mass[1 - domain] >= gap
        found[higher & (np.abs(change[domain]) <= quiet) & (change[1 - domain] > active)] = domain
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Dormancy(Result):
    """Mean attention to the sink in two domains, `(domain, layer, head, example)`; NaN where a domain has fewer
    examples.

    Attributes:
        loss_change: Loss with the head cut minus loss without, nats per token, of the same dimensions. Positive: the
            head is of use.
        loss: Loss of the whole model, `(domain, example)`.
    """

    loss_change: xr.DataArray
    loss: xr.DataArray

    @property
    def domains(self) -> tuple[str, str]:
        first, second = (str(name) for name in self.values["domain"].values)
        return first, second

    def table(
        self, *, gap: float | int = GAP, quiet: float | int = QUIET, active: float | int = ACTIVE, **interval: Any
    ) -> pd.DataFrame:
        """A row per head, largest gap first: `layer, head, dormant_in` (a domain or an empty string), `gap` (first
        minus second domain, with `gap_low`, `gap_high`), and by domain `sink_mass` and `loss_change` with bootstrap
        intervals over examples (`stats.bootstrap_interval` takes the options)."""
        columns: dict[str, Any] = {}
        means: dict[str, list[Any]] = {"mass": [], "loss": []}
        for domain in self.domains:
            for name, array in (("mass", self.values), ("loss", self.loss_change)):
                part = array.sel(domain=domain, drop=True).dropna("example", how="all")
                means[name].append(stats.bootstrap_interval(part, **interval))
        for name, title in (("mass", "sink_mass"), ("loss", "loss_change")):
            for domain, found in zip(self.domains, means[name], strict=True):
                for part, suffix in zip(found, ("", "_low", "_high"), strict=True):
                    columns[f"{title}_{domain}{suffix}"] = np.asarray(part).ravel()
        first, second = (np.asarray(found[0]) for found in means["mass"])
        resampled = [(np.asarray(found[0]) - np.asarray(found[1]), np.asarray(found[2]) - np.asarray(found[0]))
                     for found in means["mass"]]  # fmt: skip
        (below_a, above_a), (below_b, above_b) = resampled
        difference = first - second
        # the examples of the two domains are independent: half widths add in squares
        low, high = difference - np.hypot(below_a, above_b), difference + np.hypot(above_a, below_b)
        masses, changes = (np.stack([np.asarray(found[0]) for found in means[name]]) for name in ("mass", "loss"))
        chosen = dormant_in(masses, changes, gap=gap, quiet=quiet, active=active).ravel()
        layers, heads = self.values["layer"].values, self.values["head"].values
        grid = [axis.ravel() for axis in np.meshgrid(layers, heads, indexing="ij")]
        names = np.array([*self.domains, ""])
        frame = pd.DataFrame(
            {"layer": grid[0], "head": grid[1], "dormant_in": names[chosen], "gap": difference.ravel(),
             "gap_low": low.ravel(), "gap_high": high.ravel(), **columns}
        )  # fmt: skip
        order = frame["gap"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order].reset_index(drop=True)

    def dormant(
        self, *, gap: float | int = GAP, quiet: float | int = QUIET, active: float | int = ACTIVE
    ) -> list[tuple[int, int]]:
        """The heads `(layer, head)` that are dormant in one of the two domains (see `dormant_in`)."""
        table = self.table(gap=gap, quiet=quiet, active=active, n_resamples=1)
        chosen = table[table["dormant_in"] != ""]
        return [(int(layer), int(head)) for layer, head in zip(chosen["layer"], chosen["head"], strict=True)]

    def plot(self) -> Any:
        """Mean attention to the sink against loss change under the cut, a point per head and domain."""
        from interp.plotting import scatter

        parts = []
        for domain in self.domains:
            both = (self.values, self.loss_change)
            mass, change = (array.sel(domain=domain, drop=True).mean("example") for array in both)
            part = mass.rename("sink_mass").to_dataframe().reset_index()
            part["loss_change"] = change.rename("loss_change").to_dataframe()["loss_change"].to_numpy()
            part["domain"] = domain
            parts.append(part)
        table = pd.concat(parts, ignore_index=True)
        return scatter(
            table, x="sink_mass", y="loss_change", colour="domain", hover=["layer", "head"], identity=False,
            x_title="attention to the sink", y_title="loss change (nats per token)",
            title="Loss change when a head is cut, against its attention to the sink",
        )  # fmt: skip

    def plot_gap(self) -> Any:
        """Mean attention to the sink in one domain against the other, a point per head; the line is where both are
        equal."""
        from interp.plotting import scatter

        means = self.values.mean("example")
        first, second = self.domains
        table = means.sel(domain=first, drop=True).rename(first).to_dataframe().reset_index()
        table[second] = means.sel(domain=second, drop=True).rename(second).to_dataframe()[second].to_numpy()
        table["layer"] = table["layer"].astype(str)
        return scatter(
            table, x=first, y=second, colour="layer", hover=["head"], x_title=f"attention to the sink, {first}",
            y_title=f"attention to the sink, {second}", title="Attention to the sink in two domains, by head",
        )  # fmt: skip


def dormant_heads(
    bridge: Any,
    tokens_a: Int[Tensor, "batch_a pos_a"],
    tokens_b: Int[Tensor, "batch_b pos_b"],
    *,
    names: tuple[str, str] = ("a", "b"),
    sinks: int | tuple[Bool[Tensor, "batch_a pos_a"], Bool[Tensor, "batch_b pos_b"]] = 0,
    targets: tuple[Bool[Tensor, "batch_a pos_a"], Bool[Tensor, "batch_b pos_b"]] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    batch_size: int | None = None,
) -> Dormancy:
    """Attention to the sink and loss change when the head is cut, for every head and two domains of text.

    A dormant head gives its attention to the sink in one domain, where it can be cut without loss, and not in the
    other. Costs, per domain, two forwards and one more for every head that is cut.

    Args:
        tokens_a, tokens_b: Token ids without padding, one domain each; they may differ in number and length.
        names: What the domains are called in the result.
        sinks: Position of the sink; or which tokens are sinks, a mask for each domain, if they are several (first
            token, delimiters). The mass is that on all of them, a mean over the queries after the first of them.
        targets: The tokens whose prediction counts in the loss, a mask for each domain (answers, say); all by default.
        layers: Layers to measure; others are left out of the result.
        heads: Heads `(layer, head)` to cut; the loss change of others is NaN. All of the layers by default.
        batch_size: Rows per forward.

    Raises:
        ValueError: If tokens, sinks, layers or heads do not fit, the names are equal, a row has no sink with a query
            after it or no target, or the model's patterns cannot be read.
        RuntimeError: In training mode.

    Source:
        Guo et al. 2024 (arXiv:2410.13835), section 4: Llama-2-7B, Wikipedia and GitHub from RedPajama, 2048 sequences
        each. There the head is zeroed as here; the thresholds of `dormant_in` are not theirs.
    """
    require_eval(bridge)
    if len(names) != 2 or names[0] == names[1] or "" in names:
        raise ValueError(f"names={names}; expected two different names of domains")
    chosen = check_layers(bridge, layers)
    n_heads = sizes(bridge).n_heads
    cells = [(layer, head) for layer in chosen for head in range(n_heads)]
    if heads is not None:
        asked = [(layer, head) for layer, some in group_heads(bridge, heads).items() for head in some]
        if outside := [cell for cell in asked if cell[0] not in chosen]:
            raise ValueError(f"heads {outside} are not in layers {chosen}")
        cells = asked
    both = [tokens_a, tokens_b]
    masks, counted = [], []
    for i, tokens in enumerate(both):
        check_tokens(bridge, tokens, f"tokens_{'ab'[i]}")
        masks.append(_sink_mask(tokens, sinks if isinstance(sinks, int) else sinks[i], names[i]))
        counted.append(_target_mask(tokens, None if targets is None else targets[i], names[i]))
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1, or None")
    most = max(len(tokens) for tokens in both)
    shape = (2, len(chosen), n_heads, most)
    mass, change, loss = np.full(shape, np.nan), np.full(shape, np.nan), np.full((2, most), np.nan)
    for i, (tokens, mask) in enumerate(zip(both, masks, strict=True)):
        n = len(tokens)
        found = reduce_patterns(bridge, tokens, _sink_mass, layers=chosen, batch_size=batch_size, rows=[mask])
        for place, layer in enumerate(chosen):
            mass[i, place, :, :n] = found[layer].T.numpy()
        base = _losses(bridge, tokens, counted[i], batch_size)
        loss[i, :n] = base.numpy()
        for layer, head in cells:
            with cut_heads(bridge, [(layer, head)]):
                cut = _losses(bridge, tokens, counted[i], batch_size)
            change[i, chosen.index(layer), head, :n] = (cut - base).numpy()
    coords = {"domain": list(names), "layer": chosen, "head": range(n_heads), "example": range(most)}
    settings = {
        "n_examples": [len(tokens) for tokens in both],
        "n_pos": [tokens.shape[1] for tokens in both],
        "targets": "all" if targets is None else [int(mask[:, 1:].sum()) for mask in counted],
        "sinks": sinks if isinstance(sinks, int) else "masks",
        "cost": {"forwards": 2 * (2 + len(cells))},
    }
    return Dormancy(
        labelled(mass, list(coords), coords, unit="mean attention weight"),
        {**provenance(bridge), "method": "dormant_heads", **settings},
        labelled(change, list(coords), coords, unit="nats per token"),
        labelled(loss, ["domain", "example"], {"domain": list(names), "example": range(most)}, unit="nats per token"),
    )


def _sink_mask(tokens: Tensor, sinks: int | Tensor, name: str) -> Tensor:
    n_pos = tokens.shape[1]
    if isinstance(sinks, int):
        if not 0 <= sinks < n_pos - 1:
            raise ValueError(f"sinks={sinks} with {n_pos} positions in domain {name!r}; expected 0 to {n_pos - 2}")
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        mask[:, sinks] = True
        return mask
    if sinks.shape != tokens.shape or sinks.dtype != torch.bool:
        raise ValueError(f"the mask of domain {name!r} is {sinks.dtype} {tuple(sinks.shape)}; expected bool "
                         f"{tuple(tokens.shape)}")  # fmt: skip
    if not bool(sinks[:, :-1].any(1).all()):
        row = int((~sinks[:, :-1].any(1)).nonzero()[0])
        raise ValueError(f"row {row} of domain {name!r} has no sink before its last position")
    return sinks


def _sink_mass(_layer: int, pattern: Tensor, mask: Tensor) -> Tensor:
    """[batch, head]: mean over the queries after the first sink of what they give to all sinks."""
    given = (pattern * mask[:, None, None, :]).sum(-1)
    after = (mask.long().cumsum(1) - mask.long() > 0)[:, None, :]
    return (given * after).sum(-1) / after.sum(-1)


def _target_mask(tokens: Tensor, targets: Tensor | None, name: str) -> Tensor:
    mask = torch.ones(tokens.shape, dtype=torch.bool) if targets is None else targets
    if mask.shape != tokens.shape or mask.dtype != torch.bool:
        raise ValueError(f"the targets of domain {name!r} are {mask.dtype} {tuple(mask.shape)}; expected bool "
                         f"{tuple(tokens.shape)}")  # fmt: skip
    if not bool(mask[:, 1:].any(1).all()):
        row = int((~mask[:, 1:].any(1)).nonzero()[0])
        raise ValueError(f"row {row} of domain {name!r} has no target after its first token")
    return mask


def _losses(bridge: Any, tokens: Tensor, targets: Tensor, batch_size: int | None) -> Tensor:
    """Mean next-token loss of every row over its targets; nothing predicts the first token."""
    size = batch_size or max(1, _BUDGET // (4 * tokens.shape[1] * int(bridge.cfg.d_vocab)))
    found = []
    with torch.no_grad(), no_retained_graph(bridge):
        for start in range(0, len(tokens), size):
            rows = tokens[start : start + size].to(device_of(bridge))
            logits = bridge(rows)[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
            counted = targets[start : start + size, 1:].double().cpu()
            found.append((losses.double().cpu().reshape(counted.shape) * counted).sum(1) / counted.sum(1))
    return torch.cat(found)
