"""Statistics of the looped language model experiment against cases made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from reproduce.nanochat.statistics import (
    Verdict,
    cancellation,
    difference,
    draws,
    energy_profile,
    estimate,
    growth,
    last_share,
    log_rate,
    sentence,
    shares,
    signed_by_query,
    signed_profile,
    verdict,
)


def test_profiles_by_hand() -> None:
    sdi = np.array([[[1.0, 3.0], [-1.0, 2.0]]])  # one training example, two queries, two steps
    assert signed_profile(sdi).tolist() == [0.0, 5.0]
    assert energy_profile(sdi).tolist() == [2.0, 5.0]
    assert shares(energy_profile(sdi)).tolist() == [2 / 7, 5 / 7]
    assert cancellation(sdi) == 1.0
    assert cancellation(np.array([[[1.0, 2.0], [-2.0, 0.0]]])) == pytest.approx(1 / 5)
    with pytest.raises(ValueError, match="profile: sums to zero"):
        shares(np.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="sdi: all influences are zero"):
        cancellation(np.zeros((1, 2, 2)))


def test_growth_by_hand() -> None:
    profile, drawn = np.array([0.5, 1.0, 2.0, 4.0]), draws(3, seed=0)
    fit = growth(np.stack([profile, 2 * profile, 5 * profile]), drawn)
    assert fit is not None
    assert [fit.ratio, fit.low, fit.high] == pytest.approx([2, 2, 2])  # whatever queries are drawn
    assert fit.r_squared == pytest.approx(1)
    assert fit.shown
    bent = growth(np.array([[1.0, 2.0, 2.0, 4.0]]), draws(1, seed=0))
    assert bent is not None
    # Least squares on log2: 0, 1, 1, 2 has slope 0.6 and leaves 0.2 of 2.
    assert bent.ratio == pytest.approx(2**0.6)
    assert bent.r_squared == pytest.approx(0.9)
    two = growth(np.array([profile, profile[::-1]]), draws(2, seed=0))
    assert two is not None
    assert (two.low, two.high) == (pytest.approx(0.5), pytest.approx(2))
    assert not two.shown
    flat = growth(np.ones((2, 4)), draws(2, seed=0))
    assert flat is not None
    assert not flat.shown
    assert growth(np.array([[1.0, 2.0, 4.0]]), draws(1, seed=0)) is None
    assert growth(np.array([[1.0, -1.0, 2.0, 3.0]]), draws(1, seed=0)) is None
    sometimes = np.array([[3.0, 1.0, 2.0, 3.0], [-1.0, 1.0, 2.0, 3.0]])
    assert growth(sometimes, draws(2, seed=0)) is None  # negative where the second query is drawn twice


def test_intervals_cover_what_they_should() -> None:
    rng = np.random.default_rng(0)
    sdi = np.abs(rng.normal(size=(3, 40, 4)))
    sdi[..., -1] *= 5
    drawn = draws(40, seed=0)
    assert drawn.sum(1).tolist() == [40.0] * len(drawn)
    found = estimate(signed_by_query(sdi), last_share, drawn)
    assert found.value == pytest.approx(sdi[..., -1].sum() / sdi.sum())
    assert found.low < found.value < found.high
    assert estimate(signed_by_query(sdi), last_share, draws(40, seed=0)) == found
    wide = estimate(signed_by_query(sdi[:, :5]), last_share, draws(5, seed=0))
    assert wide.high - wide.low > found.high - found.low
    covered = 0
    for trial in range(200):  # share of the last step of Exp(1), ..., Exp(1), 3 Exp(1): one half
        one = np.random.default_rng(trial).exponential(size=(1, 30, 4)) * np.array([1.0, 1.0, 1.0, 3.0])
        interval = estimate(signed_by_query(one), last_share, draws(30, seed=trial))
        covered += interval.low < 0.5 < interval.high
    assert 175 <= covered <= 199


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    base = rng.exponential(size=(30, 4))
    steeper = base * np.array([1.0, 1.1, 1.21, 1.331])
    found = difference(steeper, base, log_rate, draws(30, seed=0))
    assert found.value == pytest.approx(np.log(1.1), abs=0.02)
    assert found.low > 0  # though each one's own interval holds the other's
    assert estimate(base, log_rate, draws(30, seed=0)).high > estimate(steeper, log_rate, draws(30, seed=0)).low
    assert difference(base, base, last_share, draws(30, seed=0)) == difference(base, base, log_rate, draws(30, seed=0))


def made(rate: float, steps: int, *, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).uniform(0.9, 1.1, size=(4, 12, steps))
    return noise * rate ** np.arange(steps)


def test_verdict_of_growth_put_in() -> None:
    sdi = {t: made(3.0, t) for t in (2, 4, 8)}
    found = verdict(sdi, {4: made(1.5, 4), 16: made(1.5, 16)}, seed=0)
    assert found == Verdict((4, 8), (4, 8), (4, 8), (4,), (4,), (), (4,))
    assert found.appears
    assert "growth appears**: of τ = 4, 8" in sentence(found)
    assert "at τ = 4, the rate is larger at all and smaller at none, the last step's" in sentence(found)
    same = verdict(sdi, {t: made(3.0, t, seed=1) for t in (4, 8)}, seed=0)
    assert same.appears
    assert (same.faster, same.slower, same.larger) == ((), (), ())
    less = verdict(sdi, {t: made(9.0, t) for t in (4, 8)}, seed=0)
    assert (less.faster, less.slower, less.larger) == ((), (4, 8), ())
    assert "the rate is larger at none" in sentence(same)


def test_verdict_without_growth() -> None:
    flat = verdict({t: made(1.0, t) for t in (4, 8)}, {}, seed=0)
    assert (flat.half, flat.grows, flat.compared) == ((), (), ())
    assert "growth does not appear**" in sentence(flat)
    assert "untrained" not in sentence(flat)
    slow = verdict({4: made(1.5, 4), 8: made(3.0, 8)}, {}, seed=0)  # a rate, but less than half at the last step
    assert (slow.half, slow.grows) == ((8,), (4, 8))
    assert not slow.appears
    assert "growth appears in part**: of τ = 4, 8, the last step holds more than half" in sentence(slow)
    assert "influence at 8 (its" in sentence(slow)
    none = verdict({2: made(3.0, 2)}, {}, seed=0)
    assert not none.appears
    assert sentence(none).startswith("No loop count of 4 or more")
