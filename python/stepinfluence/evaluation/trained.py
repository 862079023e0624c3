"""What a method is given, and what it gives: a trained model with the training that led to it, and scores."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from stepinfluence.attribution.features import Features
from stepinfluence.evaluation.problem import Problem
from stepinfluence.evaluation.training import State, Training, checkpoint_updates

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """Scores of a method.

    Attributes:
        scores: ``(n_train, n_query)``.
        suspicion: ``(n_train,)``: how much an example stands out (self-influence), or None.
        seconds: processor seconds to compute them.
        bytes_per_example: of what is kept of a training example.
    """

    scores: Array
    suspicion: Array | None
    seconds: float
    bytes_per_example: int

    @classmethod
    def of(cls, train: Features, query: Features, *, began: float, suspicion: Array | None = None) -> Scored:
        """Inner products of features that are summed over steps: one product gives the sum over steps that is compared.

        ``began``: :func:`time.process_time` when the work did.
        """
        scores = (train.values @ query.values.T).double().numpy()
        return cls(scores, suspicion, time.process_time() - began, row_bytes(train))


def row_bytes(features: Features) -> int:
    """Bytes of an example's features that are summed over steps."""
    return features.values.shape[1] * features.values.element_size()


@dataclass(frozen=True)
class Checkpoint:
    """A model during training.

    Attributes:
        model: in eval mode.
        updates: since the checkpoint before, or since the initialisation.
        learning_rate: the mean over these.
    """

    model: nn.Module
    updates: int
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
            CannotScore: the problem has no recipe.
        """
        return Training(self.problem, self.seed)

    @cached_property
    def states(self) -> tuple[State, ...]:
        """Every state of the run, trained again when first asked for: ``updates + 1``, the last one ``model``'s.

        Raises:
            CannotScore: the problem has no recipe.
            ValueError: the run does not end at ``model``.
        """
        if self.untrained:
            return tuple(replace(self.training.start(), update=k) for k in range(self.training.recipe.updates + 1))
        states = tuple(self.training.states())
        named = dict(self.model.named_parameters())
        model = torch.cat([named[name].detach().flatten() for name in self.training.names])
        if not torch.allclose(states[-1].parameters, model, rtol=1e-3, atol=1e-5):
            raise ValueError(f"{self.problem.name}: training again with seed {self.seed} does not end at this model")
        return states

    def others(self, count: int) -> list[nn.Module]:
        """Models of the same training from other initialisations (or as these were initialised, if so is ``model``)."""
        problem, everyone = self.problem, np.arange(len(self.problem.train))
        seeds = [int(s) for s in np.random.SeedSequence([self.seed, 1]).generate_state(count)]
        return [problem.untrained(s).eval() if self.untrained else problem.retrain(everyone, s) for s in seeds]

    def checkpoints(self, count: int = 5) -> list[Checkpoint]:
        """Evenly spaced over training, the last one at its end.

        Raises:
            CannotScore, ValueError: as for :attr:`states`, or more checkpoints than updates.
        """
        recipe, found, before = self.training.recipe, [], 0
        for at in checkpoint_updates(recipe.updates, count):
            rates = [recipe.rate(k) for k in range(before, at)]
            found.append(Checkpoint(self.training.model_at(self.states[at]), len(rates), sum(rates) / len(rates)))
            before = at
        return found
