"""What a method is given: a trained model and, where the problem has a recipe, the training that led to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.training import State, Training, checkpoint_updates


@dataclass(frozen=True)
class Checkpoint:
    """A model during training, in eval mode, and the learning rate of the update that comes next (of the last one: at
    the end)."""

    model: nn.Module
    learning_rate: float


@dataclass(frozen=True)
class Trained:
    """A problem, a model that learnt it, and how it came to be.

    Attributes:
        problem: data, loss, recipe.
        model: trained on all examples, in eval mode.
        seed: that the model was trained with.
        untrained: whether ``model`` is as it was initialised (a check asks how scores of such a model differ). Then
            training is taken to have stood still: every state is the first.
    """

    problem: Problem
    model: nn.Module
    seed: int
    untrained: bool = False

    @cached_property
    def training(self) -> Training:
        """The run as a function of the examples' weights.

        Raises:
            ValueError: the problem has no recipe.
        """
        return Training(self.problem, self.seed)

    @cached_property
    def states(self) -> tuple[State, ...]:
        """Every state of the run, trained again when first asked for: ``updates + 1``, the last one ``model``'s.

        Raises:
            ValueError: the problem has no recipe, or the run does not end at ``model``.
        """
        if self.untrained:
            return tuple(replace(self.training.start(), update=k) for k in range(self.training.recipe.updates + 1))
        states = tuple(self.training.states())
        named = dict(self.model.named_parameters())
        model = torch.cat([named[name].detach().flatten() for name in self.training.names])
        if not torch.allclose(states[-1].parameters, model, rtol=1e-3, atol=1e-5):
            raise ValueError(f"{self.problem.name}: training again with seed {self.seed} does not end at this model")
        return states

    def checkpoints(self, count: int = 5) -> list[Checkpoint]:
        """Evenly spaced over training, the last one at its end.

        Raises:
            ValueError: as for :attr:`states`, or more checkpoints than updates.
        """
        recipe = self.training.recipe
        taken = checkpoint_updates(recipe.updates, count)
        rates = [recipe.rate(min(k, recipe.updates - 1)) for k in taken]
        return [Checkpoint(self.training.model_at(self.states[k]), rate) for k, rate in zip(taken, rates, strict=True)]
