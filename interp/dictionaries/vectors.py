"""Directions to steer along: what a vector is, where it acts, and how it is made from activations or a dictionary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.detection import auroc
from interp.hooks import hook_name, layer_of, resolve
from interp.models import geometry


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction at one hook point, in the units of the activations there.

    Attributes:
        values: Shape of the activation of one token at the hook: `[d_model]` for the residual stream, `[d_mlp]` for
            `mlp.hook_post`, `[head, d_head]` for `attn.hook_z`.
        hook: The hook's name, such as `interp.hooks.hook_name("neuron", 2)`.
        name: What it stands for; labels tables and figures.
        kind: How it was made, such as `"diff_means"`.
        info: What its making says of it: cosines, shares, accuracy.
    """

    values: Float[Tensor, "..."]
    hook: str
    name: str = "vector"
    kind: str = "given"
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = self.values.detach()
        if values.ndim == 0 or not bool(torch.isfinite(values).all()):
            raise ValueError(f"{self.name!r} has shape {tuple(values.shape)}; expected finite numbers, one per unit")
        if not bool(values.any()):
            raise ValueError(f"{self.name!r} is zero everywhere: there is no direction to steer along")
        object.__setattr__(self, "values", values.float().cpu())

    @property
    def norm(self) -> float:
        return float(self.values.norm())

    def unit(self) -> SteeringVector:
        """The same direction with length 1."""
        return replace(self, values=self.values / self.norm)

    def reversed(self) -> SteeringVector:
        """The opposite direction."""
        return replace(self, values=-self.values, name=f"-{self.name}")


@dataclass(frozen=True, eq=False)
class SteeringLatent(SteeringVector):
    """A latent of a dictionary, to steer by: see `latent_vectors`.

    `values` is what one unit of the latent adds at `hook`, the hook that the dictionary rebuilds (with
    `normalisation="layer_norm"` or `"constant_norm"`: times the spread of each token). Where a vector is added, that is
    what it is. In `steer` and `generate_steered` the other modes act on the latent, as the dictionary encodes it in
    that very forward: `"clamp"` sets it to `strength`, `"ablate"` takes `strength` times its value away.

    Attributes:
        dictionary: Whose latent it is.
        latent: Its number.
    """

    dictionary: Any = field(kw_only=True)
    latent: int = field(kw_only=True)

    def plain(self) -> SteeringVector:
        """The direction alone."""
        return SteeringVector(self.values, self.hook, self.name, self.kind, self.info)

    def unit(self) -> SteeringVector:
        """The direction alone, with length 1: no unit of the latent any more."""
        return self.plain().unit()

    def reversed(self) -> SteeringVector:
        """The opposite direction, which is no latent."""
        return self.plain().reversed()

    def require_one_length(self) -> None:
        """Raise where a unit of the latent adds a vector of another length at every token."""
        if self.dictionary.normalisation in ("layer_norm", "constant_norm"):
            raise ValueError(
                f"a unit of {self.name!r} adds a vector of another length at every token, since normalisation "
                f"{self.dictionary.normalisation!r} is undone token by token; add vector.plain(), or clamp the latent"
            )


def through_w_out(bridge: Any, vector: SteeringVector) -> SteeringVector:
    """What adding a vector to the neurons of a layer adds to the MLP's output: the vector times W_out.

    Adding `s * vector` at `mlp.hook_post` and `s * through_w_out(...)` at its hook give the same logits, for every
    strength. The hook is `hook_mlp_out`; in models that normalise the MLP's output before adding it (Gemma 2), it is
    `mlp.hook_out`, before that norm, since no vector in the residual stream does the same there. Clamping and
    ablating do not map: they read the neurons. No forward.

    Raises:
        ValueError: If the vector is not one of `mlp.hook_post`, or does not have one number per neuron.

    Source:
        Shafran, Geiger & Geva 2025 (arXiv:2506.10920) add feature vectors at `hook_post` and those of the baselines at
        `hook_mlp_out`; for Gemma they add the post-norm of `b_out + W_out z`, which is another edit than that of the
        neurons.
    """
    layer = layer_of(bridge, vector.hook)
    if layer is None or not 0 <= layer < len(bridge.blocks) or vector.hook != hook_name("neuron", layer):
        raise ValueError(f"{vector.name!r} acts at {vector.hook!r}; only vectors at mlp.hook_post go through W_out")
    weight = bridge.blocks[layer].mlp.W_out.detach()
    if vector.values.shape != weight.shape[:1]:
        raise ValueError(
            f"{vector.name!r} has shape {tuple(vector.values.shape)}, layer {layer} has {len(weight)} neurons"
        )
    mapped = (vector.values.double() @ weight.cpu().double()).float()
    hook = f"blocks.{layer}.mlp.hook_out" if geometry(bridge).post_norm else hook_name("mlp_out", layer)
    resolve(bridge, hook)
    return replace(vector, values=mapped, hook=hook, info={**vector.info, "through": "W_out"})


def diff_means(
    positive: Float[Tensor, "n_positive ..."],
    negative: Float[Tensor, "n_negative ..."],
    *,
    hook: str,
    name: str = "diff_means",
) -> SteeringVector:
    """Mean activation with the concept minus mean activation without it: the supervised baseline.

    Not normalised: strength 1 moves the mean of the one set to that of the other.

    Args:
        positive, negative: Activations of tokens (or prompts), one row each; rows need not be paired.

    Raises:
        ValueError: If a set is empty, the shapes differ, or the means are equal.

    Source:
        The difference-in-means baseline of arXiv:2506.10920, section 4, which scales it to length 1.
    """
    positive, negative = two_sets(positive, negative)
    difference = positive.mean(0) - negative.mean(0)
    everything = torch.cat([positive, negative]).mean(0)
    info = {
        "n_positive": len(positive),
        "n_negative": len(negative),
        "auroc": round(separation(*((rows * difference).flatten(1).sum(1) for rows in (positive, negative))), 4),
        "cos_mean_activation": cosine(difference, everything),
    }  # fmt: skip
    return SteeringVector(difference.float(), hook, name, "diff_means", info)


def random_directions(
    n: int,
    *,
    like: SteeringVector | None = None,
    hook: str | None = None,
    activations: Float[Tensor, "n_tokens ..."] | None = None,
    norm: float | int | None = None,
    seed: int = 0,
    name: str = "random",
) -> list[SteeringVector]:
    """Random directions to compare with, of the length and at the hook of the vector that they stand against.

    Without `activations` they are isotropic. With them they are random combinations of centred activations, hence of
    the activations' own covariance: the harder control, since directions in which activations never vary do little.

    Args:
        like: The vector whose hook, shape and length they take.
        hook, norm: Instead of `like`, with `activations`; `norm` is 1 if not given.

    Raises:
        ValueError: If neither `like` nor `hook` with `activations` is given, or both are.
    """
    if n < 1:
        raise ValueError(f"n={n} directions; expected at least 1")
    if (like is None) == (hook is None) or (like is None and activations is None):
        raise ValueError("pass like=vector, or hook= together with activations=")
    draws = torch.Generator().manual_seed(seed)
    if activations is None:
        assert like is not None
        made = torch.randn(n, *like.values.shape, generator=draws)
    else:
        rows = activations.detach().float().cpu()
        rows = rows - rows.mean(0)
        if like is not None and rows.shape[1:] != like.values.shape:
            raise ValueError(f"activations have shape {tuple(rows.shape)}, the vector {tuple(like.values.shape)}")
        made = torch.tensordot(torch.randn(n, len(rows), generator=draws), rows, dims=1)
    length = float(norm) if norm is not None else like.norm if like is not None else 1.0
    where = like.hook if like is not None else str(hook)
    kind = "random" if activations is None else "random_covariance"
    return [
        SteeringVector(row / row.norm() * length, where, f"{name} {i}" if n > 1 else name, kind, {"seed": seed})
        for i, row in enumerate(made)
    ]


def dictionary_vectors(
    dictionary: Any, hook: str, features: Sequence[int] | None = None, *, unit: bool = True
) -> list[SteeringVector]:
    """Features of a dictionary as vectors: rows of `components_` (SNMF) or of `W_dec` (sparse autoencoders).

    Args:
        dictionary: An object with one of the two, or the matrix `[feature, width]` itself.
        hook: Where the dictionary's activations were taken.
        features: Which rows; all that are not zero by default.
        unit: Scale each to length 1, as both literatures do.

    Raises:
        ValueError: If a row does not exist or, when it is asked for, is zero (a dead feature).
    """
    own = next((name for name in ("components_", "W_dec") if hasattr(dictionary, name)), None)
    matrix = torch.as_tensor(getattr(dictionary, own) if own else dictionary).detach()
    kind = type(dictionary).__name__.lower() if own else "given"
    if matrix.ndim != 2:
        raise ValueError(f"the dictionary's matrix has shape {tuple(matrix.shape)}; expected [feature, width]")
    alive = matrix.abs().sum(1) > 0
    chosen = torch.where(alive)[0].tolist() if features is None else [int(feature) for feature in features]
    if wrong := [feature for feature in chosen if not 0 <= feature < len(matrix)]:
        raise ValueError(f"features {wrong[:8]} do not exist; the dictionary has 0 to {len(matrix) - 1}")
    if dead := [feature for feature in chosen if not alive[feature]]:
        raise ValueError(f"features {dead[:8]} are zero (dead): there is no direction to steer along")
    vectors = [SteeringVector(matrix[i], hook, f"feature {i}", kind, {"feature": i}) for i in chosen]
    return [vector.unit() for vector in vectors] if unit else vectors


def choose_feature(activations: Float[Tensor, "n_tokens n_features"], labelled: Any) -> tuple[int, float]:
    """The feature whose activation tells labelled tokens from others best, and its area under the ROC curve.

    Choose on other tokens than those that the comparison is made on.

    Args:
        labelled: Bool, one per token.
    """
    truth = torch.as_tensor(labelled).bool().cpu()
    rows = activations.detach().float().cpu()
    if rows.ndim != 2 or len(rows) != len(truth) or truth.all() or not truth.any():
        raise ValueError(
            f"activations have shape {tuple(rows.shape)} and {int(truth.sum())} of {len(truth)} labels are set; "
            f"expected one label per row and rows of both kinds"
        )
    areas = auroc(rows, truth[:, None])[0]
    best = int(areas.argmax())
    return best, float(areas[best])


def separation(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve of scores: how often a positive one is above a negative one, ties counted half."""
    truth = torch.arange(len(positive) + len(negative)) < len(positive)
    return float(auroc(torch.cat([positive, negative])[:, None], truth[:, None]))


def two_sets(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in float64 on the CPU, once they are known to fit together."""
    if positive.ndim < 2 or positive.shape[1:] != negative.shape[1:] or 0 in (len(positive), len(negative)):
        raise ValueError(
            f"activations have shapes {tuple(positive.shape)} and {tuple(negative.shape)}; expected [n, ...] with at "
            f"least one row each and the same width"
        )
    return positive.detach().double().cpu(), negative.detach().double().cpu()


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return round(float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300)), 6)
