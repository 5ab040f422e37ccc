"""Steering by a concept that was derived for each text: what it does to the answers, beside its controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.concept_edits import ConceptEdit, require_concepts
from interp.hooks import editable, interventions
from interp.hooks.names import device_of
from interp.models import provenance, require_eval
from interp.prompts import Prompts
from interp.results import Result, labelled
from interp.stats import Interval, ratio_interval

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class ConceptSteering(Result):
    """Answers under steering by one concept per text.

    `values` has the dimensions (source, edit, strength, example): the log-probability of the right answer, in nats.
    `source` says where the concepts come from, `edit` what was done. Examples without a concept are as unsteered.

    Attributes:
        right: As `values`: 1 where the answer is the most probable token, else 0.
        kl: As `values`: KL(unsteered || steered) at the answer's position, in nats.
        baseline, baseline_right: (example,), unsteered.
        steered: (source, example), bool: whether there was a concept.
    """

    right: xr.DataArray
    kl: xr.DataArray
    baseline: xr.DataArray
    baseline_right: xr.DataArray
    steered: xr.DataArray

    def best(
        self, by: Literal["log_prob", "right"] = "log_prob", *, folds: int | None = None, seed: int = 0
    ) -> xr.DataArray:
        """(source, edit): the strength with the highest mean; ties go to the smaller.

        Choose on other prompts than are reported on: on other results, or with `folds`, which gives every example the
        strength that is best on the groups of the other folds, (source, edit, example).
        """
        scores = self.values if by == "log_prob" else self.right
        if folds is None:
            return self._highest(scores)
        names, place = np.unique(self.values["group"].values, return_inverse=True)
        if not 2 <= folds <= len(names):
            raise ValueError(f"folds={folds}; expected 2 to {len(names)}, the number of groups of examples")
        fold = (np.random.default_rng(seed).permutation(len(names)) % folds)[place]
        chosen = [self._highest(scores.isel(example=fold != number)) for number in range(folds)]
        found = np.stack([chosen[number].values for number in fold], -1)
        coords = {name: self.values[name].values for name in ("source", "edit", "example")}
        return labelled(found, ("source", "edit", "example"), coords)

    @staticmethod
    def _highest(scores: xr.DataArray) -> xr.DataArray:
        means = scores.mean("example")
        found = means["strength"].values[means.argmax("strength").values]
        return labelled(found, ("source", "edit"), {name: means[name].values for name in ("source", "edit")})

    def select(self, examples: Sequence[int] | np.ndarray) -> ConceptSteering:
        """Only these examples (indices, or a bool mask), such as those that the model gets wrong."""
        index = np.arange(self.values.sizes["example"])[np.asarray(examples)]
        arrays = (self.right, self.kl, self.baseline, self.baseline_right, self.steered)
        return ConceptSteering(
            self.values.isel(example=index), self.provenance, *(array.isel(example=index) for array in arrays)
        )

    def summary(
        self,
        strengths: xr.DataArray | None = None,
        *,
        against: tuple[str, str] | None = None,
        level: float = 0.95,
        n_resamples: int = 2000,
        seed: int = 0,
    ) -> pd.DataFrame:
        """One row per source, edit and strength: the change of the answer's log-probability and the share of right
        answers, each with its interval over groups of examples, the divergence, and the share steered.

        Args:
            strengths: From `best`: one by source and edit, or one for each example; all that were run by default.
            against: A (source, edit) to compare with, paired: adds `minus`, `minus_low` and `minus_high` (nats); at its
                own strength where `strengths` are given, else at the same one.
        """
        import pandas as pd

        rows = []
        for source, edit, strength in self._cells(strengths):
            log_prob, right, kl = (self._at(a, source, edit, strength) for a in (self.values, self.right, self.kl))
            gain = self._interval(log_prob - self.baseline.values, level, n_resamples, seed)
            share = self._interval(right, level, n_resamples, seed)
            row = {"source": source, "edit": edit, "strength": float(np.mean(strength)), "gain": float(gain.estimate)}
            row |= {"gain_low": float(gain.low), "gain_high": float(gain.high), "right": float(share.estimate)}
            row |= {"right_low": float(share.low), "right_high": float(share.high), "kl": float(kl.mean())}
            row["steered"] = float(self.steered.sel(source=source).mean())
            if against is not None:
                other = strength if strengths is None else self._chosen(strengths, *against)
                gap = self._interval(log_prob - self._at(self.values, *against, other), level, n_resamples, seed)
                row |= {"minus": float(gap.estimate), "minus_low": float(gap.low), "minus_high": float(gap.high)}
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, *, x: Literal["strength", "kl"] = "strength", level: float = 0.95) -> Any:
        """Figure: mean change of the answer's log-probability, by strength or by divergence, with intervals."""
        from interp.plotting import lines

        frame = self.summary(level=level).query("steered > 0")
        several = [name for name in ("source", "edit") if frame[name].nunique() > 1] or ["edit"]
        frame = frame.assign(steering=frame[several].agg(", ".join, axis=1)).sort_values(["steering", x])
        return lines(
            frame, x=x, y="gain", group="steering", interval=("gain_low", "gain_high"), reference=0.0,
            title="Steering by a concept for each text", unit="change of the answer's log-probability (nats)",
            x_title="strength" if x == "strength" else "KL from the unsteered model (nats)",
        )  # fmt: skip

    def _cells(self, strengths: xr.DataArray | None) -> list[tuple[str, str, np.ndarray]]:
        """Sources, edits and the strength of each: one for all examples, or one each."""
        known, kept = self.values["strength"].values, []
        for source in map(str, self.values["source"].values):
            for edit in map(str, self.values["edit"].values):
                wanted = known if strengths is None else [self._chosen(strengths, source, edit)]
                if not np.isin(np.asarray(wanted, known.dtype), known.astype(np.float32)).all():
                    raise KeyError(f"strength {wanted[0]} of {edit!r} was not run; there are {known.tolist()}")
                kept += [(source, edit, np.asarray(strength)) for strength in wanted]
        return kept

    def _chosen(self, strengths: xr.DataArray, source: str, edit: str) -> np.ndarray:
        here = strengths.sel(source=source, edit=edit)
        return (here.sel(example=self.values["example"].values) if "example" in here.dims else here).values

    def _at(self, array: xr.DataArray, source: str, edit: str, strength: np.ndarray) -> np.ndarray:
        """[example], at the strength given."""
        here = array.sel(source=source, edit=edit).transpose("strength", "example").values
        known = self.values["strength"].values.astype(np.float32)
        row = (known[:, None] == np.atleast_1d(strength).astype(np.float32)).argmax(0)
        return here[row, np.arange(here.shape[1])]

    def _interval(self, values: np.ndarray, level: float, n_resamples: int, seed: int) -> Interval:
        """Of the mean over examples, whole groups resampled."""
        group = np.unique(self.values["group"].values, return_inverse=True)[1]
        sums, counts = np.bincount(group, values.astype(np.float64)), np.bincount(group).astype(np.float64)
        return ratio_interval(sums, counts, confidence=level, n_resamples=n_resamples, seed=seed)


def steer_by_concept(
    bridge: Any,
    prompts: Prompts | Sequence[Prompts],
    concepts: Mapping[str, Sequence[str | None]],
    edits: Mapping[str, ConceptEdit],
    *,
    strengths: Sequence[float | int] = (0.5, 1.0, 2.0),
    position: str = "subject",
    groups: str | None = None,
) -> ConceptSteering:
    """Every text steered by a concept of its own, at one position, and what becomes of its answer.

    With x the activation at the hook and the position, what an edit adds is strength times its change (`VectorEdit`,
    `SetLatents`; `RandomEdit` for the control of equal length). Costs one forward per set of prompts, source and edit,
    over as many rows as there are strengths times prompts, and one unsteered.

    Args:
        prompts: One set, or several of different lengths, whose examples are then counted on.
        concepts: By source one concept per example, None to leave it as it is: such as `Reasoning.single` gives.
        edits: By name.
        position: A position of the prompts (`prompts.positions`).
        groups: A label of the prompts, such as `"subject"`: intervals resample whole groups of examples with one value.

    Raises:
        KeyError: If a concept has no vector, or prompts have no such position or label. ValueError: If numbers do not
            fit or edits of the hook have no effect. All before any forward.

    Source:
        ActivationReasoning (arXiv:2510.18184) steers by what its rules derive. Controls, and one strength for all texts
        that is chosen on other prompts, are ours.
    """
    require_eval(bridge)
    sets = [prompts] if isinstance(prompts, Prompts) else list(prompts)
    levels = [float(strength) for strength in strengths]
    total = sum(map(len, sets))
    _check(bridge, sets, concepts, edits, levels, position, groups, total)
    shape = (len(concepts), len(edits), len(levels), total)
    log_prob, right, kl = np.empty(shape), np.empty(shape), np.zeros(shape)
    baseline, baseline_right = np.empty(total), np.empty(total)
    start = 0
    for p in sets:
        here = slice(start, start + len(p))
        start += len(p)
        base = _log_probs(bridge, p, range(len(p)))
        baseline[here], baseline_right[here] = _answers(base, p.answers)
        log_prob[..., here], right[..., here] = baseline[here], baseline_right[here]
        for s, names in enumerate(concepts.values()):
            own = list(names[here])
            rows = [i for i, name in enumerate(own) if name is not None]
            if not rows:
                continue
            chosen, at = [str(own[i]) for i in rows], here.start + np.array(rows)
            for e, edit in enumerate(edits.values()):
                found = _steered(bridge, p, rows, chosen, edit, levels, position)
                for level, part in enumerate(found.split(len(rows))):
                    log_prob[s, e, level, at], right[s, e, level, at] = _answers(part, p.answers[rows])
                    divergence = (base[rows].exp() * (base[rows] - part)).sum(-1).clamp_min(0)
                    kl[s, e, level, at] = divergence.numpy()
    labels = [label for p in sets for label in (p.labels[groups] if groups else range(len(p)))]
    example = {"example": range(total), "group": ("example", labels if groups else list(range(total)))}
    coords = {"source": list(concepts), "edit": list(edits), "strength": levels, **example}
    dims = ("source", "edit", "strength", "example")
    steered = np.array([[name is not None for name in names] for names in concepts.values()])
    hooks = sorted({edit.hook for edit in edits.values()})
    record = provenance(bridge, method="steer_by_concept", hooks=hooks, position=position, groups=groups)
    return ConceptSteering(
        labelled(log_prob, dims, coords, unit="log-probability (nats)"),
        record,
        labelled(right, dims, coords),
        labelled(kl, dims, coords, unit="nats"),
        labelled(baseline, ("example",), example, unit="log-probability (nats)"),
        labelled(baseline_right, ("example",), example),
        xr.DataArray(steered, dims=("source", "example"), coords={"source": list(concepts), **example}),
    )


@torch.no_grad()
def _log_probs(bridge: Any, p: Prompts, rows: Sequence[int], repeats: int = 1) -> Float[Tensor, "row d_vocab"]:
    tokens, end = p.clean[list(rows)].repeat(repeats, 1), p.positions["end"][list(rows)].repeat(repeats)
    logits = bridge(tokens.to(device_of(bridge)))
    return logits[torch.arange(len(tokens)), end].float().log_softmax(-1).cpu()


def _steered(
    bridge: Any, p: Prompts, rows: list[int], concepts: list[str], edit: ConceptEdit, levels: list[float], position: str
) -> Float[Tensor, "row d_vocab"]:
    """Log-probabilities, all rows at the first strength, then all at the second, ..."""
    n = len(levels)
    place = torch.arange(n * len(rows)), p.positions[position][rows].repeat(n)
    strength = torch.tensor(levels).repeat_interleave(len(rows))[:, None]

    def apply(tensor: Tensor) -> Tensor:
        x = tensor[place].flatten(1).float()
        new = tensor.clone()
        change = strength.to(x) * edit.change(x, concepts * n)
        new[place] = (x + change).reshape(tensor[place].shape).to(tensor.dtype)
        return new

    with interventions(bridge, {edit.hook: apply}):
        return _log_probs(bridge, p, rows, n)


def _answers(log_probs: Tensor, answers: Tensor) -> tuple[np.ndarray, np.ndarray]:
    found = log_probs.gather(1, answers[:, None])[:, 0]
    return found.numpy(), (log_probs.argmax(-1) == answers).float().numpy()


def _check(
    bridge: Any,
    sets: Sequence[Prompts],
    concepts: Mapping[str, Sequence[str | None]],
    edits: Mapping[str, ConceptEdit],
    levels: Sequence[float],
    position: str,
    groups: str | None,
    total: int,
) -> None:
    if not concepts or not edits or not levels or not total:
        raise ValueError("nothing to steer: give prompts, concepts, edits and strengths")
    for p in sets:
        if position not in p.positions:
            raise KeyError(f"{p.name!r} has no position {position!r}; it has {', '.join(p.positions)}")
        if groups is not None and groups not in p.labels:
            raise KeyError(f"{p.name!r} has no label {groups!r}; it has {', '.join(p.labels)}")
    for source, names in concepts.items():
        if len(names) != total:
            raise ValueError(f"concepts[{source!r}] has {len(names)} entries for {total} examples; expected one each")
        for edit in edits.values():
            require_concepts([name for name in names if name is not None], list(edit.concepts))
    for name, edit in edits.items():
        if not editable(bridge, edit.hook):
            raise ValueError(f"edits[{name!r}] acts at {edit.hook!r}, where edits have no effect on this model")
