"""Time the CUDA kernels against what they replace: ``python -m bench.gpu.run`` from the repository's root.

Needs torch, triton and numpy on a CUDA machine and nothing else. In turn, each within a share of ``--seconds`` (default
400): the measured ceilings, the looped GPT of the paper's D.1 end to end (end_to_end.py), every layer (layers.py), and
compute-sanitizer on small shapes where it is installed. Results go to ``bench/results/<gpu>-<torch>-<triton>.json`` and
``.md``, written anew as each comes in; what was not reached is named.

``--calibrate`` measures tiles and rates for the planner instead, and keeps them for this GPU (calibrate.py).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.gpu import calibrate, end_to_end, predict, report
from bench.gpu.layers import NO_MEMORY, Case, cases, reason, time_case
from bench.gpu.timing import ceilings, median_ms
from sdi_kernels import pairwise_linear_influence, sketch_linear_grads
from sdi_kernels.triton import configs, tuning

CHECKS = Path(__file__).resolve().parents[2] / "tests" / "gpu" / "checks.py"
END_TO_END_SHARE, LAYERS_SHARE = 0.35, 0.85
"""Of the whole time: when the end-to-end part has to stop, and when the layers have."""


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run_end_to_end(
    results: dict[str, Any], save: Callable[[], object], stop: Callable[[], bool], device: torch.device,
    setup: end_to_end.Setup,
) -> None:  # fmt: skip
    """Fill ``results["end_to_end"]``; a part that fails is refused by name and does not take the others along."""
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    found = results["end_to_end"]
    try:
        bench = end_to_end.Bench(setup, device)
        for name, result in end_to_end.parts(bench, total, stop):
            found[name] = result
            say(f"end to end, {name}: {result}")
            save()
    except Exception as problem:  # the layers are to be timed all the same
        results["refused"].append(f"end to end: {reason(problem)}")
    results["not_reached"] += [f"end to end: {part}" for part in ("costs", "errors", "feasible") if part not in found]
    save()


def run_layers(results: dict[str, Any], save: Callable[[], object], stop: Callable[[], bool]) -> None:
    for case in cases():
        if stop():
            results["not_reached"].append(case.name)
            continue
        run_layer(results, case)
        save()


def run_layer(results: dict[str, Any], case: Case) -> None:
    try:
        record = time_case(case)
    except Exception as problem:  # a kernel that does not run is a finding; the other shapes are to be timed
        results["refused"].append(f"{case.name}: {reason(problem)}")
        return
    results["cases"].append(record)
    results["refused"] += [f"{case.name} {route}: {why}" for route, why in record["refused"].items()]
    over = report.over_predicted(record, predict.kept())
    say(f"{case.name}: " + ", ".join(f"{k} {v:.3f} ms" for k, v in record["ms"].items()))
    say(
        f"{case.name}: measured over predicted: " + (", ".join(f"{k} {v}" for k, v in over.items()) or "none predicted")
    )


def sanitize(tool: str, seconds: float) -> str:
    """Outcome of one tool of compute-sanitizer on small shapes, in words: passed, FAILED ..., or skipped and why."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return "skipped (compute-sanitizer is not installed)"
    if seconds < 20:
        return "skipped (no time left)"
    command = [program, "--tool", tool, "--error-exitcode", "86", sys.executable, str(CHECKS), "--sanitize"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"skipped (not done after {seconds:.0f} s)"
    if done.returncode == 0:
        return "passed"
    tail = " ".join((done.stdout + done.stderr).split()[-40:])
    return f"FAILED with exit code {done.returncode}: {tail}"


def _call(work: calibrate.Workload, device: torch.device) -> Callable[[int], object]:
    """The kernel call of a workload, on random inputs."""
    generator = torch.Generator(device).manual_seed(0)
    shape = work.rows, work.tokens
    a, g = (torch.randn(*shape, d, device=device, generator=generator).to(work.dtype) for d in (work.d_in, work.d_out))
    if work.route == "pairwise":
        return lambda _: pairwise_linear_influence(a, g, a, g)
    sketch, out = work.sketch(), torch.zeros(work.rows, work.m, device=device)
    return lambda _: sketch_linear_grads(a, g, sketch, route=work.route, out=out)  # type: ignore[arg-type]


def run_calibration(device: torch.device) -> int:
    """Measure, and write the tuning file."""

    def seconds(work: calibrate.Workload, tiles: Mapping[str, configs.Config]) -> float:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(work.precision)
        try:
            with tuning.using(tuning.Tuning(tiles), device):
                return median_ms(_call(work, device)) / 1e3
        finally:
            torch.set_float32_matmul_precision(before)

    copy = 1e9 * ceilings()["copy_gb_s"]
    found = calibrate.calibrate(lambda work, key, tile: seconds(work, {key: tile}), seconds, copy, say)
    say(f"{found.rates}\n{tuning.save(found, tuning.machine(device))}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=400.0, help="stop after this many seconds (default 400)")
    parser.add_argument("--calibrate", action="store_true", help="measure tiles and rates for the planner, and stop")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write("bench.gpu.run: needs a CUDA device, and torch sees none here. Nothing was timed.\n")
        return 2
    try:
        about = report.machine()
    except ImportError:
        sys.stderr.write("bench.gpu.run: needs Triton, and it is not installed here. Nothing was timed.\n")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    if arguments.calibrate:
        return run_calibration(device)
    start, whole = time.perf_counter(), arguments.seconds

    def stop_at(share: float) -> Callable[[], bool]:
        return lambda: time.perf_counter() - start > share * whole

    results = report.new(about)
    results["ceilings"], results["tuning"] = ceilings(), tuning.tuned(device).source
    report.write(results)
    run_end_to_end(results, lambda: report.write(results), stop_at(END_TO_END_SHARE), device, end_to_end.Setup())
    run_layers(results, lambda: report.write(results), stop_at(LAYERS_SHARE))
    for tool in ("memcheck", "racecheck"):
        left = whole - (time.perf_counter() - start)
        results["sanitizer"][tool] = sanitize(tool, left / 2 if tool == "memcheck" else left)
    results["finished"] = True
    say(f"{report.write(results)}, .md")
    failed = [text for text in results["sanitizer"].values() if text.startswith("FAILED")]
    wrong = [text for text in results["refused"] if NO_MEMORY not in text]
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
