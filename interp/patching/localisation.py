"""Does a localisation tell where an intervention works, beyond what the layer alone tells?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd

MODELS = ("localisation", "layer", "layer + localisation", "layer x localisation")
"""One slope; one mean per layer; both; a mean and a slope per layer."""


@dataclass(frozen=True, eq=False, repr=False)
class LocalisationScore(Result):
    """How much of the success of interventions a localisation explains: `values (model, bound)` are R squared.

    Models, least squares over (layer, example) cells: `localisation` (one line), `layer` (a mean for each layer),
    `layer + localisation` (and one slope for all), `layer x localisation` (and a slope for each layer). Bounds:
    `estimate`, `low`, `high` over resampled examples, and `heldout`, on examples that were left out of the fit (below
    0: worse than the mean). In the sample more terms always explain more; held out they need not.

    Attributes:
        increment: R squared of `layer + localisation` less that of `layer`, `(bound)` with the same four bounds and
            `chance`, its mean when the localisations of the examples are exchanged.
        p_value: Share of exchanges that explain at least as much, `(model)`: for `layer + localisation` and `layer x
            localisation`; NaN for the others.
        chosen: Mean success if the layer is chosen by: `traced`, each example's highest localisation; `best`, the layer
            that was best for the other examples; `oracle`, each example's own best; `random`, any. `(rule, example)`.
        slope: Change of success per unit of localisation in the model `layer + localisation`, `(bound)`.
        localisation: What was scored, `(layer, example)`.
        success: What it was to explain, `(layer, example)`.
    """

    increment: xr.DataArray
    p_value: xr.DataArray
    chosen: xr.DataArray
    slope: xr.DataArray
    localisation: xr.DataArray
    success: xr.DataArray

    def summary(self) -> pd.DataFrame:
        """One row per model: R squared with its bounds, and the `p_value` of what the localisation adds."""
        return self.values.to_pandas().assign(p_value=self.p_value.values).reset_index()

    def choices(self) -> pd.DataFrame:
        """One row per rule of choosing the layer: mean success with its bootstrap interval."""
        import pandas as pd

        from interp.stats import bootstrap_interval

        found = bootstrap_interval(self.chosen.values)
        return pd.DataFrame({"rule": self.chosen["rule"].values, **found._asdict()})

    def plot(self) -> Any:
        """R squared of every model, with its interval."""
        from interp.plotting import bars

        frame = self.values.to_pandas().reset_index()
        return bars(
            frame, x="model", y="estimate", interval=("low", "high"), unit="R squared",
            title="Success of edits explained by layer and localisation",
        )  # fmt: skip

    def plot_cells(self) -> Any:
        """Success against localisation, a point per (layer, example), coloured by layer."""
        from interp.plotting import scatter

        frame = xr.Dataset({"localisation": self.localisation, "success": self.success}).to_dataframe().reset_index()
        units = (self.localisation.attrs.get("unit", ""), self.success.attrs.get("unit", ""))
        titles = [
            f"{name} ({unit})" if unit else name for name, unit in zip(("localisation", "success"), units, strict=True)
        ]
        return scatter(
            frame, x="localisation", y="success", colour="layer", x_title=titles[0], y_title=titles[1],
            colour_title="layer", identity=False, correlation=False, title="Where it is found and where edits work",
        )  # fmt: skip


def score_localisation(
    localisation: xr.DataArray | Result,
    success: xr.DataArray | Result,
    *,
    folds: int = 5,
    level: float = 0.95,
    n_resamples: int = 2000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> LocalisationScore:
    """Compare any localisation of facts in layers with any success of interventions there, example by example.

    Success depends on the layer for reasons that have nothing to do with the fact (what is read later, how long
    outputs are), and so does every localisation: a correlation over all cells says little. What counts is how much more
    of the success is explained once the layer's own mean is known, and whether that beats localisations that were
    exchanged among examples. Examples are the units: all layers of an example are resampled, exchanged or held out
    together. No forward passes.

    Args:
        localisation: `(layer, example)`, such as the effects of `causal_trace(..., site="mlp_out",
            positions="subject")` at that position, an attribution, or neuron counts; more means more of the fact.
        success: `(layer, example)`, such as `edit_sweep(...).success()`; the same layers and examples.
        folds: Parts that examples are divided into, with `seed`, for `heldout`.
        level: Of the intervals.
        n_resamples, n_permutations: Of the intervals and of the p-value.

    Raises:
        ValueError: If dimensions or coordinates differ, cells are unmeasured, or there are too few examples.

    Source:
        Hase, Bansal, Kim & Ghandeharioun 2023 (arXiv:2301.04213), section 5: R squared of edit success with layer as a
        factor, with tracing effects, and with both. They compare by an F test over cells, which are not independent
        within a fact; intervals over facts, exchanges and held-out facts are ours.
    """
    x, y = _cells(localisation, "localisation"), _cells(success, "success")
    for name in ("layer", "example"):
        if x[name].values.tolist() != y[name].values.tolist():
            raise ValueError(
                f"localisation has {name}s {x[name].values.tolist()[:8]} and success {y[name].values.tolist()[:8]}; "
                "they are compared cell by cell, so must be equal"
            )
    n = x.sizes["example"]
    if folds < 2 or n < 2 * folds:
        raise ValueError(f"{n} examples cannot make {folds} folds of two or more; pass more examples or fewer folds")
    if not 0 < level < 1 or n_resamples < 1 or n_permutations < 1:
        raise ValueError(
            f"level={level}, n_resamples={n_resamples} and n_permutations={n_permutations} do not make sense"
        )
    a, b = x.values.astype(np.float64), y.values.astype(np.float64)
    if np.ptp(b) == 0:
        raise ValueError(f"success is {b.flat[0]} in every cell, so there is nothing to explain")
    rng = np.random.default_rng(seed)
    whole = _explained(a, b, np.ones((1, n)))
    drawn = _explained(a, b, rng.multinomial(n, np.full(n, 1 / n), n_resamples).astype(np.float64))
    tail = (1 - level) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail], axis=0)
    held = _held_out(a, b, folds, rng)
    exchanged = np.concatenate(
        [_explained(a[:, rng.permutation(n)], b, np.ones((1, n))) for _ in range(n_permutations)]
    )
    p_values = np.full(len(MODELS), np.nan)
    for i in (2, 3):
        gain, chance = whole[0, i] - whole[0, 1], exchanged[:, i] - exchanged[:, 1]
        p_values[i] = (1 + int((chance >= gain - 1e-12).sum())) / (1 + n_permutations)
    bounds = ["estimate", "low", "high", "heldout"]
    gains = drawn[:, 2] - drawn[:, 1]
    increment = [
        whole[0, 2] - whole[0, 1], *np.nanquantile(gains, [tail, 1 - tail]), held[2] - held[1],
        float(np.nanmean(exchanged[:, 2] - exchanged[:, 1])),
    ]  # fmt: skip
    slope = [whole[0, 4], low[4], high[4]]
    table = np.stack([whole[0, :4], low[:4], high[:4], held], axis=1)
    record = {
        "method": "score_localisation", "folds": folds, "level": level, "n_resamples": n_resamples,
        "n_permutations": n_permutations, "seed": seed, "n_examples": n,
        "layers": [int(layer) for layer in x["layer"].values],
        **{name: given.provenance for name, given in (("localisation", localisation), ("success", success))
           if isinstance(given, Result)},
    }  # fmt: skip
    return LocalisationScore(
        labelled(table, ("model", "bound"), {"model": list(MODELS), "bound": bounds}, unit="R squared"),
        record,
        increment=labelled(np.array(increment), ("bound",), {"bound": [*bounds, "chance"]}, unit="R squared"),
        p_value=labelled(p_values, ("model",), {"model": list(MODELS)}),
        chosen=_chosen(x, y),
        slope=labelled(np.array(slope), ("bound",), {"bound": bounds[:3]}),
        localisation=x,
        success=y,
    )


def _cells(given: xr.DataArray | Result, name: str) -> xr.DataArray:
    array = given.values if isinstance(given, Result) else given
    if not isinstance(array, xr.DataArray) or set(array.dims) != {"layer", "example"}:
        dims = getattr(array, "dims", type(array).__name__)
        raise ValueError(
            f"{name} has dimensions {dims}; expected (layer, example). Take one position, or the largest over several: "
            "values.sel(pos='subject') or values.max('pos')"
        )
    array = array.transpose("layer", "example")
    kept = [str(key) for key in array.coords if key not in ("layer", "example")]
    missing = [key for key in ("layer", "example") if key not in array.coords]
    if missing:
        array = array.assign_coords({key: np.arange(array.sizes[key]) for key in missing})
    if not np.isfinite(array.values).all():
        bad = int((~np.isfinite(array.values)).sum())
        raise ValueError(
            f"{bad} cells of {name} are unmeasured or infinite; leave their examples out of both (.isel(example=...))"
        )
    return array.drop_vars(kept).astype(np.float32)


def _explained(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """R squared of the four models and the common slope, `[draw, 5]`, with examples weighted by `[draw, example]`."""
    total = weights.sum(1)[:, None]

    def within(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Sum of products about the means of each layer, `[draw, layer]`."""
        return weights @ (u * v).T - (weights @ u.T) * (weights @ v.T) / total

    xx, yy, xy = within(x, x), within(y, y), within(x, y)
    mean_x, mean_y = (weights @ x.T) / total, (weights @ y.T) / total

    def between(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        u, v = u - u.mean(1, keepdims=True), v - v.mean(1, keepdims=True)
        return (u * v).sum(1) * total[:, 0]

    whole = yy.sum(1) + between(mean_y, mean_y)
    all_xx, all_xy = xx.sum(1) + between(mean_x, mean_x), xy.sum(1) + between(mean_x, mean_y)
    layer = between(mean_y, mean_y)
    slope = _over(xy.sum(1), xx.sum(1))
    each = _over(xy, xx)
    sums = [_over(all_xy, all_xx) * all_xy, layer, layer + slope * xy.sum(1), layer + (each * xy).sum(1)]
    return np.stack([_over(part, whole, np.nan) for part in sums] + [slope], axis=1)


def _over(a: np.ndarray, b: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """a / b, and `empty` where b is 0 to rounding: a constant explains nothing."""
    small = b <= 1e-12 * max(1.0, float(np.abs(b).max()))
    return np.where(small, empty, a / np.where(small, 1, b))


def _held_out(x: np.ndarray, y: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """R squared of the four models on examples that were left out."""
    n = x.shape[1]
    fold = rng.permutation(n) % folds
    errors, about = np.zeros(4), 0.0
    for k in range(folds):
        train, test = fold != k, fold == k
        xt, yt, xs, ys = x[:, train], y[:, train], x[:, test], y[:, test]
        mx, my = xt.mean(1, keepdims=True), yt.mean(1, keepdims=True)
        cx, cy = xt - mx, yt - my
        one = _over(np.array([((xt - xt.mean()) * (yt - yt.mean())).sum()]), np.array([((xt - xt.mean()) ** 2).sum()]))
        common = _over(np.array([(cx * cy).sum()]), np.array([(cx * cx).sum()]))
        each = _over((cx * cy).sum(1, keepdims=True), (cx * cx).sum(1, keepdims=True))
        guesses = [yt.mean() + one * (xs - xt.mean()), my + 0 * xs, my + common * (xs - mx), my + each * (xs - mx)]
        errors += [((ys - guess) ** 2).sum() for guess in guesses]
        about += ((ys - yt.mean()) ** 2).sum()
    return 1 - errors / about


def _chosen(x: xr.DataArray, y: xr.DataArray) -> xr.DataArray:
    """Success of each example in the layer that each rule chooses."""
    a, b = x.values, y.values
    n = b.shape[1]
    example = np.arange(n)
    others = (b.sum(1, keepdims=True) - b) / (n - 1)  # mean over the other examples
    rules = {
        "traced": b[a.argmax(0), example], "best": b[others.argmax(0), example], "oracle": b.max(0),
        "random": b.mean(0),
    }  # fmt: skip
    coords = {"rule": list(rules), "example": y["example"].values}
    return labelled(np.stack(list(rules.values())), ("rule", "example"), coords, unit=y.attrs.get("unit", ""))
