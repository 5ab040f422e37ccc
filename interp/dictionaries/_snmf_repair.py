"""Moving the component that is needed least to where the residual is largest.

Alternating updates of a sparse factorisation stop in states in which two components share what one could carry, or one
carries what belongs to two, while something else is not represented at all. No block update leaves such a state; a
swap does, and it is kept only if what the fit ranks its pairs by falls (loss and penalty), so that repairing cannot
harm. Which component is tried is decided by the squared error alone: that is a proposal.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries._snmf_steps import Data, gram, gram_loss, own_energy, winner_take_all

_POWER_ROUNDS = 10
_LEAST_GAIN = 1e-4
"""Share of loss and penalty that a swap has to gain: dropping a component and finding it again gains a little, for
nothing."""


def repair(
    data: Data,
    components: Float[Tensor, "component neuron"],
    codes: Float[Tensor, "component token"],
    keep: int,
    limit: int,
    penalty: float = 0.0,
) -> tuple[Float[Tensor, "component neuron"], Float[Tensor, "component token"], int]:
    """Swap until one does not lower loss and penalty, at most `limit` times. Returns factors and how many were kept.

    A swap costs about `2 * _POWER_ROUNDS` products of the data with one vector: that of a few iterations.
    """
    for done in range(limit):
        cross = data.against_components(components, keep)
        component_gram, code_gram = gram(components), gram(codes)
        loss = gram_loss(data.total, cross, codes, component_gram, code_gram)
        loss += penalty * own_energy(component_gram, code_gram)
        trial = _free_one(components, codes, component_gram, code_gram, cross, keep)
        if trial is None:
            return components, codes, done
        new_components, new_codes, freed = trial
        direction, strength = _from_residual(data, new_components, new_codes, keep)
        new_components[freed], new_codes[freed] = direction, strength
        new_cross = data.against_components(new_components, keep)
        component_gram, code_gram = gram(new_components), gram(new_codes)
        new_loss = gram_loss(data.total, new_cross, new_codes, component_gram, code_gram)
        new_loss += penalty * own_energy(component_gram, code_gram)
        if not new_loss < loss * (1.0 - _LEAST_GAIN):
            return components, codes, done
        components, codes = new_components, new_codes
    return components, codes, limit


def merge_costs(
    component_gram: Float[Tensor, "component component"], code_gram: Float[Tensor, "component component"]
) -> Float[Tensor, "component component"]:
    """Squared error of replacing each pair of components by the best single one; infinite on the diagonal.

    The part of a pair has rank two, and what one component cannot hold of it is its smaller squared singular value:
    the smaller eigenvalue of the product of the two 2 x 2 Gram matrices. What the residual adds is left out.
    """
    directions, strengths = component_gram.diagonal(), code_gram.diagonal()
    own = directions * strengths
    trace = own[:, None] + own + 2.0 * component_gram * code_gram
    area = (directions[:, None] * directions - component_gram.square()).clamp(min=0.0)
    area *= (strengths[:, None] * strengths - code_gram.square()).clamp(min=0.0)
    smaller = (trace - (trace.square() - 4.0 * area).clamp(min=0.0).sqrt()) / 2.0
    return smaller.fill_diagonal_(torch.inf)


def _free_one(
    components: Float[Tensor, "component neuron"],
    codes: Float[Tensor, "component token"],
    component_gram: Float[Tensor, "component component"],
    code_gram: Float[Tensor, "component component"],
    cross: Float[Tensor, "component token"],
    keep: int,
) -> tuple[Float[Tensor, "component neuron"], Float[Tensor, "component token"], int] | None:
    """Copies of the factors with one component empty: dropped, or merged into another, whichever costs less."""
    own = component_gram.diagonal() * code_gram.diagonal()
    with_residual = (codes.double() * cross.double()).sum(1) - (component_gram * code_gram).sum(1)
    dropping = own + 2.0 * with_residual
    freed = int(dropping.argmin())
    new_components, new_codes = components.clone(), codes.clone()
    if len(components) > 1:
        merging = merge_costs(component_gram, code_gram)
        pair = int(merging.argmin())
        if float(merging.flatten()[pair]) < float(dropping[freed]):
            first, second = divmod(pair, len(components))
            stays, freed = (first, second) if own[first] >= own[second] else (second, first)
            merged = _merged(components[[stays, freed]], codes[[stays, freed]], keep)
            new_components[stays], new_codes[stays] = merged
    elif float(own[freed]) > 0.0:
        return None
    new_components[freed], new_codes[freed] = 0.0, 0.0
    return new_components, new_codes, freed


def _merged(
    pair: Float[Tensor, "2 neuron"], pair_codes: Float[Tensor, "2 token"], keep: int, rounds: int = 5
) -> tuple[Float[Tensor, "neuron"], Float[Tensor, "token"]]:
    """The best single sparse component, near enough, for the sum of two."""
    direction = pair[0]
    strength = pair_codes[0]
    for _ in range(rounds):
        strength = (pair @ direction / _positive(direction)) @ pair_codes
        strength = strength.clamp(min=0.0)
        direction = winner_take_all((pair_codes @ strength / _positive(strength)) @ pair, keep)
    return direction, strength


def _from_residual(
    data: Data, components: Float[Tensor, "component neuron"], codes: Float[Tensor, "component token"], keep: int
) -> tuple[Float[Tensor, "neuron"], Float[Tensor, "token"]]:
    """A sparse, non-negative component of the residual, by power iteration from its largest row.

    The residual is never formed: data minus product, applied to a vector, is two small products.
    """
    cross = data.against_components(components, keep)
    small = gram(components).to(codes.dtype)
    energy = data.energies - 2.0 * (cross * codes).sum(0) + (codes * (small @ codes)).sum(0)
    start = int(energy.argmax())
    direction = winner_take_all(data.rows[start] - codes[:, start] @ components, keep)

    def strength_of(direction: Tensor) -> Tensor:
        along = data.against_direction(direction) - (components @ direction) @ codes
        return (along / _positive(direction)).clamp(min=0.0)

    for _ in range(_POWER_ROUNDS):
        strength = strength_of(direction)
        back = strength @ data.rows - (codes @ strength) @ components
        direction = winner_take_all(back / _positive(strength), keep)
    return direction, strength_of(direction)


def _positive(vector: Tensor) -> float:
    """Squared norm of a vector to divide by; one where it is zero."""
    return float(vector.double().square().sum()) or 1.0
