"""Cost model of the CUDA kernels: seconds by route, for the planner. Imports no Triton; torch.compile can trace it.

The shipped rates are *estimates*, not measurements: no kernel has been timed yet. Cycles are counted in the compiled
machine code for sm_90 (the compile gate holds the kernels to them), the other rates are from data sheets with a margin.
``python -m bench.gpu.predict`` makes a table of what they say; ``python -m bench.gpu.run`` prints it beside what it
measures, and with ``--calibrate`` measures rates and keeps them for this GPU (:mod:`sdi_kernels.triton.tuning`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch

from sdi_kernels.hashing import BLOCK_BUCKETS
from sdi_kernels.sketches import TensorSketch

CYCLES_PER_SECOND = 132 * 1.755e9
"""Multiprocessors x clock of an H100-class device. Only ratios of costs matter, and those travel to other devices."""


class Cycles(NamedTuple):
    """What keeps a multiprocessor busy, in cycles: to issue instructions, of shared memory (at 128 bytes each, without
    conflicts), of tensor cores. The most of them binds."""

    issue: float
    shared: float
    tensor: float


FFT_CYCLES: dict[int, tuple[Cycles, Cycles]] = {
    256: (Cycles(68, 55, 48), Cycles(113, 140, 132)),
    512: (Cycles(138, 109, 96), Cycles(227, 280, 264)),
    1024: (Cycles(323, 320, 160), Cycles(516, 772, 456)),
    2048: (Cycles(496, 448, 320), Cycles(861, 1040, 864)),
    4096: (Cycles(1182, 1024, 640), Cycles(1908, 2208, 1728)),
    8192: (Cycles(4292, 2752, 1536), Cycles(5600, 5440, 4224)),
}
"""A token of ``fft``, by sketch size: (16-bit inputs, fp32); layers of up to 1024 features, one source to a bucket
(bench/gpu/counted.py has others)."""

SHEAR_CYCLES, SHEAR_TILE = (341, 720), ((64, 128), (64, 64))
"""Cycles of one multiprocessor per token and tile of ``shear``, and the tile's blocks and columns: for one tf32
or 16-bit product, and for three tf32 products."""


def _seconds(cycles: tuple[float, float]) -> tuple[float, float]:
    return cycles[0] / CYCLES_PER_SECOND, cycles[1] / CYCLES_PER_SECOND


@dataclass(frozen=True)
class Rates:
    """Speeds of one device. Pairs are for 16-bit inputs (or one tf32 product) and for fp32 by three tf32 products.

    Attributes:
        fft_seconds: pairs of seconds per token of ``fft``, by sketch size.
        shear_seconds: pair of seconds per token and tile of ``shear``.
        flops: pair of rates of the product of ``direct``, per second.
        atomic_adds: fp32 adds per second into buckets that stay in L2.
        bytes: memory bandwidth, per second.
        launch: seconds of a launch.
    """

    fft_seconds: Mapping[int, tuple[float, float]] = field(
        default_factory=lambda: {m: _seconds((max(half), max(single))) for m, (half, single) in FFT_CYCLES.items()}
    )
    shear_seconds: tuple[float, float] = _seconds(SHEAR_CYCLES)
    flops: tuple[float, float] = (600e12, 80e12)  # two thirds of what is counted (bench/gpu/predict.py)
    atomic_adds: float = 1e12
    bytes: float = 2.5e12
    launch: float = 5e-6

    @classmethod
    def from_json(cls, content: Any) -> Rates:
        """From what ``dataclasses.asdict`` and JSON made of one.

        Raises:
            ValueError, TypeError, KeyError: a rate is missing, unknown, or no positive number.
        """
        if set(content) != {f.name for f in fields(cls)}:
            raise ValueError(f"rates: got {sorted(content)}")
        table = {int(m): _pair(values) for m, values in content["fft_seconds"].items()}
        if set(table) != set(FFT_CYCLES):
            raise ValueError(f"fft_seconds: got sketch sizes {sorted(table)}")
        return cls(
            table,
            _pair(content["shear_seconds"]),
            _pair(content["flops"]),
            *(_positive(content[name]) for name in ("atomic_adds", "bytes", "launch")),
        )


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"got {value!r} for a rate")
    return number


def _pair(values: Any) -> tuple[float, float]:
    half, single = values
    return _positive(half), _positive(single)


SHIPPED = Rates()


def shear_tiles(sketch: TensorSketch, single: int) -> int:
    """Tiles that ``shear`` works through for every token, with float32 if ``single``; several sources of a bucket
    count anew."""
    blocks, columns = SHEAR_TILE[single]
    width = sketch.d_in + BLOCK_BUCKETS - 1
    return -(-sketch.out.blocks // blocks) * -(-width // columns) * -(-sketch.d_out // sketch.m)


def estimate(
    rows: int, tokens: int, sketch: TensorSketch, dtype: torch.dtype, rates: Rates = SHIPPED
) -> dict[str, float]:
    """Seconds of each route for ``rows`` examples of ``tokens`` tokens each; ``shear`` only where it can run."""
    m, size = sketch.m, sketch.d_out * sketch.d_in
    single = int(dtype == torch.float32)  # an index: torch 2.11 cannot compile one that is a bool
    read = rows * tokens * (sketch.d_out + sketch.d_in) * (4 if single else 2) / rates.bytes
    product = 2.0 * rows * tokens * size / rates.flops[single]
    direct = max(read, product) + rows * size / rates.atomic_adds + rates.launch
    if m in rates.fft_seconds:
        fft = max(read, rows * tokens * rates.fft_seconds[m][single]) + 2 * rates.launch
    else:  # the plain-torch route streams about a dozen arrays of (rows, tokens, m) through memory
        fft = read + rows * tokens * 48.0 * m / rates.bytes + 12 * rates.launch
    found = {"direct": direct, "fft": fft}
    if sketch.shearable:
        product = rows * tokens * shear_tiles(sketch, single) * rates.shear_seconds[single]
        adds = rows * sketch.out.blocks * (sketch.d_in + BLOCK_BUCKETS - 1)
        found["shear"] = max(read, product) + adds / rates.atomic_adds + rates.launch
    return found
