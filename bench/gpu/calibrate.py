"""Measure what the planner and the launchers should use on this GPU: ``python -m bench.gpu.run --calibrate``.

Two things are measured and written to the tuning file (:mod:`sdi_kernels.triton.tuning`): the fastest of the tiles that
a kernel may take, on one layer of a usual size, and the rates of the cost model. The timers are passed in, so that the
arithmetic is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from sdi_kernels import HashFamily, TensorSketch
from sdi_kernels.triton import configs, cost, tuning

FEW_TOKENS, MANY_TOKENS = 64, 2048
SIDE, SIZE = 1024, 2048
"""Layer and sketch size that rates are taken at."""

MOST_ATOMIC_ADDS = 1e15
"""Written where the epilogue of ``direct`` cannot be told from noise."""

MARGIN = 0.03
"""A tile replaces the shipped one if it is faster by more than this share: less is noise."""

T = TypeVar("T")


class Workload(NamedTuple):
    """One call of a kernel. ``route`` is fft, direct, shear or pairwise."""

    route: str
    rows: int
    tokens: int
    d_out: int
    d_in: int
    m: int
    dtype: torch.dtype
    precision: str = "highest"
    """``torch.get_float32_matmul_precision()`` during the call."""

    @property
    def hashing(self) -> HashFamily:
        return "block" if self.route == "shear" else "balanced"

    def sketch(self) -> TensorSketch:
        return TensorSketch(self.d_out, self.d_in, self.m, hashing=self.hashing, name="calibration")


def workload_of(key: str) -> Workload:
    """The call that a tile of :data:`configs.CANDIDATES` is chosen by."""
    kernel, kind = key.split()[0], key.split()[-1]
    dtype, precision = (torch.bfloat16 if kind == "half" else torch.float32), "high" if kind == "tf32" else "highest"
    side = 64 if "small" in key else 768
    if kernel == "pairwise":
        return Workload("pairwise", 256, 128, side, side, SIZE, dtype, precision)
    return Workload(kernel, 256, 128, side, side, SIZE, dtype, precision)


def fastest(candidates: Sequence[T], seconds: Callable[[T], float]) -> tuple[T, dict[T, float | str]]:
    """The candidate to use, and what each took (or why it did not run).

    The first is the shipped one: another replaces it only where it is faster by :data:`MARGIN`.

    Raises:
        RuntimeError: the shipped one does not run: then the timing is at fault, not a tile.
    """
    found: dict[T, float | str] = {}
    for candidate in candidates:
        try:
            found[candidate] = seconds(candidate)
        except Exception as problem:  # a tile too large for this GPU is no reason to stop
            found[candidate] = f"{type(problem).__name__}: {str(problem)[:200]}"
    shipped = found[candidates[0]]
    if not isinstance(shipped, float):
        raise RuntimeError(f"the shipped tile {candidates[0]} did not run: {shipped}")
    ran = {c: s for c, s in found.items() if isinstance(s, float)}
    best = min(ran, key=ran.__getitem__)
    return (best if ran[best] < (1 - MARGIN) * shipped else candidates[0]), found


def tune(
    seconds: Callable[[Workload, str, configs.Config], float], say: Callable[[str], None]
) -> dict[str, configs.Config]:
    """The tiles that beat the shipped ones; ``seconds`` times a workload with one tile in force."""
    found: dict[str, configs.Config] = {}
    for key, candidates in configs.CANDIDATES.items():
        work = workload_of(key)
        best, took = fastest(candidates, lambda config, key=key, work=work: seconds(work, key, config))  # type: ignore[misc]
        for config, result in took.items():
            text = f"{1e3 * result:.3f} ms" if isinstance(result, float) else result
            say(f"{key} {tuple(config)}: {text}{' <- taken' if config == best else ''}")
        if best != candidates[0]:
            found[key] = best
    return found


def fit(seconds: Callable[[Workload], float], copy_bytes_per_second: float) -> cost.Rates:
    """The rates of the cost model, each the slope between two lengths of calls in which it dominates: a launch overlaps
    with the device's work, so taking one off a call's time would make a rate too good.

    Raises:
        RuntimeError: the times contradict each other (more tokens took less): the machine was not quiet.
    """
    launch = seconds(Workload("direct", 1, 1, 16, 16, SIZE, torch.bfloat16))
    dtypes = torch.bfloat16, torch.float32

    def per_token(work: Workload, more: int) -> float:
        """Seconds a token of a row, from two lengths: what does not grow with them falls out."""
        slope = (seconds(work._replace(tokens=more)) - seconds(work)) / (more - work.tokens)
        if slope <= 0:
            raise RuntimeError(
                f"calibration: {more} tokens took no longer than {work.tokens} ({work.route}, {work.dtype}); "
                "run it on a quiet GPU"
            )
        return slope / work.rows

    def transform(m: int, dtype: torch.dtype) -> float:
        return per_token(Workload("fft", max(1, 256 * 2048 // m), 128, 256, 256, m, dtype), 512)

    fft = {m: (transform(m, dtypes[0]), transform(m, dtypes[1])) for m in cost.FFT_CYCLES}

    flops, epilogues = [], []
    for dtype in dtypes:
        product = per_token(Workload("direct", 32, FEW_TOKENS, SIDE, SIDE, SIZE, dtype), MANY_TOKENS)
        flops.append(2.0 * SIDE**2 / product)
        few, many = (seconds(Workload("direct", rows, FEW_TOKENS, SIDE, SIDE, SIZE, dtype)) for rows in (128, 256))
        epilogues.append((many - few) / 128 - FEW_TOKENS * product)
    epilogue = min(epilogues)  # the same adds; the slower product hides part of them
    adds = min(MOST_ATOMIC_ADDS, SIDE**2 / epilogue) if epilogue > 0 else MOST_ATOMIC_ADDS

    shear = []
    for dtype in dtypes:
        work = Workload("shear", 32, FEW_TOKENS, SIDE, SIDE, SIZE, dtype)
        shear.append(per_token(work, MANY_TOKENS) / cost.shear_tiles(work.sketch(), single=dtype == torch.float32))
    return cost.Rates(fft, (shear[0], shear[1]), (flops[0], flops[1]), adds, copy_bytes_per_second, launch)


def calibrate(
    time_tile: Callable[[Workload, str, configs.Config], float],
    time_call: Callable[[Workload, Mapping[str, configs.Config]], float],
    copy_bytes_per_second: float,
    say: Callable[[str], None],
) -> tuning.Tuning:
    """Tiles first, then the rates with those tiles in force."""
    tiles = tune(time_tile, say)
    rates = fit(lambda work: time_call(work, tiles), copy_bytes_per_second)
    return tuning.Tuning(tiles, rates, "measured just now")
