"""What torch functions do, as far as the interceptor has to know before it calls them."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

STRUCTURE_FACTORIES = {
    torch.arange, torch.linspace, torch.logspace, torch.eye, torch.tril_indices, torch.triu_indices
}  # fmt: skip
"""Factories whose result never holds one row per example, whatever its size. Other results of calls without tensors
(zeros, randn, ...) may be per-example states, and are taken for data where they have the batch's size."""

CONSTRUCTORS = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}
"""Functions that make tensors of numbers that are not in one yet."""

EXPANSIONS = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to}
"""Functions that may give a batch-free tensor a row per example."""

OF_FIRST = {Tensor.to, Tensor.type_as, Tensor.view_as, Tensor.reshape_as, Tensor.expand_as}
"""Functions that take the numbers of their first argument alone: of another tensor only shape or dtype count."""

GRADIENT_TAKERS = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}

GROUPED = [f for f in (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None)) if f is not None]
"""Products of groups of rows with a matrix each, where this torch has them."""


def attributes(*names: str) -> list[Any]:
    """What a function mode sees where these attributes of a tensor are read."""
    return [getattr(Tensor, name).__get__ for name in names]


FACTS = {
    *attributes(
        "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_cuda", "is_cpu", "is_meta",
        "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes", "_version", "_backward_hooks", "output_nr",
    ),
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.is_contiguous, Tensor.element_size, Tensor.storage_offset, Tensor.data_ptr,
    Tensor.__len__, Tensor.get_device, Tensor.is_inference, torch.numel, torch.is_floating_point, torch.is_complex,
}  # fmt: skip
"""What gives no tensor, and says nothing of the numbers in one."""

IN_PLACE_OPERATORS = {"__setitem__", "__set__"} | {
    f"__i{name}__" for name in (
        "add", "and", "div", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor",
    )
}  # fmt: skip

OUTSIDE = -1
"""In place of a loop step: a use outside the loop body that is left out."""

LOOKED_INTO = ("torch.nn.functional", "torch.functional", "torch._tensor")
"""Modules whose functions, where they are written in Python, are followed call by call."""

CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


@functools.cache
def undispatched(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """A Python function of torch without its own override check, so that a mode sees the calls inside it."""
    if not isinstance(func, types.FunctionType) or not set(CHECKS) & set(func.__code__.co_names):
        return None
    scope = {**func.__globals__, **dict.fromkeys(CHECKS, lambda *_: False)}
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def changes_in_place(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a torch function writes to its first argument (or to ``out``)."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in IN_PLACE_OPERATORS
    return name.endswith("_") or kwargs.get("out") is not None


_FUNCTION_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]  # a classmethod


def in_custom_function() -> bool:
    """Whether what is running was called by the forward of a custom autograd function."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _FUNCTION_APPLY:
        frame = frame.f_back
    return frame is not None
