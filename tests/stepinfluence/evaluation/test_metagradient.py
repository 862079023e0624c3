"""Exact metagradients against central differences of training itself, in float64; what must add up adds up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from stepinfluence.evaluation.metagradient import metagradients, query_parts
from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.problems import make_problem
from stepinfluence.evaluation.training import Recipe, Training
from torch import Tensor, nn

SMOOTH = Recipe(4, 3e-3, warmup=2, decay=True, betas=(0.9, 0.95), root_epsilon=1e-6, weight_decay=0.01)


def double(training: Recipe = SMOOTH) -> Problem:
    """In float64, and without the kinks of ReLU, at which differences of any size are off."""
    problem = make_problem("majority", n_train=6, n_query=4, steps=2)

    def untrained(seed: int) -> nn.Module:
        model: Any = problem.untrained(seed).double()
        model.core.activation, model.core.activation_relu_or_gelu = torch.nn.functional.gelu, 2
        return model

    return replace(problem, training=training, untrained=untrained)


def trained(training: Training, weights: Tensor) -> Tensor:
    """Parameters after training with these weights of the examples."""
    return training.final(weights).parameters


@pytest.mark.parametrize("recipe", [SMOOTH, replace(SMOOTH, batch_size=3)])
def test_equals_central_differences_by_step(recipe: Recipe) -> None:
    """Also where an update sees some of the examples only, which then act through the mean weight alone."""
    training, asked = Training(double(recipe), 0), [2, 0]
    found = metagradients(training, asked)
    starts = query_parts(training, training.final(), asked)
    batch = training.problem.collate([training.problem.queries[q] for q in asked])
    h, by_part, whole = 1e-5, [], []
    for z in (0, 3, 5):
        ends = []
        for sign in (1, -1):
            weights = torch.ones(6, dtype=torch.float64)
            weights[z] += sign * h
            ends.append(trained(training, weights))
        by_part.append(-(starts @ (ends[0] - ends[1])) / (2 * h))
        losses = [training.losses(end, batch).detach() for end in ends]
        whole.append(-(losses[0] - losses[1]) / (2 * h))
    expected, total = torch.stack(by_part), torch.stack(whole)
    assert found.parts.dtype == torch.float64
    parts = found.parts[[0, 3, 5]]
    torch.testing.assert_close(parts, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    torch.testing.assert_close(parts.sum(2), total, rtol=1e-5, atol=1e-6 * float(total.abs().max()))
    assert (found.by_step.abs().amax((0, 1)) > 1e-3 * float(total.abs().max())).all()


def test_steps_and_updates_add_up() -> None:
    training, asked = Training(double(), 1), [1, 3]
    found = metagradients(training, asked, per_update=True, every=3)
    size = float(found.total.abs().max())
    assert found.parts.shape == (6, 2, 3, 4)
    torch.testing.assert_close(found.by_step.sum(2) + found.outside, found.total, rtol=0, atol=1e-12 * size)
    torch.testing.assert_close(found.by_update.sum(2), found.total, rtol=0, atol=1e-12 * size)
    # An adjoint that starts from the whole gradient at once, and other states kept.
    batch = training.problem.collate([training.problem.queries[q] for q in asked])
    parameters = training.final().parameters.requires_grad_()
    starts = query_parts(training, training.final(), asked)
    whole = torch.autograd.grad(training.losses(parameters, batch)[0], parameters)[0]
    torch.testing.assert_close(starts[0].sum(0), whole, rtol=1e-9, atol=1e-12)
    for every in (1, 100):
        again = metagradients(training, asked, every=every, per_step=every == 1)
        torch.testing.assert_close(again.total, found.total, rtol=0, atol=1e-10 * size)
    # The first update's batch moves the weights, too: no update is without a share.
    assert (found.by_update.abs().amax((0, 1)) > 0).all()


def test_all_weights_times_a_number_change_nothing() -> None:
    found = metagradients(Training(double(), 0), [0])
    torch.testing.assert_close(found.total.sum(0), torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-10)


def test_what_cannot_be_differentiated() -> None:
    with pytest.raises(ValueError, match="root_epsilon=0, so that its update has no derivative"):
        metagradients(Training(double(replace(SMOOTH, root_epsilon=0.0)), 0), [0])
    with pytest.raises(ValueError, match="asked: got no query"):
        metagradients(Training(double(), 0), [])
    with pytest.raises(ValueError, match="every: "):
        metagradients(Training(double(), 0), [0], every=0)
    found = metagradients(Training(double(), 0), [0], per_step=False)
    with pytest.raises(ValueError, match="by_update: updates were summed"):
        _ = found.by_update
    with pytest.raises(ValueError, match="by_step: steps were summed"):
        _ = found.by_step
