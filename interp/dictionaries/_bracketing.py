"""Finding where curves cross levels: a grid, then false position on logarithms, all curves and levels at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]  # curves [n], places [n] -> heights [n]

PEAK_ROUNDS = 5  # closer looks at the highest place before a level is called out of reach

REACHED, ABOVE, BELOW, JUMP = "reached", "never so high", "higher at the start", "jumps over"


@dataclass
class Curve:
    """What is known of one curve, in order of place. `start` is its height at place 0."""

    start: float
    places: list[float] = field(default_factory=list)
    heights: list[float] = field(default_factory=list)

    def add(self, place: float, height: float) -> None:
        at = int(np.searchsorted(self.places, place))
        self.places.insert(at, place)
        self.heights.insert(at, height)

    def bracket(self, level: float) -> tuple[int, int] | None:
        """Indices around the first crossing of a level from below, -1 for the start; None if there is none."""
        below = -1 if self.start < level else None
        for index, height in enumerate(self.heights):
            if height < level:
                below = index
            elif below is not None:
                return below, index
        return None

    def height(self, index: int) -> float:
        return self.start if index < 0 else self.heights[index]

    def place(self, index: int) -> float:
        return 0.0 if index < 0 else self.places[index]

    def rises_until(self, place: float, slack: float = 1e-3) -> bool:
        """Whether no height up to a place lies below one before it, by more than rounding."""
        known = [self.start, *(h for p, h in zip(self.places, self.heights, strict=True) if p <= place)]
        top = np.maximum.accumulate(known)
        return bool(np.all(top - known <= slack * top + 1e-7))


@dataclass
class Crossing:
    """Where one curve reaches one level, or the nearest that was seen, and why it does not."""

    place: float
    height: float
    status: str


def crossings(
    measure: Measure, starts: np.ndarray, grids: np.ndarray, levels: np.ndarray, *, tolerance: float, max_rounds: int
) -> tuple[list[Curve], list[list[Crossing]], int]:
    """The smallest place at which each curve first reaches each level, within a relative tolerance.

    One call of `measure` for the grid and one per round, each for all that is still open. "First" is to the grid's
    resolution: of peaks between two of its places only the highest one seen is looked at more closely.

    Args:
        starts: Height of each curve at place 0.
        grids: Increasing positive places per curve, [curve, place].
    """
    curves = [Curve(float(start)) for start in starts]
    n, width = grids.shape
    heights = measure(np.repeat(np.arange(n), width), grids.reshape(-1)).reshape(n, width)
    for curve, places, row in zip(curves, grids, heights, strict=True):
        seen = np.isfinite(row)  # an activation driven out of the range of its type: not a place to go to
        curve.places, curve.heights = places[seen].tolist(), row[seen].tolist()
    rounds = 1
    tries: Counter[tuple[int, int]] = Counter()
    for _ in range(max_rounds):
        asked: dict[tuple[int, float], None] = {}
        for i, curve in enumerate(curves):
            for j, level in enumerate(levels):
                place = _next(curve, float(level), tolerance, tries[i, j])
                tries[i, j] += 1
                if place is not None:
                    asked[i, place] = None
        if not asked:
            break
        which = np.array([i for i, _ in asked])
        places = np.array([place for _, place in asked])
        rounds += 1
        for i, place, height in zip(which, places, measure(which, places), strict=True):
            curves[i].add(float(place), float(height))
    return curves, [[_crossing(curve, float(level), tolerance) for level in levels] for curve in curves], rounds


def _next(curve: Curve, level: float, tolerance: float, tries: int) -> float | None:
    """The next place to look at for one level; None if it is done or there is nothing to find.

    Every second round halves, once there were some: false position alone may keep one end for ever.
    """
    if _hit(curve, level, tolerance) is not None or not curve.places:
        return None
    found = curve.bracket(level)
    if found is None:
        return None if tries >= PEAK_ROUNDS or curve.start >= level else _near_the_top(curve)
    halve = tries > 2 and tries % 2 == 1
    low, high = found
    a, b, h, top = curve.place(low), curve.place(high), curve.height(low), curve.height(high)
    if b - a <= 1e-6 * b:
        return None  # the curve jumps
    if a > 0 and h > 0:
        share = 0.5 if halve else min(max(math.log(level / h) / math.log(top / h), 0.02), 0.98)
        place = a * (b / a) ** share
    elif h == 0:  # near 0 a divergence grows with the square of the strength
        place = a + (b - a) * (0.5 if halve else max(math.sqrt(level / top), 1e-4))
    else:
        place = a + (b - a) * (0.5 if halve else min(max((level - h) / (top - h), 0.02), 0.98))
    return place if a < place < b else (a + b) / 2


def _near_the_top(curve: Curve) -> float | None:
    """Half way, on the side with more room, between the highest place and its neighbour; None where it is the last."""
    at = int(np.argmax(curve.heights))
    sides = [(curve.places[a], curve.places[a + 1]) for a in (at - 1, at) if 0 <= a < len(curve.places) - 1]
    if not sides:
        return None
    a, b = max(sides, key=lambda side: side[1] / side[0])
    return math.sqrt(a * b) if b / a > 1.01 else None


def _hit(curve: Curve, level: float, tolerance: float) -> int | None:
    """The first place whose height is within the tolerance, not behind the first crossing."""
    found = curve.bracket(level)
    last = found[1] if found else len(curve.heights) - 1
    for index in range(last + 1):
        if abs(curve.heights[index] - level) <= tolerance * level:
            return index
    return None


def _crossing(curve: Curve, level: float, tolerance: float) -> Crossing:
    if (index := _hit(curve, level, tolerance)) is not None:
        return Crossing(curve.places[index], curve.heights[index], REACHED)
    found = curve.bracket(level)
    if found is not None:
        near = min(found, key=lambda index: abs(curve.height(index) - level))
        return Crossing(curve.place(near), curve.height(near), JUMP)
    if curve.start >= level:
        return Crossing(0.0, curve.start, BELOW)
    if not curve.heights:
        return Crossing(math.nan, math.nan, ABOVE)
    top = int(np.argmax(curve.heights))
    return Crossing(curve.places[top], curve.heights[top], ABOVE)
