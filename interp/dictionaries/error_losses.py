"""What the linear and the nonlinear part of a dictionary's error cost downstream, in cross-entropy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.error_parts import DarkMatter
from interp.dictionaries.splicing import check_place, check_width
from interp.hooks import interventions, no_retained_graph
from interp.hooks.names import device_of
from interp.models import provenance, require_eval
from interp.results import Result, labelled
from interp.stats import Interval, ratio_interval

if TYPE_CHECKING:
    import plotly.graph_objects as go

DEFINITIONS = {
    "ce_clean": "mean cross-entropy of the next token, nats, of the model itself",
    "ce_reconstruction": "the same with SAE(x) in the activation's place: both parts missing",
    "ce_with_linear": "with SAE(x) + linear(x): the nonlinear part missing",
    "ce_with_nonlinear": "with SAE(x) + e - linear(x): the linear part missing",
    "ce_with_both": "with SAE(x) + linear(x) + (e - linear(x)), which is x: ce_clean up to rounding",
    "ce_random_linear": "with x less a random vector as long as its linear part: a control of ce_with_nonlinear",
    "ce_random_nonlinear": "with x less one as long as its nonlinear part: a control of ce_with_linear",
    "ce_rise": "ce_reconstruction - ce_clean",
    "linear_share": "(ce_with_nonlinear - ce_clean) / ce_rise: what the linear part alone costs when it is missing",
    "nonlinear_share": "(ce_with_linear - ce_clean) / ce_rise: what the nonlinear part alone costs",
    "linear_restored": "(ce_reconstruction - ce_with_linear) / ce_rise = 1 - nonlinear_share",
    "nonlinear_restored": "(ce_reconstruction - ce_with_nonlinear) / ce_rise = 1 - linear_share",
    "linear_norm_share": "E|linear(x)|^2 / (E|linear(x)|^2 + E|e - linear(x)|^2)",
}
_CONDITIONS = tuple(name.removeprefix("ce_") for name in DEFINITIONS if name.startswith("ce_") and name != "ce_rise")
_SHARES = {
    "ce_rise": ("reconstruction", "clean"),
    "linear_share": ("with_nonlinear", "clean"),
    "nonlinear_share": ("with_linear", "clean"),
    "linear_restored": ("reconstruction", "with_linear"),
    "nonlinear_restored": ("reconstruction", "with_nonlinear"),
}


@dataclass(frozen=True, eq=False, repr=False)
class ErrorShares(Result):
    """What `error_ce_shares` measured: one number per `metric`; `definition(metric)` says what each is.

    The two shares need not add up to 1: what they lack is the parts' interaction.

    Attributes:
        per_text: Sums over the predictions of each text, [quantity, example]: cross-entropies and `predictions`.
    """

    per_text: xr.DataArray

    def __getitem__(self, metric: str) -> float:
        if metric not in (names := [str(name) for name in self.values["metric"].values]):
            raise KeyError(f"{metric!r} was not measured; there are {', '.join(names)}")
        return float(self.values.sel(metric=metric))

    def __repr__(self) -> str:
        shown = ("ce_rise", "linear_share", "nonlinear_share", "linear_norm_share")
        numbers = ", ".join(f"{name} {self[name]:.3g}" for name in shown)
        return f"ErrorShares({numbers}; {self.provenance['n_predictions']:,} predictions)"

    def definition(self, metric: str) -> str:
        """What a number of this result means."""
        return str(self.provenance["definitions"][metric])

    def interval(self, metric: str, *, confidence: float = 0.95, n_resamples: int = 1000, seed: int = 0) -> Interval:
        """Bootstrap interval over texts of a cross-entropy, its rise or a share of the rise."""
        sums = {str(name): self.per_text.sel(quantity=name).values.astype(np.float64) for name in _CONDITIONS}
        predictions = self.per_text.sel(quantity="predictions").values.astype(np.float64)
        if metric in _SHARES:
            more, less = _SHARES[metric]
            above = sums[more] - sums[less]
            below = predictions if metric == "ce_rise" else sums["reconstruction"] - sums["clean"]
        elif metric.removeprefix("ce_") in sums and metric.startswith("ce_"):
            above, below = sums[metric.removeprefix("ce_")], predictions
        else:
            raise ValueError(f"no interval over texts for {metric!r}; there are ce_* and {', '.join(_SHARES)}")
        return ratio_interval(above, below, confidence=confidence, n_resamples=n_resamples, seed=seed)

    def plot(self) -> go.Figure:
        """Rise of the cross-entropy with each part missing, beside random vectors as long, intervals over texts."""
        import pandas as pd

        from interp.plotting import bars

        sums = {str(name): self.per_text.sel(quantity=name).values.astype(np.float64) for name in _CONDITIONS}
        predictions = self.per_text.sel(quantity="predictions").values.astype(np.float64)
        rows = []
        for missing, real, random in (
            ("linear", "with_nonlinear", "random_linear"),
            ("nonlinear", "with_linear", "random_nonlinear"),
            ("both", "reconstruction", None),
        ):
            for vector, name in (("the error's part", real), ("random, as long", random)):
                if name is not None:
                    found = ratio_interval(sums[name] - sums["clean"], predictions)
                    rows.append((missing, vector, *(float(getattr(found, field)) for field in found._fields)))
        return bars(
            pd.DataFrame(rows, columns=["missing", "what", "rise", "low", "high"]),
            x="missing",
            y="rise",
            group="what",
            interval=("low", "high"),
            title="Cross-entropy with parts of the activation missing",
            unit="rise of the cross-entropy, nats",
            x_title="missing part of the dictionary's error",
        )


def error_ce_shares(
    bridge: Any,
    dictionary: Dictionary,
    tokens: Int[Tensor, "example pos"],
    parts: DarkMatter,
    *,
    keep: Bool[Tensor, "example pos"] | None = None,
    skip_first: int = 1,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> ErrorShares:
    """How much of the cross-entropy's rise from splicing a dictionary in is due to either part of its error.

    The activation is replaced by the reconstruction, with the linear part, with the nonlinear part and with both, and
    is moved at random by as much. Positions that are left out keep the model's own activations and enter no average.

    Args:
        parts: A `dark_matter` of this dictionary, fitted on other tokens of the same kind.
        keep: Positions that count; for padding.
        skip_first: Positions at the start of every text that do not: BOS by default.
        batch_size: Texts per forward.
        seed: Of the random vectors.

    Returns:
        An `ErrorShares`. Costs seven forwards of all tokens; the provenance counts them (`n_forwards`).

    Raises:
        ValueError: Before any forward, for transcoders, parts of another dictionary's width or hook, or if nothing is
            left to measure; KeyError if the model has no such hook.

    Source:
        Engels et al. 2024 (arXiv:2410.14670); the random vectors are ours.
    """
    require_eval(bridge)
    counted = _counted(tokens, keep, skip_first, batch_size)
    _check_parts(dictionary, parts)
    hook, _ = check_place(bridge, dictionary)
    draws = torch.Generator().manual_seed(seed)
    device = device_of(bridge)
    sums: dict[str, list[Tensor]] = {name: [] for name in ("predictions", *_CONDITIONS)}
    squares, n_forwards = torch.zeros(2, dtype=torch.float64), 0
    with tqdm(total=len(tokens), desc="replacing", disable=None if progress else True) as bar, torch.no_grad():
        for start in range(0, len(tokens), batch_size):
            ids, where = (tensor[start : start + batch_size].to(device) for tensor in (tokens, counted))
            predicts = (where[:, :-1] & where[:, 1:]).double()
            sums["predictions"].append(predicts.sum(1))
            random = torch.randn(*ids.shape, dictionary.d_in, generator=draws, dtype=torch.float64).to(device)
            random = random / random.norm(dim=-1, keepdim=True)
            for name in _CONDITIONS:

                def replace(x: Tensor, _name: str = name, _where: Tensor = where, _random: Tensor = random) -> Tensor:
                    flat = x.flatten(2)
                    check_width(flat, dictionary.d_in, hook)
                    rebuilt = dictionary(flat).double()
                    linear = parts.linear_error(flat)
                    rest = flat.double() - rebuilt - linear
                    if _name == "reconstruction":
                        squares.add_(torch.stack([part[_where].square().sum() for part in (linear, rest)]).cpu())
                    new = _replacement(_name, flat.double(), rebuilt, linear, rest, _random).to(x.dtype)
                    return torch.where(_where[..., None], new, flat).reshape(x.shape)

                ce = _cross_entropy(bridge, ids, {} if name == "clean" else {hook: replace})
                sums[name].append((ce * predicts).sum(1))
                n_forwards += 1
            bar.update(len(ids))
    per_text = {name: torch.cat(found).cpu().numpy() for name, found in sums.items()}
    values = _metrics(per_text, squares)
    return ErrorShares(
        labelled(np.array(list(values.values())), ("metric",), {"metric": list(values)}),
        provenance(
            bridge,
            method="error_ce_shares",
            dictionary=dictionary.settings(),
            n_predictions=int(per_text["predictions"].sum()),
            n_forwards=n_forwards,
            left_out={"first": skip_first, "masked": keep is not None},
            definitions=dict(DEFINITIONS),
            seed=seed,
        ),
        labelled(np.stack(list(per_text.values())), ("quantity", "example"), {"quantity": list(per_text)}),
    )


def _replacement(name: str, x: Tensor, rebuilt: Tensor, linear: Tensor, rest: Tensor, random: Tensor) -> Tensor:
    if name.startswith("random"):
        return x - random * (linear if name == "random_linear" else rest).norm(dim=-1, keepdim=True)
    if name in ("with_linear", "with_both"):
        rebuilt = rebuilt + linear
    return rebuilt + rest if name in ("with_nonlinear", "with_both") else rebuilt


def _cross_entropy(bridge: Any, ids: Tensor, edits: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
    with no_retained_graph(bridge), interventions(bridge, edits):
        log_probs = bridge(ids)[:, :-1].double().log_softmax(-1)
    return -log_probs.gather(-1, ids[:, 1:, None])[..., 0]


def _metrics(per_text: dict[str, np.ndarray], squares: Tensor) -> dict[str, float]:
    n = per_text["predictions"].sum()
    ce = {name: float(per_text[name].sum() / n) for name in _CONDITIONS}
    found = {f"ce_{name}": value for name, value in ce.items()}
    for name, (more, less) in _SHARES.items():
        below = 1.0 if name == "ce_rise" else ce["reconstruction"] - ce["clean"]
        found[name] = (ce[more] - ce[less]) / below if below else float("nan")
    total = float(squares.sum())
    return found | {"linear_norm_share": float(squares[0]) / total if total else float("nan")}


def _check_parts(dictionary: Dictionary, parts: DarkMatter) -> None:
    if dictionary.is_transcoder:
        raise ValueError(
            f"this dictionary is a transcoder to {dictionary.target_hook!r}; its error is not one of what it reads"
        )
    fitted, own = (json.loads(json.dumps(found)) for found in (parts.provenance["dictionary"], dictionary.settings()))
    if fitted != own:
        raise ValueError(
            f"parts are those of a dictionary with {fitted['n_latents']} latents at {fitted['hook']!r}, and this one "
            f"has {dictionary.n_latents} at {dictionary.hook!r} (or other settings); pass its own dark_matter(...)"
        )
    if "encoder" not in (codes := [str(code) for code in parts.values["code"].values]):
        raise ValueError(f'parts were fitted to {", ".join(codes)}; expected "encoder" among the codes')


def _counted(tokens: Tensor, keep: Tensor | None, skip_first: int, batch_size: int) -> Tensor:
    n, length = tokens.shape
    if not 0 <= skip_first < length - 1 or batch_size < 1:
        raise ValueError(
            f"skip_first={skip_first} of {length} positions, batch_size={batch_size}; expected a next token to predict "
            f"and batches of at least 1"
        )
    counted = torch.ones(n, length, dtype=torch.bool) if keep is None else keep.bool().cpu().clone()
    if counted.shape != tokens.shape:
        raise ValueError(f"keep has shape {tuple(counted.shape)}, tokens {tuple(tokens.shape)}")
    counted[:, :skip_first] = False
    if not bool((counted[:, :-1] & counted[:, 1:]).any()):
        raise ValueError("keep leaves no two neighbouring positions: there is nothing to predict")
    return counted
