"""Which example of the batch each element of a tensor belongs to: the facts that are followed beside the tensors.

An element's owner is an interval of example numbers, ``lo .. hi``: one example where both are equal, *nobody* (no
example had a part in it) where ``lo > hi``, *mixed or not known* where ``lo < hi``. Two elements that meet give the
smallest interval that holds both: so what has been mixed once never looks like one example's again. An interval is kept
for each index of the dimensions along which owners differ, and once for all others: a batch of B examples with the
examples along one dimension takes B numbers, however large its activations are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

NOBODY = (1 << 30, -1)
UNKNOWN = (-1, 1 << 30)


class Owners:
    """Owners of the elements of a tensor of one shape.

    Args:
        shape: of the tensor.
        lo, hi: int64 tensors with as many dimensions as ``shape`` has; size 1 along dimensions on which owners do not
            depend.
        along: the dimension whose index is the owner, where it is as simple as that and known to be.

    Two objects that stand for the same owners need not be the same object.
    """

    __slots__ = ("_regular", "along", "hi", "lo", "shape")

    def __init__(self, shape: Sequence[int], lo: Tensor, hi: Tensor, along: int | None = None) -> None:
        self.shape = tuple(shape)
        self.lo, self.hi, self.along = lo, hi, along
        self._regular: tuple[int, int, int] | bool | None = False

    @classmethod
    def along_dim(cls, shape: Sequence[int], dim: int, device: torch.device) -> Owners:
        """The index along ``dim`` is the example."""
        numbers = torch.arange(shape[dim], device=device).reshape([-1 if k == dim else 1 for k in range(len(shape))])
        return cls(shape, numbers, numbers, dim)

    @classmethod
    def same(cls, shape: Sequence[int], owner: tuple[int, int], device: torch.device) -> Owners:
        """One interval for all elements."""
        lo, hi = (torch.full((1,) * len(shape), value, device=device) for value in owner)
        return cls(shape, lo, hi)

    @property
    def one_for_all(self) -> bool:
        return self.lo.numel() == 1

    def varies(self, dim: int) -> bool:
        """Whether owners are kept apart along a dimension."""
        return max(self.lo.shape[dim], self.hi.shape[dim]) > 1

    def map(self, shape: Sequence[int], function: Callable[[Tensor, bool], Tensor]) -> Owners:
        """Owners of another tensor, by a function that is called with (interval ends, whether those are the upper)."""
        lo = function(self.lo, False)
        hi = lo if self.hi is self.lo else function(self.hi, True)
        return Owners(shape, lo, hi)

    def anybody(self) -> Owners:
        """The same with nobody's elements not known."""
        empty = self.lo > self.hi
        lo, hi = torch.where(empty, UNKNOWN[0], self.lo), torch.where(empty, UNKNOWN[1], self.hi)
        return Owners(self.shape, lo, hi)

    def expanded(self, dims: Iterable[int]) -> Owners:
        """The same with every index of some dimensions written out."""
        wanted = set(dims)

        def expand(ends: Tensor, _: bool) -> Tensor:
            return ends.expand([n if k in wanted else -1 for k, n in enumerate(self.shape)])

        return self.map(self.shape, expand)

    def reduced(self, dims: Iterable[int]) -> Owners:
        """Everything along some dimensions meets: ``shape`` with size 1 there."""
        chosen = sorted({d % len(self.shape) for d in dims}) if self.shape else []
        shape = [1 if k in chosen else n for k, n in enumerate(self.shape)]
        if any(self.lo.shape[d] == 0 for d in chosen):  # there is nothing
            return Owners.same(shape, NOBODY, self.lo.device)
        varying = [d for d in chosen if self.varies(d)]
        if not varying:
            along = self.along if self.along not in chosen else None
            return Owners(shape, self.lo, self.hi, along)
        lo, hi = self.lo.amin(varying, keepdim=True), self.hi.amax(varying, keepdim=True)
        return Owners(shape, lo, hi)

    def broadcast(self, shape: Sequence[int]) -> Owners:
        """Owners of the tensor expanded to ``shape`` (aligned right)."""
        if self.shape == tuple(shape):
            return self
        pad = len(shape) - len(self.shape)
        along = None if self.along is None or self.shape[self.along] != shape[self.along + pad] else self.along + pad
        lo = self.lo.reshape((1,) * pad + self.lo.shape)
        hi = lo if self.hi is self.lo else self.hi.reshape((1,) * pad + self.hi.shape)
        return Owners(shape, lo, hi, along)

    def squeezed(self, dims: Iterable[int]) -> Owners:
        """Without some dimensions, which must be of size 1 as far as owners go."""
        gone = {d % len(self.shape) for d in dims} if self.shape else set()
        keep = [k for k in range(len(self.shape)) if k not in gone]
        along = keep.index(self.along) if self.along is not None and self.along in keep else None
        result = self.map([self.shape[k] for k in keep], lambda ends, _: ends.reshape([ends.shape[k] for k in keep]))
        result.along = along
        return result

    def at(self, dim: int, shape: Sequence[int]) -> Owners:
        """Owners ``(n,)`` of the indices of one dimension, for a tensor of ``shape``."""
        sizes = [1] * len(shape)

        def place(ends: Tensor, _: bool) -> Tensor:
            return ends.reshape([*sizes[:dim], len(ends), *sizes[dim + 1 :]])

        found = self.map(shape, place)
        found.along = None if self.along is None else dim
        return found

    def compressed(self, candidates: Iterable[int] | None = None) -> Owners:
        """The same, kept once along dimensions on which owners turn out not to depend; says so if they are along one
        dimension (looks at values)."""
        lo, hi = self.lo, self.hi
        for dim in range(len(self.shape)) if candidates is None else candidates:
            if max(lo.shape[dim], hi.shape[dim]) > 1:
                first = lo.narrow(dim, 0, 1), hi.narrow(dim, 0, 1)
                if bool((lo == first[0]).all()) and (hi is lo or bool((hi == first[1]).all())):
                    lo, hi = first[0], first[0] if hi is lo else first[1]
        found = Owners(self.shape, lo, hi)
        varying = [k for k in range(len(self.shape)) if found.varies(k)]
        if len(varying) == 1 and lo.numel() == self.shape[varying[0]]:
            numbers = torch.arange(lo.numel(), device=lo.device)
            if torch.equal(lo.flatten(), numbers) and (hi is lo or torch.equal(hi.flatten(), numbers)):
                found.hi, found.along = found.lo, varying[0]
        return found

    def settled(self) -> Tensor:
        """``(numel of shape,)``: the owner of each element; 0 for elements that have none or more than one."""
        lo, hi = (ends.expand(self.shape).flatten() for ends in (self.lo, self.hi))
        return lo if self.hi is self.lo else torch.where(lo == hi, lo, 0)

    def regular(self, batch_size: int) -> tuple[int, int, int] | None:
        """``(outer, B, inner)`` if the flattened elements are, in order, ``inner`` of each of the B examples, ``outer``
        times over; None if they are not."""
        if self._regular is False:
            self._regular = _regular(self.settled(), batch_size)
        assert self._regular is None or isinstance(self._regular, tuple)
        return self._regular


def _regular(owners: Tensor, size: int) -> tuple[int, int, int] | None:
    count = len(owners)
    if count == 0 or count % size:
        return None
    changes = (owners != owners[0]).nonzero()
    inner = int(changes[0]) if len(changes) else count
    if count % (size * inner):
        return None
    pattern = torch.arange(count, device=owners.device) // inner % size
    return (count // (size * inner), size, inner) if torch.equal(owners, pattern) else None


def meet(parts: Sequence[Owners], shape: Sequence[int]) -> Owners:
    """What elements of several tensors give that are broadcast against each other to ``shape``."""
    aligned = [part.broadcast(shape) for part in parts]
    first = aligned[0]
    if all(a is first or (a.along is not None and a.along == first.along) for a in aligned[1:]):
        return first
    lo, hi = first.lo, first.hi
    for other in aligned[1:]:
        lo, hi = torch.minimum(lo, other.lo), torch.maximum(hi, other.hi)
    return Owners(shape, lo, hi)


def filled(strong: Owners, weak: Owners) -> Owners:
    """``strong``, with ``weak`` in the places of nobody."""
    if strong.hi is strong.lo:
        return strong
    weak = weak.broadcast(strong.shape)
    empty = strong.lo > strong.hi
    return Owners(strong.shape, torch.where(empty, weak.lo, strong.lo), torch.where(empty, weak.hi, strong.hi))


def reshaped(owners: Owners, shape: Sequence[int]) -> Owners:
    """Owners of the tensor reshaped; only dimensions that are taken apart or joined are written out."""
    groups = _groups(owners.shape, shape)
    if groups is None:
        return owners.expanded(range(len(owners.shape))).map(shape, lambda e, _: e.reshape(tuple(shape))).compressed()
    sizes: list[int] = []
    written: list[int] = []
    fresh: list[int] = []
    for before, after in groups:
        if not any(owners.varies(d) for d in before):
            sizes += [1] * len(after)
        elif len(before) == len(after) == 1:
            sizes.append(owners.shape[before[0]])
        else:
            sizes += [shape[d] for d in after]
            written += before
            fresh += after
    whole = owners.expanded(written) if written else owners
    result = whole.map(shape, lambda ends, _: ends.reshape(_sizes_like(ends, sizes, groups)))
    if fresh:
        return result.compressed(fresh)
    if owners.along is not None:
        result.along = next(after[0] for before, after in groups if owners.along in before)
    return result


def _sizes_like(ends: Tensor, sizes: Sequence[int], groups: Sequence[tuple[list[int], list[int]]]) -> list[int]:
    """``sizes``, with 1 where this end of the intervals does not vary although the other one does."""
    found = list(sizes)
    for before, after in groups:
        if all(ends.shape[d] == 1 for d in before):
            for d in after:
                found[d] = 1
    return found


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Which dimensions of a reshape go into which: the smallest runs on both sides that hold as many elements."""
    if math.prod(before) != math.prod(after) or 0 in before:
        return None
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        a = b = 1
        if i < len(before):
            left.append(i)
            a, i = before[i], i + 1
        if j < len(after):
            right.append(j)
            b, j = after[j], j + 1
        while a != b:
            if a < b:
                left.append(i)
                a, i = a * before[i], i + 1
            else:
                right.append(j)
                b, j = b * after[j], j + 1
        groups.append((left, right))
    return groups
