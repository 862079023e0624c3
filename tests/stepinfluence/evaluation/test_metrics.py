"""Figures of merit on cases whose answer is known by hand, and against dattri's functions."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from stepinfluence.evaluation import (
    bootstrap,
    leave_one_out_correlation,
    linear_datamodeling_score,
    mislabel_auc,
    randomization_check,
    top_k_overlap,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def halves(rng: np.random.Generator, count: int, n: int) -> np.ndarray:
    chosen = np.zeros((count, n), bool)
    for row in chosen:
        row[rng.permutation(n)[: n // 2]] = True
    return chosen


def test_scores_that_add_up_to_the_loss_are_perfect(rng: np.random.Generator) -> None:
    scores, subsets = rng.normal(size=(12, 3)), halves(rng, 9, 12)
    losses = 5 - subsets @ scores
    np.testing.assert_allclose(linear_datamodeling_score(scores, losses, subsets), 1)
    np.testing.assert_allclose(linear_datamodeling_score(-scores, losses, subsets), -1)


def test_lds_of_scores_without_variation_is_unknown(rng: np.random.Generator) -> None:
    found = linear_datamodeling_score(np.zeros((12, 2)), rng.normal(size=(5, 2)), halves(rng, 5, 12))
    assert np.isnan(found).all()


@pytest.mark.skipif(importlib.util.find_spec("dattri") is None, reason="dattri is not installed")
def test_lds_and_loo_agree_with_dattri(rng: np.random.Generator) -> None:
    from dattri.metric import lds, loo_corr

    scores, subsets, losses = rng.normal(size=(12, 3)), halves(rng, 9, 12), rng.normal(size=(9, 3))
    indices = torch.tensor(np.stack([np.flatnonzero(s) for s in subsets]))
    theirs, _ = lds(torch.tensor(scores), (torch.tensor(-losses), indices))
    np.testing.assert_allclose(linear_datamodeling_score(scores, losses, subsets), theirs, atol=1e-12)
    changes = rng.normal(size=(12, 3))
    theirs, _ = loo_corr(torch.tensor(scores), (torch.tensor(changes), torch.arange(12)))
    np.testing.assert_allclose(leave_one_out_correlation(scores, changes, np.arange(12)), theirs, atol=1e-12)


def test_leave_one_out_correlation_reads_the_rows_left_out() -> None:
    scores = np.array([[1.0, 0.0], [2.0, 0.0], [9.0, 0.0], [4.0, 0.0]])
    found = leave_one_out_correlation(scores, [[10.0, 1.0], [20.0, 2.0], [40.0, 3.0]], [0, 1, 3])
    assert found[0] == pytest.approx(1)
    assert np.isnan(found[1])  # the second query's scores do not vary


def test_mislabel_auc() -> None:
    assert mislabel_auc([3, 2, 1, 0], [1, 1, 0, 0]).value == 1
    assert mislabel_auc([0, 1, 2, 3], [1, 1, 0, 0]).value == 0
    assert mislabel_auc([3, 1, 2, 0], [1, 1, 0, 0]).value == 0.75
    with pytest.raises(ValueError, match="mislabelled: all examples are alike"):
        mislabel_auc([1, 2], [0, 0])


def test_mislabel_auc_is_scikit_learns(rng: np.random.Generator) -> None:
    for _ in range(5):
        suspicion, wrong = rng.integers(0, 6, 30), rng.permutation(30) < 5  # with ties
        assert mislabel_auc(suspicion, wrong).value == pytest.approx(roc_auc_score(wrong, suspicion), abs=1e-12)


def test_top_k_overlap() -> None:
    a, b = np.array([[4.0], [3.0], [2.0], [1.0]]), np.array([[4.0], [1.0], [3.0], [2.0]])
    assert top_k_overlap(a, b, 1).tolist() == [1]
    assert top_k_overlap(a, b, 2).tolist() == [0.5]
    with pytest.raises(ValueError, match="k: got 5"):
        top_k_overlap(a, b, 5)


def test_randomization_check(rng: np.random.Generator) -> None:
    scores = rng.normal(size=(20, 2))
    np.testing.assert_allclose(randomization_check(scores, scores**3), 1)
    assert np.abs(randomization_check(scores, rng.normal(size=(20, 2)))).max() < 0.6


def test_bootstrap_interval_covers_as_it_says(rng: np.random.Generator) -> None:
    """Of 200 samples with mean 0, the 90 % interval has it in about 180 (three standard deviations: 13)."""
    intervals = [bootstrap(rng.normal(size=60), confidence=0.9, draws=300, seed=s) for s in range(200)]
    assert 164 <= sum(e.low <= 0 <= e.high for e in intervals) <= 193
    assert all(e.low <= e.value <= e.high for e in intervals)


def test_bootstrap_leaves_unknown_rows_out() -> None:
    assert bootstrap([1.0, np.nan, 3.0]).value == 2
    assert np.isnan(bootstrap([np.nan]).value)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: linear_datamodeling_score(np.zeros((4, 2)), np.zeros((3, 2)), np.zeros((3, 5))), "subsets, losses"),
        (lambda: linear_datamodeling_score(np.zeros((4, 2)), np.zeros((2, 2)), np.zeros((2, 4))), "at least 3"),
        (lambda: leave_one_out_correlation(np.zeros((4, 2)), np.zeros((3, 1)), [0, 1, 2]), "changes"),
        (lambda: top_k_overlap(np.zeros((4, 2)), np.zeros((4, 1)), 1), "other"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()  # type: ignore[operator]
