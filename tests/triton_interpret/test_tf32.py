"""One tf32 product as tensor cores form it, which cut the low bits of its operands off: no bias, small errors."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from sdi_kernels import TensorSketch, reference
from sdi_kernels.calls import LinearCall
from sdi_kernels.triton import direct, fft, pairwise, rounding, shear

BIAS, ERROR = 3e-4, 1.1e-3

pytestmark = pytest.mark.usefixtures("cut_tf32")


def inputs(sketch: TensorSketch, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Activations, and output gradients that are smaller from token to token."""
    a = 30 * torch.randn(1, tokens, sketch.d_in)
    g = torch.randn(1, tokens, sketch.d_out) * 10.0 ** -torch.arange(1.0, tokens + 1)[:, None]
    return a.to(dtype), g.to(dtype)


def assert_unbiased(*results: tuple[Tensor, Tensor]) -> None:
    """Each result is near what is wanted; over all of them, errors do not lean to one side.

    Of a single result the bias may well be 2.8e-4 by chance (80 draws of fft at m = 1024), so it is averaged.
    """
    biases = [float((got.double() * want).sum() / (want * want).sum() - 1) for got, want in results]
    bias = sum(biases) / len(biases)
    assert abs(bias) <= BIAS, f"bias {bias:+.2e}"
    for got, want in results:
        error = float((got - want).norm() / want.norm())
        assert error <= ERROR, f"error {error:.2e}"


def random_sketch(m: int, hashing: str = "balanced") -> TensorSketch:
    d_out, d_in = (int(2 ** (3 + 7 * x)) for x in torch.rand(2))
    return TensorSketch(d_out, min(d_in, m) if hashing == "block" else d_in, m, hashing=hashing)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("m", [256, 512, 1024, 2048, 4096])
def test_fft(m: int, dtype: torch.dtype) -> None:
    torch.set_float32_matmul_precision("high")
    results = []
    for tokens in (1, 4):
        sketch = random_sketch(m)
        (a, g), out = inputs(sketch, tokens, dtype), torch.zeros(1, m)
        fft.linear_fft(LinearCall(out, a, g, sketch.tables(), m, "fft"))
        results.append((out, reference.sketch_linear_grads(a, g, sketch)))
    assert_unbiased(*results)


@pytest.mark.parametrize("kernel", ["direct", "shear"])
def test_products_of_fp32(kernel: str) -> None:
    torch.set_float32_matmul_precision("high")
    results = []
    for _ in range(3):
        sketch = random_sketch(256, "block" if kernel == "shear" else "balanced")
        (a, g), out = inputs(sketch, 4, torch.float32), torch.zeros(1, 256)
        run = shear.linear_shear if kernel == "shear" else direct.linear_direct
        run(LinearCall(out, a, g, sketch.tables(), 256, kernel))
        results.append((out, reference.sketch_linear_grads(a, g, sketch)))
    assert_unbiased(*results)


def test_pairwise() -> None:
    torch.set_float32_matmul_precision("high")
    a, g = torch.rand(3, 20, 50), torch.rand(3, 20, 40)
    want = (reference.linear_grads(a, g) ** 2).sum((1, 2))
    assert_unbiased((pairwise.pairwise(a, g, a, g), want))


@triton.jit
def _operand_kernel(p_y, p_x, N: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, rounding.operand(tl.load(p_x + o), PRECISION))


def test_operands_are_rounded_to_nearest() -> None:
    x = torch.randn(1024) * 10.0 ** torch.randint(-30, 30, (1024,))
    y = torch.empty_like(x)
    _operand_kernel[(1,)](y, x, N=1024, PRECISION="tf32")
    assert (y.view(torch.int32) & 0x1FFF == 0).all()  # nothing is left to cut off
    unit = 2.0 ** (x.abs().double().log2().floor() - 10)
    assert ((y.double() - x.double()).abs() <= unit / 2).all()
    few = x.bfloat16().float()
    _operand_kernel[(1,)](y, few, N=1024, PRECISION="tf32")
    assert torch.equal(y, few)
    _operand_kernel[(1,)](y, x, N=1024, PRECISION="tf32x3")
    assert torch.equal(y, x)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_seen(value: float) -> None:
    """A GPU's NaN has all bits set: half a unit more would make it zero."""
    torch.set_float32_matmul_precision("high")
    sketch, out = TensorSketch(20, 30, 256), torch.zeros(1, 256)
    bad = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32) if math.isnan(value) else value
    for run in (fft.linear_fft, direct.linear_direct):
        a, g = inputs(sketch, 2, torch.float32)
        a[0, 1, 3] = bad
        run(LinearCall(out.zero_(), a, g, sketch.tables(), 256, "direct"))
        assert not torch.isfinite(out).all()
