"""Loading the compiled kernels and calling them through ctypes.

The library (``_sketch*.so``, built by setup.py from ``src/``) is plain C: one build serves every Python version. It
is opened on first use; :func:`library` returns None where it was not built or cannot be loaded.

``SDI_KERNELS_CPU`` in the environment picks the instruction set instead of the best this machine has: ``avx512``,
``avx2``, ``baseline``, or ``none`` for plain torch. It is read once, when the library is opened.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROUTES = {"direct": 0, "fft": 1}
INSTRUCTION_SETS = ("avx512", "avx2", "baseline")
VARIABLE = "SDI_KERNELS_CPU"
NO_MEMORY = 1


class Side(ctypes.Structure):
    """``struct side`` of src/sketch.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("bucket", ctypes.c_void_p),
        ("sign", ctypes.c_void_p),
        ("sources", ctypes.c_void_p),
        ("sources_each", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class Call(ctypes.Structure):
    """``struct call`` of src/sketch.h."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("grads", Side),
        ("acts", Side),
        ("center", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("metric", ctypes.c_void_p),
        ("metric_stride", ctypes.c_int64),
        ("route", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("budget", ctypes.c_int64),
        ("parallel", ctypes.c_void_p),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None.

    Raises:
        ValueError: ``SDI_KERNELS_CPU`` names no instruction set, or one that this machine has not.
    """
    asked = os.environ.get(VARIABLE) or None
    if asked not in (None, "none", *INSTRUCTION_SETS):
        raise ValueError(f"{VARIABLE}: got {asked!r}; use one of {', '.join(INSTRUCTION_SETS)} or none")
    if asked == "none":
        return None
    for path in sorted(Path(__file__).parent.glob("_sketch*.so")):
        try:
            loaded = ctypes.CDLL(str(path))
            loaded.sdi_variant.restype = ctypes.c_char_p
            loaded.sdi_call_bytes.restype = ctypes.c_int64
            if loaded.sdi_call_bytes() != ctypes.sizeof(Call):
                continue
        except (OSError, AttributeError):  # built for another machine, or for another version of this package
            continue
        loaded.sdi_peak_bytes.restype = ctypes.c_int64
        for name in ("sdi_linear_sketch", "sdi_vector_sketch"):
            getattr(loaded, name).argtypes = (ctypes.POINTER(Call),)
        if hasattr(loaded, "sdi_rows_sketch"):
            loaded.sdi_rows_sketch.argtypes = (ctypes.POINTER(Call),)
        loaded.sdi_supports.argtypes = (ctypes.c_int64,)
        loaded.sdi_set_variant.argtypes = (ctypes.c_char_p,)
        if asked is not None and loaded.sdi_set_variant(asked.encode()) != 0:
            raise ValueError(f"{VARIABLE}: got {asked!r}, which this machine has not; unset it for the best it has")
        return loaded
    return None


@functools.cache
def openmp_parallel() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch itself runs on, if it has one.

    A symbol is looked up in a library *and what it was linked with*: so this finds torch's own runtime under whatever
    file name it was shipped, never a second one with a thread pool of its own.
    """
    try:
        symbol = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(symbol, ctypes.c_void_p).value


def instruction_set() -> str | None:
    """The variant of the kernels in use (``"avx512"``, ``"avx2"``, ``"baseline"``), or None without the library."""
    loaded = library()
    return None if loaded is None else str(loaded.sdi_variant().decode())


def set_instruction_set(name: str) -> bool:
    """Go on with another variant of the kernels; False where there is no library, or this machine cannot run it."""
    loaded = library()
    return loaded is not None and bool(loaded.sdi_set_variant(name.encode()) == 0)


def supports_fft(m: int) -> bool:
    """Whether the compiled transform can do sketches of size ``m`` (powers of two, from 16 to 256 on)."""
    loaded = library()
    return loaded is not None and bool(loaded.sdi_supports(m))


def has_rows() -> bool:
    """Whether the library sketches matrices by their rows: one built before that kernel was there does not."""
    return hasattr(library(), "sdi_rows_sketch")


def ids_side(ids: Tensor | None, tables: Sequence[Tensor]) -> Side:
    """Numbers of matrix rows ``(rows, tokens)`` int64 (None: 0, 1, 2, ...), and the tables of that side."""
    bucket, sign, sources = tables
    strides = (0, 0) if ids is None else ids.stride()
    at = None if ids is None else ids.data_ptr()
    return Side(at, *strides, len(bucket), bucket.data_ptr(), sign.data_ptr(), sources.data_ptr(), sources.shape[1], 0)


def side(values: Tensor, tables: Sequence[Tensor]) -> Side:
    """(rows, tokens, features) with dense features, and its tables: bucket, sign, gather."""
    bucket, sign, sources = tables
    return Side(
        values.data_ptr(),
        values.stride(0),
        values.stride(1),
        values.shape[2],
        bucket.data_ptr(),
        sign.data_ptr(),
        sources.data_ptr(),
        sources.shape[1],
        DTYPES[values.dtype],
    )


def call(
    out: Tensor,
    grads: Side,
    acts: Side,
    tokens: int,
    route: str,
    budget: int,
    center: Tensor | None = None,
    scale: Tensor | None = None,
    metric: Tensor | None = None,
) -> Call:
    return Call(
        out.data_ptr(),
        out.stride(0),
        out.shape[0],
        tokens,
        out.shape[1],
        grads,
        acts,
        None if center is None else center.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if metric is None else metric.data_ptr(),
        0 if metric is None else metric.stride(0),
        ROUTES[route],
        torch.get_num_threads(),
        budget,
        openmp_parallel(),
    )


def run(name: str, arguments: Call) -> bool:
    """Run one entry point; False where the call does not fit the kernels' workspace.

    Raises:
        RuntimeError: out of memory.
    """
    loaded = library()
    assert loaded is not None, "callers check library() first"
    status = getattr(loaded, name)(ctypes.byref(arguments))
    if status == NO_MEMORY:
        raise RuntimeError(f"{name}: out of memory for the workspace of a sketch of size {arguments.m}")
    return bool(status == 0)
