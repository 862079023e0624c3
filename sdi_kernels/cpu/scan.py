"""Inner products of stored rows with a few vectors, by the compiled kernel of ``src/scan.c``."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from sdi_kernels.cpu import native

DTYPES = {**native.DTYPES, torch.int8: 3}


MANY = 16
"""Vectors from which on int8 codes are multiplied as integers (``MANY`` of src/scan.c)."""

COLUMNS, LARGEST, DIGITS = 4096, (127 << 16) + (127 << 8) + 127, 3
"""Of src/scan_int8.c: columns that share a scale, the largest integer that three digits hold, and how many they are."""

BLOCK_BYTES = 4 << 20
"""Sums that :func:`by_library` holds at a time."""


class Scan(ctypes.Structure):
    """``struct scan`` of src/scan_call.h."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("vectors", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("parallel", ctypes.c_void_p),
    )


@functools.cache
def _entry() -> ctypes._NamedFuncPointer | None:
    loaded = native.library()
    try:
        if loaded is None or int(loaded.sdi_scan_bytes()) != ctypes.sizeof(Scan):
            return None
        entry = loaded.sdi_scan
    except AttributeError:  # built before this kernel was there
        return None
    entry.argtypes = (ctypes.POINTER(Scan),)
    entry.restype = None
    return entry


def row_products(codes: Tensor, scales: Tensor | None, vectors: Tensor) -> Tensor | None:
    """``out[r, c] = scales[r] * sum_i codes[r, i] * vectors[c, i]``, with the codes converted in registers.

    Equal rows have equal products, wherever they lie among the others and whatever the number of threads.

    Args:
        codes: ``(R, D)`` int8, float16, bfloat16 or float32 on the CPU, columns dense.
        scales: ``(R,)``, or None for 1.
        vectors: ``(C, D)`` float32.

    Returns:
        ``(R, C)`` float32; None where the kernel is not there, or these are not its types.
    """
    entry = _entry()
    on_cpu = codes.device.type == vectors.device.type == "cpu"
    if entry is None or not on_cpu or codes.dtype not in DTYPES or vectors.dtype != torch.float32:
        return None
    if codes.shape[1] > 1 and codes.stride(1) != 1:
        return None
    # Held by name until the call is over: the kernel reads them.
    vectors = vectors.detach().contiguous()
    gain = None if scales is None else scales.to(torch.float32).contiguous()
    if codes.dtype == torch.int8 and len(vectors) >= MANY and _has_amx() and bool(vectors.isfinite().all()):
        return by_library(codes, gain, vectors)
    out = vectors.new_empty(len(codes), len(vectors))
    if out.numel():
        call = Scan(
            out.data_ptr(),
            codes.data_ptr(),
            codes.stride(0),
            codes.shape[0],
            codes.shape[1],
            None if gain is None else gain.data_ptr(),
            vectors.data_ptr(),
            len(vectors),
            DTYPES[codes.dtype],
            torch.get_num_threads(),
            native.openmp_parallel(),
        )
        entry(ctypes.byref(call))
    return out


def _has_amx() -> bool:
    """Whether torch finds matrix units, and no narrower instruction set was asked for."""
    found = getattr(torch.cpu, "_is_amx_tile_supported", bool)  # a test of torch's own; not in every version
    return bool(found()) and native.instruction_set() == "avx512"


def by_library(codes: Tensor, scales: Tensor | None, vectors: Tensor) -> Tensor:
    """What src/scan_int8.c computes, by torch's product of int8 matrices, for which oneDNN takes matrix
    units (AMX).

    Every vector is one scale for ``COLUMNS`` columns times integers of three digits, as exact as float32; sums of
    codes and digits are exact.

    Args:
        codes: ``(R, D)`` int8.
        scales: ``(R,)`` float32, or None for 1.
        vectors: ``(C, D)`` float32, finite.

    Returns:
        ``(R, C)`` float32.
    """
    count = len(vectors)
    total = torch.zeros(len(codes), count, dtype=torch.float64)
    for first in range(0, codes.shape[1], COLUMNS):
        part = vectors[:, first : first + COLUMNS].double()
        scale = part.abs().amax(1) / LARGEST
        whole = (part / scale.clamp(min=torch.finfo(torch.float64).tiny)[:, None]).round().to(torch.int32)
        digits = []
        for _ in range(DIGITS):  # the lowest first; a digit may be -128: the one above it is one more
            digits.append(whole.to(torch.int8))
            whole = (whole - digits[-1]) >> 8
        factors = torch.cat(digits).T
        some = max(32, BLOCK_BYTES // (4 * DIGITS * count))
        for row in range(0, len(codes), some):
            sums = torch._int_mm(codes[row : row + some, first : first + COLUMNS], factors).double()
            low, middle, high = sums.view(-1, DIGITS, count).unbind(1)
            total[row : row + some] += (high * 65536 + middle * 256 + low) * scale
    return (total if scales is None else total * scales[:, None]).float()
