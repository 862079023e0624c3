"""The parity experiment's statistics, on series, automata and transitions that are known beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from reproduce.parity.clock import clock
from reproduce.parity.proxy import UNSEEN, ProxyCircuit, score
from reproduce.parity.statistics import (
    delay,
    determinism,
    dominant_cycle,
    dominant_frequency,
    lagged_cosine,
    transition_matrix,
)

SAWTOOTH = np.tile([0.0, 1.0, 2.0, 3.0], 10)


def test_frequency_of_a_wave() -> None:
    steps = np.arange(40)
    for cycles in (0.1, 0.25, 0.4):
        wave = np.cos(2 * np.pi * cycles * steps + 1) + 0.05 * steps
        assert dominant_frequency(wave) == pytest.approx(cycles, abs=0.003)
    assert np.isnan(dominant_frequency(2.0 * steps))


def test_cosine_of_a_rotation() -> None:
    angle = np.arange(12) * np.pi / 2
    turning = np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.linspace(1, 2, 12)[:, None]
    for lag, want in ((1, 0), (2, -1), (4, 1)):
        np.testing.assert_allclose(lagged_cosine(turning, lag), want, atol=1e-12)
        assert lagged_cosine(turning, lag).shape == (12 - lag,)
    with pytest.raises(ValueError, match="lag"):
        lagged_cosine(turning, 12)


def test_delay_has_its_sign() -> None:
    following = np.roll(SAWTOOTH, 1)
    assert delay(SAWTOOTH[5:-5], following[5:-5], range(4))[0] == 1
    assert delay(following[5:-5], SAWTOOTH[5:-5], range(-1, 3))[0] == -1
    assert delay(SAWTOOTH, SAWTOOTH, range(4)) == (0, pytest.approx(1))


def test_transitions_of_the_papers_shape() -> None:
    # A four-state cycle 0 2 1 3 after one self-loop of state 1.
    states = [1, 1, 3, 0, 2] + [1, 3, 0, 2] * 4
    matrix = transition_matrix(states, 4)
    left = 1 / 6  # state 1 is left six times, once for itself
    want = [[0, 0, 1, 0], [0, left, 0, 1 - left], [0, 1, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_allclose(matrix, want)
    assert dominant_cycle(matrix) == (0, 2, 1, 3)
    assert determinism(states, 4) == pytest.approx(1 - 1 / 20)


def test_a_state_that_is_never_left() -> None:
    np.testing.assert_array_equal(transition_matrix([0, 1, 1, 2], 4)[2:], np.zeros((2, 4)))
    assert dominant_cycle(transition_matrix([0, 1, 2], 3)) == ()
    assert dominant_cycle(transition_matrix([0, 1, 1, 1], 2)) == (1,)
    with pytest.raises(ValueError, match=r"pass 0 \.\. 2"):
        transition_matrix([0, 3], 3)


def corners(states: list[int], noise: float = 0.0) -> np.ndarray:
    """States of a four-state automaton as points near the corners of a square."""
    place = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    return place[states] + noise * np.random.default_rng(len(states)).normal(size=(len(states), 2))


def test_a_known_automaton_is_read_off() -> None:
    path = [0, 1, 2, 3] * 6
    table = np.array([0, 1, 1, 0])
    calibration = [0, 1, 2, 3, 3, 2, 1, 0] * 4
    proxy = ProxyCircuit.fit(corners(path, 0.05), corners(calibration, 0.05), table[calibration])
    np.testing.assert_array_equal(proxy.lookup, table)  # states are numbered as they are first visited
    np.testing.assert_array_equal(proxy.assign(corners(path))[0], path)
    np.testing.assert_array_equal(proxy.counts, [[8, 0], [0, 8], [0, 8], [8, 0]])
    judged = [3, 1, 2, 0, 0]
    found = score(proxy, corners(judged), table[judged], 1 - table[judged])
    assert (found.n, found.accuracy, found.agreement, found.coverage, found.selective) == (5, 1, 0, 1, 1)


def test_far_states_are_left_out_of_the_selective_accuracy() -> None:
    path = [0, 1, 2, 3] * 6
    proxy = ProxyCircuit.fit(corners(path), corners([0, 1, 2, 3] * 5, 0.02), np.tile([0, 1, 1, 0], 5))
    hidden = np.concatenate([corners([0, 1, 2]), 3 * corners([0])])
    truth = np.array([0, 1, 0, 1])
    found = score(proxy, hidden, truth, truth)
    assert found.accuracy == 0.5  # the third is near and wrong, the fourth is far and wrong
    assert found.coverage == 0.75
    assert found.selective == pytest.approx(2 / 3)


def test_a_state_that_calibration_never_reached_has_no_answer() -> None:
    proxy = ProxyCircuit.fit(corners([0, 1, 2, 3] * 3), corners([0, 1, 0, 1], 0.01), np.array([0, 1, 0, 1]))
    assert proxy.lookup.tolist() == [0, 1, UNSEEN, UNSEEN]
    found = score(proxy, corners([2, 3]), np.array([0, 1]), np.array([0, 1]))
    assert found.accuracy == 0
    empty = score(proxy, corners([]), np.array([], int), np.array([], int))
    assert empty.n == 0
    assert np.isnan(empty.accuracy)


@pytest.mark.parametrize("right", [True, False])
def test_clock(right: bool) -> None:
    ones = np.arange(2, 39)
    steps = np.arange(1, 41)
    turn = ones / 80 if right else np.full(len(ones), 0.25)
    series = np.cos(2 * np.pi * turn[:, None] * steps)
    found = clock(series, ones, 40)
    assert len(found.found) == 35 - 5 + 1  # at least an eighth of either bit
    assert found.keeps_time is right
    if right:
        assert found.slope == pytest.approx(1, abs=0.02)
        assert found.error < 0.005
    with pytest.raises(ValueError, match="series"):
        clock(series, ones[1:], 40)
