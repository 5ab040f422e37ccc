"""Where to evaluate a function on [0, 1] in order to integrate it."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np

Points: TypeAlias = Literal["gauss_legendre", "midpoint", "left", "right"]


def quadrature(points: Points, steps: int) -> tuple[list[float], list[float]]:
    """Nodes in [0, 1], ascending, and their weights, which sum to 1.

    `"gauss_legendre"` integrates polynomials up to degree `2 * steps - 1` exactly; `"midpoint"` those of degree 1
    (error of order `steps**-2`); `"left"` and `"right"`, which begin at 0 and end at 1, only constants (error of order
    `1 / steps`).
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if points == "gauss_legendre":
        nodes, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1]
        return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()
    offset = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[points]
    return [(step + offset) / steps for step in range(steps)], [1 / steps] * steps
