"""Statistics of the experiment ``planted`` on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from reproduce.planted import statistics


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_rank_biserial_from_best_to_worst() -> None:
    critical = np.array([False, True, False, True])
    assert statistics.rank_biserial(np.array([0.0, 3.0, 1.0, 2.0]), critical) == 1
    assert statistics.rank_biserial(np.array([3.0, 0.0, 2.0, 1.0]), critical) == -1
    assert statistics.rank_biserial(np.ones(4), critical) == 0
    # Of the four pairs of a critical and another example three are in order.
    assert statistics.rank_biserial(np.array([0.0, 3.0, 2.0, 1.0]), critical) == pytest.approx(2 * 3 / 4 - 1)


def test_balanced_spearman_reaches_its_ceiling() -> None:
    scores = np.arange(100.0)
    critical = scores >= 97
    found = statistics.balanced_spearman(scores, critical, rng())
    # Against a half-tied truth: 3 sqrt(3 / 35) for three of six, sqrt(3) / 2 for many.
    assert found == pytest.approx(3 * np.sqrt(3 / 35))
    assert statistics.balanced_spearman_ceiling(3, equal=False) == pytest.approx(3 * np.sqrt(3 / 35))
    assert statistics.balanced_spearman_ceiling(1000, equal=False) == pytest.approx(np.sqrt(3) / 2, abs=1e-5)
    # Copies have one score: ranks 1, 2, 3, 5, 5, 5 against 2, 2, 2, 5, 5, 5.
    tied = statistics.balanced_spearman(np.minimum(scores, 97.0), critical, rng())
    assert tied == pytest.approx(13.5 / np.sqrt(15.5 * 13.5))
    assert statistics.balanced_spearman_ceiling(3, equal=True) == pytest.approx(tied)


def test_profiles_that_rise_and_fall_together() -> None:
    changes = np.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert statistics.profile_correlation(changes**2 + 5, changes) == pytest.approx(1)
    assert statistics.profile_correlation(-changes, changes) == pytest.approx(-1)
    # One query is right, one is wrong, and the constant one does not count.
    mixed = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [9.0, 0.0, 3.0]])
    assert statistics.profile_correlation(mixed, changes) == pytest.approx(0)
    assert np.isnan(statistics.profile_correlation(mixed, np.ones((3, 3))))


def test_peaks_count_where_changes_are_largest_ties_included() -> None:
    changes = np.array([[2.0, 2.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
    energy = np.array([[1.0, 5.0, 0.0], [4.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    assert statistics.peak_alignment(energy, changes) == 0.5
    assert np.isnan(statistics.peak_alignment(energy, np.ones((3, 3))))


def test_residuals_forget_what_all_queries_share() -> None:
    generator = rng()
    common = np.array([8.0, 4.0, 2.0, 1.0])
    noise = generator.normal(size=(50, 4))
    changes = common + noise - noise.mean(1, keepdims=True)  # every query's sum is the same
    unrelated = common + 0.1 * generator.normal(size=(50, 4))
    related = common + 0.1 * (changes - common)
    assert statistics.profile_correlation(unrelated, changes) > 0.8
    assert abs(statistics.residual_correlation(unrelated, changes)) < 0.2
    assert statistics.residual_correlation(related, changes) == pytest.approx(1)
    assert np.isnan(statistics.residual_correlation(related, np.tile(common, (50, 1))))


@pytest.mark.parametrize("over", ["queries", "steps"])
def test_permutations_find_what_belongs_together(over: str) -> None:
    changes = rng().normal(size=(40, 6))
    settings = {"over": over, "resamples": 99, "rng": rng()}
    related = statistics.permutation_test(statistics.profile_correlation, changes, changes, **settings)  # type: ignore[arg-type]
    assert related.value == pytest.approx(1)
    assert related.p == 0.01
    assert abs(related.null) < 0.1
    unrelated = rng().normal(size=(40, 6))[::-1]
    assert statistics.permutation_test(statistics.profile_correlation, unrelated, changes, **settings).p > 0.05  # type: ignore[arg-type]


def test_another_querys_changes_keep_the_common_trend() -> None:
    generator = rng()
    trend = np.array([5.0, 3.0, 1.0])
    energy, changes = (trend + 0.1 * generator.normal(size=(30, 3)) for _ in range(2))
    found = {
        over: statistics.permutation_test(
            statistics.profile_correlation, energy, changes, over=over, resamples=99, rng=rng()
        )
        for over in ("queries", "steps")
    }
    assert found["steps"].p == 0.01
    assert found["queries"].null > 0.95
    assert found["queries"].p > 0.05


def test_an_unknown_permutation_is_refused() -> None:
    with pytest.raises(ValueError, match="over: got 'rows'"):
        statistics.permutation_test(
            statistics.peak_alignment, np.eye(2), np.eye(2), over="rows", resamples=1, rng=rng()
        )


def test_intervals_cover_the_mean_and_shrink() -> None:
    few, many = (rng().normal(size=(n, n)) + 3 for n in (5, 50))
    for values in (few, many):
        mean, low, high = statistics.two_way_interval(values, resamples=500, rng=rng())
        assert mean == pytest.approx(values.mean())
        assert low < mean < high
    narrow, wide = (
        high - low for _, low, high in (statistics.two_way_interval(v, resamples=500, rng=rng()) for v in (many, few))
    )
    assert narrow < wide / 3
    mean, low, high = statistics.interval(few.ravel(), resamples=500, rng=rng())
    # Standard error of the mean, as the bootstrap is to find it.
    assert high - low == pytest.approx(2 * 1.96 * few.std() / 5, rel=0.15)
    assert statistics.interval(np.array([2.0, 2.0]), resamples=10, rng=rng()) == (2.0, 2.0, 2.0)


def test_two_way_intervals_take_queries_for_what_they_are() -> None:
    # Seeds that agree on every query: only the two queries vary, and all of that shows.
    values = np.tile([0.0, 1.0], (20, 1))
    _, low, high = statistics.two_way_interval(values, resamples=500, rng=rng())
    assert (low, high) == (0.0, 1.0)


def test_auc_with_interval() -> None:
    scores = np.array([0.0, 1.0, 2.0, 2.0, 3.0, 4.0])
    positive = np.array([False, False, False, True, True, True])
    area, low, high = statistics.auc_interval(scores, positive, resamples=200, rng=rng())
    assert area == pytest.approx((9 - 0.5) / 9)
    assert low <= area <= high == 1.0
