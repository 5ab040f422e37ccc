"""Validity beside specificity: tables, shares by layer, and the scatter of all neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from interp.neurons._sides import Side
from interp.results import Result

QUADRANTS = ("sharp and true", "sharp but false", "broad but true", "noise")


@dataclass(frozen=True, eq=False, repr=False)
class Validity(Result):
    """How well the decoding of each neuron predicts what clamping it does to the logits: `(side, neuron, example)`.

    Coordinates: `layer` and `index` of each neuron; of each side and neuron `label` (token id), `label_token` and
    `sign`: -1 where the label's score is negative, the token being what the neuron is said to suppress.

    Attributes:
        values: Cosine, over the vocabulary, of the decoded direction and the clamp's effect on the logits, both
            mean-centred. Effects of clamps that lower the activation are reversed, so 1 is a label that is right in
            direction and sign, -1 one that is right but for the sign. NaN where the clamp changes nothing but
            rounding (a neuron that is never active).
        shuffled: The same with the decoding of another neuron of the same layer: what chance gives.
        rank: How many tokens the clamp raises (for a label of negative sign: lowers) at least as much as the label. 0:
            the label is the most raised of all.
        shuffled_rank: The same of the other neuron's label.
        effect: Length of the mean-centred effect, in logits, `(neuron, example)`.
        doses: What the activation is set to, or raised by, `(neuron)`.
        specificity: z of the label's peak score against the atlas' null, `(side, neuron)`; NaN if it has none.
    """

    shuffled: xr.DataArray
    rank: xr.DataArray
    shuffled_rank: xr.DataArray
    effect: xr.DataArray
    doses: xr.DataArray
    specificity: xr.DataArray

    def table(self, side: Side = "out", *, valid: float | int = 0.5, specific: float | int = 3.0) -> pd.DataFrame:
        """One row per neuron, means over examples (`rank`: the median): `layer, neuron, label, validity, shuffled,
        rank, top_1, specificity, dose, effect, quadrant`.

        Args:
            valid: Mean cosine from which a label counts as true.
            specific: z from which it counts as sharp.
        """
        if side not in self.values["side"].values:
            raise ValueError(f"no side {side!r}; this result has {', '.join(map(repr, self.values['side'].values))}")
        at = list(self.values["side"].values).index(side)
        cosine, rank = self.values.values[at], self.rank.values[at]
        frame = pd.DataFrame(
            {
                "layer": self.values["layer"].values, "neuron": self.values["index"].values,
                "label": self.values["label_token"].values[at],
                "validity": _over_examples(np.nanmean, cosine),
                "shuffled": _over_examples(np.nanmean, self.shuffled.values[at]),
                "rank": _over_examples(np.nanmedian, rank),
                "top_1": _over_examples(np.nanmean, np.where(np.isnan(rank), np.nan, rank == 0)),
                "specificity": self.specificity.values[at], "dose": self.doses.values,
                "effect": self.effect.values.mean(-1),
            }
        )  # fmt: skip
        sharp, true = frame["specificity"] >= specific, frame["validity"] >= valid
        names = np.select([sharp & true, sharp, true], QUADRANTS[:3], QUADRANTS[3]).astype(object)
        unknown = np.isnan(frame["specificity"].to_numpy()) | np.isnan(frame["validity"].to_numpy())
        names[unknown] = ""
        return frame.assign(quadrant=names)

    def summary(self) -> pd.DataFrame:
        """One row per side and layer: median cosine, that of shuffled labels, the share of (neuron, example) pairs in
        which the label is the most raised token or among the ten most raised, and of shuffled labels among the ten."""
        rows = []
        for s, side in enumerate(self.values["side"].values):
            for layer in sorted(set(self.values["layer"].values.tolist())):
                here = self.values["layer"].values == layer
                cosine, rank, other = (a.values[s, here] for a in (self.values, self.rank, self.shuffled_rank))
                measured = ~np.isnan(rank)
                if not measured.any():
                    continue
                rows.append(
                    {
                        "side": str(side), "layer": layer, "neurons": int(measured.any(-1).sum()),
                        "cosine": float(np.nanmedian(cosine)),
                        "shuffled": float(np.nanmedian(self.shuffled.values[s, here])),
                        "top_1": float((rank[measured] == 0).mean()), "top_10": float((rank[measured] < 10).mean()),
                        "shuffled_top_10": float((other[measured] < 10).mean()),
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, side: Side = "out", *, valid: float | int = 0.5, specific: float | int = 3.0) -> Any:
        """Validity over specificity, a point per neuron, coloured by layer; the four quadrants are named with counts.

        With more neurons than a figure holds, an even sample is drawn; the counts are of all.

        Raises:
            ValueError: If the atlas was made without a null.
        """
        from interp.plotting import MAX_POINTS, scatter

        table = self.table(side, valid=valid, specific=specific)
        shown = table.dropna(subset=["specificity", "validity"])
        if shown.empty:
            raise ValueError("no neuron has both a specificity and a validity; decode with null='rotation' first")
        if len(shown) > MAX_POINTS:
            shown = shown.iloc[np.linspace(0, len(shown) - 1, MAX_POINTS).astype(int)]
        figure = scatter(
            shown, x="specificity", y="validity", colour="layer", hover=["neuron", "label", "rank"], identity=False,
            title=f"Do the labels of side {side!r} predict what neurons do?", size=560,
            x_title="specificity: peak of the label against the null (z)",
            y_title="validity: cosine of decoding and clamp effect",
        )  # fmt: skip
        figure.add_vline(x=specific, line={"dash": "dot", "width": 1})
        figure.add_hline(y=valid, line={"dash": "dot", "width": 1})
        counts = table["quadrant"].value_counts()
        corners = {(1, 1): QUADRANTS[0], (1, 0): QUADRANTS[1], (0, 1): QUADRANTS[2], (0, 0): QUADRANTS[3]}
        for (right, top), name in corners.items():
            figure.add_annotation(
                text=f"{name}: {counts.get(name, 0)}", showarrow=False, xref="x domain", yref="y domain",
                x=0.99 if right else 0.01, y=0.99 if top else 0.01,
                xanchor="right" if right else "left", yanchor="top" if top else "bottom",
                bgcolor="rgba(255,255,255,0.8)",
            )  # fmt: skip
        return figure


def _over_examples(reduce: Any, values: np.ndarray) -> np.ndarray:
    """Along the last axis; NaN, without a warning, where nothing was measured."""
    out = np.full(len(values), np.nan)
    some = ~np.isnan(values).all(-1)
    out[some] = reduce(values[some], axis=-1)
    return out
