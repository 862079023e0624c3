"""One sketch call on the CPU: this project, the published package, and the weight-gradient GEMM that it replaces.

Everyone gets the same inputs and the same hash tables, and the results are checked first. The contestants alternate;
a ratio is the median over rounds of the ratio within the round. On one thread the clock is the thread's own CPU time,
which does not count what else the machine does; on all threads it is wall time.

    python -m pytest bench --benchmark-only -k linear    # as a suite
    python -m bench.bench_sketch --keep                  # kept for this machine: docs/cpu.md is made from it
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sdi.sketch import CountSketchSpec, TensorSketchSpec, count_sketch_vector, tensor_sketch_linear_weight
from torch import Tensor

from bench.provenance import Provenance, add_output, machine_line, machine_slug, write
from sdi_kernels import CountSketch, TensorSketch, plan_linear, reference, sketch_linear_grads, sketch_vector_grads
from sdi_kernels.cpu import native

SKETCH_SIZE = 2048
ROUNDS = 9
# d_out, d_in, rows, tokens
LAYERS = [(128, 128, 32, 81), (512, 128, 32, 81), (256, 256, 32, 42), (768, 768, 8, 128), (3072, 768, 8, 128)]
THREADS = [1, torch.get_num_threads()]
HASHINGS = ("balanced", "iid")


def race(contestants: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds per call of every round; short calls are repeated until a round takes about 5 ms."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    repeats = {}
    for name, call in contestants.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, min(20, round(5e-3 / (time.perf_counter() - start))))
    took: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, call in contestants.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            took[name].append(1e3 * (clock() - start) / repeats[name])
    return took


def ratio(took: dict[str, list[float]], this: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(took[this], took[other], strict=True))


def race_linear(layer: tuple[int, int, int, int], hashing: str) -> tuple[dict[str, Any], Callable[[], Tensor]]:
    """Figures of a layer, checked first, and this project's call."""
    torch.manual_seed(0)
    d_out, d_in, rows, tokens = layer
    a, g = torch.randn(rows, tokens, d_in), torch.randn(rows, tokens, d_out)
    sketch = TensorSketch(d_out, d_in, SKETCH_SIZE, hashing=hashing)
    h_out, s_out, _, h_in, s_in, _ = (table.long() for table in sketch.tables())
    spec = TensorSketchSpec(h_out, s_out, h_in, s_in, SKETCH_SIZE)
    flat_a, flat_g = a.flatten(0, 1), g.flatten(0, 1)
    out = torch.zeros(rows, SKETCH_SIZE)

    def ours() -> Tensor:
        return sketch_linear_grads(a, g, sketch, out=out)

    def published() -> Tensor:
        return tensor_sketch_linear_weight(activations=a, backprops=g, spec=spec)

    want = reference.sketch_linear_grads(a[:1], g[:1], sketch)
    for name, got in (("ours", ours()[:1]), ("published", published()[:1])):
        error = float((got - want).norm() / want.norm())
        assert error < 1e-5, f"{name}: relative error {error:.1e}; a wrong result is not timed"

    took = race({"ours": ours, "published": published, "dW GEMM": lambda: flat_g.T @ flat_a})
    figures = {
        "layer": list(layer),
        "hashing": hashing,
        "threads": torch.get_num_threads(),
        "route": plan_linear(rows, tokens, sketch, a.device).route,
        "ms": {name: statistics.median(times) for name, times in took.items()},
        "published_over_ours": ratio(took, "published", "ours"),
        "ours_over_gemm": ratio(took, "ours", "dW GEMM"),
    }
    return figures, ours


def race_bias() -> tuple[dict[str, Any], Callable[[], Tensor]]:
    """The same of a bias."""
    torch.manual_seed(0)
    g = torch.randn(32, 81, 512)
    sketch = CountSketch(512, SKETCH_SIZE)
    bucket, sign, _ = (table.long() for table in sketch.tables())
    spec = CountSketchSpec(bucket, sign, SKETCH_SIZE)
    out = torch.zeros(32, SKETCH_SIZE)
    want = reference.sketch_vector_grads(g, sketch)
    assert float((sketch_vector_grads(g, sketch) - want).norm() / want.norm()) < 1e-5

    def ours() -> Tensor:
        return sketch_vector_grads(g, sketch, out=out)

    took = race(
        {"ours": ours, "published": lambda: count_sketch_vector(g.sum(1), spec=spec), "token sum": lambda: g.sum(1)}
    )
    ms = {name: statistics.median(times) for name, times in took.items()}
    return {"threads": torch.get_num_threads(), "ms": ms}, ours


def line(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {ms:.3f} ms" for name, ms in figures["ms"].items())


def line_linear(figures: dict[str, Any]) -> str:
    d_out, d_in, rows, tokens = figures["layer"]
    return (
        f"{d_out}x{d_in}, {rows}x{tokens}, {figures['hashing']}, {figures['threads']} thread(s): {line(figures)}; "
        f"{figures['published_over_ours']:.1f} x faster than published, {figures['ours_over_gemm']:.2f} dW GEMMs "
        f"({figures['route']})"
    )


@pytest.mark.parametrize("threads", THREADS, ids=[f"{n}thread" for n in THREADS])
@pytest.mark.parametrize("hashing", HASHINGS)
@pytest.mark.parametrize("layer", LAYERS, ids=["x".join(map(str, layer)) for layer in LAYERS])
def test_linear(layer, hashing, threads, benchmark, capsys):
    torch.set_num_threads(threads)
    figures, ours = race_linear(layer, hashing)
    with capsys.disabled():
        print(f"\n{line_linear(figures)}")
    benchmark.extra_info.update(figures, provenance=Provenance().finish())
    benchmark.pedantic(ours, rounds=5, iterations=1)


@pytest.mark.parametrize("threads", THREADS, ids=[f"{n}thread" for n in THREADS])
def test_bias(threads, benchmark, capsys):
    torch.set_num_threads(threads)
    figures, ours = race_bias()
    with capsys.disabled():
        print(f"\nbias of 512, 32x81, {threads} thread(s): {line(figures)}")
    benchmark.extra_info.update(figures, provenance=Provenance().finish())
    benchmark.pedantic(ours, rounds=5, iterations=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted(set(THREADS)))
    add_output(parser, f"sketch-{machine_slug()}")
    options = parser.parse_args()
    provenance = Provenance()
    results: dict[str, Any] = {"sketch_size": SKETCH_SIZE, "rounds": ROUNDS, "kernels": native.instruction_set()}
    results |= {"linear": [], "bias": []}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for hashing in HASHINGS:
            for layer in LAYERS:
                results["linear"].append(race_linear(layer, hashing)[0])
                print(line_linear(results["linear"][-1]), flush=True)
        results["bias"].append(race_bias()[0])
        print(f"bias of 512, 32x81, {threads} thread(s): {line(results['bias'][-1])}", flush=True)
    torch.set_num_threads(max(options.threads))
    print(machine_line(provenance.finish()))
    write(options.json, provenance, results)


if __name__ == "__main__":
    main()
