"""Where in the loop influence sits: shares, growth, and how sure of them one can be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from reproduce.arrays import Array


@dataclass(frozen=True)
class Growth:
    """Geometric fit ``value ~ ratio ** t``: the ratio, its 95 % interval, and the fit's R squared (log scale)."""

    ratio: float
    low: float
    high: float
    r_squared: float


def signed_profile(sdi: Array) -> Array:
    """Influence of each loop step, with its sign, over all pairs (paper, Fig. 3): ``(N, Q, steps) -> (steps,)``."""
    profile: Array = np.asarray(sdi, dtype=np.float64).sum((0, 1))
    return profile


def energy_profile(sdi: Array) -> Array:
    """The same of absolute values: what a step does, whether or not pairs cancel."""
    profile: Array = np.abs(np.asarray(sdi, dtype=np.float64)).sum((0, 1))
    return profile


def shares(profile: Array) -> Array:
    """A profile over its sum. Shares of a signed profile can be negative or above 1 where steps cancel.

    Raises:
        ValueError: the profile sums to zero.
    """
    profile = np.asarray(profile, dtype=np.float64)
    total = float(profile.sum())
    if total == 0:
        raise ValueError("profile: sums to zero, so it has no shares; use more examples or other weights")
    return profile / total


def cancellation(sdi: Array) -> float:
    """``|sum of influences| / sum of |influences|`` of pairs, their steps added: 1 if all have one sign."""
    pairs = np.asarray(sdi, dtype=np.float64).sum(-1)
    size = float(np.abs(pairs).sum())
    if size == 0:
        raise ValueError("sdi: all influences are zero; use other examples or weights")
    return float(abs(pairs.sum())) / size


def last_share_interval(sdi: Array, *, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval over queries of the signed share of the last step.

    Args:
        sdi: ``(N, Q, steps)``, at least two queries.
        seed: of the resampling.
        level: of confidence.
    """
    by_query = np.asarray(sdi, dtype=np.float64).sum(0)  # (Q, steps)
    found = stats.bootstrap(
        (by_query[:, -1], by_query.sum(-1)), lambda last, total, axis=-1: last.sum(axis) / total.sum(axis),
        paired=True, vectorized=True, n_resamples=2000, confidence_level=level, method="percentile",
        random_state=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def growth(profile: Array) -> Growth | None:
    """Fit ``log(profile)`` by a line over the loop steps.

    Returns:
        None for fewer than four steps, or a profile that is not positive throughout: there is no rate then.
    """
    profile = np.asarray(profile, dtype=np.float64)
    if len(profile) < 4 or not np.all(profile > 0):
        return None
    fit = stats.linregress(np.arange(1, len(profile) + 1), np.log(profile))
    half = float(stats.t.ppf(0.975, len(profile) - 2)) * float(fit.stderr)
    slope = float(fit.slope)
    return Growth(
        float(np.exp(slope)), float(np.exp(slope - half)), float(np.exp(slope + half)), float(fit.rvalue) ** 2
    )
