"""The steps that every SNMF solver is made of: products with sparse components, sparsity, block updates, the loss.

Inside the solvers both factors lie with their components first: `components` [component, neuron] and `codes`
[component, token], so that the data [token, neuron] is about `codes.T @ components`. Sums of squares and the small
matrices of inner products are fp64 whatever the data is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag

_SPARSE_BELOW = 0.08
"""Share of kept neurons below which gathering rows beats the dense product on a CPU (measured: even at about 0.1)."""
_CHUNK = 128
"""Tokens widened to fp64 at a time."""
CODE_FLOOR = 1e-12
"""Least code of the multiplicative rule, over its component's largest: it could never leave 0, and below lie numbers
that a CPU multiplies a hundred times more slowly."""


@dataclass(frozen=True, eq=False)
class Data:
    """The matrix being factorised, and the two products that an iteration needs of it."""

    rows: Float[Tensor, "token neuron"]

    @cached_property
    def columns(self) -> Float[Tensor, "neuron token"]:
        return self.rows.T.contiguous()

    @cached_property
    def total(self) -> float:
        """Sum of squares."""
        return sum(float(part.double().square().sum()) for part in self.rows.split(_CHUNK))

    @cached_property
    def energies(self) -> Float[Tensor, "token"]:
        """Sum of squares of every token."""
        return self.rows.square().sum(1)

    def against_direction(self, direction: Float[Tensor, "neuron"]) -> Float[Tensor, "token"]:
        """Inner product of every token with one vector that is mostly zero."""
        index = direction.nonzero()[:, 0]
        if self.rows.device.type != "cpu" or len(index) > _SPARSE_BELOW * len(direction):
            return self.rows @ direction
        return direction[index] @ self.columns[index]

    def against_codes(self, codes: Float[Tensor, "component token"]) -> Float[Tensor, "component neuron"]:
        return codes @ self.rows

    def against_components(
        self, components: Float[Tensor, "component neuron"], keep: int
    ) -> Float[Tensor, "component token"]:
        """Inner products of every component with every token; sparse where that is faster."""
        d_neurons = components.shape[1]
        if self.rows.device.type != "cpu" or keep > _SPARSE_BELOW * d_neurons:
            return components @ self.rows.T
        index = components.abs().topk(keep).indices  # the zeros among them add nothing
        weights = components.gather(1, index)
        return embedding_bag(index, self.columns, mode="sum", per_sample_weights=weights)


def gram(matrix: Float[Tensor, "component _"]) -> Float[Tensor, "component component"]:
    """Inner products of the rows, in fp64."""
    wide = matrix.double()
    return wide @ wide.T


def kept_neurons(sparsity: float, d_neurons: int) -> int:
    """Entries that winner-take-all leaves in a component: ceil(sparsity * d_neurons), at least one."""
    # The product is rounded first: 0.07 * 100 is 7.000000000000001, and its ceiling would be 8.
    return max(1, math.ceil(round(sparsity * d_neurons, 9)))


def winner_take_all(values: Float[Tensor, "*rows neuron"], keep: int) -> Float[Tensor, "*rows neuron"]:
    """The `keep` largest magnitudes of each row, zero elsewhere; of equal ones those of the lowest index."""
    if keep >= values.shape[-1]:
        return values
    size = values.abs()
    least = size.topk(keep, dim=-1).values[..., -1:]
    above, level = size > least, size == least
    room = keep - above.sum(-1, keepdim=True)
    return torch.where(above | (level & (level.cumsum(-1) <= room)), values, 0.0)


def sweep_components(
    components: Float[Tensor, "component neuron"],
    code_gram: Float[Tensor, "component component"],
    cross: Float[Tensor, "component neuron"],
    keep: int,
    penalty: float = 0.0,
) -> Float[Tensor, "component neuron"]:
    """Each component in turn as the exact best one with `keep` entries, all else fixed.

    With one component free the neurons do not interact, so the least squares solution cut to its largest entries is
    the optimum under the constraint, and no step can raise the loss (with `penalty` times the energy of each component
    by itself). `cross` is codes times data.
    """
    new = components.clone()
    small = code_gram.to(new.dtype)
    for k, weight in enumerate(code_gram.diagonal().tolist()):
        if weight <= 0.0:
            new[k] = 0.0
            continue
        new[k] = winner_take_all((new[k] * weight + cross[k] - small[k] @ new) / (weight * (1.0 + penalty)), keep)
    return new


def sweep_codes(
    codes: Float[Tensor, "component token"],
    component_gram: Float[Tensor, "component component"],
    cross: Float[Tensor, "component token"],
    penalty: float = 0.0,
) -> Float[Tensor, "component token"]:
    """The codes of each component in turn as the exact best non-negative ones. `cross` is components times data."""
    new = codes.clone()
    small = component_gram.to(new.dtype)
    for k, weight in enumerate(component_gram.diagonal().tolist()):
        if weight <= 0.0:
            new[k] = 0.0
            continue
        rest = cross[k] - small[k] @ new
        new[k].mul_(weight).add_(rest).div_(weight * (1.0 + penalty)).clamp_(min=0.0)
    return new


def solve_components(
    code_gram: Float[Tensor, "component component"], cross: Float[Tensor, "component neuron"], ridge: float
) -> Float[Tensor, "component neuron"]:
    """All components at once by regularised least squares, dense."""
    n_components = len(code_gram)
    eye = torch.eye(n_components, dtype=torch.float64, device=code_gram.device)
    scale = float(code_gram.diagonal().mean()) or 1.0
    inverse = torch.linalg.inv(code_gram + ridge * scale * eye)
    return inverse.to(cross.dtype) @ cross


def multiply_codes(
    codes: Float[Tensor, "component token"],
    component_gram: Float[Tensor, "component component"],
    cross: Float[Tensor, "component token"],
) -> Float[Tensor, "component token"]:
    """All codes at once by the multiplicative rule of Ding, Li and Jordan (2010), which never raises the loss."""
    small = component_gram.to(codes.dtype)
    up = cross.clamp(min=0.0).add_(small.clamp(max=0.0).neg() @ codes)
    down = cross.clamp(max=0.0).neg_().add_(small.clamp(min=0.0) @ codes)
    # Keeps 0/0 at zero; relative to the numbers it is added to, so that the scale of the data does not matter.
    down.add_(1e-9 * float(cross.abs().mean()) + torch.finfo(down.dtype).tiny)
    new = up.div_(down).sqrt_().mul_(codes)
    return torch.maximum(new, CODE_FLOOR * new.amax(1, keepdim=True))


def unit_codes(
    components: Float[Tensor, "component neuron"], codes: Float[Tensor, "component token"]
) -> tuple[Float[Tensor, "component neuron"], Float[Tensor, "component token"]]:
    """The same product with the codes of every component at norm one; those of a dead component stay zero."""
    norms = torch.linalg.vector_norm(codes, dim=1, keepdim=True, dtype=torch.float64)
    norms = torch.where(norms > 0, norms, 1.0).to(codes.dtype)
    return components * norms, codes / norms


def gram_loss(
    total: float,
    cross: Float[Tensor, "component token"],
    codes: Float[Tensor, "component token"],
    component_gram: Float[Tensor, "component component"],
    code_gram: Float[Tensor, "component component"],
) -> float:
    """Squared error of the product without forming it. `cross` is components times data, for these components."""
    linear = sum(float((a.double() * b.double()).sum()) for a, b in zip(cross.split(64), codes.split(64), strict=True))
    return total - 2.0 * linear + float((component_gram * code_gram).sum())


def own_energy(
    component_gram: Float[Tensor, "component component"], code_gram: Float[Tensor, "component component"]
) -> float:
    """Sum over components of the energy that each has by itself: large where they cancel each other."""
    return float((component_gram.diagonal() * code_gram.diagonal()).sum())


def exact_loss(
    rows: Float[Tensor, "token neuron"],
    components: Float[Tensor, "component neuron"],
    codes: Float[Tensor, "component token"],
) -> float:
    """Squared error of the product, in fp64, a few tokens at a time."""
    wide = components.double()
    loss = 0.0
    for part, code in zip(rows.split(_CHUNK), codes.split(_CHUNK, dim=1), strict=True):
        loss += float((part.double() - code.double().T @ wide).square().sum())
    return loss


def best_codes(
    codes: Float[Tensor, "component token"],
    component_gram: Float[Tensor, "component component"],
    cross: Float[Tensor, "component token"],
    *,
    tol: float = 1e-6,
    max_sweeps: int = 200,
) -> Float[Tensor, "component token"]:
    """Non-negative least squares codes for fixed components, from `codes` on.

    Ends when no code moved by more than `tol` of the largest of its component in one sweep.
    """
    for _ in range(max_sweeps):
        before = codes
        codes = sweep_codes(codes, component_gram, cross)
        moved = (codes - before).abs().amax(1)
        if bool((moved <= tol * codes.amax(1)).all()):
            break
    return codes
