"""What is kept of retraining, what is refused, and what a seed draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from additive import additive
from stepinfluence.evaluation import Problem
from stepinfluence.evaluation.retraining import Retrainings, draws, training_seed


def fill(problem: Problem, folder: Path) -> Retrainings:
    trained = Retrainings(problem, folder)
    trained.model(0)
    for left_out in (1, 2):
        trained.outcome(0, np.delete(trained.everyone, left_out), what="left out")
    return trained


def test_nothing_that_is_kept_is_trained_again(tmp_path: Path) -> None:
    first = fill(additive(), tmp_path)
    fits: list[int] = []
    again = Retrainings(additive(fits=fits), tmp_path)
    assert len(fits) == 1  # one model is trained to see that the training is still the same
    rows = np.delete(again.everyone, 2)
    kept = again.outcome(0, rows, what="left out")
    np.testing.assert_array_equal(kept.losses, first.outcome(0, rows, what="left out").losses)
    assert kept.correct is not None
    assert kept.correct.dtype == bool
    torch.testing.assert_close(again.model(0).losses, first.model(0).losses, rtol=0, atol=0)
    assert len(fits) == 1
    assert again.used == 2
    again.outcome(1, again.everyone, what="all")
    again.outcome(0, again.everyone, repeat=1, what="all")
    assert len(fits) == 3


def test_a_line_that_was_cut_off_is_trained_again(tmp_path: Path) -> None:
    fill(additive(), tmp_path)
    path = tmp_path / "seed-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    fits: list[int] = []
    fill(additive(fits=fits), tmp_path)
    assert len(fits) == 2  # the check, and the model of the cut line
    times = [line.split(b'"losses"')[1] for line in path.read_bytes().splitlines()]
    assert times == [line.split(b'"losses"')[1] for line in whole.splitlines()]


def test_weights_that_are_gone_are_trained_again(tmp_path: Path) -> None:
    fill(additive(), tmp_path)
    (tmp_path / "seed-0-repeat-0.pt").unlink()
    fits: list[int] = []
    trained = Retrainings(additive(fits=fits), tmp_path)
    trained.model(0)
    assert len(fits) == 1


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    fill(additive(), tmp_path)
    with pytest.raises(ValueError, match="holds models with problem 'additive', now it is 'other'"):
        Retrainings(replace(additive(), name="other"), tmp_path)
    with pytest.raises(ValueError, match="holds models with data"):
        Retrainings(replace(additive(), queries=[0, 1]), tmp_path)
    with pytest.raises(ValueError, match="are of another training"):
        Retrainings(additive(noise=2.0), tmp_path)
    Retrainings(additive(), tmp_path)  # none of this spoilt it
    with (tmp_path / "seed-0.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"line 4 of .*seed-0.jsonl is no model's"):
        Retrainings(additive(), tmp_path)


def test_more_draws_begin_with_the_fewer() -> None:
    problem = additive()
    few, many = draws(problem, 3, subsets=3, left_out=2), draws(problem, 3, subsets=9, left_out=20)
    np.testing.assert_array_equal(few.halves, many.halves[:3])
    np.testing.assert_array_equal(few.left_out, many.left_out[:2])
    np.testing.assert_array_equal(few.queries, many.queries)
    assert (many.halves.sum(1) == 10).all()
    assert sorted(many.left_out) == list(range(20))
    other = draws(problem, 4, subsets=9, left_out=20)
    assert (other.halves != many.halves).any()
    assert list(other.left_out) != list(many.left_out)


def test_planted_errors_and_others_take_turns() -> None:
    for seed in range(5):
        planted = draws(additive(), seed, subsets=3, left_out=10).left_out < 4
        assert planted.tolist() == [True, False] * 4 + [False, False]
    drawn = [draws(additive(mislabelled=False), s, subsets=3, left_out=1).left_out[0] for s in range(40)]
    assert any(row < 4 for row in drawn)
    assert any(row >= 4 for row in drawn)


def test_more_examples_left_out_than_there_are() -> None:
    with pytest.raises(ValueError, match="left_out: got 21; additive has 20"):
        draws(additive(), 0, subsets=3, left_out=21)


def test_no_two_runs_share_a_training_seed() -> None:
    assert len({training_seed(s, r) for s in range(50) for r in range(20)}) == 1000
