"""What the launchers share: dtype and precision rules, launch sizes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Input dtypes of the kernels; float64 goes to the torch routes."""

FALLBACK_PROCESSORS = 132
"""Multiprocessors assumed where there is no CUDA device to ask (interpreter runs)."""

FALLBACK_SHARED = 227 << 10
"""Shared memory per program assumed there, in bytes."""


def supported(*inputs: Tensor) -> bool:
    """Whether the kernels take these dtypes."""
    return all(t.dtype in KERNEL_DTYPES for t in inputs)


def dot_precision(*inputs: Tensor) -> str:
    """``input_precision`` of the fp32 tensor-core products.

    fp32 inputs follow ``torch.get_float32_matmul_precision()``: "highest" (torch's default) asks for three tf32
    products, which keeps about fp32 accuracy; otherwise one. 16-bit inputs are exact in tf32, and their own rounding
    is coarser than tf32's, so one product serves. AMD's matrix units take fp32 as it is.
    """
    return precision_of(*(t.dtype for t in inputs))


def precision_of(*dtypes: torch.dtype) -> str:
    """:func:`dot_precision` of inputs of these dtypes."""
    if torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if torch.float32 in dtypes and torch.get_float32_matmul_precision() == "highest" else "tf32"


def exact_products(*dtypes: torch.dtype) -> bool:
    """Whether ``fft`` keeps about fp32 accuracy for inputs of these dtypes, by the rule of :func:`dot_precision`."""
    return torch.float32 in dtypes and (
        torch.version.hip is not None or torch.get_float32_matmul_precision() == "highest"
    )


@functools.cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def _device_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def processors(device: torch.device) -> int:
    """Number of multiprocessors of ``device``."""
    if device.type != "cuda":
        return FALLBACK_PROCESSORS
    return int(_properties(_device_index(device)).multi_processor_count)


def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program can use on ``device``."""
    if device.type != "cuda":
        return FALLBACK_SHARED
    properties = _properties(_device_index(device))
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def token_splits(programs: int, tokens: int, smallest: int, device: torch.device) -> int:
    """Into how many parts to split each row's tokens so that ``programs`` x parts fill the device.

    A part keeps at least ``smallest`` tokens, so that what it costs to finish a part stays small beside it.
    """
    wanted = 2 * processors(device) // max(1, programs)
    return max(1, min(wanted, tokens // max(1, smallest)))


def parts(
    programs: int, length: int, block: int, smallest: int, device: torch.device, *, whole: bool = False
) -> tuple[int, int]:
    """How ``length`` tokens (or lines) are dealt out to programs in blocks: (parts, length of a part).

    ``smallest``: blocks that a part keeps at least. ``whole``: one part, so that nothing is added by atomics.
    """
    wanted = 1 if whole else token_splits(programs, length, smallest * block, device)
    each = cdiv(cdiv(length, wanted), block) * block
    return cdiv(length, each), each


def wide(x: Tensor) -> bool:
    """Whether offsets along the last dimension need 64 bits."""
    return (x.shape[-1] - 1) * abs(x.stride(-1)) >= 2**31
