"""Training by recipe: Adam's numbers, the same to the bit, differentiable in the examples' weights, checkpoints."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from additive import additive
from stepinfluence.evaluation import Problem, Recipe
from stepinfluence.evaluation.problems import make_problem
from stepinfluence.evaluation.trained import Trained
from stepinfluence.evaluation.training import State, Training, checkpoint_updates
from torch import Tensor, nn


def small(**recipe: object) -> Problem:
    made = make_problem("majority", n_train=24, n_query=4, steps=2)
    return replace(made, training=Recipe(**{"updates": 4, "learning_rate": 1e-2, **recipe}))  # type: ignore[arg-type]


def double(problem: Problem) -> Problem:
    """In float64, so that finite differences are not rounding."""

    def untrained(seed: int) -> nn.Module:
        return problem.untrained(seed).double()

    return replace(problem, untrained=untrained)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_recipe_is_adam(weight_decay: float) -> None:
    problem = double(small(weight_decay=weight_decay, betas=(0.8, 0.95), epsilon=1e-6, warmup=2))
    rows = np.array([3, 7, 8, 20])
    model = problem.untrained(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    batch = problem.collate([problem.train[row] for row in rows])
    for rate in (5e-3, 1e-2, 1e-2, 1e-2):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        problem.loss(model, batch).mean().backward()
        optimizer.step()
    found = problem.retrain(rows, 5)
    assert not found.training
    # Adam divides by a root that is nearly zero where the gradient is: rounding is enlarged there.
    for a, b in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_training_is_the_same_to_the_bit() -> None:
    problem = small(batch_size=7)
    one, two = (Training(problem, 3).final() for _ in range(2))
    assert torch.equal(one.parameters, two.parameters)
    assert not torch.equal(one.parameters, Training(problem, 4).final().parameters)


def test_every_example_comes_once_a_round_and_keeps_its_place() -> None:
    problem = small(updates=6, batch_size=8)
    full, without = Training(problem, 1), Training(problem, 1, np.delete(np.arange(24), 5))
    rounds = [np.concatenate([full.rows(k) for k in span]) for span in (range(3), range(3, 6))]
    for order in rounds:
        assert sorted(order) == list(range(24))
    assert not np.array_equal(*rounds)
    for k in range(6):
        np.testing.assert_array_equal(without.rows(k), full.rows(k)[full.rows(k) != 5])


def test_a_curriculum_lets_examples_in_by_their_order() -> None:
    full = Training(small(updates=10, batch_size=10, curriculum=0.5), 1)
    assert sorted(full.rows(0)) == [0, 1]
    let_in = [int(full.rows(k).max()) for k in range(5)]
    assert all(most < 2 * 12 ** (k / 5) for k, most in enumerate(let_in))
    assert len(full.rows(9)) == 10
    assert not np.array_equal(full.rows(8), full.rows(9))
    without = Training(full.problem, 1, np.delete(np.arange(24), 1))
    np.testing.assert_array_equal(without.rows(0), [0])


@pytest.mark.parametrize("batch_size", [None, 8])
def test_weights_of_zero_leave_out_and_their_scale_changes_nothing(batch_size: int | None) -> None:
    problem = double(small(root_epsilon=1e-8, batch_size=batch_size))
    rows = np.arange(0, 24, 2)
    weights = torch.zeros(24)
    weights[::2] = 3
    want = Training(problem, 1, rows).final()
    torch.testing.assert_close(Training(problem, 1).final(weights).parameters, want.parameters)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_replay_is_the_derivative_by_the_weights(batch_size: int | None) -> None:
    problem = double(small(root_epsilon=1e-8, warmup=2, batch_size=batch_size, weight_decay=0.01))
    training = Training(problem, 1)
    query = problem.collate(problem.queries)

    def loss(weights: Tensor) -> Tensor:
        state = training.start()
        for _ in range(problem.training.updates):  # type: ignore[union-attr]
            state = training.advance(state, weights, graph=True)
        return training.losses(state.parameters, query).sum()

    weights = torch.ones(24, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(loss(weights), weights)
    assert whole.abs().max() > 1e-4
    assert abs(float(whole.sum())) < 1e-9 * float(whole.abs().max())  # the scale of the weights changes nothing

    states = tuple(training.states())
    last = states[-1].parameters.clone().requires_grad_()
    (over,) = torch.autograd.grad(training.losses(last, query).sum(), last)
    adjoint = [over, torch.zeros_like(over), torch.zeros_like(over)]
    by_replay = torch.zeros(24, dtype=torch.float64)
    for state in states[-2::-1]:
        parts = [part.clone().requires_grad_() for part in (state.parameters, state.mean, state.square)]
        ones = torch.ones(24, dtype=torch.float64, requires_grad=True)
        after = training.advance(State(*parts, state.update), ones, graph=True)
        value = sum((a * b).sum() for a, b in zip(adjoint, (after.parameters, after.mean, after.square), strict=True))
        *adjoint, by_weight = torch.autograd.grad(value, [*parts, ones])
        by_replay += by_weight
    torch.testing.assert_close(by_replay, whole, rtol=1e-9, atol=1e-12)

    direction = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = 1e-4
    with torch.no_grad():
        ends = [training.losses(training.final(1 + s * h * direction).parameters, query).sum() for s in (1, -1)]
    assert float((ends[0] - ends[1]) / (2 * h)) == pytest.approx(float(whole @ direction), rel=1e-4)


def test_checkpoints_lie_on_the_way_to_the_model() -> None:
    problem = small(updates=6, warmup=4)
    model = problem.retrain(np.arange(24), 9)
    trained = Trained(problem, model, 9)
    first, middle, last = trained.checkpoints(3)
    assert [c.updates for c in (first, middle, last)] == [2, 2, 2]
    assert [c.learning_rate for c in (first, middle, last)] == [pytest.approx(x) for x in (0.00375, 0.00875, 0.01)]
    for a, b in zip(last.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    again = replace(problem, training=Recipe(4, 1e-2, warmup=4)).retrain(np.arange(24), 9)
    for a, b in zip(middle.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not middle.model.training
    stood = Trained(problem, problem.untrained(9).eval(), 9, untrained=True).checkpoints(2)
    for checkpoint in stood:
        for a, b in zip(checkpoint.model.parameters(), problem.untrained(9).parameters(), strict=True):
            assert torch.equal(a, b)


def test_what_cannot_be_replayed_is_refused() -> None:
    problem = small()
    with pytest.raises(ValueError, match="does not end at this model"):
        _ = Trained(problem, problem.retrain(np.arange(24), 9), 8).states
    with pytest.raises(ValueError, match="additive: has no recipe"):
        _ = Trained(additive(), nn.Linear(1, 1), 0).training
    with pytest.raises(ValueError, match="rows: got none"):
        Training(problem, 0, np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="training, fit: got both"):
        replace(problem, fit=lambda rows, seed: nn.Linear(1, 1))
    with pytest.raises(ValueError, match="training, fit: got neither"):
        replace(problem, training=None)
    with pytest.raises(ValueError, match="count: got 5"):
        checkpoint_updates(4, 5)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"updates": 0}, "updates, warmup: got 0"),
        ({"warmup": 5}, "updates, warmup: got 4 and 5"),
        ({"betas": (0.9, 1.0)}, "betas: got"),
        ({"learning_rate": float("nan")}, "learning_rate, epsilon"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"curriculum": 0.5}, "curriculum: got 0.5"),
    ],
)
def test_a_recipe_out_of_range_is_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small(**wrong)
