"""Whether numbers that were computed twice are of the same thing: within what rounding can have moved them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

TF32_EPS = 2.0**-10
"""Of float32 products on GPUs, unless they are told to be exact."""


def precision(model: nn.Module, device: torch.device) -> float:
    """The relative precision of a model's arithmetic: that of its least precise parameter, and no finer than
    float32's, in which results are kept."""
    found = [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
    exact_products = device.type != "cuda" or torch.get_float32_matmul_precision() == "highest"
    return max([torch.finfo(torch.float32).eps, *found, *([] if exact_products else [TF32_EPS])])


def losses_differ(before: Tensor, now: Tensor, eps: float) -> Tensor:
    """``(N,)`` bool: which losses differ by more than half the digits of arithmetic of precision ``eps``.

    Where they are small, because what they came from cancelled, by more than 64 ``eps``. Losses that are not finite
    differ.
    """
    bound = math.sqrt(eps) * torch.maximum(before.abs(), now.abs()) + 64 * eps
    differ: Tensor = ~((before - now).abs() <= bound)
    return differ


def features_differ(before: Tensor, now: Tensor, losses: Tensor, eps: float, stored: Tensor) -> Tensor:
    """``(N,)`` bool: which rows ``(N, D)`` differ by more than half the digits, relatively, in the Euclidean norm.

    Where the loss is small, so is the gradient, because what it came from cancelled: it has fewer digits.

    Args:
        losses: ``(N,)``.
        stored: ``(N,)``: what storing the rows ``before`` can have moved each by, in the norm.
    """
    sizes = torch.maximum(before.norm(dim=1), now.norm(dim=1))
    bound = (eps**0.5 + 64 * eps / losses.abs()) * sizes + stored
    differ: Tensor = ~((before - now).norm(dim=1) <= bound) & (sizes > 0)
    return differ
