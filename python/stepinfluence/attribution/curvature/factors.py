"""Eigenvectors and eigenvalues of ``(1/N) sum g g^T``: exact where rows or columns are few, else the leading ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

Stream: TypeAlias = Callable[[], Iterator[Tensor]]
"""Rows ``(r, D)`` block by block, the same each time it is called."""

EXACT_SIDE = 4096
"""All eigenvectors are computed where rows or columns are at most this many: an ``eigh`` of a minute."""

FACTOR_BYTES = 1 << 30
"""Eigenvectors (and Gram matrices) that are held at a time; more columns mean fewer eigenvectors."""

RANK = 256
"""Leading eigenvectors that are computed where all are too many, unless told otherwise."""

OVERSAMPLED = 16
POWER_PASSES = 2
CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class Factor:
    """A symmetric matrix ``V^T diag(values) V + rest (I - V^T V)``, positive semidefinite.

    Attributes:
        basis: V, ``(r, D)`` float64, orthonormal rows.
        values: ``(r,)`` float64, descending.
        rest: the value in all other directions: the mean of the eigenvalues that were not computed; 0 if all were.
    """

    basis: Tensor
    values: Tensor
    rest: float = 0.0

    @property
    def largest(self) -> float:
        """The largest eigenvalue; 0 for a matrix of zeros."""
        return float(self.values[0]) if len(self.values) else 0.0

    def apply(self, vectors: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``f(A)``, where ``f`` is of eigenvalues, times each of ``vectors (n, D)``; float64."""
        outside = function(self.values.new_tensor(self.rest))
        # In float64: what is left of the leading directions is a small part of them, by cancellation.
        inside = vectors.double() @ self.basis.T * (function(self.values) - outside)
        return torch.addmm(vectors.double() * outside, inside, self.basis)

    def solve(self, vectors: Tensor, damping: float) -> Tensor:
        """``(A + damping)^-1`` times each of ``vectors (n, D)``; float64, ``damping`` absolute."""
        return self.apply(vectors, lambda values: 1 / (values + damping))

    def to(self, device: torch.device | str) -> Factor:
        """The same on another device."""
        return replace(self, basis=self.basis.to(device), values=self.values.to(device))


def truncated(values: Tensor, basis: Callable[[Tensor], Tensor], rank: int | None) -> Factor:
    """The leading ``rank`` of all eigenvalues (ascending, as eigh gives them) and, by their places, eigenvectors."""
    floor = len(values) * torch.finfo(torch.float64).eps * float(values[-1])
    (kept,) = torch.nonzero(values > floor, as_tuple=True)
    kept = kept.flip(0)
    left = 0.0
    if rank is not None and rank < len(kept):
        left = float(values[kept[rank:]].mean())
        kept = kept[:rank]
    return Factor(basis(kept), values[kept].contiguous(), left)


def of_rows(rows: Tensor, rank: int | None = None) -> Factor:
    """From ``(N, D)`` rows through their ``N x N`` inner products: for fewer rows than columns."""
    n, width = rows.shape
    gram = rows.new_zeros(n, n, dtype=torch.float64)
    step = max(1, CHUNK_BYTES // (8 * n))
    for k in range(0, width, step):
        part = rows[:, k : k + step].double()
        gram.addmm_(part, part.T, alpha=1 / n)
    values, vectors = torch.linalg.eigh(gram)

    def basis(kept: Tensor) -> Tensor:
        weights = (vectors[:, kept] / (n * values[kept]).sqrt()).T
        return torch.cat([weights @ rows[:, k : k + step].double() for k in range(0, width, step)], 1)

    return truncated(values, basis, rank)


def of_gram(gram: Tensor, rank: int | None = None) -> Factor:
    """From the ``D x D`` matrix itself, float64."""
    values, vectors = torch.linalg.eigh(gram)
    return truncated(values, lambda kept: vectors[:, kept].T.contiguous(), rank)


def grams(stream: Stream, columns: Sequence[slice], count: int) -> list[Tensor]:
    """``(1/count) sum g g^T`` restricted to each of several ranges of columns, in one pass; float64."""
    found: list[Tensor] = []
    for block in stream():
        for k, part in enumerate(columns):
            rows = block[:, part].double()
            if k == len(found):
                found.append(rows.new_zeros(rows.shape[1], rows.shape[1]))
            found[k].addmm_(rows.T, rows, alpha=1 / count)
    return found


def leading(stream: Stream, width: int, count: int, trace: float, rank: int, *, seed: int = 0) -> Factor:
    """The leading eigenvectors by randomised subspace iteration (Halko et al., 2011), in streamed passes.

    Args:
        stream: the rows.
        width, count: D and N.
        trace: of the matrix: what is not in the leading eigenvalues is spread over the other directions.
        rank: how many.
        seed: of the random start.
    """
    size = min(rank + OVERSAMPLED, width, count)
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(width, size, generator=generator, dtype=torch.float64)
    for _ in range(POWER_PASSES):
        start = torch.linalg.qr(found).Q
        found = torch.zeros_like(start)
        turned: Tensor | None = None
        for block in stream():
            if turned is None:  # all blocks have one dtype; of many columns a block has few rows
                turned = start.to(block)
            # The passes only turn the subspace: rows stay in their precision, sums are kept in float64.
            found.add_(block.T @ (block @ turned), alpha=1 / count)
    subspace = torch.linalg.qr(found).Q
    inside = subspace.new_zeros(size, size)
    for block in stream():
        part = block.double() @ subspace
        inside.addmm_(part.T, part, alpha=1 / count)
    values, vectors = torch.linalg.eigh(inside)
    factor = truncated(values, lambda kept: (subspace @ vectors[:, kept]).T.contiguous(), rank)
    others = min(width, count) - len(factor.values)
    left = max(0.0, trace - float(factor.values.sum()))
    return replace(factor, rest=left / others if others > 0 else 0.0)
