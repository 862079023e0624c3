"""Gradients of uses that nothing handles as they come: formed for each example, and taken to their parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from stepinfluence.capture.body.sources import Piece, Source, memory_order, pull_back
from stepinfluence.capture.owners.rows import Use

PULL_BACK_BYTES = 64 << 20
"""Workspace of one taking-back of per-example gradients through a function of parameters (chunked over examples)."""


def product_dtype(grads: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which dtype gradients are added up for features of ``dtype``: complex ones stay complex. They are those of
    complex functions of real parameters, and become real on the way back to these."""
    return torch.promote_types(grads.dtype, dtype) if grads.is_complex() else dtype


def examples_at_a_time(numbers: int) -> int:
    """Of how many examples gradients of so many numbers are formed at a time."""
    return max(1, PULL_BACK_BYTES // max(1, 4 * numbers))


def _outer(left: Tensor, right: Tensor, swapped: bool) -> Tensor:
    """``left^T right`` of ``(..., L, d)`` and ``(..., L, k)``, summed over L; ``swapped``: with the first of the two
    dimensions dense in memory, for a parameter that has it last."""
    if swapped:
        return (right.transpose(-1, -2) @ left).transpose(-1, -2)
    return left.transpose(-1, -2) @ right


class DenseSink(ABC):
    """A sink (:class:`~stepinfluence.capture.uses.sinks.GradientSink`) that forms the gradient of each example for
    every use, and adds it to its parameter. A subclass says what adding is, and handles what it can in a better way.

    Args:
        dtype: in which real gradients are added up.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    @abstractmethod
    def add(self, piece: Piece, step: int, matrices: Tensor, first: int) -> None:
        """Add gradients ``(n, R, C)`` of a piece of a parameter, oriented as the piece is, of the examples
        ``first : first + n`` in a loop step."""

    def finish(self) -> None:  # noqa: B027  # for most there is nothing to do
        """Nothing waits."""

    def linear(self, source: Source, use: Use, activations: Tensor, grad: Tensor) -> None:
        a, first = use.rows(activations.to(grad.dtype))
        g, _ = use.rows(grad)
        size, dtype = examples_at_a_time(a.shape[-1] * g.shape[-1]), product_dtype(g, self.dtype)
        swapped = memory_order(source.tensor) == [1, 0]
        for k in range(0, len(a), size):
            left, right = g[k : k + size].to(dtype), a[k : k + size].to(dtype)
            self.dense(source, use, _outer(left, right, swapped), first + k)

    def products(
        self, source: Source, use: Use, x: Tensor, grad: Tensor, counts: tuple[int, int, int], back: Sequence[int]
    ) -> None:
        both, outer, inner = counts
        x, first = use.rows(x.to(grad.dtype), both + inner)
        g, _ = use.rows(grad, both + outer)
        sizes = (*g.shape[2:], *x.shape[2 + both :])
        x = x.flatten(2 + both) if inner else x.unsqueeze(-1)
        g = g.flatten(2 + both) if outer else g.unsqueeze(-1)
        if both:  # (n, L, *both, d) -> (n, both, L, d)
            x, g = (t.flatten(2, 1 + both).transpose(1, 2) for t in (x, g))
        dtype = torch.promote_types(g.dtype, torch.float32)
        size = examples_at_a_time(source.tensor.numel())
        last = back[-1] if back else 0
        swapped = both <= last < both + outer
        for k in range(0, len(g), size):
            left, right = g[k : k + size].to(dtype), x[k : k + size].to(dtype)
            found = _outer(left, right, swapped)
            found = found.reshape(len(found), *sizes).permute(0, *(1 + d for d in back))
            self.dense(source, use, found, first + k)

    def scaled(
        self, source: Source, use: Use, grads: Tensor, factors: Tensor, center: Tensor | None, scale: Tensor
    ) -> None:
        values = factors if center is None else factors - center.unsqueeze(-1)
        self.vector(source, use, grads * values * scale.unsqueeze(-1))

    def vector(self, source: Source, use: Use, grads: Tensor) -> None:
        g, first = use.rows(grads)
        self.dense(source, use, g.sum(1, dtype=product_dtype(g, self.dtype)), first)

    def expanded(self, source: Source, use: Use, grad: Tensor) -> None:
        self.dense(source, use, *use.reduce_to(grad, source.tensor.shape))

    def embedding(self, source: Source, use: Use, ids: Tensor, grad: Tensor, padding: int | None) -> None:
        g, first = use.rows(grad)
        index, _ = use.rows(ids, trailing=0)
        g = g.to(product_dtype(g, self.dtype))
        if padding is not None:
            g = g * (index != padding).unsqueeze(-1)
        size = examples_at_a_time(source.tensor.numel())
        for k in range(0, len(g), size):
            some = index[k : k + size]
            table = g.new_zeros(len(some), len(source.tensor), g.shape[-1])
            example = torch.arange(len(some), device=g.device).unsqueeze(1).expand_as(some)
            table.index_put_((example, some), g[k : k + size], accumulate=True)
            self.dense(source, use, table, first + k)

    def dense_rows(self, source: Source, use: Use, grads: Tensor) -> None:
        rows, first = use.rows(grads, trailing=grads.dim() - 1)
        total = rows[:, 0] if rows.shape[1] == 1 else rows.sum(1, dtype=product_dtype(rows, self.dtype))
        self.dense(source, use, total, first)

    def dense(self, source: Source, use: Use, grads: Tensor, first: int) -> None:
        """Add gradients of a source, ``(n, *)`` with as many entries for each example as it has, of the examples
        ``first : first + n``: as they are to the parameter that it is a piece of, or through autograd to those that
        it was computed from."""
        piece = source.piece
        if piece is not None:
            shape = (len(piece.columns), len(piece.rows)) if piece.transposed else (len(piece.rows), len(piece.columns))
            if piece.dim == 1 and source.tensor.dim() > 1:  # a block
                grads = grads.reshape(len(grads), *source.tensor.shape)
                grads = grads.permute(0, *(1 + d for d in memory_order(source.tensor)))
            self.add(piece, use.step, grads.reshape(len(grads), *shape), first)
            return
        grads = grads.reshape(len(grads), *source.tensor.shape)
        size = examples_at_a_time(sum(t.parameter.numel() for t in source.targets))
        for k in range(0, len(grads), size):
            for target, found in pull_back(source, grads[k : k + size]):
                rows, columns = target.matrix_shape
                whole = Piece(target, range(rows), range(columns), False, 2)
                self.add(whole, use.step, found.reshape(len(found), rows, columns), first + k)
