"""Bringing the gradients of one use of a parameter in order: a row per example, and its tokens beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from stepinfluence.capture.owners import Owners
from stepinfluence.errors import LayoutError

Told: TypeAlias = Literal["followed", "found"]
"""How the owners of rows became known: followed through the forward pass, or found by gradients."""

REDUCED = (torch.bfloat16, torch.float16)


def gains_examples(
    before: Sequence[int], after: Sequence[int], batch_size: int | None, dims: Iterable[int]
) -> int | None:
    """The dimension, of ``dims``, in which expanding a tensor from shape ``before`` to ``after`` gives it a row per
    example; None if there is none."""
    aligned = (1,) * (len(after) - len(before)) + tuple(before)
    for k in dims:
        if k < len(after) and aligned[k] == 1 and after[k] == batch_size:
            return k
    return None


@dataclass(frozen=True, eq=False)
class Placement:
    """Where the rows of a use go, flattened: of the examples ``first : first + count``, ``width`` each, the rows
    ``source`` in this order, of which those at ``padding`` are none.

    Attributes:
        source: ``(count * width,)``.
        padding: places in ``source``.
        first, count: the examples that rows are made for.
        width: most rows of one example.
    """

    source: Tensor
    padding: Tensor
    first: int
    count: int
    width: int


def placement(owners: Tensor) -> Placement:
    """Rows grouped by their owners ``(n,)``."""
    if not len(owners):
        return Placement(owners, owners, 0, 0, 0)
    order = torch.argsort(owners, stable=True)
    ordered = owners[order]
    first = int(ordered[0])
    owner = ordered - first
    counts = torch.bincount(owner)
    begins = counts.cumsum(0) - counts
    position = torch.arange(len(order), device=owners.device) - begins[owner]
    count, width = len(counts), int(counts.max())
    source = torch.full((count * width,), -1, device=owners.device)
    source[owner * width + position] = order
    return Placement(source.clamp(min=0), (source < 0).nonzero().flatten(), first, count, width)


@dataclass
class Pass:
    """What the uses of one forward pass share.

    Attributes:
        size: examples of the batch.
        relabelled: for each followed owner, the loss that it turned out to be of; None where they are the same.
        coarse: whether gradients of reduced precision were seen.
        dtypes: of the gradients that uses will get.
        found: whether owners were found by gradients.
        graph_task: autograd's number of the capture's own backward pass, while one runs.
        placements: of rows, by the identity of their owners.
        placed, arranged: the last of these with its owners, and the last tensor that was brought in such an order,
            while a backward pass runs.
    """

    size: int = 0
    relabelled: Tensor | None = None
    coarse: bool = False
    dtypes: set[torch.dtype] = field(default_factory=set)
    found: bool = False
    graph_task: int = -1
    placements: dict[int, tuple[Owners, Placement]] = field(default_factory=dict)
    placed: tuple[Tensor, Placement] | None = None
    arranged: tuple[Tensor, int, Placement, Tensor] | None = None


class Use:
    """One use of parameters: when it was, and whose the rows of its gradients are.

    Attributes:
        name: of the parameters.
        step: the loop step, 0-based.
        operation: name of the function that it is a use in.
        owners: of the rows, for their leading dimensions; None where that is not known.
        found: owners of the flattened rows ``(rows,)`` as gradients told, which then count instead.
    """

    def __init__(self, name: str, step: int, owners: Owners | None, shared: Pass, operation: str = "") -> None:
        self.name, self.step, self.owners, self.operation = name, step, owners, operation
        self.shared = shared
        self.found: Owners | None = None

    def rows(self, tensor: Tensor, trailing: int = 1) -> tuple[Tensor, int]:
        """``(*lead, *trailing dims) -> (n, tokens, *trailing dims)`` of the examples ``first : first + n``, and
        ``first``. What an example lacks in tokens is filled with zeros."""
        self.shared.coarse |= tensor.dtype in REDUCED
        lead, tail = tensor.shape[: tensor.dim() - trailing], tensor.shape[tensor.dim() - trailing :]
        size = self.shared.size
        tokens = math.prod(lead)
        if size == 1 or tokens == 0:
            return tensor.reshape(1 if size else 0, tokens, *tail), 0
        owners = self.owners if self.found is None else self.found
        if self.found is not None:
            assert self.found.shape == (tokens,)
        elif owners is not None and self.shared.relabelled is None:
            if owners.shape != tuple(lead):
                raise LayoutError(f"{self.name}: its gradient has rows {tuple(lead)}, its use had {owners.shape}")
            if owners.along == 0 and len(lead) == 2 and lead[0] == size:  # as most are: nothing to do
                return tensor, 0
            if owners.along is not None and lead[owners.along] == size:
                return tensor.movedim(owners.along, 0).reshape(size, tokens // size, *tail), 0
        assert owners is not None
        as_they_are = self.found is not None or self.shared.relabelled is None
        if as_they_are and (regular := owners.regular(size)) is not None:
            split = tensor.reshape(*regular, *tail).transpose(0, 1)
            return split.reshape(size, tokens // size, *tail), 0
        place, last = self._placement(owners), self.shared.arranged
        if (
            last is not None and last[0] is tensor and last[1:3] == (tensor._version, place)
        ):  # the gradient of a weight and of its bias
            return last[3].reshape(place.count, place.width, *tail), place.first
        out = tensor.reshape(tokens, *tail).index_select(0, place.source)
        if len(place.padding):
            out.index_fill_(0, place.padding, 0)
        self.shared.arranged = tensor, tensor._version, place, out
        return out.reshape(place.count, place.width, *tail), place.first

    def _placement(self, owners: Owners) -> Placement:
        held = self.shared.placements.get(id(owners))
        if held is None:
            settled = owners.settled()
            if self.found is None and self.shared.relabelled is not None:
                settled = self.shared.relabelled[settled]
            last = self.shared.placed
            if last is None or not torch.equal(last[0], settled):  # as of the layers of one expert
                last = self.shared.placed = settled, placement(settled)
            held = self.shared.placements[id(owners)] = owners, last[1]
        return held[1]

    def lead_last(self, grad: Tensor, shape: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Gradient of a parameter of ``shape`` (right-aligned) that was expanded to ``grad.shape``: with the dimensions
        over which it was broadcast first, and which those are."""
        pad = grad.dim() - len(shape)
        kept = [pad + k for k, n in enumerate(shape) if n != 1]
        free = [d for d in range(grad.dim()) if d not in kept]
        return grad.permute(*free, *kept), free

    def reduce_to(self, grad: Tensor, shape: Sequence[int]) -> tuple[Tensor, int]:
        """Gradient of an expanded parameter, summed per example: ``grad.shape -> (n, *shape)``, and the first one.

        ``shape`` (right-aligned) is what was expanded to ``grad.shape``; ``owners`` are those of ``grad``'s elements.
        """
        arranged, free = self.lead_last(grad, shape)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        kept = grad.dim() - len(free)
        others = [d for d in range(grad.dim()) if d not in free]
        if self.found is None and self.owners is not None and self.shared.size > 1:
            if any(self.owners.varies(d) for d in others):
                return self._by_element(grad, free, dtype).reshape(self.shared.size, *shape), 0
            along = self.owners.along
            if along is not None and grad.shape[along] == self.shared.size and self.shared.relabelled is None:
                summed = grad.sum([d for d in free if d != along], dtype=dtype) if len(free) > 1 else grad
                place = sum(d < along for d in others)
                self.shared.coarse |= grad.dtype in REDUCED
                return summed.movedim(place, 0).reshape(self.shared.size, *shape), 0
            lead = Use(self.name, self.step, self.owners.squeezed(others), self.shared)
        else:
            lead = self
        rows, first = lead.rows(arranged, kept)
        return rows.sum(1, dtype=dtype).reshape(len(rows), *shape), first

    def _by_element(self, grad: Tensor, free: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Owners differ within the parameter's own dimensions: one example after the other."""
        assert self.owners is not None
        settled = self.owners.settled().reshape(grad.shape)
        if self.shared.relabelled is not None:
            settled = self.shared.relabelled[settled]
        found = torch.stack([torch.where(settled == b, grad, 0) for b in range(self.shared.size)])
        return found.sum([1 + d for d in free], dtype=dtype) if free else found.to(dtype)
