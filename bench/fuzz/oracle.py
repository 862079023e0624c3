"""What is right: batches of one, parameters of its own for every loop step, plain autograd. Knows nothing of captures.

An example on its own cannot be mixed up with another; autograd tells the steps apart, as each computes with other
leaves. Buffers are as they were for every example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Truth:
    """``losses (N,)`` of examples on their own, ``together (N,)`` in their batches, ``gradients (N, steps, P)``.

    ``P`` counts the entries of all body parameters, in the order of ``names``.
    """

    losses: Tensor
    together: Tensor
    gradients: Tensor
    names: list[str]
    sizes: list[int]


class Oracle:
    def __init__(self, model: nn.Module, body: list[nn.Module]) -> None:
        self.model, self.body = model, body
        inside = {id(p) for part in body for p in part.parameters()}
        self.parameters = {name: p for name, p in model.named_parameters() if id(p) in inside}
        self.slots = [
            (module, key, name)
            for name, parameter in self.parameters.items()
            for module in model.modules()
            for key, held in module._parameters.items()
            if held is parameter
        ]

    def __call__(self, batches: list[Tensor], loss_fn: Callable[[nn.Module, Tensor], Tensor]) -> Truth:
        losses, together, rows = [], [], []
        for batch in batches:
            with self.buffers_kept(), torch.no_grad():
                together.append(loss_fn(self.model, batch).detach())
            for k in range(len(batch)):
                loss, gradient = self.alone(batch[k : k + 1], loss_fn)
                losses.append(loss)
                rows.append(gradient)
        steps = max(len(row) for row in rows)
        width = rows[0].shape[1]
        padded = [torch.cat([row, row.new_zeros(steps - len(row), width)]) for row in rows]
        sizes = [p.numel() for p in self.parameters.values()]
        return Truth(torch.stack(losses), torch.cat(together), torch.stack(padded), list(self.parameters), sizes)

    def alone(self, example: Tensor, loss_fn: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Loss of one example, and its gradients ``(steps, P)``."""
        leaves: list[dict[str, nn.Parameter]] = []
        with self.buffers_kept(), self.leaf_for_each_step(leaves):
            (loss,) = loss_fn(self.model, example)
            flat = [leaf for step in leaves for leaf in step.values()]
            found = torch.autograd.grad(loss, flat, allow_unused=True)
        columns = [
            torch.zeros(leaf.numel(), dtype=leaf.dtype) if grad is None else grad.flatten()
            for leaf, grad in zip(flat, found, strict=True)
        ]
        return loss.detach(), torch.cat(columns).view(len(found) // len(self.parameters), -1)

    @contextmanager
    def leaf_for_each_step(self, leaves: list[dict[str, nn.Parameter]]) -> Iterator[None]:
        """The k-th entry into a body module computes with ``leaves[k]``."""
        entries = dict.fromkeys(self.body, 0)

        def place(values: dict[str, nn.Parameter]) -> None:
            for module, key, name in self.slots:
                setattr(module, key, values[name])

        def counted(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                step = entries[module]
                entries[module] += 1
                while len(leaves) <= step:
                    leaves.append({name: _copy(p) for name, p in self.parameters.items()})
                before = {name: getattr(module, key) for module, key, name in self.slots}
                place(leaves[step])
                try:
                    return forward(*args, **kwargs)
                finally:
                    place(before)

            return run

        for module in self.body:
            module.forward = counted(module, module.forward)
        try:
            yield
        finally:
            for module in self.body:
                del module.forward

    @contextmanager
    def buffers_kept(self) -> Iterator[None]:
        held = [
            (m, name, b, b.clone()) for m in self.model.modules() for name, b in m._buffers.items() if b is not None
        ]
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in held:
                    module._buffers[name] = buffer.copy_(value)


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    """A leaf of the same value, with the same hooks on its gradient."""
    leaf = nn.Parameter(parameter.detach().clone())
    for hook in (parameter._backward_hooks or {}).values():
        leaf.register_hook(hook)
    return leaf
