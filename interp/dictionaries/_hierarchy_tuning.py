"""Tuning all levels of a hierarchy together by exact block descent: non-negative weights, sparse components.

Level m explains the data by `codes.T @ weights[0] @ ... @ weights[m - 1] @ components[m]`. The loss is the sum of
squared errors of the levels that count: all of them, or the coarsest alone. Given the codes and their products with the
data, everything else is a matter of small matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries._snmf_steps import Data, gram, sweep_codes, sweep_components

_WEIGHT_STEPS = 10
_COMPONENT_SWEEPS = 20


@dataclass
class Chain:
    """Factors of a hierarchy: codes [finest, token], weights [finer, coarser], components [component, neuron]."""

    codes: Float[Tensor, "finest token"]
    weights: list[Float[Tensor, "_ _"]]
    components: list[Float[Tensor, "_ neuron"]]

    def effective(self, level: int, start: int = 0) -> Float[Tensor, "component neuron"]:
        """What one unit of each code of level `start` adds to the data according to `level`."""
        product = self.components[level]
        for weight in reversed(self.weights[start:level]):
            product = weight @ product
        return product


def tune(
    data: Data,
    chain: Chain,
    keep: int,
    *,
    counted: Sequence[int],
    max_iter: int,
    tol: float,
    on_iteration: Callable[[float], object] = lambda loss: None,
) -> list[float]:
    """Lower the loss in all factors, in place. Returns the loss before and after every iteration.

    Each block is set to its optimum or moved down a majorant of the loss, its own constraint kept throughout, so that
    no iteration raises the loss.
    """
    code_gram, from_codes = gram(chain.codes), data.against_codes(chain.codes).double()
    losses = [sum(chain_losses(data.total, chain, counted, code_gram, from_codes))]
    for _ in range(max_iter):
        effective = [chain.effective(level) for level in counted]
        inner = torch.stack([gram(product) for product in effective]).sum(0)
        chain.codes = sweep_codes(chain.codes, inner, torch.stack(effective).sum(0) @ data.rows.T)
        code_gram, from_codes = gram(chain.codes), data.against_codes(chain.codes).double()
        for level in range(len(chain.weights)):
            _improve_weights(chain, level, counted, code_gram, from_codes)
        refit_components(chain, counted, keep, code_gram, from_codes, sweeps=1)
        losses.append(sum(chain_losses(data.total, chain, counted, code_gram, from_codes)))
        on_iteration(losses[-1])
        if losses[-2] - losses[-1] <= tol * losses[-1]:
            break
    return losses


def chain_losses(
    total: float, chain: Chain, levels: Sequence[int], code_gram: Tensor, from_codes: Tensor
) -> list[float]:
    """Squared error of the data, of each of these levels."""
    losses = []
    for level in levels:
        wide = chain.effective(level).double()
        losses.append(total - 2.0 * float((wide * from_codes).sum()) + float((gram(wide) * code_gram).sum()))
    return losses


def refit_components(
    chain: Chain,
    levels: Sequence[int],
    keep: int,
    code_gram: Tensor,
    from_codes: Tensor,
    sweeps: int = _COMPONENT_SWEEPS,
) -> None:
    """Better sparse components of these levels for their codes, in place."""
    mixing = torch.eye(len(code_gram), dtype=torch.float64, device=code_gram.device)
    for level in range(max(levels) + 1):
        if level:
            mixing = mixing @ chain.weights[level - 1].double()
        if level not in levels:
            continue
        components = chain.components[level]
        inner, cross = mixing.T @ code_gram @ mixing, (mixing.T @ from_codes).to(components.dtype)
        for _ in range(sweeps):
            components = sweep_components(components, inner, cross, keep)
        chain.components[level] = components


def _improve_weights(chain: Chain, level: int, counted: Sequence[int], code_gram: Tensor, from_codes: Tensor) -> None:
    """Steps on one non-negative matrix, neither of which can raise the loss: multiplicative, which adapts to the scale
    of each entry but cannot leave zero, and projected gradient, which can."""
    inner, outer, linear = code_gram, torch.zeros(()), torch.zeros(())
    for product in (chain.effective(m, start=level + 1).double() for m in counted if m > level):
        outer, linear = outer.to(product) + product @ product.T, linear.to(product) + from_codes @ product.T
    for left in chain.weights[:level]:
        wide = left.double()
        inner, linear = wide.T @ inner @ wide, wide.T @ linear
    curvature = float(torch.linalg.matrix_norm(inner, 2) * torch.linalg.matrix_norm(outer, 2))
    if curvature <= 0.0:
        return
    weight = chain.weights[level].double()
    for _ in range(_WEIGHT_STEPS):
        through = inner @ weight
        up = linear.clamp(min=0.0) + through @ outer.clamp(max=0.0).neg()
        down = linear.clamp(max=0.0).neg() + through @ outer.clamp(min=0.0)
        weight = weight * (up / down.clamp(min=1e-300)).sqrt()
        weight = (weight - (inner @ weight @ outer - linear) / curvature).clamp(min=0.0)
    chain.weights[level] = weight.to(chain.weights[level].dtype)
