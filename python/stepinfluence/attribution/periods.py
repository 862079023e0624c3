"""Is there a rhythm in a short curve over loop steps? Autocorrelation, and a permutation test of its highest peak.

The one test behind every statement of a period: of the demonstration, the report page and the parity experiment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[np.float64]

SIGNIFICANT = 0.01
"""Largest p-value at which a period is stated as found."""


@dataclass(frozen=True)
class Period:
    """A period found in a series.

    Attributes:
        lag: where the autocorrelation has its highest peak; 0 where it has no positive peak.
        correlation: the autocorrelation there.
        p_value: share of random orders of the same values whose highest peak is at least as high.
    """

    lag: int
    correlation: float
    p_value: float

    @property
    def found(self) -> bool:
        """Whether the test supports it: a lag, and a p-value of at most :data:`SIGNIFICANT`."""
        return self.lag > 0 and self.p_value <= SIGNIFICANT

    def sentence(self, what: str) -> str:
        """What the test lets one say of a curve, with its p-value; without a full stop.

        Args:
            what: the curve, as the first words of a sentence ("The margin").
        """
        if self.found:
            return (
                f"{what} repeats every {self.lag} loop steps (autocorrelation {self.correlation:.2f}, permutation test "
                f"p = {self.p_value:.3f})"
            )
        tested = f"permutation test p = {self.p_value:.2f}" if self.lag else "autocorrelation has no peak"
        return f"{what} shows no period in this run ({tested})"


NO_PERIOD = Period(0, 0.0, 1.0)


def autocorrelation(series: Sequence[float] | Array) -> Array:
    """Autocorrelation of a series without its linear trend, at lags 0 .. n - 1.

    The biased estimate (every lag is divided by the variance of all n values), which shrinks with the lag: of a period
    and its multiples, the period itself stands highest.

    Args:
        series: ``(n,)``, n >= 4.

    Returns:
        ``(n,)``; 1 at lag 0.

    Raises:
        ValueError: too short, not finite, or nothing is left without the trend.
    """
    values = np.asarray(series, dtype=np.float64)
    if values.ndim != 1 or len(values) < 4:
        raise ValueError(f"series: got shape {values.shape}; pass at least four values in a row")
    if not np.isfinite(values).all():
        raise ValueError("series: some values are not finite")
    rest = _without_trend(values[None])
    if float((rest * rest).sum()) <= 1e-20 * max(float(values @ values), np.finfo(float).tiny):
        raise ValueError("series: a straight line has no autocorrelation")
    return np.asarray(_curves(rest)[0])


def period(series: Sequence[float] | Array, *, orders: int = 999, seed: int = 0, rank_changes: bool = False) -> Period:
    """The period of a series: the lag in 2 .. n / 2 at which its autocorrelation has its highest local maximum.

    The p-value is that of a permutation test: how often the same values in a random order have a peak as high, at any
    lag. What it says is that the order of the values is not random but repeats.

    Args:
        series: ``(n,)``, n >= 8.
        orders: random orders behind the p-value.
        seed: of these.
        rank_changes: look at the changes, from one value to the next, of the values' ranks. Then one huge value, such
            as the first step's, does not hide a rhythm, and slow growth or decay neither hides one nor passes for one.

    Raises:
        ValueError: as for :func:`autocorrelation`, or fewer than eight values.
    """
    values = np.asarray(series, dtype=np.float64)
    if values.ndim != 1 or len(values) < 8:
        raise ValueError(f"series: got shape {values.shape}; a period needs at least eight values in a row")
    autocorrelation(values)  # refuses what has none
    if rank_changes:
        values = np.asarray(rankdata(values))
    rows = np.concatenate([values[None], values[_random_orders(len(values), orders, seed)]])
    if rank_changes:
        rows = np.diff(rows, axis=1)
    lags, heights = _highest_peaks(_curves(_without_trend(rows)))
    lag, height, others = lags[0], heights[0], heights[1:]
    return Period(int(lag), float(height), (1 + int((others >= height).sum())) / (1 + orders))


def period_of(series: ArrayLike) -> Period:
    """:func:`period` by rank changes, for any curve: a short, straight or constant one has none (lag 0, p-value 1)."""
    try:
        return period(np.asarray(series, dtype=np.float64), rank_changes=True)
    except ValueError:
        return NO_PERIOD


def rankdata(values: ArrayLike) -> Array:
    """Ranks 0 .. n - 1 of a series; equal values share the mean of theirs."""
    _, which, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts + 1) / 2)[which], dtype=np.float64)


@lru_cache(maxsize=8)
def _random_orders(count: int, orders: int, seed: int) -> NDArray[np.int64]:
    draw = np.random.default_rng(seed)
    return np.array([draw.permutation(count) for _ in range(orders)], dtype=np.int64).reshape(orders, count)


def _without_trend(rows: Array) -> Array:
    """``(r, n)`` less each row's regression line."""
    n = rows.shape[1]
    rest = rows - rows.mean(1, keepdims=True)
    time = np.arange(n) - (n - 1) / 2
    return np.asarray(rest - (rest @ time / (time @ time))[:, None] * time)


def _curves(rest: Array) -> Array:
    """Autocorrelations ``(r, n)`` of rows without trend."""
    n = rest.shape[1]
    spectrum = np.fft.rfft(rest, 2 * n, axis=1)
    sums = np.fft.irfft(np.abs(spectrum) ** 2, 2 * n, axis=1)[:, :n]
    power = (rest * rest).sum(1, keepdims=True)
    return np.asarray(sums / np.where(power > 0, power, 1.0))


def _highest_peaks(curves: Array) -> tuple[NDArray[np.int64], Array]:
    """Lag and height of each curve's highest positive local maximum in 2 .. n / 2; zeros where there is none."""
    last = curves.shape[1] // 2
    inner = curves[:, 2 : last + 1]
    peak = (inner > curves[:, 1:last]) & (inner > curves[:, 3 : last + 2]) & (inner > 0)
    heights = np.where(peak, inner, 0.0)
    best = heights.argmax(1)
    height = heights[np.arange(len(heights)), best]
    return np.where(height > 0, best + 2, 0).astype(np.int64), height
