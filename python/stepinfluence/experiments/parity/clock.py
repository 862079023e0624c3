"""Does the state turn by the share of ones? Parity by rotation: after n steps of pi * ones / n the angle is pi * ones.

An alternating string has as many zeros as ones, so such a state turns by a quarter at each step: period 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress

from stepinfluence.experiments.parity.proxy import Array, Integers
from stepinfluence.experiments.parity.statistics import dominant_frequency

LEAST_ONES = 4
"""A frequency needs two cycles in n steps, which is four ones."""


@dataclass(frozen=True)
class Clock:
    """Frequencies of trajectories against those of a clock that is right at the read-out.

    Attributes:
        expected: half the share of ones, in cycles per step, ``(m,)``.
        found: where the spectrum is highest, ``(m,)``.
        slope, intercept: least squares of ``found`` on ``expected``; 1 and 0 for such a clock; NaN if all strings have
            as many ones.
        correlation: Pearson's.
        error: mean absolute difference, cycles per step.
    """

    expected: Array
    found: Array
    slope: float
    intercept: float
    correlation: float
    error: float

    @property
    def keeps_time(self) -> bool:
        """Whether frequencies go by the share of ones, as measured: slope within a fifth of 1, correlation over 0.9."""
        return abs(self.slope - 1) <= 0.2 and self.correlation > 0.9


def clock(series: Array | Sequence[Sequence[float]], ones: Integers, digits: int) -> Clock:
    """Compare the frequency of each trajectory with half the share of ones of its string.

    Args:
        series: a value for each loop step up to the read-out, ``(strings, digits)``.
        ones: in each string, ``(strings,)``; those with fewer than four are left out, as are flat trajectories.
        digits: bits of every string.

    Raises:
        ValueError: shapes do not fit, or fewer than two strings are left.
    """
    series, ones = np.asarray(series, dtype=np.float64), np.asarray(ones)
    if series.shape != (*ones.shape, digits):
        raise ValueError(f"series: got shape {series.shape} for {ones.shape} strings of {digits} bits")
    enough = ones >= LEAST_ONES
    found = np.array([dominant_frequency(row) for row in series[enough]])
    kept = np.isfinite(found)
    if kept.sum() < 2:
        raise ValueError(f"ones: {kept.sum()} strings with {LEAST_ONES} ones and a trajectory that moves; pass two")
    expected, found = ones[enough][kept] / (2 * digits), found[kept]
    error = float(np.abs(found - expected).mean())
    if np.ptp(expected) == 0 or np.ptp(found) == 0:
        return Clock(expected, found, float("nan"), float("nan"), float("nan"), error)
    fit = linregress(expected, found)
    return Clock(expected, found, float(fit.slope), float(fit.intercept), float(fit.rvalue), error)
