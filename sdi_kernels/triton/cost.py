"""Cost model of the CUDA kernels: seconds by route, for the planner. Imports no Triton; torch.compile can trace it.

The rates are *estimates*, not measurements: no kernel has been timed yet. Those of ``fft`` and ``shear`` come from the
compiled machine code (instructions of the token loop x warps / 4 issued per cycle, docs/kernels.md), the others from
data sheets with a margin.
``bench/gpu/run.py`` measures what they should be.
"""

from __future__ import annotations

import torch

from sdi_kernels.hashing import BLOCK_BUCKETS
from sdi_kernels.sketches import TensorSketch

CYCLES_PER_SECOND = 132 * 1.7e9
"""Multiprocessors x clock of an H100-class device. Only ratios of costs matter, and those travel to other devices."""

FFT_CYCLES = {
    256: (102, 222), 512: (273, 602), 1024: (477, 1205), 2048: (1118, 2760), 4096: (3064, 6396), 8192: (8640, 15696),
}  # fmt: skip
"""Issue cycles of one multiprocessor per token, by sketch size: (one tf32 product, three)."""

SINGLE_FLOPS, HALF_FLOPS = 60e12, 400e12
"""Matrix rate in the ``direct`` kernel: fp32 by three tf32 products, 16-bit."""

SHEAR_CYCLES, SHEAR_TILE = (341, 468), ((64, 128), (64, 64))
"""Issue cycles of one multiprocessor per token and tile of ``shear``, and the tile's blocks and columns: for one tf32
or 16-bit product, and for three tf32 products."""

ATOMIC_ADDS = 1e12
"""fp32 adds per second into buckets that stay in L2."""

BYTES = 2.5e12
"""Memory bandwidth."""

LAUNCH = 5e-6


def estimate(rows: int, tokens: int, sketch: TensorSketch, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of each route for ``rows`` examples of ``tokens`` tokens each; ``shear`` only where it can run."""
    m, size = sketch.m, sketch.d_out * sketch.d_in
    single = dtype == torch.float32
    read = rows * tokens * (sketch.d_out + sketch.d_in) * (4 if single else 2) / BYTES
    product = 2.0 * rows * tokens * size / (SINGLE_FLOPS if single else HALF_FLOPS)
    direct = max(read, product) + rows * size / ATOMIC_ADDS + LAUNCH
    if m in FFT_CYCLES:
        fft = max(read, rows * tokens * FFT_CYCLES[m][1 if single else 0] / CYCLES_PER_SECOND) + 2 * LAUNCH
    else:  # the plain-torch route streams about a dozen arrays of (rows, tokens, m) through memory
        fft = read + rows * tokens * 48.0 * m / BYTES + 12 * LAUNCH
    found = {"direct": direct, "fft": fft}
    if sketch.shearable:
        blocks, columns = SHEAR_TILE[single]
        width = sketch.d_in + BLOCK_BUCKETS - 1
        tiles = -(-sketch.out.blocks // blocks) * -(-width // columns) * -(-sketch.d_out // m)
        cycles = rows * tokens * tiles * SHEAR_CYCLES[single]
        adds = rows * sketch.out.blocks * width
        found["shear"] = max(read, cycles / CYCLES_PER_SECOND) + adds / ATOMIC_ADDS + LAUNCH
    return found
