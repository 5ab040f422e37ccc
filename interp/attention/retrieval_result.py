"""Scores of heads on needle prompts: means, intervals, activation frequency, counts and the recall map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.attention._scoring import COPYING, score_interval
from interp.results import Result

if TYPE_CHECKING:
    import pandas as pd

Head = tuple[int, int]

THRESHOLD = 0.1
"""Mean score from which Wu et al. call a head a retrieval head."""


@dataclass(frozen=True, eq=False, repr=False)
class RetrievalScores(Result):
    """Retrieval score of every head on every prompt that counted.

    `values` has dimensions (layer, head, example), with the coordinates `length` and `depth` of the examples where they
    are known.

    Attributes:
        recall: Share of the answer that the model wrote, of every prompt that was run (`sample`), counted or not; NaN
            for published files, which do not say.
        mode: How the score was counted; see `score_rows`.
    """

    recall: xr.DataArray
    mode: str

    def mean(self) -> xr.DataArray:
        """Mean score of every head."""
        return self.values.mean("example", keep_attrs=True)

    def interval(self, level: float = 0.95) -> xr.Dataset:
        """Mean score of every head with its interval over prompts: `estimate`, `low` and `high`.

        Wilson's interval, with the sample size that the spread of the scores is worth: also a head that never pastes
        has one (seen in 20 prompts, it may still paste in one of six), which resampling would deny.
        """
        values = self.values.transpose("layer", "head", "example")
        found = score_interval(values.values, level)
        template = self.mean().transpose("layer", "head")
        names = ("estimate", "low", "high")
        arrays = {name: template.copy(data=part.astype(np.float32)) for name, part in zip(names, found, strict=True)}
        return xr.Dataset(arrays, attrs={"level": level})

    def activation_frequency(self) -> xr.DataArray:
        """Share of prompts in which a head pastes at least one token of the needle.

        Raises:
            ValueError: For scores of attention mass, which are above 0 for every head.
        """
        if self.mode not in COPYING:
            raise ValueError(
                f"mode={self.mode!r} measures mass, and every head has some; activation frequency is that of a "
                f"copying score ({', '.join(COPYING)})"
            )
        active = (self.values > 0).where(self.values.notnull())
        return active.mean("example").astype(np.float32).assign_attrs(unit="share of prompts")

    def always_active(self) -> list[Head]:
        """Heads that paste in every prompt, those with the highest score first."""
        frequency = self.activation_frequency()
        return [head for head in self.ranking() if float(frequency.sel(layer=head[0], head=head[1])) == 1]

    def ranking(self) -> list[Head]:
        """All heads (layer, head), those with the highest mean score first."""
        mean = self.mean().transpose("layer", "head")
        order = np.argsort(-mean.values, axis=None, kind="stable")
        layers, heads = mean["layer"].values, mean["head"].values
        return [(int(layers[i // len(heads)]), int(heads[i % len(heads)])) for i in order]

    def retrieval_heads(self, threshold: float | int = THRESHOLD) -> list[Head]:
        """Heads whose mean score reaches the threshold, those with the highest score first."""
        mean = self.mean()
        return [head for head in self.ranking() if float(mean.sel(layer=head[0], head=head[1])) >= threshold]

    def counts(self, edges: Sequence[float | int] = (0.1, 0.5)) -> pd.DataFrame:
        """How many heads have a mean score of exactly 0, above it and below each edge, and from the last edge on."""
        import pandas as pd

        mean = self.mean().values.ravel()
        bounds = [0.0, *map(float, edges), np.inf]
        rows = [{"score": "0", "heads": int((mean == 0).sum())}]
        for low, high in zip(bounds[:-1], bounds[1:], strict=True):
            inside = (mean > 0 if low == 0 else mean >= low) & (mean < high)
            rows.append(
                {"score": f"{low:g} to {high:g}" if high < np.inf else f"{low:g} and more", "heads": int(inside.sum())}
            )
        frame = pd.DataFrame(rows)
        return frame.assign(share=frame["heads"] / mean.size)

    def stability(
        self,
        n: int,
        k: Sequence[int] = (10, 30),
        *,
        threshold: float | int = THRESHOLD,
        draws: int = 200,
        seed: int = 0,
    ) -> pd.DataFrame:
        """How well `n` of these prompts, drawn without replacement, find what all of them find.

        One row per k with the mean overlap of the top k, and one for the heads above the threshold with precision
        (`overlap`) and `recall`.
        """
        import pandas as pd

        values = self.values.transpose("layer", "head", "example").values
        values = values.reshape(-1, values.shape[-1])
        if not 1 <= n <= values.shape[1]:
            raise ValueError(f"n={n}, but there are {values.shape[1]} prompts")
        rng = np.random.default_rng(seed)
        whole = values.mean(1)
        drawn = np.stack([values[:, rng.choice(values.shape[1], n, replace=False)].mean(1) for _ in range(draws)])
        rows: list[dict[str, Any]] = []
        for count in k:
            top = set(np.argsort(-whole, kind="stable")[:count])
            shared = [len(top & set(np.argsort(-mean, kind="stable")[:count])) / count for mean in drawn]
            rows.append({"set": f"top {count}", "overlap": float(np.mean(shared)), "recall": float(np.mean(shared))})
        real, seen = whole >= threshold, drawn >= threshold
        hits = (seen & real).sum(1)
        with np.errstate(invalid="ignore"):
            precision, recall = hits / seen.sum(1), hits / real.sum()
        rows.append(
            {
                "set": f"score >= {threshold:g}",
                "overlap": float(np.nanmean(precision)),
                "recall": float(np.mean(recall)),
            }
        )
        return pd.DataFrame(rows).assign(n=n)

    def recall_map(self) -> xr.DataArray:
        """Mean recall of the answer by length and depth, over all prompts that were run; NaN where there was none."""
        if "length" not in self.recall.coords:
            raise ValueError("these scores come from a file, which does not say how long the prompts were")
        frame = self.recall.rename("recall").to_dataframe().reset_index()
        table = frame.groupby(["depth", "length"])["recall"].mean().unstack()
        coords = {"depth": table.index.to_numpy(), "length": table.columns.to_numpy()}
        return xr.DataArray(
            table.to_numpy(dtype=np.float32), dims=("depth", "length"), coords=coords, attrs={"unit": "answer recall"}
        )

    def summary(self, level: float = 0.95) -> pd.DataFrame:
        """One row per head, best first: `score` with bounds `low` and `high`, `frequency`, `retrieval`."""
        frame = self.interval(level).rename(estimate="score").to_dataframe().reset_index()
        if self.mode in COPYING:
            frequency = self.activation_frequency().transpose("layer", "head")
            frame["frequency"] = frequency.values.ravel()
        frame["retrieval"] = frame["score"] >= THRESHOLD
        frame.insert(0, "name", [f"L{layer}H{head}" for layer, head in zip(frame["layer"], frame["head"], strict=True)])
        return frame.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)

    def plot(self) -> Any:
        """Map of mean scores over layer and head, intervals in the hover text."""
        from interp.plotting import layer_head

        found = self.interval()
        return layer_head(
            found["estimate"],
            title=f"Retrieval score by layer and head, n = {self.values.sizes['example']}",
            unit=self.values.attrs.get("unit", "score"),
            signed=False,
            hover={"low": found["low"], "high": found["high"]},
            label_top=min(5, max(1, len(self.retrieval_heads()))),
        )

    def plot_recall(self) -> Any:
        """Map of the answer's recall over length and depth."""
        from interp.plotting import heatmap

        return heatmap(
            self.recall_map(), title="Recall of the answer by depth and length", unit="answer recall", signed=False,
            origin="top", limit=1, colours=("#a50026", "#fee08b", "#006837"),
        )  # fmt: skip

    def plot_activation(self, k: int = 50) -> Any:
        """Score and activation frequency of the `k` best heads, by rank; a gap is sensitivity to the context."""
        import pandas as pd

        from interp.plotting import lines

        frame = self.summary().head(k)
        parts = [
            pd.DataFrame({"rank": range(1, len(frame) + 1), "value": frame[column], "measure": name})
            for column, name in (("score", "mean score"), ("frequency", "activation frequency"))
        ]
        return lines(
            pd.concat(parts), x="rank", group="measure", title="Score and activation frequency by rank of the head",
            unit="score, share of prompts",
        )  # fmt: skip
