"""What SDI claims of a single step, tried out: move the weights at one use of the loop body only, and see the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stepinfluence.attribution.curvature import Fisher
from stepinfluence.attribution.scoring import influence
from stepinfluence.capture import ExactCapture, attach
from stepinfluence.capture.body.targets import Body, body_parameters, find_body
from stepinfluence.evaluation.metrics import Estimate, bootstrap
from stepinfluence.evaluation.problem import Problem
from stepinfluence.loaders import LossFn

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepRun:
    """What :func:`try_steps` found of one model; :class:`~stepinfluence.evaluation.result.StepMerits` says what."""

    conservation: float
    counterfactual: Estimate
    slope: float
    natural: Estimate
    natural_slope: float


def try_steps(problem: Problem, model: nn.Module, *, examples: int = 8, size: float = 1e-3, seed: int = 0) -> StepRun:
    """Are the step-resolved scores what they claim to be? By trying each out (:func:`step_counterfactual`).

    SDI is tried with training steps along examples' exact gradients, SDI corrected by a Fisher with natural-gradient
    steps ``(F + lambda)^-1 grad(z)``, of exact gradients and the damping that was chosen for the sketches.

    Args:
        problem: its data.
        model: trained.
        examples: training examples whose gradient is tried as a training step.
        size: of the step relative to the norm of the weights: small, as influence is of first order.
        seed: of the choice.
    """
    body = problem.body(model)
    capture = attach(model, body=body, sketch_size=2048)
    exact = ExactCapture(model, body=body)
    query_batch = problem.collate(problem.queries)
    query = capture.featurize([query_batch], problem.loss, progress=False)
    whole = capture.featurize([query_batch], problem.loss, per_step=False, progress=False)
    difference = (query.values.sum(1) - whole.values).norm() / whole.values.norm()
    chosen = np.random.default_rng(seed).permutation(len(problem.train))[:examples].tolist()
    train, gradients = problem.features(capture, "train"), problem.features(exact, "train")
    fisher = Fisher.fit(train)
    natural = Fisher.fit(gradients, damping=fisher.damping)
    tried = []
    for asked, directions in (
        (query, gradients.values[chosen]),
        (fisher.transform(query), natural.solve(gradients.values[chosen])),
    ):
        predicted = influence(train.select(chosen), asked).sdi.double().numpy()
        changes = [
            {b.name: direction[b.start : b.stop].view(b.shape) for b in gradients.space.blocks}
            for direction in directions
        ]
        tried.append((predicted, _tried(model, body, query_batch, problem.loss, changes, query.values.shape[1], size)))
    (plain, slope), (corrected, corrected_slope) = (_compared(*one, seed=seed) for one in tried)
    return StepRun(
        conservation=float(difference),
        counterfactual=plain,
        slope=slope,
        natural=corrected,
        natural_slope=corrected_slope,
    )


def _tried(
    model: nn.Module,
    body: Body,
    batch: Any,
    loss_fn: LossFn,
    directions: Sequence[Mapping[str, Tensor]],
    steps: int,
    size: float,
) -> Array:
    """``(directions, queries, steps)``: how far the loss falls for a small step along minus a direction at one loop
    step only, per unit of its length, so that examples with large and small gradients count alike."""
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).norm()
    found = []
    for direction in directions:
        norm = torch.cat([part.flatten() for part in direction.values()]).norm()
        eta = float(size * weights / norm.clamp_min(1e-12))
        change = {name: -eta * part for name, part in direction.items()}
        moved = step_counterfactual(model, body, batch, loss_fn, change, steps=steps)
        found.append(-moved.numpy() / eta)
    return np.stack(found)


def _compared(predicted: Array, found: Array, *, seed: int) -> tuple[Estimate, float]:
    """Correlation for each query over examples and steps, and the slope of all."""
    by_query = [
        np.corrcoef(predicted[:, q].ravel(), found[:, q].ravel())[0, 1]
        for q in range(predicted.shape[1])
        if predicted[:, q].std() and found[:, q].std()
    ]
    return bootstrap(by_query, seed=seed), float((predicted * found).sum() / (predicted * predicted).sum())


def step_counterfactual(
    model: nn.Module,
    body: Body,
    batch: Any,
    loss_fn: LossFn,
    change: Mapping[str, Tensor],
    *,
    steps: int,
) -> Tensor:
    """Change of each query's loss when the body's weights are moved by ``change`` during one loop step only.

    A training step on ``z`` moves the weights by ``-eta * grad(z)``. Done at the ``t``-th use of the body alone, it
    changes the loss of ``z'`` by ``-eta <grad(z), phi_t(z')>`` to first order: minus SDI at step ``t`` (paper, eq. 7).

    Args:
        model: in the mode it should run in; unchanged afterwards.
        body: a single module that is entered once per loop step.
        batch: of queries.
        loss_fn: ``loss_fn(model, batch) -> (B,)``.
        change: by parameter name, for every body parameter, of its shape.
        steps: entries into the body.

    Returns:
        ``(B, steps)`` float64: loss with the change at that step, minus the loss without.

    Raises:
        ValueError: ``body`` names several modules, ``change`` lacks a parameter, or the body was entered another number
            of times.
    """
    module = _single(model, body)
    parameters = body_parameters(model, [module])
    missing = [name for name in parameters if name not in change]
    if missing:
        raise ValueError(f"change: lacks {missing[0]}; give a tensor for each body parameter")
    with torch.no_grad():
        plain, entered = _loss(model, module, batch, loss_fn, {}, parameters, at=-1)
        if entered != steps:
            raise ValueError(f"steps: got {steps}, but the body was entered {entered} times; give that number")
        moved = [_loss(model, module, batch, loss_fn, change, parameters, at=t)[0] - plain for t in range(steps)]
    return torch.stack(moved, 1)


def logit_lens(model: nn.Module, body: Body, batch: Any, loss_fn: LossFn) -> Tensor:
    """Each query's loss read off the state after every loop step (the logit lens).

    From the step on, the body gives out again what it gave out then, so that the model reads its answer off that state.

    Args:
        model: in the mode it should run in; unchanged afterwards.
        body: a single module that is entered once per loop step and gives out the state.
        batch: of queries.
        loss_fn: ``loss_fn(model, batch) -> (B,)``.

    Returns:
        ``(B, steps)`` float64; the last one is the loss itself.

    Raises:
        ValueError: ``body`` names several modules.
    """
    module = _single(model, body)
    found, last = [], 0

    def halted(at: int) -> Tensor:
        nonlocal last
        count, state = 0, None

        def hold(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            nonlocal count, state
            count += 1
            if count == at:
                state = output
            return state if count > at else None

        handle = module.register_forward_hook(hold)
        try:
            losses = loss_fn(model, batch).double()
        finally:
            handle.remove()
        last = count
        return losses

    with torch.no_grad():
        found.append(halted(1))
        found += [halted(step) for step in range(2, last + 1)]
    return torch.stack(found, 1)


def _single(model: nn.Module, body: Body) -> nn.Module:
    modules = find_body(model, body)
    if len(modules) != 1:
        raise ValueError(f"body: got {len(modules)} modules; give the one that is entered once per loop step")
    return modules[0]


def _loss(
    model: nn.Module,
    body: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    change: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    *,
    at: int,
) -> tuple[Tensor, int]:
    with _moved(body, change, parameters, at) as count:
        losses = loss_fn(model, batch).double()
    return losses, count[0]


@contextmanager
def _moved(
    body: nn.Module, change: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], at: int
) -> Iterator[list[int]]:
    """Weights moved while the body runs for the ``at``-th time; yields the number of entries."""
    count = [0]
    kept: dict[str, Tensor] = {}

    def before(*_: Any) -> None:
        if count[0] == at:
            for name, parameter in parameters.items():
                kept[name] = parameter.detach().clone()
                parameter.add_(change[name])
        count[0] += 1

    def after(*_: Any) -> None:
        for name, value in kept.items():
            parameters[name].copy_(value)  # what was there, to the bit
        kept.clear()

    handles = [body.register_forward_pre_hook(before), body.register_forward_hook(after, always_call=True)]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
