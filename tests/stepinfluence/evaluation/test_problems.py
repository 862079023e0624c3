"""The problems that come with the library: data, batches, models, and recipes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from stepinfluence.evaluation import Problem
from stepinfluence.evaluation.problems import PROBLEMS, make_problem
from stepinfluence.models.parity import ParityTransformer

SMALL = {"n_train": 32, "n_query": 4, "updates": 3}


@pytest.fixture(params=PROBLEMS)
def small(request: pytest.FixtureRequest) -> Problem:
    if request.param == "trm":
        pytest.importorskip("tiny_recursive_model")
    return make_problem(request.param, **SMALL)


@pytest.mark.filterwarnings("ignore")  # of what tiny-recursive-model imports
def test_a_problem_trains_and_is_asked(small: Problem) -> None:
    model = small.retrain(np.arange(32), 1)
    assert not model.training
    for side, count in (("train", 32), ("query", 4)):
        (batch,) = small.batches(side)
        assert isinstance(batch, tuple)  # TRAK and kronfluence take tuples of tensors
        losses = small.loss(model, batch)
        assert losses.shape == (count,)
        one_by_one = [small.loss(model, tuple(part[k : k + 1] for part in batch)) for k in range(count)]
        torch.testing.assert_close(torch.cat(one_by_one), losses)
    before = small.query_losses(small.untrained(1))
    assert small.query_losses(model).mean() < before.mean()
    assert torch.equal(small.loss(small.untrained(2), batch), small.loss(small.untrained(2), batch))


@pytest.mark.parametrize("name", ["adder", "majority"])
def test_planted_errors_are_where_the_problem_says(name: str) -> None:
    made = make_problem(name)
    tokens, labels = made.collate(made.train)
    truth = tokens.sum(1) % 3 if name == "adder" else (tokens.sum(1) > 4).long()
    np.testing.assert_array_equal((labels != truth).numpy(), made.mislabelled)
    seen = {tuple(t.tolist()) for t, _ in made.train}
    assert not any(tuple(t.tolist()) in seen for t, _ in made.queries)


def test_language_asks_about_other_passages_of_the_topics() -> None:
    made = make_problem("language")
    passages = [tuple(tokens.tolist()) for tokens, _ in made.train]
    assert not any(tuple(tokens.tolist()) in passages for tokens, _ in made.queries)
    for tokens, targets in made.train:
        assert torch.equal(tokens[1:], targets[:-1])
    assert made.mislabelled is not None
    assert made.mislabelled.sum() == 12
    assert "Python 3." in made.about
    with pytest.raises(ValueError, match="use a multiple of the queries"):
        make_problem("language", n_train=10, n_query=4)


def test_parity_reads_what_the_model_reads() -> None:
    made = make_problem("parity", **SMALL)
    model = made.untrained(0)
    assert isinstance(model, ParityTransformer)
    tokens, read_step, answers = made.collate(made.train)
    logits = model(tokens.argmax(-1), read_step)[torch.arange(32), read_step]
    want = torch.nn.functional.cross_entropy(logits, answers, reduction="none")
    torch.testing.assert_close(made.loss(model, (tokens, read_step, answers)), want)
    assert [len(bits) for bits, _ in made.train] == sorted(len(bits) for bits, _ in made.train)
    assert all(bits.count("1") % 2 == answer for bits, answer in [*made.train, *made.queries])


def test_sudokus_are_solved_where_their_solution_is_right() -> None:
    pytest.importorskip("tiny_recursive_model")
    made = make_problem("trm")
    assert made.mislabelled is not None
    for (puzzle, solution), wrong in zip(made.train, made.mislabelled, strict=True):
        grid = solution.view(4, 4)
        lines = [*grid, *grid.T, *(grid[r : r + 2, c : c + 2].flatten() for r in (0, 2) for c in (0, 2))]
        assert all(sorted(line.tolist()) == [1, 2, 3, 4] for line in lines)
        given = puzzle > 0
        assert int(given.sum()) == 9
        assert bool((puzzle[given] != solution[given]).any()) == bool(wrong)


def test_what_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name: got 'chess'"):
        make_problem("chess")
    for name, most in (("adder", 256), ("parity", 126)):
        with pytest.raises(ValueError, match=f"{name} has {most}"):
            make_problem(name, n_train=most, n_query=1)
