"""How far estimated scores are from exact ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import linregress

from reproduce.arrays import Array


def relative_error(found: Array, exact: Array) -> float:
    """``|found - exact|_F / |exact|_F`` (paper, D.1), over all entries.

    Raises:
        ValueError: shapes differ, or the exact scores are all zero.
    """
    found, exact = _pair(found, exact)
    size = float(np.linalg.norm(exact))
    if size == 0:
        raise ValueError("exact: all scores are zero, no error is relative to them; use other examples or weights")
    return float(np.linalg.norm(found - exact)) / size


def mean_absolute_error(found: Array, exact: Array) -> float:
    """Mean of ``|found - exact|`` over the mean of ``|exact|``: dimensionless, 1 for an estimate of all zeros.

    Raises:
        ValueError: as for :func:`relative_error`.
    """
    found, exact = _pair(found, exact)
    size = float(np.abs(exact).mean())
    if size == 0:
        raise ValueError("exact: all scores are zero, no error is relative to them; use other examples or weights")
    return float(np.abs(found - exact).mean()) / size


def spread_evenly(sdi: Array) -> Array:
    """The trajectory that a scalar score can offer: each pair's sum over steps (TracIn), shared equally by its steps.

    Args:
        sdi: ``(..., steps)``.

    Returns:
        Same shape; constant along the last axis, with the same sums.
    """
    return np.broadcast_to(np.asarray(sdi, dtype=np.float64).mean(axis=-1, keepdims=True), np.shape(sdi)).copy()


def off_diagonal(scores: Array) -> Array:
    """Scores of pairs of different examples: ``(n, n, ...) -> (n * (n - 1), ...)``."""
    scores = np.asarray(scores, dtype=np.float64)
    return np.asarray(scores[~np.eye(len(scores), dtype=bool)])


def loglog_slope(sizes: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope of ``log(errors)`` on ``log(sizes)``, and its standard error.

    Errors that fall with the square root of the sketch size have slope -0.5.

    Raises:
        ValueError: fewer than two sizes, or a value that is not positive.
    """
    x, y = np.asarray(sizes, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if len(x) != len(y) or len(np.unique(x)) < 2:
        raise ValueError(
            f"sizes: got {len(np.unique(x))} for {len(y)} errors; a slope needs two or more, one per error"
        )
    if not (np.all(x > 0) and np.all(y > 0)):
        raise ValueError("errors: some are not positive; their logarithm does not exist")
    fit = linregress(np.log(x), np.log(y))
    return float(fit.slope), float(fit.stderr)


def _pair(found: Array, exact: Array) -> tuple[Array, Array]:
    found, exact = np.asarray(found, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    if found.shape != exact.shape:
        raise ValueError(f"found: got shape {found.shape}, exact scores have {exact.shape}; pass scores of the same")
    return found, exact
