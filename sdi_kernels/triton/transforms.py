"""Sizes and constants of the transforms of :mod:`sdi_kernels.triton.fft`. Imports no Triton."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sdi_kernels.triton import common


class FftConfig(NamedTuple):
    """One shipped configuration: m = residues * n1 * n2."""

    residues: int
    n1: int
    n2: int
    tokens: int
    """Tokens transformed together, so that small transforms fill a tensor-core tile."""
    num_warps: int
    prefetch: bool
    """Load the next token while one is transformed, where registers allow it."""


CONFIGS: dict[int, FftConfig] = {
    256: FftConfig(1, 16, 16, 4, 4, True),
    512: FftConfig(1, 16, 32, 1, 4, True),
    1024: FftConfig(1, 16, 64, 1, 8, True),
    2048: FftConfig(1, 32, 64, 1, 8, True),
    4096: FftConfig(2, 32, 64, 1, 8, True),
    8192: FftConfig(4, 32, 64, 1, 8, False),
}
"""Sketch sizes the kernel takes, with the configuration of each (docs/kernels.md has the registers they need)."""

COMPACT_CONFIGS: dict[int, FftConfig] = {
    **{m: config for m, config in CONFIGS.items() if m <= 512},
    1024: FftConfig(2, 16, 32, 1, 4, True),
    2048: FftConfig(4, 16, 32, 1, 4, True),
    4096: FftConfig(8, 16, 32, 1, 4, False),
}
"""For devices with less shared memory per program than :data:`SHARED_BYTES` (sm_86, sm_89: 99 KB)."""

SHARED_BYTES = 140 << 10
"""What the largest of :data:`CONFIGS` needs."""


def _roots(exponents: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """(Re, Im) of exp(-2 pi i e / order), in float64."""
    angle = (exponents % order).double() * (-2.0 * math.pi / order)
    return angle.cos(), angle.sin()


def _to_tf32(values: Tensor) -> Tensor:
    """Finite fp32 ``values``, rounded to the nearest with 10 bits of mantissa."""
    return ((values.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


@functools.lru_cache(maxsize=32)
def constants(config: FftConfig, device: torch.device, precision: str) -> Tensor:
    """DFT matrices (as :func:`_complex_dot` takes them), twiddles and fold weights, packed into one fp32 tensor.

    For one tf32 product the matrices are rounded to nearest: tensor cores would cut their low bits off.
    """
    residues, n1, n2 = config[:3]
    size, m = n1 * n2, residues * n1 * n2
    parts: list[Tensor] = []
    gain = 1.0
    for n in (n1, n2):
        re, im = _roots(torch.outer(torch.arange(n), torch.arange(n)), n)
        matrices = [x.float() for x in (re, -(re + im), im - re)]
        if precision == "tf32":
            matrices = [_to_tf32(x) for x in matrices]
            f0, f1, f2 = (x.double() for x in matrices)
            gain *= float((2 * f0 * re - (f0 + f1) * im + (f0 + f2) * im).sum() / (2 * n * n))
        parts += matrices
    # Few numbers make up a small matrix, so that rounding them makes it larger or smaller as a whole: twiddles undo it.
    parts += [x / gain for x in _roots(torch.outer(torch.arange(n1), torch.arange(n2)), size)]
    for r in range(residues):
        parts += _roots(r * torch.arange(size), m)
    parts += _roots(torch.arange(residues), residues)
    return torch.cat([p.flatten().float() for p in parts]).to(device)


def configs(device: torch.device) -> dict[int, FftConfig]:
    """The sketch sizes the kernel takes on ``device``, with their configurations."""
    return CONFIGS if common.shared_bytes(device) >= SHARED_BYTES else COMPACT_CONFIGS


def finish_precision(precision: str) -> str:
    """Of the inverse transform: once per row, three products cost little, and add no error of their own."""
    return "tf32x3" if precision == "tf32" else precision
