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


def halting_by_token(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Adaptive computation time: every token adds up halting probabilities, and its states weighted by them; the batch
    runs until its last token has halted."""
    h, left, out = x, x.new_ones(ids.shape), torch.zeros_like(x)
    for t in range(model.steps):
        running = left > 0
        if not bool(running.any()):
            break
        h = torch.where(running[..., None], model.step(h, x, ids), h)
        p = torch.sigmoid(h.sum(-1))
        weight = torch.where((left - p < 0.1) | (t == model.steps - 1), left, p) * running
        out, left = out + weight[..., None] * h, torch.where(weight == left, 0.0, left - weight)
    return out


def leaving(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Every example leaves the batch after a number of steps of its own."""
    there, h, out = torch.arange(len(x)), x, torch.zeros_like(x)
    for t in range(model.steps):
        h = model.step(h, x[there], ids[there])
        stays = t < ids[there, 0] % model.steps
        out = out.index_add(0, there[~stays], h[~stays])
        there, h = there[stays], h[stays]
        if not len(there):
            break
    return out


def exits(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Exit gates: the states of all steps, by the probability with which an example leaves there."""
    h, stays, out = x, x.new_ones(len(x)), torch.zeros_like(x)
    for t in range(model.steps):
        h = model.step(h, x, ids)
        leaves = torch.sigmoid(h.sum((1, 2))) if t < model.steps - 1 else torch.ones_like(stays)
        out, stays = out + (stays * leaves)[:, None, None] * h, stays * (1 - leaves)
    return out


def depth_of_batch(model: Any, x: Tensor, ids: Tensor) -> Tensor:
    """A depth for each batch, gradients through its last two steps."""
    h, depth = x, 1 + ids.shape[1] % (model.steps + 1)
    for t in range(depth):
        with torch.set_grad_enabled(torch.is_grad_enabled() and t >= depth - 2):
            h = model.step(h, x, ids)
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
    "halting by token": halting_by_token,
    "leaving": leaving,
    "exits": exits,
    "depth of batch": depth_of_batch,
    "truncated": truncated,
    "without gradient": without_gradient,
    "checkpointed": checkpointed,
    "implicit": implicit,
    "implicit anew": implicit_anew,
    "two levels": two_levels,
}
