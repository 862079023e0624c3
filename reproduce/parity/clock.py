"""Does the state turn by the share of ones? Parity by rotation: after n steps of pi * ones / n the angle is pi * ones.

An alternating string has as many zeros as ones, so such a state turns by a quarter at each step: period 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import linregress

from reproduce.arrays import Array, Integers
from reproduce.parity.statistics import dominant_frequency


def enough(ones: Integers, digits: int) -> NDArray[np.bool_]:
    """Strings with at least an eighth of either bit, as nearly all random strings have, and with four ones or more.

    A frequency needs two cycles in n steps, which is four ones.
    """
    return np.asarray((ones >= max(4, digits // 8)) & (digits - ones >= digits // 8))


@dataclass(frozen=True)
class Clock:
    """Frequencies of trajectories against those of a clock that is right at the read-out.

    Attributes:
        expected: half the share of ones, in cycles per step, ``(m,)``.
        found: where the spectrum is highest, ``(m,)``.
        expected_outside, found_outside: the same of strings with too few of either bit, which the fit leaves out.
        slope, intercept: least squares of ``found`` on ``expected``; 1 and 0 for such a clock; NaN if all strings have
            as many ones.
        correlation: Pearson's.
        error: mean absolute difference, cycles per step.
    """

    expected: Array
    found: Array
    expected_outside: Array
    found_outside: Array
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
        ones: in each string, ``(strings,)``; those with too few of either bit (:func:`enough`) are kept apart.
        digits: bits of every string.

    Raises:
        ValueError: shapes do not fit, or fewer than two strings are left.
    """
    series, ones = np.asarray(series, dtype=np.float64), np.asarray(ones)
    if series.shape != (*ones.shape, digits):
        raise ValueError(f"series: got shape {series.shape} for {ones.shape} strings of {digits} bits")
    every = np.array([dominant_frequency(row) for row in series])
    moves, inside = np.isfinite(every), enough(ones, digits)
    kept = inside & moves
    if kept.sum() < 2:
        raise ValueError(f"ones: {kept.sum()} strings with enough of either bit and a trajectory that moves; pass two")
    share = ones / (2 * digits)
    expected, found = share[kept], every[kept]
    slope = intercept = correlation = float("nan")
    if np.ptp(expected) > 0 and np.ptp(found) > 0:
        fit = linregress(expected, found)
        slope, intercept, correlation = float(fit.slope), float(fit.intercept), float(fit.rvalue)
    return Clock(
        expected=expected,
        found=found,
        expected_outside=share[~inside & moves],
        found_outside=every[~inside & moves],
        slope=slope,
        intercept=intercept,
        correlation=correlation,
        error=float(np.abs(found - expected).mean()),
    )
