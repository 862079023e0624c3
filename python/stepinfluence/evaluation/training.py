"""Training that can be repeated to the bit, stopped at any update, and differentiated.

A :class:`Recipe` says how a problem is trained. :class:`Training` is one such run as a pure function from a state and
weights of the examples to the next state, so that methods over checkpoints find the states they need, and exact
metagradients (Engstrom et al., arXiv 2503.13751) can be taken by replay: back through each update with double backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepinfluence.loaders import LossFn

if TYPE_CHECKING:
    from stepinfluence.evaluation.problem import Problem

Rows = npt.NDArray[np.int64]


class CannotScore(ValueError):
    """A method cannot be run on this problem, and why."""


@dataclass(frozen=True)
class Recipe:
    """How to train: Adam, from the first update to the last.

    The update of a parameter is ``rate * (m / sqrt(v + root_epsilon) + weight_decay * w)`` with Adam's bias-corrected
    averages m of the gradient and v of its square; with ``root_epsilon=0`` the denominator is ``sqrt(v) + epsilon``.
    A root epsilon inside the square root keeps the update differentiable where the gradient vanishes, and a larger one
    makes training smoother in its data (arXiv 2504.16430).

    Attributes:
        updates: how many.
        learning_rate: the highest.
        warmup: updates over which the rate rises linearly from zero.
        decay: whether the rate then falls to zero along a cosine.
        betas: of the averages of the gradient and of its square.
        epsilon: added to the root.
        root_epsilon: added inside the root.
        weight_decay: decoupled from the gradient, as in AdamW.
        batch_size: examples of an update, in an order drawn from the seed, all examples once before any comes again;
            None for all examples in every update.
        curriculum: share of the updates over which the examples come in, in the order that the problem has them: at
            first a fifth of a batch, in the end all, as many times more in each update. A batch is then drawn from
            those that are in. 0 for all from the start.

    Raises:
        ValueError: a number out of range.
    """

    updates: int
    learning_rate: float
    warmup: int = 0
    decay: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    root_epsilon: float = 0.0
    weight_decay: float = 0.0
    batch_size: int | None = None
    curriculum: float = 0.0

    def __post_init__(self) -> None:
        if self.updates < 1 or not 0 <= self.warmup <= self.updates:
            raise ValueError(f"updates, warmup: got {self.updates} and {self.warmup}; use 1 or more, and 0 to updates")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}; use two from 0 to below 1")
        numbers = (self.learning_rate, self.epsilon, self.root_epsilon, self.weight_decay)
        if not all(math.isfinite(x) and x >= 0 for x in numbers):
            raise ValueError(f"learning_rate, epsilon, root_epsilon, weight_decay: got {numbers}; use 0 or more")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}; use 1 or more, or None for all examples")
        if not 0 <= self.curriculum <= 1 or (self.curriculum and self.batch_size is None):
            raise ValueError(f"curriculum: got {self.curriculum}; use 0 to 1, and above 0 with a batch_size")

    def rate(self, update: int) -> float:
        """Learning rate of an update, the first being 0."""
        if update < self.warmup:
            return self.learning_rate * (update + 1) / self.warmup
        if not self.decay:
            return self.learning_rate
        share = (update - self.warmup) / max(1, self.updates - self.warmup)
        return self.learning_rate * (1 + math.cos(math.pi * share)) / 2

    def root(self, square: Tensor, updates: int) -> Tensor:
        """What Adam divides by after some updates, from its running average ``square`` of squared gradients."""
        corrected = square / (1 - self.betas[1] ** updates)
        return (corrected + self.root_epsilon).sqrt() if self.root_epsilon else corrected.sqrt() + self.epsilon


@dataclass(frozen=True)
class State:
    """Everything that the next update depends on.

    Attributes:
        parameters: ``(P,)``, in the order of ``Training.names``.
        mean, square: ``(P,)``: running averages of the gradient and of its square, without bias correction.
        update: updates done.
    """

    parameters: Tensor
    mean: Tensor
    square: Tensor
    update: int


class Training:
    """One training run of a problem that has a recipe.

    Args:
        problem: whose ``training`` is a recipe.
        seed: of the initialisation and the order of the examples.
        rows: examples to train on; all if not given. The order is drawn for all examples, so that those left stay in
            their updates when others are left out.

    Raises:
        CannotScore: the problem has no recipe.
        ValueError: there is no row.
    """

    def __init__(self, problem: Problem, seed: int, rows: Rows | None = None) -> None:
        if problem.training is None:
            raise CannotScore(f"{problem.name}: has no recipe (training=None), so its training cannot be replayed")
        self.problem = problem
        self.recipe = problem.training
        self.seed = seed
        n = len(problem.train)
        self.present = np.zeros(n, bool)
        self.present[np.arange(n) if rows is None else np.asarray(rows)] = True
        if not self.present.any():
            raise ValueError("rows: got none; training needs at least one example")
        self.model = problem.untrained(seed)
        self._losses = Losses(self.model, problem.loss)
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.names = tuple(name for name, _ in trained)
        self._shapes = [p.shape for _, p in trained]
        self._first = torch.cat([p.detach().flatten() for _, p in trained])
        self._batches: dict[bytes, tuple[Any, Tensor]] = {}

    def start(self) -> State:
        """The initialisation."""
        return State(self._first.clone(), torch.zeros_like(self._first), torch.zeros_like(self._first), 0)

    def rows(self, update: int) -> Rows:
        """Examples of an update that are present, in their order."""
        n, size = len(self.present), self.recipe.batch_size
        if size is None or size >= n:
            return np.flatnonzero(self.present)
        if self.recipe.curriculum:
            share = min(1.0, update / (self.recipe.curriculum * self.recipe.updates))
            first = max(1, size // 5)
            let_in = round(first * (n / first) ** share)
            order = np.random.default_rng([self.seed, update]).permutation(let_in)[:size]
            return order[self.present[order]]
        per_round = n // size  # the last few of a round are left for another
        turn, place = divmod(update, per_round)
        order = np.random.default_rng([self.seed, turn]).permutation(n)[place * size : (place + 1) * size]
        return order[self.present[order]]

    def advance(self, state: State, weights: Tensor | None = None, *, graph: bool = False) -> State:
        """The state after one more update: a pure function of ``state`` and ``weights``.

        The loss of an update is ``sum_z w_z loss(z) / |batch|`` over its examples, divided by the mean weight of all
        that are present: with full batches the weighted mean, so that all weights times one number change nothing,
        and weights of 0 and 1 are training without and with the examples.

        Args:
            state: from :meth:`start` or this.
            weights: ``(n_train,)``; ones if not given.
            graph: whether the result can be differentiated, as often as one likes, with respect to the parts of
                ``state`` and to ``weights``; if not, it is detached.
        """
        rows = self.rows(state.update)
        parameters = state.parameters
        if not (graph and parameters.requires_grad):
            parameters = parameters.detach().requires_grad_()
        with torch.enable_grad():  # also where the caller wants none
            gradient = self._gradient(parameters, rows, weights, graph) if len(rows) else torch.zeros_like(parameters)
        r, k = self.recipe, state.update + 1
        mean = r.betas[0] * state.mean + (1 - r.betas[0]) * gradient
        square = r.betas[1] * state.square + (1 - r.betas[1]) * gradient**2
        direction = mean / (1 - r.betas[0] ** k) / r.root(square, k) + r.weight_decay * parameters
        moved = parameters - r.rate(state.update) * direction
        return State(moved, mean, square, k) if graph else State(moved.detach(), mean.detach(), square.detach(), k)

    def states(self, weights: Tensor | None = None) -> Iterator[State]:
        """Every state, from the initialisation to the trained one: ``recipe.updates + 1``."""
        state = self.start()
        yield state
        for _ in range(self.recipe.updates):
            state = self.advance(state, weights)
            yield state

    def final(self, weights: Tensor | None = None) -> State:
        """The trained state."""
        *_, last = self.states(weights)
        return last

    def losses(self, parameters: Tensor, batch: Any) -> Tensor:
        """Losses ``(B,)`` of a batch at parameters ``(P,)``, differentiable in these, as often as one likes."""
        named = {f"model.{name}": part for name, part in self.by_name(parameters).items()}
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            found: Tensor = torch.func.functional_call(self._losses, named, (batch,))
        return found

    def by_name(self, parameters: Tensor) -> dict[str, Tensor]:
        """Parts of ``(P,)`` by the names of the parameters, in their shapes."""
        parts = parameters.split([shape.numel() for shape in self._shapes])
        return {name: part.view(s) for name, part, s in zip(self.names, parts, self._shapes, strict=True)}

    def model_at(self, state: State) -> nn.Module:
        """A model of its own with the state's parameters, in eval mode."""
        model = self.problem.untrained(self.seed)
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, values in self.by_name(state.parameters).items():
                named[name].copy_(values)
        return model.eval()

    def _gradient(self, parameters: Tensor, rows: Rows, weights: Tensor | None, graph: bool) -> Tensor:
        batch, index = self._batch(rows)
        losses = self.losses(parameters, batch)
        share: float | Tensor
        if weights is None:
            loss = losses.mean()
            share = len(rows) / self._per_update * len(self.present) / int(self.present.sum())
        else:
            loss = (losses * weights[index].to(losses.dtype)).sum() / self._per_update
            present = torch.from_numpy(self.present)
            share = len(self.present) / weights[present].sum().to(losses.dtype)
        (gradient,) = torch.autograd.grad(loss * share, parameters, create_graph=graph)
        return gradient

    @property
    def _per_update(self) -> int:
        return min(self.recipe.batch_size or len(self.present), len(self.present))

    def _batch(self, rows: Rows) -> tuple[Any, Tensor]:
        key = rows.tobytes()
        if key not in self._batches:
            if len(self._batches) > 256:
                self._batches.clear()
            batch = self.problem.collate([self.problem.train[int(row)] for row in rows])
            self._batches[key] = batch, torch.from_numpy(rows)
        return self._batches[key]


class Losses(nn.Module):
    """The problem's loss as a module, so that its parameters can be exchanged whatever the loss does with the model."""

    def __init__(self, model: nn.Module, loss: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def checkpoint_updates(updates: int, count: int) -> Sequence[int]:
    """Updates after which ``count`` checkpoints are taken: evenly spaced, the last one at the end.

    Raises:
        ValueError: more checkpoints than updates, or none.
    """
    if not 1 <= count <= updates:
        raise ValueError(f"count: got {count}; use 1 to {updates}")
    return [round(updates * (k + 1) / count) for k in range(count)]
