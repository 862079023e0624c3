"""Sizes and constants of the transforms of :mod:`sdi_kernels.triton.fft`. Imports no Triton."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from sdi_kernels.triton import common

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


FINISH = {
    2048 // tokens: FftConfig(1, 64, COLUMNS // tokens, tokens, 8, False) for tokens in (8, 4, 2, 1)
} | {2048 * residues: FftConfig(residues, 64, COLUMNS, 1, 8, False) for residues in (2, 4)}  # fmt: skip
"""Configurations of the launch that inverts, by sketch size: 256 to 8192 are what the kernel takes."""

COMPACT = {m: config._replace(num_warps=4) for m, config in FINISH.items()} | {1024: FftConfig(1, 64, 16, 1, 4, False)}
"""For fp32 inputs; for 16-bit ones on devices with less shared memory per program than :data:`SHARED_BYTES`: those
before sm_90."""

HALF = {
    **{m: config._replace(prefetch=True) for m, config in COMPACT.items() if m <= 2048},
    4096: FftConfig(1, 128, COLUMNS, 1, 8, True),
    8192: FftConfig(2, 128, COLUMNS, 1, 8, False),
}
"""For 16-bit inputs elsewhere."""

MAX_ROW = 4096
"""Features of a token that are brought to shared memory as a row (a power of two) and gathered there."""

SHARED_BYTES = 200 << 10
"""The largest of :data:`HALF` needs 118 KB; without a warpgroup's products there are no registers to prefetch into."""


def config_of(m: int, has_low: bool, device: torch.device) -> FftConfig:
    """The configuration of a sketch size on ``device``. ``has_low``: see :func:`constants`."""
    return (HALF if not has_low and common.shared_bytes(device) >= SHARED_BYTES else COMPACT)[m]


def rows_of(config: FftConfig, d_in: int, d_out: int) -> tuple[int, int]:
    """Lengths of the rows that both sides are gathered from; zeros: from memory, number by number.

    Several tokens side by side and several chunks are not built for rows.
    """
    row_in, row_out = (max(32, 1 << (d - 1).bit_length()) for d in (d_in, d_out))
    built = config.tokens == config.residues == 1 and max(row_in, row_out) <= MAX_ROW
    return (row_in, row_out) if built else (0, 0)


def _roots(exponents: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """(Re, Im) of exp(-2 pi i e / order), in float64."""
    angle = (exponents % order).double() * (-2.0 * math.pi / order)
    return angle.cos(), angle.sin()


def _half(values: Tensor) -> Tensor:
    """Rounded to fp16, as float64."""
    return values.half().double()


@functools.lru_cache(maxsize=32)
def constants(config: FftConfig, device: torch.device, has_low: bool) -> Tensor:
    """What a program multiplies by, packed into one fp32 tensor: for each of both stages the three matrices of
    :func:`sdi_kernels.triton.products.complex_dot` in fp16, and three more with what they lack (``has_low``);
    twiddles; fold weights of every residue; the residues' roots.

    The second stage's matrices are block diagonal, twiddles and weights are there for every token of a block.
    """
    residues, n1, n2, tokens, _, _ = config
    size, m = n1 * n2, residues * n1 * n2
    parts: list[Tensor] = []
    gain = 1.0
    for n, copies in ((n1, 1), (n2, tokens)):
        re, im = _roots(torch.outer(torch.arange(n), torch.arange(n)), n)
        matrices = (re, -(re + im), im - re)
        high = [_half(x) for x in matrices]
        low = [_half(x - y) if has_low else torch.zeros_like(x) for x, y in zip(matrices, high, strict=True)]
        f0, f1, f2 = (x + y for x, y in zip(high, low, strict=True))
        gain *= float((2 * f0 * re - (f0 + f1) * im + (f0 + f2) * im).sum() / (2 * n * n))
        parts += [torch.block_diag(*[x] * copies) for x in (*high, *low)]
    # Few numbers make up a small matrix, so that rounding them makes it larger or smaller as a whole: twiddles undo it.
    for x in _roots(torch.outer(torch.arange(n1), torch.arange(n2)), size):
        parts.append((x / gain).tile(1, tokens))
    for r in range(residues):
        parts += [x.view(n1, n2).tile(1, tokens) for x in _roots(r * torch.arange(size), m)]
    parts += _roots(torch.arange(residues), residues)
    return torch.cat([p.flatten().float() for p in parts]).to(device)
