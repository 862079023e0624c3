"""What a tensor in the forward pass has to do with the target parameters.

A tensor is *batch-free* if no example of the batch had a part in it: parameters, buffers, and everything computed
from those alone. A batch-free tensor computed from target parameters is a :class:`Source`: where it meets the data,
the per-example gradient with respect to it is captured and taken back to the parameters, directly where it is a
strided piece of one parameter (transposes, slices, chunks, rows), through autograd otherwise (weight norm, a LoRA
product, ``exp(log_a)``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdi_kernels import CountSketch, TensorSketch
from stepinfluence.capture.body.targets import Target


@dataclass(frozen=True)
class Piece:
    """A strided piece of one target: entry (i, j) of the piece is entry (rows[i], columns[j]) of the target's matrix,
    or (rows[j], columns[i]) where ``transposed``. A 1-D tensor is a piece with one row (or one column); a block of a
    target of more dimensions, such as one expert of many, is a run of entries, and ``dim`` is 1 for it: in the order of
    the tensor's dimensions by :func:`memory_order`."""

    target: Target
    rows: range
    columns: range
    transposed: bool
    dim: int

    @property
    def whole(self) -> bool:
        """Whether the piece is the parameter as it stands."""
        shape = (len(self.rows), len(self.columns))
        return not self.transposed and shape == self.target.matrix_shape and self.rows.step == self.columns.step == 1

    def vector_sketch(self) -> CountSketch | None:
        """The sketch of a piece of a vector parameter; None for pieces of matrices."""
        sketch = self.target.sketch
        if not isinstance(sketch, CountSketch):
            return None
        return sketch if self.whole else sketch.select(_slice(self.columns))

    def matrix_sketch(self) -> TensorSketch | None:
        """The sketch of a piece of a matrix parameter, oriented as the piece is; None for pieces of vectors."""
        sketch = self.target.sketch
        if not isinstance(sketch, TensorSketch):
            return None
        if not self.whole:
            out = sketch.out.select(_slice(self.rows))
            sketch = TensorSketch.from_sides(out, sketch.inp.select(_slice(self.columns)))
        return sketch.T if self.transposed else sketch


def _slice(index: range) -> slice:
    return slice(index.start, index.stop, index.step)


def _range(start: int, step: int, count: int) -> range:
    return range(start, start + step * count, step)


def find_piece(tensor: Tensor, target: Target) -> Piece | None:
    """``tensor`` as a strided piece of ``target``, or None if it is not one."""
    base = target.parameter
    if tensor is not base and (tensor._base is not base or tensor.dtype != base.dtype):
        return None
    if tensor.is_neg() or tensor.is_conj():  # a view of the same numbers that stands for others
        return None
    if tensor is base:
        shape = target.matrix_shape
        return Piece(target, range(shape[0]), range(shape[1]), False, tensor.dim())
    if not base.is_contiguous() or tensor.numel() == 0:
        return None
    if tensor.dim() in (1, 2) and (piece := _strided(tensor, target)) is not None:
        return piece
    return _block(tensor, target) if base.dim() > 2 and tensor.dim() > 1 else None


def _strided(tensor: Tensor, target: Target) -> Piece | None:
    """A vector, or a matrix whose rows and columns are some of the target's."""
    n_columns = target.matrix_shape[1]
    row, column = divmod(int(tensor.storage_offset() - target.parameter.storage_offset()), n_columns)
    sizes, strides = list(tensor.shape), list(tensor.stride())
    if tensor.dim() == 1:
        sizes, strides = [1, *sizes], [n_columns, *strides]
    for transposed in (False, True):
        (n_r, n_c), (s_r, s_c) = (sizes, strides) if not transposed else (sizes[::-1], strides[::-1])
        s_r = n_columns if n_r == 1 else s_r
        s_c = 1 if n_c == 1 else s_c
        if s_r > 0 and s_r % n_columns == 0 and s_c > 0 and column + s_c * (n_c - 1) < n_columns:
            rows, columns = _range(row, s_r // n_columns, n_r), _range(column, s_c, n_c)
            return Piece(target, rows, columns, transposed, tensor.dim())
    return None


def memory_order(tensor: Tensor) -> list[int]:
    """A tensor's dimensions, those whose neighbours lie farthest apart first: as they are where it is contiguous."""
    if tensor.is_contiguous():
        return list(range(tensor.dim()))
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _block(tensor: Tensor, target: Target) -> Piece | None:
    """A run of entries of a target of more than two dimensions: whole rows of its matrix, or part of one; perhaps with
    its dimensions exchanged."""
    if not tensor.permute(memory_order(tensor)).is_contiguous():
        return None
    n_columns, count = target.matrix_shape[1], tensor.numel()
    if tuple(tensor.shape) == target.matrix_shape and tensor.is_contiguous():  # flattened to its matrix
        return Piece(target, range(target.matrix_shape[0]), range(n_columns), False, 2)
    row, column = divmod(int(tensor.storage_offset() - target.parameter.storage_offset()), n_columns)
    if column == 0 and count % n_columns == 0:
        return Piece(target, range(row, row + count // n_columns), range(n_columns), False, 1)
    if column + count <= n_columns:
        return Piece(target, range(row, row + 1), range(column, column + count), False, 1)
    return None


@dataclass(frozen=True, eq=False)
class Source:
    """A batch-free tensor computed from ``targets``.

    Attributes:
        strided: which part of a parameter it is, if it is one.
        in_loop: whether constants went into it within the loop: it may come from a state that was taken for one.
    """

    tensor: Tensor
    targets: tuple[Target, ...]
    strided: Piece | None
    in_loop: bool = False

    @property
    def piece(self) -> Piece | None:
        """The part of a parameter that gradients can be handed to directly: none where a hook on the tensor has its say
        on the way back."""
        hooked = self.tensor._backward_hooks and not self.tensor.is_leaf
        return None if hooked else self.strided

    @property
    def name(self) -> str:
        return ", ".join(t.name for t in self.targets)


class _Member(weakref.ref[Tensor]):
    """A tensor of a set, with its identity."""

    __slots__ = ("key",)

    key: int


class TensorSet:
    """Tensors by identity, held weakly: an entry goes with its tensor."""

    def __init__(self) -> None:
        self._refs: dict[int, _Member] = {}
        pop = self._refs.pop
        self._gone: Callable[[Any], object] = lambda member: pop(member.key, None)
        # Looked up on every torch call of the model: a bound method, no indirection.
        self.has_id = self._refs.__contains__

    def add(self, tensor: Tensor) -> None:
        member = _Member(tensor, self._gone)
        member.key = key = id(tensor)
        self._refs[key] = member

    def discard_sharing(self, tensor: Tensor) -> None:
        """Forget ``tensor`` and every tensor that is a view of the same one."""
        base = base_of(tensor)
        for key, ref in list(self._refs.items()):
            held = ref()
            if held is not None and base_of(held) is base:
                del self._refs[key]

    def held(self) -> list[Tensor]:
        """Those that are still alive."""
        return [tensor for ref in list(self._refs.values()) if (tensor := ref()) is not None]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among arguments or results of a torch function, in tuples and lists of any class."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, tuple | list) else []


def base_of(tensor: Tensor) -> Tensor:
    """The tensor whose memory a view shows; a tensor itself where it is no view."""
    return tensor if tensor._base is None else tensor._base


class ModelTensors:
    """The tensors of a model, looked through once for all forward passes.

    Attributes:
        targets: the target parameters as sources, by identity.
        others: its other parameters, and its buffers.
    """

    def __init__(self, model: nn.Module, targets: Iterable[Target]) -> None:
        self.targets = {id(t.parameter): Source(t.parameter, (t,), find_piece(t.parameter, t)) for t in targets}
        self.others = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in self.targets]


class Provenance:
    """What is known of the tensors of one forward pass, by identity.

    Sources are kept alive as long as this is: their graphs are needed in the backward pass.

    Attributes:
        source_of: the source that a tensor is, by its identity; None for others.
        constants: batch-free tensors that no target parameter went into.
        doubtful: made without data and of the batch's size: per-example states most likely, a table perhaps.
    """

    def __init__(self, tensors: ModelTensors) -> None:
        self._sources = dict(tensors.targets)
        self.source_of = self._sources.get
        self.constants, self.doubtful = TensorSet(), TensorSet()
        for tensor in tensors.others:
            self.constants.add(tensor)

    def is_constant(self, value: object) -> bool:
        """Whether a tensor is batch-free without any target parameter having gone into it."""
        return self.constants.has_id(id(value))

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is a target, or a parameter or buffer of the model."""
        return self.source_of(id(tensor)) is not None or self.is_constant(tensor)

    def stand_in(self, before: Tensor, after: Tensor) -> None:
        """Take a tensor for what another one is that no target parameter went into."""
        for known in (self.constants, self.doubtful):
            if known.has_id(id(before)):
                known.add(after)

    def add_derived(self, tensor: Tensor, origins: Iterable[Source], *, in_loop: bool = False) -> None:
        """Register a tensor computed from ``origins`` (and constants) alone."""
        origins = list(origins)
        if not tensor.requires_grad:
            # Detached, integer, or computed without gradients: nothing flows back through it.
            self.constants.add(tensor)
            return
        targets = tuple(dict.fromkeys(t for origin in origins for t in origin.targets))
        piece = find_piece(tensor, targets[0]) if len(targets) == 1 else None
        in_loop = in_loop or any(origin.in_loop for origin in origins)
        self._sources[id(tensor)] = Source(tensor, targets, piece, in_loop)

    def changed_in_place(self, tensor: Tensor, origins: Iterable[Source]) -> None:
        """``tensor`` now depends on ``origins`` too, and so do all tensors that share its memory."""
        origins, base = list(origins), base_of(tensor)
        self.constants.discard_sharing(tensor)
        sharing = [s for s in self._sources.values() if base_of(s.tensor) is base]
        for source in sharing:
            self.add_derived(source.tensor, [source, *origins])
        if not sharing:
            self.add_derived(tensor, origins)


def pull_back(source: Source, grads: Tensor) -> list[tuple[Target, Tensor]]:
    """Per-example gradients of a source taken back to its targets.

    Args:
        source: tensor of shape ``(*s)`` computed from the targets under autograd.
        grads: per-example gradients with respect to it, ``(B, *s)``.

    Returns:
        (target, gradients of shape ``(B, *parameter.shape)``) for each target that the source depends on.
    """
    parameters = [t.parameter for t in source.targets]
    grads = grads.to(source.tensor.dtype)
    found: Sequence[Tensor | None]
    try:
        found = torch.autograd.grad(
            source.tensor, parameters, grads, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError:  # something on the way takes one gradient at a time (sparse ones, say)
        found = _one_by_one(source.tensor, parameters, grads)
    return [(t, g) for t, g in zip(source.targets, found, strict=True) if g is not None]


def _one_by_one(tensor: Tensor, parameters: list[nn.Parameter], grads: Tensor) -> list[Tensor | None]:
    """What :func:`pull_back` does, with one backward pass for each example."""
    each = [torch.autograd.grad(tensor, parameters, g, retain_graph=True, allow_unused=True) for g in grads]
    columns = zip(*each, strict=True)
    return [None if c[0] is None else torch.stack([g.to_dense() for g in c if g is not None]) for c in columns]
