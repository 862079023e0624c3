"""The one test of periods: on repeated patterns, noise, and curves that have none."""

from __future__ import annotations

import numpy as np
import pytest
from stepinfluence.attribution.periods import (
    NO_PERIOD,
    SIGNIFICANT,
    Period,
    autocorrelation,
    period,
    period_of,
    rankdata,
)


def test_autocorrelation_by_its_definition() -> None:
    values = np.random.default_rng(0).normal(size=30) + np.linspace(0, 9, 30)
    rest = values - np.polyval(np.polyfit(np.arange(30), values, 1), np.arange(30))
    want = [np.dot(rest[: 30 - lag], rest[lag:]) / np.dot(rest, rest) for lag in range(30)]
    np.testing.assert_allclose(autocorrelation(values), want, atol=1e-12)


@pytest.mark.parametrize("length", [3, 4, 5, 7])
def test_period_of_a_repeated_pattern_on_a_trend(length: int) -> None:
    pattern = np.arange(float(length)) ** 2
    found = period(np.tile(pattern, 8) + 0.3 * np.arange(8 * length), orders=99)
    assert found.lag == length
    assert found.correlation > 0.7
    assert found.p_value == pytest.approx(0.01)


def test_noise_has_no_significant_period() -> None:
    values = [period(np.random.default_rng(seed).normal(size=40), orders=99).p_value for seed in range(20)]
    assert 0.2 < np.mean(values) < 0.8  # uniform if nothing is there


def test_a_bump_has_no_period() -> None:
    found = period(np.exp(-((np.arange(40) - 20) ** 2) / 200.0), orders=9)
    assert found.lag == 0
    assert found.correlation == 0
    assert found.p_value == 1


@pytest.mark.parametrize(
    "bad", [[1.0, 2.0], [1.0, np.nan, 3.0, 4.0, 5.0, 1.0, 2.0, 3.0], np.arange(10.0), np.zeros(10)]
)
def test_series_without_autocorrelation_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="series"):
        period(bad)


def test_found_only_where_the_test_supports_it() -> None:
    sawtooth = np.tile([0.0, 1.0, 2.0, 3.0], 5)
    assert period_of(sawtooth).found
    assert period_of(sawtooth).lag == 4
    assert not period_of(np.random.default_rng(0).permutation(sawtooth)).found
    assert Period(4, 0.5, SIGNIFICANT).found
    assert not Period(4, 0.9, 1.01 * SIGNIFICANT).found
    assert not Period(0, 0.0, 0.001).found


@pytest.mark.parametrize("curve", [[], [1.0, 2.0], np.ones(40), np.arange(40.0), np.zeros(9)])
def test_curves_that_cannot_have_a_period(curve: list[float]) -> None:
    assert period_of(curve) == NO_PERIOD
    assert not NO_PERIOD.found


def test_neither_a_huge_first_value_nor_an_envelope_hides_a_rhythm() -> None:
    steps = np.arange(32)
    curve = np.exp(0.1 * steps) * (1.2 + np.cos(np.pi * steps / 2))
    curve[0] = 50 * curve.max()
    assert period(curve).p_value > SIGNIFICANT  # the plain one is blind
    assert period_of(curve).found
    assert period_of(curve).lag == 4
    assert period_of(-curve).lag == 4


@pytest.mark.parametrize("kind", ["noise", "walk", "growing", "smooth"])
def test_curves_without_a_rhythm_are_rarely_said_to_have_one(kind: str) -> None:
    """At a level of 0.01, with 200 curves: more than 8 has a probability of 0.0005."""
    found = 0
    for seed in range(200):
        noise = np.random.default_rng(seed).normal(size=33)
        walk = np.cumsum(noise)[:30]
        smooth = np.convolve(noise, np.ones(4), "valid")
        found += period_of(
            {"noise": noise[:30], "walk": walk, "growing": np.exp(walk / 2), "smooth": smooth}[kind]
        ).found
    assert found <= 8


def test_ranks() -> None:
    assert rankdata([3.0, -1.0, 3.0, 10.0]).tolist() == [1.5, 0.0, 1.5, 3.0]


def test_p_value_counts_orders_with_a_peak_as_high() -> None:
    """Against a plain loop over the same random orders."""
    values = np.random.default_rng(5).normal(size=20)

    def highest(series: np.ndarray) -> float:
        curve = autocorrelation(series)
        lags = range(2, len(curve) // 2 + 1)
        peaks = [curve[k] for k in lags if curve[k - 1] < curve[k] > curve[k + 1] and curve[k] > 0]
        return max(peaks, default=0.0)

    draw = np.random.default_rng(3)
    others = [highest(values[draw.permutation(20)]) for _ in range(99)]
    found = period(values, orders=99, seed=3)
    assert found.correlation == pytest.approx(highest(values))
    assert found.p_value == pytest.approx((1 + sum(o >= found.correlation - 1e-12 for o in others)) / 100)
