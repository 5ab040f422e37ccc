"""Tuning all levels of a hierarchy together by exact block descent: non-negative weights, sparse components.

Level m explains the data by `codes.T @ weights[0] @ ... @ weights[m - 1] @ components[m]`. The loss is the sum of
squared errors of the levels that count, all of them or the coarsest alone, and the penalty of SNMF: the energy
that each component of those levels has by itself. It is quadratic in every factor, like the squared error. Given the
codes and their products with the data, everything else is a matter of small matrices.
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
        """What one unit of each code of level `start` adds to the data according to `level`, in fp64."""
        return self.mixing(level, start) @ self.components[level].double()

    def mixing(self, level: int, start: int = 0) -> Float[Tensor, "code component"]:
        """What one unit of each code of level `start` adds to the codes of `level`, in fp64."""
        product = torch.eye(len(self.components[start]), dtype=torch.float64, device=self.codes.device)
        for weight in self.weights[start:level]:
            product = product @ weight.double()
        return product

    def curvature(self, level: int, penalty: float, start: int = 0) -> Float[Tensor, "code code"]:
        """The matrix of the quadratic form that error and penalty of `level` are in the codes of level `start`."""
        inner, mixing = gram(self.components[level]), self.mixing(level, start)
        return mixing @ (inner + penalty * inner.diagonal().diag()) @ mixing.T


def tune(
    data: Data,
    chain: Chain,
    keep: int,
    *,
    counted: Sequence[int],
    penalty: float = 0.0,
    max_iter: int,
    tol: float,
    on_iteration: Callable[[float], object] = lambda loss: None,
) -> list[float]:
    """Lower loss and penalty in all factors, in place. Returns their sum before and after every iteration.

    Each block is set to its optimum or moved down a majorant of the sum, its own constraint kept throughout, so that
    no iteration raises the sum.
    """
    code_gram, from_codes = gram(chain.codes), data.against_codes(chain.codes).double()
    losses = [sum(chain_losses(data.total, chain, counted, code_gram, from_codes, penalty))]
    for _ in range(max_iter):
        chain.codes = sweep_codes(chain.codes, *_for_codes(data, chain, counted, penalty))
        code_gram, from_codes = gram(chain.codes), data.against_codes(chain.codes).double()
        for level in range(len(chain.weights)):
            _improve_weights(chain, level, counted, code_gram, from_codes, penalty)
        refit_components(chain, counted, keep, code_gram, from_codes, penalty, sweeps=1)
        losses.append(sum(chain_losses(data.total, chain, counted, code_gram, from_codes, penalty)))
        on_iteration(losses[-1])
        if losses[-2] - losses[-1] <= tol * losses[-1]:
            break
    return losses


def settle_chain(data: Data, chain: Chain, counted: Sequence[int], rounds: int = 20) -> None:
    """Codes and weights for the squared error alone, components as they are: the penalty made both too small."""
    for _ in range(rounds):
        chain.codes = sweep_codes(chain.codes, *_for_codes(data, chain, counted, 0.0))
        code_gram, from_codes = gram(chain.codes), data.against_codes(chain.codes).double()
        for level in range(len(chain.weights)):
            _improve_weights(chain, level, counted, code_gram, from_codes, 0.0)


def chain_losses(
    total: float,
    chain: Chain,
    levels: Sequence[int],
    code_gram: Tensor,
    from_codes: Tensor,
    penalty: float = 0.0,
) -> list[float]:
    """Squared error of the data, of each of these levels, and its penalty."""
    losses = []
    for level in levels:
        linear = float((chain.effective(level) * from_codes).sum())
        losses.append(total - 2.0 * linear + float((chain.curvature(level, penalty) * code_gram).sum()))
    return losses


def _for_codes(data: Data, chain: Chain, counted: Sequence[int], penalty: float) -> tuple[Tensor, Tensor]:
    """The quadratic and the linear part of the objective in the finest codes."""
    inner = torch.stack([chain.curvature(level, penalty) for level in counted]).sum(0)
    effective = torch.stack([chain.effective(level) for level in counted]).sum(0)
    return inner, effective.to(data.rows) @ data.rows.T


def refit_components(
    chain: Chain,
    levels: Sequence[int],
    keep: int,
    code_gram: Tensor,
    from_codes: Tensor,
    penalty: float = 0.0,
    sweeps: int = _COMPONENT_SWEEPS,
) -> None:
    """Better sparse components of these levels for their codes, in place."""
    for level in levels:
        mixing, components = chain.mixing(level), chain.components[level]
        inner, cross = mixing.T @ code_gram @ mixing, (mixing.T @ from_codes).to(components.dtype)
        for _ in range(sweeps):
            components = sweep_components(components, inner, cross, keep, penalty)
        chain.components[level] = components


def _improve_weights(
    chain: Chain, level: int, counted: Sequence[int], code_gram: Tensor, from_codes: Tensor, penalty: float
) -> None:
    """Steps on one non-negative matrix, neither of which can raise the objective: multiplicative, which adapts to the
    scale of each entry but cannot leave zero, and projected gradient, which can."""
    inner, outer, linear = code_gram, torch.zeros(()), torch.zeros(())
    for m in (m for m in counted if m > level):
        outer = outer.to(inner) + chain.curvature(m, penalty, start=level + 1)
        linear = linear.to(inner) + from_codes @ chain.effective(m, start=level + 1).T
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
