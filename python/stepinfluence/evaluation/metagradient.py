r"""Exact metagradients of small trainings, step by step: what the other scores are held against.

A training run is a function of the weights ``w_z`` of its examples (:mod:`.training`), and the loss of a query after it
has a gradient by these. Engstrom et al. (arXiv 2503.13751) take it by replay: the run goes again through its updates
from the last to the first, each differentiated by double backward, and an adjoint of the state is carried back,

    a_K = (grad l(z'), 0, 0),                     a_k = a_(k+1) d state_(k+1) / d state_k,
    I(z, z') = - d l(z') / d w_z = - sum_k a_(k+1) d state_(k+1) / d w_z.

MAGIC (Ilyas & Engstrom, arXiv 2504.16430) ranks training examples by it. It is linear in the query's gradient, so that
an adjoint which starts from the gradient through one use of the loop body only, ``phi_t(z')``, gives that step's share,
and one that starts from the gradient by all other weights gives theirs: together they are the whole. Each update ``k``
has a share of its own, and these add up, too.

The cost is that of a double backward for each adjoint and update: minutes where training takes seconds. Adjoints are
carried one by one: batched by ``vmap``, as ``is_grads_batched`` does, they took three times as long on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepinfluence.arguments import positive_int
from stepinfluence.capture import ExactCapture
from stepinfluence.evaluation.training import CannotScore, State, Training


@dataclass(frozen=True)
class Metagradients:
    """Scores of training examples, positive where the example lowers the query's loss.

    Attributes:
        parts: ``(n_train, n_asked, steps + 1)``: shares of the query's loop steps, and, last, of all weights that are
            used outside of the loop body; or ``(n_train, n_asked, 1)``, the whole. With an axis of updates,
            ``(..., updates)``, where asked for.
        asked: ``(n_asked,)`` rows of the queries.
        per_step: whether there is an axis of steps.
        per_update: whether there is an axis of updates.
    """

    parts: Tensor
    asked: tuple[int, ...]
    per_step: bool
    per_update: bool

    @property
    def by_step(self) -> Tensor:
        """``(n_train, n_asked, steps)``: what the query's loop steps have of it.

        Raises:
            ValueError: it was not asked for.
        """
        self._needs("step")
        return self._summed[..., :-1]

    @property
    def outside(self) -> Tensor:
        """``(n_train, n_asked)``: what the weights outside of the loop body have of it.

        Raises:
            ValueError: it was not asked for.
        """
        self._needs("step")
        return self._summed[..., -1]

    @property
    def total(self) -> Tensor:
        """``(n_train, n_asked)``: the whole."""
        return self._summed.sum(2)

    @property
    def by_update(self) -> Tensor:
        """``(n_train, n_asked, updates)``: what each update of the training has of the whole.

        Raises:
            ValueError: it was not asked for.
        """
        self._needs("update")
        return self.parts.sum(2)

    @property
    def _summed(self) -> Tensor:
        return self.parts.sum(3) if self.per_update else self.parts

    def _needs(self, axis: str) -> None:
        if not getattr(self, f"per_{axis}"):
            raise ValueError(f"by_{axis}: {axis}s were summed; use metagradients(..., per_{axis}=True)")


def metagradients(
    training: Training,
    asked: Sequence[int],
    *,
    per_step: bool = True,
    per_update: bool = False,
    every: int | None = None,
) -> Metagradients:
    """Minus the derivative of each query's loss after training by the weight of each training example, at weights of 1.

    Args:
        training: to replay.
        asked: rows of queries.
        per_step: an adjoint for each loop step of a query; if not, one for all, at so much less cost.
        per_update: keep the share of each update, ``n_train * n_asked * (steps + 1) * updates`` numbers.
        every: states are kept at every so many updates and those between are computed again; the root of the number of
            updates if not given, so that states need memory of twice that many.

    Raises:
        ValueError: no query, or the training's Adam has no root epsilon, without which its update has no derivative
            where a gradient vanishes.
    """
    if not asked:
        raise ValueError("asked: got no query; give rows of queries")
    if not training.recipe.root_epsilon:
        raise CannotScore(
            f"{training.problem.name}: trained with root_epsilon=0, so that its update has no derivative where a "
            "gradient is zero; use a recipe with a root_epsilon, such as 1e-8"
        )
    final = training.final()
    starts = query_parts(training, final, asked) if per_step else query_gradients(training, final, asked).unsqueeze(1)
    count, parts, _ = starts.shape
    shape = (training.recipe.updates,) if per_update else ()
    found = starts.new_zeros(len(training.present), count, parts, *shape)
    for update, share in shares(training, starts.flatten(0, 1), every=every):
        into = found[..., update] if per_update else found
        into += share.view(count, parts, -1).permute(2, 0, 1)
    return Metagradients(found, tuple(int(q) for q in asked), per_step, per_update)


def query_gradients(training: Training, state: State, asked: Sequence[int]) -> Tensor:
    """``(n_asked, P)``: gradients of queries' losses."""
    batch = training.problem.collate([training.problem.queries[int(q)] for q in asked])
    parameters = state.parameters.detach().requires_grad_()
    losses = training.losses(parameters, batch)
    return torch.stack([torch.autograd.grad(loss, parameters, retain_graph=True)[0] for loss in losses])


def query_parts(training: Training, state: State, asked: Sequence[int]) -> Tensor:
    """``(n_asked, steps + 1, P)``: a query's gradient through each use of the loop body, and of all other weights."""
    problem = training.problem
    batch = problem.collate([problem.queries[int(q)] for q in asked])
    model = training.model_at(state)
    capture = ExactCapture(model, body=problem.body(model), outside="ignore")
    features = capture.featurize([batch], problem.loss, progress=False)
    whole = query_gradients(training, state, asked)
    found = whole.new_zeros(len(whole), features.values.shape[1] + 1, whole.shape[1])
    places = training.by_name(torch.arange(whole.shape[1]))
    for block in features.space.blocks:
        found[:, :-1, places[block.name].flatten()] = features.values[..., block.start : block.stop].to(found)
    found[:, -1] = whole - found.sum(1)
    return found


def shares(training: Training, starts: Tensor, *, every: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """What each update adds to minus the derivative of ``<starts_j, parameters after training>`` by examples' weights.

    Args:
        training: to replay.
        starts: ``(J, P)``.
        every: as for :func:`metagradients`.

    Yields:
        The update, from the last one, the first being 0, and ``(J, n_train)``.
    """
    updates = training.recipe.updates
    every = math.isqrt(updates - 1) + 1 if every is None else positive_int("every", every)
    state, kept = training.start(), []
    for update in range(updates):
        if update % every == 0:
            kept.append(state)
        state = training.advance(state)
    weights = torch.ones(len(training.present), dtype=starts.dtype, requires_grad=True)
    carried = [(start, torch.zeros_like(start), torch.zeros_like(start)) for start in starts]
    while kept:
        between = [kept.pop()]
        while len(between) < every and between[-1].update < updates - 1:
            between.append(training.advance(between[-1]))
        for state in reversed(between):
            leaves = [part.detach().requires_grad_() for part in (state.parameters, state.mean, state.square)]
            after = training.advance(State(leaves[0], leaves[1], leaves[2], state.update), weights, graph=True)
            outputs, share = (after.parameters, after.mean, after.square), []
            for j, adjoint in enumerate(carried):
                *before, by_weight = torch.autograd.grad(
                    outputs, [*leaves, weights], adjoint, retain_graph=True, materialize_grads=True
                )
                carried[j] = (before[0], before[1], before[2])
                share.append(-by_weight)
            yield state.update, torch.stack(share)
