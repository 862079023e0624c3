"""Statistics of the experiment, on plain arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from reproduce.arrays import Array


def slope_through_zero(x: Array, y: Array) -> float:
    """Least-squares slope of ``y`` on ``x`` through the origin: by which share of the score an estimate is off."""
    return float((x * y).sum() / np.square(x).sum())


def effective_number(weights: Array) -> float:
    """How many of the weights in a row hold its sum, ``(sum w)^2 / sum w^2``: mean over rows of ``(N, n)``."""
    return float(np.mean(weights.sum(1) ** 2 / np.square(weights).sum(1)))


def recall(found: Array, exact: Array, top: int, candidates: Sequence[int]) -> tuple[list[float], list[float]]:
    """How many of the truly leading rows an exact second look at the first candidates finds.

    Args:
        found, exact: scores ``(rows, queries)``.
        top: how many rows lead.
        candidates: lengths of the list that is looked at again; ``top`` is no second look.

    Returns:
        For each length the mean share of the leading rows that are on the list, and the share of all rows that are on
        some query's list.
    """
    rows, queries = exact.shape
    leading = np.argsort(-exact, axis=0, kind="stable")[:top]
    order = np.argsort(-found, axis=0, kind="stable")
    shares, unions = [], []
    for length in candidates:
        on_list = np.zeros((rows, queries), dtype=bool)
        on_list[order[:length], np.arange(queries)] = True
        shares.append(float(np.take_along_axis(on_list, leading, axis=0).mean()))
        unions.append(float(on_list.any(1).mean()))
    return shares, unions


def familywise(p_values: Sequence[float], level: float = 0.05) -> int:
    """How many of the tests are significant at a level for all of them together (Holm)."""
    ordered = sorted(p_values)
    count = 0
    for k, p in enumerate(ordered):
        if p > level / (len(ordered) - k):
            break
        count += 1
    return count


def p_of_mean(values: ArrayLike) -> float:
    """Two-sided p-value of the mean of independent values being zero (Student's t); 1 where all are zero."""
    given = np.asarray(values, dtype=np.float64)
    return 1.0 if not given.any() else float(stats.ttest_1samp(given, 0.0).pvalue)
