"""What the host does for a batch on a GPU: one call for each use of each weight against one call for each weight.

    python -m bench.host_overhead
    python -m bench.host_overhead --keep    # kept: docs/kernels.md states its figures

Needs Triton and no GPU. The kernels are compiled for sm_90, and everything up to the launch runs as it would there:
checks, planning, torch's dispatcher, tables of addresses, Triton's launcher. In the driver's place stands one that
counts launches and does nothing. Not in it: the driver's own time (some microseconds a launch, and as much for the copy
of a table). Tensors lie on the CPU and the operators are given their CUDA kernels for it; they are small, as nothing
here depends on their size. Times are processor time of one thread, best of some batches.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.provenance import Provenance, add_output, machine_line, machine_slug, write
from sdi_kernels import Route, TensorSketch, borders, ops, sketch_linear_grads
from sdi_kernels.calls import LinearCall, LinearStepsCall
from sdi_kernels.triton import launch

WIDTH, SIZE, ROWS, TOKENS = 768, 2048, 8, 4
ROUTES: tuple[Route, ...] = ("direct", "fft")


class Driver:
    """As much of a driver as Triton asks for between the launcher's first line and the device."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.launches = 0
        self.target = GPUTarget("cuda", 90, 32)
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, *_: Any) -> tuple[None, None, int, int, int]:
        return None, None, 255, 0, 1024

    def launcher_cls(self, _source: Any, _metadata: Any) -> Callable[..., None]:
        def run(*_: Any) -> None:
            self.launches += 1

        return run


def mocked() -> Driver:
    """From here on CPU tensors take the way of CUDA tensors, up to the launch."""
    from triton.runtime.driver import driver

    found = Driver()
    driver.set_active(found)  # type: ignore[arg-type]  # as much of one as is asked for
    torch.cuda.device = lambda _: contextlib.nullcontext()  # type: ignore[assignment, misc]
    one, many = borders.linear, borders.linear_steps
    ops.linear_sketch_.register_kernel("cpu")(ops.guarded(LinearCall, one, launch.linear_sketch_))
    ops.linear_steps_sketch_.register_kernel("cpu")(ops.guarded(LinearStepsCall, many, launch.linear_steps_sketch_))
    return found


def best(batch: Callable[[], None], driver: Driver, batches: int) -> tuple[float, int]:
    """(seconds of a batch, launches of one)."""
    batch()  # compiles
    seconds = []
    for _ in range(batches):
        driver.launches = 0
        began = time.process_time()
        batch()
        seconds.append(time.process_time() - began)
    return min(seconds), driver.launches


def measure(route: Route, weights: int, steps: int, driver: Driver, batches: int) -> dict[str, Any]:
    sketches = [TensorSketch(WIDTH, WIDTH, SIZE, name=str(k)) for k in range(weights)]
    acts, grads = ([torch.zeros(ROWS, TOKENS, WIDTH) for _ in range(steps)] for _ in range(2))
    buffers: list[Tensor] = [torch.zeros(ROWS, steps, SIZE) for _ in sketches]

    def per_use() -> None:
        for sketch, out in zip(sketches, buffers, strict=True):
            for step, (a, g) in enumerate(zip(acts, grads, strict=True)):
                sketch_linear_grads(a, g, sketch, route=route, out=out[:, step])

    def grouped() -> None:
        for sketch, out in zip(sketches, buffers, strict=True):
            sketch_linear_grads(acts, grads, sketch, route=route, out=out)

    found: dict[str, Any] = {"route": route}
    for name, batch in (("per use", per_use), ("grouped", grouped)):
        seconds, launches = best(batch, driver, batches)
        found[name] = {"batch_ms": 1e3 * seconds, "launches": launches, "use_us": 1e6 * seconds / (weights * steps)}
    found["ratio"] = found["per use"]["batch_ms"] / found["grouped"]["batch_ms"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=25)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batches", type=int, default=7, help="timed batches, of which the fastest counts")
    add_output(parser, f"host-overhead-{machine_slug()}")
    options = parser.parse_args()
    torch.set_num_threads(1)
    provenance = Provenance()
    driver = mocked()
    rows = [measure(route, options.weights, options.steps, driver, options.batches) for route in ROUTES]
    print(f"{options.weights} weights x {options.steps} steps, host time of a batch, driver mocked")
    print(f"{'route':<8}{'calls':<10}{'launches':>9}{'ms a batch':>12}{'us a use':>10}")
    for row in rows:
        for name in ("per use", "grouped"):
            figures = row[name]
            print(
                f"{row['route']:<8}{name:<10}{figures['launches']:>9}{figures['batch_ms']:>12.2f}"
                f"{figures['use_us']:>10.1f}"
            )
        print(f"{'':<8}ratio {row['ratio']:.1f}")
    print(machine_line(provenance.finish()))
    write(options.json, provenance, {"weights": options.weights, "steps": options.steps, "rows": rows})


if __name__ == "__main__":
    main()
