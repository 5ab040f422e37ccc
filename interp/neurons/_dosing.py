"""The doses of a clamp, the arms they are given in, and what is read of each: the loop behind `clamp`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.models import Geometry
from interp.neurons._clamp_edits import Clamps, Mode, Neuron, Site, make_clamps
from interp.neurons._clamp_runs import ClampRuns, Work, rows_at_once
from interp.neurons._sides import side_vectors
from interp.neurons.activation_statistics import NeuronStatistics

LEVELS = {"q0": 1, "q50": 1, "q90": 1, "q99": 1, "q99.9": 1, "max": 2}
"""Columns of the statistics that `values="quantiles"` doses with, and their factors."""


@dataclass(frozen=True)
class Doses:
    """The levels: the same numbers for every neuron, or each neuron's own quantiles (then `numbers` is None)."""

    names: list[Any]
    numbers: Float[Tensor, "level"] | None

    def check(self, statistics: NeuronStatistics) -> None:
        """Refuse statistics that lack a level."""
        known = list(statistics.values["statistic"].values)
        if self.numbers is None and (missing := [name for name in LEVELS if name not in known]):
            wanted = ", ".join(f"{float(name[1:]) / 100:g}" for name in LEVELS if name != "max")
            raise ValueError(
                f"values='quantiles' needs levels of which statistics have no {', '.join(missing)}; call "
                f"neuron_statistics with quantiles=({wanted})"
            )

    def of(self, members: Sequence[Neuron], statistics: NeuronStatistics | None) -> Float[Tensor, "level member"]:
        if self.numbers is not None:
            return self.numbers[:, None].expand(-1, len(members))
        assert statistics is not None
        table = statistics.of(members)
        return torch.tensor(table[list(LEVELS)].to_numpy().T * [[factor] for factor in LEVELS.values()]).float()


@dataclass(frozen=True)
class Group:
    """One unit in one arm: its cases, one per level, start in the same layer."""

    unit: int
    arm: int
    layer: int
    cases: list[Clamps]


@dataclass(frozen=True)
class Reading:
    """What is read of logits.

    Attributes:
        metric: None reads only the labels.
        at: The position of label effects and KL, `[example]`.
        labels: A token per unit; None where none is given.
    """

    metric: Any
    at: Int[Tensor, "example"]
    labels: Int[Tensor, "unit"] | None

    @property
    def name(self) -> str:
        """Of what is measured."""
        if self.metric is None:
            return "label_log_prob"
        return str(getattr(self.metric, "name", getattr(self.metric, "__name__", "metric")))

    @property
    def unit(self) -> str:
        return "nats" if self.metric is None else str(getattr(self.metric, "unit", "metric"))

    @property
    def whole(self) -> bool:
        """Whether the metric must see all examples in order, and all positions."""
        return self.metric is not None and not hasattr(self.metric, "select")

    @property
    def metric_at(self) -> Tensor | None:
        """The position the metric reads in each example, None if it reads several (or none)."""
        single = not self.whole and hasattr(self.metric, "at")
        return getattr(self.metric, "positions", None) if single else None

    def kept(self, examples: Tensor) -> Int[Tensor, "example kept"] | None:
        """Positions to unembed; None where the metric reads more than one."""
        if self.metric is None:
            return self.at[examples, None]
        if self.metric_at is None:
            return None
        return torch.stack([self.at[examples], self.metric_at.cpu()[examples]], 1)

    def score(
        self, logits: Float[Tensor, "case example kept d_vocab"], examples: Tensor
    ) -> Float[Tensor, "case example"]:
        """The metric, `[case, example]`, on the CPU."""
        shape = tuple(logits.shape[:2])
        if self.whole:
            scores = [self.metric(case) for case in logits]
        else:
            rows = examples.repeat(shape[0])
            metric, flat = self.metric.select(rows), logits.flatten(0, 1)
            scores = [metric(flat) if self.metric_at is None else metric.at(flat[:, 1])]
        expected = (shape[1],) if self.whole else (shape[0] * shape[1],)
        for score in scores:
            if not isinstance(score, Tensor) or tuple(score.shape) != expected:
                got = f"shape {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
                raise ValueError(
                    f"the metric returned {got} for {expected[0]} examples; it must give one number for each"
                )
        return torch.cat(scores).detach().float().cpu().reshape(shape)

    def read(
        self, logits: Float[Tensor, "case example kept d_vocab"], examples: Tensor
    ) -> Float[Tensor, "case example d_vocab"]:
        """The logits at the read position, float32."""
        if self.kept(examples) is not None:
            return logits[:, :, 0].float()
        index = self.at[examples].to(logits.device)[None, :, None, None].expand(len(logits), -1, 1, logits.shape[-1])
        return logits.gather(2, index)[:, :, 0].float()


@dataclass(frozen=True)
class Measured:
    """`[unit, arm, level, example]`, and the metric without a clamp."""

    metric: Tensor
    label_log_prob: Tensor
    label_rank: Tensor
    kl: Tensor
    baseline: Float[Tensor, "example"]
    work: Work


def groups_of(
    units: Sequence[Sequence[Neuron]],
    draws: Sequence[dict[Neuron, Neuron]],
    doses: Doses,
    statistics: NeuronStatistics | None,
    mode: Mode,
) -> tuple[list[Group], Float[Tensor, "unit arm level"]]:
    """The clamped arm and the matched ones of every unit, and their mean doses."""
    groups, means = [], torch.empty(len(units), 1 + len(draws), len(doses.names))
    for u, members in enumerate(units):
        for a, who in enumerate([list(members), *([draw[neuron] for neuron in members] for draw in draws)]):
            numbers = doses.of(who, statistics)
            cases = [make_clamps(who, None if mode == "ablate" else row, mode) for row in numbers]
            groups.append(Group(u, a, min(cases[0].layers), cases))
            means[u, a] = numbers.mean(1)
    return groups, means


def measure(
    bridge: Any,
    tokens: Int[Tensor, "example pos"],
    where: Bool[Tensor, "example pos"],
    reading: Reading,
    groups: Sequence[Group],
    n_random: int,
    shape: Geometry,
    *,
    mode: Mode,
    site: Site,
    seed: int,
    memory_budget: int,
    progress: bool,
) -> Measured:
    """Every group at every level on every example, then random directions as long as what the clamped arm changes."""
    n, n_pos = tokens.shape
    n_levels = len(groups[0].cases)
    n_units, n_arms = 1 + max(group.unit for group in groups), 1 + max(group.arm for group in groups)
    found = torch.full((4, n_units, n_arms + n_random, n_levels, n), torch.nan)
    baseline = torch.full((n,), torch.nan)
    work = Work()
    kept = reading.kept(torch.arange(n))
    computed = n_pos if kept is None else n_pos - min(int(where.any(0).int().argmax()), int(kept.min()))
    unembedded = n_pos if kept is None else kept.shape[1]
    item = next(iter(bridge.original_model.parameters())).element_size()
    rows = rows_at_once(shape, n_pos, computed, unembedded, item, memory_budget, tokens.device)
    chunk = n if reading.whole else max(1, min(n, rows // n_levels))
    layers = sorted({group.layer for group in groups})
    at_once = max(1, rows // (n_levels * chunk))
    batches = [
        part
        for layer in layers
        for clamped in (True, False)
        if (chosen := [g for g in groups if g.layer == layer and (g.arm == 0) == clamped])
        for part in _parts(chosen, at_once)
    ]
    directions = _directions(n_units, n_random, shape.d_model, seed)
    writes = _writes(bridge, groups, n_units) if n_random else directions.new_zeros(n_units, shape.d_model)
    silent = not progress or os.environ.get("INTERP_PROGRESS") == "0"
    chunks = torch.arange(n).split(chunk)
    with tqdm(total=len(chunks) * len(batches), disable=silent, desc="clamping") as bar:
        for examples in chunks:
            runs = ClampRuns(
                bridge, tokens[examples.to(tokens.device)], where[examples], reading.kept(examples), layers, shape,
                mode=mode, site=site, work=work,
            )  # fmt: skip
            judge = _Judge(reading, runs.logits, examples)
            if reading.metric is not None:
                baseline[examples] = judge.baseline
            for part in batches:
                clamped = part[0].arm == 0
                cases = [case for group in part for case in group.cases]
                logits, moved = runs.clamp(part[0].layer, cases, changes=clamped and n_random > 0)
                _store(found, judge, logits, part, [group.arm for group in part], examples)
                for draw in range(n_random if clamped else 0):
                    assert moved is not None
                    pushed = torch.cat(
                        [
                            _along(directions[group.unit, draw], writes[group.unit], change)
                            for group, change in zip(part, moved.split(n_levels), strict=True)
                        ]
                    )
                    _store(found, judge, runs.push(part[0].layer, pushed), part, [n_arms + draw] * len(part), examples)
                bar.update()
    return Measured(*found, baseline=baseline, work=work)


def _parts(groups: list[Group], size: int) -> list[list[Group]]:
    return [groups[i : i + size] for i in range(0, len(groups), size)]


def _directions(n_units: int, n_random: int, d_model: int, seed: int) -> Float[Tensor, "unit draw d_model"]:
    """Unit vectors, evenly distributed; those of the first draws do not depend on how many there are."""
    drawn = torch.randn(n_random, n_units, d_model, generator=torch.Generator().manual_seed(seed)).transpose(0, 1)
    return drawn / drawn.norm(dim=-1, keepdim=True)


def _writes(bridge: Any, groups: Sequence[Group], n_units: int) -> Float[Tensor, "unit d_model"]:
    """The direction in which each unit writes: the sum of its neurons' vectors, all in one layer."""
    vectors = {layer: side_vectors(bridge, layer, "out") for layer in {group.layer for group in groups}}
    sums: dict[int, Tensor] = {}
    for group in groups:
        if group.arm == 0:
            columns, _ = group.cases[0].layers[group.layer]
            sums[group.unit] = vectors[group.layer][columns.to(vectors[group.layer].device)].sum(0)
    return torch.stack([sums[u] for u in range(n_units)])


def _along(
    direction: Float[Tensor, "d_model"],
    writes: Float[Tensor, "d_model"],
    change: Float[Tensor, "level example pos d_model"],
) -> Tensor:
    """Changes of the same length, along one direction: backwards where a change points against what the unit writes."""
    sign = torch.where(change @ writes.to(change.dtype) < 0, -1.0, 1.0).to(change.dtype)
    return sign[..., None] * change.norm(dim=-1, keepdim=True) * direction.to(change)


class _Judge:
    """Compares the logits of clamped runs with those of the unclamped one."""

    def __init__(self, reading: Reading, logits: Float[Tensor, "example kept d_vocab"], examples: Tensor) -> None:
        self.reading, self.examples, self.dtype = reading, examples, logits.dtype
        self.logits = reading.read(logits[None], examples)  # [1, example, d_vocab]
        self.log_probs = self.logits.log_softmax(-1)
        self.baseline = torch.zeros(len(examples))
        if reading.metric is not None:
            self.baseline = reading.score(logits[None], examples)[0]
            if not bool(self.baseline.isfinite().all()):
                bad = examples[~self.baseline.isfinite()].tolist()
                raise ValueError(f"the metric is not finite without any clamp, on examples {bad[:8]}")

    def __call__(
        self, logits: Float[Tensor, "case example kept d_vocab"], units: list[int]
    ) -> Float[Tensor, "4 case example"]:
        out = torch.full((4, *logits.shape[:2]), torch.nan)
        if self.reading.metric is not None:
            out[0] = self.reading.score(logits, self.examples) - self.baseline
        new = self.reading.read(logits, self.examples)
        log_probs = new.log_softmax(-1)
        out[3] = (self.log_probs.exp() * (self.log_probs - log_probs)).sum(-1).cpu()
        if self.reading.labels is not None:
            label = self.reading.labels[units].to(new.device)[:, None, None].expand(-1, new.shape[1], 1)
            change = log_probs - self.log_probs
            out[1] = change.gather(-1, label)[..., 0].cpu()
            effect = new - self.logits
            rank = rank_in(effect, label[..., 0])
            out[2] = torch.where(is_rounding(effect, self.logits, self.dtype), torch.nan, rank).cpu()
        return out


def rank_in(effect: Float[Tensor, "*rows d_vocab"], label: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """How many other tokens are raised at least as much as the label."""
    return ((effect >= effect.gather(-1, label[..., None])).sum(-1) - 1).float()


def is_rounding(
    effect: Float[Tensor, "*rows d_vocab"], logits: Float[Tensor, "*some d_vocab"], dtype: torch.dtype
) -> Bool[Tensor, "*rows"]:
    """Whether a change of logits, but for a constant, is no longer than rounding of the model's numbers makes."""
    least = 4 * torch.finfo(dtype).eps * _spread(logits).norm(dim=-1)
    return _spread(effect).norm(dim=-1) <= least


def _spread(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def _store(
    found: Tensor, judge: _Judge, logits: Tensor, part: Sequence[Group], arms: Sequence[int], examples: Tensor
) -> None:
    n_levels = len(part[0].cases)
    read = judge(logits, [group.unit for group in part for _ in group.cases])
    for group, arm, values in zip(part, arms, read.split(n_levels, dim=1), strict=True):
        found[:, group.unit, arm][:, :, examples] = values
