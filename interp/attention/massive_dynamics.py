"""How massive activations grow in training: the ratio by checkpoint, and a five-parameter curve of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from interp.attention._activations import sizes
from interp.attention.massive import massive_activations
from interp.models import load_model, provenance
from interp.results import Result, labelled

N_PARAMETERS = 5
_GRID = 24
# Bounds of beta and tau (see _start) with time scaled to 1: beyond them the curve is a line, a step or a constant.
_BETA, _TAU = (1e-4, 1e3), (1e-7, 1e2)


@dataclass(frozen=True)
class GrowthCurve:
    """f(t) = amplitude * exp(-decay * x) * ln(x) + limit with x = rate * t + start.

    Attributes:
        amplitude, decay, rate, start, limit: A, lambda, gamma, t_0 and K of the paper. Decay, rate and start are
            positive, so that x is, and its logarithm exists, from t = 0 on.
        r2: Share of the variance explained where it was fitted; NaN for a curve that was not fitted.
    """

    amplitude: float
    decay: float
    rate: float
    start: float
    limit: float
    r2: float = math.nan

    def __post_init__(self) -> None:
        for name in ("decay", "rate", "start"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be positive and finite: the curve takes ln(rate * t + start)")

    @property
    def parameters(self) -> tuple[float, float, float, float, float]:
        return self.amplitude, self.decay, self.rate, self.start, self.limit

    def __call__(self, times: ArrayLike) -> NDArray[np.float64]:
        """The curve at these times, none below 0."""
        x = self._x(times)
        return self.amplitude * np.exp(-self.decay * x) * np.log(x) + self.limit

    def jacobian(self, times: ArrayLike) -> NDArray[np.float64]:
        """Derivatives `[time, parameter]`, parameters in the order of `parameters`."""
        x, t = self._x(times), np.asarray(times, dtype=np.float64)
        shape, log = np.exp(-self.decay * x), np.log(x)
        by_x = self.amplitude * shape * (1 / x - self.decay * log)
        return np.stack([shape * log, -self.amplitude * x * shape * log, by_x * t, by_x, np.ones_like(x)], axis=-1)

    @property
    def peak(self) -> float:
        """Time of the maximum: (exp(W(1 / decay)) - start) / rate, W the Lambert function.

        NaN if there is none after time 0: the maximum lies before it, or the amplitude is not positive.
        """
        from scipy.special import lambertw

        if self.amplitude <= 0:
            return math.nan
        time = (math.exp(float(lambertw(1 / self.decay).real)) - self.start) / self.rate
        return time if time > 0 else math.nan

    def _x(self, times: ArrayLike) -> NDArray[np.float64]:
        t = np.asarray(times, dtype=np.float64)
        if t.size and t.min() < 0:
            raise ValueError(f"time {t.min()} is before 0; training steps count from 0")
        return self.rate * t + self.start


def fit_growth(times: ArrayLike, values: ArrayLike) -> GrowthCurve:
    """The curve of least squares through the values.

    With beta = decay * rate and tau = start / rate the curve is exp(-beta t) (A_1 ln(t + tau) + A_2) + K, linear in all
    but two parameters: a grid over these two, solved exactly for the rest, gives starts; the best are refined in all
    five with the analytic Jacobian (trust region). Time and values are scaled to 1 for it and back afterwards.

    Raises:
        ValueError: If there are fewer than six distinct times, a time below 0, a value that is not finite, or only one
            value.

    Source:
        The function and its reparametrisation: the study of massive activations over Pythia's training that the notes
        of this project describe. It starts from one point (A = range, K = min + A / 2, decay = 1 / std t,
        rate = 1 / range t, start = 1) in the original parameters, which can stop short of the least squares.
    """
    t, y = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if t.ndim != 1 or t.shape != y.shape:
        raise ValueError(f"times {t.shape} and values {y.shape}; expected two lists of equal length")
    if not (np.isfinite(t).all() and np.isfinite(y).all()):
        raise ValueError("times and values must be finite; leave out checkpoints that were not measured")
    if len(np.unique(t)) <= N_PARAMETERS:
        raise ValueError(f"{len(np.unique(t))} distinct times for {N_PARAMETERS} parameters; expected at least 6")
    if t.min() < 0:
        raise ValueError(f"time {t.min()} is before 0; training steps count from 0")
    span, low, high = float(t.max()), float(y.min()), float(y.max())
    if not high > low:
        raise ValueError(f"all values are {low}: there is no course to fit")
    s, z = t / span, (y - low) / (high - low)
    best = min((_refine(s, z, start) for start in _starts(s, z)), key=lambda found: found[1])[0]
    beta, tau, a1, a2, limit = math.exp(best[0]), math.exp(best[1]), best[2], best[3], best[4]
    rate = math.exp(a2 / a1)
    scaled = GrowthCurve(a1 * math.exp(beta * tau), beta / rate, rate, tau * rate, limit)
    residual = float(((z - scaled(s)) ** 2).sum())
    r2 = 1 - residual / float(((z - z.mean()) ** 2).sum())
    height = high - low
    amplitude, limit = float(scaled.amplitude * height), float(scaled.limit * height + low)
    return GrowthCurve(amplitude, scaled.decay, scaled.rate / span, scaled.start, limit, r2)


def _starts(s: NDArray[np.float64], z: NDArray[np.float64], n: int = 3) -> list[NDArray[np.float64]]:
    """The lowest minima over (log beta, log tau), with the linear parameters that belong to them.

    Local minima of a coarse grid, each looked at through ever finer ones.
    """
    from scipy.ndimage import minimum_filter

    sides = [np.linspace(math.log(low), math.log(high), _GRID) for low, high in ((1e-2, 1e2), (1e-5, 1e1))]
    grid = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2)
    linear, residual = _solved(grid, s, z)
    lowest = minimum_filter(residual.reshape(_GRID, _GRID), 3, mode="nearest").ravel() == residual
    order = np.concatenate(
        [np.argsort(np.where(lowest, residual, np.inf), kind="stable")[:4], np.argsort(residual, kind="stable")[:4]]
    )
    step = np.array([side[1] - side[0] for side in sides])
    around = np.stack(np.meshgrid(*[np.linspace(-1, 1, 9)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    found = []
    for place in order[np.isfinite(residual[order])]:
        centre, values, least, width = grid[place], linear[place], residual[place], step
        for _ in range(16):  # a step aside in the valley as long as its floor falls there, else a closer look
            near = centre + around * width
            solved, errors = _solved(near, s, z)
            best = int(errors.argmin())
            if np.abs(around[best]).max() < 1:
                width = width / 2.5
            if errors[best] < least:
                centre, values, least = near[best], solved[best], errors[best]
            else:
                width = width / 2
        found.append((float(least), np.concatenate([centre, values])))
    return [start for _, start in sorted(found, key=lambda part: part[0])[:n]]


def _solved(
    grid: NDArray[np.float64], s: NDArray[np.float64], z: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Best (A_1, A_2, K) and sum of squares at every (log beta, log tau); infinite where they are of no use."""
    decayed = np.exp(-np.exp(grid[:, :1]) * s)
    basis = np.stack([decayed * np.log(s + np.exp(grid[:, 1:])), decayed, np.ones_like(decayed)], axis=-1)
    scale = np.sqrt((basis**2).sum(1))
    unit = basis / scale[:, None]
    ridge = 1e-13 * np.eye(3)  # the three columns are nearly dependent where the grid is flat
    linear = np.linalg.solve(unit.mT @ unit + ridge, (unit.mT @ z)[..., None])[..., 0] / scale
    residual = (((basis * linear[:, None]).sum(-1) - z) ** 2).sum(1)
    return linear, np.where(_sane(grid, linear), residual, np.inf)


def _sane(grid: NDArray[np.float64], linear: NDArray[np.float64]) -> Any:
    """Whether the original parameters are numbers: an A_1 of nearly 0 is a curve without a logarithm, and
    rate = exp(A_2 / A_1) then none; nor may exp(beta * tau) overflow."""
    return (np.abs(linear[..., 1]) <= 30 * np.abs(linear[..., 0])) & (grid.sum(-1) < math.log(100))


def _curve(p: NDArray[np.float64], s: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values and derivatives in (log beta, log tau, A_1, A_2, K)."""
    beta, tau, a1, a2, limit = math.exp(p[0]), math.exp(p[1]), p[2], p[3], p[4]
    decayed, log = np.exp(-beta * s), np.log(s + tau)
    body = decayed * (a1 * log + a2)
    columns = [-beta * s * body, tau * decayed * a1 / (s + tau), decayed * log, decayed, np.ones_like(s)]
    return body + limit, np.stack(columns, axis=-1)


def _refine(
    s: NDArray[np.float64], z: NDArray[np.float64], start: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Trust-region reflective steps from a start: the parameters and their sum of squares."""
    from scipy.optimize import least_squares

    low = [math.log(_BETA[0]), math.log(_TAU[0]), -np.inf, -np.inf, -np.inf]
    high = [math.log(_BETA[1]), math.log(_TAU[1]), np.inf, np.inf, np.inf]
    found = least_squares(
        lambda p: _curve(p, s)[0] - z, start, jac=lambda p: _curve(p, s)[1],  # pyright: ignore
        bounds=(low, high), x_scale="jac", ftol=1e-15, xtol=1e-15, gtol=1e-15, max_nfev=200,
    )  # fmt: skip
    if _sane(found.x[:2], found.x[2:]):
        return found.x, 2 * float(found.cost)
    return start, float(((_curve(start, s)[0] - z) ** 2).sum())


@dataclass(frozen=True, eq=False, repr=False)
class MassiveDynamics(Result):
    """Largest over median magnitude of the stream leaving every block, `(step, layer, example)`."""

    def fit(self, layer: int) -> GrowthCurve:
        """The curve through the means over examples."""
        means = self.values.sel(layer=layer).mean("example")
        return fit_growth(means["step"].values, means.values.astype(np.float64))

    def fits(self) -> pd.DataFrame:
        """A row per layer: `layer, amplitude, decay, rate, start, limit, r2, peak` (a step, NaN if none)."""
        rows = []
        for layer in self.values["layer"].values:
            curve = self.fit(int(layer))
            rows.append({"layer": int(layer), **curve.__dict__, "peak": curve.peak})
        return pd.DataFrame(rows)

    def plot(self, layers: Sequence[int] | None = None) -> Any:
        """Points of the layers over steps, with their fitted curves as lines. The axis holds log(1 + step)."""
        import plotly.graph_objects as go

        from interp.plotting import lines

        chosen = self.values["layer"].values.tolist() if layers is None else list(layers)
        steps = self.values["step"].values
        dense = np.expm1(np.linspace(0, math.log1p(float(steps.max())), 200))
        tables = []
        for layer in chosen:
            curve = self.fit(layer)
            name = f"layer {layer} (R2 {curve.r2:.3f})"
            tables.append(pd.DataFrame({"fit": name, "place": np.log1p(dense), "value": curve(dense)}))
        table = pd.concat(tables, ignore_index=True)
        figure = lines(table, x="place", group="fit", title="Largest over median activation during training",
                       unit="ratio", x_title="training step (logarithmic, after adding 1)", width=820)  # fmt: skip
        shown = [i for i in range(len(steps)) if (len(steps) - 1 - i) % 2 == 0]
        figure.update_xaxes(
            tickmode="array", tickvals=[math.log1p(steps[i]) for i in shown], ticktext=[str(steps[i]) for i in shown]
        )
        drawn: Any = figure.data
        colours = [trace.line.color for trace in drawn if trace.mode == "lines" and trace.fill is None]
        for colour, layer in zip(colours, chosen, strict=True):
            means = self.values.sel(layer=layer).mean("example").values
            marker = {"color": colour, "size": 8}
            figure.add_trace(go.Scatter(x=np.log1p(steps), y=means, mode="markers", marker=marker, showlegend=False))
        return figure


def massive_growth(
    models: Mapping[int, Any], tokens: Int[Tensor, "batch pos"], *, batch_size: int | None = None
) -> MassiveDynamics:
    """Ratio of the largest to the median magnitude of every block's output in a series of checkpoints.

    One forward per checkpoint.

    Args:
        models: Training step to a loaded model or to anything that `interp.load_model` takes; these are loaded one at a
            time.
        tokens: Token ids, the same for all.

    Raises:
        ValueError: If there are no models, or they differ in depth. Others as `massive_activations`.

    Source:
        The measure of the Pythia study (see `fit_growth`): 10 sequences, 27 or more of the public checkpoints; mean R2
        of the fits 0.984 over 188 layers.
    """
    if not models:
        raise ValueError("massive_growth got no models; pass a mapping from training step to model")
    steps = sorted(int(step) for step in models)
    ratios, names, depth, record = [], [], None, {}
    for step in steps:
        model = models[step]
        bridge = model if hasattr(model, "blocks") else load_model(model, check=False)
        n_layers = sizes(bridge).n_layers
        if depth not in (None, n_layers):
            raise ValueError(f"step {step} has {n_layers} layers and step {steps[0]} {depth}")
        depth = n_layers
        found = massive_activations(bridge, tokens, absolute=None, ratio=1e9, batch_size=batch_size).values
        ratio = found.sel(statistic="top 1") / found.sel(statistic="median")
        ratios.append(ratio.isel(state=slice(1, None)).values)
        record = provenance(bridge)
        names.append(record["model"])
    coords = {"step": steps, "layer": range(int(depth or 0)), "example": range(len(tokens))}
    settings = {"models": names, "n_examples": len(tokens), "n_pos": tokens.shape[1], "cost": {"forwards": len(steps)}}
    return MassiveDynamics(
        labelled(np.stack(ratios), list(coords), coords, unit="largest / median"),
        {**record, "method": "massive_growth", **settings},
    )
