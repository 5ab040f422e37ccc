"""What a dictionary's error has to do with other dictionaries' errors, and with activations of earlier layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries._error_split import activations_of, errors_of
from interp.dictionaries._linear_maps import fit_affine, held_out, r2, r2_by_width
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.error_parts import dark_matter
from interp.dictionaries.rows import TokenRows
from interp.results import Result, labelled

if TYPE_CHECKING:
    import plotly.graph_objects as go

EARLIER = {
    "error_r2": "R2 of an affine map of the predictor for e = x - SAE(x), widths pooled",
    "error_r2_by_width": "the same for each width by itself, averaged",
    "fvu_left": "E|e - predicted|^2 / (E|x|^2 - |E x|^2): the FVU once the prediction is added",
    "nonlinear_r2": "1 - fvu_left of x and the predictor together / fvu_left of x alone: what it adds to x",
    "shuffled_r2": "error_r2 with the predictor's rows in random order: what fitting alone gives",
}


@dataclass(frozen=True, eq=False, repr=False)
class ErrorScaling(Result):
    """Errors of several dictionaries of one hook on the same held-out tokens.

    `values` has the dimensions (dictionary, metric) with the width (`n_latents`) and the metrics of `DarkMatter`.

    Attributes:
        norm_r2: (predictor, dictionary): R2, over held-out tokens, of an affine map of one dictionary's error norm |e|
            for another's. The predictor `"|x|"` is the activation's own norm, a baseline.
        per_token: (dictionary, token): |e|.
    """

    norm_r2: xr.DataArray
    per_token: xr.DataArray

    def slope(self, metric: str = "fvu_nonlinear") -> float:
        """d log metric / d log n_latents, by least squares over the dictionaries; -1 would halve with every doubling.

        Raises:
            ValueError: With fewer than two widths, or where the metric is not above 0.
        """
        width = self.values.sel(metric="n_latents").values.astype(float)
        value = self.values.sel(metric=metric).values.astype(float)
        if len(set(width)) < 2 or not (value > 0).all():
            raise ValueError(
                f"{metric} is {value.round(4).tolist()} at widths {width.tolist()}; a slope needs two widths and "
                f"numbers above 0"
            )
        return float(np.polyfit(np.log(width), np.log(value), 1)[0])

    def plot(self) -> go.Figure:
        """Linear and nonlinear parts of the error of each dictionary."""
        from interp.plotting import bars

        frame = self.values.sel(metric=["fvu_linear", "fvu_nonlinear"]).rename("value").to_dataframe().reset_index()
        frame["part"] = frame["metric"].str.removeprefix("fvu_")
        return bars(
            frame,
            x="dictionary",
            group="part",
            title="Parts of the error of each dictionary",
            unit="share of the activations' variance",
        )


def error_scaling(
    dictionaries: Mapping[str, Dictionary],
    rows: TokenRows | Float[Tensor, "token width"],
    *,
    documents: Int[Tensor, " row"] | None = None,
    test_fraction: float = 0.5,
    ridge: float | int = 0.0,
    seed: int = 0,
) -> ErrorScaling:
    """Are the tokens that a small dictionary rebuilds badly those that a large one does? And which part shrinks?

    No forward. Maps are fitted and scored as in `dark_matter`, on the same tokens for all dictionaries.

    Args:
        dictionaries: By name, of one hook: of different widths, or of one width at different L0.

    Raises:
        ValueError: With fewer than two dictionaries, or of different hooks; and as `dark_matter` does.

    Source:
        Engels et al. 2024 (arXiv:2410.14670), with widths from 16,384 to a million.
    """
    if len(dictionaries) < 2:
        raise ValueError(f"{len(dictionaries)} dictionaries; expected at least 2 to compare")
    if len(hooks := {dictionary.hook for dictionary in dictionaries.values()}) > 1:
        raise ValueError(f"the dictionaries read {', '.join(sorted(map(repr, hooks)))}; expected one hook for all")
    options: dict[str, Any] = {"documents": documents, "test_fraction": test_fraction, "ridge": ridge, "seed": seed}
    found = {name: dark_matter(d, rows, codes=("encoder",), **options) for name, d in dictionaries.items()}
    x, known, _ = activations_of(next(iter(dictionaries.values())), rows, documents)
    norms = {
        name: errors_of(dictionary, x, dictionary.encode)[0].norm(dim=1, keepdim=True)
        for name, dictionary in dictionaries.items()
    }
    predictors = {**norms, "|x|": x.double().norm(dim=1, keepdim=True)}
    test = held_out(len(x), known, test_fraction, seed, width=x.shape[1], ridge=ridge).to(x.device)
    between = [
        [r2(wanted[test], fit_affine(given[~test], wanted[~test], ridge)(given[test])) for wanted in norms.values()]
        for given in predictors.values()
    ]
    first = next(iter(found.values()))
    metrics = ["n_latents", *map(str, first.values["metric"].values)]
    numbers = [[dictionaries[name].n_latents, *part.values[0].values] for name, part in found.items()]
    names = list(dictionaries)
    settings = {name: dictionary.settings() for name, dictionary in dictionaries.items()}
    record = {key: value for key, value in first.provenance.items() if key != "dictionary"}
    record |= {"method": "error_scaling", "dictionaries": settings}
    token = first.per_token["token"].values
    return ErrorScaling(
        labelled(np.array(numbers), ("dictionary", "metric"), {"dictionary": names, "metric": metrics}),
        record,
        labelled(
            np.array(between), ("predictor", "dictionary"), {"predictor": list(predictors), "dictionary": names},
            unit="R2",
        ),
        labelled(
            torch.stack([norm[test][:, 0] for norm in norms.values()]), ("dictionary", "token"),
            {"dictionary": names, "token": token},
        ),
    )  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class EarlierLayers(Result):
    """What activations of other hooks say of a dictionary's error: (predictor, metric), on held-out tokens.

    The predictor `"x"` is the dictionary's own activation. `provenance["definitions"]` says what each metric is.
    """

    def plot(self) -> go.Figure:
        """The share of the error that each predictor explains, and what it adds to the activation itself."""
        from interp.plotting import bars

        frame = self.values.sel(metric=["error_r2", "nonlinear_r2"]).rename("value").to_dataframe().reset_index()
        frame["share"] = frame["metric"].map({"error_r2": "of the error", "nonlinear_r2": "of what x leaves"})
        return bars(
            frame.dropna(subset=["value"]),
            x="predictor",
            group="share",
            title="The dictionary's error, predicted linearly",
            unit="held-out share explained",
        )


def earlier_layer_prediction(
    dictionary: Dictionary,
    rows: TokenRows | Float[Tensor, "token width"],
    earlier: Mapping[str, TokenRows | Float[Tensor, "row other_width"]],
    *,
    documents: Int[Tensor, " row"] | None = None,
    test_fraction: float = 0.5,
    ridge: float | int = 0.0,
    seed: int = 0,
) -> EarlierLayers:
    """How much of a dictionary's error an affine map of earlier activations predicts, alone and beside x itself.

    No forward. Fitted on some documents and scored on others, as in `dark_matter`.

    Args:
        earlier: By name, other activations of the same tokens: of hooks of earlier layers, or what dictionaries of
            earlier components rebuild of them, as in the source.

    Raises:
        ValueError: If there are none, one is called "x" or is not of the same tokens, or there are too few tokens for
            x and the predictor together.

    Source:
        Engels et al. 2024, who map the reconstructions of dictionaries of earlier components, and find that this takes
        off more of the nonlinear error than a better encoder does.
    """
    x, known, _ = activations_of(dictionary, rows, documents)
    if not earlier or "x" in earlier:
        raise ValueError(f"earlier={list(earlier)}; expected at least one, none called 'x', the activation itself")
    others: dict[str, Tensor] = {}
    for name, given in earlier.items():
        if isinstance(given, TokenRows) and isinstance(rows, TokenRows):
            same = torch.equal(given.row, rows.row) and torch.equal(given.position, rows.position)
            if not same or not torch.equal(given.tokens, rows.tokens):
                raise ValueError(f"earlier[{name!r}] has rows of other tokens; read both from the same documents")
        other = given.values if isinstance(given, TokenRows) else given
        if len(other) != len(x):
            raise ValueError(f"earlier[{name!r}] has {len(other)} rows and there are {len(x)} tokens")
        others[name] = other.detach().to(x.device).double()
    widest = x.shape[1] + max(other.shape[1] for other in others.values())
    test = held_out(len(x), known, test_fraction, seed, width=widest, ridge=ridge).to(x.device)
    error, _ = errors_of(dictionary, x, dictionary.encode)
    own, wanted = x.double(), error[test]
    spread = float((own[test] - own[test].mean(0)).square().sum())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)

    def predicted(features: Tensor) -> Tensor:
        return fit_affine(features[~test], error[~test], ridge)(features[test])

    by_own = predicted(own)
    left = float((wanted - by_own).square().sum())
    values = []
    for name, given in {"x": own, **others}.items():
        found = by_own if name == "x" else predicted(given)
        both = left if name == "x" else float((wanted - predicted(torch.cat([own, given], 1))).square().sum())
        values.append(
            [
                r2(wanted, found),
                r2_by_width(wanted, found),
                float((wanted - found).square().sum()) / spread,
                float("nan") if name == "x" or left == 0 else 1 - both / left,
                r2(wanted, predicted(given[order])),
            ]
        )
    record = dict(rows.provenance) if isinstance(rows, TokenRows) else {}
    record |= {"method": "earlier_layer_prediction", "dictionary": dictionary.settings(), "definitions": dict(EARLIER)}
    record |= {"split": "tokens" if known is None else "documents", "test_fraction": test_fraction, "seed": seed}
    record |= {"ridge": float(ridge), "n_fitted": int((~test).sum()), "n_scored": int(test.sum())}
    coords = {"predictor": ["x", *others], "metric": list(EARLIER)}
    return EarlierLayers(labelled(np.array(values), ("predictor", "metric"), coords, unit="share"), record)
