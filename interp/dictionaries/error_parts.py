"""What a dictionary misses: how much of its error is a linear map of the activation, and how much is not.

x = SAE(x) + linear(x) + rest, with `linear` the affine map that predicts the error best from x. Features that a
dictionary has no latents for leave a linear error; what its encoder and decoder add of their own does not. The map is
fitted on some tokens and everything is measured on others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries._error_split import BASELINE, DEFINITIONS, activations_of, errors_of, split_error
from interp.dictionaries._linear_maps import held_out
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.pursuit import gradient_pursuit, rescaling
from interp.dictionaries.rows import TokenRows
from interp.dictionaries.sources import TensorSource
from interp.results import Result, labelled
from interp.stats import Interval, ratio_interval

if TYPE_CHECKING:
    import plotly.graph_objects as go

Code = Literal["encoder", "rescaled", "gradient pursuit"]
Part = Literal["all", "linear", "nonlinear"]
CODES: tuple[Code, ...] = ("encoder", "rescaled", "gradient pursuit")
SHARES = ("fvu", "fvu_linear", "fvu_nonlinear", "linear_share")


@dataclass(frozen=True, eq=False, repr=False)
class DarkMatter(Result):
    """The parts of a dictionary's error on held-out tokens.

    `values` has the dimensions (code, metric): `"encoder"` are the dictionary's own latents, `"rescaled"` the same
    times one factor per latent, which takes away shrinkage, `"gradient pursuit"` latents found by that search at each
    token's own L0. `definition(metric)` says what a number is.

    Attributes:
        per_token: (code, quantity, token): squared norms of the `error` and of its `linear` and `nonlinear` parts, and
            `spread`, the squared distance of x from its mean; `token` counts the given rows, `document` is where from.
        weight, bias: (code, d_in, d_out) and (code, d_out) of the map from x to its linear error.
        factors: [latent], those of `"rescaled"`; 1 where it was not asked for.
    """

    per_token: xr.DataArray
    weight: xr.DataArray
    bias: xr.DataArray
    factors: xr.DataArray

    def get(self, metric: str, code: str = "encoder") -> float:
        """One number."""
        for name, wanted in (("metric", metric), ("code", code)):
            if wanted not in (known := [str(value) for value in self.values[name].values]):
                raise KeyError(f"{wanted!r} was not measured; {name} is one of {', '.join(known)}")
        return float(self.values.sel(metric=metric, code=code))

    def __getitem__(self, metric: str) -> float:
        return self.get(metric)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {self[name]:.3g}" for name in (*SHARES, "norm_r2"))
        return f"DarkMatter({shown}; {self.provenance['n_scored']:,} tokens scored)"

    def definition(self, metric: str) -> str:
        """What a number of this result means."""
        return str(self.provenance["definitions"][metric])

    def linear_error(self, x: Float[Tensor, "*batch d_in"], *, code: str = "encoder") -> Float[Tensor, "*batch d_out"]:
        """The error that the fitted map predicts at `x`, in float64."""
        weight, bias = (torch.tensor(array.sel(code=code).values).double() for array in (self.weight, self.bias))
        return x.double() @ weight.to(x.device) + bias.to(x.device)

    def interval(
        self,
        metric: str,
        *,
        code: str = "encoder",
        confidence: float = 0.95,
        n_resamples: int = 1000,
        seed: int = 0,
    ) -> Interval:
        """Bootstrap interval over held-out documents (tokens, where none were given) of a share of variance.

        The map stays the one that was fitted.
        """
        if metric not in SHARES:
            raise ValueError(f"no interval over documents for {metric!r}; there are {', '.join(SHARES)}")
        here = self.per_token.sel(code=code)
        document = np.unique(here["document"].values, return_inverse=True)[1]
        error, rest, spread = (
            np.bincount(document, here.sel(quantity=name).values.astype(np.float64))
            for name in ("error", "nonlinear", "spread")
        )
        above = {"fvu": error, "fvu_nonlinear": rest}.get(metric, error - rest)
        below = error if metric == "linear_share" else spread
        return ratio_interval(above, below, confidence=confidence, n_resamples=n_resamples, seed=seed)

    def plot(self) -> go.Figure:
        """Linear and nonlinear parts by code, as shares of the activations' variance with intervals over documents."""
        import pandas as pd

        from interp.plotting import bars

        rows = []
        for code in map(str, self.values["code"].values):
            for part in ("linear", "nonlinear"):
                found = self.interval(f"fvu_{part}", code=code)
                value = self.get(f"fvu_{part}", code)
                rows.append((code, part, value, float(found.low), float(found.high)))
        return bars(
            pd.DataFrame(rows, columns=["code", "part", "value", "low", "high"]),
            x="code",
            group="part",
            interval=("low", "high"),
            title="Parts of the dictionary's error",
            unit="share of the activations' variance",
            x_title="latents",
        )


def dark_matter(
    dictionary: Dictionary,
    rows: TokenRows | Float[Tensor, "token width"],
    *,
    codes: Sequence[Code] = CODES,
    documents: Int[Tensor, " row"] | None = None,
    baselines: Mapping[str, Tensor] | None = None,
    test_fraction: float = 0.5,
    ridge: float | int = 0.0,
    seed: int = 0,
) -> DarkMatter:
    """Split a dictionary's error into what an affine map of the activation predicts and the rest.

    No forward. The maps, the factors of `"rescaled"` and the token means are fitted on some documents (on some tokens
    where documents are not known); every number is of the others. A map fitted on few tokens predicts less than the
    best one would: give ten times as many tokens as the activation is wide, or a `ridge`.

    Args:
        rows: Activations at the dictionary's hook (see `token_rows`; leave out BOS), or a tensor of them.
        codes: Which latents: the encoder's own and alternatives for the same decoder (see `DarkMatter`). Shrinkage
            is a linear error: what `"rescaled"` takes off the linear part was that.
        documents: Which document each row of a tensor is from; `TokenRows` know theirs.
        baselines: Numbers per token, [token], such as the model's loss, from which |e|^2 is predicted as well; each
            gives a metric `norm_r2_NAME`.
        test_fraction: Share of the documents that is scored.
        ridge: Penalty on the maps, as a share of the mean variance of the activations' directions.
        seed: Of the split.

    Raises:
        ValueError: For transcoders, rows that do not fit the dictionary, unknown codes, or too few tokens.

    Source:
        Engels, Riggs Smith & Tegmark 2024 (arXiv:2410.14670). They fit on 150,000 random tokens and score 150,000
        others, without a constant in the map of the error; ours has one, and holds out whole documents.
    """
    x, documents, ids = activations_of(dictionary, rows, documents)
    codes = tuple(dict.fromkeys(codes))
    if not codes or any(name not in CODES for name in codes):
        raise ValueError(f"codes={codes}; expected some of {', '.join(CODES)}")
    for name, numbers in (baselines or {}).items():
        if tuple(numbers.shape) != (len(x),):
            raise ValueError(f"baselines[{name!r}] has shape {tuple(numbers.shape)}; expected one number per token")
    test = held_out(len(x), documents, test_fraction, seed, width=dictionary.d_in, ridge=ridge)
    at = test.to(x.device)
    factors = rescaling(dictionary, x[~at]) if "rescaled" in codes else torch.ones(dictionary.n_latents)
    encoders: dict[str, Callable[[Tensor], Tensor]] = {
        "encoder": dictionary.encode,
        "rescaled": lambda part: dictionary.encode(part) * factors.to(dictionary.W_dec),
        "gradient pursuit": lambda part: gradient_pursuit(dictionary, part),
    }
    found = [split_error(dictionary, x, at, encoders[code], baselines or {}, ids, ridge) for code in codes]
    metrics = list(found[0][0])
    definitions = {name: DEFINITIONS.get(name, BASELINE) for name in metrics}
    origin = rows.provenance if isinstance(rows, TokenRows) else {}
    record = {**origin, "method": "dark_matter", "dictionary": dictionary.settings(), "definitions": definitions}
    record |= {"split": "tokens" if documents is None else "documents", "test_fraction": test_fraction, "seed": seed}
    record |= {"ridge": float(ridge), "n_fitted": int((~test).sum()), "n_scored": int(test.sum())}
    token = test.nonzero()[:, 0]
    per_token = labelled(
        torch.stack([part[1] for part in found]),
        ("code", "quantity", "token"),
        {
            "code": list(codes),
            "quantity": ["error", "linear", "nonlinear", "spread"],
            "token": token.numpy(),
            "document": ("token", (token if documents is None else documents[token]).numpy()),
        },
    )
    return DarkMatter(
        labelled(
            np.array([[part[0][name] for name in metrics] for part in found]),
            ("code", "metric"),
            {"code": list(codes), "metric": metrics},
        ),
        record,
        per_token,
        labelled(torch.stack([part[2].weight for part in found]), ("code", "d_in", "d_out"), {"code": list(codes)}),
        labelled(torch.stack([part[2].bias for part in found]), ("code", "d_out"), {"code": list(codes)}),
        labelled(factors, ("latent",)),
    )


def error_source(
    dictionary: Dictionary,
    rows: TokenRows | Float[Tensor, "token width"],
    *,
    part: Part = "all",
    parts: DarkMatter | None = None,
) -> TensorSource:
    """The dictionary's errors on these tokens as training data for another one: `train(config, error_source(...))`.

    Args:
        part: `"linear"` and `"nonlinear"` are those of `parts`, a `DarkMatter` of this dictionary, fitted on other
            tokens where it matters.

    Source:
        Engels et al. 2024, who train TopK dictionaries (k 32, 16 times the width) on either part.
    """
    x, _, _ = activations_of(dictionary, rows, None)
    if part not in ("all", "linear", "nonlinear"):
        raise ValueError(f'part={part!r}; expected "all", "linear" or "nonlinear"')
    error = errors_of(dictionary, x, dictionary.encode)[0]
    if part != "all":
        if parts is None:
            raise ValueError(f"part={part!r} is what a fitted map says; pass parts=dark_matter(dictionary, ...)")
        linear = parts.linear_error(x)
        error = linear if part == "linear" else error - linear
    return TensorSource({dictionary.hook: error.float()})
