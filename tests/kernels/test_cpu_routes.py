"""The compiled CPU kernels against the naive twins, on every instruction set that this machine has."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from sketch_cases import expected_linear, expected_vector
from torch import Tensor

from sdi_kernels import (
    CountSketch,
    HashFamily,
    TensorSketch,
    plan,
    reference,
    sketch_linear_grads,
    torch_routes,
    workspace,
)
from sdi_kernels.calls import LinearCall, VectorCall
from sdi_kernels.cpu import native, routes

pytestmark = pytest.mark.numeric

ROUTES = ["direct", "fft"]

# rows, tokens, d_out, d_in: single token, odd sizes, more tokens than one unit, sides longer than the sketch
SHAPES = [
    (1, 1, 1, 1),
    (3, 1, 40, 24),
    (2, 17, 33, 70),
    (3, 70, 96, 64),
    (1, 300, 5, 130),
    (2, 9, 700, 300),
    (2, 40, 64, 513),
]

needs_kernels = pytest.mark.skipif(native.library() is None, reason="the CPU kernels are not built here")


def inputs(rows: int, tokens: int, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, tokens, d_in), torch.randn(rows, tokens, d_out)


def run(activations: Tensor, grad_outputs: Tensor, sketch: TensorSketch, route: str) -> Tensor:
    out = torch.zeros(activations.shape[0], sketch.m)
    routes.linear(LinearCall(out, activations, grad_outputs, sketch.tables(), sketch.m, route))
    return out


@pytest.mark.parametrize("m", [16, 100, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("hashing", ["balanced", "iid"])
def test_agrees_with_the_definition(hashing: HashFamily, m: int, instruction_set: str) -> None:
    for rows, tokens, d_out, d_in in SHAPES:
        sketch = TensorSketch(d_out, d_in, m, hashing=hashing, seed=3)
        a, g = inputs(rows, tokens, d_out, d_in)
        expected = expected_linear(a, g, sketch)
        for route in ROUTES:
            expected.check(run(a, g, sketch, route), route)


def test_no_worse_than_torch(instruction_set: str) -> None:
    a, g = inputs(2, 96, 192, 160)
    sketch = TensorSketch(192, 160, 512)
    expected = expected_linear(a, g, sketch)
    for route, plain in (("direct", torch_routes.linear_direct), ("fft", torch_routes.linear_fft)):
        theirs = torch.zeros(2, 512)
        plain(LinearCall(theirs, a, g, sketch.tables(), 512, route))
        replace(expected, plain=theirs).check(run(a, g, sketch, route), route)


def test_sides_of_very_different_size(instruction_set: str) -> None:
    """Both sides share one complex transform: a tiny gradient must not drown in the rounding of the activations."""
    a, g = inputs(2, 40, 64, 48)
    g *= torch.logspace(-30, 3, 40)[:, None]
    a[:, ::3] *= 1e6
    sketch = TensorSketch(64, 48, 256)
    for token in (0, 3, 17, 39):
        one = slice(token, token + 1)
        expected_linear(a[:, one], g[:, one], sketch).check(run(a[:, one], g[:, one], sketch, "fft"))
    last = g[:, -1:].expand_as(g)
    for size in (1, 2.0**-80):  # a power of two: the same digits
        expected_linear(a * size, last, sketch).check(run(a * size, last, sketch, "fft"))


@pytest.mark.parametrize("route", ROUTES)
def test_zero_tokens_rows_and_values(route: str, instruction_set: str) -> None:
    sketch = TensorSketch(8, 6, 256)
    assert run(torch.randn(0, 4, 6), torch.randn(0, 4, 8), sketch, route).shape == (0, 256)
    assert not run(torch.randn(2, 0, 6), torch.randn(2, 0, 8), sketch, route).any()
    assert not run(torch.randn(2, 4, 6), torch.zeros(2, 4, 8), sketch, route).any()
    padded = torch.randn(2, 4, 8)
    padded[0, 2:] = 0
    a = torch.randn(2, 4, 6)
    expected_linear(a, padded, sketch).check(run(a, padded, sketch, route))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("route", ROUTES)
def test_not_a_number_stays_visible(route: str, bad: float, instruction_set: str) -> None:
    a, g = inputs(2, 4, 8, 6)
    a[1, 2, 3] = bad
    out = run(a, g, TensorSketch(8, 6, 256), route)
    assert out[0].isfinite().all()
    assert not out[1].isfinite().all()


@pytest.mark.parametrize("hashing", ["balanced", "iid"])
@pytest.mark.parametrize("m", [48, 256])
def test_direct_is_exact_on_small_integers(hashing: HashFamily, m: int, instruction_set: str) -> None:
    a, g = torch.randint(-4, 5, (3, 50, 70)).float(), torch.randint(-4, 5, (3, 50, 300)).float()
    sketch = TensorSketch(300, 70, m, hashing=hashing)
    assert torch.equal(run(a, g, sketch, "direct").double(), reference.sketch_linear_grads(a, g, sketch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ROUTES)
def test_half_precision_inputs(route: str, dtype: torch.dtype, instruction_set: str) -> None:
    """Halves are converted exactly, subnormals included, and either side may be one."""
    a, g = inputs(2, 20, 40, 30)
    g *= torch.logspace(-7, 2, 40)
    a, g = a.to(dtype), g.to(dtype)
    sketch = TensorSketch(40, 30, 256)
    for left, right in ((a, g), (a, g.float()), (a.float(), g)):
        assert torch.equal(run(left, right, sketch, route), run(a.float(), g.float(), sketch, route))


@needs_kernels
def test_half_precision_infinity() -> None:
    values = torch.tensor([float("inf"), -float("inf"), 65504.0, 6e-8, -0.0], dtype=torch.float16)
    sketch = CountSketch.from_tables([0, 1, 2, 3, 4], [1] * 5, 5)
    out = torch.zeros(1, 5)
    routes.vector(VectorCall(out, values[None, None], sketch.tables(), 5))
    assert torch.equal(out[0], values.float())


@pytest.mark.parametrize("route", ROUTES)
def test_strided_inputs_and_output(route: str, instruction_set: str) -> None:
    sketch = TensorSketch(24, 20, 256)
    a = torch.randn(20, 3, 7).permute(1, 2, 0)  # features are not dense
    g = torch.randn(7, 3, 48)[..., ::2].transpose(0, 1)
    wide = torch.ones(3, 2, 300)
    out = wide[:, 1, 11:267]
    routes.linear(LinearCall(out, a, g, sketch.tables(), 256, route))
    expected_linear(a, g, sketch, before=1).check(out)
    assert (wide[:, 0] == 1).all()
    assert (wide[:, 1, :11] == 1).all()
    assert (wide[:, 1, 267:] == 1).all()
    columns = torch.zeros(256, 3).T  # rows that are not dense: plain torch does it
    routes.linear(LinearCall(columns, a, g, sketch.tables(), 256, route))
    expected_linear(a, g, sketch).check(columns)
    one = torch.randn(1, 1, 20).expand(3, 7, 20)
    expected_linear(one, g, sketch).check(run(one, g, sketch, route))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(5, 300, 40, 60), (3, 20, 600, 30)])
def test_same_bits_alone_in_any_batch_and_on_any_number_of_threads(
    shape: tuple[int, int, int, int], route: str, instruction_set: str
) -> None:
    rows, _, d_out, d_in = shape
    sketch = TensorSketch(d_out, d_in, 1024)
    a, g = inputs(*shape)
    torch.set_num_threads(1)
    once = run(a, g, sketch, route)
    for threads in (1, 2, 3, 8):  # from 5 threads on, rows are shared out in parts
        torch.set_num_threads(threads)
        assert torch.equal(run(a, g, sketch, route), once)
    for row in range(rows):
        assert torch.equal(run(a[row : row + 1], g[row : row + 1], sketch, route)[0], once[row])


@needs_kernels
@pytest.mark.parametrize("route", ROUTES)
def test_without_torchs_thread_pool(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sketch = TensorSketch(40, 30, 256)
    a, g = inputs(6, 30, 40, 30)
    pooled = run(a, g, sketch, route)
    monkeypatch.setattr(native, "openmp_parallel", lambda: None)
    assert torch.equal(run(a, g, sketch, route), pooled)


@needs_kernels
def test_called_from_several_threads_at_once() -> None:
    sketches = [TensorSketch(40, 30, m) for m in (256, 512, 8192, 16384)]
    a, g = inputs(4, 40, 40, 30)
    wrong: list[str] = []

    def work(sketch: TensorSketch) -> None:
        expected = expected_linear(a, g, sketch)
        found = [expected.excess(run(a, g, sketch, route)) for route in ROUTES * 4]
        wrong.extend(f"m={sketch.m}: {excess:.1f}" for excess in found if excess > 1)

    threads = [threading.Thread(target=work, args=(sketch,)) for sketch in sketches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("route", ROUTES)
def test_fallback_without_the_library(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    sketch = TensorSketch(40, 30, 256)
    a, g = inputs(2, 9, 40, 30)
    assert native.instruction_set() is None
    expected_linear(a, g, sketch).check(sketch_linear_grads(a, g, sketch, route=route))  # type: ignore[arg-type]
    assert plan.plan_linear(2, 9, sketch, a.device).explain()
    out = torch.zeros(2, 256)
    vector = CountSketch(40, 256)
    routes.vector(VectorCall(out, g, vector.tables(), 256))
    expected_vector(g, vector).check(out)


@needs_kernels
@pytest.mark.parametrize("m", [8, 100])
def test_small_calls_stay_compiled_where_the_transform_is_not(m: int) -> None:
    assert not native.supports_fft(m)
    assert plan.plan_linear(2, 3, TensorSketch(16, 16, m), torch.device("cpu")).route == "direct"


@needs_kernels
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(4, 64, 700, 500, 2048), (3, 2000, 32, 32, 1024), (2, 3, 3000, 40, 1 << 18)])
def test_workspace_stays_in_its_limit(shape: tuple[int, int, int, int, int], route: str) -> None:
    library = native.library()
    assert library is not None
    rows, tokens, d_out, d_in, m = shape
    torch.set_num_threads(64)
    library.sdi_peak_bytes()
    sketch = TensorSketch(d_out, d_in, m)
    a, g = inputs(rows, tokens, d_out, d_in)
    got = run(a, g, sketch, route)
    assert library.sdi_peak_bytes() <= workspace.WORKSPACE_BYTES["cpu"]
    if m < 1 << 18:
        expected_linear(a, g, sketch).check(got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 81, 50), (2, 130, 700)])
def test_vector_sketch(shape: tuple[int, int, int], dtype: torch.dtype, instruction_set: str) -> None:
    grads = torch.randn(shape).to(dtype)
    for m in (7, 256):
        for hashing in ("balanced", "iid"):
            sketch = CountSketch(shape[2], m, hashing=hashing)
            out = torch.ones(shape[0], m)
            routes.vector(VectorCall(out, grads, sketch.tables(), m))
            expected_vector(grads, sketch, before=1).check(out)
