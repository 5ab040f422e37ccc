"""The latents of a dictionary as a site: what a change of them, or of the error, adds to the model's activation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.types import Site


@runtime_checkable
class LatentDictionary(Protocol):
    """What a dictionary must have for its latents to be a site; those of `interp.dictionaries` do.

    Attributes:
        hook: Name of the hook that is read.
        target_hook: Name of the hook that is rebuilt; None where it is the one that is read.
        n_latents: Number of latents.
    """

    hook: str
    target_hook: str | None
    n_latents: int

    def encode(self, x: Any) -> Any:
        """Latents `[..., n_latents]` of activations `[..., width]`."""
        ...

    def decode(self, latents: Any, x: Any) -> Any:
        """The reconstruction, affine in the latents; `x` is what was read, for those that need it."""
        ...


@dataclass(frozen=True)
class Change:
    """What goes in minus what the run has, at every position.

    Attributes:
        latents: Of the chosen latents.
        scale: What the directions are multiplied by at each token; None for 1.
        error: Of all that the latents (the chosen and the others) do not carry, at the hook that is rebuilt.
    """

    latents: Float[Tensor, "row pos latent"]
    scale: Float[Tensor, "row pos 1"] | None
    error: Float[Tensor, "row pos width"]


@dataclass(frozen=True)
class LatentSite:
    """A dictionary in its place.

    Attributes:
        hook, target: The hooks that are read and rebuilt.
        layer: The block of the second.
        site: What the second is called as a site, None if it is none.
        chosen: The latents that are asked for.
        directions: What one unit of each of them adds at `target`; times `scale`, where the reconstruction is put back
            into each token's own units.
        probe: What a vector-Jacobian product of decoding is taken with, and gave, at the token that `directions` are
            of; None where they are the same for all tokens.
    """

    dictionary: Any
    hook: str
    target: str
    layer: int
    site: Site | None
    chosen: Int[Tensor, "latent"]
    directions: Float[Tensor, "latent width"]
    probe: tuple[Tensor, Tensor] | None

    @property
    def names(self) -> list[str]:
        """The hooks to read."""
        return list(dict.fromkeys((self.hook, self.target)))

    @property
    def key(self) -> tuple[str, int]:
        """What is rebuilt, as the passes of attribution name it: site and layer, or the hook and its layer."""
        return (self.target if self.site is None else self.site, self.layer)

    @property
    def width(self) -> int:
        return int(self.directions.shape[1])

    @cached_property
    def record(self) -> dict[str, Any]:
        """For the provenance: which dictionary, and which of its latents."""
        n = int(self.dictionary.n_latents)
        found = {
            "architecture": str(getattr(self.dictionary, "architecture", type(self.dictionary).__name__)),
            "hook": self.hook,
            "target_hook": self.target,
            "n_latents": n,
            "fingerprint": fingerprint(self.dictionary),
        }
        whole = torch.equal(self.chosen, torch.arange(n))
        return {"dictionary": found, "latents": "all" if whole else self.chosen.tolist()}

    @property
    def title(self) -> str:
        """The site as results name it."""
        return f"latents of {self.target}" if self.hook == self.target else f"latents of {self.hook} to {self.target}"

    @torch.no_grad()
    def encode(self, x: Tensor) -> Float[Tensor, "row pos all"]:
        """All latents of what is read, which may have several axes per token."""
        return self.dictionary.encode(x.flatten(2))

    @torch.no_grad()
    def change(self, x: Tensor, own: Tensor, latents: Tensor, new: Tensor | None) -> Change:
        """From the run that read `x` and had `own` to these latents and the activations `new` they belong to.

        Without `new` the activations are what the latents decode to, so that the error goes to zero.
        """
        x, own = x.flatten(2), own.flatten(2)
        before = self.encode(x)
        after = self.dictionary.decode(latents, x)
        decoded = after - self.dictionary.decode(before, x)
        error = (after if new is None else new.flatten(2)) - own - decoded
        chosen = self.chosen.to(before.device)
        return Change((latents - before)[..., chosen], self._scale(x), error)

    def scores(
        self, change: Change, coefficient: Float[Tensor, "row pos ..."], *, together: bool
    ) -> Float[Tensor, "row pos unit"]:
        """Change times coefficient (of the rebuilt activation) of each chosen latent, or of all, and of the error."""
        coefficient = coefficient.flatten(2)
        latents = change.latents.to(coefficient) * (coefficient @ self.directions.to(coefficient).T)
        if change.scale is not None:
            latents = latents * change.scale.to(coefficient)
        error = (change.error.to(coefficient) * coefficient).sum(-1, keepdim=True)
        return torch.cat([latents.sum(-1, keepdim=True) if together else latents, error], -1)

    def _scale(self, x: Tensor) -> Tensor | None:
        if self.probe is None:
            return None
        against, reference = (tensor.to(x.device) for tensor in self.probe)
        given = pullback(self.dictionary, x, against.expand(*x.shape[:2], -1))
        return (given @ reference / reference.square().sum()).unsqueeze(-1)


def fingerprint(dictionary: Any) -> str | None:
    """Of the parameters and buffers, whatever device they are on; None if there are none to read."""
    if not hasattr(dictionary, "state_dict"):
        return None
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(dictionary.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pullback(dictionary: Any, x: Tensor, against: Tensor, at: Tensor | None = None) -> Tensor:
    """Gradient of the product of the reconstruction and `against` with respect to the latents, `[..., latent]`."""
    with torch.inference_mode(False), torch.enable_grad():
        shape = (*x.shape[:-1], int(dictionary.n_latents))
        like = parameter_of(dictionary)
        zero = torch.zeros(shape, dtype=(x if like is None else like).dtype, device=x.device)
        latents = zero if at is None else at.clone()
        latents = latents.requires_grad_()
        rebuilt = dictionary.decode(latents, x.detach().clone())
        return torch.autograd.grad(rebuilt, latents, against.to(rebuilt))[0].detach()


def parameter_of(dictionary: Any) -> Tensor | None:
    """One of its parameters, which says its dtype and device."""
    return next(iter(dictionary.parameters()), None) if hasattr(dictionary, "parameters") else None
