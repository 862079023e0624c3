"""Metasmoothness of functions whose smoothness is known."""

from __future__ import annotations

import numpy as np
import pytest
from stepinfluence.evaluation.smoothness import sign_agreement, smoothness

SLOPES = np.random.default_rng(1).normal(size=(30, 200))


def test_smooth_functions_are_smooth_and_noise_is_not() -> None:
    linear = smoothness(lambda w: w @ SLOPES, 30, seed=0)
    assert (linear.across_steps, linear.nearby) == (1.0, 1.0)
    curved = smoothness(lambda w: np.abs((w - 1) @ SLOPES), 30, seed=0)  # a kink: central differences are all zero
    assert curved.nearby == pytest.approx(-1)
    rng = np.random.default_rng(2)
    noise = smoothness(lambda w: rng.normal(size=5000), 30, seed=0)
    assert abs(noise.across_steps) < 0.1  # independent draws: the error of 5000 signs is 0.014
    assert abs(noise.nearby) < 0.6  # neighbours share a training: signs agree less than by chance


def test_signs_are_weighed() -> None:
    assert sign_agreement(np.array([3.0, -1.0]), np.array([3.0, 1.0])) == pytest.approx((6 - 2) / 8)
    assert np.isnan(sign_agreement(np.zeros(2), np.zeros(2)))


def test_five_trainings_about_equal_weights() -> None:
    asked = []
    smoothness(lambda w: asked.append(w) or w[:3], 30, seed=4)  # type: ignore[func-returns-value]
    assert [sorted(set(np.round(w, 6).tolist())) for w in asked] == [
        [0.9, 1.1], [0.95, 1.05], [1.0], [0.95, 1.05], [0.9, 1.1]
    ]  # fmt: skip
