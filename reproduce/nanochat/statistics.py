"""Where in the loop influence sits: shares, growth, and how sure of them one can be.

Intervals are over queries: they are drawn anew, with all that training examples do to them, and the middle 95 % of what
comes out is taken. What is compared on the same queries is compared on the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from reproduce.arrays import Array

DRAWS = 2000
LEVEL = 0.95
FIT_STEPS = 4
"""A rate needs at least as many loop steps."""
GOOD_FIT = 0.9
"""R squared of a geometric fit under which one rate does not describe the profile."""
HALF = 0.5
"""What the paper says the last step usually holds at least."""
Statistic: TypeAlias = Callable[[Array], Array]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval over queries."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Growth:
    """Geometric fit ``value ~ ratio ** t``: the ratio, its interval over queries, the fit's R squared (log scale)."""

    ratio: float
    low: float
    high: float
    r_squared: float

    @property
    def shown(self) -> bool:
        """Whether the profile grows, and by one rate: the interval is above 1, and the line describes the profile."""
        return self.low > 1 and self.r_squared >= GOOD_FIT


@dataclass(frozen=True)
class Verdict:
    """The test of Figure 3's growth.

    Attributes:
        steps: loop counts that were tested: those of at least :data:`FIT_STEPS`.
        half: of these, where the interval of the last step's signed share lies above one half.
        grows: where absolute influence grows by one rate (:attr:`Growth.shown`).
        compared: tested loop counts at which the untrained model was measured, too.
        faster, slower: of these, where the rate is above or below the untrained model's, the interval of the difference
            of logarithms lying on one side of zero.
        larger: of these, where the last step's absolute share is above the untrained model's, in the same sense.
    """

    steps: tuple[int, ...]
    half: tuple[int, ...]
    grows: tuple[int, ...]
    compared: tuple[int, ...]
    faster: tuple[int, ...]
    slower: tuple[int, ...]
    larger: tuple[int, ...]

    @property
    def appears(self) -> bool:
        """Both parts of what the paper says, at every loop count."""
        return bool(self.steps) and self.half == self.grows == self.steps


def signed_by_query(sdi: Array) -> Array:
    """Influence of each loop step on each query, with its sign: ``(N, Q, steps) -> (Q, steps)``."""
    found: Array = np.asarray(sdi, dtype=np.float64).sum(0)
    return found


def energy_by_query(sdi: Array) -> Array:
    """The same of absolute values: what a step does, whether or not pairs cancel."""
    found: Array = np.abs(np.asarray(sdi, dtype=np.float64)).sum(0)
    return found


def signed_profile(sdi: Array) -> Array:
    """Influence of each loop step, with its sign, over all pairs (paper, Fig. 3): ``(N, Q, steps) -> (steps,)``."""
    profile: Array = signed_by_query(sdi).sum(0)
    return profile


def energy_profile(sdi: Array) -> Array:
    """The same of absolute values."""
    profile: Array = energy_by_query(sdi).sum(0)
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


def last_share(profiles: Array) -> Array:
    """Share of the last step: ``(..., steps) -> (...)``."""
    found: Array = profiles[..., -1] / profiles.sum(-1)
    return found


def log_rate(profiles: Array) -> Array:
    """Slope of the logarithm over the loop steps, by least squares: ``(..., steps) -> (...)``; profiles positive."""
    t = np.arange(profiles.shape[-1], dtype=np.float64)
    t -= t.mean()
    found: Array = np.log(profiles) @ t / (t @ t)
    return found


def draws(queries: int, *, seed: int) -> Array:
    """How often each query is drawn in each resampling: ``(DRAWS, queries)``, rows sum to ``queries``."""
    drawn = np.random.default_rng(seed).multinomial(queries, np.full(queries, 1 / queries), size=DRAWS)
    return drawn.astype(np.float64)


def estimate(by_query: Array, statistic: Statistic, drawn: Array) -> Estimate:
    """A statistic of the summed profile.

    Args:
        by_query: ``(Q, steps)``.
        statistic: of profiles, ``(..., steps) -> (...)``.
        drawn: as :func:`draws` gives it.
    """
    return _estimate(float(statistic(by_query.sum(0))), statistic(drawn @ by_query))


def difference(by_query: Array, other: Array, statistic: Statistic, drawn: Array) -> Estimate:
    """A statistic less that of another profile on the same queries, both ``(Q, steps)``."""
    value = float(statistic(by_query.sum(0)) - statistic(other.sum(0)))
    return _estimate(value, statistic(drawn @ by_query) - statistic(drawn @ other))


def growth(by_query: Array, drawn: Array) -> Growth | None:
    """Fit the logarithm of the summed profile by a line over the loop steps.

    Args:
        by_query: ``(Q, steps)``.
        drawn: as :func:`draws` gives it.

    Returns:
        None for fewer than four steps, or a profile that is not positive throughout, in whatever draw of queries:
        there is no rate then.
    """
    profile = by_query.sum(0)
    resampled = drawn @ by_query
    if len(profile) < FIT_STEPS or not np.all(profile > 0) or not np.all(resampled > 0):
        return None
    found = estimate(by_query, log_rate, drawn)
    logs = np.log(profile)
    fitted = logs.mean() + found.value * (np.arange(len(profile)) - (len(profile) - 1) / 2)
    spread = float(np.square(logs - logs.mean()).sum())
    r_squared = 1 - float(np.square(logs - fitted).sum()) / spread if spread > 0 else 1.0
    return Growth(float(np.exp(found.value)), float(np.exp(found.low)), float(np.exp(found.high)), r_squared)


def verdict(sdi: Mapping[int, Array], untrained: Mapping[int, Array], *, seed: int) -> Verdict:
    """Test Figure 3's growth.

    Args:
        sdi: loop count -> ``(N, Q, steps)``.
        untrained: the same of an untrained model, at whichever loop counts it was measured.
        seed: of the draws of queries.
    """
    steps = tuple(sorted(t for t in sdi if t >= FIT_STEPS))
    half, grows, faster, slower, larger = [], [], [], [], []
    for t in steps:
        drawn = draws(sdi[t].shape[1], seed=seed)
        energy = energy_by_query(sdi[t])
        if estimate(signed_by_query(sdi[t]), last_share, drawn).low > HALF:
            half.append(t)
        fit = growth(energy, drawn)
        if fit is not None and fit.shown:
            grows.append(t)
        if t in untrained:
            other = energy_by_query(untrained[t])
            if np.all(drawn @ energy > 0) and np.all(drawn @ other > 0):
                rate = difference(energy, other, log_rate, drawn)
                faster += [t] * (rate.low > 0)
                slower += [t] * (rate.high < 0)
            if difference(energy, other, last_share, drawn).low > 0:
                larger.append(t)
    compared = tuple(t for t in steps if t in untrained)
    return Verdict(steps, tuple(half), tuple(grows), compared, tuple(faster), tuple(slower), tuple(larger))


def _estimate(value: float, resampled: Array) -> Estimate:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))


def sentence(tested: Verdict) -> str:
    """The outcome of :func:`verdict` in words, with the test that it rests on."""
    if not tested.steps:
        return f"No loop count of {FIT_STEPS} or more was measured, so that nothing is said of Figure 3's growth."
    how = "appears" if tested.appears else "appears in part" if tested.half or tested.grows else "does not appear"
    said = (
        f"**Figure 3's growth {how}**: of τ = {listed(tested.steps)}, the last step holds more than half of the "
        f"signed influence at {which(tested.half, tested.steps)} (its 95 % interval over queries lies above {HALF}), "
        f"and absolute influence grows geometrically at {which(tested.grows, tested.steps)} (the interval of the rate "
        f"lies above 1, R² is at least {GOOD_FIT})."
    )
    if tested.compared:
        where = tested.compared
        said += (
            f" Against the untrained model, at τ = {listed(where)}, the rate is larger at "
            f"{which(tested.faster, where)} and smaller at {which(tested.slower, where)}, the last step's absolute "
            f"share larger at {which(tested.larger, where)} (the interval of the difference lies on that side of 0)."
        )
    return said


def which(some: Sequence[int], tested: Sequence[int]) -> str:
    """``"none"``, ``"all"`` of what was tested, or the numbers themselves."""
    if not some:
        return "none"
    return "all" if list(some) == list(tested) else listed(some)


def listed(some: Sequence[int]) -> str:
    """Numbers with commas between them."""
    return ", ".join(map(str, some))
