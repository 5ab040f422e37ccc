"""Editing every fact in every layer, and measuring whether the edit took, carried over and left other facts alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp import hooks
from interp.hooks.names import device_of
from interp.models import provenance
from interp.patching._cells import choice, indices
from interp.patching._measure import checked
from interp.patching._rank_one import Goal, acting, no_metric, noised
from interp.patching.editing import RankOneEdits, fit_edits, subject_noise
from interp.results import Result, labelled
from interp.stats import bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd

Measure = Literal["rewrite", "paraphrase", "neighbourhood", "nats"]
MEASURES: tuple[Measure, ...] = ("rewrite", "paraphrase", "neighbourhood", "nats")


@dataclass(frozen=True, eq=False, repr=False)
class EditEffects(Result):
    """What an edit of one MLP did to each fact: `values (measure, layer, example)`.

    `rewrite`: of what there was to gain, the share gained on the prompt that was edited: (after - before) / (1 -
    before) of the target's probability; for `goal="erase"` the share lost of the answer's. `paraphrase`: the same, mean
    over other wordings. `neighbourhood`: 1 - |change of the probability of their own answer|, mean over other subjects.
    `nats`: change of log p(target) on the prompt itself (for `"erase"` with the other sign), which does not saturate.
    More is better in all. NaN: not measured.

    Attributes:
        before: The target's probability on the prompt before the edit, by example.
        norms: Length of what the edit writes over the length of what the MLP wrote there, `(layer, example)`.
        goal: What the edits were for; see `fit_edits`.
    """

    before: xr.DataArray
    norms: xr.DataArray
    goal: str

    def success(self, measure: Measure = "rewrite") -> xr.DataArray:
        """One measure, `(layer, example)`."""
        choice("measure", measure, MEASURES)
        chosen = self.values.sel(measure=measure, drop=True)
        return chosen.assign_attrs(unit="nats") if measure == "nats" else chosen

    def interval(self, level: float = 0.95, *, n_resamples: int = 2000, seed: int = 0) -> xr.Dataset:
        """Mean over the examples where it was measured, with its bootstrap interval: `estimate`, `low`, `high`, each
        `(measure, layer)`."""
        template = self.values.isel(example=0, drop=True)
        out = {name: template.copy(data=np.full(template.shape, np.nan, np.float32)) for name in _BOUNDS}
        for m, measure in enumerate(self.values.values):
            there = ~np.isnan(measure).any(0)
            if there.any():
                found = bootstrap_interval(measure[:, there], confidence=level, n_resamples=n_resamples, seed=seed)
                for name in _BOUNDS:
                    out[name].values[m] = getattr(found, name)
        return xr.Dataset(out, attrs={"level": level})

    def summary(self) -> pd.DataFrame:
        """One row per layer: the mean of every measure over examples."""
        frame = self.interval()["estimate"].to_pandas().T
        return frame.rename_axis(columns=None).reset_index()

    def plot(self) -> Any:
        """A line per measure (without `nats`, which has another unit) over layers, with its interval."""
        from interp.plotting import lines

        found = self.interval().sel(measure=[name for name in MEASURES if name != "nats"])
        found = found.where(found["estimate"].notnull(), drop=True)
        return lines(
            found, x="layer", y="estimate", group="measure", interval=("low", "high"), reference=0,
            title=f"Editing the MLP of one layer ({self.goal})", unit="score (1 is best)",
        )  # fmt: skip


_BOUNDS = ("estimate", "low", "high")


class _Asked(NamedTuple):
    """Questions put to edited models: edit `edits[i]` is asked row `rows[i]` of some prompts, about `targets[i]`."""

    prompts: Any
    rows: Int[Tensor, "question"]
    edits: Int[Tensor, "question"]
    targets: Int[Tensor, "question"]
    before: Float[Tensor, "question"]  # log-probabilities


@torch.no_grad()
def edit_sweep(
    bridge: Any,
    prompts: Any,
    *,
    goal: Goal = "inject",
    layers: Sequence[int] | None = None,
    paraphrases: Sequence[Any] = (),
    neighbours: int = 4,
    by: str = "subject",
    position: str = "subject",
    background: Int[Tensor, "row pos"] | None = None,
    ridge: float | int = 0.01,
    steps: int = 25,
    learning_rate: float | int = 0.3,
    max_norm: float | int = 4.0,
    noise: float | int = 3.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> EditEffects:
    """Edit each example's fact in the MLP of each layer, alone, and measure what the edited model says.

    All edits of a layer are fitted and measured together, one row each, by adding to the MLP's output what the changed
    weights would; the weights stay as they are (`edited_weights` puts an edit into them, with the same outcome). Costs,
    per layer, `steps` forward and backward passes of the prompts from this layer on, and one forward of the prompts,
    of the paraphrases and of the neighbours each.

    Args:
        prompts: One fact per example. An example that comes twice is edited twice, which makes intervals too narrow.
        goal: See `fit_edits`, also for the arguments that are not named here.
        layers: The layers edited, one at a time; all by default.
        paraphrases: Further prompts, of any length. Those whose label `by` and whose answer are an example's are its
            paraphrases, unless they are the very same tokens.
        neighbours: Other examples, of another subject and answer, whose own answers are watched; drawn with `seed`.
        by: The label that names what a fact is about.

    Raises:
        ValueError: As `fit_edits`; if labels are missing, no example has a paraphrase, or there are no neighbours.
        RuntimeError: If the model is in training mode.

    Source:
        Measures after Meng et al. 2022 (arXiv:2202.05262) and Hase et al. 2023 (arXiv:2301.04213), appendix; theirs of
        the neighbourhood is relative to the probability before, ours is the change itself.
    """
    checked(bridge, prompts, no_metric, "resid_pre")
    named = indices("layers", layers, int(bridge.cfg.n_layers))
    if neighbours < 0:
        raise ValueError(f"neighbours={neighbours}; expected 0 or more")
    for one in (prompts, *paraphrases):
        one.check(bridge)
        choice("position", position, one.positions)
        if (neighbours or paraphrases) and by not in one.labels:
            raise ValueError(f"prompts are labelled {sorted(one.labels)}, not with {by!r}; name what facts are about")
    options: dict[str, Any] = {
        "goal": goal, "position": position, "ridge": ridge, "steps": steps, "learning_rate": learning_rate,
        "max_norm": max_norm, "noise": noise, "seed": seed, "batch_size": batch_size,
    }  # fmt: skip
    matched = [_paraphrases(prompts, one, by) for one in paraphrases]
    if paraphrases and not any(len(rows) for rows, _ in matched):
        raise ValueError(f"no paraphrase has the {by} and the answer of any example; paraphrases ask the same facts")
    near = _neighbours(prompts, by, neighbours, seed) if neighbours else None

    n = len(prompts)
    values = np.full((len(MEASURES), len(named), n), np.nan, np.float32)
    norms, before = np.zeros((len(named), n), np.float32), torch.zeros(0)
    asked: dict[str, list[_Asked]] = {}
    silent = not progress or os.environ.get("INTERP_PROGRESS") == "0"
    for i, layer in enumerate(tqdm(named, disable=silent, desc=f"edits ({goal})")):
        edits = fit_edits(bridge, prompts, layer, background=background, **options)
        if not asked:
            asked = _questions(bridge, prompts, paraphrases, matched, near, edits, position, batch_size)
            before = asked["rewrite"][0].before
        for name, questions in asked.items():
            found: list[list[float]] = [[] for _ in range(n)]
            for one in questions:
                after = _answers(bridge, one, edits, position, batch_size, loud=name != "neighbourhood")
                score = _kept(one.before, after) if name == "neighbourhood" else _score(one.before, after, goal)
                for edit, value in zip(one.edits.tolist(), score.tolist(), strict=True):
                    found[edit].append(value)
                if name == "rewrite":
                    values[MEASURES.index("nats"), i] = (after - one.before) * (-1 if goal == "erase" else 1)
            values[MEASURES.index(name), i] = [np.mean(each) if each else np.nan for each in found]  # pyright: ignore
        norms[i] = edits.norms
    names = [str(name) for name in prompts.labels.get(by, range(n))]
    coords: dict[str, Any] = {
        "layer": named,
        "example": list(range(n)),
        "subject": ("example", names),
    }
    record = provenance(
        bridge, method="edit_sweep", layers=named, by=by, neighbours=neighbours, n_paraphrases=len(paraphrases),
        background="prompts" if background is None else list(background.shape), **options,
        prompts={"name": prompts.name, "seed": prompts.seed, "n": n, "tokens": int(prompts.clean.shape[1])},
        cost={"passes_per_layer": steps, "edits": n * len(named)},
    )  # fmt: skip
    return EditEffects(
        labelled(values, ("measure", "layer", "example"), {"measure": list(MEASURES), **coords}, unit="score"),
        record,
        before=labelled(before.exp(), ("example",), {"example": list(range(n))}, unit="probability"),
        norms=labelled(norms, ("layer", "example"), coords, unit="of the MLP's output"),
        goal=goal,
    )


def _questions(
    bridge: Any, prompts: Any, paraphrases: Sequence[Any], matched: list[Any], near: Any, edits: RankOneEdits,
    position: str, batch_size: int,
) -> dict[str, list[_Asked]]:  # fmt: skip
    """Everything that is asked of the edited models of a layer, and what the model said before."""
    every = torch.arange(len(prompts))
    wanted = {"rewrite": [(prompts, every, every)]}
    wanted["paraphrase"] = [(one, *pair) for one, pair in zip(paraphrases, matched, strict=True) if len(pair[0])]
    wanted["neighbourhood"] = [] if near is None else [(prompts, *near)]
    asked: dict[str, list[_Asked]] = {}
    for name, entries in wanted.items():
        asked[name] = []
        for one, rows, of in entries:
            targets = one.answers[rows] if name == "neighbourhood" else edits.targets[of]
            question = _Asked(one, rows, of, targets, torch.zeros(len(rows)))
            said = _answers(bridge, question, edits, position, batch_size, loud=name != "neighbourhood", intact=True)
            asked[name].append(question._replace(before=said))
    return {name: entries for name, entries in asked.items() if entries}


def _answers(
    bridge: Any, asked: _Asked, edits: RankOneEdits, position: str, batch_size: int, *, loud: bool, intact: bool = False
) -> Float[Tensor, "question"]:
    """Log-probabilities of the targets in models with the edits (`intact`: without them).

    The noise of the goal `"force"` is added where `loud`.
    """
    device, parts = device_of(bridge), []
    for some in torch.arange(len(asked.rows)).split(batch_size):
        rows, of = asked.rows[some], asked.edits[some]
        tokens, ends = asked.prompts.clean[rows], asked.prompts.positions["end"][rows].to(device)
        where = asked.prompts.positions[position].cpu()[rows]
        noise = subject_noise(bridge, of, where, tokens.shape[1], edits.noise_std if loud else 0.0, edits.seed)
        read, write = edits.read[of], edits.write[of] * (0 if intact else 1)
        kept, at = ends.unique(return_inverse=True)
        with noised(bridge, noise), acting(bridge, edits.layer, read, write), hooks.no_retained_graph(bridge):
            logits = bridge(tokens.to(device), use_cache=False, logits_to_keep=kept)
        logits = logits[torch.arange(len(some), device=device), at].double().log_softmax(-1)
        parts.append(logits.gather(-1, asked.targets[some].to(device)[:, None]).squeeze(-1).cpu())
    return torch.cat(parts)


def _score(before: Tensor, after: Tensor, goal: Goal) -> Tensor:
    p, q = before.exp(), after.exp()
    return (p - q) / p if goal == "erase" else (q - p) / (1 - p).clamp(min=1e-12)


def _kept(before: Tensor, after: Tensor) -> Tensor:
    return 1 - (after.exp() - before.exp()).abs()


def _paraphrases(prompts: Any, other: Any, by: str) -> tuple[Tensor, Tensor]:
    """Rows of the other prompts, and the example that each asks again."""
    pairs = [
        (row, i)
        for i, subject in enumerate(prompts.labels[by])
        for row, its in enumerate(other.labels[by])
        if its == subject and int(other.answers[row]) == int(prompts.answers[i])
        and not torch.equal(other.clean[row], prompts.clean[i])
    ]  # fmt: skip
    found = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _neighbours(prompts: Any, by: str, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of other subjects with another answer than the example's answer and foil, and the example they are of."""
    rng, pairs = np.random.default_rng(seed), []
    subjects, answers, foils = prompts.labels[by], prompts.answers.tolist(), prompts.foils.tolist()
    for i, subject in enumerate(subjects):
        free = [j for j, its in enumerate(subjects) if its != subject and answers[j] not in (answers[i], foils[i])]
        if not free:
            raise ValueError(f"example {i} has no neighbour: every other one has its {by} or answer; use neighbours=0")
        pairs += [(int(j), i) for j in rng.choice(free, min(k, len(free)), replace=False)]
    found = torch.tensor(pairs)
    return found[:, 0], found[:, 1]
