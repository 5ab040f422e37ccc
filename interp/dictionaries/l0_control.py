"""Reaching a target L0 by steering the sparsity coefficient, from any starting value.

The controller follows a path: log L0 falls in a straight line from where training starts to the target, and stays
there. Below the path the coefficient gives way faster than it grows above it, since latents that fell silent come back
slowly. On the path the error is small, so that neither a coefficient that was far too large (L0 falls at once, latents
die, and it takes long to come back) nor one far too small (the correction piles up and overshoots) does lasting damage.
The logarithm of the coefficient is the sum of a term in proportion to the error e = log(L0 / path) and of its integral,
which is held while L0 is already moving towards the path fast enough.

Thresholds (JumpReLU) move by at most the learning rate per step, however large the coefficient, and Adam remembers a
gradient that was far too large for thousands of steps, in which they hardly move at all. There `highest` bounds the
coefficient from above at every step, and by `RANGE` of it from below, where it has no effect any more: nothing piles up
while L0 is on its way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

RANGE = 1e-4
"""Smallest coefficient, as a share of the highest that makes sense."""


@dataclass
class L0Controller:
    """Sparsity coefficient for a target L0.

    Attributes:
        target: Active latents per token to reach.
        coefficient: Starting value; the one in use after each `update`.
        path_steps: Steps until the path is at the target.
        proportional: Gain of the error; twice that below the path.
        integral: Gain of its sum, per step.
        settle: Steps in which an error should be made good; an integral is held while it is being made good faster.
    """

    target: float
    coefficient: float
    path_steps: int = 400
    proportional: float = 2.0
    integral: float = 0.03
    settle: float = 75.0
    state: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.target > 0 or not self.coefficient > 0:
            raise ValueError(
                f"target L0 {self.target} and the first coefficient {self.coefficient} must be above 0; a coefficient "
                f"of 0 cannot be multiplied into anything else"
            )

    def update(self, l0: float, highest: float | None = None) -> float:
        """The coefficient to use next, given the L0 of the last step and, if known, the highest that makes sense."""
        log_l0 = math.log(max(l0, 0.01 * self.target))  # a batch without latents: far below, not infinitely
        s = self.state
        if not s:
            s |= {"steps": 0.0, "start": log_l0, "fast": log_l0, "slow": log_l0, "sum": math.log(self.coefficient)}
        s["steps"] += 1
        s["fast"] += 0.1 * (log_l0 - s["fast"])
        s["slow"] += 0.02 * (log_l0 - s["slow"])
        share = min(1.0, s["steps"] / max(1, self.path_steps))
        path = s["start"] + share * (math.log(self.target) - s["start"])
        slope = (math.log(self.target) - s["start"]) / self.path_steps if share < 1 else 0.0
        error = s["fast"] - path
        speed = (s["fast"] - s["slow"]) / 40 - slope  # the averages lag by about 10 and 50 steps
        wanted = -error / self.settle
        if not (speed < wanted if error > 0 else speed > wanted):
            s["sum"] += self.integral * max(-1.5, min(1.5, error))
        held = self.proportional * (2 if error < 0 else 1) * max(-1.5, min(1.5, error))
        top = 30.0 if highest is None else math.log(max(highest, 1e-12))
        bottom = -30.0 if highest is None else top + math.log(RANGE)
        s["sum"] = max(bottom, min(top, s["sum"]))
        self.coefficient = math.exp(max(bottom, min(top, s["sum"] + held)))
        return self.coefficient

    def __str__(self) -> str:
        l0 = math.exp(self.state["fast"]) if self.state else float("nan")
        return f"coefficient {self.coefficient:.3g}, L0 {l0:.2f} for a target of {self.target:g}"
