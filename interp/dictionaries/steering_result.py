"""The result of a comparison of steering methods: summaries, paired differences, choice of strength, texts, figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from interp.dictionaries._crossed import crossed_interval
from interp.results import Result
from interp.stats import adjust_p_values, paired_test

SCORES = ("concept", "fluency", "harmonic", "log_odds", "text", "log_prob")
UNITS = {
    "concept": "Concept score (0 to 1)", "fluency": "Fluency (0 to 1)", "harmonic": "Harmonic mean (0 to 1)",
    "log_odds": "Change of log-odds (nats)", "text": "Mean token weight", "log_prob": "Log-probability (nats/token)",
}  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class SteeringComparison(Result):
    """Scores of steered text by method at equal divergence from the unsteered model.

    The methods are the dimension `approach`: one called "method" could not be selected by `.sel(method=...)`, where
    xarray takes the word for a way of matching.

    Attributes:
        values: (score, approach, concept, draw, target, example); NaN where a target was not reached. Scores:
            `concept`: how far the text went from the unsteered model's own (0) to the concept's own texts (1);
            `fluency`: perplexity of unsteered over that of steered text, under the unsteered model, at most 1;
            `harmonic`: the harmonic mean of the two, per text;
            `log_odds`: change of the log-odds of the concept's label tokens right after the prompt, in nats (nothing
            is sampled for it); `text` and `log_prob`: concept and fluency before they were normalised.
        achieved: Divergence on the neutral prompts, (approach, concept, draw, target), in nats.
        strength: The strength used, same dimensions, NaN where the target was not reached.
        unsteered: Text score and log-probability of unsteered text, (score, concept, draw, example).
        written: Token ids that were written, (approach, concept, draw, target, example, token); -1 where none were.
    """

    achieved: xr.DataArray
    strength: xr.DataArray
    unsteered: xr.DataArray
    written: xr.DataArray

    def summary(self, *, confidence: float = 0.95) -> pd.DataFrame:
        """One row per approach, target and score: mean with interval over concepts, draws and prompts, achieved KL, and
        the share of vectors that reached the target (means are over those)."""
        values = self.values.transpose("score", "approach", "target", "concept", "draw", "example")
        interval = crossed_interval(values.to_numpy().astype(float), confidence=confidence)
        frame = values.isel(concept=0, draw=0, example=0, drop=True).to_dataframe(name="mean").reset_index()
        frame["mean"], frame["low"], frame["high"] = (bound.reshape(-1) for bound in interval)
        reached = self.strength.notnull()
        kl = self.achieved.where(reached).mean(["concept", "draw"]).to_series().rename("kl")
        share = reached.mean(["concept", "draw"]).to_series().rename("reached")
        return frame.join(kl, on=["approach", "target"]).join(share, on=["approach", "target"])

    def table(self, score: str = "harmonic") -> pd.DataFrame:
        """Approaches by target, each cell the mean with its 95 % interval; `-` where no vector reached the target."""
        frame = self.summary()
        frame = frame[frame["score"] == _known(score)]
        text = [
            f"{row.mean:.2f} [{row.low:.2f}, {row.high:.2f}]" if np.isfinite(row.mean) else "-"
            for row in frame.itertuples()
        ]
        return frame.assign(cell=text).pivot(index="approach", columns="target", values="cell").reindex(self._methods)

    def differences(self, score: str = "harmonic", *, reference: str | None = None) -> pd.DataFrame:
        """Every method minus the reference, paired over concepts, draws and prompts: mean, interval, p-value.

        The p-value flips signs of concepts' mean differences (exact up to 14 concepts, so at best 0.0625 with five of
        them); `q` is it corrected over all rows by Benjamini and Hochberg's method. Only concepts for which both
        methods reached the target count.
        """
        reference = reference or self.provenance["reference"]
        if reference not in self._methods:
            raise ValueError(f"no method {reference!r}; there are {', '.join(map(repr, self._methods))}")
        part = self.values.sel(score=_known(score)).transpose("approach", "target", "concept", "draw", "example")
        rows = []
        for method in self._methods:
            if method == reference:
                continue
            gap = (part.sel({"approach": method}) - part.sel({"approach": reference})).to_numpy().astype(float)
            interval = crossed_interval(gap)
            for j, target in enumerate(part["target"].to_numpy()):
                cells = gap[j].reshape(gap.shape[1], -1)
                known = np.isfinite(cells).any(1)
                means = np.nanmean(cells[known], axis=1) if known.any() else np.array([])
                p = float(paired_test(means)) if len(means) else np.nan
                rows.append([method, float(target), *(float(bound[j]) for bound in interval), p, int(known.sum())])
        frame = pd.DataFrame(rows, columns=["approach", "target", "difference", "low", "high", "p", "n_concepts"])
        return frame.assign(q=adjust_p_values(frame["p"].to_numpy(), method="bh"))

    def best(self, score: str = "harmonic") -> pd.DataFrame:
        """Each method at the best target of each concept: chosen on one half of the prompts, scored on the other.

        Both ways round. Taking the best over the same texts, as the paper does, would favour whoever varies most.
        """
        part = self.values.sel(score=_known(score)).transpose("approach", "concept", "target", "draw", "example")
        numbers = part.to_numpy().astype(float)
        if numbers.shape[-1] < 2:
            raise ValueError("one prompt cannot be split into one half to choose on and one to score on; pass more")
        kept = np.full([n for i, n in enumerate(numbers.shape) if i != 2], np.nan)  # [method, concept, draw, example]
        even = np.arange(numbers.shape[-1]) % 2 == 0
        for choose, report in ((even, ~even), (~even, even)):
            for m, c in np.ndindex(*numbers.shape[:2]):
                cell = numbers[m, c][..., choose].reshape(numbers.shape[2], -1)
                if (known := np.isfinite(cell).any(1)).any():
                    means = np.where(known, np.nansum(cell, 1) / np.isfinite(cell).sum(1).clip(1), -np.inf)
                    kept[m, c][:, report] = numbers[m, c, int(means.argmax())][:, report]
        interval = crossed_interval(kept)
        return pd.DataFrame(
            {"approach": self._methods, "mean": interval.estimate, "low": interval.low, "high": interval.high}
        )

    def texts(self, tokenizer: Any, **choice: Any) -> pd.DataFrame:
        """What was written, decoded, one row per text. `choice` selects labels: `approach="SNMF", concept="sea"`."""
        part = self.written.sel({key: [value] for key, value in choice.items()})
        frame = part.isel(token=0, drop=True).to_dataframe(name="text").reset_index()
        ids = part.to_numpy().reshape(-1, part.sizes["token"])
        frame["text"] = [tokenizer.decode(row.tolist()) if row[0] >= 0 else None for row in ids]
        return frame.dropna(subset=["text"]).reset_index(drop=True)

    def plot(self, score: str = "harmonic", *, paired: bool = False) -> Any:
        """The score at each divergence, a bar per method, with 95 % intervals.

        Args:
            paired: Show each method minus the reference instead (see `differences`): concepts differ more than methods
                do, so that bars may overlap where differences are plain.
        """
        from interp import plotting

        if paired:
            frame = self.differences(score).rename(columns={"difference": "mean"})
            reference = self.provenance["reference"]
            itself = frame.drop_duplicates("target").assign(approach=reference, mean=0.0, low=0.0, high=0.0)
            order = {name: i for i, name in enumerate(self._methods)}  # so that methods keep their colours
            frame = pd.concat([itself, frame]).sort_values(
                "approach", key=lambda names: names.map(order), kind="stable"
            )
            title, unit = f"Steering at equal divergence, less {reference}", f"Difference: {UNITS[score]}"
        else:
            frame = self.summary()
            frame = frame.loc[frame["score"] == _known(score)]
            title, unit = "Steering at equal divergence", UNITS[score]
        frame = frame.loc[frame["mean"].notna()].astype({"target": str})
        return plotting.bars(
            frame, x="target", y="mean", group="approach", interval=("low", "high"), title=title, unit=unit,
            x_title="KL from the unsteered model on neutral prompts (nats)",
        )  # fmt: skip

    @property
    def _methods(self) -> list[str]:
        return [str(name) for name in self.values["approach"].to_numpy()]


def _known(score: str) -> str:
    if score not in SCORES:
        raise ValueError(f"no score {score!r}; there are {', '.join(SCORES)}")
    return score
