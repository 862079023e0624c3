"""What a call of the compiled kernels will take: the planner's cost model on the CPU.

Each route's time is a sum of counted work times a constant, fitted by ``python -m bench.calibrate_plan --fit``. The
absolute times belong to the machine they were fitted on; what the planner needs is the ratio of the two routes, which
changes far less from one CPU to the next.
"""

from __future__ import annotations

import math

import torch

from sdi_kernels.sketches import CountSketch, TensorSketch

# As in src/sketch.h and src/isa_avx512.c.
DIRECT_ROWS, DIRECT_DEPTH, DIRECT_PANELS = 512, 256, 128 * 1024
TILE_ROWS, TILE_COLUMNS = 12, 32

DIRECT = (8.6e-12, 1.6e-11, 5.0e-10, 2.6e-11, 6.3e-10, 1.4e-10)
FFT = (2.75e-11, 5.4e-10, 2.7e-11, 2.2e-9)
CALL = 16e-6
"""Seconds: per unit of :func:`direct_work`, per unit of :func:`fft_work`, and per call."""


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to


def _scattered(side: CountSketch) -> int:
    return 0 if side.contiguous else side.d


def direct_work(tokens: int, sketch: TensorSketch) -> tuple[float, ...]:
    """Per row: multiply-adds, tile entries added to runs of buckets and to single ones, values packed, values folded
    into m columns first, buckets cleared and summed."""
    height, width = min(sketch.d_out, sketch.m), min(sketch.d_in, sketch.m)
    tall, wide = _padded(height, TILE_ROWS), _padded(width, TILE_COLUMNS)
    depth = min(max(1, tokens), DIRECT_DEPTH, max(16, DIRECT_PANELS // (DIRECT_ROWS + wide)))
    blocks, chunks = -(-tokens // depth), -(-height // DIRECT_ROWS)
    runs = sketch.inp.contiguous or sketch.d_in > sketch.m
    added = float(blocks * tall * wide)
    folded = sum(side.d for side in (sketch.out, sketch.inp) if side.d > sketch.m)
    return (
        float(tokens * tall * wide),
        added if runs else 0.0,
        0.0 if runs else added,
        float(tokens * (tall + chunks * wide)),
        float(tokens * chunks * folded),
        float(blocks * chunks * sketch.m),
    )


def fft_work(tokens: int, sketch: TensorSketch) -> tuple[float, ...]:
    """Per row: m log2 m of the transforms, values scattered one by one, values read, and m of the inverse."""
    m = sketch.m
    return (
        float(tokens * m * math.log2(m)),
        float(tokens * (_scattered(sketch.out) + _scattered(sketch.inp))),
        float(tokens * (sketch.d_out + sketch.d_in)),
        float(m),
    )


def estimate(rows: int, tokens: int, sketch: TensorSketch) -> dict[str, float]:
    """Seconds of each route, with torch's number of threads."""
    share = -(-rows // max(1, min(rows, torch.get_num_threads())))  # rows of the busiest thread
    direct = sum(w * c for w, c in zip(direct_work(tokens, sketch), DIRECT, strict=True))
    fft = sum(w * c for w, c in zip(fft_work(tokens, sketch), FFT, strict=True))
    return {"direct": CALL + share * direct, "fft": CALL + share * fft}
