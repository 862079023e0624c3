"""Frequencies, transitions and cycles of short trajectories (paper D.2, mechanistic readouts)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.signal import detrend, periodogram

from reproduce.arrays import Array, Integers


def lagged_cosine(hidden: Array, lag: int) -> Array:
    """Cosine of each state and the state ``lag`` loop steps later.

    Args:
        hidden: ``(steps, width)``.
        lag: 1 .. steps - 1.

    Returns:
        ``(steps - lag,)``.

    Raises:
        ValueError: another shape, or the lag is out of range.
    """
    hidden = np.asarray(hidden, dtype=np.float64)
    if hidden.ndim != 2 or not 1 <= lag < len(hidden):
        raise ValueError(f"lag: got {lag} for states of shape {hidden.shape}; pass 1 .. steps - 1 of (steps, width)")
    unit = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    return np.asarray((unit[:-lag] * unit[lag:]).sum(1))


def delay(leading: Array, following: Array, delays: Sequence[int]) -> tuple[int, float]:
    """By how many steps one series follows another.

    Args:
        leading, following: ``(n,)`` each.
        delays: which are tried, each between -(n - 3) and n - 3; of series with a period, one period of them.

    Returns:
        The delay with the highest Pearson correlation of ``leading[t]`` and ``following[t + delay]``, and that
        correlation.

    Raises:
        ValueError: shapes differ, or a delay is out of range.
    """
    if leading.shape != following.shape or leading.ndim != 1 or max(map(abs, delays)) > len(leading) - 3:
        raise ValueError(f"delays: got {list(delays)} for series of shapes {leading.shape} and {following.shape}")

    def at(shift: int) -> float:
        a = leading[max(0, -shift) : len(leading) - max(0, shift)]
        b = following[max(0, shift) : len(following) - max(0, -shift)]
        return float(np.corrcoef(a, b)[0, 1])

    best = max(delays, key=at)
    return best, at(best)


def dominant_frequency(series: Sequence[float] | Array, *, resolution: int = 4096) -> float:
    """Where the power spectrum of a series without its linear trend is highest.

    Args:
        series: ``(n,)``, n >= 8.
        resolution: the series is padded with zeros to this length.

    Returns:
        Cycles per step, 0 .. 0.5; NaN for a straight line. Slower than one cycle in n steps is not resolved.

    Raises:
        ValueError: fewer than eight values.
    """
    values = np.asarray(series, dtype=np.float64)
    if values.ndim != 1 or len(values) < 8:
        raise ValueError(f"series: got shape {values.shape}; a frequency needs at least eight values in a row")
    frequencies, power = periodogram(detrend(values), nfft=max(resolution, len(values)), window="hann", detrend=False)
    if power.max() <= 1e-20 * max(float(values @ values), np.finfo(float).tiny):
        return float("nan")
    return float(frequencies[power.argmax()])


def transition_matrix(states: Sequence[int] | Integers, count: int) -> Array:
    """Share of the visits to state i that are followed by state j at the next step (paper, section 4).

    Args:
        states: ``(steps,)``, numbers in 0 .. count - 1.
        count: number of states.

    Returns:
        ``(count, count)``; rows sum to 1, or are 0 for a state that is never left.

    Raises:
        ValueError: fewer than two steps, or a state out of range.
    """
    states = np.asarray(states, dtype=np.int64)
    if states.ndim != 1 or len(states) < 2:
        raise ValueError(f"states: got shape {states.shape}; pass at least two states in a row")
    if states.min() < 0 or states.max() >= count:
        raise ValueError(f"states: got {states.min()} .. {states.max()}; pass 0 .. {count - 1}")
    seen = np.zeros((count, count))
    np.add.at(seen, (states[:-1], states[1:]), 1)
    visits = seen.sum(1, keepdims=True)
    return np.asarray(seen / np.maximum(visits, 1))


def dominant_cycle(matrix: Array) -> tuple[int, ...]:
    """The cycle that following the likeliest transition ends in, self-loops left out unless there is nothing else.

    Args:
        matrix: row-normalised, ``(k, k)``.

    Returns:
        The states of the longest such cycle, beginning with the lowest; empty if none is ever left.
    """
    others = np.where(np.eye(len(matrix), dtype=bool), 0.0, matrix)
    following = np.where(others.sum(1) > 0, others.argmax(1), np.where(matrix.sum(1) > 0, matrix.argmax(1), -1))
    cycles = []
    for start in range(len(matrix)):
        path = [start]
        while following[path[-1]] >= 0 and following[path[-1]] not in path:
            path.append(int(following[path[-1]]))
        if following[path[-1]] >= 0:
            cycle = path[path.index(int(following[path[-1]])) :]
            turn = cycle.index(min(cycle))
            cycles.append((*cycle[turn:], *cycle[:turn]))
    return max(cycles, key=len, default=())


def determinism(states: Sequence[int] | Integers, count: int) -> float:
    """Share of all transitions that are the likeliest of the state they leave: 1 for a deterministic automaton.

    Raises:
        ValueError: as for :func:`transition_matrix`.
    """
    matrix = transition_matrix(states, count)
    left = np.bincount(np.asarray(states)[:-1], minlength=count)
    return float((matrix.max(1) * left).sum() / left.sum())
