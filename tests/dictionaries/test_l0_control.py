"""The controller: bounds, nothing piles up, and the L0 that training ends with from any first coefficient (A5)."""

from __future__ import annotations

import itertools
import math

import pytest

from interp.dictionaries import training
from interp.dictionaries._run import Run
from interp.dictionaries.architectures import build
from interp.dictionaries.jumprelu import JumpReLUSAE
from interp.dictionaries.l0_control import RANGE, L0Controller
from interp.dictionaries.planted import PlantedSource
from interp.dictionaries.training import train_many
from interp.dictionaries.training_config import TrainingConfig

SOURCE = PlantedSource(width=24, n_features=32, density=0.08)  # 2.56 active
STEPS = {"n_steps": 600, "batch_size": 192, "learning_rate": 3e-3}


def settings(architecture: str, start: float, target: float, seed: int = 0) -> TrainingConfig:
    dictionary = {"architecture": architecture, "n_latents": 32, "coefficient": start, "seed": seed}
    return TrainingConfig(dictionary, target_l0=target, **STEPS)


@pytest.mark.parametrize(("architecture", "targets"), [("jumprelu", (2.5,)), ("gated", (2.5,)), ("relu", (5.0,))])
def test_training_ends_at_the_target_from_any_coefficient(architecture: str, targets: tuple[float, ...]) -> None:
    """A5 in small: at inference, on data that training has not seen."""
    grid = list(itertools.product(targets, (1e-3, 1.0)))
    x = SOURCE.sample(8192, seed=77)[0]
    configs = [settings(architecture, start, target) for target, start in grid]
    for (target, start), dictionary in zip(grid, train_many(configs, SOURCE), strict=True):
        l0 = float((dictionary.encode(x) != 0).sum()) / len(x)
        assert abs(l0 / target - 1) < 0.1, (target, start, l0)


def test_bounds_are_kept() -> None:
    control = L0Controller(4.0, 1.0)
    assert all(control.update(400.0, 0.5) <= 0.5001 for _ in range(50)) and control.coefficient == pytest.approx(0.5)
    assert all(control.update(0.1, 0.5) >= 0.4999 * RANGE for _ in range(500))
    assert control.coefficient == pytest.approx(0.5 * RANGE)
    assert control.update(400.0, 1e-3) <= 1.0001e-3  # a bound that falls takes the coefficient with it
    free = L0Controller(4.0, 1.0)
    assert max(free.update(400.0) for _ in range(200)) > 10


@pytest.mark.parametrize(("highest", "most"), [(0.5, 400), (None, 10**9)])
def test_nothing_piles_up_while_l0_cannot_follow(highest: float | None, most: int) -> None:
    """L0 stays at a third of its target for a thousand steps, whatever the coefficient; when it comes back and
    overshoots, the coefficient has to be there soon."""
    control = L0Controller(6.0, 0.05, path_steps=1)
    for _ in range(1000):
        control.update(2.0, highest)
    steps = next(n for n in range(1, 10**4) if control.update(12.0, highest) > 0.05)
    assert steps <= most and (highest is not None or steps > 1000)  # what would pile up without a bound


def test_the_bound_is_what_the_wanted_latents_leave_over() -> None:
    dictionary = JumpReLUSAE(6, 12)
    assert dictionary.highest_coefficient(3.0, 4.0) == 0.75
    assert JumpReLUSAE(6, 12, penalty="quadratic", target_l0=4.0).highest_coefficient(3.0, 4.0) is None


def test_thresholds_forget_sooner_and_only_when_steered() -> None:
    def run(target: float | None) -> Run:
        config = TrainingConfig({**settings("jumprelu", 0.1, 2.5).dictionary, "d_in": 24}, **STEPS, target_l0=target)
        return Run(config, build(dict(config.dictionary)), training.as_source(SOURCE, "", None), None, resume=False)

    steered, free = run(2.5), run(None)
    names = [name for name, _ in steered.dictionary.named_parameters()]
    found = {name: group["betas"][1] for name, group in zip(names, steered.optimiser.param_groups, strict=True)}
    assert found.pop("threshold") == 0.99 and set(found.values()) == {0.999}
    assert [group["betas"][1] for group in free.optimiser.param_groups] == [0.999]
    steered.advance(next(SOURCE.batches(192, seed=0)))
    assert {group["lr"] for group in steered.optimiser.param_groups} == {3e-3}


@pytest.mark.parametrize("start", [1e-3, 0.03, 1.0])
@pytest.mark.parametrize("target", [4.0, 16.0])
def test_the_controller_reaches_its_target_on_a_slow_plant(start: float, target: float) -> None:
    """L0 follows c ** -0.5 with a lag of 50 steps, from 100 at c = 0.01: what a penalty roughly does."""
    control = L0Controller(target, start, path_steps=400)
    log_l0, seen = math.log(100.0), []
    coefficient = start
    for _ in range(1500):
        settled = math.log(100.0) - 0.5 * math.log(coefficient / 0.01)
        log_l0 += (settled - log_l0) / 50
        coefficient = control.update(math.exp(log_l0))
        seen.append(math.exp(log_l0))
    assert all(abs(l0 / target - 1) < 0.1 for l0 in seen[-300:])
    assert min(seen) > 0.5 * target


def test_a_controller_resumes_from_its_state() -> None:
    first = L0Controller(4.0, 0.1)
    for l0 in (50.0, 30.0, 20.0):
        first.update(l0)
    second = L0Controller(4.0, first.coefficient, state=dict(first.state))
    assert second.update(10.0) == first.update(10.0)
    with pytest.raises(ValueError, match="must be above 0"):
        L0Controller(4.0, 0.0)
