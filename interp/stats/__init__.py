"""Statistics over examples: intervals, paired tests and correlations.

Arrays, tensors or DataArrays in, NumPy out. Examples lie along the last axis; leading axes are cells, such as `(layer,
pos)`, and all cells share one set of resamples, so a sweep costs one matrix product. A cell that holds a NaN
(unmeasured) gives NaN. Randomness comes from `seed` alone.
"""

from __future__ import annotations

from interp.stats.intervals import (
    Correlation,
    Interval,
    bootstrap_interval,
    correlation,
    proportion_interval,
    ratio_interval,
)
from interp.stats.p_values import MaxStatistic, adjust_p_values, max_statistic, paired_test

__all__ = [
    "Correlation",
    "Interval",
    "MaxStatistic",
    "adjust_p_values",
    "bootstrap_interval",
    "correlation",
    "max_statistic",
    "paired_test",
    "proportion_interval",
    "ratio_interval",
]
