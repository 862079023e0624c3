"""One linear layer at a time: the kernels against what they replace, after checking rows against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu.timing import median_ms
from sdi_kernels import Route, TensorSketch, plan_linear, sketch_linear_grads

LAYERS = [(256, 256), (768, 768), (768, 3072), (3072, 768), (1280, 1280), (2048, 2048), (4096, 4096), (4096, 11008)]
TOKENS = (128, 2048)
SKETCH_SIZES = (2048, 1024, 4096)  # the paper's first, in case time runs out
DTYPES = (torch.float32, torch.bfloat16)
ROTATE_BYTES = 256 << 20
"""Inputs are rotated over sets of at least this size together: more than any L2."""
NO_MEMORY = "out of memory"
BASELINE_BYTES = 2 << 30
"""Temporary memory of the baselines that materialise something; they run on fewer rows where they need more."""


class Case(NamedTuple):
    d_out: int
    d_in: int
    tokens: int
    m: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.d_out}x{self.d_in} tokens {self.tokens} m {self.m} {str(self.dtype)[6:]}"

    @property
    def rows(self) -> int:
        """Rows that fill the device: about 32 k tokens, at least 16 rows; fewer where inputs would pass 4 GB."""
        rows = max(16, (1 << 15) // self.tokens)
        bytes_per_row = self.tokens * (self.d_out + self.d_in) * self.dtype.itemsize
        return max(1, min(rows, (4 << 30) // bytes_per_row))


def cases() -> Iterator[Case]:
    for m in SKETCH_SIZES:
        for d_out, d_in in LAYERS:
            for tokens in TOKENS:
                for dtype in DTYPES:
                    yield Case(d_out, d_in, tokens, m, dtype)


def published_formula(a: Tensor, g: Tensor, tables: list[Tensor], m: int) -> Tensor:
    """What the published package computes: scatter both sides, transform each token, multiply, sum, transform back."""
    h_out, s_out, _, h_in, s_in, _ = tables

    def count_sketch(x: Tensor, h: Tensor, s: Tensor) -> Tensor:
        out = torch.zeros(*x.shape[:-1], m, device=x.device)
        return out.index_add_(-1, h, x.float() * s.float())

    left = torch.fft.rfft(count_sketch(g, h_out, s_out))
    right = torch.fft.rfft(count_sketch(a, h_in, s_in))
    return torch.fft.irfft((left * right).sum(-2), n=m)


def expected(a: Tensor, g: Tensor, sketch: TensorSketch) -> Tensor:
    """One row, from the definition, in float64."""
    h_out, s_out, _, h_in, s_in, _ = sketch.tables(a.device)
    position = ((h_out.long()[:, None] + h_in.long()) % sketch.m).flatten()
    values = (g.double().T @ a.double()) * (s_out[:, None] * s_in).double()
    out = torch.zeros(sketch.m, dtype=torch.float64, device=a.device)
    return out.index_add_(0, position, values.flatten())


def checked_error(got: Tensor, a: Tensor, g: Tensor, sketch: TensorSketch) -> float:
    """Largest relative error of the first and the last row."""
    errors = []
    for row in {0, len(a) - 1}:
        want = expected(a[row], g[row], sketch)
        errors.append(float((got[row].double() - want).norm() / want.norm()))
    return max(errors)


def time_case(case: Case) -> dict[str, Any]:
    rows, dtype, m = case.rows, case.dtype, case.m
    sketch = TensorSketch(case.d_out, case.d_in, m, name="bench")
    tables = sketch.tables("cuda")
    set_bytes = rows * case.tokens * (case.d_out + case.d_in) * dtype.itemsize
    sets = max(1, min(16, math.ceil(ROTATE_BYTES / set_bytes)))
    generator = torch.Generator("cuda").manual_seed(0)

    def make(d: int) -> list[Tensor]:
        shape = rows, case.tokens, d
        return [torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(sets)]

    activations, grads = make(case.d_in), make(case.d_out)
    buffer = torch.zeros(rows, m, device="cuda")
    # The opt-in route needs tables of its own; the others are timed on the default ones.
    block = TensorSketch(case.d_out, case.d_in, m, hashing="block", name="bench")
    routes: dict[Route, TensorSketch] = {"fft": sketch, "direct": sketch}
    if block.shearable:
        routes["shear"] = block
    record: dict[str, Any] = {
        "d_out": case.d_out, "d_in": case.d_in, "tokens": case.tokens, "m": m, "dtype": str(dtype)[6:], "rows": rows,
        "input_bytes": set_bytes, "planned": plan_linear(rows, case.tokens, sketch, buffer.device, dtype=dtype).route,
        "ms": {}, "error": {}, "refused": {},
    }  # fmt: skip
    for route, tables_of in routes.items():
        try:
            _time_route(record, route, tables_of, activations, grads, buffer)
        except Exception as problem:  # a route that does not run is a finding; the others are to be timed
            record["refused"][route] = reason(problem)

    flat_a = [x.view(-1, case.d_in) for x in activations]
    flat_g = [x.view(-1, case.d_out) for x in grads]
    record["ms"]["weight_gradient_gemm"] = median_ms(lambda i: flat_g[i % sets].T @ flat_a[i % sets])

    for name, baseline in (("published_formula", _published), ("per_example_gradients", _per_example)):
        try:
            record["ms"][name] = baseline(case, activations, grads, tables)
        except torch.cuda.OutOfMemoryError as problem:
            record["refused"][name] = reason(problem)
    return record


def reason(problem: Exception) -> str:
    """Why something was not timed, in one line."""
    first = str(problem).splitlines()[0] if str(problem) else ""
    if isinstance(problem, torch.cuda.OutOfMemoryError):
        torch.cuda.empty_cache()
        return f"{NO_MEMORY} ({first})"
    return f"{type(problem).__name__}: {first}"


def _time_route(
    record: dict[str, Any], route: Route, sketch: TensorSketch, activations: list[Tensor], grads: list[Tensor],
    buffer: Tensor,
) -> None:  # fmt: skip
    """Fill a record's error, workspace and time of one route; a wrong result is refused."""
    sets = len(activations)
    got = sketch_linear_grads(activations[0], grads[0], sketch, route=route)
    error = checked_error(got, activations[0], grads[0], sketch)
    record["error"][route] = error
    exact = activations[0].dtype == torch.float32 or route != "fft"
    if not error <= (2e-5 if exact else 4e-3):
        record["refused"][route] = f"wrong result (relative error {error:.2e}): not timed"
        return

    def run(i: int) -> object:
        return sketch_linear_grads(activations[i % sets], grads[i % sets], sketch, route=route, out=buffer)

    run(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(0)
    torch.cuda.synchronize()
    record.setdefault("workspace_mb", {})[route] = (torch.cuda.max_memory_allocated() - before) / 2**20
    record["ms"][route] = median_ms(run)


# The baselines materialise (rows, tokens, m) or (rows, d_out, d_in): they are scaled up from as many rows as fit.


def _published(case: Case, activations: list[Tensor], grads: list[Tensor], tables: list[Tensor]) -> float:
    some = max(1, min(case.rows, BASELINE_BYTES // (24 * case.tokens * case.m)))
    a, g = [x[:some] for x in activations], [x[:some] for x in grads]
    return median_ms(lambda i: published_formula(a[i % len(a)], g[i % len(a)], tables, case.m)) * case.rows / some


def _per_example(case: Case, activations: list[Tensor], grads: list[Tensor], _: list[Tensor]) -> float:
    some = max(1, min(case.rows, BASELINE_BYTES // (case.d_out * case.d_in * case.dtype.itemsize)))
    a, g = [x[:some] for x in activations], [x[:some] for x in grads]
    ms = median_ms(lambda i: torch.einsum("rto,rti->roi", g[i % len(a)], a[i % len(a)]))
    return ms * case.rows / some
