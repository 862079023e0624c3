"""Autograd nodes that hand the gradient at a parameter's use to a recorder.

A tapped parameter takes part in the forward pass *detached*: autograd computes input gradients only and the
weight-gradient products are never run (inline, within a training step, it is not detached, and they are). Each tap is
connected to an ``anchor`` leaf, so that a backward pass to the anchor alone visits exactly the nodes between the loss
and the taps.

What a tap needs at backward time goes through ``save_for_backward``: it is subject to version checks (an activation
changed in place is an error, not a wrong number) and to activation checkpointing, while the loop step stays on the
node that was made in the first forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stepinfluence.errors import UnsupportedUseError

Receive: TypeAlias = Callable[[Tensor, tuple[Tensor, ...]], None]
"""Called in the backward pass with (gradient, saved tensors)."""


def _refuse_tangents(ctx: Any, *grad_inputs: Any) -> Any:
    raise UnsupportedUseError(
        "model: takes derivatives forward (torch.autograd.forward_ad) through the loop body; what the body's "
        "parameters do to those cannot be captured, use ExactCapture"
    )


class _OutputTap(torch.autograd.Function):
    """Identity on the *output* of an operation."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, receive: Receive, *saved: Tensor) -> Tensor:
        # In place, not a view: a view made by a custom function could not be modified in place by the model.
        ctx.mark_dirty(output)
        ctx.receive = receive
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # Unpacked with the function mode on: that may run a checkpointed part of the forward pass again.
        saved = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            ctx.receive(grad.to_dense(), saved)  # the same, unless a lookup gave it as a sparse tensor
        return (grad, *(None,) * (2 + len(ctx.needs_input_grad[3:])))

    jvp = staticmethod(_refuse_tangents)


class _ExpandTap(torch.autograd.Function):
    """A parameter expanded to ``shape``; the gradient that comes back is not yet summed over anything."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, anchor: Tensor, receive: Receive, shape: tuple[int, ...]) -> Tensor:
        ctx.receive, ctx.shape = receive, parameter.shape
        return parameter.expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        with torch._C.DisableTorchFunction():
            grad = grad.to_dense()
            ctx.receive(grad, ())
            total = grad.sum_to_size(ctx.shape) if ctx.needs_input_grad[0] else None
        return total, None, None, None

    jvp = staticmethod(_refuse_tangents)


TAPS = (_OutputTap._backward_cls, _ExpandTap._backward_cls)
"""The graph nodes of taps."""


def tap_output(output: Tensor, anchor: Tensor, receive: Receive, *saved: Tensor) -> Tensor:
    """``output`` unchanged; ``receive(d loss / d output, saved)`` is called in the backward pass."""
    if output._is_view():
        # F.linear returns a view of a flattened product. Tapping a view in place would make autograd copy the whole
        # gradient back and forth (CopySlices); the result of an "unsafe view" is a tensor in its own right.
        output = torch.ops.aten._unsafe_view(output, output.shape)
    result: Tensor = _OutputTap.apply(output, anchor, receive, *saved)  # type: ignore[no-untyped-call]
    return result


def tap_expanded(parameter: Tensor, anchor: Tensor, receive: Receive, shape: tuple[int, ...]) -> Tensor:
    """``parameter`` expanded to ``shape``; ``receive`` gets the gradient of that shape."""
    result: Tensor = _ExpandTap.apply(parameter, anchor, receive, shape)  # type: ignore[no-untyped-call]
    return result


def has_tap(tensors: Iterable[object], *, but_through: Tensor | None = None) -> bool:
    """Whether the graph behind some tensors holds a tap; one that is reached through ``but_through`` alone does not
    count."""
    stack: list[Any] = [t.grad_fn for t in tensors if isinstance(t, Tensor)]
    seen: set[Any] = set() if but_through is None else {but_through.grad_fn}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, TAPS):
            return True
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
    return False
