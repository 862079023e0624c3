"""Inner products of stored rows with a few vectors, by the compiled kernel of ``src/scan.c``."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from sdi_kernels.cpu import native

DTYPES = {**native.DTYPES, torch.int8: 3}


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

    Raises:
        TypeError, ValueError: no tensors, or shapes that do not fit.
    """
    for name, value, dims in (("codes", codes, 2), ("vectors", vectors, 2), ("scales", scales, 1)):
        if value is None and name == "scales":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}; pass a torch.Tensor")
        if value.dim() != dims:
            raise ValueError(f"{name}: got shape {tuple(value.shape)}; pass {dims} dimension{'s' * (dims > 1)}")
    if vectors.shape[1] != codes.shape[1] or (scales is not None and len(scales) != len(codes)):
        got = "no scales" if scales is None else f"{len(scales)} scales"
        raise ValueError(
            f"codes, scales, vectors: got {tuple(codes.shape)}, {got} and {tuple(vectors.shape)}; pass rows and "
            "vectors of one width, and a scale for each row"
        )
    entry = _entry()
    on_cpu = codes.device.type == vectors.device.type == "cpu"
    if entry is None or not on_cpu or codes.dtype not in DTYPES or vectors.dtype != torch.float32:
        return None
    if codes.shape[1] > 1 and codes.stride(1) != 1:
        return None
    # Held by name until the call is over: the kernel reads them.
    vectors = vectors.detach().contiguous()
    gain = None if scales is None else scales.to(torch.float32).contiguous()
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
