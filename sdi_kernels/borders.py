"""What the operators check before a kernel reads memory: shapes, dtypes, devices, and that tables stay in range.

The functions of :mod:`sdi_kernels.functional` check what a user passes. These are for calls of
``torch.ops.sdi_kernels.*`` themselves, whose kernels would follow any table out of bounds. The values of a table are
looked at once, not on every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sdi_kernels._checks import FLOAT_DTYPES, apart, own_memory, sketch_dtype
from sdi_kernels.calls import EmbeddingCall, LinearCall, LinearStepsCall, MatrixCall, ScaledVectorCall, VectorCall
from sdi_kernels.hashing import BLOCK_BUCKETS, MAX_SHEAR_SIZE, inverse_table

ROUTES = ("direct", "fft", "shear")

_Key = tuple[int, ...]
_known: dict[_Key, tuple[bool, tuple[tuple[weakref.ref[Tensor], int], ...]]] = {}
"""Tables whose values were found right: whether ``h(i) = i``, and the versions of their contents. While the tensor that
was looked at lives, its address belongs to it, under whatever other tensor object it comes."""


def trust(tables: Sequence[Tensor], in_order: bool) -> None:
    """Note tables that need not be looked at: a :class:`CountSketch` made them. ``in_order``: whether ``h(i) = i``."""
    if torch.compiler.is_compiling() or any(type(t) is not Tensor or t.is_inference() for t in tables):
        return
    key = _key(tables)
    if key not in _known:
        weakref.finalize(tables[0], _known.pop, key, None)
    _known[key] = in_order, tuple((weakref.ref(t), t._version) for t in tables)


def _key(tables: Sequence[Tensor]) -> _Key:
    bucket, sign, sources = tables
    return bucket.data_ptr(), sign.data_ptr(), sources.data_ptr(), len(bucket), *sources.shape


def _look_up(tables: Sequence[Tensor]) -> bool | None:
    """Whether known tables are in order; None for tables that are not known, or were written to."""
    if any(t.is_inference() for t in tables):  # their contents have no version
        return None
    in_order, known = _known.get(_key(tables), (False, ()))
    same = bool(known) and all(
        (seen := reference()) is not None and version == seen._version == t._version
        for (reference, version), t in zip(known, tables, strict=True)
    )
    return in_order if same else None


def _side(tables: Sequence[Tensor], d: int, m: int, what: str, device: torch.device) -> bool:
    """Check one side's tables; whether ``h(i) = i``."""
    sources = tables[2]
    shapes = ((d,), (d,), (m, sources.shape[1] if sources.dim() == 2 else 1))
    dtypes = (torch.int32, torch.int8, torch.int32)
    for name, table, shape, dtype in zip(("bucket", "sign", "gather"), tables, shapes, dtypes, strict=True):
        if table.shape != shape or table.dtype != dtype or table.device != device or not table.is_contiguous():
            layout = "" if table.is_contiguous() else ", not contiguous"
            raise ValueError(
                f"tables: the {name} of {what} is {tuple(table.shape)} {table.dtype} on {table.device}{layout}; pass "
                f"those of tables() of a sketch with d={d}, m={m} on {device}: {tuple(shape)} {dtype}"
            )
    if (known := _look_up(tables)) is not None:
        return known
    host = [t.cpu().numpy() for t in tables]
    right = bool((host[0] >= 0).all() and (host[0] < m).all() and (abs(host[1]) == 1).all())
    if right:
        wanted = inverse_table(host[0], host[1], m)
        right = wanted.shape == host[2].shape and bool((wanted == host[2]).all())
    if not right:
        raise ValueError(
            f"tables: those of {what} are no tables of a sketch: buckets must lie in [0, {m}), signs be -1 or +1, and "
            "gather be their inverse; pass what tables() returns, unchanged"
        )
    in_order = bool((host[0] == np.arange(d)).all())
    trust(tables, in_order)
    return in_order


def _tables(tables: Sequence[Tensor], sides: Sequence[tuple[str, int]], m: int, device: torch.device) -> bool:
    """Check all tables; whether those of the last side are in order."""
    if len(tables) != 3 * len(sides):
        raise ValueError(f"tables: got {len(tables)} tensors; pass the {3 * len(sides)} of the sketch's tables()")
    in_order = [_side(tables[3 * k : 3 * k + 3], d, m, what, device) for k, (what, d) in enumerate(sides)]
    return in_order[-1]


def _shaped(name: str, value: Tensor, shape: tuple[int | None, ...], device: torch.device) -> None:
    fits = value.dim() == len(shape) and all(b is None or a == b for a, b in zip(value.shape, shape, strict=True))
    if not fits or value.device != device:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)} on {value.device}; pass a tensor of shape ({wanted}) on {device}"
        )


def _floats(**tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: got dtype {value.dtype}; pass float32, bfloat16, float16 or float64")


def _out(out: Tensor, shape: tuple[int | None, ...], *inputs: Tensor) -> None:
    """``shape``: (rows, m), or (rows, steps, m)."""
    _shaped("out", out, shape, inputs[0].device)
    m = shape[-1]
    if m is None or m < 1:
        raise ValueError(f"m: got {m}; pass the sketch's number of buckets")
    if out.dtype != sketch_dtype(*inputs):
        raise TypeError(f"out: got dtype {out.dtype}; pass {sketch_dtype(*inputs)}")
    own_memory(out)
    apart(out, inputs)


def on_one_device(*arguments: object) -> None:
    """Raise where tensors among the arguments lie on several devices: a tensor without memory takes the call to where
    nothing is computed."""
    device: torch.device | None = None
    for argument in arguments:
        for value in argument if isinstance(argument, list | tuple) else (argument,):
            if isinstance(value, Tensor):
                device = device or value.device
                if value.device != device:
                    raise ValueError(f"out: tensors lie on {device} and on {value.device}; move them together")


def _metric(metric: Tensor | None, d_out: int, d_in: int, out: Tensor) -> None:
    if metric is not None:
        _floats(metric=metric)
        _shaped("metric", metric, (d_out, d_in), out.device)
        apart(out, (metric,))


def linear(call: LinearCall) -> None:
    """Raises ValueError or TypeError where the arguments of ``linear_sketch_`` do not belong together."""
    out, activations, grad_outputs = call.out, call.activations, call.grad_outputs
    _floats(activations=activations, grad_outputs=grad_outputs)
    _shaped("activations", activations, (None, None, None), out.device)
    rows, tokens, d_in = activations.shape
    _shaped("grad_outputs", grad_outputs, (rows, tokens, None), out.device)
    _out(out, (rows, call.m), activations, grad_outputs)
    _route(call, grad_outputs.shape[2], d_in)


def _route(call: LinearCall | LinearStepsCall, d_out: int, d_in: int) -> None:
    """Check the tables and metric of a linear layer, and that its route can take them."""
    m, route, metric, out = call.m, call.route, call.metric, call.out
    in_order = _tables(call.tables, (("outputs", d_out), ("inputs", d_in)), m, out.device)
    _metric(metric, d_out, d_in, out)
    if route not in ROUTES:
        raise ValueError(f"route: got {route!r}; the operator takes {', '.join(map(repr, ROUTES))}")
    if route == "fft" and metric is not None:
        raise ValueError("metric: the fft route cannot apply it; use route='direct'")
    if route == "shear" and (metric is not None or m % BLOCK_BUCKETS or m > MAX_SHEAR_SIZE or not in_order):
        raise ValueError(
            "route: 'shear' takes no metric, inputs hashed in order, and m a multiple of 16 up to 16384; use 'direct'"
        )


def pairs(activations: Sequence[Tensor], grad_outputs: Sequence[Tensor], d_in: int, d_out: int) -> None:
    """Raises ValueError or TypeError where pairs of a list are not ``(n, T, d_in)`` and ``(n, T, d_out)``, all of one
    dtype a side and on one device."""
    if len(activations) != len(grad_outputs) or not activations:
        raise ValueError(
            f"activations, grad_outputs: got lists of {len(activations)} and {len(grad_outputs)}; pass as many of both"
        )
    a0, g0 = activations[0], grad_outputs[0]
    _floats(**{"activations[0]": a0, "grad_outputs[0]": g0})
    device, type_a, type_g = a0.device, a0.dtype, g0.dtype
    right: tuple[torch.Size, torch.Size] | None = None
    for k, (a, g) in enumerate(zip(activations, grad_outputs, strict=True)):
        # A call may have hundreds of pairs: most are like the one before.
        shapes = a.shape, g.shape
        if shapes != right:
            _shaped(f"activations[{k}]", a, (None, None, d_in), a.device)
            _shaped(f"grad_outputs[{k}]", g, (*a.shape[:2], d_out), g.device)
            right = shapes
        if a.dtype != type_a or g.dtype != type_g or a.device != device or g.device != device:
            for name, value, dtype in (("activations", a, type_a), ("grad_outputs", g, type_g)):
                if value.dtype != dtype:
                    raise TypeError(f"{name}[{k}]: got dtype {value.dtype}, {name}[0] has {dtype}; pass all in one")
                if value.device != device:
                    raise ValueError(
                        f"{name}[{k}]: got a tensor on {value.device}, activations[0] is on {device}; pass all on one"
                    )


def slots(steps: Sequence[int], rows: Sequence[int], activations: Sequence[Tensor], size: Sequence[int]) -> None:
    """Raises ValueError where a pair's rows and step do not lie in an ``out`` of ``size`` (rows, steps)."""
    if not len(steps) == len(rows) == len(activations):
        raise ValueError(
            f"steps, rows: got {len(steps)} and {len(rows)} numbers for {len(activations)} pairs; pass one for each"
        )
    count, columns = size
    for k, (step, row, a) in enumerate(zip(steps, rows, activations, strict=True)):
        if not 0 <= step < columns:
            raise ValueError(f"steps[{k}]: got {step}; out has room for steps 0 to {columns - 1}, pass one of them")
        if row < 0 or row + a.shape[0] > count:
            raise ValueError(
                f"rows[{k}]: got {row} for a pair of {a.shape[0]} rows; out has {count} rows, pass where they fit"
            )


def linear_pairs(
    activations: Sequence[Tensor], grad_outputs: Sequence[Tensor], tables: Sequence[Tensor]
) -> tuple[int, int]:
    """:func:`pairs` of a layer with these tables: its outputs and inputs."""
    d_out, d_in = (tables[0].numel(), tables[3].numel()) if len(tables) == 6 else (0, 0)
    pairs(activations, grad_outputs, d_in, d_out)
    return d_out, d_in


def linear_steps(call: LinearStepsCall) -> None:
    """As :func:`linear`, for ``linear_steps_sketch_``."""
    out, activations, grad_outputs = call.out, call.activations, call.grad_outputs
    d_out, d_in = linear_pairs(activations, grad_outputs, call.tables)
    _out(out, (None, None, call.m), activations[0], grad_outputs[0])
    apart(out, (*activations[1:], *grad_outputs[1:]))
    slots(call.steps, call.rows, activations, out.shape[:2])
    _route(call, d_out, d_in)


def matrix(call: MatrixCall) -> None:
    """As :func:`linear`, for ``matrix_sketch_``."""
    out, grads, tables, m, metric = call
    _floats(grads=grads)
    _shaped("grads", grads, (None, None, None), out.device)
    rows, d_out, d_in = grads.shape
    _out(out, (rows, m), grads)
    _tables(tables, (("rows", d_out), ("columns", d_in)), m, out.device)
    _metric(metric, d_out, d_in, out)


def embedding(call: EmbeddingCall) -> None:
    """As :func:`linear`, for ``embedding_sketch_``."""
    out, token_ids, grad_outputs, tables, m = call
    _floats(grad_outputs=grad_outputs)
    _shaped("grad_outputs", grad_outputs, (None, None, None), out.device)
    rows, tokens, d = grad_outputs.shape
    _shaped("token_ids", token_ids, (rows, tokens), out.device)
    if token_ids.dtype != torch.int64:
        raise TypeError(f"token_ids: got dtype {token_ids.dtype}; pass int64")
    _out(out, (rows, m), grad_outputs)
    vocabulary = tables[0].numel() if tables else 0
    _tables(tables, (("the vocabulary", vocabulary), ("inputs", d)), m, out.device)


def vector(call: VectorCall) -> None:
    """As :func:`linear`, for ``vector_sketch_``."""
    out, grads, tables, m = call
    _floats(grads=grads)
    _shaped("grads", grads, (None, None, None), out.device)
    _out(out, (grads.shape[0], m), grads)
    _tables(tables, (("the vector", grads.shape[2]),), m, out.device)


def scaled_vector(call: ScaledVectorCall) -> None:
    """As :func:`linear`, for ``scaled_vector_sketch_``."""
    out, grads, factors, center, scale, tables, m = call
    _floats(grads=grads, factors=factors)
    _shaped("grads", grads, (None, None, None), out.device)
    _shaped("factors", factors, tuple(grads.shape), out.device)
    for name, value in (("center", center), ("scale", scale)):
        if value is not None:
            _floats(**{name: value})
            _shaped(name, value, tuple(grads.shape[:2]), out.device)
    _out(out, (grads.shape[0], m), grads, factors)
    apart(out, [value for value in (center, scale) if value is not None])
    _tables(tables, (("the vector", grads.shape[2]),), m, out.device)
