"""The published package (step-decomposed-influence, imported as ``sdi``) as an oracle: its tables, its numbers."""

from __future__ import annotations

import pytest
import torch
from accuracy import Expected
from sdi import sketch as published
from sketch_cases import expected_embedding, expected_linear, expected_vector
from torch import Tensor

import sdi_kernels as sk
from sdi_kernels import CountSketch, TensorSketch

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
shapes = pytest.mark.parametrize(
    ("d_out", "d_in", "m"), [(64, 48, 256), (96, 160, 64), (50, 300, 101), (7, 5, 2048), (3, 3, 1)]
)
routes = pytest.mark.parametrize("route", ["direct", "fft"])


def both(d_out: int, d_in: int, m: int) -> tuple[object, TensorSketch]:
    """A sketch of the package, with the tables it drew, and ours from the same tables."""
    spec = published.make_tensor_sketch(
        d_out=d_out, d_in=d_in, m=m, device=CPU, generator=torch.Generator().manual_seed(5)
    )
    return spec, TensorSketch.from_tables(spec.h_out, spec.s_out, spec.h_in, spec.s_in, spec.m)


def assert_same(got: Tensor, published: Tensor, expected: Expected) -> None:
    """Both as accurate as plain torch: then they agree, however much cancels in them."""
    assert got.shape == published.shape
    assert got.dtype == published.dtype
    expected.check(published, "the package's:")
    expected.check(got, "ours:")


@shapes
@routes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear(d_out: int, d_in: int, m: int, route: sk.Route, dtype: torch.dtype) -> None:
    spec, sketch = both(d_out, d_in, m)
    a, g = torch.randn(4, 17, d_in).to(dtype), torch.randn(4, 17, d_out).to(dtype)
    want = published.tensor_sketch_linear_weight(activations=a, backprops=g, spec=spec)
    assert_same(sk.sketch_linear_grads(a, g, sketch, route=route), want, expected_linear(a, g, sketch))


@shapes
def test_linear_without_tokens(d_out: int, d_in: int, m: int) -> None:
    """(examples, features), which the package takes for one token each."""
    spec, sketch = both(d_out, d_in, m)
    a, g = torch.randn(4, d_in), torch.randn(4, d_out)
    want = published.tensor_sketch_linear_weight(activations=a, backprops=g, spec=spec)
    a, g = a[:, None], g[:, None]
    assert_same(sk.sketch_linear_grads(a, g, sketch), want, expected_linear(a, g, sketch))


@shapes
def test_embedding(d_out: int, d_in: int, m: int) -> None:
    spec, sketch = both(d_out, d_in, m)
    ids, g = torch.randint(d_out, (4, 17)), torch.randn(4, 17, d_in)
    want = published.tensor_sketch_embedding_weight(token_ids=ids, backprops=g, spec=spec)
    assert_same(sk.sketch_embedding_grads(ids, g, sketch), want, expected_embedding(ids, g, sketch))


@pytest.mark.parametrize(("d", "m"), [(64, 256), (300, 101), (5, 1)])
def test_vector(d: int, m: int) -> None:
    spec = published.make_count_sketch(d=d, m=m, device=CPU, generator=torch.Generator().manual_seed(5))
    sketch = CountSketch.from_tables(spec.h, spec.s, spec.m)
    grads = torch.randn(4, d)
    want, one = published.count_sketch_vector(grads, spec=spec), grads[:, None]
    assert_same(sk.sketch_vector_grads(one, sketch), want, expected_vector(one, sketch))
    tokens = torch.randn(4, 17, d)
    want = published.count_sketch_tokens(tokens, spec=spec).sum(1)
    assert_same(sk.sketch_vector_grads(tokens, sketch), want, expected_vector(tokens, sketch))


@routes
def test_sketched_linear(route: sk.Route) -> None:
    """The whole layer: what the package computes from hooks, ours from the backward pass."""
    spec, sketch = both(48, 32, 128)
    x, weight = torch.randn(4, 17, 32), torch.randn(48, 32, requires_grad=True)
    out = torch.zeros(4, 128)
    y = sk.sketched_linear(x, weight, sketch=sketch, out=out, route=route)
    g = torch.randn_like(y)
    y.backward(g)
    want = published.tensor_sketch_linear_weight(activations=x, backprops=g, spec=spec)
    assert_same(out, want, expected_linear(x, g, sketch))
