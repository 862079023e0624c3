"""Sizes and constants of the transforms of :mod:`sdi_kernels.triton.fft`. Imports no Triton."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

COLUMNS = 32
"""Of a full block. One warpgroup multiplies 64 rows of it at a time."""


class FftConfig(NamedTuple):
    """How the transforms of one sketch size fill blocks [rows, tokens * n2]: m = residues * rows * n2."""

    residues: int
    rows: int
    n2: int
    tokens: int
    """Tokens transformed side by side."""
    num_warps: int
    prefetch: bool
    """Load the next token while one is transformed, where registers allow it."""
    row_bytes: int = 0
    """Of a token's row, as much as is brought to shared memory at a time."""


FINISH = {
    2048 // tokens: FftConfig(1, 64, COLUMNS // tokens, tokens, 8, False) for tokens in (8, 4, 2, 1)
} | {2048 * residues: FftConfig(residues, 64, COLUMNS, 1, 8, False) for residues in (2, 4)}  # fmt: skip
"""Configurations of the launch that inverts, by sketch size: 256 to 8192 are what the kernel takes."""

SKETCH = {m: config._replace(num_warps=4) for m, config in FINISH.items()} | {1024: FftConfig(1, 64, 16, 1, 4, False)}
"""Of the launch before it."""

SHARED_BYTES = 200 << 10
"""Devices with less shared memory per program have no products of a warpgroup: no registers are left there."""


def config_of(m: int, has_low: bool, shared_bytes: int) -> FftConfig:
    """The configuration of a sketch size on a device. ``has_low``: see :func:`constants`."""
    return SKETCH[m]._replace(
        prefetch=not has_low and m in (1024, 2048) and shared_bytes >= SHARED_BYTES,
        row_bytes=1 << (shared_bytes // 3).bit_length() - 1,  # the rest is for constants
    )


def _roots(exponents: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """(Re, Im) of exp(-2 pi i e / order), in float64."""
    angle = (exponents % order).double() * (-2.0 * math.pi / order)
    return angle.cos(), angle.sin()


def _half(values: Tensor) -> Tensor:
    """Rounded to fp16, as float64."""
    return values.half().double()


@functools.lru_cache(maxsize=32)
def constants(config: FftConfig, device: torch.device, has_low: bool) -> Tensor:
    """What a program multiplies by, packed into one fp32 tensor: for each of both stages (of the first one for
    every residue) the matrices of :mod:`sdi_kernels.triton.products` in fp16, and as many with what they lack
    (``has_low``); twiddles and fold weights of every residue; the residues' roots.

    The second stage's matrices are block diagonal, twiddles and weights are there for every token of a block.
    """
    residues, n1, n2, tokens = config[:4]
    size, m = n1 * n2, residues * n1 * n2
    # A residue's weights of n = N2 n1 + n2, W_m^{n r}, are part of what follows: of the first matrix' columns n1, and
    # of the twiddles of column n2.
    parts: list[Tensor] = []
    gains: list[float] = []
    firsts = [torch.outer(torch.arange(n1), torch.arange(n1)) * (m // n1) + r * n2 * torch.arange(n1)
              for r in range(residues)]  # fmt: skip
    second = torch.outer(torch.arange(n2), torch.arange(n2)) * (m // n2)
    for number, exponents in enumerate((*firsts, second)):
        re, im = _roots(exponents, m)
        is_left = number < residues
        matrices = (re, im) if is_left else (re, -(re + im), im - re) if has_low else (re, im, -im)
        high = [_half(x) for x in matrices]
        low = [_half(x - y) if has_low else torch.zeros_like(x) for x, y in zip(matrices, high, strict=True)]
        found = [x + y for x, y in zip(high, low, strict=True)]
        imaginary = found[1] if is_left or not has_low else (found[2] - found[1]) / 2
        gains.append(float((found[0] * re + imaginary * im).sum() / re.numel()))
        parts += [torch.block_diag(*[x] * (1 if is_left else tokens)) for x in (*high, *low)]
    # Few numbers make up a small matrix, so that rounding them makes it larger or smaller as a whole: twiddles undo it.
    for r in range(residues):
        exponents = residues * torch.outer(torch.arange(n1), torch.arange(n2)) + r * torch.arange(n2)
        for x in _roots(exponents, m):
            parts.append((x / (gains[r] * gains[-1])).tile(1, tokens))
    for r in range(residues):
        parts += [x.view(n1, n2).tile(1, tokens) for x in _roots(r * torch.arange(size), m)]
    parts += _roots(torch.arange(residues), residues)
    return torch.cat([p.flatten().float() for p in parts]).to(device)
