"""Sketch objects, and the public sketch functions against their naive twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sdi_kernels as sk
from sdi_kernels import CountSketch, HashFamily, TensorSketch, reference
from sdi_kernels.hashing import MAX_SKETCH_SIZE, inverse_table

Layout = Literal["contiguous", "transposed", "strided", "expanded", "offset"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROUTES = ("auto", "direct", "fft")
# (d_out, d_in, m): both sides below m, both above, one of each, equal, and the degenerate ones.
SIZES = [(5, 4, 16), (20, 12, 7), (20, 6, 8), (3, 30, 9), (16, 16, 16), (4, 5, 1), (1, 1, 1), (1, 1, 12), (2, 1, 2)]

families = pytest.mark.parametrize("hashing", sk.HASH_FAMILIES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
sizes = pytest.mark.parametrize(("d_out", "d_in", "m"), SIZES)
property_test = settings(max_examples=35, deadline=None, derandomize=True, database=None)


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers: every sum below is exact in every dtype, so the order of a scatter cannot matter."""
    return torch.randint(-3, 4, shape).to(dtype)


def assert_sketches(got: Tensor, want: Tensor, *, exact: bool = True) -> None:
    """``got`` is a sketch in its own dtype, ``want`` the float64 twin's."""
    assert got.shape == want.shape
    if exact:
        torch.testing.assert_close(got.double(), want, rtol=0, atol=0)
    else:  # integers through a Fourier transform
        atol = 1e-10 if got.dtype == torch.float64 else 2e-3
        torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


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
    """Inputs are taken as they are and everything after is float32: at most twice the error of plain torch."""
    sketch = TensorSketch(96, 80, 128, hashing=hashing)
    tokens = 120
    a, g = torch.randn(3, tokens, 80).to(dtype), torch.randn(3, tokens, 96).to(dtype)
    want = reference.sketch_linear_grads(a, g, sketch)

    h_out, s_out, _, h_in, s_in, _ = sketch.tables()
    if route == "fft":
        left = torch.zeros(3, tokens, 128).index_add(-1, h_out, g.float() * s_out)
        right = torch.zeros(3, tokens, 128).index_add(-1, h_in, a.float() * s_in)
        plain = torch.fft.irfft((torch.fft.rfft(left) * torch.fft.rfft(right)).sum(1), n=128)
    else:
        signed = torch.einsum("bto,bti->boi", g.float(), a.float()) * s_out[:, None] * s_in
        plain = torch.zeros(3, 128).index_add(1, ((h_out[:, None] + h_in) % 128).flatten(), signed.flatten(1))
    got = sk.sketch_linear_grads(a, g, sketch, route=route)
    error, torchs = (((x - want).norm() / want.norm()).item() for x in (got, plain))
    assert error <= 2 * torchs + 1e-7
    assert error < 1e-6


@pytest.mark.parametrize("route", ["direct", "fft"])
def test_sides_of_very_different_size(route: sk.Route) -> None:
    """Gradients are often millions of times smaller than activations: no route may round one by the other's size."""
    sketch = TensorSketch(96, 80, 128)
    a, g = 1e4 * torch.randn(2, 9, 80), 1e-9 * torch.randn(2, 9, 96)
    want = reference.sketch_linear_grads(a, g, sketch)
    got = sk.sketch_linear_grads(a, g, sketch, route=route)
    assert ((got - want).norm() / want.norm()).item() < 1e-6


@pytest.mark.parametrize("route", ["direct", "fft"])
@pytest.mark.parametrize("size", [2.0**14, 2.0**-14])
def test_products_beyond_the_range_of_the_inputs(route: sk.Route, size: float) -> None:
    """float16 inputs whose products overflow, or vanish, in float16."""
    a, g = (torch.full((1, 3, d), size, dtype=torch.float16) for d in (4, 5))
    want = reference.sketch_linear_grads(a, g, SKETCH)
    assert want.abs().max() > 0
    got = sk.sketch_linear_grads(a, g, SKETCH, route=route)
    assert ((got - want).norm() / want.norm()).item() < 1e-6


@dtypes
def test_long_sums_keep_float32_accuracy(dtype: torch.dtype) -> None:
    """A sum over many tokens of low-precision values is not taken in their own precision."""
    sketch = CountSketch(8, 16)
    grads = torch.randn(2, 20_000, 8).to(dtype)
    want = reference.sketch_vector_grads(grads, sketch)
    torch.testing.assert_close(sk.sketch_vector_grads(grads, sketch).double(), want, rtol=1e-5, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------
# Properties, over shapes, dtypes and layouts


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
    """The sketches of the steps add up to the sketch of the full gradient (eq. 2), to 1e-6 in float32."""
    sketch = TensorSketch(64, 48, 128)
    a, g = torch.randn(5, 12, 16, 48), torch.randn(5, 12, 16, 64)
    steps = sk.sketch_linear_grads(a, g, sketch, route=route)
    full = sk.sketch_linear_grads(a.flatten(1, 2), g.flatten(1, 2), sketch, route=route)
    assert steps.shape == (5, 12, 128)
    assert ((steps.sum(1) - full).norm() / full.norm()).item() < 1e-6


def test_no_leading_dimension() -> None:
    sketch = TensorSketch(5, 4, 7)
    a, g, ids = integers(3, 4), integers(3, 5), torch.tensor([4, 0, 4])
    assert sk.sketch_linear_grads(a, g, sketch).shape == (7,)
    assert sk.sketch_matrix_grads(integers(5, 4), sketch).shape == (7,)
    assert sk.sketch_embedding_grads(ids, a, sketch).shape == (7,)
    assert sk.sketch_vector_grads(g, sketch.out).shape == (7,)


Call = Callable[..., Tensor]
SKETCH = TensorSketch(5, 4, 7)


def call(kind: str, lead: tuple[int, ...], tokens: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Call, Tensor]:
    """One of the public functions on integers, ready to be called with ``out=``, and its twin's result."""
    a, g = integers(*lead, tokens, 4, dtype=dtype), integers(*lead, tokens, 5, dtype=dtype)
    ids = torch.randint(5, (*lead, tokens))
    if kind == "matrix":
        grads = integers(*lead, 5, 4, dtype=dtype)
        return lambda **kw: sk.sketch_matrix_grads(grads, SKETCH, **kw), reference.tensor_sketch(grads, SKETCH)
    if kind == "embedding":
        want = reference.sketch_embedding_grads(ids, a, SKETCH)
        return lambda **kw: sk.sketch_embedding_grads(ids, a, SKETCH, **kw), want
    if kind == "vector":
        want = reference.sketch_vector_grads(g, SKETCH.out)
        return lambda **kw: sk.sketch_vector_grads(g, SKETCH.out, **kw), want
    want = reference.sketch_linear_grads(a, g, SKETCH)
    return lambda **kw: sk.sketch_linear_grads(a, g, SKETCH, route=kind, **kw), want


kinds = pytest.mark.parametrize("kind", ["direct", "fft", "matrix", "embedding", "vector"])


@kinds
@pytest.mark.parametrize(("lead", "tokens"), [((3,), 0), ((0,), 2), ((2, 0), 2), ((0,), 0), ((), 0)], ids=str)
def test_nothing_to_sum(kind: str, lead: tuple[int, ...], tokens: int) -> None:
    f, _ = call(kind, lead, tokens)
    if kind != "matrix":
        assert torch.equal(f(), torch.zeros(*lead, 7))
    assert f().shape == (*lead, 7)
    out = torch.ones(*lead, 7)
    f(out=out)
    if kind != "matrix":
        assert torch.equal(out, torch.ones(*lead, 7))


# ---------------------------------------------------------------------------------------------------------------
# out=


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_out_is_added_to_and_returned(kind: str, dtype: torch.dtype) -> None:
    f, want = call(kind, (3,), dtype=dtype)
    out = integers(3, 7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    before = out.clone()
    assert f(out=out) is out
    assert f(out=out) is out
    assert_sketches(out, before + 2 * want, exact=kind != "fft")


# Where the slots of one (examples, steps, m) buffer lie: a step's slot, an m-slice, a transposed buffer, a gap
# between the last two dimensions.
SLOTS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "step": lambda: (b := torch.full((3, 4, 7), 5.0), b[:, 2]),
    "columns": lambda: (b := torch.full((3, 20), 5.0), b[:, 6:13]),
    "transposed": lambda: (b := torch.full((7, 3), 5.0), b.T),
    "every second": lambda: (b := torch.full((6, 14), 5.0), b[::2, ::2]),
}


@kinds
@pytest.mark.parametrize("slot", SLOTS)
def test_out_may_be_a_slice(kind: str, slot: str) -> None:
    f, want = call(kind, (3,))
    buffer, out = SLOTS[slot]()
    assert f(out=out) is out
    assert_sketches(out, 5 + want, exact=kind != "fft")
    out.fill_(5)
    assert torch.equal(buffer, torch.full_like(buffer, 5)), "something beside the slot was written"


@kinds
def test_out_may_have_leading_dimensions_that_do_not_merge(kind: str) -> None:
    f, want = call(kind, (2, 3))
    buffer = torch.full((3, 4, 2, 7), 5.0)
    out = buffer[:, 1].transpose(0, 1)
    assert f(out=out) is out
    assert_sketches(out, 5 + want, exact=kind != "fft")
    out.fill_(5)
    assert torch.equal(buffer, torch.full_like(buffer, 5))


def test_out_is_not_differentiated_through() -> None:
    a, g = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    out = torch.zeros(2, 7)
    assert not sk.sketch_linear_grads(a, g, SKETCH, out=out).requires_grad
    assert sk.sketch_linear_grads(a, g, SKETCH).requires_grad


# ---------------------------------------------------------------------------------------------------------------
# One example never reaches another; modes that surround a call do not change it


@kinds
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_example_stays_alone(kind: str, bad: float) -> None:
    x = {d: integers(4, 6, d) for d in (4, 5)}
    grads, ids = integers(4, 5, 4), torch.randint(5, (4, 6))

    def f() -> Tensor:
        if kind == "matrix":
            return sk.sketch_matrix_grads(grads, SKETCH)
        if kind == "embedding":
            return sk.sketch_embedding_grads(ids, x[4], SKETCH)
        if kind == "vector":
            return sk.sketch_vector_grads(x[5], SKETCH.out)
        return sk.sketch_linear_grads(x[4], x[5], SKETCH, route=kind)  # type: ignore[arg-type]

    clean = f()
    for values in (x[4], x[5], grads):
        values[2, 3, 1] = bad
    spoilt = f()
    assert not torch.isfinite(spoilt[2]).all(), "a bad value was lost"
    assert torch.equal(spoilt[[0, 1, 3]], clean[[0, 1, 3]])


@kinds
def test_autocast_does_not_lower_the_precision(kind: str) -> None:
    x = {d: torch.randn(2, 60, d) for d in (4, 5)}
    ids = torch.randint(5, (2, 60))
    f: dict[str, Callable[[], Tensor]] = {
        "matrix": lambda: sk.sketch_matrix_grads(x[4][:, :5], SKETCH),
        "embedding": lambda: sk.sketch_embedding_grads(ids, x[4], SKETCH),
        "vector": lambda: sk.sketch_vector_grads(x[5], SKETCH.out),
    }
    run = f.get(kind, lambda: sk.sketch_linear_grads(x[4], x[5], SKETCH, route=kind))  # type: ignore[arg-type]
    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_sketch_first_used_in_inference_mode_serves_training() -> None:
    a, g = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    with torch.inference_mode():
        sketch = TensorSketch(5, 4, 7)
        sk.sketch_linear_grads(a, g, sketch)
    g.requires_grad_()
    sk.sketch_linear_grads(a, g, sketch).sum().backward()
    assert g.grad is not None


def test_sketch_made_under_a_default_device_is_a_host_sketch() -> None:
    with torch.device("meta"):
        sketch = TensorSketch(5, 4, 7)
    assert {t.device.type for t in sketch.tables()} == {"cpu"}
    assert sketch.fingerprint == SKETCH.fingerprint


# ---------------------------------------------------------------------------------------------------------------
# Sketch objects


@families
def test_sketch_is_a_pure_function_of_its_arguments(hashing: HashFamily) -> None:
    base: dict[str, Any] = {"d": 30, "m": 40, "seed": 1, "name": "w", "hashing": hashing, "role": "vector"}
    changes: list[dict[str, Any]] = [{}, {"d": 31}, {"m": 41}, {"seed": 2}, {"name": "v"}, {"role": "out"}]
    prints = [CountSketch(**{**base, **change}).fingerprint for change in changes]
    assert len(set(prints)) == len(prints)
    assert CountSketch(**base).fingerprint == prints[0]
    assert CountSketch(**{**base, "seed": np.int64(1)}).fingerprint == prints[0]


def test_sides_of_a_tensor_sketch_are_independent_streams() -> None:
    sketch = TensorSketch(40, 40, 8, hashing="iid", name="w")
    assert not np.array_equal(sketch.out.bucket, sketch.inp.bucket)
    assert not np.array_equal(sketch.out.sign, sketch.inp.sign)
    assert sketch.out.fingerprint == CountSketch(40, 8, hashing="iid", name="w", role="out").fingerprint
    assert sketch.inp.fingerprint == CountSketch(40, 8, hashing="iid", name="w", role="in").fingerprint


def test_fingerprint_covers_every_table() -> None:
    bucket, sign = [0, 1, 2], [1, -1, 1]
    base = CountSketch.from_tables(bucket, sign, 4)
    others = [
        CountSketch.from_tables(bucket, sign, 5),
        CountSketch.from_tables([0, 1, 3], sign, 4),
        CountSketch.from_tables(bucket, [1, -1, -1], 4),
        CountSketch.from_tables([0, 1], [1, -1], 4),
    ]
    assert len({s.fingerprint for s in [base, *others]}) == 5
    pairs = [(base, base), (base, others[1]), (others[1], base)]
    assert len({TensorSketch.from_sides(o, i).fingerprint for o, i in pairs}) == 3


@families
def test_from_tables_takes_arrays_tensors_and_lists(hashing: HashFamily) -> None:
    sketch = TensorSketch(9, 5, 6, hashing=hashing)
    tables = (sketch.out.bucket, sketch.out.sign, sketch.inp.bucket, sketch.inp.sign)
    for convert in (np.asarray, torch.from_numpy, np.ndarray.tolist):
        again = TensorSketch.from_tables(*(convert(t) for t in tables), 6)
        assert again.fingerprint == sketch.fingerprint
        assert again.inp.contiguous == sketch.inp.contiguous


def test_select_sketches_a_slice_of_a_vector() -> None:
    """The part of a fused parameter: CS(x) = CS_a(x[a]) + CS_b(x[b])."""
    sketch, x = CountSketch(10, 6), integers(2, 1, 10)
    rest = np.array([0, 1, 2, 3, 9])
    parts = (sketch.select(slice(4, 9)), x[..., 4:9]), (sketch.select(rest), x[..., rest])
    total = sum(sk.sketch_vector_grads(values, part) for part, values in parts)
    assert torch.equal(total, sk.sketch_vector_grads(x, sketch))


def test_tables() -> None:
    sketch = CountSketch(9, 4, hashing="iid")
    bucket, sign, gather = sketch.tables()
    assert (bucket.dtype, sign.dtype, gather.dtype) == (torch.int32, torch.int8, torch.int32)
    assert bucket.tolist() == sketch.bucket.tolist()
    assert sign.tolist() == sketch.sign.tolist()
    assert gather.tolist() == inverse_table(sketch.bucket, sketch.sign, 4).tolist()
    for device in ("cpu", "meta"):
        tables = sketch.tables(device)
        assert {t.device.type for t in tables} == {device}
        assert sketch.tables(torch.device(device))[0] is tables[0], "tables are copied to a device once"
    both = TensorSketch(9, 5, 4)
    assert [t.tolist() for t in both.tables()] == [t.tolist() for t in [*both.out.tables(), *both.inp.tables()]]


def test_transposing_twice() -> None:
    assert SKETCH.T.T.fingerprint == SKETCH.fingerprint
    assert (SKETCH.T.d_out, SKETCH.T.d_in, SKETCH.T.m) == (4, 5, 7)


def test_repr() -> None:
    assert repr(SKETCH) == "TensorSketch(d_out=5, d_in=4, m=7)"
    assert repr(SKETCH.out) == "CountSketch(d=5, m=7)"


# ---------------------------------------------------------------------------------------------------------------
# Errors: one line that starts with the argument, says what came and what to pass

A, G, IDS = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
linear, matrix, embedding, vector = (
    sk.sketch_linear_grads,
    sk.sketch_matrix_grads,
    sk.sketch_embedding_grads,
    sk.sketch_vector_grads,
)
Case = tuple[Callable[[], object], type[Exception], str]
ERRORS: dict[str, Case] = {
    "d zero": (lambda: CountSketch(0, 4), ValueError, "d: got 0; pass a positive integer"),
    "d float": (lambda: CountSketch(2.0, 4), TypeError, "d: got float 2.0; pass a positive integer"),  # type: ignore[arg-type]
    "d huge": (lambda: CountSketch(2**31 - 1, 4), ValueError, "d: got 2147483647; the largest supported value is"),
    "m negative": (lambda: CountSketch(3, -1), ValueError, "sketch_size: got -1; pass a positive integer"),
    "m none": (lambda: CountSketch(3, None), TypeError, "sketch_size: got NoneType None; pass a positive"),  # type: ignore[arg-type]
    "m huge": (
        lambda: TensorSketch(3, 3, MAX_SKETCH_SIZE + 1),
        ValueError,
        "sketch_size: got 16777217; the largest supported value is 16777216",
    ),
    "d_out": (lambda: TensorSketch(0, 3, 4), ValueError, "d_out: got 0; pass a positive integer"),
    "d_in": (lambda: TensorSketch(3, 0, 4), ValueError, "d_in: got 0; pass a positive integer"),
    "family": (
        lambda: CountSketch(3, 4, hashing="md5"),  # type: ignore[arg-type]
        ValueError,
        "hashing: got 'md5'; use one of 'balanced', 'iid', 'block'",
    ),
    "seed": (lambda: CountSketch(3, 4, seed=1.5), TypeError, "seed: got float 1.5; pass an integer"),  # type: ignore[arg-type]
    "table of floats": (
        lambda: CountSketch.from_tables([0.0, 1.0], [1, 1], 4),  # type: ignore[list-item]
        ValueError,
        "bucket: got shape (2,) of float64; pass a 1-D array of integers",
    ),
    "table of bfloat16": (
        lambda: CountSketch.from_tables([0, 1], torch.ones(2, dtype=torch.bfloat16), 4),
        ValueError,
        "sign: got shape (2,) of float32; pass a 1-D array of integers",
    ),
    "table of two dimensions": (
        lambda: CountSketch.from_tables(np.zeros((2, 2), int), [1, 1], 4),
        ValueError,
        "bucket: got shape (2, 2) of int64; pass a 1-D array of integers",
    ),
    "table lengths": (
        lambda: CountSketch.from_tables([0, 1], [1], 4),
        ValueError,
        "bucket, sign: got lengths 2 and 1; pass equal, non-zero lengths",
    ),
    "bucket too large": (
        lambda: CountSketch.from_tables([0, 4], [1, 1], 4),
        ValueError,
        "bucket: got values in [0, 4]; they must lie in [0, 4)",
    ),
    "bucket negative": (
        lambda: CountSketch.from_tables([-1, 3], [1, 1], 4),
        ValueError,
        "bucket: got values in [-1, 3]; they must lie in [0, 4)",
    ),
    "sign zero": (
        lambda: CountSketch.from_tables([0, 1], [1, 0], 4),
        ValueError,
        "sign: got values other than -1 and +1",
    ),
    "sides": (
        lambda: TensorSketch.from_sides(CountSketch(3, 4), CountSketch(3, 5)),
        ValueError,
        "out, inp: got sketch sizes 4 and 5; they must be equal",
    ),
    "linear: kind of sketch": (
        lambda: linear(A, G, SKETCH.out),  # type: ignore[arg-type]
        TypeError,
        "sketch: got CountSketch; pass a TensorSketch",
    ),
    "vector: kind of sketch": (
        lambda: vector(A, SKETCH),  # type: ignore[arg-type]
        TypeError,
        "sketch: got TensorSketch; pass a CountSketch",
    ),
    "linear: no tensor": (
        lambda: linear([1.0], G, SKETCH),  # type: ignore[arg-type]
        TypeError,
        "activations: got list; pass a torch.Tensor",
    ),
    "linear: dtype": (
        lambda: linear(A, G.long(), SKETCH),
        TypeError,
        "grad_outputs: got dtype torch.int64; pass float32, bfloat16, float16 or float64",
    ),
    "linear: dimensions": (
        lambda: linear(A[0, 0], G, SKETCH),
        ValueError,
        "activations: got shape (4,); pass at least 2 dimensions",
    ),
    "linear: tokens": (
        lambda: linear(A, G[:, :2], SKETCH),
        ValueError,
        "grad_outputs: got leading shape (2, 2), activations have (2, 3); both must be (..., T) over the same tokens",
    ),
    "linear: d_in": (
        lambda: linear(A[..., :3], G, SKETCH),
        ValueError,
        "activations: last dimension is 3, but the sketch was made for d_in=4; pass shape (..., 4) or make the sketch",
    ),
    "linear: d_out": (
        lambda: linear(A, A, SKETCH),
        ValueError,
        "grad_outputs: last dimension is 4, but the sketch was made for d_out=5",
    ),
    "linear: devices": (
        lambda: linear(A, G.to("meta"), SKETCH),
        ValueError,
        "activations: tensors lie on different devices (activations on cpu, grad_outputs on meta); move them together",
    ),
    "linear: route": (
        lambda: linear(A, G, SKETCH, route="fast"),  # type: ignore[arg-type]
        ValueError,
        "route: got 'fast'; use one of 'auto', 'direct', 'fft', 'shear'",
    ),
    "linear: shear needs blocks": (
        lambda: linear(A, G, SKETCH, route="shear"),
        ValueError,
        "route: got 'shear' for TensorSketch(d_out=5, d_in=4, m=7); it needs d_in <= m with inputs hashed in order",
    ),
    "linear: shear with a scale": (
        lambda: linear(A, G, SKETCH, route="shear", scale=torch.ones(5, 4)),
        ValueError,
        "route: got 'shear' with scale; the shear route cannot apply it, use 'auto' or 'direct'",
    ),
    "matrix: columns": (
        lambda: matrix(torch.zeros(5, 3), SKETCH),
        ValueError,
        "grads: last dimension is 3, but the sketch was made for d_in=4",
    ),
    "matrix: rows": (
        lambda: matrix(torch.zeros(2, 6, 4), SKETCH),
        ValueError,
        "grads: got 6 rows, but the sketch was made for d_out=5; pass shape (..., 5, 4)",
    ),
    "embedding: float ids": (
        lambda: embedding(IDS.float(), A, SKETCH),
        TypeError,
        "token_ids: got torch.float32; pass an integer tensor of shape (..., T)",
    ),
    "embedding: list of ids": (
        lambda: embedding([1], A, SKETCH),  # type: ignore[arg-type]
        TypeError,
        "token_ids: got list; pass an integer tensor of shape (..., T)",
    ),
    "embedding: tokens": (
        lambda: embedding(IDS[:, :2], A, SKETCH),
        ValueError,
        "token_ids: got shape (2, 2), grad_outputs have (2, 3) tokens; both must be (..., T)",
    ),
    "embedding: id too large": (
        lambda: embedding(IDS + 5, A, SKETCH),
        IndexError,
        "token_ids: got values in [5, 5]; pass ids in [0, 5)",
    ),
    "embedding: id negative": (  # as in labels that are to be ignored; indexing would take it for the last one
        lambda: embedding(IDS - 100, A, SKETCH),
        IndexError,
        "token_ids: got values in [-100, -100]; pass ids in [0, 5)",
    ),
    "vector: d": (
        lambda: vector(A, SKETCH.out),
        ValueError,
        "grads: last dimension is 4, but the sketch was made for d=5",
    ),
    "out: no tensor": (
        lambda: vector(G, SKETCH.out, out=[0.0]),  # type: ignore[arg-type]
        TypeError,
        "out: got list; pass a torch.Tensor of shape (2, 7)",
    ),
    "out: shape": (
        lambda: matrix(torch.zeros(2, 5, 4), SKETCH, out=torch.zeros(7)),
        ValueError,
        "out: got shape (7,) torch.float32 on cpu; pass a buffer of shape (2, 7) torch.float32 on cpu",
    ),
    "out: dtype": (
        lambda: embedding(IDS, A.double(), SKETCH, out=torch.zeros(2, 7)),
        ValueError,
        "out: got shape (2, 7) torch.float32 on cpu; pass a buffer of shape (2, 7) torch.float64 on cpu",
    ),
    "out: low precision": (
        lambda: linear(A.bfloat16(), G.bfloat16(), SKETCH, out=torch.zeros(2, 7).bfloat16()),
        ValueError,
        "out: got shape (2, 7) torch.bfloat16 on cpu; pass a buffer of shape (2, 7) torch.float32 on cpu",
    ),
    "out: requires grad": (
        lambda: linear(A, G, SKETCH, out=torch.zeros(2, 7, requires_grad=True)),
        ValueError,
        "out: got a tensor that requires grad; detach it",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    f, kind, message = ERRORS[case]
    with pytest.raises(kind) as caught:
        f()
    text = str(caught.value)
    assert text.startswith(message)
    assert "\n" not in text
