"""Owners through calls that move elements about: views, joins, repetitions.

Such a function does to the owners what it does to the elements: it is called on them, along the dimensions that it
touches; the others are left out, as their owners do not differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stepinfluence.capture.owners.calls import attributes
from stepinfluence.capture.owners.follow import Follower, Found, Rule, arguments
from stepinfluence.capture.owners.intervals import NOBODY, Owners, reshaped


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


def _along(name: str) -> Rule:
    """Of functions that move elements along the dimension given at the third place, or as ``name``."""

    def rule(f: Follower, func: Any, args: Any, kwargs: Any, result: Any) -> Found:
        x = args[0] if args else kwargs["input"]
        owners = f.owners(x)
        if owners is None:
            return None
        dims = kwargs.get(name, args[2] if len(args) > 2 else None)
        if dims is None or not args:
            return f.not_known(result)
        chosen = {d % x.dim() for d in ((dims,) if isinstance(dims, int) else dims)}
        if not any(owners.varies(d) for d in chosen):
            return Owners(result.shape, owners.lo, owners.hi, owners.along)
        return owners.expanded(chosen).map(result.shape, lambda ends, _: func(ends, *args[1:], **kwargs)).compressed()

    return rule


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
    return (
        one is other
        or (one.lo is other.lo and one.hi is other.hi)
        or (one.along is not None and one.along == other.along)
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
    found = whole.map(
        result.shape, lambda ends, _: ends.repeat(*(n if ends.shape[d] > 1 else 1 for d, n in enumerate(counts)))
    )
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


def functions(*names: str) -> list[Any]:
    """The functions of these names in torch, Tensor and F, with the forms that write in place."""
    owners_of = (torch, Tensor, F, torch._C._nn)
    return [getattr(o, n) for name in names for n in (name, f"{name}_") for o in owners_of if hasattr(o, n)]


_VIEWS = functions(
    "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "unsqueeze", "squeeze", "select",
    "narrow", "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "hsplit", "vsplit", "dsplit", "diagonal",
    "adjoint", "unsafe_chunk", "unsafe_split",
)  # fmt: skip

STRUCTURE: dict[Any, Rule] = {
    **dict.fromkeys(
        functions(
            "contiguous", "clone", "detach", "to", "type", "type_as", "float", "double", "half", "bfloat16", "int",
            "long", "bool", "cpu", "cuda", "requires_grad", "alias", "conj", "resolve_conj", "resolve_neg",
            "pin_memory", "tril", "triu", "positive"
        ),
        same,
    ),
    **dict.fromkeys(attributes("data", "real", "imag"), same),
    **dict.fromkeys([*_VIEWS, Tensor.unfold], view),
    **dict.fromkeys(attributes("T", "mT", "H", "mH"), view),
    **dict.fromkeys(
        functions("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel", "_unsafe_view"), reshape
    ),
    **dict.fromkeys(functions("expand", "expand_as", "broadcast_to"), expand),
    **dict.fromkeys(functions("roll"), _along("dims")),
    **dict.fromkeys(functions("repeat_interleave"), _along("dim")),
    **dict.fromkeys(functions("cat", "concat", "concatenate"), cat),
    **dict.fromkeys(functions("stack"), stack),
    **dict.fromkeys(functions("repeat", "tile"), repeat),
    **dict.fromkeys(functions("flip"), flip),
    torch._C._nn.pad: pad, F.pad: pad,
}  # fmt: skip

MANY = (same, reshape, expand, cat, stack)
"""Rules of functions that may take several tensors, of which they use the shapes."""
