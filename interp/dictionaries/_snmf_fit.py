"""The two ways of fitting in memory: the solver of this package, and the released algorithm step for step."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.dictionaries._snmf_init import Init, kmeans_labels, start_codes
from interp.dictionaries._snmf_repair import repair
from interp.dictionaries._snmf_steps import (
    Data,
    best_codes,
    exact_loss,
    gram,
    gram_loss,
    multiply_codes,
    own_energy,
    solve_components,
    sweep_codes,
    sweep_components,
    unit_codes,
    winner_take_all,
)

REPAIR_EVERY_EXPLORING, REPAIR_EVERY = 20, 10
_RIDGE = 1e-6
_OFFICIAL_RIDGE, _OFFICIAL_FLOOR, _OFFICIAL_NORM_FLOOR = 1e-6, 1e-6, 1e-8


@dataclass
class Fit:
    """One fit: the best pair that was seen, its loss (with the penalty, while it runs), and every iteration's loss."""

    components: Float[Tensor, "component neuron"]
    codes: Float[Tensor, "component token"]
    loss: float
    history: list[float] = field(default_factory=list)
    best_iteration: int = 0
    repairs: int = 0

    def offer(
        self, components: Tensor, codes: Tensor, loss: float, *, penalty: float = 0.0, margin: float = 0.0
    ) -> bool:
        """Note the loss of an iteration; keep its pair if loss and penalty are below the best by more than `margin`."""
        self.history.append(loss)
        if not loss + penalty < self.loss - margin:
            return False
        self.components, self.codes, self.loss = components, codes, loss + penalty
        self.best_iteration = len(self.history) - 1
        return True


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know; see `SNMF` for the meaning of each."""

    keep: int
    max_iter: int
    explore: int
    patience: int
    tol: float
    repair: bool
    penalty: float = 0.0


def fit_standard(
    data: Data,
    codes: Float[Tensor, "component token"],
    settings: Settings,
    on_iteration: Callable[[float], None] = lambda loss: None,
) -> Fit:
    """Multiplicative iterations for `explore` steps, then exact block updates from the best pair, both with repair.

    The multiplicative rule moves slowly and takes the components together, which finds better supports than exact
    block updates do from a rough start; those converge in tens of iterations where it needs thousands.
    """
    n_components = len(codes)
    limit = max(1, n_components // 10)
    components = torch.zeros(n_components, data.rows.shape[1], dtype=codes.dtype, device=codes.device)
    best = Fit(components, codes, float("inf"))
    code_gram = gram(codes)
    exploring, since, reference = settings.explore > 0, 0, float("inf")
    phase_start = 0
    for iteration in range(settings.max_iter):
        stuck = since >= settings.patience
        if exploring and (iteration >= settings.explore or stuck):
            components, codes = best.components, best.codes
            code_gram, exploring, phase_start, since, stuck = gram(codes), False, iteration, 0, False
        if stuck:
            break
        every = REPAIR_EVERY_EXPLORING if exploring else REPAIR_EVERY
        if settings.repair and iteration > phase_start and (iteration - phase_start) % every == 0:
            components, codes, swaps = repair(data, components, codes, settings.keep, limit, settings.penalty)
            best.repairs += swaps
            if swaps:
                since = 0
                if exploring:  # the zeros of a new component would never leave zero
                    codes = torch.maximum(codes, 1e-6 * codes.amax(1, keepdim=True))
                code_gram = gram(codes)
        from_codes = data.against_codes(codes)
        if exploring:
            components = winner_take_all(solve_components(code_gram, from_codes, _RIDGE), settings.keep)
            components, codes = unit_codes(components, codes)
        else:
            components = sweep_components(components, code_gram, from_codes, settings.keep, settings.penalty)
        cross, component_gram = data.against_components(components, settings.keep), gram(components)
        if exploring:
            codes = multiply_codes(codes, component_gram, cross)
        else:
            codes = sweep_codes(codes, component_gram, cross, settings.penalty)
        code_gram = gram(codes)
        loss = gram_loss(data.total, cross, codes, component_gram, code_gram)
        if loss < 1e-3 * data.total:  # too small a difference of large numbers
            loss = exact_loss(data.rows, components, codes)
        best.offer(components, codes, loss, penalty=settings.penalty * own_energy(component_gram, code_gram))
        # Counted from the last reference, so that many small gains add up to one.
        since = 0 if best.loss < reference * (1.0 - settings.tol) else since + 1
        reference = best.loss if since == 0 else reference
        on_iteration(best.loss)
    return best


def fit_official(
    data: Data,
    codes: Float[Tensor, "component token"],
    settings: Settings,
    on_iteration: Callable[[float], None] = lambda loss: None,
) -> Fit:
    """The released algorithm: its order of steps, its absolute constants, its ties, its stopping rule."""
    rows, n_components = data.rows, len(codes)
    best = Fit(torch.zeros(n_components, rows.shape[1], dtype=rows.dtype, device=rows.device), codes, float("inf"))
    eye = torch.eye(n_components, dtype=rows.dtype, device=rows.device)
    unimproved = 0
    for _ in range(settings.max_iter):
        components = torch.linalg.inv(codes @ codes.T + _OFFICIAL_RIDGE * eye) @ (codes @ rows)
        size = components.abs()
        least = size.topk(settings.keep, dim=1).values[:, -1:]
        components = components * (size >= least)  # equal magnitudes are all kept
        norms = codes.norm(dim=1, keepdim=True).clamp(min=_OFFICIAL_NORM_FLOOR)
        codes, components = codes / norms, components * norms
        cross, inner = components @ rows.T, components @ components.T
        up = cross.clamp(min=0.0) + inner.clamp(max=0.0).neg() @ codes
        down = cross.clamp(max=0.0).neg() + inner.clamp(min=0.0) @ codes + _OFFICIAL_FLOOR
        codes = codes * (up / down).sqrt()
        improved = best.offer(components, codes, exact_loss(rows, components, codes), margin=settings.tol)
        unimproved = 0 if improved else unimproved + 1
        on_iteration(best.loss)
        if unimproved >= settings.patience:
            break
    return best


def official_codes(
    rows: Float[Tensor, "token neuron"], n_components: int, init: Init, generator: torch.Generator
) -> Float[Tensor, "component token"]:
    """The released starts, which draw from `generator` what the original draws from the global one."""
    if init == "random":
        codes = torch.rand(len(rows), n_components, generator=generator, dtype=rows.dtype).T
    elif init == "svd":
        _, values, right = torch.linalg.svd(rows.T, full_matrices=False)
        codes = values[:n_components].sqrt()[:, None] * right[:n_components]  # the negative half is dropped
    else:
        labels = kmeans_labels(rows, n_components, generator)
        codes = torch.nn.functional.one_hot(labels, n_components).to(rows.dtype).T
    return codes.clamp(min=_OFFICIAL_FLOOR).to(rows.device).contiguous()


def best_of(
    data: Data,
    n_components: int,
    init: Init | Float[Tensor, "token component"],
    settings: Settings,
    *,
    official: bool,
    seeds: range,
    progress: bool = False,
) -> tuple[Fit, list[float]]:
    """The fit with the lowest loss of one start per seed, and the losses of all."""
    best: Fit | None = None
    losses: list[float] = []
    silent = not progress or os.environ.get("INTERP_PROGRESS") == "0"
    for number, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        if isinstance(init, Tensor):
            codes = init.to(data.rows).T.contiguous()
        else:
            codes = (official_codes if official else start_codes)(data.rows, n_components, init, generator)
        with tqdm(total=settings.max_iter, disable=silent, desc=f"snmf {number + 1}/{len(seeds)}") as bar:

            def advance(loss: float, bar: tqdm = bar) -> None:
                bar.update()
                bar.set_postfix({"error": f"{loss / data.total:.4f}"}, refresh=False)

            fit = (fit_official if official else fit_standard)(data, codes, settings, advance)
        fit.loss = exact_loss(data.rows, fit.components, fit.codes)
        if not official:
            settle(fit, data.rows)
        losses.append(fit.loss)
        if best is None or fit.loss < best.loss:
            best = fit
    assert best is not None
    return best, losses


def settle(fit: Fit, rows: Float[Tensor, "token neuron"]) -> None:
    """The best codes for the final components, and their loss.

    They are sought from zero, as for new tokens: where components nearly cancel, many codes are as good, and those that
    the iterations left may be large without effect. Only if that stops short of their loss are they the start.
    """
    inner = gram(fit.components)
    for start in (torch.zeros_like(fit.codes), fit.codes):
        parts = zip(rows.split(8192), start.split(8192, dim=1), strict=True)
        codes = torch.cat([best_codes(code, inner, fit.components @ part.T) for part, code in parts], dim=1)
        loss = exact_loss(rows, fit.components, codes)
        if loss <= fit.loss * (1.0 + 1e-9):
            fit.codes, fit.loss = codes, loss
            return
