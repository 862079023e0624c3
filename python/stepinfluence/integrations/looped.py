"""Finding the loop body of a model: what a forward pass enters more than once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stepinfluence.errors import BodyError


def find_body(model: nn.Module, forward: Callable[[], Any]) -> list[str]:
    """Names of the outermost modules with parameters that a forward pass enters more than once.

    Args:
        model: the model; it is run in evaluation mode, and left as it was.
        forward: runs it once on any input.

    Returns:
        Names as ``model.named_modules()`` has them, in its order: a shared layer, or several parts of one loop.

    Raises:
        BodyError: no module with parameters is entered more than once.
    """
    names = {module: name for name, module in model.named_modules()}
    entered: Counter[str] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda module, _: entered.update([names[module]]))
        for module in names
        if next(module.parameters(), None) is not None
    ]
    modes = {module: module.training for module in names}
    try:
        model.eval()
        with torch.no_grad():
            forward()
    finally:
        for module, mode in modes.items():
            module.training = mode
        for handle in handles:
            handle.remove()
    repeated = {name for name, count in entered.items() if count > 1}
    outermost = [n for n in names.values() if n in repeated and not any(p in repeated for p in _parents(n))]
    if not outermost or "" in repeated:
        raise BodyError("no module is entered more than once in a forward pass: this model has no loop to attribute to")
    return outermost


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]
