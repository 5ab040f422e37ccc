"""Other latents for the same decoder: found by gradient pursuit, or the encoder's own times one factor each.

They tell apart what a dictionary's error owes to its encoder from what its decoder cannot express.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries.dictionary import Dictionary

MAX_RESCALED = 16_384  # a [latent, latent] matrix in float64: 2 GiB


@torch.no_grad()
def gradient_pursuit(
    dictionary: Dictionary,
    x: Float[Tensor, "*batch width"],
    k: int | Int[Tensor, "*tokens"] | None = None,
    *,
    keep_better: bool = True,
    batch_size: int = 2048,
) -> Float[Tensor, "*batch latent"]:
    """Latents for `x` by inference-time gradient pursuit on the decoder; the encoder is not asked for them.

    From the residual r = x - b_dec, `k` times: the atom (decoder row, as a unit vector) with the largest positive
    inner product with r joins the support; all coefficients of the support take the step along the gradient that
    leaves the smallest residual, and those that would be negative become 0. Without such clipping, steps never raise
    the residual. At most `k` latents are above 0.

    Clipping and greed can end above the encoder's error. With `keep_better`, a token whose encoder has no more than `k`
    latents and rebuilds it at least as well keeps the encoder's latents, so that the residual is never above the
    encoder's at equal L0.

    Args:
        k: Atoms per token, or one number for each; by default each token's own number of active latents.
        keep_better: Without it, what pursuit itself found.
        batch_size: Tokens at once; memory is a few times batch_size * n_latents.

    Returns:
        Latents as `dictionary.decode` takes them.

    Raises:
        ValueError: For transcoders, negative `k`, or a `k` that does not fit `x`.

    Source:
        Blumensath & Davies 2008, with coefficients of at least 0 as in Google DeepMind's notes on dictionaries (2024),
        and used by Engels et al. 2024 (arXiv:2410.14670). Theirs may pick an atom twice; ours picks new ones.
    """
    check_autoencoder(dictionary, x)
    flat = x.reshape(-1, x.shape[-1])
    if isinstance(k, Tensor):
        if tuple(k.shape) != tuple(x.shape[:-1]):
            raise ValueError(f"k has shape {tuple(k.shape)}; expected one number per token, {tuple(x.shape[:-1])}")
        wanted: Tensor | None = k.reshape(-1).to(flat.device)
    else:
        wanted = None if k is None else torch.full((len(flat),), k, device=flat.device)
    if wanted is not None and bool((wanted < 0).any()):
        raise ValueError(f"k={int(wanted.min())}; expected 0 or more atoms")
    found = []
    for start in range(0, len(flat), batch_size):
        rows = slice(start, start + batch_size)
        encoded = dictionary.encode(flat[rows])
        own = (encoded != 0).sum(1)
        steps = own if wanted is None else wanted[rows].clamp(max=dictionary.n_latents)
        latents = _pursued(dictionary, flat[rows], steps).to(encoded.dtype)
        if keep_better:
            theirs, ours = (_missed(dictionary, codes, flat[rows]) for codes in (encoded, latents))
            latents = torch.where(((theirs <= ours) & (own <= steps))[:, None], encoded, latents)
        found.append(latents)
    return torch.cat(found).reshape(*x.shape[:-1], dictionary.n_latents)


def _pursued(dictionary: Dictionary, x: Tensor, steps: Tensor) -> Tensor:
    directions = dictionary.directions()
    norms = directions.norm(dim=1)
    atoms = directions / norms.clamp(min=torch.finfo(norms.dtype).tiny)[:, None]
    base, spread = offset_of(dictionary, x)
    target = (x.to(atoms.dtype) - base) / spread
    coefficients = target.new_zeros(len(x), len(atoms))
    support = (norms == 0).expand(len(x), -1).clone()  # atoms without a direction are never picked
    absent, residual = support.clone(), target
    for step in range(int(steps.max()) if len(steps) else 0):
        inner = residual @ atoms.T
        best = inner.masked_fill(support, -torch.inf).max(1)
        joins = (best.values > 0) & (steps > step)
        support[joins, best.indices[joins]] = True
        gradient = inner * (support & ~absent) * (steps > step)[:, None]
        move = gradient @ atoms
        length = (move * residual).sum(1) / move.square().sum(1).clamp(min=torch.finfo(move.dtype).tiny)
        coefficients = (coefficients + length[:, None] * gradient).clamp(min=0)
        residual = target - coefficients @ atoms
    return coefficients / norms.clamp(min=torch.finfo(norms.dtype).tiny)


def _missed(dictionary: Dictionary, latents: Tensor, x: Tensor) -> Tensor:
    return (x.double() - dictionary.decode(latents, x).double()).square().sum(1)


def offset_of(dictionary: Dictionary, x: Float[Tensor, "token width"]) -> tuple[Tensor, Tensor | float]:
    """What is decoded from no latent at all, and by how much each token's decoded latents are multiplied."""
    base = dictionary.decode(x.new_zeros(len(x), dictionary.n_latents).to(dictionary.W_dec.dtype), x)
    per_token = dictionary.normalisation in ("layer_norm", "constant_norm")
    return base, dictionary._spread(x.to(base.dtype)) if per_token else 1.0


@torch.no_grad()
def rescaling(
    dictionary: Dictionary, x: Float[Tensor, "token width"], *, batch_size: int = 4096
) -> Float[Tensor, " latent"]:
    """One factor per latent, all chosen together, with which the encoder's latents rebuild `x` best in squares.

    Shrunken latents get factors above 1. Latents that do not fire on `x` keep the factor 1.

    Raises:
        ValueError: For transcoders, and above 16,384 latents, which would need more than 2 GiB.
    """
    check_autoencoder(dictionary, x)
    n = dictionary.n_latents
    if n > MAX_RESCALED:
        raise ValueError(
            f"{n:,} latents: factors for all of them together take a matrix of {n:,} x {n:,}, and {MAX_RESCALED:,} is "
            f'the most allowed; leave out "rescaled"'
        )
    directions = dictionary.directions().double()
    together = torch.zeros(n, n, dtype=torch.float64, device=x.device)
    aligned = torch.zeros(n, dtype=torch.float64, device=x.device)
    for rows in x.split(batch_size):
        base, spread = offset_of(dictionary, rows)
        latents = (dictionary.encode(rows) * spread).double()
        together += latents.T @ latents
        aligned += (latents * ((rows.double() - base.double()) @ directions.T)).sum(0)
    together *= directions @ directions.T
    strength = together.diagonal().clone()
    lively = strength > 0
    together.diagonal()[~lively] = 1.0
    aligned[~lively] = 1.0
    # A trifle towards the factor 1, so that latents which always fire together do not get opposite huge factors.
    trifle = 1e-8 * torch.where(lively, strength, 0.0)
    return torch.linalg.solve(together + trifle.diag(), aligned + trifle)


def check_autoencoder(dictionary: Dictionary, x: Tensor) -> None:
    """Raise unless the dictionary rebuilds what it reads, and rows are as wide as it is and on its device."""
    if dictionary.is_transcoder:
        raise ValueError(
            f"this dictionary is a transcoder to {dictionary.target_hook!r}; its error is not one of what it reads"
        )
    if x.shape[-1] != dictionary.d_in:
        raise ValueError(
            f"activations are {x.shape[-1]} wide and the dictionary {dictionary.d_in}; flatten further axes"
        )
    if x.device != dictionary.W_dec.device:
        raise ValueError(f"activations are on {x.device} and the dictionary on {dictionary.W_dec.device}; move one")
