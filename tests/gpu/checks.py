"""Correctness of the CUDA kernels against float64, as plain functions: pytest runs them from test_kernels.py, and
``python tests/gpu/checks.py`` where there is no pytest (``--small`` without the large shapes, ``--sanitize`` with few
enough for compute-sanitizer).
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import sdi_kernels as sk
from sdi_kernels import CountSketch, HashFamily, TensorSketch

SEED = int(os.environ.get("SDI_GPU_SEED", time.time_ns() % 2**31))
"""Seed of the random shapes: printed with every run and every failure; set SDI_GPU_SEED to repeat one."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUTES = ("fft", "direct")


class Shape(NamedTuple):
    rows: int
    tokens: int
    d_out: int
    d_in: int
    m: int
    hashing: HashFamily = "balanced"


SMALL = [
    Shape(3, 5, 40, 24, 256),
    Shape(2, 1, 7, 300, 512, "iid"),
    Shape(1, 33, 130, 3, 37),
    Shape(2, 70, 65, 129, 1024),
]
FULL = [
    Shape(64, 81, 128, 128, 2048),
    Shape(8, 128, 768, 768, 2048),
    Shape(8, 128, 768, 768, 2048, "iid"),
    Shape(4, 128, 3072, 768, 4096),
    Shape(2, 2048, 1280, 1280, 1024),
    Shape(2, 128, 4096, 11008, 2048),
    Shape(2, 64, 2048, 2048, 8192),
]


def random_shapes(count: int = 12) -> list[Shape]:
    """Shapes over the whole supported range, small enough to check each in float64."""
    rng = random.Random(SEED)
    shapes = []
    for _ in range(count):
        m = rng.choice([256, 512, 1024, 2048, 4096, 8192, rng.randint(1, 5000)])
        shapes.append(
            Shape(
                rng.randint(1, 9),
                int(2 ** rng.uniform(0, 8)),
                int(2 ** rng.uniform(0, 11)),
                int(2 ** rng.uniform(0, 11)),
                m,
                rng.choice(["balanced", "iid"]),
            )
        )
    return shapes


def inputs(shape: Shape, dtype: torch.dtype, *, small_gradients: bool = False) -> tuple[Tensor, Tensor]:
    """Activations and output gradients; gradients are usually far smaller than activations, and uneven over tokens."""
    generator = torch.Generator("cuda").manual_seed(SEED)
    a = torch.randn(shape.rows, shape.tokens, shape.d_in, device="cuda", generator=generator)
    g = torch.randn(shape.rows, shape.tokens, shape.d_out, device="cuda", generator=generator)
    if small_gradients:
        g *= 10.0 ** -torch.linspace(1, 4, shape.tokens, device="cuda")[:, None]
    return a.to(dtype), g.to(dtype)


def expected_linear(a: Tensor, g: Tensor, sketch: TensorSketch) -> Tensor:
    """The definition, one row at a time, in float64."""
    h_out, s_out, _, h_in, s_in, _ = sketch.tables(a.device)
    position = ((h_out.long()[:, None] + h_in.long()) % sketch.m).flatten()
    sign = (s_out[:, None] * s_in).double()
    out = torch.zeros(len(a), sketch.m, dtype=torch.float64, device=a.device)
    for row, (a_row, g_row) in enumerate(zip(a, g, strict=True)):
        out[row].index_add_(0, position, ((g_row.double().T @ a_row.double()) * sign).flatten())
    return out


def error(got: Tensor, want: Tensor) -> float:
    """Largest relative error of a row."""
    scale = want.norm(dim=-1).clamp_min(1e-300)
    return float(((got.double() - want).norm(dim=-1) / scale).max())


def tolerance(route: str, dtype: torch.dtype) -> float:
    """Relative: fp32 accuracy where products are exact or in three parts, else that of one tf32 product."""
    exact = (torch.get_float32_matmul_precision() == "highest") if dtype == torch.float32 else route == "direct"
    return 2e-5 if exact else 4e-3


def label(shape: Shape, *rest: object) -> str:
    return f"{shape} {' '.join(map(str, rest))} SDI_GPU_SEED={SEED}"


def check_linear(shape: Shape, dtype: torch.dtype, route: str) -> None:
    sketch = TensorSketch(shape.d_out, shape.d_in, shape.m, hashing=shape.hashing, name="w")
    for small_gradients in (False, True):
        a, g = inputs(shape, dtype, small_gradients=small_gradients)
        got = sk.sketch_linear_grads(a, g, sketch, route=route)  # type: ignore[arg-type]
        found = error(got, expected_linear(a, g, sketch))
        assert found <= tolerance(route, dtype), f"{label(shape, dtype, route)}: error {found:.2e}"


def check_integers(shape: Shape, dtype: torch.dtype) -> None:
    """Small integers are exact whatever the order of addition: no tolerance."""
    sketch, count = TensorSketch(shape.d_out, shape.d_in, shape.m, hashing=shape.hashing), None
    a = torch.randint(-2, 3, (shape.rows, shape.tokens, shape.d_in), device="cuda").to(dtype)
    g = torch.randint(-2, 3, (shape.rows, shape.tokens, shape.d_out), device="cuda").to(dtype)
    got = sk.sketch_linear_grads(a, g, sketch, route="direct")
    assert torch.equal(got.double(), expected_linear(a, g, sketch)), label(shape, dtype, "direct")

    ids = torch.randint(shape.d_out, (shape.rows, shape.tokens), device="cuda")
    one_hot = torch.nn.functional.one_hot(ids, shape.d_out)
    got = sk.sketch_embedding_grads(ids, a, sketch)
    assert torch.equal(got.double(), expected_linear(a, one_hot, sketch)), label(shape, dtype, "embedding")

    count = CountSketch(shape.d_in, shape.m, hashing=shape.hashing)
    bucket, sign, _ = count.tables("cuda")
    want = torch.zeros(shape.rows, shape.m, dtype=torch.float64, device="cuda")
    want.index_add_(1, bucket.long(), a.double().sum(1) * sign.double())
    assert torch.equal(sk.sketch_vector_grads(a, count).double(), want), label(shape, dtype, "vector")

    center, scale = (torch.randint(-2, 3, a.shape[:2], device="cuda").to(dtype) for _ in range(2))
    got = torch.zeros(shape.rows, shape.m, device="cuda")
    sk.sketch_scaled_vector_grads(a, a, count, center=center, scale=scale, out=got)
    values = a.double() * (a.double() - center.double()[..., None]) * scale.double()[..., None]
    want.zero_().index_add_(1, bucket.long(), values.sum(1) * sign.double())
    assert torch.equal(got.double(), want), label(shape, dtype, "scaled vector")

    grads = torch.randint(-2, 3, (shape.rows, shape.d_out, shape.d_in), device="cuda").to(dtype)
    metric = torch.randint(-2, 3, (shape.d_out, shape.d_in), device="cuda").to(dtype)
    got = sk.sketch_matrix_grads(grads, sketch, metric=metric)
    identity = torch.eye(shape.d_out, device="cuda").expand(shape.rows, -1, -1)  # tokens are lines: G = I (x) lines
    assert torch.equal(got.double(), expected_linear(grads.double() * metric.double(), identity, sketch)), label(
        shape, dtype, "matrix"
    )


def check_shear(shape: Shape, dtype: torch.dtype) -> None:
    """The opt-in route, exact on integers and close on gradients of usual sizes."""
    m, d_in = -(-max(shape.m, shape.d_in) // 16) * 16, shape.d_in
    sketch = TensorSketch(shape.d_out, d_in, m, hashing="block", name="w")
    a = torch.randint(-2, 3, (shape.rows, shape.tokens, d_in), device="cuda").to(dtype)
    g = torch.randint(-2, 3, (shape.rows, shape.tokens, shape.d_out), device="cuda").to(dtype)
    got = sk.sketch_linear_grads(a, g, sketch, route="shear")
    assert torch.equal(got.double(), expected_linear(a, g, sketch)), label(shape, dtype, "shear")
    a, g = inputs(shape, dtype, small_gradients=True)
    found = error(sk.sketch_linear_grads(a, g, sketch, route="shear"), expected_linear(a, g, sketch))
    assert found <= tolerance("direct", dtype), f"{label(shape, dtype, 'shear')}: error {found:.2e}"


def check_steps(shape: Shape, dtype: torch.dtype, route: str) -> None:
    """Lists of pairs with rows and tokens of their own, added to slots where some meet; and a captured graph of it."""
    sketch = TensorSketch(shape.d_out, shape.d_in, shape.m, hashing=shape.hashing, name="w")
    a, g = inputs(shape, dtype)
    acts = [a, a[:1, 1:], a.flip(0), a.transpose(0, 1).contiguous().transpose(0, 1), a]
    grads = [g, g[:1, 1:], g.flip(0), g, g]
    steps, rows = [0, 0, 2, 0, 1], [0, shape.rows, 1, 1, 0]
    want = torch.zeros(shape.rows + 1, 4, shape.m, dtype=torch.float64, device="cuda")
    for x, y, step, row in zip(acts, grads, steps, rows, strict=True):
        want[row : row + len(x), step] += expected_linear(x, y, sketch)
    got = torch.zeros_like(want, dtype=torch.float32)

    def add() -> None:
        sk.sketch_linear_grads(acts, grads, sketch, route=route, steps=steps, rows=rows, out=got)  # type: ignore[arg-type]

    add()
    found = error(got, want)
    assert found <= tolerance(route, dtype), f"{label(shape, dtype, route, 'list')}: error {found:.2e}"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add()
    for _ in range(2):
        got.zero_()
        graph.replay()
        found = error(got, want)
        assert found <= tolerance(route, dtype), f"{label(shape, dtype, route, 'list, replayed')}: error {found:.2e}"


def check_pairwise(shape: Shape, dtype: torch.dtype) -> None:
    (a, g), queries = inputs(shape, dtype), max(1, shape.tokens // 2)
    qa, qg = a.flip(1)[:, :queries], g.flip(1)[:, :queries]
    got = sk.pairwise_linear_influence(a, g, qa, qg)
    grads = torch.einsum("pto,pti->poi", g.double(), a.double())
    query = torch.einsum("pto,pti->poi", qg.double(), qa.double())
    found = float(
        ((got.double() - (grads * query).sum((1, 2))).abs() / (grads.norm(dim=(1, 2)) * query.norm(dim=(1, 2)))).max()
    )
    assert found <= tolerance("direct", dtype), f"{label(shape, dtype, 'pairwise')}: error {found:.2e}"


def check_strided_slice_accumulates(route: str) -> None:
    """Feature-major inputs, a slice of a larger buffer as output, added to what is there, nothing beside it touched."""
    shape = Shape(4, 48, 72, 56, 512)
    a, g = inputs(shape, torch.float32)
    a, g = a.transpose(1, 2).contiguous().transpose(1, 2), g[:, ::2].repeat_interleave(2, 1)
    sketch = TensorSketch(shape.d_out, shape.d_in, shape.m)
    buffer = torch.full((4, 3, 600), 7.0, device="cuda")
    sk.sketch_linear_grads(a, g, sketch, route=route, out=buffer[:, 1, 40 : 40 + shape.m])  # type: ignore[arg-type]
    found = error(buffer[:, 1, 40 : 40 + shape.m] - 7.0, expected_linear(a, g, sketch))
    assert found <= 1e-4, f"{route}: error {found:.2e}"
    buffer[:, 1, 40 : 40 + shape.m] = 7.0
    assert (buffer == 7.0).all(), f"{route}: wrote outside its slice"


def check_deterministic() -> None:
    shape = Shape(2, 4096, 96, 96, 256)
    a, g = inputs(shape, torch.float32)
    sketch, count = TensorSketch(96, 96, 256), CountSketch(96, 64)
    ids = torch.randint(96, (2, 4096), device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            (
                sk.sketch_linear_grads(a, g, sketch, route="direct"),
                sk.sketch_embedding_grads(ids, a, sketch),
                sk.sketch_vector_grads(a, count),
                sk.sketch_scaled_vector_grads(a, g, count, out=torch.zeros(2, 64, device="cuda")),
                sk.sketch_matrix_grads(a[:, :96], sketch),
            )
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[0], strict=True))


def check_workspace() -> None:
    """Temporary memory of a call stays under 64 MB, whatever the shape."""
    for shape in (Shape(512, 128, 768, 768, 4096), Shape(2, 4096, 2048, 2048, 8192)):
        a, g = inputs(shape, torch.bfloat16)
        sketch = TensorSketch(shape.d_out, shape.d_in, shape.m)
        sketch.tables("cuda")
        out = torch.zeros(shape.rows, shape.m, device="cuda")
        for route in ROUTES:
            sk.sketch_linear_grads(a, g, sketch, route=route, out=out)  # type: ignore[arg-type]  # constants are made once
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            sk.sketch_linear_grads(a, g, sketch, route=route, out=out)  # type: ignore[arg-type]
            used = torch.cuda.max_memory_allocated() - before
            assert used <= 64 << 20, f"{label(shape, route)}: {used / 2**20:.0f} MB"


def check_compile() -> None:
    sketch = TensorSketch(40, 24, 256)

    def step(a: Tensor, g: Tensor) -> Tensor:
        return sk.sketch_linear_grads(a * 2, g, sketch, route="fft") + sk.sketch_linear_grads(
            a, g, sketch, route="direct"
        )

    a, g = inputs(Shape(2, 5, 40, 24, 256), torch.float32)
    got = torch.compile(step, fullgraph=True)(a, g)
    torch.testing.assert_close(got, step(a, g), atol=1e-4, rtol=1e-4)


def check_float64() -> None:
    """float64 takes the torch routes on the GPU."""
    shape = Shape(2, 5, 40, 24, 256)
    a, g = (x.double() for x in inputs(shape, torch.float32))
    sketch = TensorSketch(40, 24, 256)
    for route in ROUTES:
        got = sk.sketch_linear_grads(a, g, sketch, route=route)  # type: ignore[arg-type]
        assert got.dtype == torch.float64
        assert error(got, expected_linear(a, g, sketch)) <= 1e-12


def all_checks(small: bool, few: bool = False) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, check) of everything; ``small`` leaves out the full-size and random shapes, ``few`` most of the rest."""
    dtypes, shapes = (DTYPES[:2], SMALL[:2]) if few else (DTYPES, SMALL)
    for shape in shapes if small else shapes + FULL + random_shapes():
        for dtype in dtypes:
            for route in ROUTES:
                yield label(shape, dtype, route), lambda s=shape, d=dtype, r=route: check_linear(s, d, r)
    for shape in shapes:
        for dtype in dtypes:
            yield label(shape, dtype, "integers"), lambda s=shape, d=dtype: check_integers(s, d)
            yield label(shape, dtype, "shear"), lambda s=shape, d=dtype: check_shear(s, d)
            for route in ROUTES:
                yield label(shape, dtype, route, "list"), lambda s=shape, d=dtype, r=route: check_steps(s, d, r)
            yield label(shape, dtype, "pairwise"), lambda s=shape, d=dtype: check_pairwise(s, d)
    if few:
        return
    for route in ROUTES:
        yield f"strided {route}", lambda r=route: check_strided_slice_accumulates(r)
    yield "deterministic", check_deterministic
    yield "float64", check_float64
    if not small:
        yield "workspace", check_workspace
        yield "torch.compile", check_compile


def main() -> int:
    if not torch.cuda.is_available():
        sys.stderr.write("needs a CUDA device\n")
        return 2
    failed = 0
    few = "--sanitize" in sys.argv
    for name, check in all_checks(few or "--small" in sys.argv, few):
        try:
            check()
        except Exception as problem:  # every check is to run, whatever the one before it did
            failed += 1
            sys.stdout.write(f"FAILED {name}\n  {type(problem).__name__}: {problem}\n")
    sys.stdout.write(f"{failed} failed, SDI_GPU_SEED={SEED}, {torch.cuda.get_device_name()}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
