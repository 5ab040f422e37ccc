"""Do neurons keep their labels when a model is tuned, and would they under a change as large that means nothing?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.models import geometry, provenance, require_eval
from interp.neurons._label_lists import (
    NOISES,
    STATISTICS,
    Noise,
    Score,
    agreement,
    check_options,
    displaced,
    label_lists,
    label_texts,
    null_draws,
    null_tops,
    prepared,
    require_alike,
    sides_of,
    specificity,
    token_strings,
    too_short,
)
from interp.neurons._sides import Side, side_vectors, unembedding
from interp.results import Result, labelled
from interp.stats import proportion_interval

if TYPE_CHECKING:
    import pandas as pd

Part = Literal["both", "neurons", "head"]
PARTS: tuple[Part, ...] = ("both", "neurons", "head")

_NORMAL = 1.96  # half-width of a 95 % interval in standard errors
_DIMS = ("side", "part", "statistic", "layer", "neuron")


@dataclass(frozen=True, eq=False, repr=False)
class AtlasComparison(Result):
    """Agreement of every neuron's labels in two models, and what a random change of the same size leaves.

    `values` (side, part, statistic, layer, neuron): statistic "top" is 1 where the first token is the same, "jaccard"
    and "rbo" (rank-biased overlap, persistence 0.9) compare the `k` best. Part "both" decodes each model with its own
    unembedding, "neurons" both with the base model's, "head" the base model's neurons with both unembeddings. NaN, and
    not counted, where either of the two vectors is (almost) zero: such a neuron has no label that it could keep.

    Attributes:
        noise: The same for the base model with random changes in place of the real one (in the neurons, the
            unembedding, or both), mean over seeds.
        floor: (side, part, statistic, layer, seed) `noise` per seed, mean over neurons.
        margin: (side, layer, neuron) best score less the second best in the base model.
        q_value: (side, layer, neuron) of the best score in the base model against rotated vectors, corrected over the
            side: small for neurons that are about a token more than a random direction is.
        moved: (side, layer, neuron) norm of the change over that of the base vector.
        turned: (side, layer, neuron) cosine of the base and the tuned vector.
        label_ids: (model, side, layer, neuron) the first token, each with its own unembedding; -1 for none.
        tokens: Strings of the tokens, empty without a tokenizer.
    """

    noise: xr.DataArray
    floor: xr.DataArray
    margin: xr.DataArray
    q_value: xr.DataArray
    moved: xr.DataArray
    turned: xr.DataArray
    label_ids: xr.DataArray
    tokens: list[str]

    def neurons(self, part: Part = "both", *, n_bins: int = 4) -> pd.DataFrame:
        """One row per side and neuron: `top`, `jaccard`, `rbo`, each also as `..._noise`; `margin`, `margin_bin` (1 to
        `n_bins`, bins of equal size within a side; 0 for no label), `q_value`, `specific` (q below 0.05), `moved`,
        `turned`, and the labels `base` and `tuned` (strings, or ids without a tokenizer)."""
        import pandas as pd

        self._check_part(part)
        table: dict[str, xr.DataArray] = {}
        for name in STATISTICS:
            table[name] = self.values.sel(part=part, statistic=name, drop=True)
            table[f"{name}_noise"] = self.noise.sel(part=part, statistic=name, drop=True)
        table |= {name: getattr(self, name) for name in ("margin", "q_value", "moved", "turned")}
        frame = xr.Dataset(table).to_dataframe().reset_index()
        rank = frame.groupby("side", sort=False)["margin"].rank(method="first")
        size = frame.groupby("side", sort=False)["margin"].transform("count")
        frame["margin_bin"] = np.ceil(rank / size * n_bins).fillna(0).astype(int)
        frame["specific"] = frame["q_value"] < 0.05
        for place, model in enumerate(("base", "tuned")):
            frame[model] = label_texts(self.label_ids.values[place].reshape(-1), self.tokens)
        return pd.DataFrame(frame)

    def summary(self, by: str | Sequence[str] = "side", *, part: Part = "both", n_bins: int = 4) -> pd.DataFrame:
        """Agreement of groups of neurons.

        Columns: the groups; `neurons`, those with labels; `kept`, the share that keeps the top token, with the Wilson
        95 % interval `low` to `high`; `noise`, that share under random changes; `excess`, kept less noise, with a 95 %
        interval over neurons `excess_low` to `excess_high`; means of `jaccard`, `jaccard_noise`, `rbo`, `rbo_noise`,
        `moved`.
        Intervals treat neurons as independent, so they are lower bounds on the uncertainty.

        Args:
            by: Any of "side", "layer", "margin_bin", "specific".
        """
        import pandas as pd

        by = [by] if isinstance(by, str) else list(by)
        allowed = ("side", "layer", "margin_bin", "specific")
        if not by or not set(by) <= set(allowed):
            raise ValueError(f"by is {by}; expected some of {', '.join(map(repr, allowed))}")
        rows = []
        frame: Any = self.neurons(part, n_bins=n_bins)  # pandas' types know too little of groups
        for key, group in frame[frame["top"].notna()].groupby(by, sort=False):
            n, kept = len(group), int(group["top"].sum())
            share = proportion_interval(kept, n)
            excess = (group["top"] - group["top_noise"]).to_numpy()
            mean, half = float(excess.mean()), _NORMAL * float(excess.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
            row = dict(zip(by, key, strict=True)) | {"neurons": n, "kept": kept / n}
            row |= {"low": float(share.low), "high": float(share.high), "noise": float(group["top_noise"].mean())}
            row |= {"excess": mean, "excess_low": mean - half, "excess_high": mean + half}
            means = ("jaccard", "jaccard_noise", "rbo", "rbo_noise", "moved")
            rows.append(row | {name: float(group[name].mean()) for name in means})
        return pd.DataFrame(rows).sort_values(by, kind="stable", key=self._order).reset_index(drop=True)

    def changed(self, k: int = 20, *, side: str | None = None, part: Part = "both") -> pd.DataFrame:
        """The neurons whose label changed although its margin was large, largest margin first."""
        frame: Any = self.neurons(part)
        frame = frame[(frame["top"] == 0) & ((frame["side"] == side) | (side is None))]
        columns = ["side", "layer", "neuron", "base", "tuned", "margin", "q_value", "moved", "jaccard"]
        return frame.sort_values("margin", ascending=False, kind="stable")[columns].head(k).reset_index(drop=True)

    def plot(self, part: Part = "both", *, x: Literal["layer", "margin_bin"] = "layer") -> Any:
        """Figure: share of neurons that keep their top token less that under random changes, by layer or by margin,
        with 95 % intervals over neurons. Below zero the real change cost more labels than a random one."""
        from interp.plotting import lines

        return lines(
            self.summary(("side", x), part=part),
            x=x,
            y="excess",
            group="side",
            interval=("excess_low", "excess_high"),
            reference=0,
            title="Neurons that keep their top token, beyond the noise floor",
            unit="kept less noise (share of neurons)",
            x_title={"layer": "layer", "margin_bin": "margin of the label in the base model (1 = smallest)"}[x],
        )

    def _check_part(self, part: str) -> None:
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(map(repr, PARTS))}, got {part!r}")

    def _order(self, column: Any) -> Any:
        sides = [str(side) for side in self.values["side"].values]
        return column.map(sides.index) if column.name == "side" else column


@torch.no_grad()
def compare(
    base: Any,
    tuned: Any,
    *,
    weights: Side | Sequence[Side] | None = None,
    k: int = 10,
    score: Score = "centred_cosine",
    fold: bool = True,
    noise_seeds: int = 5,
    noise: Noise = "norm",
    seed: int = 0,
    memory_budget: int = 2**28,
) -> AtlasComparison:
    """The share of neurons that keep their top token from one model to the other, beside its noise floor.

    Tuning moves weights a little, so labels stay: how many depends on how far the best token is ahead of the second and
    on how far the vector moves. The floor says what a movement without meaning leaves. `kept` above the floor: the
    change spares the labels. Below: it lies in directions that matter to the vocabulary, and if it is below the
    shuffled floor too, in those that matter to this neuron's label.

    No forward. Cost in products of neurons and vocabulary per side: 5 + 3 `noise_seeds`. Copies of both unembeddings
    and of one noisy one are held in float32.

    Args:
        base, tuned: Models of one shape and vocabulary.
        weights: `"in"`, `"gate"`, `"out"`, several of them, or all that the model has.
        k: Length of the lists that Jaccard and rank-biased overlap compare.
        score: What tokens are ranked by: cosine with token directions less their mean (default), cosine, or product.
        fold: Put norm gains into vectors and unembedding (`side_vectors`); their changes then count as well.
        noise_seeds: How many random changes the floor is the mean of.
        noise: `"norm"`: Gaussian rows of the norm of each row's change. `"angle"`: each row turned by its angle, in a
            random direction, so that rescaling a row is not taken for a change. `"shuffle"`: each row moved by another
            row's change at the norm of its own; changes of tuning lie in few directions, which may matter more to the
            vocabulary than random ones, and this floor has that in it.
        seed: Of the random changes (this and the following) and of the null rotations.
        memory_budget: Bytes for a tile of scores.

    Raises:
        ValueError: If shapes or vocabularies differ, a side does not exist, `k` or `noise_seeds` is too small, or a
            vector is not finite.

    Source:
        The share is the one of Davies 2025 (arXiv:2501.02688), there 75.4 % for the up-projections of Llama-3.1-8B and
        its instruction-tuned form by a score that its text does not fix; the floor, the parts and the strata are ours.
    """
    for bridge in (base, tuned):
        require_eval(bridge)
    require_alike([base, tuned], ["base", "tuned"])
    sides, shape = sides_of(base, weights), geometry(base)
    check_options(score, k, shape.d_vocab)
    if noise_seeds < 1:
        raise ValueError(f"noise_seeds must be at least 1, got {noise_seeds}; without noise there is no floor")
    if noise not in NOISES:
        raise ValueError(f"noise must be one of {', '.join(map(repr, NOISES))}, got {noise!r}")
    heads = [unembedding(bridge, fold=fold) for bridge in (base, tuned)]
    heads[1] = heads[1].to(heads[0])
    own = [prepared(head, score) for head in heads]
    wanted = max(k, min(2, shape.d_vocab))
    cells: list[tuple[int, Side, int]] = [
        (i, side, layer) for i, side in enumerate(sides) for layer in range(shape.n_layers)
    ]

    def vectors(side: Side, layer: int) -> tuple[Tensor, Tensor]:
        pair = [side_vectors(bridge, layer, side, fold=fold) for bridge in (base, tuned)]
        return pair[0], pair[1].to(pair[0])

    def lists(rows: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        return label_lists(rows, head, wanted, score, memory_budget)

    grid = (len(sides), shape.n_layers, shape.d_mlp)
    measured = torch.full((len(sides), len(PARTS), len(STATISTICS), *grid[1:]), torch.nan)
    random, floor = torch.zeros_like(measured), torch.full((*measured.shape[:4], noise_seeds), torch.nan)
    tops, margin, moved, turned = (torch.full(grid, torch.nan) for _ in range(4))
    draws = null_draws(shape.n_layers, shape.d_mlp, score)
    null = torch.full((*grid[:2], draws * shape.d_mlp), torch.nan)
    labels = np.zeros((2, *grid), dtype=np.int32)
    before: dict[tuple[int, int], Tensor] = {}
    for i, side, layer in cells:
        a, b = vectors(side, layer)
        values, ids = lists(a, own[0])
        before[i, layer] = ids
        tops[i, layer] = values[:, 0]
        margin[i, layer] = values[:, 0] - values[:, min(1, wanted - 1)]
        null[i, layer] = null_tops(a, own[0], score, seed + draws * layer, draws, memory_budget)
        dead = [too_short(rows).cpu() for rows in (a, b)]
        moved[i, layer] = ((b - a).norm(dim=1) / a.norm(dim=1)).cpu().masked_fill(dead[0], torch.nan)
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).cpu()
        turned[i, layer] = cosine.masked_fill(dead[0] | dead[1], torch.nan)
        after = {"both": lists(b, own[1])[1], "neurons": lists(b, own[0])[1], "head": lists(a, own[1])[1]}
        labels[:, i, layer] = torch.stack([ids[:, 0], after["both"][:, 0]]).numpy()
        for j, part in enumerate(PARTS):
            measured[i, j, :, layer] = agreement(ids[:, :k], after[part][:, :k])
    for draw in range(noise_seeds):
        noisy = prepared(displaced(heads[0].T, heads[1].T, seed + draw, noise).T.contiguous(), score)
        for i, side, layer in cells:
            a, b = vectors(side, layer)
            b = displaced(a, b, 1 + seed + draw + (1 + i * shape.n_layers + layer) * noise_seeds, noise)
            after = {"both": (b, noisy), "neurons": (b, own[0]), "head": (a, noisy)}
            for j, part in enumerate(PARTS):
                found = agreement(before[i, layer][:, :k], lists(*after[part])[1][:, :k])
                found = found.masked_fill(measured[i, j, :, layer].isnan(), torch.nan)  # of the same neurons
                random[i, j, :, layer] += found / noise_seeds
                floor[i, j, :, layer, draw] = found.nanmean(1)
    q_value = np.stack([specificity(tops[i], null[i], score) for i in range(len(sides))])
    own_coords = {"side": sides, "layer": np.arange(shape.n_layers), "neuron": np.arange(shape.d_mlp)}
    coords = {**own_coords, "part": list(PARTS), "statistic": list(STATISTICS)}
    of_neurons = ("side", "layer", "neuron")
    record = provenance(
        base,
        tuned=provenance(tuned),
        method="compare",
        k=k,
        score=score,
        fold=fold,
        noise=noise,
        noise_seeds=noise_seeds,
        seed=seed,
        head_moved=float(((heads[1] - heads[0]).norm(dim=0) / heads[0].norm(dim=0)).median()),
    )
    return AtlasComparison(
        labelled(measured, _DIMS, coords, unit="agreement"),
        record,
        noise=labelled(random, _DIMS, coords, unit="agreement"),
        floor=labelled(
            floor,
            ("side", "part", "statistic", "layer", "seed"),
            {name: values for name, values in coords.items() if name != "neuron"}
            | {"seed": np.arange(seed, seed + noise_seeds)},
            unit="agreement",
        ),
        margin=labelled(margin, of_neurons, own_coords, unit="score"),
        q_value=labelled(q_value, of_neurons, own_coords),
        moved=labelled(moved, of_neurons, own_coords, unit="of the norm"),
        turned=labelled(turned, of_neurons, own_coords, unit="cosine"),
        label_ids=xr.DataArray(labels, dims=("model", *of_neurons), coords={"model": ["base", "tuned"], **own_coords}),
        tokens=token_strings(base),
    )
