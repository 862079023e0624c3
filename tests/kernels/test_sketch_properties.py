"""Properties of the sketch functions, over shapes, dtypes and layouts."""

from __future__ import annotations

from typing import Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sketch_cases import DTYPES, ROUTES, assert_sketches, expected_linear, integers
from torch import Tensor

import sdi_kernels as sk
from sdi_kernels import TensorSketch, reference

pytestmark = pytest.mark.numeric

Layout = Literal["contiguous", "transposed", "strided", "expanded", "offset"]
property_test = settings(max_examples=35, deadline=None, derandomize=True, database=None)


def laid_out(values: Tensor, layout: Layout) -> Tensor:
    """The same values with other strides."""
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        return torch.stack([values, torch.full_like(values, 99)], -1)[..., 0]
    if layout == "expanded" and values.dim() > 2:  # equal entries along the first dimension, stride 0
        return values[:1].expand_as(values)
    if layout == "offset":
        wide = torch.full((*values.shape[:-1], values.shape[-1] + 3), 99).to(values.dtype)
        wide[..., 2:-1] = values
        return wide[..., 2:-1]
    return values


@st.composite
def linear_problems(draw: st.DrawFn) -> tuple[TensorSketch, Tensor, Tensor, sk.Route]:
    size = st.integers(1, 20)
    sketch = TensorSketch(
        draw(size), draw(size), draw(size), seed=draw(st.integers()), hashing=draw(st.sampled_from(sk.HASH_FAMILIES))
    )
    lead = draw(st.lists(st.integers(0, 3), max_size=3))
    tokens = draw(st.integers(0, 5))
    layout = st.sampled_from(get_args(Layout))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    a, g = (
        laid_out(integers(*lead, tokens, d, dtype=draw(st.sampled_from(DTYPES))), draw(layout))
        for d in (sketch.d_in, sketch.d_out)
    )
    return sketch, a, g, draw(st.sampled_from(ROUTES))


@property_test
@given(linear_problems())
def test_linear_for_any_shape(problem: tuple[TensorSketch, Tensor, Tensor, sk.Route]) -> None:
    sketch, a, g, route = problem
    got = sk.sketch_linear_grads(a, g, sketch, route=route)
    assert_sketches(got, reference.sketch_linear_grads(a, g, sketch), exact=route == "direct")


@property_test
@given(linear_problems())
def test_other_functions_for_any_shape(problem: tuple[TensorSketch, Tensor, Tensor, sk.Route]) -> None:
    sketch, a, g, _ = problem
    grads = reference.linear_grads(a, g)
    assert_sketches(sk.sketch_matrix_grads(grads, sketch), reference.tensor_sketch(grads, sketch))
    assert_sketches(sk.sketch_vector_grads(g, sketch.out), reference.sketch_vector_grads(g, sketch.out))
    ids = torch.randint(sketch.d_out, a.shape[:-1])
    assert_sketches(sk.sketch_embedding_grads(ids, a, sketch), reference.sketch_embedding_grads(ids, a, sketch))


@property_test
@given(linear_problems())
def test_embedding_is_linear_with_one_hot_gradients(
    problem: tuple[TensorSketch, Tensor, Tensor, sk.Route],
) -> None:
    sketch, a, _, _ = problem
    ids = torch.randint(sketch.d_out, a.shape[:-1])
    one_hot = torch.nn.functional.one_hot(ids, sketch.d_out).to(a.dtype)
    as_linear = sk.sketch_linear_grads(a, one_hot, sketch, route="direct")
    assert_sketches(sk.sketch_embedding_grads(ids, a, sketch), as_linear.double())


@property_test
@given(linear_problems())
def test_transposed_sketch_of_the_transposed_gradient(
    problem: tuple[TensorSketch, Tensor, Tensor, sk.Route],
) -> None:
    sketch, a, g, route = problem
    want = sk.sketch_linear_grads(a, g, sketch, route="direct").double()
    assert_sketches(sk.sketch_linear_grads(g, a, sketch.T, route=route), want, exact=route == "direct")
    assert_sketches(sk.sketch_matrix_grads(reference.linear_grads(g, a), sketch.T), want)


@property_test
@given(linear_problems(), st.integers(0, 5))
def test_tokens_can_be_split_anywhere(problem: tuple[TensorSketch, Tensor, Tensor, sk.Route], cut: int) -> None:
    """Steps, micro-batches of tokens, padding: a sketch is a sum over tokens (conservation, eq. 2)."""
    sketch, a, g, route = problem
    want = sk.sketch_linear_grads(a, g, sketch, route="direct").double()
    parts = [
        sk.sketch_linear_grads(a[..., part, :], g[..., part, :], sketch, route=route)
        for part in (slice(None, cut), slice(cut, None))
    ]
    assert_sketches(parts[0] + parts[1], want, exact=route == "direct")


@property_test
@given(linear_problems())
def test_linear_in_either_argument(problem: tuple[TensorSketch, Tensor, Tensor, sk.Route]) -> None:
    sketch, a, g, route = problem
    a, g, exact = a.float(), g.float(), route == "direct"
    other_a, other_g = integers(*a.shape), integers(*g.shape)

    def f(a: Tensor, g: Tensor) -> Tensor:
        return sk.sketch_linear_grads(a, g, sketch, route=route)

    assert_sketches(f(2 * a - other_a, g), (2 * f(a, g) - f(other_a, g)).double(), exact=exact)
    assert_sketches(f(a, 2 * g - other_g), (2 * f(a, g) - f(a, other_g)).double(), exact=exact)


@pytest.mark.parametrize("route", ["direct", "fft"])
def test_conservation(route: sk.Route) -> None:
    """The sketches of the steps add up to the sketch of the full gradient (eq. 2)."""
    sketch = TensorSketch(64, 48, 128)
    a, g = torch.randn(5, 12, 16, 48), torch.randn(5, 12, 16, 64)
    steps = sk.sketch_linear_grads(a, g, sketch, route=route)
    full = sk.sketch_linear_grads(a.flatten(1, 2), g.flatten(1, 2), sketch, route=route)
    assert steps.shape == (5, 12, 128)
    expected = expected_linear(a.flatten(1, 2), g.flatten(1, 2), sketch)
    expected.check(steps.sum(1), "sum of the steps:")
    expected.check(full, "full gradient:")
    for wrong in (steps[:, 1:].sum(1), steps.sum(1) + steps[:, 0]):
        assert expected.excess(wrong) > 100, "a step left out, or counted twice, goes unnoticed"
