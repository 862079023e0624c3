"""The public sketch functions against their naive twins, and the twins against the definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sketch_cases import (
    DTYPES,
    ROUTES,
    SKETCH,
    assert_sketches,
    dtypes,
    expected_linear,
    expected_vector,
    families,
    integers,
)

import sdi_kernels as sk
from sdi_kernels import CountSketch, HashFamily, TensorSketch, reference

pytestmark = pytest.mark.numeric

# (d_out, d_in, m): both sides below m, both above, one of each, equal, and the degenerate ones.
SIZES = [(5, 4, 16), (20, 12, 7), (20, 6, 8), (3, 30, 9), (16, 16, 16), (4, 5, 1), (1, 1, 1), (1, 1, 12), (2, 1, 2)]
sizes = pytest.mark.parametrize(("d_out", "d_in", "m"), SIZES)


# ---------------------------------------------------------------------------------------------------------------
# The twins are the definitions


def test_twins_are_the_definitions() -> None:
    """The twins against Definitions 3 and 4 of the paper, entry by entry in Python."""
    sketch = TensorSketch(4, 3, 5, hashing="iid")
    matrix, vector = integers(4, 3), integers(4)
    ts, cs = [0.0] * 5, [0.0] * 5
    for i in range(4):
        cs[sketch.out.bucket[i]] += int(sketch.out.sign[i]) * vector[i].item()
        for j in range(3):
            p = (int(sketch.out.bucket[i]) + int(sketch.inp.bucket[j])) % 5
            ts[p] += int(sketch.out.sign[i]) * int(sketch.inp.sign[j]) * matrix[i, j].item()
    assert reference.tensor_sketch(matrix, sketch).tolist() == ts
    assert reference.count_sketch(vector, sketch.out).tolist() == cs


def test_twins_form_the_gradients_of_autograd() -> None:
    weight = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    a, g = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    torch.nn.functional.linear(a, weight).backward(g)
    torch.testing.assert_close(reference.linear_grads(a, g), weight.grad)

    ids = torch.tensor([0, 4, 4, 1])
    weight.grad = None
    torch.nn.functional.embedding(ids, weight).backward(g[:4, :4])
    torch.testing.assert_close(reference.embedding_grads(ids, g[:4, :4], 5), weight.grad)


# ---------------------------------------------------------------------------------------------------------------
# Every function against its twin


@families
@sizes
@dtypes
@pytest.mark.parametrize("route", ["direct", "fft"])
def test_linear(hashing: HashFamily, d_out: int, d_in: int, m: int, dtype: torch.dtype, route: sk.Route) -> None:
    sketch = TensorSketch(d_out, d_in, m, hashing=hashing)
    a, g = integers(3, 6, d_in, dtype=dtype), integers(3, 6, d_out, dtype=dtype)
    got = sk.sketch_linear_grads(a, g, sketch, route=route)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_sketches(got, reference.sketch_linear_grads(a, g, sketch), exact=route == "direct")


@families
@sizes
@dtypes
def test_matrix(hashing: HashFamily, d_out: int, d_in: int, m: int, dtype: torch.dtype) -> None:
    sketch = TensorSketch(d_out, d_in, m, hashing=hashing)
    grads = integers(3, d_out, d_in, dtype=dtype)
    assert_sketches(sk.sketch_matrix_grads(grads, sketch), reference.tensor_sketch(grads, sketch))


@families
@sizes
@dtypes
def test_embedding(hashing: HashFamily, d_out: int, d_in: int, m: int, dtype: torch.dtype) -> None:
    sketch = TensorSketch(d_out, d_in, m, hashing=hashing)
    ids, g = torch.randint(d_out, (3, 6)), integers(3, 6, d_in, dtype=dtype)
    assert_sketches(sk.sketch_embedding_grads(ids, g, sketch), reference.sketch_embedding_grads(ids, g, sketch))


@families
@sizes
@dtypes
def test_vector(hashing: HashFamily, d_out: int, d_in: int, m: int, dtype: torch.dtype) -> None:
    sketch = CountSketch(d_out, m, hashing=hashing)
    for tokens in (1, 6):
        grads = integers(3, tokens, d_out, dtype=dtype)
        got = sk.sketch_vector_grads(grads, sketch)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_sketches(got, reference.sketch_vector_grads(grads, sketch))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_embedding_takes_any_integer_ids(dtype: torch.dtype) -> None:
    sketch = TensorSketch(9, 4, 8)
    ids, g = torch.randint(9, (2, 5)), integers(2, 5, 4)
    assert_sketches(
        sk.sketch_embedding_grads(ids.to(dtype), g, sketch), reference.sketch_embedding_grads(ids, g, sketch)
    )


@families
@pytest.mark.parametrize("route", ROUTES)
def test_float64_is_float64_throughout(hashing: HashFamily, route: sk.Route) -> None:
    sketch = TensorSketch(40, 33, 64, hashing=hashing)
    a, g = torch.randn(2, 9, 33, dtype=torch.float64), torch.randn(2, 9, 40, dtype=torch.float64)
    want = reference.sketch_linear_grads(a, g, sketch)
    torch.testing.assert_close(sk.sketch_linear_grads(a, g, sketch, route=route), want, rtol=1e-12, atol=1e-12)
    # One float64 input is enough: the other is not what loses the digits.
    mixed = sk.sketch_linear_grads(a.float(), g, sketch, route=route)
    want = reference.sketch_linear_grads(a.float(), g, sketch)
    torch.testing.assert_close(mixed, want, rtol=1e-12, atol=1e-12)


@families
@pytest.mark.parametrize("route", ["direct", "fft"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_error_is_that_of_torch_in_float32(hashing: HashFamily, route: sk.Route, dtype: torch.dtype) -> None:
    """Inputs are taken as they are, and everything after is float32."""
    sketch = TensorSketch(96, 80, 128, hashing=hashing)
    tokens = 120
    a, g = torch.randn(3, tokens, 80).to(dtype), torch.randn(3, tokens, 96).to(dtype)
    expected = expected_linear(a, g, sketch)
    if route == "fft":  # what torch makes of the definition by Fourier transforms, without blocks or reordering
        h_out, s_out, _, h_in, s_in, _ = sketch.tables()
        left = torch.zeros(3, tokens, 128).index_add(-1, h_out, g.float() * s_out)
        right = torch.zeros(3, tokens, 128).index_add(-1, h_in, a.float() * s_in)
        plain = torch.fft.irfft((torch.fft.rfft(left) * torch.fft.rfft(right)).sum(1), n=128)
        expected = replace(expected, plain=plain)
    expected.check(sk.sketch_linear_grads(a, g, sketch, route=route))


@pytest.mark.parametrize("route", ["direct", "fft"])
def test_sides_of_very_different_size(route: sk.Route) -> None:
    """Gradients are often millions of times smaller than activations: no route may round one by the other's size."""
    sketch = TensorSketch(96, 80, 128)
    a, g = 1e4 * torch.randn(2, 9, 80), 1e-9 * torch.randn(2, 9, 96)
    expected_linear(a, g, sketch).check(sk.sketch_linear_grads(a, g, sketch, route=route))


@pytest.mark.parametrize("route", ["direct", "fft"])
@pytest.mark.parametrize("size", [2.0**14, 2.0**-14])
def test_products_beyond_the_range_of_the_inputs(route: sk.Route, size: float) -> None:
    """float16 inputs whose products overflow, or vanish, in float16."""
    a, g = (torch.full((1, 3, d), size, dtype=torch.float16) for d in (4, 5))
    expected = expected_linear(a, g, SKETCH)
    assert expected.exact.abs().max() > 0
    expected.check(sk.sketch_linear_grads(a, g, SKETCH, route=route))


@dtypes
def test_long_sums_keep_float32_accuracy(dtype: torch.dtype) -> None:
    """A sum over many tokens of low-precision values is not taken in their own precision."""
    sketch = CountSketch(8, 16)
    grads = torch.randn(2, 20_000, 8).to(dtype)
    expected_vector(grads, sketch).check(sk.sketch_vector_grads(grads, sketch))


def test_no_leading_dimension() -> None:
    sketch = TensorSketch(5, 4, 7)
    a, g, ids = integers(3, 4), integers(3, 5), torch.tensor([4, 0, 4])
    assert sk.sketch_linear_grads(a, g, sketch).shape == (7,)
    assert sk.sketch_matrix_grads(integers(5, 4), sketch).shape == (7,)
    assert sk.sketch_embedding_grads(ids, a, sketch).shape == (7,)
    assert sk.sketch_vector_grads(g, sketch.out).shape == (7,)
