"""Times and ceilings of a CUDA device: medians over CUDA events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

ROUNDS = 15


def median_ms(call: Callable[[int], object], budget_s: float = 0.25) -> float:
    """Median over rounds of one call, by CUDA events; ``call`` gets the round's number to rotate its inputs by."""
    for i in range(2):
        call(i)
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(2)
    torch.cuda.synchronize()
    rounds = max(3, min(ROUNDS, int(budget_s / max(1e-6, time.perf_counter() - start))))
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for i, (begin, end) in enumerate(pairs):
        begin.record()
        call(i)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def ceilings() -> dict[str, float]:
    """Measured on this device: GB/s of a copy (read + write), TFLOP/s of a large square product."""
    found = {}
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda").fill_(1.0)
    target = torch.empty_like(source)
    found["copy_gb_s"] = 2 * source.numel() * 4 / (1e6 * median_ms(lambda _: target.copy_(source)))
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "high"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        x = torch.randn(8192, 8192, device="cuda").to(dtype)
        y = torch.randn(8192, 8192, device="cuda").to(dtype)
        found[f"{name}_tflop_s"] = 2 * 8192**3 / (1e9 * median_ms(lambda _, x=x, y=y: x @ y))
    torch.set_float32_matmul_precision(before)
    return found
