"""Whether a neuron's strongest contexts are of one kind or of several, and whether any positions would be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor

from interp.cache import capture
from interp.hooks import hook_name
from interp.models import geometry, provenance
from interp.neurons._clusters import Null, clusters
from interp.neurons._kept import kept_tokens
from interp.neurons._largest import Side
from interp.neurons._sides import unembedding
from interp.neurons.contexts import contexts_of, top_contexts
from interp.results import Result, labelled
from interp.types import Site


@dataclass(frozen=True, eq=False, repr=False)
class Facets(Result):
    """The strongest contexts of a neuron with the facet that each belongs to: `values (rank)` are activations.

    Coordinates of `values`: `facet` (0 is the largest), `row`, `pos` and `token`.

    Attributes:
        tokens, scores: Token ids and activations around each context, `(rank, offset)`, as in `TopContexts`.
        silhouettes: `(k, quantity)`: `observed`, the `null_mean` and `null_sd` of data of one facet, and `z`; `control`
            and `control_z` are those of random positions.
        decoded: Per facet the tokens that the mean of its vectors, less that of all, points to most: a direct logit
            lens, which says little in early layers.
        neuron: (layer, index).
        p_value: Of the vectors being a single cloud of the kind that `null` names, corrected for having tried several
            numbers of facets. It is about the residual stream at these contexts, not about the neuron: compare it with
            `control_p_value`.
        control_facets, control_p_value: The same for as many random positions of the same layer.
        strings: Text of token ids, by id as text.
    """

    tokens: xr.DataArray
    scores: xr.DataArray
    silhouettes: xr.DataArray
    decoded: list[list[str]]
    neuron: list[int]
    p_value: float
    control_facets: int
    control_p_value: float
    strings: dict[str, str]

    @property
    def n_facets(self) -> int:
        return int(self.values.coords["facet"].max()) + 1

    @property
    def control(self) -> pd.DataFrame:
        """The neuron's contexts beside random positions of the same layer: does the neuron divide, or any text?

        Columns `positions, n_facets, p_value, k, silhouette, z`; the last two are of the `k` that stands out most from
        the null, significant or not (NaN where all vectors are equal).
        """
        frame = self.silhouettes.to_dataset("quantity").to_dataframe()
        rows = []
        for name, count, p, score, z in (
            ("contexts", self.n_facets, self.p_value, "observed", "z"),
            ("random", self.control_facets, self.control_p_value, "control", "control_z"),
        ):
            k = int(frame[z].fillna(-np.inf).idxmax())
            rows.append({"positions": name, "n_facets": count, "p_value": p, "k": k,
                         "silhouette": float(frame.loc[k, score]), "z": float(frame.loc[k, z])})  # fmt: skip
        return pd.DataFrame(rows)

    def table(self, k: int = 3) -> pd.DataFrame:
        """One row per facet: size, mean activation, and the commonest tokens there, before and after.

        Columns `facet, n, share, mean, current, previous, next, decoded`; tokens with their share of the facet.
        """
        facet = self.values.coords["facet"].values
        rows = []
        for number in range(self.n_facets):
            mine = facet == number
            row: dict[str, Any] = {"facet": number, "n": int(mine.sum()), "share": float(mine.mean()),
                                   "mean": float(self.values.values[mine].mean())}  # fmt: skip
            for name, offset in (("current", 0), ("previous", -1), ("next", 1)):
                ids = self.tokens.sel(offset=offset).values[mine].tolist()
                common = Counter(i for i in ids if i >= 0).most_common(k)
                row[name] = ", ".join(f"{self._text(i)!r} {count / mine.sum():.0%}" for i, count in common)
            row["decoded"] = ", ".join(self.decoded[number][:k])
            rows.append(row)
        return pd.DataFrame(rows)

    def show(self, facet: int, k: int = 8) -> Any:
        """The best `k` contexts of a facet as coloured text."""
        from interp.plotting import coloured_text

        if not 0 <= facet < self.n_facets:
            raise ValueError(f"facet={facet} does not exist; there are {self.n_facets}, from 0")
        places = np.flatnonzero(self.values.coords["facet"].values == facet)[:k].tolist()
        lines, values, marks = [], [], []
        for place in places:
            ids = self.tokens.values[place]
            inside = ids >= 0
            lines.append([self._text(i) for i in ids[inside].tolist()])
            values.append(self.scores.values[place][inside])
            marks.append(int((self.tokens.coords["offset"].values[inside] == 0).argmax()))
        spaced = any(text.startswith(" ") for text in self.strings.values())
        return coloured_text(
            lines, values, marks=marks, labels=[f"{self.values.values[place]:.3g}" for place in places],
            title=f"L{self.neuron[0]}N{self.neuron[1]}, facet {facet}", unit="activation", glue="" if spaced else " ",
        )  # fmt: skip

    def plot(self) -> Any:
        """Silhouette by number of facets, that of random positions, and the range of the null (two deviations)."""
        from interp.plotting import lines

        frame = self.silhouettes.to_dataset("quantity").to_dataframe().reset_index()
        observed = pd.DataFrame({"k": frame["k"], "value": frame["observed"], "data": "contexts"})
        null = pd.DataFrame({"k": frame["k"], "value": frame["null_mean"], "data": "one cloud"})
        random = pd.DataFrame({"k": frame["k"], "value": frame["control"], "data": "control"})
        for table, spread in ((observed, 0.0), (null, 2 * frame["null_sd"]), (random, 0.0)):
            table["low"], table["high"] = table["value"] - spread, table["value"] + spread
        return lines(
            pd.concat([observed, null, random]), x="k", group="data", interval=("low", "high"),
            title=f"Facets of L{self.neuron[0]}N{self.neuron[1]}", unit="mean silhouette", x_title="number of facets",
        )  # fmt: skip

    def _text(self, token: int) -> str:
        return self.strings.get(str(token), f"#{token}")


def facets(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    neuron: tuple[int, int],
    *,
    n: int = 100,
    side: Side = "max",
    site: Site | None = None,
    max_k: int = 6,
    null: Null = "elliptical",
    n_null: int = 99,
    alpha: float | int = 0.05,
    window: tuple[int, int] = (8, 3),
    keep: Bool[Tensor, "batch pos"] | None = None,
    skip_bos: bool = True,
    batch_size: int = 32,
    seed: int = 0,
) -> Facets:
    """Group the strongest contexts of a neuron by the residual stream there, beside random positions.

    A label of one token hides that a neuron may fire in several kinds of contexts; this looks for them. The vectors
    (scaled to length 1) of the `n` strongest distinct contexts are clustered (Ward), and the silhouette of every
    number of groups is compared with that of single clouds on the sphere. Only a division that stands out is reported;
    otherwise there is one facet.

    Facets describe the stream at the contexts. They belong to the neuron only as far as random positions of the layer
    lack them, and most text divides, by its tokens: in `tinyworld-llama` 28 of 32 neurons have more than one facet
    (n=60, max_k=4), and so have 32 of 32 sets of random positions. As many random distinct contexts of the
    same text (the neuron's may be among them) go through the same test: read `.control` first. Costs two forwards,
    less the layers above the neuron's; the second reads up to 2 n rows.

    Args:
        neuron: (layer, index).
        n: Contexts; those whose tokens from `window[0]` before up to the token itself are equal count once.
        side: `"max"`, or `"min"` for the strongest negative activations.
        site: Where the vectors come from, in the neuron's layer: by default `resid_mid`, which the MLP reads, or
            `resid_pre` in parallel blocks.
        null: Data of one group. `"gaussian"`: a Gaussian cloud of the same mean and covariance, in the plane that
            touches the sphere at the mean direction, wrapped round the sphere. A heavy tail alone differs from it.
            `"elliptical"`: the same with the tail of the data: every draw is scaled by how far a vector of the data is
            from the mean, and far vectors weigh less in the covariance. `"shuffled"`: each coordinate permuted on its
            own, then length 1; this also destroys correlations between coordinates, and so finds facets in any
            elongated cloud. One cloud, 60 vectors, t with 4 degrees of freedom, in 8, 32 and 128 dimensions, was
            divided in 55, 98 and 100 % of 40 runs under `"gaussian"` and in 0, 0 and 8 % under `"elliptical"`
            (Gaussian clouds: at most 2 %). A skewed or curved cloud can be divided under each of them.
        n_null: Draws; the smallest p-value is 1 / (n_null + 1).
        alpha: Largest p-value at which more than one facet is reported.
        seed: Of the null and of the random positions.

    Raises:
        ValueError: If an option does not fit, or the text has fewer than 10 distinct contexts. RuntimeError: In
            training mode.

    Source:
        Multifaceted feature visualisation (Nguyen, Yosinski & Clune 2016, arXiv:1602.03616) carried over to text;
        silhouette: Rousseeuw 1987. The test against one cloud is ours.
    """
    parallel = geometry(bridge).parallel
    where: Site = site or ("resid_pre" if parallel else "resid_mid")
    if where not in ("resid_pre", "resid_mid", "resid_post"):
        raise ValueError(f"site={site!r}; expected resid_pre, resid_mid or resid_post")
    if where == "resid_mid" and parallel:
        raise ValueError(f"{bridge.cfg.model_name} has no resid_mid (parallel blocks); use site='resid_pre'")
    if n < 10:
        raise ValueError(f"n={n}; expected at least 10 contexts to group")
    if max_k < 2:
        raise ValueError(f"max_k={max_k}; expected at least 2")
    if n_null < 19 or not 1 / (n_null + 1) <= alpha < 1:
        raise ValueError(f"n_null={n_null}, alpha={alpha}; expected 19 draws, and 1 / (n_null + 1) <= alpha < 1")
    if null not in get_args(Null):
        raise ValueError(f"null={null!r}; expected one of {', '.join(get_args(Null))}")
    if min(window) < 1:
        raise ValueError(f"window={window}; facets show the tokens before and after, so expected at least 1 of each")
    top = top_contexts(
        bridge, tokens, [neuron], n=n, side=side, once="context", window=window, keep=keep, skip_bos=skip_bos,
        batch_size=batch_size,
    )  # fmt: skip
    found = top.values.isel(unit=0, rank=np.isfinite(top.values.values[0]))
    if len(found) < 10:
        raise ValueError(f"this text has {len(found)} distinct contexts, too few to group; give more text")
    generator = torch.Generator().manual_seed(seed)
    kept = kept_tokens(bridge, tokens, keep, skip_bos, batch_size)
    random = contexts_of(
        torch.rand(tokens.numel(), 1, generator=generator), tokens, n=len(found), window=window, once="context",
        keep=kept,
    ).values[0]  # fmt: skip
    rows, pos = (
        torch.from_numpy(np.concatenate([places.coords[name].values for places in (found, random)])).long()
        for name in ("row", "pos")
    )
    hook = hook_name(where, neuron[0])
    vectors = capture(bridge, tokens[rows.to(tokens.device)], hook, positions=pos, batch_size=batch_size)[hook]
    vectors = vectors.cpu().double()
    unit, other = (vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-30)).split(len(found))
    grouped, control = (
        clusters(some.numpy(), max_k=max_k, null=null, n_null=n_null, alpha=float(alpha), seed=seed, sphere=True)
        for some in (unit, other)
    )
    weights = unembedding(bridge, fold=True).double().cpu()
    decoded = []
    for number in range(grouped.k):
        centre = unit[torch.from_numpy(grouped.labels == number)].mean(0) - (unit.mean(0) if grouped.k > 1 else 0)
        ids = (centre @ weights).topk(min(10, weights.shape[1])).indices.tolist()
        decoded.append([f"#{i}" if bridge.tokenizer is None else bridge.tokenizer.decode([i]).strip() for i in ids])
    places = range(len(found))
    coords = {
        "facet": ("rank", grouped.labels),
        **{name: ("rank", found.coords[name].values) for name in ("row", "pos", "token")},
    }
    record = provenance(
        bridge, method="facets", n=n, side=side, site=where, max_k=max_k, null=null, n_null=n_null, alpha=float(alpha),
        seed=seed, skip_bos=skip_bos, window=list(window), cost={"forwards": 2},
    )  # fmt: skip
    return Facets(
        labelled(found.values, ("rank",), coords, unit="activation"),
        record,
        tokens=top.tokens.isel(unit=0, rank=places),
        scores=top.scores.isel(unit=0, rank=places),
        silhouettes=labelled(
            np.concatenate([grouped.table, control.table[:, [0, 3]]], 1),
            ("k", "quantity"),
            {"k": grouped.ks, "quantity": ["observed", "null_mean", "null_sd", "z", "control", "control_z"]},
        ),
        decoded=decoded,
        neuron=[int(neuron[0]), int(neuron[1])],
        p_value=grouped.p_value,
        control_facets=control.k,
        control_p_value=control.p_value,
        strings=top.strings,
    )
