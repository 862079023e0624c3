"""Whose the rows of the data are that parameters meet, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stepinfluence.capture.body.sources import Provenance, TensorSet
from stepinfluence.capture.body.steps import in_backward
from stepinfluence.capture.owners import RULES, Follower, Memory, Owners, meet


class Ownership:
    """The owners of the operands of calls in which parameters take part.

    Nothing is told (None) where the size of the batch is not known, and in a recomputation of activation
    checkpointing: that cannot follow owners, and takes its decisions as they were taken in the forward pass.

    Args:
        provenance: tells data from what it meets.
        batch_size: examples of the batch; None: not known.
        batch_dim: the dimension that holds them.
        inputs: the batch's tensors.
        memory: of passes over as many examples.

    Attributes:
        follower: follows owners from call to call.
        doubted: whether a parameter met a tensor made without data that was taken for a state of the examples, for its
            size.
        labelled: whether some of the batch's tensors say which example is which.
        guessed: data of which nothing was known where it met a parameter.
    """

    def __init__(
        self,
        provenance: Provenance,
        batch_size: int | None,
        batch_dim: int,
        inputs: Sequence[Tensor],
        memory: Memory,
    ) -> None:
        self.batch_size, self.batch_dim = batch_size, batch_dim
        self.follower = Follower(RULES, batch_size, memory)
        self.doubted = self.labelled = False
        self._has_inputs = bool(inputs)
        self.guessed = TensorSet()
        self._provenance = provenance
        self._row_dims: dict[Any, list[int | None]] = {}
        self._alike: dict[Any, bool] = {}
        for tensor in inputs if batch_size is not None else ():
            lies = tensor.dim() > batch_dim and tensor.shape[batch_dim] == batch_size
            if lies and not provenance.has(tensor):
                self.follower.note(tensor, memory.along_dim(tensor.shape, batch_dim, tensor.device), tapped=False)
                self.labelled = True

    @property
    def following(self) -> bool:
        """Whether owners are followed in the call that is running now."""
        return self.batch_size is not None and not in_backward()

    def made_here(self, tensor: Tensor) -> bool:
        """Whether a tensor that the pass makes of whole numbers is taken for a part of the batch, which holds none
        itself: its texts as tokens, one by one or end to end. The losses will tell whether that was right."""
        if self._has_inputs or self.batch_size is None or tensor.is_floating_point() or tensor.numel() <= 1:
            return False
        self.doubted = True
        return True

    @property
    def example_dims(self) -> tuple[int, ...]:
        """The dimensions in which a tensor made without data may hold the examples, likeliest first."""
        return (self.batch_dim,) if self.batch_dim == 0 else (self.batch_dim, 0)

    def of(self, data: Tensor, trailing: int = 0) -> Owners | None:
        """Owners of the leading dimensions of an operand, all but the last ``trailing``; None: not known."""
        return self.lead(data, range(data.dim() - trailing))

    def of_columns(self, data: Tensor) -> Owners | None:
        """Owners of the columns of matrices ``(*lead, k, n)``: of ``(*lead, n)``; None: not known."""
        return self.lead(data, [*range(data.dim() - 2), data.dim() - 1])

    def lead(self, data: Tensor, lead: Sequence[int]) -> Owners | None:
        """Owners of some dimensions of an operand, in that order, where all along the others meets; None: not
        known."""
        if not self.following or (owners := self.follower.owners(data)) is None:
            return None

        def make() -> Owners:
            others = [d for d in range(data.dim()) if d not in lead]
            small = owners.reduced(others).squeezed(others)
            kept = sorted(lead)
            order = [kept.index(d) for d in lead]
            if order == sorted(order):
                return small
            found = small.map([small.shape[k] for k in order], lambda ends, _: ends.permute(order))
            found.along = None if small.along is None else order.index(small.along)
            return found

        return self._sure(self.follower.remembered("lead of", owners, tuple(lead), make))

    def alike_along(self, data: Tensor, dim: int) -> bool:
        """Whether it is known that owners do not depend on the index along a dimension of an operand."""
        if in_backward():
            return self._alike.get((tuple(data.shape), dim), True)
        owners = self.follower.owners(data)
        alike = (
            owners is not None
            and not owners.varies(dim)
            and not (owners.one_for_all and bool(owners.lo.flatten() < owners.hi.flatten()))
        )
        self._alike[tuple(data.shape), dim] = alike
        return alike

    def after(self, func: Any, args: tuple[Any, ...], result: Tensor) -> Owners | None:
        """Owners of what a call without parameters would give; None: not known."""
        return self._sure(self.follower.after(func, args, {}, result)) if self.following else None

    def joint(self, operands: Sequence[Any], shape: Sequence[int]) -> Owners | None:
        """Owners of what operands give that are broadcast to ``shape``; None: not known."""
        if not self.following:
            return None
        return self._sure(self.follower.combine([self.follower.part(v) for v in operands], shape))

    def stand_in(self, given: Any, result: Any) -> None:
        """Tensors that were put in place of others out of sight, with the same values: the same is known of them."""
        if in_backward():
            return
        for before, after in zip(pytree.tree_leaves(given), pytree.tree_leaves(result), strict=False):
            if not isinstance(before, Tensor) or not isinstance(after, Tensor) or after is before:
                continue
            if before.shape == after.shape:
                self._provenance.stand_in(before, after)
                self.follower.stand_in(before, after)

    def _sure(self, owners: Owners | None) -> Owners | None:
        """Owners of rows that a parameter meets: what is nobody's may from now on be anybody's."""
        if owners is None or owners.hi is owners.lo:
            return owners
        return self.follower.remembered("anybody", owners, (), owners.anybody)  # type: ignore[no-any-return]

    def row_dims(self, func: Any, leaves: Sequence[Any]) -> tuple[list[int | None], Owners | None]:
        """For each argument of a call the dimension in which its rows lie (None: it is the same for all), and their
        owners ``(rows,)`` (None: not known)."""
        known = self._provenance
        data = [isinstance(v, Tensor) and known.source_of(id(v)) is None and not known.is_constant(v) for v in leaves]
        key = (func, tuple(tuple(v.shape) if isinstance(v, Tensor) else None for v in leaves))
        if in_backward():
            return self._row_dims.get(
                key, [0 if d and v.dim() else None for v, d in zip(leaves, data, strict=True)]
            ), None
        dims: list[int | None] = []
        owners: list[Owners] = []
        for value, is_data in zip(leaves, data, strict=True):
            part = self.follower.part(value) if is_data else None
            if not is_data or not value.dim() or (part is None and self.batch_size is not None):
                dims.append(None)
                continue
            whole = None if part is None else part.owners
            varying = [] if whole is None else [d for d in range(value.dim()) if whole.varies(d)]
            dims.append(varying[0] if varying else 0)
            if whole is not None:
                others = [d for d in range(value.dim()) if d != dims[-1]]
                owners.append(whole.reduced(others).squeezed(others))
        if len({v.shape[d] for v, d in zip(leaves, dims, strict=True) if d is not None}) > 1:
            dims = [d if d is None or v.shape[d] != 1 else None for v, d in zip(leaves, dims, strict=True)]
        self._row_dims[key] = dims
        joint = [o for o in owners if o.shape == owners[0].shape]
        return dims, self._sure(meet(joint, joint[0].shape)) if joint and self.batch_size is not None else None

    def give(self, data: Sequence[Tensor]) -> None:
        """Data that meets a parameter: what has no owners gets those that its shape suggests. The losses will tell
        whether that was right."""
        if self.batch_size is None:
            return
        follower = self.follower
        for tensor in data:
            follower.meets(tensor)
            part = follower.part(tensor)
            if part is None:
                self.guessed.add(tensor)
            if part is not None and (part.strong or not part.owners.one_for_all or part.owners.lo == part.owners.hi):
                continue
            owners = self._suggested(tensor, self.batch_size)
            doubtful = part is None and self._provenance.doubtful.has_id(id(tensor))
            self.doubted |= doubtful and owners is not None
            if owners is not None:
                follower.note(tensor, owners, tapped=False)
        if all(follower.part(tensor) is None for tensor in data):
            follower.note(data[0], follower.not_known(data[0]), tapped=False)

    def _suggested(self, tensor: Tensor, size: int) -> Owners | None:
        """Owners of a tensor by its shape alone."""
        shape = tensor.shape
        dims = [k for k in range(max(1, tensor.dim() - 1)) if k < tensor.dim() and shape[k] == size]
        if dims:
            dim = self.batch_dim if self.batch_dim in dims else dims[0]
            return self.follower.memory.along_dim(shape, dim, tensor.device)
        if tensor.dim() > 1 and shape[0] and shape[0] % size == 0:
            key = ("suggested", tuple(shape), size, self.batch_dim, tensor.device)
            return self.follower.memory.plain(key, lambda: self._blocks(tensor, size))
        return None

    def _blocks(self, tensor: Tensor, size: int) -> Owners:
        """Owners by the first dimension, in which the examples lie one after the other, or take turns."""
        numbers = torch.arange(len(tensor), device=tensor.device).reshape(-1, *(1,) * (tensor.dim() - 1))
        ends = numbers // (len(tensor) // size) if self.batch_dim == 0 else numbers % size
        return Owners(tensor.shape, ends, ends)
