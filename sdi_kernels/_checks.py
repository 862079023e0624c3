"""Argument checks shared by the public functions: one clear line that names the argument and the fix."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def positive_int(name: str, value: object, *, maximum: int | None = None) -> int:
    """``value`` as an int, or a ``TypeError``/``ValueError`` that names the argument."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # a wrong type is the case handled here
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}; pass a positive integer")
    if number <= 0:
        raise ValueError(f"{name}: got {number}; pass a positive integer")
    if maximum is not None and number > maximum:
        raise ValueError(f"{name}: got {number}; the largest supported value is {maximum}")
    return number


def integer(name: str, value: object) -> int:
    """``value`` as an int of any sign; a float is refused: truncated, it would stand for another number."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # a wrong type is the case handled here
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}; pass an integer")
    return number


def one_of(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}; use one of {', '.join(map(repr, choices))}")


def instance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: got {type(value).__name__}; pass a {kind.__name__}")


def float_tensor(name: str, value: object, *, min_dim: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; pass a torch.Tensor")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got dtype {value.dtype}; pass float32, bfloat16, float16 or float64")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {value.layout}; pass a dense one (to_dense())")
    if value.dim() < min_dim:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; pass at least {min_dim} dimensions")
    return value


def last_dim(name: str, value: Tensor, size: int, what: str) -> None:
    if value.shape[-1] != size:
        raise ValueError(
            f"{name}: last dimension is {value.shape[-1]}, but the sketch was made for {what}={size}; "
            f"pass shape (..., {size}) or make the sketch for this layer"
        )


def ids_in_range(name: str, ids: Tensor, size: int) -> None:
    """Indexing would count a negative id from the end. Host tensors only: a GPU would have to be awaited."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= size:
        raise IndexError(f"{name}: got values in [{low}, {high}]; pass ids in [0, {size}), the d_out")


def same_device(**tensors: Tensor) -> None:
    devices = {name: t.device for name, t in tensors.items()}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{next(iter(tensors))}: tensors lie on different devices ({got}); move them together")


def output_buffer(
    out: object, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, name: str = "out"
) -> Tensor:
    """Check the buffer that a sketch is accumulated into."""
    if not isinstance(out, Tensor):
        raise TypeError(f"{name}: got {type(out).__name__}; pass a torch.Tensor of shape {shape}")
    if tuple(out.shape) != shape or out.dtype != dtype or out.device != device:
        raise ValueError(
            f"{name}: got shape {tuple(out.shape)} {out.dtype} on {out.device}; "
            f"pass a buffer of shape {shape} {dtype} on {device}"
        )
    if out.requires_grad:
        raise ValueError(f"{name}: got a tensor that requires grad; detach it (sketches add up in place)")
    own_memory(out, name)
    return out


def own_memory(out: Tensor, name: str = "out") -> None:
    """Raise where entries of a tensor that is written to share memory: strides must reach beyond smaller ones."""
    if out.numel() == 0:
        return
    reach = 1
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(f"{name}: its entries share memory (expanded or as_strided); pass a buffer of its own")
        reach += (size - 1) * stride


def apart(out: Tensor, inputs: Sequence[Tensor]) -> None:
    """Raise where an input lies within ``out``, which would change it while it is read."""
    storage = out.untyped_storage().data_ptr()
    for value in inputs:
        if value.untyped_storage().data_ptr() == storage and out.numel() and value.numel():
            start, stop = _bytes(out)
            first, last = _bytes(value)
            if first < stop and start < last:
                raise ValueError("out: shares memory with an input; pass a buffer of its own")


def _bytes(value: Tensor) -> tuple[int, int]:
    """Addresses from the first byte of a tensor that has entries to the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()


def sketch_dtype(*inputs: Tensor) -> torch.dtype:
    """Sketches accumulate and come out in float32, or in float64 where an input is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32


def entry_metric(metric: object, d_out: int, d_in: int, route: str, **like: Tensor) -> Tensor:
    """The checked ``metric`` of one number per weight, detached; ``like``: a tensor on its device, by its name."""
    value = float_tensor("metric", metric, min_dim=2)
    if value.shape != (d_out, d_in):
        raise ValueError(f"metric: got shape {tuple(value.shape)}; pass one number per weight, shape {(d_out, d_in)}")
    if route in ("fft", "shear"):
        raise ValueError(f"route: got {route!r} with metric; the {route} route cannot apply it, use 'auto' or 'direct'")
    same_device(metric=value, **like)
    return value.detach()
