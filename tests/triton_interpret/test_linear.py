"""``fft`` and ``direct`` kernels against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sketch_cases import expected_linear
from torch import Tensor

from sdi_kernels import TensorSketch, reference, torch_routes
from sdi_kernels.calls import LinearCall
from sdi_kernels.triton import common, cost, direct, fft, launch, transforms

TF32 = 2.0**-11
"""What rounding to nearest loses of an operand of fp16 or tf32: of 16-bit inputs fft rounds both."""

FAMILIES = ("balanced", "iid")  # tables of "block" look like balanced ones to these kernels

# rows, tokens, d_out, d_in
SHAPES = [(3, 5, 40, 24), (1, 1, 7, 5), (2, 33, 1, 70), (2, 2, 130, 3)]


def small_integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).float()


def poisoned_rows(out: Tensor) -> Tensor:
    """A buffer (rows, m) inside a larger one whose other entries are NaN: a slice ``buffer[:, t, lo:hi]``."""
    rows, m = out.shape
    buffer = torch.full((rows, 3, m + 5), float("nan"))
    view = buffer[:, 1, 2 : m + 2]
    view.copy_(out)
    return view


def assert_rest_untouched(view: Tensor) -> None:
    buffer = view._base
    assert buffer is not None
    assert torch.isnan(buffer).sum() == buffer.numel() - view.numel()
    assert torch.isfinite(view).all()


@pytest.mark.parametrize("hashing", FAMILIES)
@pytest.mark.parametrize("m", [1, 37, 64, 512])
@pytest.mark.parametrize("shape", SHAPES)
def test_direct_is_exact_on_integers(shape: tuple[int, ...], m: int, hashing: str) -> None:
    rows, tokens, d_out, d_in = shape
    sketch = TensorSketch(d_out, d_in, m, hashing=hashing, name="w")
    a, g = small_integers(rows, tokens, d_in), small_integers(rows, tokens, d_out)
    before = small_integers(rows, m)
    out = poisoned_rows(before)
    direct.linear_direct(LinearCall(out, a, g, sketch.tables(), m, "direct"))
    assert_rest_untouched(out)
    assert torch.equal(out - before, reference.sketch_linear_grads(a, g, sketch).float())


@pytest.mark.parametrize("hashing", FAMILIES)
def test_direct_preconditions_elementwise(hashing: str) -> None:
    sketch = TensorSketch(70, 20, 32, hashing=hashing)
    a, g, metric = small_integers(2, 6, 20), small_integers(2, 6, 70), small_integers(20, 70).T
    out = torch.zeros(2, 32)
    direct.linear_direct(LinearCall(out, a, g, sketch.tables(), 32, "direct", metric=metric))
    want = reference.tensor_sketch(metric.double() * reference.linear_grads(a, g), sketch)
    assert torch.equal(out, want.float())


def test_direct_large_tile_and_split_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "token_splits", lambda *_: 3)
    sketch = TensorSketch(150, 140, 96)
    a, g = small_integers(1, 150, 140), small_integers(1, 150, 150)
    out = torch.zeros(1, 96)
    direct.linear_direct(LinearCall(out, a, g, sketch.tables(), 96, "direct"))
    assert torch.equal(out, reference.sketch_linear_grads(a, g, sketch).float())


@pytest.mark.numeric
@pytest.mark.parametrize("hashing", FAMILIES)
@pytest.mark.parametrize("m", sorted(transforms.FINISH))
def test_fft_matches_definition(m: int, hashing: str) -> None:
    rows, tokens, d_out, d_in = (2, 5, 130, m // 4 + 7) if m < 4096 else (1, 2, 130, 700)
    sketch = TensorSketch(d_out, d_in, m, hashing=hashing)
    a, g = torch.randn(rows, tokens, d_in), torch.randn(rows, tokens, d_out)
    out = poisoned_rows(torch.zeros(rows, m))
    fft.linear_fft(LinearCall(out, a, g, sketch.tables(), m, "fft"))
    assert_rest_untouched(out)
    torch_out = torch.zeros(rows, m)
    torch_routes.linear_fft(LinearCall(torch_out, a, g, sketch.tables(), m, "fft"))
    replace(expected_linear(a, g, sketch), plain=torch_out).check(out)


@pytest.mark.numeric
@pytest.mark.parametrize("hashing", FAMILIES)
@pytest.mark.parametrize("shape", [(2, 3, 16, 600), (1, 1, 1100, 16), (3, 9, 300, 1), (1, 2, 1, 1)])
def test_fft_any_width(shape: tuple[int, ...], hashing: str) -> None:
    rows, tokens, d_out, d_in = shape
    for m in (256, 512):
        sketch = TensorSketch(d_out, d_in, m, hashing=hashing)
        a, g = torch.randn(rows, tokens, d_in), torch.randn(rows, tokens, d_out)
        out = torch.zeros(rows, m)
        fft.linear_fft(LinearCall(out, a, g, sketch.tables(), m, "fft"))
        expected_linear(a, g, sketch).check(out)


@pytest.mark.numeric
@pytest.mark.parametrize("m", [256, 1024, 4096])
def test_fft_keeps_small_gradients_beside_large_activations(m: int) -> None:
    """z^2 holds delta^2 - a^2 too; without balancing the two sides per token their difference in size is lost."""
    sketch = TensorSketch(64, 48, m)
    size = 10.0 ** -torch.arange(3.0, 9.0)
    a, g = 1e3 * torch.randn(1, 6, 48), torch.randn(1, 6, 64) * size[:, None]
    a[:, 1], g[:, 4] = 0.0, 0.0
    out = torch.zeros(1, m)
    fft.linear_fft(LinearCall(out, a, g, sketch.tables(), m, "fft"))
    expected_linear(a, g, sketch).check(out)


@pytest.mark.numeric
@pytest.mark.parametrize("shared", [99 << 10, 227 << 10])
@pytest.mark.parametrize("m", [1024, 2048])
def test_fft_of_half_inputs_where_loads_ahead_differ_by_shared_memory(
    m: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "FALLBACK_SHARED", shared)
    assert transforms.config_of(m, False, shared).prefetch == (shared > transforms.SHARED_BYTES)
    sketch = TensorSketch(60, 90, m)
    a, g = torch.randn(1, 3, 90).half(), torch.randn(1, 3, 60).half()
    out = torch.zeros(1, m)
    fft.linear_fft(LinearCall(out, a, g, sketch.tables(), m, "fft"))
    replace(expected_linear(a, g, sketch), eps=TF32).check(out)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fft_of_numbers_that_fp16_does_not_hold(dtype: torch.dtype) -> None:
    """A power of two brings a token's operands to where fp16 has all its bits; no product of theirs is lost."""
    sketch = TensorSketch(50, 70, 512)
    for a_size, g_size in ((1e18, 1e-18), (1e-10, 1e-12), (1e12, 1e8)):
        a, g = (a_size * torch.randn(1, 6, 70)).to(dtype), (g_size * torch.randn(1, 6, 50)).to(dtype)
        out = torch.zeros(1, 512)
        fft.linear_fft(LinearCall(out, a, g, sketch.tables(), 512, "fft"))
        want = reference.sketch_linear_grads(a, g, sketch)
        error = float((out - want).norm() / want.norm())
        assert error <= (2e-6 if dtype == torch.float32 else 2 * TF32), (a_size, g_size)


@pytest.mark.numeric
@pytest.mark.parametrize("m", [256, 512])
def test_fft_split_tokens_and_row_chunks(m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits whose last part is short, more rows than the workspace holds, and the same numbers either way."""
    monkeypatch.setattr(common, "token_splits", lambda *_: 3)
    sketch = TensorSketch(30, 40, m)
    a, g = torch.randn(3, 10, 40), torch.randn(3, 10, 30)
    out = torch.zeros(3, m)
    fft.linear_fft(LinearCall(out, a, g, sketch.tables(), m, "fft"), workspace=2 * 3 * 8 * m)
    expected_linear(a, g, sketch).check(out)
    again = torch.zeros(3, m)
    fft.linear_fft(LinearCall(again, a, g, sketch.tables(), m, "fft"))
    assert torch.equal(out, again)


@pytest.mark.numeric
@pytest.mark.parametrize("route", ["fft", "direct"])
def test_strided_inputs(route: str) -> None:
    """Feature-major, every other token, and one example expanded over all rows (stride 0)."""
    m, rows, tokens = 256, 3, 4
    sketch = TensorSketch(20, 30, m)
    a = small_integers(rows, 30, 2 * tokens).transpose(1, 2)[:, ::2]
    g = small_integers(1, tokens, 40)[..., ::2].expand(rows, tokens, 20)
    out = torch.zeros(m, rows).T
    run = fft.linear_fft if route == "fft" else direct.linear_direct
    run(LinearCall(out, a, g, sketch.tables(), m, route))
    expected = expected_linear(a, g, sketch)
    expected.check(out)
    assert route == "fft" or torch.equal(out.double(), expected.exact)


# Triton's interpreter multiplies the bit patterns of bf16 (3.7.1), so that product is left to tests/gpu.
@pytest.mark.numeric
@pytest.mark.parametrize(("dtype", "mixed"), [(torch.float16, False), (torch.float16, True), (torch.bfloat16, True)])
def test_half_inputs(dtype: torch.dtype, mixed: bool) -> None:
    """Integers are exact in 16 bits and sums are fp32, but fft multiplies transforms of 16-bit inputs in fp16."""
    m = 256
    sketch = TensorSketch(20, 30, m)
    a = small_integers(2, 40, 30).to(dtype)
    g = small_integers(2, 40, 20).to(torch.float32 if mixed else dtype)
    expected = expected_linear(a, g, sketch)
    exact, close = torch.zeros(2, m), torch.zeros(2, m)
    direct.linear_direct(LinearCall(exact, a, g, sketch.tables(), m, "direct"))
    fft.linear_fft(LinearCall(close, a, g, sketch.tables(), m, "fft"))
    assert torch.equal(exact.double(), expected.exact)
    (expected if mixed else replace(expected, eps=TF32 / 2)).check(close)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_add(shape: tuple[int, int]) -> None:
    m = 256
    sketch = TensorSketch(20, 30, m)
    a, g = torch.randn(*shape, 30), torch.randn(*shape, 20)
    before = torch.randn(shape[0], m)
    for run in (fft.linear_fft, direct.linear_direct):
        out = before.clone()
        run(LinearCall(out, a, g, sketch.tables(), m, "direct"))
        assert torch.equal(out, before)


def test_planner_knows_the_sizes_of_the_kernel() -> None:
    assert set(cost.FFT_CYCLES) == set(transforms.FINISH)


def test_launcher_passes_the_metric_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch_routes, "linear_direct", lambda *_: pytest.fail("fell back to torch"))
    sketch, out = TensorSketch(20, 70, 32), torch.zeros(2, 32)
    a, g, metric = small_integers(2, 6, 70), small_integers(2, 6, 20), small_integers(20, 70)
    launch.linear_sketch_(LinearCall(out, a, g, sketch.tables(), 32, "direct", metric))
    want = reference.tensor_sketch(metric.double() * reference.linear_grads(a, g), sketch)
    assert torch.equal(out.double(), want)


def test_launcher_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel serves which call: route, sketch size, dtype, determinism."""
    ran: list[str] = []
    for module, name in ((fft, "linear_fft"), (direct, "linear_direct")):
        monkeypatch.setattr(module, name, lambda *_, tag=f"kernel {name}", **__: ran.append(tag))
    for name in ("linear_fft", "linear_direct"):
        monkeypatch.setattr(torch_routes, name, lambda *_, tag=f"torch {name}": ran.append(tag))
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())

    def call(m: int, route: str, dtype: torch.dtype = torch.float32, metric: Tensor | None = None) -> str:
        a, g = torch.zeros(1, 1, 3, dtype=dtype), torch.zeros(1, 1, 2, dtype=dtype)
        launch.linear_sketch_(LinearCall(torch.zeros(1, m), a, g, [], m, route, metric))
        return ran.pop()

    assert call(256, "fft") == "kernel linear_fft"
    assert call(256, "direct") == "kernel linear_direct"
    assert call(300, "fft") == "torch linear_fft"
    assert call(300, "direct") == "kernel linear_direct"
    assert call(256, "direct", torch.float64) == "torch linear_direct"
    torch.use_deterministic_algorithms(True)
    assert call(256, "direct") == "kernel linear_fft"
    assert call(300, "direct") == "torch linear_direct"
    assert call(256, "direct", metric=torch.ones(2, 3)) == "torch linear_direct"  # fft cannot apply it
