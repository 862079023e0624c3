"""Owners through products: linear maps, einsum, attention, recurrent layers, lookups."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepinfluence.capture.owners.arithmetic import everything, functions_named, operands, reduced
from stepinfluence.capture.owners.calls import GROUPED
from stepinfluence.capture.owners.follow import Follower, Found, Part, Rule, arguments
from stepinfluence.capture.owners.indexing import lookup
from stepinfluence.capture.owners.intervals import Owners


def linear(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``F.linear(x, W, b)``."""
    given = arguments(("input", "weight", "bias"), args, kwargs)
    owners, part = f.owners(given.input), reduced(f.part(given.input), [-1])
    if part is not None and owners is not None:
        # The same object each time it is asked for, so that what is made from it is remembered, too.
        small = part.owners
        part = Part(f.remembered("last of", owners, (), lambda: small), part.strong)
    parts = [part, f.part(given.bias) if given.bias is not None else None]
    weight = reduced(f.part(given.weight), [-1])
    if weight is not None:
        parts.append(Part(weight.owners.squeezed([-1]), weight.strong))
    return f.combine(parts, result.shape)


def matmul(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``x @ y`` in all its forms: the last dimension of one meets the one before the last of the other."""
    left, (right, *_) = operands(args, kwargs)
    left, right = (right, left) if func.__name__ == "__rmatmul__" else (left, right)
    return _product(f, left, right, result)


def _product(f: Follower, left: Tensor, right: Tensor, result: Tensor, *more: Part | None) -> Owners | None:
    a, b = f.part(left), f.part(right)
    parts = list(more)
    if a is not None:
        owners = a.owners
        small = f.remembered("left", owners, right.dim(), lambda: _contracted(owners, -1, right.dim() > 1))
        parts.append(Part(small, a.strong))
    if b is not None:
        their = b.owners
        at = -2 if right.dim() > 1 else -1
        small = f.remembered("right", their, left.dim(), lambda: _contracted(their, at, left.dim() > 1))
        parts.append(Part(small, b.strong))
    return f.combine(parts, result.shape)


def _contracted(owners: Owners, dim: int, stays: bool) -> Owners:
    """Summed over a dimension, which stays with size 1 where the other operand puts one of its own there."""
    reduced = owners.reduced([dim])
    if stays:
        return reduced
    return reduced.squeezed([dim])


def added_product(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``addmm``, ``baddbmm``, ``addmv``, ``addbmm``: an addend and a product."""
    addend, factors = operands(args, kwargs)
    if func.__name__.strip("_") == "addbmm" or len(factors) != 2:
        return everything(f, func, args, kwargs, result)
    return _product(f, factors[0], factors[1], result, f.part(addend))


def grouped_product(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``F.grouped_mm``: the rows of one operand with a matrix each, or stacks of matrices."""
    given = arguments(("mat_a", "mat_b", "offs"), args, kwargs)
    if given.mat_a.dim() == 3 and given.mat_b.dim() == 3:
        return _product(f, given.mat_a, given.mat_b, result)
    if given.mat_a.dim() != 2 or given.mat_b.dim() != 3 or f.part(given.mat_b) is not None:
        return everything(f, func, args, kwargs, result)
    return f.combine([reduced(f.part(given.mat_a), [-1])], result.shape)


def einsum(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """By the letters: those that are not in the result are summed over."""
    equation, operands = args[0], args[1:]
    if not isinstance(equation, str):
        return everything(f, func, args[1:] if isinstance(equation, str) else args, kwargs, result)
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    *named, wanted = names_of(equation, [t.dim() for t in operands])
    parts: list[Part | None] = []
    for names, tensor in zip(named, operands, strict=True):
        part = f.part(tensor)
        if part is None:
            continue
        if len(set(names)) < len(names):
            return f.not_known(result)
        owners = part.owners
        key = (tuple(names), tuple(wanted))
        aligned = f.remembered("einsum", owners, key, functools.partial(_aligned, owners, names, wanted))
        parts.append(Part(aligned, part.strong))
    return f.combine(parts, result.shape)


def names_of(equation: str, dims: Sequence[int]) -> list[list[str]]:
    """Names of the dimensions of an einsum's operands, then of its result; those of an ellipsis are counted from its
    right end."""
    left, arrow, out = equation.replace(" ", "").partition("->")
    if not arrow:
        single = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        out = ("..." if "..." in left else "") + "".join(single)
    given = left.split(",")
    dotted = [dim - len(letters.replace("...", "")) for letters, dim in zip(given, dims, strict=True)]
    found = []
    for letters, count in zip([*given, out], [*dotted, max(dotted)], strict=True):
        head, dots, tail = letters.partition("...")
        found.append([*head, *(f".{k}" for k in range(count, 0, -1)), *tail] if dots else list(head))
    return found


def _aligned(owners: Owners, names: Sequence[str], wanted: Sequence[str]) -> Owners:
    """Owners of an operand with its dimensions in the order of the result's, size 1 where it lacks them."""
    small = owners.reduced([k for k, n in enumerate(names) if n not in wanted])
    small = small.squeezed([k for k, n in enumerate(names) if n not in wanted])
    left = [n for n in names if n in wanted]
    order = [left.index(n) for n in wanted if n in left]
    shape = [small.shape[left.index(n)] if n in left else 1 for n in wanted]

    def arrange(ends: Tensor, _: bool) -> Tensor:
        moved = ends.permute(order)
        sizes = iter(moved.shape)
        return moved.reshape([next(sizes) if n in left else 1 for n in wanted])

    result = small.map(shape, arrange)
    if small.along is not None:
        result.along = list(wanted).index(left[small.along])
    return result


def attention(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """Scaled dot products: each query with all keys and values of its head."""
    given = arguments(("query", "key", "value", "attn_mask"), args, kwargs)
    heads = given.query.dim() > 2 and given.key.dim() > 2 and given.query.shape[-3] == given.key.shape[-3]
    parts = [reduced(f.part(given.query), [-1])]
    for tensor in (given.key, given.value):
        part = reduced(f.part(tensor), [-1, -2] if heads or tensor.dim() < 3 else [-1, -2, -3])
        parts.append(part)
    if given.attn_mask is not None:
        parts.append(reduced(f.part(given.attn_mask), [-1]))
    return f.combine(parts, result.shape)


def lookup_rows(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``torch.embedding(W, ids)``: rows have the owners of their ids, where the table has none itself."""
    given = arguments(("weight", "indices"), args, kwargs)
    if f.part(given.weight) is not None:
        return everything(f, func, args, kwargs, result)
    part = f.part(given.indices)
    return None if part is None else lookup(part.owners, result)


def recurrent(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``torch.gru`` and its like: within an example all times and features meet."""
    batch_first = bool(args[-1]) and len(args) == 9
    x = args[0]
    axis = 0 if batch_first else 1
    owners = f.owners(x)
    if owners is None or x.dim() != 3 or len(args) != 9:
        return everything(f, func, args, kwargs, result)
    kept = owners.reduced([d for d in range(3) if d != axis])
    hidden = args[1] if isinstance(args[1], list | tuple) else [args[1]]
    flat = Part(kept.squeezed([d for d in range(3) if d != axis]), True)
    parts = [flat]
    for h in hidden:
        part = reduced(f.part(h), [0, 2])
        if part is not None:
            parts.append(Part(part.owners.squeezed([0, 2]), part.strong))
    joined = f.combine(parts, (x.shape[axis],))
    assert joined is not None
    found = []
    for k, r in enumerate(result):
        at = axis if k == 0 else 1
        found.append(_aligned(joined, ["b"], ["b" if d == at else f"_{d}" for d in range(r.dim())]).broadcast(r.shape))
    return found


PRODUCTS: dict[Any, Rule] = {
    F.linear: linear,
    **dict.fromkeys(functions_named("matmul", "bmm", "mm", "mv", "dot", "vdot"), matmul),
    **dict.fromkeys(functions_named("addmm", "baddbmm", "addmv", "addbmm"), added_product),
    torch.einsum: einsum,
    **dict.fromkeys(GROUPED, grouped_product),
    F.scaled_dot_product_attention: attention,
    torch.embedding: lookup_rows,
    **dict.fromkeys([torch.gru, torch.lstm, torch.rnn_tanh, torch.rnn_relu], recurrent),
}  # fmt: skip
