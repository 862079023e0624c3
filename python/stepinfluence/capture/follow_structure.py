"""Owners through calls that move elements about: views, slices, indices, joins, and writes into parts of a tensor.

Such a function does to the owners what it does to the elements: it is called on them, along the dimensions that it
touches; the others are left out, as their owners do not differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepinfluence.capture.follow import Follower, Found, Rule, arguments
from stepinfluence.capture.owners import NOBODY, Owners, reshaped


def same(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``contiguous``, ``to``, ``detach``: each element where it was."""
    return f.owners(args[0] if args else kwargs["input"])


def _narrowed(ends: Tensor) -> Tensor:
    """Once along dimensions in which a tensor repeats itself by its strides."""
    for dim, (size, stride) in enumerate(zip(ends.shape, ends.stride(), strict=True)):
        if stride == 0 and size > 1:
            ends = ends.narrow(dim, 0, 1)
    return ends


def _seen(shape: Sequence[int], lo: Tensor, hi: Tensor, along_size: int | None) -> Owners:
    """Owners from full-size views of their ends; ``along_size`` examples were along one dimension before, if not
    None."""
    shape = tuple(shape)
    low = _narrowed(lo)
    found = Owners(shape, low, low if hi is lo else _narrowed(hi))
    if along_size is not None:
        varying = [k for k in range(len(shape)) if found.varies(k)]
        if len(varying) == 1 and shape[varying[0]] == along_size:
            found.along = varying[0]  # views of this kind keep the order
    return found


def view(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """Functions whose result is a view, or several: called on the owners, which repeat themselves by stride 0."""
    owners = f.owners(args[0] if args else kwargs["input"])
    if owners is None or not args:
        return None if owners is None else f.not_known(result)
    rest = args[1:]

    def make() -> Found:
        lo = func(owners.lo.expand(owners.shape), *rest, **kwargs)
        hi = lo if owners.hi is owners.lo else func(owners.hi.expand(owners.shape), *rest, **kwargs)
        size = None if owners.along is None else owners.shape[owners.along]
        if isinstance(lo, Tensor):
            return _seen(lo.shape, lo, hi, size)
        return [_seen(a.shape, a, b, size) for a, b in zip(lo, hi, strict=True)]

    return f.remembered(func, owners, (rest, kwargs), make)  # type: ignore[no-any-return]


def reshape(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``view``, ``reshape``, ``flatten``, ``unflatten``: by the shapes alone."""
    owners = f.owners(args[0] if args else kwargs["input"])
    if owners is None:
        return None
    if result.shape == owners.shape:
        return owners
    if any(isinstance(a, torch.dtype) for a in args[1:]):
        return f.not_known(result)
    shape = tuple(result.shape)
    return f.remembered("reshape", owners, shape, lambda: reshaped(owners, shape))  # type: ignore[no-any-return]


def expand(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``expand`` and its like: owners are broadcast."""
    owners = f.owners(args[0] if args else kwargs["input"])
    if owners is None:
        return None
    shape = tuple(result.shape)
    return f.remembered("expand", owners, shape, lambda: owners.broadcast(shape))  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------------------------------------------
# Indexing


def _consumed(item: Any) -> int:
    """Dimensions of the indexed tensor that an item of an index takes up."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


def touched_dims(index: Any, dim: int) -> set[int] | None:
    """Which dimensions of a tensor of ``dim`` dimensions an index picks from; None if that cannot be told."""
    items = index if isinstance(index, tuple) else (index,)
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
    items = index if isinstance(index, tuple) else (index,)
    return all(i is None or i is Ellipsis or isinstance(i, int | slice) and not isinstance(i, bool) for i in items)


def getitem(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``x[index]`` of any form; a table that nobody has a part in gives its rows to who looks them up."""
    x, index = args
    owners = f.owners(x)
    if owners is None:
        item = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        part = f.part(item) if isinstance(item, Tensor) and item.dtype != torch.bool else None
        return None if part is None else lookup(part.owners, result)
    if _is_basic(index):
        return view(f, func, args, kwargs, result)
    touched = touched_dims(index, x.dim())
    if touched is None:
        return f.not_known(result)
    return _picked(owners, touched, result, lambda ends: ends[index])


def lookup(ids: Owners, result: Tensor) -> Owners:
    """Rows looked up by ``ids``: with their owners, for all features."""
    extra = result.dim() - len(ids.shape)
    if extra < 0 or tuple(result.shape[: len(ids.shape)]) != ids.shape:
        return ids.reduced(range(len(ids.shape))).broadcast(result.shape) if ids.one_for_all else _unknown(result)
    found = ids.map(result.shape, lambda ends, _: ends.reshape(ends.shape + (1,) * extra))
    found.along = ids.along
    return found


def _unknown(result: Tensor) -> Owners:
    from stepinfluence.capture.owners import UNKNOWN

    return Owners.same(result.shape, UNKNOWN, result.device)


def _picked(owners: Owners, touched: set[int], result: Tensor, pick: Callable[[Tensor], Tensor]) -> Owners:
    if not any(owners.varies(d) for d in touched) and len(touched) == 1 and result.dim() == len(owners.shape):
        found = Owners(result.shape, owners.lo, owners.hi, owners.along)  # all along that dimension are alike
        return found
    return owners.expanded(touched).map(result.shape, lambda ends, _: pick(ends)).compressed()


def _along(position: int, name: str = "dim", default: int | None = None) -> Callable[..., Rule]:
    """Rules for functions that move elements along the dimension given at ``position``, or as ``name``."""

    def with_call(call: Callable[..., Tensor] | None = None) -> Rule:
        def rule(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
            x = args[0] if args else kwargs["input"]
            owners = f.owners(x)
            if owners is None:
                return None
            dims = kwargs.get(name, args[position] if len(args) > position else default)
            if dims is None or not args:
                return f.not_known(result)
            chosen = {d % x.dim() for d in ((dims,) if isinstance(dims, int) else dims)}
            if not any(owners.varies(d) for d in chosen):
                return Owners(result.shape, owners.lo, owners.hi, owners.along)
            apply = func if call is None else call
            return owners.expanded(chosen).map(
                result.shape, lambda ends, _: apply(ends, *args[1:], **kwargs)
            ).compressed()

        return rule

    return with_call


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
# Joining and repeating


def _joined(f: Follower, tensors: Sequence[Tensor], dim: int, result: Tensor) -> Owners | None:
    """Tensors of the same shape but for ``dim`` put side by side."""
    held = [f.owners(t) for t in tensors]
    if all(o is None for o in held):
        return None
    first = held[0]
    if all(o is not None and not o.varies(dim) and _equal(o, first) for o in held):
        assert first is not None
        return Owners(result.shape, first.lo, first.hi, first.along)
    filled = [f.nobody(t) if o is None else o for t, o in zip(tensors, held, strict=True)]
    others = [d for d in range(result.dim()) if d != dim and any(o.varies(d) for o in filled)]
    written = [o.expanded({dim, *others}) for o in filled]
    lo = torch.cat([w.lo for w in written], dim)
    hi = lo if all(w.hi is w.lo for w in written) else torch.cat([w.hi for w in written], dim)
    return Owners(result.shape, lo, hi).compressed()


def _equal(one: Owners | None, other: Owners | None) -> bool:
    if one is None or other is None:
        return False
    return one is other or (one.lo is other.lo and one.hi is other.hi) or (
        one.along is not None and one.along == other.along
    )


def cat(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``cat``, ``concat``."""
    given = arguments(("tensors", "dim"), args, kwargs)
    dim = (kwargs.get("axis", given.dim) or 0) % result.dim()
    tensors = [t for t in given.tensors if t.dim() == result.dim()]  # an empty 1-D tensor joins anything
    return _joined(f, tensors, dim, result)


def stack(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``stack``: a dimension of its own for each."""
    given = arguments(("tensors", "dim"), args, kwargs)
    dim = (given.dim or 0) % result.dim()
    lifted = []
    for tensor in given.tensors:
        one, owners = tensor.detach().unsqueeze(dim), f.owners(tensor)
        if owners is not None:
            f.note(one, reshaped(owners, one.shape), tapped=False)
        lifted.append(one)
    return _joined(f, lifted, dim, result)


def repeat(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``x.repeat(*sizes)`` and ``tile``."""
    owners = f.owners(args[0])
    if owners is None or kwargs:
        return None if owners is None else f.not_known(result)
    sizes = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    sizes = [1] * (result.dim() - len(sizes)) + list(sizes)
    whole = owners.broadcast([1] * (result.dim() - len(owners.shape)) + list(owners.shape))
    counts = [n if whole.varies(d) else 1 for d, n in enumerate(sizes)]
    found = whole.map(result.shape, lambda ends, _: ends.repeat(*(n if ends.shape[d] > 1 else 1 for d, n in enumerate(counts))))
    found.along = whole.along if all(n == 1 for n in counts) else None
    return found


def pad(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``F.pad``: nobody's elements around, or some of its own again."""
    given = arguments(("input", "pad", "mode", "value"), args, kwargs)
    owners = f.owners(given.input)
    if owners is None:
        return None
    dims = {given.input.dim() - 1 - k // 2 for k, n in enumerate(given.pad) if n}
    if not any(owners.varies(d) for d in dims):
        return Owners(result.shape, owners.lo, owners.hi, owners.along)
    if given.mode not in (None, "constant"):
        return f.not_known(result)
    whole = owners.expanded(dims)
    lo = F.pad(whole.lo, given.pad, value=NOBODY[0])
    return Owners(result.shape, lo, F.pad(whole.hi, given.pad, value=NOBODY[1]))


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
    index = tuple(index) if isinstance(index, list) else index
    owners = f.owners(x) or f.nobody(x)
    if f.in_use and f.part(value) is None:
        return owners  # a parameter was written there, for those who have these places
    new = (f.owners(value) if isinstance(value, Tensor) else None) or Owners.same((), NOBODY, x.device)
    touched = touched_dims(index, x.dim())
    return f.not_known(x) if touched is None else _overwritten(owners, touched, new, lambda e, v: e.__setitem__(index, v))


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
    return Owners.same(owners.shape, (-1, 1 << 30), owners.lo.device)


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
    parts = [torch.full_like(index, v) for v in NOBODY] if new is None else [
        e.expand(new.shape)[tuple(slice(n) for n in index.shape)] for e in (new.lo, new.hi)
    ]
    lo = lo.scatter_reduce(at, index, parts[0], "amin")
    hi = hi.scatter_reduce(at, index, parts[1], "amax")
    return Owners(result.shape, lo, lo if torch.equal(lo, hi) else hi).compressed()


def _methods(*names: str) -> list[Any]:
    """The functions of these names in torch, Tensor and F, with the forms that write in place."""
    owners_of = (torch, Tensor, F, torch._C._nn)
    return [getattr(o, n) for name in names for n in (name, f"{name}_") for o in owners_of if hasattr(o, n)]


def _properties(*names: str) -> list[Any]:
    return [getattr(Tensor, name).__get__ for name in names]


_VIEWS = _methods(
    "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "unsqueeze", "squeeze", "select",
    "narrow", "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "hsplit", "vsplit", "dsplit", "diagonal",
    "adjoint", "unfold", "unsafe_chunk", "unsafe_split",
)  # fmt: skip

STRUCTURE: dict[Any, Rule] = {
    **dict.fromkeys(
        _methods(
            "contiguous", "clone", "detach", "to", "type", "type_as", "float", "double", "half", "bfloat16", "int",
            "long", "bool", "cpu", "cuda", "requires_grad", "alias", "conj", "resolve_conj", "resolve_neg",
            "pin_memory", "tril", "triu", "positive"
        ),
        same,
    ),
    **dict.fromkeys(_properties("data", "real", "imag"), same),
    **dict.fromkeys(_VIEWS, view),
    **dict.fromkeys(_properties("T", "mT", "H", "mH"), view),
    **dict.fromkeys(
        _methods("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel", "_unsafe_view"), reshape
    ),
    **dict.fromkeys(_methods("expand", "expand_as", "broadcast_to"), expand),
    Tensor.__getitem__: getitem,
    **dict.fromkeys(_methods("index_select"), index_select),
    **dict.fromkeys(_methods("gather", "take_along_dim"), gather),
    **dict.fromkeys(_methods("masked_select"), masked_select),
    **dict.fromkeys(_methods("roll"), _along(2, "dims")()),
    **dict.fromkeys(_methods("repeat_interleave"), _along(2)()),
    **dict.fromkeys(_methods("cat", "concat", "concatenate"), cat),
    **dict.fromkeys(_methods("stack"), stack),
    **dict.fromkeys(_methods("repeat", "tile"), repeat),
    torch._C._nn.pad: pad, F.pad: pad,
    **dict.fromkeys([Tensor.__setitem__, *_methods("index_put")], setitem),
    **dict.fromkeys(_methods("index_add", "index_copy"), along_rows),
    **dict.fromkeys(_methods("scatter", "scatter_add", "scatter_reduce"), scatter),
}  # fmt: skip


def flip(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
    """``x.flip(*dims)``."""
    owners = f.owners(args[0])
    if owners is None:
        return None
    dims = kwargs.get("dims", args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:])
    chosen = {d % args[0].dim() for d in dims}
    if not any(owners.varies(d) for d in chosen):
        return owners
    return owners.expanded(chosen).map(result.shape, lambda ends, _: ends.flip(*chosen)).compressed()


STRUCTURE.update(dict.fromkeys(_methods("flip"), flip))
