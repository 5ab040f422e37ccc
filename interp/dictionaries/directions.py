"""Other directions from labelled activations: contrasts by principal component, readings, covariances, probes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.cache import capture
from interp.dictionaries.kl_strength import require_unpadded
from interp.dictionaries.vectors import SteeringVector, cosine, separation, two_sets


def last_activations(
    bridge: Any,
    tokens: Int[Tensor, "example pos"],
    hook: str,
    *,
    lengths: Int[Tensor, " example"] | None = None,
    batch_size: int | None = None,
) -> Float[Tensor, "example ..."]:
    """Activations at the last token of every prompt, from one forward up to the hook's layer.

    Args:
        lengths: Tokens of each prompt, where some are padded on the right.

    Raises:
        ValueError: If rows end in padding and `lengths` is not given: position -1 would read pad tokens, a fault of
            several steering codebases.
    """
    require_unpadded(bridge, tokens, lengths)
    at = torch.full((len(tokens),), tokens.shape[1] - 1) if lengths is None else lengths.cpu().long() - 1
    return capture(bridge, tokens, hook, positions=at, batch_size=batch_size)[hook].float().cpu()


def principal_direction(
    positive: Float[Tensor, "pair ..."],
    negative: Float[Tensor, "pair ..."],
    *,
    hook: str,
    centred: bool = False,
    name: str = "principal",
) -> SteeringVector:
    """The first principal direction of paired differences, of their mean length, turned towards their mean.

    Library PCA centres its input, and the mean of the differences is the very contrast that is wanted: with
    `centred=True`, here to compare with, what remains is how the pairs differ from one another.
    `info["cos_mean_difference"]` says how much of the contrast the direction holds.

    Args:
        positive, negative: Row i of the one is the counterpart of row i of the other.

    Raises:
        ValueError: If the rows are not paired, or, when centred, there are fewer than two pairs.

    Source:
        PCA-contrast of Hojer et al. 2025 (ICLR); the popular control-vector code centres. Uncentred by default here.
    """
    positive, negative = two_sets(positive, negative)
    if len(positive) != len(negative) or (centred and len(positive) < 2):
        raise ValueError(f"{len(positive)} and {len(negative)} rows; expected pairs, and two or more when centred")
    differences = (positive - negative).flatten(1)
    mean = differences.mean(0)
    values = differences - mean if centred else differences
    _, sizes, right = torch.linalg.svd(values, full_matrices=False)
    first = right[0] * (1.0 if float(right[0] @ mean) >= 0 else -1.0)
    info = {
        "centred": centred,
        "cos_mean_difference": cosine(first, mean),
        "share": round(float(sizes[0] ** 2 / (sizes**2).sum()), 4),
        "n_pairs": len(positive),
    }
    length = differences.norm(dim=1).mean()
    shaped = (first * length).reshape(positive.shape[1:]).float()
    return SteeringVector(shaped, hook, name, "principal_centred" if centred else "principal", info)


def reading_direction(
    positive: Float[Tensor, "n ..."],
    *,
    hook: str,
    background: Float[Tensor, "m ..."],
    subtract: bool = True,
    name: str = "reading",
) -> SteeringVector:
    """The mean activation with the concept, less the mean over any text.

    Args:
        background: Activations of text of all kinds, the concept's or not.
        subtract: False gives the plain mean of the "reading" method, which is mostly the mean of all activations:
            `info["cos_mean_activation"]` says how much.

    Source:
        Hojer et al. 2025 (ICLR), "reading", which does not subtract.
    """
    positive, background = two_sets(positive, background)
    everything, mean = background.mean(0), positive.mean(0)
    values = mean - everything if subtract else mean
    info = {"subtracted": subtract, "cos_mean_activation": cosine(values, everything)}
    return SteeringVector(values.float(), hook, name, "reading", info)


def covariance_direction(
    activations: Float[Tensor, "n ..."],
    property: Float[Tensor, " n"],
    *,
    hook: str,
    centred: bool = True,
    name: str = "covariance",
) -> SteeringVector:
    """Covariance of activations with any number per prompt: entropy, confidence, length, loss.

    It is what a property-weighted mean activation adds to the plain mean (their difference, divided by the mean of
    the property), so `centred=False`, the weighted mean itself, is mostly the mean activation;
    `info["cos_mean_activation"]` says how much.

    Args:
        property: One number per row; positive ones when not centred, since they are weights.

    Raises:
        ValueError: If it is constant, or, as weights, not positive in sum.

    Source:
        Entropic activation steering (Rahn et al. 2024) weights by the entropy of the action and does not centre.
    """
    rows, weights = activations.detach().double().cpu(), property.detach().double().cpu()
    if weights.shape != rows.shape[:1] or len(rows) < 2 or not bool((weights != weights[0]).any()):
        raise ValueError(
            f"activations have shape {tuple(rows.shape)} and the property {tuple(weights.shape)}; expected one number "
            f"per row, not all alike"
        )
    mean = rows.mean(0)
    if centred:
        values = torch.tensordot(weights - weights.mean(), rows - mean, dims=1) / len(rows)
    elif bool((weights < 0).any()):
        raise ValueError("a weighted mean needs weights of 0 or more; use centred=True for a property with both signs")
    else:
        values = torch.tensordot(weights / weights.sum(), rows, dims=1)
    info = {"centred": centred, "cos_mean_activation": cosine(values, mean)}
    return SteeringVector(values.float(), hook, name, "covariance", info)


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier of single activations: a direction to steer along, and a gate for `steer`.

    `probe(activations)` is True where it says yes: `steer(..., gate=probe)` then acts there only.

    Attributes:
        weight: In the units of the activations, one number per unit.
        bias: Added; the decision is at 0.
        accuracy, auroc: On the held-out share of the rows, in their class balance.
        l2: The penalty it was fitted with.
    """

    weight: Float[Tensor, "..."]
    bias: float
    hook: str
    accuracy: float
    auroc: float
    l2: float

    def score(self, activations: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Log-odds of the positive class, over the leading axes of the activations."""
        flat = activations.float().flatten(activations.ndim - self.weight.ndim)
        return flat @ self.weight.flatten().to(flat.device) + self.bias

    def __call__(self, activations: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return self.score(activations) > 0

    def vector(self, *, name: str = "probe") -> SteeringVector:
        """Its weight as a direction of length 1. Good for telling classes apart; steering often wants `diff_means`."""
        info = {"accuracy": self.accuracy, "auroc": self.auroc}
        return SteeringVector(self.weight, self.hook, name, "probe", info).unit()


def fit_probe(
    positive: Float[Tensor, "n_positive ..."],
    negative: Float[Tensor, "n_negative ..."],
    *,
    hook: str,
    l2: float | int = 1e-2,
    held_out: float = 0.25,
    seed: int = 0,
) -> Probe:
    """A logistic probe on standardised activations, classes weighted equally, scored on rows it was not fitted on.

    The loss is convex and solved to a gradient below 1e-6 in float64; equal rows give an equal probe.

    Args:
        l2: Penalty on half the squared weights of the standardised problem, against a mean loss.
        held_out: Share of each class kept for `accuracy` and `auroc`.

    Raises:
        ValueError: If a class has fewer than four rows. RuntimeError: If the solver does not converge.
    """
    positive, negative = two_sets(positive, negative)
    if min(len(positive), len(negative)) < 4 or not 0 < held_out < 1 or l2 <= 0:
        raise ValueError(
            f"{len(positive)} and {len(negative)} rows, held_out={held_out}, l2={l2}; expected four or more rows of "
            f"each class, a share between 0 and 1, and a penalty above 0"
        )
    width = positive.shape[1:]
    draws = torch.Generator().manual_seed(seed)
    kept, out = [], []
    for rows in (positive.flatten(1), negative.flatten(1)):
        order = torch.randperm(len(rows), generator=draws)
        n_out = max(1, round(held_out * len(rows)))
        out.append(rows[order[:n_out]])
        kept.append(rows[order[n_out:]])
    x = torch.cat(kept)
    y = torch.cat([torch.ones(len(kept[0])), torch.zeros(len(kept[1]))]).double()
    balance = torch.where(y > 0, 0.5 / len(kept[0]), 0.5 / len(kept[1]))
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-12 * float(x.abs().max()) + 1e-300)
    weight, bias = _solve((x - mean) / scale, y, balance, float(l2))
    raw = weight / scale
    shift = float(bias - mean @ raw)
    scores = [rows @ raw + shift for rows in out]
    right = (float((scores[0] > 0).double().mean()) + float((scores[1] <= 0).double().mean())) / 2
    return Probe(
        raw.reshape(width).float(), shift, hook, round(right, 4), round(separation(scores[0], scores[1]), 4), float(l2)
    )


def _solve(x: Tensor, y: Tensor, balance: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Minimise the balanced logistic loss plus l2 / 2 |w|^2; the intercept is not penalised."""
    parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [parameters], max_iter=2000, tolerance_grad=1e-8, tolerance_change=0.0, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> Tensor:
        solver.zero_grad()
        logits = x @ parameters[:-1] + parameters[-1]
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
        value = (balance * each).sum() + l2 / 2 * parameters[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
        loss()
    worst = float(parameters.grad.abs().max()) if parameters.grad is not None else 0.0
    if worst > 1e-6:
        raise RuntimeError(f"the probe did not converge: its largest gradient is {worst:.1e}; raise l2 (now {l2})")
    return parameters.detach()[:-1], parameters.detach()[-1]
