"""Uses of parameters that come down to others: stacks of matrices, einsum, convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from stepinfluence.capture.body.sources import Source
from stepinfluence.capture.owners import Owners
from stepinfluence.capture.owners.intervals import NOBODY
from stepinfluence.capture.owners.products import names_of
from stepinfluence.capture.uses.interceptor import Interceptor

Window: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[tuple[int, int]], Sequence[int]]
"""Kernel, stride, padding at both ends, and dilation, of each place dimension."""


def batched_product(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Products with a stack of matrices ``(E, k, n)``, as of experts or heads: one product for each matrix."""
    if kwargs or len(args) != 2:
        return NotImplemented
    left, right = (args[1], args[0]) if func.__name__ == "__rmatmul__" else args
    on_left, on_right = it.source(left), it.source(right)
    stack, data = (left, right) if on_left is not None else (right, left)
    if (on_left is None) == (on_right is None) or stack.dim() != 3 or data.dim() < 3 or data.shape[-3] != len(stack):
        return NotImplemented
    with it:
        parts = [
            torch.matmul(m, d) if on_left is not None else torch.matmul(d, m)
            for m, d in zip(stack.unbind(0), data.unbind(-3), strict=True)
        ]
        return torch.stack(parts, -3)


def grouped_product(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``F.grouped_mm(x, P, offs=...)``: the rows of ``x`` ``(S, k)`` up to each offset with a matrix of ``P``
    ``(E, k, n)`` each, as of experts with their tokens side by side."""
    names = ("mat_a", "mat_b", "offs", "bias", "out_dtype")
    given: dict[str, Any] = {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}
    x, stack, offsets = given["mat_a"], given["mat_b"], given["offs"]
    form = (x.dim(), stack.dim())
    if it.source(x) is not None or given["bias"] is not None or form not in ((2, 3), (3, 3)):
        return NotImplemented
    if form == (3, 3):
        with it:
            return _of_dtype(torch.matmul(x, stack), given["out_dtype"])
    ends = offsets.tolist()
    with it:
        parts = x.split([*(b - a for a, b in zip([0, *ends], ends, strict=False)), len(x) - ends[-1]])
        done = [part @ matrix for part, matrix in zip(parts, stack.unbind(0), strict=False)]
        # What lies behind the last offset is in no group; torch leaves it undefined.
        done.append(parts[-1].new_zeros(len(parts[-1]), stack.shape[-1]))
        return _of_dtype(torch.cat(done), given["out_dtype"])


def _of_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def einsum(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``einsum`` of data and one parameter: a linear map, repeated over the letters that both sides keep."""
    equation, *operands = args
    if not isinstance(equation, str) or kwargs:
        return NotImplemented
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    which = [k for k, t in enumerate(operands) if it.source(t) is not None]
    if len(operands) != 2 or len(which) != 1 or equation.count(",") != 1:
        return NotImplemented
    parameter, data = operands[which[0]], operands[1 - which[0]]
    *given, of_result = names = names_of(equation, [t.dim() for t in operands])
    of_parameter, of_data = given[which[0]], given[1 - which[0]]
    inner = [c for c in of_parameter if c in of_data and c not in of_result]
    both = [c for c in of_parameter if c in of_data and c in of_result]
    outer = [c for c in of_parameter if c not in of_data]
    lead = [c for c in of_data if c not in of_parameter]
    plain = set(outer) <= set(of_result) and set(lead) <= set(of_result)
    if (
        not plain
        or any(len(set(n)) < len(n) for n in names)
        or any(parameter.shape[of_parameter.index(c)] == 1 for c in both)
    ):
        return NotImplemented
    as_one = parameter.is_contiguous() and of_parameter in ([*inner, *outer], [*outer, *inner])
    if as_one and not both and lead and inner and outer:
        return _as_matrix(it, parameter, data, (of_parameter[0], of_data, of_result), (lead, inner, outer))
    source = it.source(parameter)
    assert source is not None
    apart = next((c for c in both if not it.owners.alike_along(data, of_data.index(c))), None)
    if apart is not None:  # as of experts with rows of their own: one product for each
        with it:
            rest = [[n for n in part if n != apart] for part in (of_parameter, of_data, of_result)]
            pairs = zip(parameter.unbind(of_parameter.index(apart)), data.unbind(of_data.index(apart)), strict=True)
            return torch.stack([_einsum(rest, *pair) for pair in pairs], of_result.index(apart))
    output = torch.einsum(equation, *(it.detached(t) for t in operands))
    use = it.use(func, it.owners.lead(data, [of_data.index(c) for c in lead]), source)
    order = [of_data.index(c) for c in (*lead, *both, *inner)]
    shown = [of_result.index(c) for c in (*lead, *both, *outer)]
    back = [(*both, *outer, *inner).index(c) for c in of_parameter]

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        x, g = saved[0].conj().permute(order), grad.permute(shown)
        it.sink.products(source, use, x, g, (len(both), len(outer), len(inner)), back)

    return it.tap(output, use, receive, data)


def _as_matrix(
    it: Interceptor,
    parameter: Tensor,
    data: Tensor,
    names: tuple[str, Sequence[str], Sequence[str]],
    groups: tuple[Sequence[str], Sequence[str], Sequence[str]],
) -> Tensor:
    """An einsum that is one linear map: the parameter's first dimensions are its one side, the others are the other."""
    (first, of_data, of_result), (lead, inner, outer) = names, groups
    order = (*lead, *outer)
    with it:
        x = data.permute([of_data.index(c) for c in (*lead, *inner)])
        first_in = first in inner
        split = len(inner if first_in else outer)
        sizes = parameter.shape[split:] if first_in else parameter.shape[:split]
        x, matrix = x.flatten(len(lead)), parameter.flatten(split).flatten(0, split - 1)
        out = x @ matrix if first_in else F.linear(x, matrix)
        result: Tensor = out.unflatten(-1, sizes).permute([order.index(c) for c in of_result])
        return result


def _einsum(names: Sequence[Sequence[str]], *operands: Tensor) -> Tensor:
    """``einsum`` of operands whose dimensions, and then the result's, have names of any length."""
    letter = {name: chr(ord("a") + k) for k, name in enumerate(dict.fromkeys(n for part in names for n in part))}
    *given, out = ("".join(letter[n] for n in part) for part in names)
    return torch.einsum(f"{','.join(given)}->{out}", *operands)


def convolution(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``conv1d`` and its like: run as it is; on the way back a linear map of the patches, for all examples at once."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias, groups = given["input"], given["weight"], given.get("bias"), given.get("groups", 1)
    dims = weight.dim() - 2
    on_weight, on_bias = it.source(weight), it.source(bias)
    if it.source(x) is not None or (bias is not None and on_bias is None and not it.is_constant(bias)):
        return NotImplemented
    if x.dim() == dims + 1:
        return _of_one(it, func, given)
    if x.dim() != dims + 2 or (on_weight is None and not it.is_constant(weight)):
        return NotImplemented
    shape, stride, dilation = weight.shape, _each(given.get("stride", 1), dims), _each(given.get("dilation", 1), dims)
    sides = _sides(given.get("padding", 0), shape[2:], dilation)
    matrix: Source | None = None
    if on_weight is not None and groups == 1:
        with it:
            matrix = it.source(weight.flatten(1))
    output = func(*(it.detached(a) for a in args), **{k: it.detached(v) for k, v in kwargs.items()})
    places = _owners_of_places(it, x, output, (shape[2:], stride, sides, dilation))
    use = it.use(func, places, on_weight, on_bias)

    def receive(grad: Tensor, saved: tuple[Tensor, ...]) -> None:
        grad = grad.movedim(1, -1)  # (N, *places, O)
        if on_bias is not None:
            it.sink.vector(on_bias, use, grad)
        if on_weight is None:
            return
        patches = _patches(saved[0], shape[2:], stride, sides, dilation)  # (N, *places, C, *kernel)
        if matrix is not None:
            it.sink.linear(matrix, use, patches.flatten(1 + dims).conj(), grad)
            return
        patches = patches.unflatten(1 + dims, (groups, -1)).flatten(2 + dims)
        back = range(3)
        it.sink.products(on_weight, use, patches.conj(), grad.unflatten(-1, (groups, -1)), (1, 1, 1), back)

    output = it.tap(output, use, receive, *(() if on_weight is None else (x,)))
    if places is not None:
        found = places.map(output.shape, lambda ends, _: ends.unsqueeze(1))
        found.along = places.along if not places.along else places.along + 1
        it.owners.follower.note(output, found, tapped=True)
    return output


def transposed_convolution(it: Interceptor, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``conv_transpose1d`` and its like, of one example alone; of several, each is mapped by itself."""
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    given = dict(zip(names, args, strict=False)) | kwargs
    one = it.source(given["input"]) is None and given["input"].dim() == given["weight"].dim() - 1
    return _of_one(it, func, given) if one else NotImplemented


def _of_one(it: Interceptor, func: Any, given: dict[str, Any]) -> Any:
    """A convolution of one example without a dimension for it."""
    with it:
        return func(**{**given, "input": given["input"].unsqueeze(0)}).squeeze(0)


def _owners_of_places(it: Interceptor, x: Tensor, output: Tensor, window: Window) -> Owners | None:
    """Owners ``(N, *places)`` of what a convolution of ``x`` gives; None: not known."""
    owners = it.owners.lead(x, [0, *range(2, x.dim())])
    if owners is None:
        return None
    shape = (output.shape[0], *output.shape[2:])
    if not any(owners.varies(d) for d in range(1, len(shape))):
        return Owners(shape, owners.lo, owners.hi, owners.along)
    met = list(range(len(shape), 2 * len(shape)))
    whole = owners.expanded(range(len(shape)))
    lo = _patches(whole.lo.unsqueeze(1), *window, fill=NOBODY[0]).amin(met)
    hi = _patches(whole.hi.unsqueeze(1), *window, fill=NOBODY[1]).amax(met)
    return Owners(shape, lo, hi).compressed()


def _sides(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """How much is padded at both ends of each place dimension."""
    if isinstance(padding, str):
        spans = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(s // 2, s - s // 2) if padding == "same" else (0, 0) for s in spans]
    return [(p, p) for p in _each(padding, len(kernel))]


def _patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    sides: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    fill: float = 0,
) -> Tensor:
    """``(N, C, *places)`` to ``(N, *places, C, *kernel)``: what the kernel meets at each place."""
    x = F.pad(x, [n for side in reversed(sides) for n in side], value=fill) if any(map(any, sides)) else x
    for k, size in enumerate(kernel):
        x = x.unfold(2 + k, dilation[k] * (size - 1) + 1, stride[k])[..., :: dilation[k]]
    return x.movedim(1, 1 + len(kernel))


def _each(value: Any, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values
