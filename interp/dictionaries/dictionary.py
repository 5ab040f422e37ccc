"""What every dictionary of features has in common: an encoder, a decoder, where it is read and what it rebuilds.

An autoencoder rebuilds the activations it reads; a transcoder (`target_hook` given) those of another hook, such as an
MLP's output from its input. Every architecture does both. Activations are `[..., d_in]`, latents `[..., n_latents]`,
reconstructions `[..., d_out]`; pre-activations are `(x - b_dec) @ W_enc + b_enc`, reconstructions
`latents @ W_dec + b_dec (+ x @ W_skip.T)`, both in normalised units.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interp.dictionaries._parallel import ALONE, Peers

D = TypeVar("D", bound="Dictionary")
Normalisation = Literal["none", "mean_norm", "mean_square", "layer_norm", "constant_norm"]
Decoder = Literal["free", "unit", "rescaled"]
_EPS = 1e-5  # as in SAELens, added on the way in and not on the way out


@dataclass(frozen=True)
class Step:
    """What one training step needs to know, in normalised units.

    Attributes:
        loss: The scalar to differentiate.
        terms: Its parts by name, weighted as they enter the sum.
        reconstruction: [token, d_out].
        fired: Which latents were active on some token of the batch, [latent].
        l0: Active latents per token.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    reconstruction: Tensor
    fired: Tensor
    l0: float


class Dictionary(nn.Module, ABC):
    """A dictionary of `n_latents` features. Subclasses say how pre-activations become latents and what is trained.

    Args:
        d_in: Width of what is read.
        n_latents: Number of features.
        d_out: Width of what is rebuilt; `d_in` unless a transcoder says otherwise.
        hook: Name of the hook that is read (see `interp.hooks.names`).
        target_hook: Name of the hook that is rebuilt; None for an autoencoder.
        skip: Add a linear map of the input to the reconstruction (skip transcoder), zero at first.
        normalisation: `"mean_norm"` multiplies inputs by one number so that their mean norm is sqrt(d_in) (SAELens:
            expected_average_only_in), `"mean_square"` so that their mean squared norm is 1 (dictionary_learning); both
            must be estimated (`estimate_normalisation`) and can be folded away. `"layer_norm"` standardises and
            `"constant_norm"` sets the norm of every token to sqrt(d_in); these two are undone after decoding.
        subtract_bias: Whether `b_dec` is subtracted from the input. None: for autoencoders only.
        decoder: `"unit"` keeps rows of W_dec at norm 1 (`project_gradient`, `renormalise`); `"rescaled"` treats them
            as if they were: pre-activations are multiplied by the rows' norms before anything is chosen, and latents
            divided by them before decoding (SAELens: rescale_acts_by_decoder_norm); `"free"` does neither.
        decoder_norm: Norm of the rows of W_dec at the start (1 if `decoder="unit"`).
        seed: Of the initial weights.
    """

    architecture: ClassVar[str] = ""
    needs_gradient: ClassVar[bool] = False  # whether `step` takes the gradient of the model's loss
    peers: Peers = ALONE  # processes that have the rest of the batch that `step` is given
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    input_scale: Tensor
    target_scale: Tensor

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        *,
        d_out: int | None = None,
        hook: str = "",
        target_hook: str | None = None,
        skip: bool = False,
        normalisation: Normalisation = "none",
        subtract_bias: bool | None = None,
        decoder: Decoder = "free",
        decoder_norm: float | int = 0.1,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        transcoder = target_hook is not None
        _check(d_in, n_latents, d_out, hook, target_hook, skip, normalisation, subtract_bias, decoder, decoder_norm)
        self.d_in, self.n_latents, self.d_out = d_in, n_latents, d_out or d_in
        self.hook, self.target_hook, self.skip = hook, target_hook, skip
        self.normalisation: Normalisation = normalisation
        self.subtract_bias = not transcoder if subtract_bias is None else subtract_bias
        self.decoder: Decoder = decoder
        self.decoder_norm, self.seed = float(decoder_norm), seed
        self.metadata: dict[str, Any] = {}
        draws = torch.Generator().manual_seed(seed)
        rows = torch.randn(n_latents, self.d_out, generator=draws, dtype=torch.float64)
        rows /= rows.norm(dim=1, keepdim=True)
        columns = rows.T
        if self.d_out != d_in:
            columns = torch.randn(d_in, n_latents, generator=draws, dtype=torch.float64)
            columns /= columns.norm(dim=0, keepdim=True)
        norm = 1.0 if decoder == "unit" else self.decoder_norm
        # W_enc lies in memory latent by latent, as its sparse gradient does: no transposed copies in training
        encoder = (columns * norm).to(dtype).T.contiguous().T
        self.W_enc = nn.Parameter(encoder.to(device))
        self.W_dec = nn.Parameter((rows * norm).to(dtype).to(device))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, dtype=dtype, device=device))
        if skip:
            self.W_skip = nn.Parameter(torch.zeros(self.d_out, d_in, dtype=dtype, device=device))
        self._add_parameters(dtype, torch.device(device))
        self.register_buffer("input_scale", torch.tensor(float("nan") if self._constant else 1.0, dtype=torch.float64))
        self.register_buffer("target_scale", self.input_scale.clone())

    def _add_parameters(self, dtype: torch.dtype, device: torch.device) -> None:
        """Parameters beyond the encoder and decoder matrices; gated dictionaries have others."""
        self.b_enc = nn.Parameter(torch.zeros(self.n_latents, dtype=dtype, device=device))

    # What subclasses define.

    @abstractmethod
    def activate(self, preactivations: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch latent"]:
        """Latents of pre-activations, as at inference."""

    @abstractmethod
    def step(
        self,
        inputs: Float[Tensor, "token d_in"],
        targets: Float[Tensor, "token d_out"] | None = None,
        *,
        coefficient: float | int | None = None,
        dead: Bool[Tensor, " latent"] | None = None,
    ) -> Step:
        """Losses of one batch, with a graph to the parameters.

        Args:
            inputs, targets: Activations as they come from the model; targets for transcoders only.
            coefficient: Of the sparsity penalty; None for the architecture's own, where it has one.
            dead: Latents that have been silent for long, for the auxiliary losses that revive them.
        """

    # What all share.

    @property
    def is_transcoder(self) -> bool:
        return self.target_hook is not None

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of `x`, or of the target's activations that belong to it."""
        return self.decode(self.encode(x), x)

    def preactivations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch latent"]:
        """What the latents are decided on, in normalised units (times the decoder's norms if `"rescaled"`)."""
        return self._preactivations(self._normalised(x))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch latent"]:
        """Latents as at inference, zero where a latent is off."""
        return self.activate(self.preactivations(x))

    def decode(
        self, latents: Float[Tensor, "*batch latent"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction from latents; `x` is needed by skip connections and by normalisation token by token."""
        per_token = self.normalisation in ("layer_norm", "constant_norm")
        if x is None and (self.skip or per_token):
            why = "its skip connection" if self.skip else f"normalisation {self.normalisation!r}, which is undone"
            raise ValueError(f"this dictionary decodes with {why} by token; pass the inputs: decode(latents, x)")
        out = self._decoded(latents)
        if x is not None:
            if self.skip:
                out = out + self._normalised(x) @ self.W_skip.T
            if per_token:
                return out * self._spread(x) + (x.mean(-1, keepdim=True) if self.normalisation == "layer_norm" else 0)
        return out / self._scale(self.target_scale, out)

    def directions(self, latents: Sequence[int] | None = None) -> Float[Tensor, "latent d_out"]:
        """What one unit of each latent adds to the reconstruction; all of them by default.

        In the units of the activations, times each token's spread where normalisation is undone token by token.
        """
        rows = self._rows()
        rows = rows if latents is None else rows[torch.as_tensor(latents, dtype=torch.long, device=rows.device)]
        return rows / self._scale(self.target_scale, rows)

    def estimate_normalisation(
        self, inputs: Float[Tensor, "token d_in"], targets: Float[Tensor, "token d_out"] | None = None
    ) -> None:
        """Fix the constants of `"mean_norm"` and `"mean_square"` from a sample; nothing to do for the others."""
        if self._constant:
            self._check_targets(targets)
            self.input_scale.fill_(self._constant_for(inputs))
            self.target_scale.fill_(self._constant_for(inputs if targets is None else targets))

    def folded(self: D) -> D:
        """A new dictionary without normalising constants, with `decoder="free"` instead of `"rescaled"`, and with the
        same latents and reconstructions."""
        new = copy.deepcopy(self)
        if self._constant or self.decoder == "rescaled":
            scale_in, scale_out = self._scale(self.input_scale, self.W_enc), self._scale(self.target_scale, self.W_dec)
            with torch.no_grad():
                new._fold(scale_in, scale_out)
        if self._constant:
            new.normalisation = "none"
            new.input_scale.fill_(1.0)
            new.target_scale.fill_(1.0)
        return new

    def _fold(self, scale_in: Tensor, scale_out: Tensor) -> None:
        """Move the constants into the weights, keeping the latents."""
        if self.decoder == "rescaled":
            norms = self.W_dec.norm(dim=1)  # latents are in these units already
            self.W_enc.mul_(norms)
            self.b_enc.mul_(norms)
            self.W_dec.div_(norms[:, None])
            self.decoder = "free"
        elif self.decoder == "unit":
            self.decoder = "free"  # its rows change length, and need not be kept at 1 any more
        self.W_enc.mul_(scale_in)
        self.W_dec.div_(scale_out)
        self.b_dec.div_(scale_out)
        if self.skip:
            self.W_skip.mul_(scale_in / scale_out)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """With `decoder="unit"`: take from the decoder's gradient what would change the rows' norms."""
        if self.decoder == "unit" and self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad.sub_(along * self.W_dec)

    @torch.no_grad()
    def renormalise(self) -> None:
        """With `decoder="unit"`: bring the decoder's rows back to norm 1 after a step of the optimiser."""
        if self.decoder == "unit":
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    def settings(self) -> dict[str, Any]:
        """The arguments that build this dictionary anew, as plain values: see `interp.dictionaries.build`."""
        found: dict[str, Any] = {"architecture": self.architecture}
        for cls in type(self).__mro__:
            if "__init__" in cls.__dict__ and cls is not nn.Module and cls is not object:
                found |= {
                    name: getattr(self, name)
                    for name, p in inspect.signature(cls.__init__).parameters.items()
                    if p.kind is not p.VAR_KEYWORD and name not in ("self", "dtype", "device")
                }
            if cls is Dictionary:
                break
        return found | {"dtype": str(self.W_dec.dtype).removeprefix("torch.")}

    # Internals, in normalised units.

    @property
    def _constant(self) -> bool:
        return self.normalisation in ("mean_norm", "mean_square")

    def _constant_for(self, x: Tensor) -> float:
        norms = x.double().norm(dim=-1)
        if self.normalisation == "mean_norm":
            return float(x.shape[-1] ** 0.5 / norms.mean())
        return float(norms.square().mean().rsqrt())

    def _scale(self, scale: Tensor, like: Tensor) -> Tensor:
        if bool(scale.isnan()):
            raise ValueError(
                f"normalisation {self.normalisation!r} has not been estimated; call estimate_normalisation(inputs) on "
                f"a sample of activations, or train with interp.dictionaries.train, which does"
            )
        return scale.to(like.device, like.dtype)

    def _spread(self, x: Tensor) -> Tensor:
        if self.normalisation == "layer_norm":
            return x.std(-1, keepdim=True)
        return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5

    def _normalised(self, x: Tensor) -> Tensor:
        x = x.to(self.W_enc.dtype)
        if self.normalisation == "none":
            return x
        if self._constant:
            return x * self._scale(self.input_scale, x)
        return (
            (x - x.mean(-1, keepdim=True)) / (self._spread(x) + _EPS)
            if self.normalisation == "layer_norm"
            else x / self._spread(x)
        )

    def _batch(self, inputs: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a training step, normalised."""
        self._check_targets(targets)
        z = self._normalised(inputs)
        if targets is None:
            return z, z
        return z, targets.to(z.dtype) * self._scale(self.target_scale, z)

    def _check_targets(self, targets: Tensor | None) -> None:
        if (targets is not None) != self.is_transcoder:
            raise ValueError(
                f"a transcoder to {self.target_hook!r} needs targets"
                if self.is_transcoder
                else "an autoencoder rebuilds its inputs; targets are for transcoders (target_hook=...)"
            )

    def _centred(self, z: Tensor) -> Tensor:
        return z - self.b_dec if self.subtract_bias else z

    def _preactivations(self, z: Tensor) -> Tensor:
        pre = self._centred(z) @ self.W_enc + self.b_enc
        return pre * self.W_dec.norm(dim=1) if self.decoder == "rescaled" else pre

    def _rows(self) -> Tensor:
        """The decoder that goes with the latents."""
        return self.W_dec / self.W_dec.norm(dim=1, keepdim=True) if self.decoder == "rescaled" else self.W_dec

    def _decoded(self, latents: Tensor) -> Tensor:
        return latents @ self._rows() + self.b_dec

    def _skipped(self, z: Tensor) -> Tensor | float:
        return z @ self.W_skip.T if self.skip else 0.0


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error summed over the width, averaged over tokens."""
    return (prediction - target).square().sum(-1).mean()


def dense_step(dictionary: Dictionary, latents: Tensor, z: Tensor, target: Tensor, **penalties: Tensor) -> Step:
    """The step of an architecture whose latents are a dense matrix with a graph."""
    reconstruction = dictionary._decoded(latents) + dictionary._skipped(z)
    terms = {"reconstruction": squared_error(reconstruction, target), **penalties}
    on = latents.detach() != 0
    loss = torch.stack(list(terms.values())).sum()
    return Step(loss, terms, reconstruction.detach(), on.any(0), float(on.sum()) / len(z))


def _check(
    d_in: int,
    n_latents: int,
    d_out: int | None,
    hook: str,
    target_hook: str | None,
    skip: bool,
    normalisation: str,
    subtract_bias: bool | None,
    decoder: str,
    decoder_norm: float | int,
) -> None:
    for name, size in (("d_in", d_in), ("n_latents", n_latents), ("d_out", d_out or 1)):
        if size < 1:
            raise ValueError(f"{name}={size}; expected at least 1")
    if target_hook is None and (d_out not in (None, d_in) or skip):
        raise ValueError(
            f"d_out={d_out} and skip={skip} are for transcoders: give target_hook, the hook that is rebuilt; an "
            f"autoencoder rebuilds its own {d_in} inputs"
        )
    if subtract_bias and target_hook is not None:
        raise ValueError("subtract_bias=True is for autoencoders: a transcoder's b_dec belongs to its target")
    if normalisation in ("layer_norm", "constant_norm") and target_hook is not None:
        raise ValueError(
            f"normalisation {normalisation!r} is undone with the statistics of the input, which are not those of a "
            f'transcoder\'s target; use "mean_norm" or "mean_square"'
        )
    if normalisation not in ("none", "mean_norm", "mean_square", "layer_norm", "constant_norm"):
        raise ValueError(f"normalisation={normalisation!r} is unknown; see interp.dictionaries.Dictionary")
    if decoder not in ("free", "unit", "rescaled"):
        raise ValueError(f'decoder={decoder!r}; expected "free", "unit" or "rescaled"')
    if not decoder_norm > 0:
        raise ValueError(f"decoder_norm={decoder_norm}; expected above 0")
