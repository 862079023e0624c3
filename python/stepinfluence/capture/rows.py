"""Telling the examples of a batch apart in the tensors of a forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from stepinfluence.errors import LayoutError


def gains_examples(before: Sequence[int], after: Sequence[int], batch_size: int | None, dims: Iterable[int]) -> bool:
    """Whether expanding a tensor from shape ``before`` to ``after`` gives it a row per example in one of ``dims``."""
    aligned = (1,) * (len(after) - len(before)) + tuple(before)
    pairs = list(zip(aligned, after, strict=True))
    return (1, batch_size) in [pairs[k] for k in dims if k < len(pairs)]


class RowLayout:
    """Where the examples lie in tensors of shape ``(*lead, features)``, for a batch of ``batch_size`` examples.

    A tensor's example dimension is the leading dimension of size ``batch_size``; ``batch_dim`` where that has it, else
    the only one that has it. A first dimension that is a multiple of ``batch_size`` is taken for examples flattened
    together with tokens, in the order of ``batch_dim``. Whatever was not certain is noted in :attr:`guesses`: the
    capture verifies those on real gradients before it trusts them.
    """

    def __init__(self, batch_size: int, batch_dim: int = 0) -> None:
        self.batch_size = batch_size
        self.batch_dim = batch_dim
        self.guesses: set[tuple[str, tuple[int, ...]]] = set()
        self.coarse = False
        """Whether gradients of reduced precision were seen."""

    def example_dim(self, name: str, lead: Sequence[int]) -> int | None:
        """The example dimension among ``lead``, or None where examples are flattened into dimension 0."""
        size = self.batch_size
        matches = [k for k, n in enumerate(lead) if n == size]
        if len(matches) == 1:
            if matches[0] != self.batch_dim:
                self.guesses.add((name, tuple(lead)))
            return matches[0]
        if matches:
            self.guesses.add((name, tuple(lead)))
            return self.batch_dim if self.batch_dim in matches else matches[0]
        if lead and size and lead[0] >= 0 and lead[0] % size == 0:  # 0 rows: routed elsewhere, all of them
            self.guesses.add((name, tuple(lead)))
            return None
        raise LayoutError(
            f"{name}: used on a tensor of shape {(*lead, '...')}, in which no dimension has the batch's {size} "
            "examples; keep examples in a dimension of their own (batch_dim= says which)"
        )

    def rows(self, name: str, tensor: Tensor, trailing: int = 1) -> Tensor:
        """``(*lead, *trailing dims) -> (batch_size, tokens, *trailing dims)``."""
        lead = tensor.shape[: tensor.dim() - trailing]
        tail = tensor.shape[tensor.dim() - trailing :]
        if self.batch_size == 0:
            return tensor.reshape(0, 0, *tail)
        k = self.example_dim(name, lead)
        self.coarse |= tensor.dtype in (torch.bfloat16, torch.float16)
        tensor = self._split(tensor) if k is None else tensor.movedim(k, 0)
        return tensor.reshape(self.batch_size, math.prod(lead) // self.batch_size, *tail)

    def _split(self, tensor: Tensor) -> Tensor:
        """``(B * tokens, ...)``, or ``(tokens * B, ...)``, to ``(B, tokens, ...)``."""
        tokens = len(tensor) // self.batch_size
        if self.batch_dim == 0:
            return tensor.reshape(self.batch_size, tokens, *tensor.shape[1:])
        return tensor.reshape(tokens, self.batch_size, *tensor.shape[1:]).transpose(0, 1)

    def reduce_to(self, name: str, grad: Tensor, shape: Sequence[int]) -> Tensor:
        """Gradient of an expanded parameter, summed per example: ``grad.shape -> (batch_size, *shape)``.

        ``shape`` (right-aligned) is what was expanded to ``grad.shape``.
        """
        pad = grad.dim() - len(shape)
        kept = [pad + k for k, n in enumerate(shape) if n != 1]
        # Examples lie in a dimension over which the parameter was broadcast: before its own, or between them.
        free = [d for d in range(max(kept, default=grad.dim())) if d not in kept]
        if not free:
            raise LayoutError(
                f"{name}: a parameter of shape {tuple(shape)} meets a tensor of shape {tuple(grad.shape)} "
                "which leaves no dimension for the examples"
            )
        self.coarse |= grad.dtype in (torch.bfloat16, torch.float16)
        k = self.example_dim(name, [n if d in free else -1 for d, n in enumerate(grad.shape[: max(free) + 1])])
        if k is None:
            grad = self._split(grad)
            kept = [d + 1 for d in kept]
        else:
            grad = grad.movedim(k, 0)
            kept = [d + 1 if d < k else d for d in kept]
        others = [d for d in range(1, grad.dim()) if d not in kept]
        summed = grad.sum(others, dtype=torch.promote_types(grad.dtype, torch.float32)) if others else grad
        return summed.reshape(self.batch_size, *shape)
