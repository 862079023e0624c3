"""How feature rows are stored: float32, float16, bfloat16, or int8 with a scale per row.

A *row* is the ``D`` values of one example, or of one example and loop step where features are per step. ``int8`` scales
each by its largest magnitude over 127 and rounds to nearest, so an entry is off by at most half a scale. ``fp16``
scales each by a power of two, which is exact, so that neither large gradients overflow nor small ones underflow.
Measured errors are in docs/store.md.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepinfluence.arguments import one_of
from stepinfluence.errors import StoreError
from stepinfluence.store.dtypes import NUMPY_DTYPES, SCALED, STORE_DTYPES, StoreDtype


def encode(values: Tensor, dtype: StoreDtype) -> tuple[Tensor, Tensor | None]:
    """Codes ``(..., D)`` in the store's dtype and scales ``(...)`` float32 (None for fp32 and bf16) of ``values``.

    Raises:
        ValueError: no such dtype.
        StoreError: values that are not finite, or beyond the largest float32, or all below its smallest normal one.
    """
    one_of("dtype", dtype, STORE_DTYPES)
    given, values = values, values.detach().to("cpu", torch.float32)
    largest = values.abs().amax(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])
    if not bool(torch.isfinite(largest).all()):
        raise StoreError("features: NaN, infinite or beyond float32; leave such examples out as failed ones")
    if given.dtype == torch.float64 and bool((largest < torch.finfo(torch.float32).tiny).all()) and bool(given.any()):
        raise StoreError("features: all are too small for float32; featurize with a loss times a number")
    if dtype == "fp32":
        return values.contiguous(), None
    if dtype == "bf16":
        # The largest float32 round up to infinity: keep them at the largest bfloat16.
        bound = torch.finfo(torch.bfloat16).max
        return values.clamp(-bound, bound).bfloat16().contiguous(), None
    if dtype == "fp16":
        # The largest magnitude comes to lie in [2**14, 2**15).
        _, exponent = torch.frexp(largest)
        scale = torch.ldexp(torch.ones_like(largest), (exponent - 15).clamp(min=-126))
        codes = (values / scale.unsqueeze(-1)).half()
        # The largest float32 round up to 2**15, which would be infinite when it is decoded.
        most = torch.where(exponent < 128, torch.inf, 2.0**15 - 2.0**4).half().unsqueeze(-1)
        return codes.clamp(-most, most).contiguous(), scale
    scale = largest / 127
    # Below the normal numbers a quotient can be rounded down so far that the largest would have no code.
    short = (scale < torch.finfo(torch.float32).tiny) & (scale * 127 < largest)
    scale = torch.where(short, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    # At the largest float32 it can be rounded up so far that 127 of it are infinite.
    scale = torch.where((scale * 127).isinf(), torch.nextafter(scale, torch.zeros_like(scale)), scale)
    inverse = torch.where(scale > 0, scale, torch.inf).unsqueeze(-1)
    return (values / inverse).round_().clamp_(-127, 127).to(torch.int8).contiguous(), scale


def rounding_norm(values: Tensor, dtype: str) -> Tensor:
    """``(...)``: the most that storing rows ``(..., D)`` can have moved each by, in the Euclidean norm.

    Args:
        values: as they are decoded.
    """
    largest: Tensor = values.abs().amax(-1)
    roots = math.sqrt(values.shape[-1])
    if dtype == "int8":  # each entry by half a scale, and what decoding rounds
        return largest * ((0.5 + 2.0**-16) / 127 * roots)
    norms: Tensor = values.norm(dim=-1)
    relative = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    # fp16: entries below a 2**-28th of the largest are rounded by a fixed step.
    smallest = 2.0**-39 * roots if dtype == "fp16" else 0.0
    return norms * (relative * (1 + 2.0**-8)) + largest * smallest


def decode(codes: npt.NDArray[Any], scales: npt.NDArray[np.float32] | None, dtype: StoreDtype) -> Tensor:
    """Values ``(..., D)`` float32 of codes as :meth:`Store.raw_blocks` gives them; float32 codes are not copied."""
    one_of("dtype", dtype, STORE_DTYPES)
    if (scales is None) == (dtype in SCALED) or codes.dtype != np.dtype(NUMPY_DTYPES[dtype]):
        raise ValueError(
            f"codes, scales: got {codes.dtype} {'without' if scales is None else 'with'} scales for {dtype}; pass what "
            "encode or Store.raw_blocks gives"
        )
    tensor = torch.from_numpy(codes)
    if dtype == "fp32":
        return tensor
    if dtype == "bf16":
        tensor = tensor.view(torch.bfloat16)
    values = tensor.float()
    return values if scales is None else values.mul_(torch.from_numpy(scales).unsqueeze(-1))
