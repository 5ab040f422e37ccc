"""SHIFT measured: a probe before and after latents that a judge calls spurious are off, beside its controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool
from torch import Tensor

from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.probing import apply_encoder
from interp.dictionaries.rows import TokenRows, mask_matrix
from interp.dictionaries.spurious_cues import (
    CuedTexts,
    ProbeAttribution,
    Removed,
    attribute_probe,
    fit_text_probe,
    pooled_activations,
)
from interp.models import provenance
from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd

Judge = Callable[[Dictionary], Bool[Tensor, " latent"]]
"""Which latents of a dictionary stand for what a classifier should not use."""

SCORES = ("accuracy", "worst group", "spurious accuracy")


@dataclass(frozen=True, eq=False, repr=False)
class Shift(Result):
    """Classification of balanced texts by probes that were trained where two labels go together.

    `values` has the dimensions (arm, text): log-odds of the intended label. Arms: `"original"` (nothing off),
    `"judged"` (the latents that are attributed most and that the judge calls spurious), `"judged, retrained"` (the
    probe fitted again with them off, on the same ambiguous texts), `"all judged"` (every latent that the judge calls
    spurious, attributed or not), `"attributed"` (as many, the most attributed, without a judge), `"random i"` (as
    many, drawn from the latents that are on), `"balanced"` (the probe of other balanced texts: the ceiling).

    Attributes:
        intended, spurious: (text,), bool.
        removed: (arm, node), bool: which latents were off; nodes as in `attribution`.
        attribution: The mean contribution of each latent to the margin, (node,).
    """

    intended: xr.DataArray
    spurious: xr.DataArray
    removed: xr.DataArray
    attribution: xr.DataArray

    def __repr__(self) -> str:
        frame = self.summary(n_resamples=10).set_index("arm")
        shown = [name for name in ("original", "judged", "judged, retrained", "balanced") if name in frame.index]
        parts = [f"{name} {frame.loc[name, 'accuracy']:.3f}" for name in shown]
        return f"Shift(accuracy on balanced texts: {', '.join(parts)})"

    def summary(self, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> pd.DataFrame:
        """One row per arm, random draws pooled: accuracy, that of the worst of the four groups, and accuracy for the
        spurious label (one half if it is not used), each with its interval over texts; and how many latents were off.
        """
        import pandas as pd

        rng = np.random.default_rng(seed)
        arms = [str(arm) for arm in self.values["arm"].values]
        names = list(dict.fromkeys("random" if arm.startswith("random ") else arm for arm in arms))
        rows = []
        for name in names:
            members = [arm for arm in arms if arm == name or (name == "random" and arm.startswith("random "))]
            said = self.values.sel(arm=members).values > 0
            row: dict[str, Any] = {"arm": name, "off": int(self.removed.sel(arm=members[0]).sum())}
            draws = self._resampled(said, n_resamples, rng)
            for score, point in self._scores(said).items():
                low, high = np.quantile(draws[score], [(1 - level) / 2, (1 + level) / 2])
                row |= {score: point, f"{score}, low": low, f"{score}, high": high}
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, *, level: float = 0.95) -> Any:
        """Figure: accuracy, worst group and spurious accuracy by arm, with intervals over texts."""
        import pandas as pd

        from interp.plotting import bars

        frame, parts = self.summary(level=level), []
        for score in SCORES:
            columns = {score: "value", f"{score}, low": "low", f"{score}, high": "high"}
            parts.append(frame.loc[:, ["arm", *columns]].rename(columns=columns).assign(score=score))
        return bars(
            pd.concat(parts), x="arm", group="score", interval=("low", "high"), reference=0.5,
            title="A classifier before and after spurious latents are off", unit="share of balanced texts", x_title="",
        )  # fmt: skip

    def _groups(self) -> list[np.ndarray]:
        a, b = self.intended.values, self.spurious.values
        return [(a == i) & (b == j) for i in (False, True) for j in (False, True)]

    def _scores(self, said: np.ndarray) -> dict[str, float]:
        right, cue = said == self.intended.values, said == self.spurious.values
        groups = [right[:, group].mean(1) for group in self._groups()]
        return dict(zip(SCORES, (right.mean(), np.min(groups, 0).mean(), cue.mean()), strict=True))

    def _resampled(self, said: np.ndarray, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Scores with texts resampled within each group, the same texts for every draw of a control."""
        right, cue = said == self.intended.values, said == self.spurious.values
        total, on_cue, worst = np.zeros(n), np.zeros(n), []
        for group in self._groups():
            size = int(group.sum())
            weight = rng.multinomial(size, np.full(size, 1 / size), size=n) / size  # [resample, text]
            shares = right[:, group] @ weight.T  # [draw, resample]
            worst.append(shares)
            total = total + shares.mean(0) * size / said.shape[1]
            on_cue = on_cue + (cue[:, group] @ weight.T).mean(0) * size / said.shape[1]
        found: tuple[np.ndarray, ...] = (total, np.min(worst, 0).mean(0), on_cue)
        return dict(zip(SCORES, found, strict=True))


def shift(
    bridge: Any,
    ambiguous: CuedTexts,
    balanced: CuedTexts,
    dictionaries: Sequence[Dictionary],
    judge: Judge,
    *,
    hook: str,
    n_top: int = 50,
    n_random: int = 5,
    oracle: CuedTexts | None = None,
    attribution: ProbeAttribution | None = None,
    l2: float | int = 1e-2,
    seed: int = 0,
) -> Shift:
    """SHIFT: take what a probe should not use out of the model that it reads, and measure what it then goes by.

    A probe of mean activations at `hook` is fitted on texts where the labels coincide; its margin is attributed to
    latents; of the `n_top` with the largest contribution in magnitude those that the judge calls spurious are set to 0
    (errors kept) while the balanced texts are classified. Neither the judge nor the choice sees the balanced labels.
    Costs the attribution and about ten passes over both sets of texts.

    Args:
        ambiguous: Texts to train on, intended and spurious label alike.
        balanced: Texts to score on, with all four combinations.
        dictionaries: At `hook` or before it, in the order of the forward.
        judge: See `label_judge` for one that goes by labelled tokens; a reader's verdicts do as well.
        oracle: Other balanced texts, to train the ceiling on; without them there is no arm `"balanced"`.
        attribution: From `attribute_probe` on the same dictionaries; by default by gradient on all ambiguous texts.
        seed: Of the probes' held-out rows and of the random latents.

    Raises:
        ValueError: If the labels of the ambiguous texts do not coincide, a group of the balanced ones is empty, or a
            verdict does not fit its dictionary; as `attribute_probe`.

    Source:
        Marks et al. 2024 (arXiv:2403.19647), section 4: Bias in Bios, profession against gender, a human judge, 55
        latents. Here the judge is any callable; the controls (as many random latents, as many without a judge, all that
        are judged) stand beside it.
    """
    if not torch.equal(ambiguous.intended, ambiguous.spurious):
        apart = int((ambiguous.intended != ambiguous.spurious).sum())
        raise ValueError(f"the labels of {apart} of {len(ambiguous)} ambiguous texts differ; SHIFT is for labels that "
                         f"always go together: train a probe on texts where they do not")  # fmt: skip
    groups = [int(((balanced.intended == i) & (balanced.spurious == j)).sum()) for i in (0, 1) for j in (0, 1)]
    if not all(groups):
        raise ValueError(f"balanced texts by (intended, spurious): {groups}; expected some of each of the four")
    verdicts = [judge(dictionary).cpu() for dictionary in dictionaries]
    for number, (verdict, dictionary) in enumerate(zip(verdicts, dictionaries, strict=True)):
        if verdict.dtype != torch.bool or tuple(verdict.shape) != (dictionary.n_latents,):
            raise ValueError(
                f"the judge gave {verdict.dtype} {tuple(verdict.shape)} for dictionary {number}; expected one bool for "
                f"each of {dictionary.n_latents} latents"
            )
    probe = fit_text_probe(bridge, ambiguous, hook, l2=l2, seed=seed)
    found = attribution or attribute_probe(bridge, probe, ambiguous, dictionaries)
    mean = torch.tensor(found.values.mean("example").values)
    judged, on = torch.cat(verdicts), torch.tensor(found.active.values) > 0
    top = torch.zeros_like(judged)
    order = mean.abs().argsort(descending=True, stable=True)
    top[order[:n_top]] = True
    off = {"original": torch.zeros_like(judged), "judged": top & judged & on}
    n_off = int(off["judged"].sum())
    off["judged, retrained"], off["all judged"] = off["judged"], judged & on
    off["attributed"] = torch.zeros_like(judged)
    off["attributed"][order[:n_off]] = True
    draws, pool = torch.Generator().manual_seed(seed), on.nonzero()[:, 0]
    for draw in range(n_random):
        off[f"random {draw}"] = torch.zeros_like(judged)
        off[f"random {draw}"][pool[torch.randperm(len(pool), generator=draws)[:n_off]]] = True
    scores, known = {}, {}
    for name, mask in off.items():
        removed, own = _by_dictionary(mask, dictionaries), probe
        if name == "judged, retrained":
            own = fit_text_probe(bridge, ambiguous, hook, removed=removed, l2=l2, seed=seed)
        key = tuple(mask.nonzero()[:, 0].tolist())
        if key not in known:
            known[key] = pooled_activations(bridge, balanced, hook, removed=removed)
        scores[name] = own.score(known[key])
    if oracle is not None:
        off["balanced"] = torch.zeros_like(judged)
        scores["balanced"] = fit_text_probe(bridge, oracle, hook, l2=l2, seed=seed).score(known[()])
    text = {"text": range(len(balanced))}
    node = {name: found.values[name] for name in ("dictionary", "latent")}
    record = provenance(bridge, method="shift", hook=hook, hooks=[d.hook for d in dictionaries], n_top=n_top, seed=seed)
    record |= {"n_removed": n_off, "n_judged": int(judged.sum()), "l2": float(l2), "probe_accuracy": probe.accuracy}
    masks = torch.stack([off[name] for name in scores]).numpy()
    return Shift(
        labelled(torch.stack(list(scores.values())), ("arm", "text"), {"arm": list(scores), **text}, unit="log-odds"),
        record,
        xr.DataArray(balanced.intended.numpy(), dims=("text",), coords=text),
        xr.DataArray(balanced.spurious.numpy(), dims=("text",), coords=text),
        xr.DataArray(masks, dims=("arm", "node"), coords={"arm": list(scores), **node}),
        labelled(mean, ("node",), node, unit="log-odds"),
    )


def label_judge(rows: Mapping[str, TokenRows], intended: Mapping[str, Tensor], spurious: Mapping[str, Tensor]) -> Judge:
    """A judge by labelled tokens: spurious is a latent whose correlation with one of the spurious labels is larger, in
    magnitude, than with any of the intended ones. For SHIFT the tokens are to be of other texts than are classified.

    Args:
        rows: By hook, the same tokens at every dictionary's hook (see `token_rows`).
        intended, spurious: `{name: [token] bool}` (see `label_masks`).

    Raises:
        KeyError: From the judge, for a dictionary whose hook has no rows.
    """

    def verdict(dictionary: Dictionary) -> Tensor:
        if dictionary.hook not in rows:
            raise KeyError(f"no rows of {dictionary.hook!r} to judge by; there are {', '.join(rows)}")
        here = rows[dictionary.hook]
        z = apply_encoder("dictionary", dictionary.encode, here.values).double()
        best = []
        for masks in (intended, spurious):
            truth = mask_matrix(masks, len(here)).double()
            a, b = z - z.mean(0), truth - truth.mean(0)
            below = b.norm(dim=0)[:, None] * a.norm(dim=0)
            best.append((b.T @ a).abs().div(below.clamp_min(1e-30)).amax(0))
        return best[1] > best[0]

    return verdict


def _by_dictionary(mask: Tensor, dictionaries: Sequence[Dictionary]) -> Removed:
    parts = mask.split([dictionary.n_latents for dictionary in dictionaries])
    return [(d, part.nonzero()[:, 0].tolist()) for d, part in zip(dictionaries, parts, strict=True)]
