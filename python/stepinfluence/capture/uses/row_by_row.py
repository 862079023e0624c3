"""Uses of parameters in operations that no rule knows: one row at a time, in one call."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stepinfluence.capture.body.sources import Source
from stepinfluence.capture.body.steps import in_backward
from stepinfluence.capture.owners.calls import OUTSIDE, changes_in_place
from stepinfluence.capture.uses.interceptor import Interceptor
from stepinfluence.errors import UnsupportedUseError


def per_row(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any other operation: mapped over micro-batches of one row, with the parameter expanded for each.

    The gradient of the parameter is materialised by row for this one use. The result is compared with the plain
    operation's, so that an operation which mixes rows is refused.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    sources = [s for s in map(it.source, leaves) if s is not None]
    if changes_in_place(func, kwargs):
        return _written(it, func, args, kwargs, sources)
    if func is torch.batch_norm and kwargs.get("training", args[5] if len(args) > 5 else False):
        raise UnsupportedUseError(
            f"{sources[0].name}: batch normalisation by the batch's own statistics mixes its examples; featurize in "
            "eval mode (training=False, with running statistics), or normalise within examples (GroupNorm, LayerNorm)"
        )
    plain = it.without_capture(func, args, kwargs)
    if not isinstance(plain, Tensor):
        raise it.unsupported(sources, func, "it gives several results, and its rule is not known")
    dims, owners = it.owners.row_dims(func, leaves)
    count = next((leaf.shape[d] for leaf, d in zip(leaves, dims, strict=True) if d is not None), None)
    if count is None:
        raise it.unsupported(sources, func, "its data has no dimension for the examples")
    use = it.use(func, owners, *sources)
    mapped: list[Any] = []
    where: list[int] = []
    for k, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
        source = it.source(leaf)
        if source is not None:

            def receive(grad: Tensor, _: tuple[Tensor, ...], source: Source = source) -> None:
                it.sink.dense_rows(source, use, grad)

            mapped.append(it.tap_expanded(source, use, receive, (count, *leaf.shape)))
            where.append(k)
        elif dim is not None:
            mapped.append(leaf.movedim(dim, 0).unsqueeze(dim + 1))
            where.append(k)

    def one(*values: Tensor) -> Any:
        filled = list(leaves)
        for k, value in zip(where, values, strict=True):
            filled[k] = value
        inner_args, inner_kwargs = pytree.tree_unflatten(filled, spec)
        return func(*inner_args, **inner_kwargs)

    try:
        with warnings.catch_warnings():
            # Where torch maps an operation by a loop, it says so as a warning; the result is the same.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            result = torch.func.vmap(one, randomness="error")(*mapped)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        if use.step == OUTSIDE or in_backward():  # left out; a recomputation comes here for those only
            return plain
        raise it.unsupported(sources, func, f"it does not map over examples: {str(error).splitlines()[0]}") from error
    dim = _row_dim(result, plain, next(d for d in dims if d is not None))
    if dim is None:
        raise it.unsupported(sources, func, "its result has no dimension for the examples")
    result = result.movedim(0, dim).squeeze(dim + 1)
    if not torch.allclose(result.detach(), plain.detach(), rtol=1e-3, atol=1e-5):
        raise it.unsupported(sources, func, "it mixes the examples of a batch")
    if owners is not None:
        it.owners.follower.note(result, owners.at(dim, result.shape), tapped=True)
    return result


def _written(
    it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sources: list[Source]
) -> Tensor:
    """An operation that writes to its first argument: what it gives for a copy of that, put in its place."""
    name = func.__name__.removesuffix("_")
    plain = getattr(Tensor, name, None)
    if kwargs.get("out") is not None or it.source(args[0]) is not None:
        raise it.unsupported(sources, func, "it writes to a tensor in place")
    written: Tensor = args[0]
    with it:
        if name in ("copy", "fill"):
            written[...] = args[1] if len(args) > 1 else next(iter(kwargs.values()))
        elif plain is None:
            raise it.unsupported(sources, func, "it writes to a tensor in place")
        else:
            written.copy_(plain(written.clone(), *args[1:], **kwargs))
    return written


def _row_dim(mapped: Any, plain: Any, likely: int) -> int | None:
    """The dimension of an operation's result in which its rows lie that were computed one by one: ``mapped``
    ``(n, *shape with 1 there)``; None if there is none."""
    if not isinstance(plain, Tensor) or not isinstance(mapped, Tensor):
        return None
    one = tuple(mapped.shape[1:])
    dims: list[int] = [likely, *range(len(one))]
    for dim in dims:
        if dim < len(one) and one[dim] == 1 and (*one[:dim], len(mapped), *one[dim + 1 :]) == tuple(plain.shape):
            return dim
    return None
