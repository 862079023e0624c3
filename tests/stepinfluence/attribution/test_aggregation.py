"""Sums over checkpoints: what dominates is named, and what is balanced cannot be dominated."""

from __future__ import annotations

import numpy as np
import pytest
from stepinfluence.attribution.aggregation import (
    DOMINATES,
    balanced,
    dominating,
    energy_of,
    energy_shares,
    equal_weights,
)

NAMES = ("update 1", "update 2", "update 3")


def parts(seed: int = 0) -> np.ndarray:
    """Three checkpoints of very different size, one query without influence at the first."""
    made = np.random.default_rng(seed).normal(size=(3, 5, 2, 4)) * np.array([1.0, 1e5, 1e-3])[:, None, None, None]
    made[0, :, 1] = 0
    return made.astype(np.float32)


def test_shares_are_of_the_sum_of_absolute_values() -> None:
    energy = energy_of(parts())
    assert energy[1, 0] == pytest.approx(np.abs(parts()[1, :, 0]).astype(np.float64).sum())
    np.testing.assert_allclose(energy_shares(energy), energy / energy.sum(0))
    np.testing.assert_array_equal(energy_shares([0.0, 0.0]), [0.0, 0.0])
    np.testing.assert_allclose(energy_shares([1e308, 1e308, 0.0]), [0.5, 0.5, 0.0])


def test_only_more_than_four_fifths_dominates() -> None:
    assert dominating([DOMINATES, 1 - DOMINATES, 0.0], NAMES) is None
    assert dominating([0.0, 0.0, 0.0], NAMES) is None
    assert dominating([5.0], NAMES[:1]) is None  # all there is
    found = dominating([0.05, 0.9, 0.05], NAMES)
    assert found is not None
    assert (found.name, found.index) == ("update 2", 1)
    assert found.share == pytest.approx(0.9)
    assert found.sentence.startswith("Checkpoint update 2 holds 90.0 % of this query's SDI energy")
    nearly = dominating([1e-9, 1.0, 0.0], NAMES)
    assert nearly is not None
    assert "holds 99.9 %" in nearly.sentence  # never rounded up to all


def test_balanced_checkpoints_count_alike() -> None:
    made = parts()
    whole = balanced(made)
    each = np.stack([balanced(made[k : k + 1]) for k in range(3)])
    np.testing.assert_allclose(np.abs(each).sum((1, 3)), [[100, 0], [100, 100], [100, 100]], rtol=1e-5)
    np.testing.assert_allclose(whole[:, 0], each[:, :, 0].mean(0), rtol=1e-5)
    np.testing.assert_allclose(whole[:, 1], each[1:, :, 1].mean(0), rtol=1e-5)  # two have any
    assert (np.abs(whole).sum((0, 2)) <= 100 + 1e-4).all()
    assert dominating(energy_of(made)[:, 0], NAMES) is not None
    assert dominating((equal_weights(energy_of(made)) * energy_of(made))[:, 0], NAMES) is None


def test_balance_does_not_depend_on_the_size_of_a_checkpoint() -> None:
    made = parts()
    scaled = made * np.array([3.0, 1e-4, 7.0], dtype=np.float32)[:, None, None, None]
    np.testing.assert_allclose(balanced(scaled), balanced(made), rtol=1e-4, atol=1e-6)


def test_nothing_to_balance() -> None:
    assert not balanced(np.zeros((2, 3, 1, 4))).any()
    with pytest.raises(ValueError, match=r"parts: got shape \(2, 3\)"):
        balanced(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="energy: holds"):
        energy_shares([1.0, -1.0])
    with pytest.raises(ValueError, match="energy: got shape"):
        energy_shares(np.zeros(0))
    with pytest.raises(ValueError, match="names: got 3"):
        dominating([1.0, 2.0], NAMES)
