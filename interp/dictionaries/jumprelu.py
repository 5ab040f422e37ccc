"""The JumpReLU dictionary: a latent is its pre-activation where that exceeds a learned threshold, and zero elsewhere.

The threshold is learned through straight-through estimates with a rectangular kernel of width `bandwidth` around it.
Penalties: `"l0"`, coefficient * L0; `"tanh"`, coefficient * sum tanh(scale f_i |d_i|); `"quadratic"`,
coefficient * 2 / target * (L0 - target)^2 per token; `"ratio"`, coefficient * (mean L0 / target - 1)^2.

Sources: Rajamanoharan et al. 2024 (arXiv 2407.14435); Anthropic, Circuits Updates January 2025 (tanh, gradient to the
input, and the term for dead latents); Gemma Scope 2 and SAELens 6 (quadratic); dictionary_learning (ratio). Like
SAELens, the threshold is a parameter itself, in float32, and not its logarithm, which hardly moves under Adam.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from interp.dictionaries.dictionary import Dictionary, Step, dense_step

Penalty = Literal["l0", "tanh", "quadratic", "ratio"]


class JumpReLUSAE(Dictionary):
    """JumpReLU with a threshold per latent, [n_latents], strictly exceeded.

    Args:
        penalty: See above; `"quadratic"` and `"ratio"` need `target_l0`.
        coefficient: Weight of the penalty.
        threshold_start: First value of all thresholds.
        bandwidth: Width of the kernel, in units of pre-activations.
        tanh_scale: Of the tanh penalty.
        gradient_to_input: Let the straight-through estimates reach the encoder as well (Anthropic), not the threshold
            alone (DeepMind).
        dead_coefficient: Weight of sum over dead latents of relu(threshold - pre) |d_i|, which pulls them up; or 0.
    """

    architecture = "jumprelu"

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        *,
        penalty: Penalty = "l0",
        coefficient: float | int = 1.0,
        target_l0: float | int | None = None,
        threshold_start: float | int = 0.01,
        bandwidth: float | int = 0.05,
        tanh_scale: float | int = 4.0,
        gradient_to_input: bool = False,
        dead_coefficient: float | int = 0.0,
        **options: Any,
    ) -> None:
        if penalty not in ("l0", "tanh", "quadratic", "ratio"):
            raise ValueError(f'penalty={penalty!r}; expected "l0", "tanh", "quadratic" or "ratio"')
        if penalty in ("quadratic", "ratio") and not (target_l0 is not None and 0 < target_l0 <= n_latents):
            raise ValueError(f"penalty {penalty!r} needs target_l0 between 0 and {n_latents}, got {target_l0}")
        if coefficient < 0 or dead_coefficient < 0 or not bandwidth > 0 or threshold_start < 0:
            raise ValueError(
                f"coefficient={coefficient}, dead_coefficient={dead_coefficient}, threshold_start={threshold_start} "
                f"must not be negative, and bandwidth={bandwidth} must be above 0"
            )
        if options.get("decoder") == "rescaled":
            raise ValueError('decoder="rescaled" is not defined for JumpReLU dictionaries; use "free" or "unit"')
        self.threshold_start = float(threshold_start)  # _add_parameters, called by the base, needs it
        super().__init__(d_in, n_latents, **options)
        self.penalty: Penalty = penalty
        self.coefficient, self.bandwidth = float(coefficient), float(bandwidth)
        self.target_l0 = None if target_l0 is None else float(target_l0)
        self.tanh_scale, self.gradient_to_input = float(tanh_scale), gradient_to_input
        self.dead_coefficient = float(dead_coefficient)

    def _add_parameters(self, dtype: torch.dtype, device: torch.device) -> None:
        super()._add_parameters(dtype, device)
        # float32 whatever the rest is: steps of the size of the learning rate round away in bfloat16
        start = torch.full((self.n_latents,), self.threshold_start, dtype=torch.float32, device=device)
        self.threshold = nn.Parameter(start)

    def activate(self, preactivations: Tensor) -> Tensor:
        return preactivations.relu() * (preactivations > self.threshold.to(preactivations.dtype))

    def step(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        *,
        coefficient: float | int | None = None,
        dead: Tensor | None = None,
    ) -> Step:
        with torch.no_grad():  # not within the graph: that would pin a threshold that has reached 0
            self.threshold.clamp_(min=0)
        z, target = self._batch(inputs, targets)
        pre = self._preactivations(z)
        threshold = self.threshold.to(pre.dtype)
        latents = _Jump.apply(pre, threshold, self.bandwidth, self.gradient_to_input)
        weight = self.coefficient if coefficient is None else coefficient
        terms = {"sparsity": weight * self._penalty(pre, threshold, latents)}
        if self.dead_coefficient and dead is not None and bool(dead.any()):
            below = ((threshold - pre).relu() * dead * self.W_dec.norm(dim=1)).sum(1)
            terms["dead"] = self.dead_coefficient * below.mean()
        return dense_step(self, latents, z, target, **terms)

    def _penalty(self, pre: Tensor, threshold: Tensor, latents: Tensor) -> Tensor:
        if self.penalty == "tanh":
            return torch.tanh(self.tanh_scale * latents * self.W_dec.norm(dim=1)).sum(1).mean()
        l0 = _Heaviside.apply(pre, threshold, self.bandwidth, self.gradient_to_input).sum(1)
        if self.penalty == "l0" or self.target_l0 is None:
            return l0.mean()
        if self.penalty == "quadratic":
            return 2 / self.target_l0 * (l0 - self.target_l0).square().mean()
        return (self.peers.mean_with_own_gradient(l0.mean()) / self.target_l0 - 1).square()

    def highest_coefficient(self, error: float, target_l0: float) -> float | None:
        """Where `target_l0` is steered to: what a latent costs when all that are wanted cost as much together as they
        leave over, `error` per token. With three times as much, thresholds overshoot before they can be called back."""
        return error / target_l0 if self.penalty in ("l0", "tanh") else None

    def learnable_share(self, inputs: Tensor) -> float:
        """Share of pre-activations within the kernel around their threshold: only these move it. Near 0, training is
        stuck; take a larger `bandwidth` or another `threshold_start`."""
        with torch.no_grad():
            pre = self.preactivations(inputs)
            return float(((pre - self.threshold).abs() < self.bandwidth / 2).double().mean())


def _kernel(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype) / bandwidth


class _Jump(torch.autograd.Function):
    """pre where it exceeds the threshold; d/d threshold estimated as -threshold / bandwidth inside the kernel."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        estimate = threshold * _kernel(pre, threshold, ctx.bandwidth) * gradient
        by_pre = (pre > threshold) * gradient
        return by_pre + estimate if ctx.to_input else by_pre, -estimate.sum(0), None, None


class _Heaviside(torch.autograd.Function):
    """1 where pre exceeds the threshold; d/d threshold estimated as -1 / bandwidth inside the kernel."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        estimate = _kernel(pre, threshold, ctx.bandwidth) * gradient
        return estimate if ctx.to_input else None, -estimate.sum(0), None, None
