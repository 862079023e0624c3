"""Calibrates the planner's cost model on this CPU and checks its choices.

    python -m bench.calibrate_plan           # every shape of the grid: both routes measured, and what the planner picks
    python -m bench.calibrate_plan --fit     # least-squares constants for sdi_kernels/cpu/cost.py
    python -m bench.calibrate_plan --torch   # the same for the plain-torch routes (no compiled kernels)

A shape counts as picked right where the chosen route is within 5 % of the faster one. The routes alternate and the
fastest of the repeats stands for each, since a shared machine only ever adds time; on one thread (the default) the
thread's own CPU time is taken, which does not see what else runs. Where the model sees one route
ahead by more than --sure times, the slower one is not measured and the shape is left out of the score.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from bench.provenance import Provenance, add_output, machine_line, machine_slug, write
from sdi_kernels import TensorSketch, plan_linear, torch_routes
from sdi_kernels.calls import LinearCall
from sdi_kernels.cpu import cost, native, routes

SIDES = [(64, 64), (128, 128), (256, 256), (512, 512), (768, 768), (3072, 3072)]
SIDES += [(384, 128), (512, 128), (128, 512), (1024, 256), (2304, 768), (3072, 768), (768, 3072)]
TOKENS = [16, 81, 128, 512]
SKETCHES = [256, 512, 1024, 2048, 4096, 8192]
ROUTES = ["direct", "fft"]
RIGHT, REPEATS = 1.05, 5


def fastest(calls: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """Seconds of each call, alternating: the fastest of ``repeats``."""
    best = [float("inf")] * len(calls)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(repeats):
        for k, call in enumerate(calls):
            start = clock()
            call()
            best[k] = min(best[k], clock() - start)
    return best


def route_call(sketch: TensorSketch, rows: int, tokens: int, route: str, *, plain: bool) -> Callable[[], None]:
    a, g = torch.randn(rows, tokens, sketch.d_in), torch.randn(rows, tokens, sketch.d_out)
    out, tables = torch.zeros(rows, sketch.m), sketch.tables()
    if plain:
        run = torch_routes.linear_fft if route == "fft" else torch_routes.linear_direct
        return lambda: run(LinearCall(out, a, g, tables, sketch.m, route))
    return lambda: routes.linear(LinearCall(out, a, g, tables, sketch.m, route))


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    ratios = []
    print(f"{'rows':>4} {'tokens':>6} {'d_out':>5} {'d_in':>5} {'m':>5} | measured (predicted) ms: direct, fft | pick")
    grid = itertools.product(arguments.rows, TOKENS, SIDES, SKETCHES, arguments.hashing)
    for rows, tokens, (d_out, d_in), m, hashing in grid:
        sketch = TensorSketch(d_out, d_in, m, hashing=hashing)
        plan = plan_linear(rows, tokens, sketch, torch.device("cpu"))
        predicted = [plan.seconds[route] for route in ROUTES]
        if max(predicted) > arguments.sure * min(predicted):
            continue
        calls = [route_call(sketch, rows, tokens, route, plain=arguments.torch) for route in ROUTES]
        measured = fastest(calls, 1 + REPEATS)
        ratio = measured[ROUTES.index(plan.route)] / min(measured)
        ratios.append(ratio)
        times = ", ".join(f"{1e3 * x:8.3f} ({1e3 * y:8.3f})" for x, y in zip(measured, predicted, strict=True))
        verdict = "" if ratio <= RIGHT else f"  <- {ratio:.2f} x the better"
        print(f"{rows:4} {tokens:6} {d_out:5} {d_in:5} {m:5} | {times} | {plan.route}{verdict}", flush=True)
    right = sum(ratio <= RIGHT for ratio in ratios)
    print(f"contested shapes: {len(ratios)}, picked right: {right / len(ratios):.1%}, worst: {max(ratios):.2f} x")
    return {
        "rows": arguments.rows, "tokens": TOKENS, "layers": len(SIDES), "sketches": SKETCHES,
        "hashing": arguments.hashing, "sure": arguments.sure, "plain_torch": arguments.torch, "shapes": len(ratios),
        "right": right, "worst": max(ratios),
    }  # fmt: skip


def fit() -> None:
    """Constants by least squares on relative errors, none negative."""
    for route in ROUTES:
        features, seconds = [], []
        for (d_out, d_in), tokens, m, hashing in itertools.product(SIDES, TOKENS, SKETCHES, ("balanced", "iid")):
            sketch = TensorSketch(d_out, d_in, m, hashing=hashing)
            if (route == "direct" and d_out * d_in > 2**21) or (route == "fft" and not native.supports_fft(m)):
                continue
            rows = 2
            [took] = fastest([route_call(sketch, rows, tokens, route, plain=False)], 4)
            count = cost.direct_work if route == "direct" else cost.fft_work
            features.append([rows * x for x in count(tokens, sketch)] + [1.0])
            seconds.append(took)
        x, y = np.array(features), np.array(seconds)
        weights = np.zeros(x.shape[1])
        active = np.ones(x.shape[1], dtype=bool)
        while True:  # drop the most negative constant until none is: a small non-negative least squares
            weights[:] = 0
            weights[active] = np.linalg.lstsq(x[:, active] / y[:, None], np.ones(len(y)), rcond=None)[0]
            if weights.min() >= 0:
                break
            active[weights.argmin()] = False
        error = np.abs(x @ weights / y - 1)
        print(f"{route}: {', '.join(f'{w:.3g}' for w in weights[:-1])}; per call {weights[-1]:.3g} s")
        middle, most, worst = np.quantile(error, (0.5, 0.9, 1))
        print(f"  relative error: median {middle:.2f}, 90 % {most:.2f}, worst {worst:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="print constants instead of checking choices")
    parser.add_argument("--torch", action="store_true", help="check the plain-torch routes")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--hashing", nargs="+", default=["balanced"], choices=["balanced", "iid"])
    parser.add_argument("--sure", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1)
    add_output(parser, f"planner-{machine_slug()}")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.torch:
        native.library = lambda: None
    provenance = Provenance()
    print(f"kernels {native.instruction_set()}")
    if arguments.fit:
        fit()
    else:
        found = check(arguments)
        write(arguments.json, provenance, found)
    print(machine_line(provenance.finish()))


if __name__ == "__main__":
    main()
