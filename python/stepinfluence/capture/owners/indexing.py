"""Owners through indices: what is picked from a tensor, and what is written into parts of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepinfluence.capture.owners.follow import Follower, Found, Rule, arguments
from stepinfluence.capture.owners.intervals import NOBODY, UNKNOWN, Owners
from stepinfluence.capture.owners.structure import functions, view

MOST_ITEMS = 32
"""A list of as many items as this is one index, whatever is in it."""


def items_of(index: Any) -> tuple[Any, ...]:
    """An index's parts, one after the other. To torch, a list is as good as a tuple where some of its items could be no
    numbers of an index: slices, tensors, lists, ``None``, ``...``."""
    if isinstance(index, tuple):
        return index
    if not isinstance(index, list) or len(index) >= MOST_ITEMS:
        return (index,)
    apart = any(i is None or i is Ellipsis or isinstance(i, slice | Tensor | list | tuple) for i in index)
    return tuple(index) if apart else (index,)


def _consumed(item: Any) -> int:
    """Dimensions of the indexed tensor that an item of an index takes up."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


def touched_dims(index: Any, dim: int) -> set[int] | None:
    """Which dimensions of a tensor of ``dim`` dimensions an index picks from; None if that cannot be told."""
    items = items_of(index)
    taken = sum(map(_consumed, items))
    touched: set[int] = set()
    at = 0
    for item in items:
        if item is Ellipsis:
            at += dim - taken
            continue
        if isinstance(item, bool):
            return None
        width = _consumed(item)
        if not (isinstance(item, slice) and item == slice(None)):
            touched |= set(range(at, at + width))
        at += width
    return touched if at <= dim else None


def _is_basic(index: Any) -> bool:
    items = items_of(index)
    return all(i is None or i is Ellipsis or (isinstance(i, int | slice) and not isinstance(i, bool)) for i in items)


def getitem(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``x[index]`` of any form; a table that nobody has a part in gives its rows to who looks them up."""
    x, index = args
    owners = f.owners(x)
    items = items_of(index)
    if owners is None:
        item = items[0] if len(items) == 1 else index
        part = f.part(item) if isinstance(item, Tensor) and item.dtype != torch.bool else None
        return None if part is None else lookup(part.owners, result)
    if _is_basic(index):
        return view(f, func, (x, items), kwargs, result)
    touched = touched_dims(index, x.dim())
    if touched is None:
        return f.not_known(result)
    return _picked(owners, touched, result, lambda ends: ends[items], stay=not any(i is None for i in items))


def lookup(ids: Owners, result: Tensor) -> Owners:
    """Rows looked up by ``ids``: with their owners, for all features."""
    extra = result.dim() - len(ids.shape)
    if extra < 0 or tuple(result.shape[: len(ids.shape)]) != ids.shape:
        if ids.one_for_all:
            return ids.reduced(range(len(ids.shape))).squeezed(range(len(ids.shape))).broadcast(result.shape)
        return Owners.same(result.shape, UNKNOWN, result.device)
    found = ids.map(result.shape, lambda ends, _: ends.reshape(ends.shape + (1,) * extra))
    found.along = ids.along
    return found


def _picked(
    owners: Owners, touched: set[int], result: Tensor, pick: Callable[[Tensor], Tensor], *, stay: bool = True
) -> Owners:
    """``stay``: whether a result of as many dimensions has each where it was."""
    alike = not any(owners.varies(d) for d in touched)
    if alike and len(touched) == 1 and stay and result.dim() == len(owners.shape):
        return Owners(result.shape, owners.lo, owners.hi, owners.along)  # all along that dimension are alike
    return owners.expanded(touched).map(result.shape, lambda ends, _: pick(ends)).compressed()


def index_select(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``x.index_select(dim, index)``."""
    given = arguments(("input", "dim", "index"), args, kwargs)
    owners = f.owners(given.input)
    if owners is None:
        part = f.part(given.index)
        return None if part is None or given.dim != 0 else lookup(part.owners, result)
    return _picked(owners, {given.dim % given.input.dim()}, result, lambda e: e.index_select(given.dim, given.index))


def gather(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``gather`` and ``take_along_dim``."""
    names = ("input", "indices", "dim") if "take" in func.__name__ else ("input", "dim", "index")
    given = arguments(names, args, kwargs)
    index = given.index if "dim" in names[1] else given.indices
    owners = f.owners(given.input)
    if owners is None or given.dim is None:
        part = f.part(index)
        return f.not_known(result) if owners is not None else None if part is None else part.owners
    dim = given.dim % given.input.dim()
    if not owners.varies(dim) and all(
        result.shape[d] == owners.shape[d] or not owners.varies(d) for d in range(result.dim()) if d != dim
    ):
        return Owners(result.shape, owners.lo, owners.hi, owners.along)
    whole = owners.expanded(range(result.dim()))
    return whole.map(result.shape, lambda ends, _: func(ends, *args[1:], **kwargs)).compressed()


def masked_select(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``x.masked_select(mask)``: by element."""
    given = arguments(("input", "mask"), args, kwargs)
    owners = f.owners(given.input)
    if owners is None:
        return None
    shape = torch.broadcast_shapes(given.input.shape, given.mask.shape)
    mask = given.mask.expand(shape)
    return owners.broadcast(shape).map(result.shape, lambda ends, _: ends.expand(shape)[mask]).compressed()


# --------------------------------------------------------------------------------------------------------------------
# Writing into parts


def _writable(owners: Owners, dims: set[int]) -> tuple[Tensor, Tensor]:
    whole = owners.expanded(dims)
    return whole.lo.clone(), whole.hi.clone()


def setitem(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``x[index] = value`` and ``index_put``: what was there before is gone."""
    x, index, value = args[:3]
    if kwargs.get("accumulate", args[3] if len(args) > 3 else False):
        return f.not_known(x)
    index = items_of(index) if func is Tensor.__setitem__ else tuple(index)
    owners = f.owners(x) or f.nobody(x)
    if f.in_use and f.part(value) is None:
        return owners  # a parameter was written there, for those who have these places
    new = (f.owners(value) if isinstance(value, Tensor) else None) or Owners.same((), NOBODY, x.device)
    touched = touched_dims(index, x.dim())
    if touched is None:
        return f.not_known(x)
    return _overwritten(owners, touched, new, lambda ends, value: ends.__setitem__(index, value))


def _overwritten(owners: Owners, touched: set[int], new: Owners, put: Callable[[Tensor, Tensor], Any]) -> Owners:
    every = set(range(len(owners.shape)))
    for dims in (touched, every):
        lo, hi = _writable(owners, dims)
        try:
            put(lo, new.lo)
            put(hi, new.hi)
        except (RuntimeError, IndexError):  # the new values differ along a dimension that is not written out
            continue
        return Owners(owners.shape, lo, lo if torch.equal(lo, hi) else hi).compressed()
    return Owners.same(owners.shape, UNKNOWN, owners.lo.device)


def along_rows(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``index_add`` and ``index_copy``: rows of a source added to, or put over, picked rows."""
    given = arguments(("input", "dim", "index", "source"), args, kwargs)
    dim = given.dim % given.input.dim() if given.input.dim() else 0
    owners = f.owners(given.input) or f.nobody(given.input)
    new = f.owners(given.source) or f.nobody(given.source)
    others = {d for d in range(given.input.dim()) if owners.varies(d) or new.varies(d)} | {dim}
    lo, hi = _writable(owners, others)
    whole = new.expanded(others)
    if "copy" in func.__name__:
        lo, hi = lo.index_copy(dim, given.index, whole.lo), hi.index_copy(dim, given.index, whole.hi)
    else:
        at = given.index.reshape([-1 if d == dim else 1 for d in range(lo.dim())]).long()
        lo = lo.scatter_reduce(dim, at.expand_as(whole.lo), whole.lo, "amin")
        hi = hi.scatter_reduce(dim, at.expand_as(whole.hi), whole.hi, "amax")
    return Owners(result.shape, lo, lo if torch.equal(lo, hi) else hi).compressed()


def scatter(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``scatter``, ``scatter_add``, ``scatter_reduce``: element by element."""
    given = arguments(("input", "dim", "index", "src"), args, kwargs)
    owners = f.owners(given.input) or f.nobody(given.input)
    source = given.src if isinstance(given.src, Tensor) else None
    new = None if source is None else f.owners(source) or f.nobody(source)
    every = set(range(given.input.dim()))
    lo, hi = _writable(owners, every)
    at = given.dim % given.input.dim()
    index = given.index
    parts = (
        [torch.full_like(index, v) for v in NOBODY]
        if new is None
        else [e.expand(new.shape)[tuple(slice(n) for n in index.shape)] for e in (new.lo, new.hi)]
    )
    lo = lo.scatter_reduce(at, index, parts[0], "amin")
    hi = hi.scatter_reduce(at, index, parts[1], "amax")
    return Owners(result.shape, lo, lo if torch.equal(lo, hi) else hi).compressed()


INDEXING: dict[Any, Rule] = {
    Tensor.__getitem__: getitem,
    **dict.fromkeys(functions("index_select"), index_select),
    **dict.fromkeys(functions("gather", "take_along_dim"), gather),
    **dict.fromkeys(functions("masked_select"), masked_select),
    **dict.fromkeys([Tensor.__setitem__, *functions("index_put")], setitem),
    **dict.fromkeys(functions("index_add", "index_copy"), along_rows),
    **dict.fromkeys(functions("scatter", "scatter_add", "scatter_reduce"), scatter),
}  # fmt: skip
