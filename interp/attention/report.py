"""A table of every head: all classic scores with intervals, and the roles they add up to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp import prompts as tasks
from interp.attention._patterns import check_tokens, reduce_patterns
from interp.attention._texts import ordinal_sequences, text_tokens
from interp.attention.classic import PatternName, detection_pattern, pattern_scores
from interp.attention.composition import composition_scores, prefix_matching_from_weights
from interp.attention.copying import (
    attended_token_copying,
    copy_scores,
    name_mover_scores,
    ov_copying,
    successor_scores,
)
from interp.attention.entropy import row_entropy
from interp.attention.head_scores import HeadScores, collect, select
from interp.attention.sinks import sink_importance
from interp.models import provenance, require_eval
from interp.prompts import Prompts
from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd

Rule = Mapping[str, float | int]

ROLES: dict[str, Rule] = {
    "previous token": {"previous_token": 0.5},
    "current token": {"current_token": 0.5},
    "duplicate token": {"duplicate_token": 0.3},
    "induction": {"induction": 0.3},
    "sink": {"sink": 0.3},
    "copying": {"copy": 0.5},
    "suppression": {"negative_copy": 0.5},
    "name mover": {"attention_to_answer": 0.3, "copy_of_answer": 0.5},
    "subject reader": {"attention_to_subject": 0.5},
    "successor": {"successor": 0.5},
}
"""A head has a role if each of these scores exceeds its threshold with the lower end of its interval. 0.3 of the
attention for a sink is the published constant; the others are conventions of ours: half of the attention (or of the
tokens) for kinds of which nothing else is known, less for those whose chance level is a few per cent."""


@dataclass(frozen=True, eq=False, repr=False)
class HeadReport(Result):
    """Every score of every head, and roles by threshold.

    `values` (score, layer, head, bound), with `bound` of estimate, low and high; a score that could not be measured on
    this model is NaN and `provenance["left_out"]` says why. Weight-only scores have no bounds.

    Attributes:
        roles: (role, layer, head), whether the head has the role.
        chance: (score), what attention spread evenly, or a random ranking, would give; NaN where there is no such
            number.
    """

    roles: xr.DataArray
    chance: xr.DataArray

    def table(self, *, bounds: bool = False) -> pd.DataFrame:
        """One row per head: `layer`, `head`, `name`, `roles` (joined by commas), then a column per score; with `bounds`
        also `SCORE_low` and `SCORE_high`."""
        import pandas as pd

        rows = []
        names = [str(name) for name in self.roles["role"].values]
        for layer, head in np.ndindex(self.roles.shape[1:]):
            held = [name for name, has in zip(names, self.roles.values[:, layer, head], strict=True) if has]
            row: dict[str, Any] = {"layer": layer, "head": head, "name": f"L{layer}H{head}", "roles": ", ".join(held)}
            for i, score in enumerate(self.values["score"].values):
                estimate, low, high = (float(value) for value in self.values.values[i, layer, head])
                row[str(score)] = estimate
                if bounds:
                    row |= {f"{score}_low": low, f"{score}_high": high}
            rows.append(row)
        return pd.DataFrame(rows)

    def heads(self, role: str) -> list[str]:
        """Names of the heads with a role, by layer."""
        names = [str(name) for name in self.roles["role"].values]
        if role not in names:
            raise KeyError(f"no role {role!r}; there is {', '.join(map(repr, names))}")
        return [f"L{layer}H{head}" for layer, head in np.argwhere(self.roles.sel(role=role).values)]

    def estimate(self, score: str) -> xr.DataArray:
        """One score of every head, (layer, head)."""
        return select(self.values.sel(bound="estimate", drop=True), score)

    def plot(self, scores: Sequence[str] | None = None) -> Any:
        """Figure: a layer by head map for each score (those that were measured, by default), on one scale."""
        from interp.plotting import heatmaps

        names = [str(name) for name in self.values["score"].values]
        chosen = list(scores) if scores is not None else [n for n in names if self.estimate(n).notnull().any()]
        panels = {name.replace("_", " "): self.estimate(name) for name in chosen}
        return heatmaps(panels, title="Scores of every head", unit="score", signed=True, limit=1, columns=4)


def head_report(
    bridge: Any,
    *,
    text: Int[Tensor, "rows pos"] | None = None,
    repeated: Int[Tensor, "lists length"] | None = None,
    prompts: Prompts | None = None,
    sequences: Sequence[Sequence[int]] | None = None,
    extra: Mapping[str, xr.DataArray] | None = None,
    roles: Mapping[str, Rule] | None = None,
    n: int = 16,
    length: int = 64,
    level: float = 0.95,
    seed: int = 0,
    batch_size: int | None = None,
) -> HeadReport:
    """All classic scores of all heads in one table, with bootstrap intervals over examples and roles by threshold.

    On text: `previous_token`, `current_token`, `sink` (importance of position 0), `entropy` (of a row, over the log of
    the number of keys it sees). On repeated random tokens: `duplicate_token`, `induction`. On random tokens said once:
    `attended_token_copying`, `copy`, `negative_copy`. From weights: `ov_copying`, `prefix_matching_weights`,
    `q_`, `k_`, `v_composition` (highest with any later head, above that of independent matrices). On indirect-object
    prompts: `attention_to_answer`, `attention_to_subject`, `copy_of_answer`. On ordinal words: `successor`. Costs about
    six forwards over `n` rows.

    Roles are labels for reading on, not findings: each is one threshold on one data set (`ROLES`), and says nothing of
    what the head does elsewhere, or of whether the model needs it.

    Args:
        text: Token ids of text; by default tinyworld for its models, else a few English sentences of our own.
        repeated: Random tokens repeated (`interp.prompts.repeated_tokens`), as many as the context holds by default.
        prompts: Indirect-object prompts; by default `interp.prompts.ioi`, where this tokenizer allows it.
        sequences: Ordinal token ids; by default numbers, days, months and letters that are single tokens.
        extra: Further scores by name, (layer, head) or (layer, head, example), e.g. `retrieval.values`; roles may use
            them.
        roles: Instead of `ROLES`: role to the thresholds that all must be exceeded.
        n: Rows of each data set that is made here.
        length: Positions of text.

    Raises:
        ValueError: If data do not fit the model, a role names a score that there is not, or patterns cannot be read.
    """
    require_eval(bridge)
    rules = dict(ROLES if roles is None else roles)
    text = text_tokens(bridge, n, length, seed) if text is None else text
    check_tokens(bridge, text, "text")
    left_out: dict[str, str] = {}
    if repeated is None:
        repeated = _repeated(bridge, n, seed)
    check_tokens(bridge, repeated, "repeated")
    text, repeated = text.cpu(), repeated.cpu()
    found = _attention(bridge, text, repeated, batch_size)
    once = repeated[:, : _period(repeated)]
    found += [attended_token_copying(bridge, once), copy_scores(bridge, once), *_weights(bridge, found[0])]
    if prompts is None:
        try:
            prompts = tasks.ioi(bridge, n=4 * n, seed=seed)
        except ValueError as error:
            left_out["indirect object"] = str(error)
    if prompts is not None:
        movers = name_mover_scores(bridge, prompts, batch_size=batch_size)
        wanted = movers.values.sel(score=["attention_to_answer", "attention_to_subject", "copy"])
        found.append(HeadScores(wanted.assign_coords(score=[*wanted["score"].values[:2], "copy_of_answer"]), {}))
    sequences = ordinal_sequences(bridge) if sequences is None else sequences
    if sequences:
        found.append(successor_scores(bridge, sequences))
    else:
        left_out["successor"] = "no ordinal words that are single tokens; pass sequences="
    found += [_extra(bridge, name, values) for name, values in (extra or {}).items()]
    values = _assembled(found, level, left_out)
    record = provenance(
        bridge, method="head_report", seed=seed, level=level, left_out=left_out,
        rules={role: dict(rule) for role, rule in rules.items()}, text=list(text.shape), repeated=list(repeated.shape),
        prompts=None if prompts is None else len(prompts),
    )  # fmt: skip
    chance = _chance(values, text, repeated, int(bridge.cfg.d_vocab), sequences)
    return HeadReport(values, record, roles=_roles(values, rules), chance=chance)


def _repeated(bridge: Any, n: int, seed: int) -> Tensor:
    """25 random tokens 4 times over, or what the context and the vocabulary hold."""
    room = min(int(bridge.cfg.n_ctx), 101) - 1
    length = min(25, room // 4)
    return tasks.repeated_tokens(bridge, n, seed, length=length, repeats=4)


def _period(repeated: Tensor) -> int:
    """Length of the longest start in which no row says a token twice."""
    n_pos = repeated.shape[1]
    equal = (repeated[:, :, None] == repeated[:, None, :]).tril(-1).any(-1).any(0)
    first = int(equal.nonzero()[0]) if bool(equal.any()) else n_pos
    if first < 3:
        raise ValueError(f"repeated says a token twice within its first {first + 1} positions; expected a list of at "
                         f"least 3 different tokens, repeated (interp.prompts.repeated_tokens)")  # fmt: skip
    return first


def _attention(bridge: Any, text: Tensor, repeated: Tensor, batch_size: int | None) -> list[HeadScores]:
    def reduce(_layer: int, pattern: Tensor) -> dict[str, Tensor]:
        keys = torch.arange(2, pattern.shape[-1] + 1, device=pattern.device)
        entropy = row_entropy(pattern)[..., 1:] / keys.log()  # the first query sees one key, and has no choice
        return {"sink": sink_importance(pattern)[..., 0], "entropy": entropy.mean(-1)}

    both = reduce_patterns(bridge, text, reduce, batch_size=batch_size)
    return [
        pattern_scores(bridge, text, ["previous_token", "current_token"], batch_size=batch_size),
        collect(bridge, both, "score", method="head_report", tokens=text),
        pattern_scores(bridge, repeated, ["duplicate_token", "induction"], batch_size=batch_size),
    ]


def _weights(bridge: Any, previous: HeadScores) -> list[HeadScores]:
    found = [ov_copying(bridge), prefix_matching_from_weights(bridge, previous)]
    for mode in ("Q", "K", "V"):
        strongest = composition_scores(bridge, mode, subtract_baseline=True).strongest()
        name = f"{mode.lower()}_composition"
        found.append(HeadScores(strongest.expand_dims(score=[name]).transpose("score", "layer", "head"), {}))
    return found


def _extra(bridge: Any, name: str, values: xr.DataArray) -> HeadScores:
    shape = (int(bridge.cfg.n_layers), int(bridge.cfg.n_heads))
    dims = [str(dim) for dim in values.dims]
    if sorted(dims) not in (["head", "layer"], ["example", "head", "layer"]):
        raise ValueError(
            f"extra[{name!r}] has dimensions {tuple(dims)}; expected (layer, head) or (layer, head, example)"
        )
    if (values.sizes["layer"], values.sizes["head"]) != shape:
        raise ValueError(f"extra[{name!r}] has {values.sizes['layer']} layers of {values.sizes['head']} heads; this "
                         f"model has {shape[0]} of {shape[1]}")  # fmt: skip
    plain = values.reset_coords(drop=True).expand_dims(score=[name]).transpose("score", "layer", "head", ...)
    return HeadScores(plain.astype(np.float32), {})


def _assembled(found: Sequence[HeadScores], level: float, left_out: Mapping[str, str]) -> xr.DataArray:
    parts = []
    for scores in found:
        bounds = scores.interval(level)
        part = xr.concat([bounds[name] for name in ("estimate", "low", "high")], "bound")
        parts.append(part.transpose("score", "layer", "head", "bound"))
    names = [str(name) for part in parts for name in part["score"].values]
    kept = [name for name in names if name != "copy_in_sequence"]
    if len(set(kept)) < len(kept):
        twice = sorted({name for name in kept if kept.count(name) > 1})
        raise ValueError(f"two scores are called {twice}; give the extra ones other names")
    values = np.concatenate([part.values for part in parts])[[names.index(name) for name in kept]]
    missing = {
        "indirect object": ["attention_to_answer", "attention_to_subject", "copy_of_answer"],
        "successor": ["successor"],
    }
    for name in [name for key in left_out for name in missing[key]]:
        kept.append(name)
        values = np.concatenate([values, np.full((1, *values.shape[1:]), np.nan)])
    coords = {"score": kept, "layer": range(values.shape[1]), "head": range(values.shape[2])}
    return labelled(values, ("score", "layer", "head", "bound"), {**coords, "bound": ["estimate", "low", "high"]})


def _roles(values: xr.DataArray, rules: Mapping[str, Rule]) -> xr.DataArray:
    known = [str(name) for name in values["score"].values]
    estimate, low = (values.sel(bound=bound, drop=True) for bound in ("estimate", "low"))
    sure = low.where(low.notnull(), estimate)  # a score without bounds counts as it is
    has = []
    for role, rule in rules.items():
        if unknown := [score for score in rule if score not in known]:
            raise ValueError(f"the role {role!r} names scores {unknown}; there are {', '.join(known)}")
        above = [(sure.sel(score=score, drop=True) > threshold).values for score, threshold in rule.items()]
        has.append(np.logical_and.reduce(above))
    coords = {"role": list(rules), "layer": values["layer"], "head": values["head"]}
    return xr.DataArray(np.stack(has), dims=("role", "layer", "head"), coords=coords)


def _chance(
    values: xr.DataArray, text: Tensor, repeated: Tensor, d_vocab: int, sequences: Sequence[Sequence[int]]
) -> xr.DataArray:
    names = [str(name) for name in values["score"].values]
    found = dict.fromkeys(names, math.nan)
    measured: dict[PatternName, Tensor] = {
        "previous_token": text, "current_token": text, "duplicate_token": repeated, "induction": repeated,
    }  # fmt: skip
    for name, tokens in measured.items():
        marked = detection_pattern(tokens, name).float()
        share = marked.sum(-1) / torch.arange(1, tokens.shape[1] + 1)
        found[name] = float(share[marked.any(-1)].mean())
    n_pos = text.shape[1]
    found["sink"] = float((1 / torch.arange(1, n_pos + 1)).mean())
    found["attended_token_copying"] = 2 / _period(repeated) - 1
    found |= {name: 5 / d_vocab for name in ("copy", "negative_copy", "copy_of_answer") if name in found}
    if sequences:
        found["successor"] = float(np.mean([1 / len(row) for row in sequences]))
    return labelled(np.array([found[name] for name in names]), ("score",), {"score": names})
