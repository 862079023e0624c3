"""How the body is repeated: ``loop(model, x, ids) -> h``, all ``(B, T, d)`` but ``ids (B, T)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def plain(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    h = x
    for _ in range(model.steps):
        h = model.step(h, x, ids)
    return h


def halting(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Every example stops after a number of steps of its own."""
    h, last = x, ids[:, 0] % model.steps
    for t in range(model.steps):
        h = torch.where((t <= last)[:, None, None], model.step(h, x, ids), h)
    return h


def truncated(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Truncated backpropagation: gradients of the last step only."""
    h = x
    for t in range(model.steps):
        h = model.step(h.detach() if t == model.steps - 1 else h, x, ids)
    return h


def without_gradient(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """All steps but the last under ``no_grad``."""
    h = x
    with torch.no_grad():
        for _ in range(model.steps - 1):
            h = model.step(h, x, ids)
    return model.step(h, x, ids)  # type: ignore[no-any-return]


def checkpointed(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    h = x
    for _ in range(model.steps):
        h = checkpoint(model.step, h, x, ids, use_reentrant=False) if model.recompute else model.step(h, x, ids)
    return h


def implicit(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """A deep equilibrium: iterated without gradient, then a hook solves for the implicit gradient in backward."""
    z = without_gradient(model, x, ids)
    if not z.requires_grad:
        return z
    start = z.detach().requires_grad_()
    again = model.step(start, x, ids)

    def solve(grad: Tensor) -> Tensor:
        g = grad
        for _ in range(2):
            g = 0.5 * torch.autograd.grad(again, start, g, retain_graph=True)[0] + grad
        return g

    z.register_hook(solve)
    return z


def implicit_anew(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """The same, with the forward pass that the hook differentiates run in the hook."""
    z = without_gradient(model, x, ids)
    if not z.requires_grad:
        return z
    end, injected = z.detach(), x.detach()

    def solve(grad: Tensor) -> Tensor:
        with torch.enable_grad():
            start = end.clone().requires_grad_()
            again = model.step(start, injected, ids)
        return grad + 0.5 * torch.autograd.grad(again, start, grad)[0]

    z.register_hook(solve)
    return z


def two_levels(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """A slow and a fast state; the first block works on both, the last on the slow one."""
    slow, fast = x, torch.zeros_like(x)
    for _ in range(model.steps):
        for _ in range(2):
            fast = model.blocks[0](slow + fast, ids)
        slow = model.blocks[-1](slow + fast, ids)
    return slow


LOOPS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "plain": plain,
    "halting": halting,
    "truncated": truncated,
    "without gradient": without_gradient,
    "checkpointed": checkpointed,
    "implicit": implicit,
    "implicit anew": implicit_anew,
    "two levels": two_levels,
}
