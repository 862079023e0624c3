"""What SDI claims of a single step, tried out: move the weights at one use of the loop body only, and see the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepinfluence.capture.session import LossFn
from stepinfluence.capture.targets import Body, body_parameters, find_body


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
    modules = find_body(model, body)
    if len(modules) != 1:
        raise ValueError(f"body: got {len(modules)} modules; give the one that is entered once per loop step")
    parameters = body_parameters(model, modules)
    missing = [name for name in parameters if name not in change]
    if missing:
        raise ValueError(f"change: lacks {missing[0]}; give a tensor for each body parameter")
    with torch.no_grad():
        plain, entered = _loss(model, modules[0], batch, loss_fn, {}, parameters, at=-1)
        if entered != steps:
            raise ValueError(f"steps: got {steps}, but the body was entered {entered} times; give that number")
        moved = [_loss(model, modules[0], batch, loss_fn, change, parameters, at=t)[0] - plain for t in range(steps)]
    return torch.stack(moved, 1)


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
