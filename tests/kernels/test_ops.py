"""The operators as torch.library, autograd, torch.compile and fake tensors see them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accuracy import multilinear
from sketch_cases import (
    buckets_of,
    expected_embedding,
    expected_linear,
    expected_matrix,
    expected_vector,
    signed_sketch,
    signs_of,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import CustomOpDef

import sdi_kernels as sk
from sdi_kernels import CountSketch, HashFamily, TensorSketch, linear, ops, workspace

families = pytest.mark.parametrize("hashing", sk.HASH_FAMILIES)
routes = pytest.mark.parametrize("route", ["direct", "fft"])

D_OUT, D_IN, M = 5, 4, 7
SKETCH = TensorSketch(D_OUT, D_IN, M)
PAPERS = TensorSketch(D_OUT, D_IN, 3, hashing="iid")


def values(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_(grad)


def ids(*shape: int) -> Tensor:
    return torch.randint(D_OUT, shape)


# ---------------------------------------------------------------------------------------------------------------
# opcheck: schemas, mutation, fakes, autograd registration, tracing

Args = Callable[[], tuple[Any, ...]]
OPCHECKS: dict[str, tuple[CustomOpDef, Args]] = {
    "linear": (
        ops.linear_sketch,
        lambda: (values(2, 3, 4, grad=True), values(2, 3, 5, grad=True), SKETCH.tables(), M, "direct"),
    ),
    "linear: one differentiable input, iid, fft": (
        ops.linear_sketch,
        lambda: (values(2, 3, 4), values(2, 3, 5, grad=True), PAPERS.tables(), 3, "fft"),
    ),
    "linear: mixed dtypes, strides": (
        ops.linear_sketch,
        lambda: (values(2, 4, 3).mT.bfloat16(), values(2, 3, 5, dtype=torch.float64), SKETCH.tables(), M, "direct"),
    ),
    "linear: no tokens": (ops.linear_sketch, lambda: (values(2, 0, 4), values(2, 0, 5), SKETCH.tables(), M, "fft")),
    "linear in place": (
        ops.linear_sketch_,
        lambda: (values(2, M), values(2, 3, 4), values(2, 3, 5), SKETCH.tables(), M, "direct"),
    ),
    "linear in place, slot of a buffer": (
        ops.linear_sketch_,
        lambda: (values(2, 6, M)[:, 4], values(2, 3, 4), values(2, 3, 5), SKETCH.tables(), M, "fft"),
    ),
    "linear steps": (
        ops.linear_steps_sketch,
        lambda: (
            [values(2, 3, 4, grad=True), values(1, 2, 4)],
            [values(2, 3, 5, grad=True), values(1, 2, 5, grad=True)],
            SKETCH.tables(),
            M,
            "direct",
            [0, 2],
            [0, 1],
            [2, 3],
        ),
    ),
    "linear steps: metric, no tokens": (
        ops.linear_steps_sketch,
        lambda: ([values(2, 0, 4)], [values(2, 0, 5)], SKETCH.tables(), M, "direct", [0], [0], [2, 1], values(5, 4)),
    ),
    "linear steps in place": (
        ops.linear_steps_sketch_,
        lambda: (
            values(3, 6, 2, M)[:, :, 1],
            [values(2, 3, 4), values(1, 4, 2).mT],
            [values(2, 3, 5).bfloat16(), values(1, 2, 5).bfloat16()],
            SKETCH.tables(),
            M,
            "fft",
            [5, 5],
            [1, 2],
        ),
    ),
    "matrix": (ops.matrix_sketch, lambda: (values(2, 5, 4, grad=True), SKETCH.tables(), M)),
    "matrix: float16, strides": (
        ops.matrix_sketch,
        lambda: (values(2, 4, 5, dtype=torch.float16).mT, PAPERS.tables(), 3),
    ),
    "matrix in place": (ops.matrix_sketch_, lambda: (values(2, M), values(2, 5, 4), SKETCH.tables(), M)),
    "matrix, preconditioned": (
        ops.matrix_sketch,
        lambda: (values(2, 5, 4, grad=True), SKETCH.tables(), M, values(5, 4)),
    ),
    "embedding": (ops.embedding_sketch, lambda: (ids(2, 3), values(2, 3, 4, grad=True), SKETCH.tables(), M)),
    "embedding: iid, bfloat16": (
        ops.embedding_sketch,
        lambda: (ids(2, 3), values(2, 3, 4, dtype=torch.bfloat16), PAPERS.tables(), 3),
    ),
    "embedding in place": (
        ops.embedding_sketch_,
        lambda: (values(2, 6, M)[:, 4], ids(2, 3), values(2, 3, 4), SKETCH.tables(), M),
    ),
    "vector": (ops.vector_sketch, lambda: (values(2, 3, 5, grad=True), SKETCH.out.tables(), M)),
    "vector: one token, float64": (
        ops.vector_sketch,
        lambda: (values(2, 1, 5, dtype=torch.float64), PAPERS.out.tables(), 3),
    ),
    "vector in place": (ops.vector_sketch_, lambda: (values(2, M), values(2, 3, 5), SKETCH.out.tables(), M)),
    "scaled vector in place": (
        ops.scaled_vector_sketch_,
        lambda: (values(2, M), values(2, 3, 5), values(2, 3, 5), values(2, 3), values(2, 3), SKETCH.out.tables(), M),
    ),
    "scaled vector in place: bfloat16, no statistics, slot of a buffer": (
        ops.scaled_vector_sketch_,
        lambda: (
            values(2, 6, M)[:, 4],
            values(2, 5, 3).mT.bfloat16(),
            values(2, 3, 5).bfloat16(),
            None,
            None,
            SKETCH.out.tables(),
            M,
        ),
    ),
    "sketched linear": (
        linear._sketched_linear,
        lambda: (
            values(2, 3, 4, grad=True),
            values(5, 4, grad=True),
            None,
            torch.zeros(2, M),
            SKETCH.tables(),
            None,
            [],
            "fft",
        ),
    ),
    "sketched linear: bias, strides": (
        linear._sketched_linear,
        lambda: (
            values(3, 2, 4).transpose(0, 1),
            values(5, 4, grad=True),
            values(5, grad=True),
            torch.zeros(2, 6, M)[:, 2],
            SKETCH.tables(),
            torch.zeros(2, M),
            SKETCH.out.tables(),
            "direct",
        ),
    ),
    "sketched linear: one token per example": (
        linear._sketched_linear,
        lambda: (values(2, 4, grad=True), values(5, 4), None, torch.zeros(2, M), SKETCH.tables(), None, [], "direct"),
    ),
}


@pytest.mark.parametrize("case", OPCHECKS)
def test_opcheck(case: str) -> None:
    op, args = OPCHECKS[case]
    torch.library.opcheck(op, args())


def test_every_operator_is_checked() -> None:
    defined = {op for module in (ops, linear) for op in vars(module).values() if isinstance(op, CustomOpDef)}
    unchecked = defined - {op for op, _ in OPCHECKS.values()}
    assert not unchecked, f"{sorted(op._qualname for op in unchecked)}: add inputs for them to OPCHECKS"


# ---------------------------------------------------------------------------------------------------------------
# Gradients


@families
@routes
@pytest.mark.parametrize("m", [3, 8])
def test_gradients_of_linear(hashing: HashFamily, route: sk.Route, m: int) -> None:
    """First derivatives, and second ones: the sketch is bilinear."""
    sketch = TensorSketch(D_OUT, D_IN, m, hashing=hashing)
    inputs = values(2, 3, D_IN, dtype=torch.float64, grad=True), values(2, 3, D_OUT, dtype=torch.float64, grad=True)

    def f(a: Tensor, g: Tensor) -> Tensor:
        return sk.sketch_linear_grads(a, g, sketch, route=route)

    # One random direction for the Fourier route: its many tiny transforms are slow on a busy machine.
    assert torch.autograd.gradcheck(f, inputs, fast_mode=route == "fft")
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@families
@pytest.mark.parametrize("m", [3, 8])
def test_gradients_of_the_linear_functions(hashing: HashFamily, m: int) -> None:
    sketch = TensorSketch(D_OUT, D_IN, m, hashing=hashing)
    tokens = ids(2, 3)
    double: dict[str, Any] = {"dtype": torch.float64, "grad": True}
    check = torch.autograd.gradcheck
    assert check(lambda x: sk.sketch_matrix_grads(x, sketch), values(2, D_OUT, D_IN, **double))
    assert check(lambda x: sk.sketch_embedding_grads(tokens, x, sketch), values(2, 3, D_IN, **double))
    assert check(lambda x: sk.sketch_vector_grads(x, sketch.out), values(2, 3, D_OUT, **double))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradients_come_in_the_inputs_dtype(dtype: torch.dtype) -> None:
    a, g = values(2, 3, D_IN, dtype=dtype, grad=True), values(2, 3, D_OUT, grad=True)
    matrix, embedding = values(2, D_OUT, D_IN, dtype=dtype, grad=True), values(2, 3, D_IN, dtype=dtype, grad=True)
    vector = values(2, 3, D_OUT, dtype=dtype, grad=True)
    total = (
        sk.sketch_linear_grads(a, g, SKETCH)
        + sk.sketch_matrix_grads(matrix, SKETCH)
        + sk.sketch_embedding_grads(ids(2, 3), embedding, SKETCH)
        + sk.sketch_vector_grads(vector, SKETCH.out)
    )
    total.sum().backward()
    for tensor in (a, g, matrix, embedding, vector):
        assert tensor.grad is not None
        assert tensor.grad.dtype == tensor.dtype
        assert tensor.grad.isfinite().all()


def test_gradients_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adjoint forms a matrix per example, a few at a time."""
    inputs = values(5, 3, D_IN, dtype=torch.float64, grad=True), values(5, 3, D_OUT, dtype=torch.float64, grad=True)
    monkeypatch.setitem(workspace.WORKSPACE_BYTES, "cpu", 2 * 8 * D_OUT * D_IN * 2)
    assert torch.autograd.gradcheck(lambda a, g: sk.sketch_linear_grads(a, g, SKETCH), inputs)


# ---------------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.fixture
def compiled() -> Iterator[Callable[..., Any]]:
    torch._dynamo.reset()
    yield lambda f, **kwargs: torch.compile(f, fullgraph=True, backend="aot_eager", **kwargs)
    torch._dynamo.reset()


def fresh() -> TensorSketch:
    """A sketch whose tables nobody has asked for yet: the first use is inside the compiled function."""
    return TensorSketch(D_OUT, D_IN, M)


@pytest.mark.numeric
@routes
def test_compile_linear(compiled: Callable[..., Any], route: sk.Route) -> None:
    a, g = values(2, 3, D_IN, grad=True), values(2, 3, D_OUT)
    sketch = fresh()
    got = compiled(lambda a, g: sk.sketch_linear_grads(a, g, sketch, route=route))(a, g)
    expected_linear(a, g, sketch).check(got)
    (grad,) = torch.autograd.grad(got.square().sum(), a)
    buckets = buckets_of(sketch)

    def plain(a: Tensor, *rest: Tensor) -> Tensor:
        a = a.detach().requires_grad_()
        return torch.autograd.grad(signed_sketch(a, *rest, buckets=buckets, m=M).square().sum(), a)[0]

    multilinear(plain, a, g, *signs_of(sketch)).check(grad)


@pytest.mark.numeric
def test_compile_the_others(compiled: Callable[..., Any]) -> None:
    sketch, tokens = fresh(), ids(2, 3)
    a, g, matrix = values(2, 3, D_IN), values(2, 3, D_OUT), values(2, D_OUT, D_IN)

    def f(tokens: Tensor, a: Tensor, g: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
        return (
            sk.sketch_embedding_grads(tokens, a, sketch),
            sk.sketch_vector_grads(g, sketch.out),
            sk.sketch_matrix_grads(matrix, sketch),
            sk.sketch_scaled_vector_grads(g, g, sketch.out, scale=g[..., 0]),
        )

    expected = (
        expected_embedding(tokens, a, sketch),
        expected_vector(g, sketch.out),
        expected_matrix(matrix, sketch),
        expected_vector(g, sketch.out, factors=g, scale=g[..., 0]),
    )
    for got, want in zip(compiled(f)(tokens, a, g, matrix), expected, strict=True):
        want.check(got)


@pytest.mark.numeric
def test_compile_accumulation(compiled: Callable[..., Any]) -> None:
    sketch = fresh()
    a, g, buffer = values(2, 3, D_IN), values(2, 3, D_OUT), torch.zeros(2, 4, M)

    def f(buffer: Tensor, a: Tensor, g: Tensor) -> None:
        for step in (1, 3, 3):
            sk.sketch_linear_grads(a, g, sketch, out=buffer[:, step])

    compiled(f)(buffer, a, g)
    once = expected_linear(a, g, sketch)
    once.check(buffer[:, 1])
    once.check(buffer[:, 3] / 2)  # added twice; halving is exact
    assert once.excess(buffer[:, 3]) > 100, "an addition that is lost goes unnoticed"
    assert not buffer[:, [0, 2]].any()


def test_compile_a_looped_sketched_linear(compiled: Callable[..., Any]) -> None:
    """The buffer is written by the compiled backward, once for each use."""
    sketch, bias_sketch = TensorSketch(D_IN, D_IN, M), CountSketch(D_IN, 6)

    def f(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, bias_out: Tensor) -> Tensor:
        for step in range(3):
            x = sk.sketched_linear(
                x, weight, bias, sketch=sketch, out=out[:, step], bias_sketch=bias_sketch, bias_out=bias_out
            ).tanh()
        return x

    double = torch.float64  # this is about what is written where
    x, weight, bias = (values(*shape, dtype=double) for shape in ((2, 3, D_IN), (D_IN, D_IN), (D_IN,)))
    results = []
    for run in (f, compiled(f)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        buffers = torch.zeros(2, 3, M, dtype=double), torch.zeros(2, 6, dtype=double)
        y = run(*leaves, *buffers)
        y.square().sum().backward()
        assert leaves[1].grad is None
        assert leaves[2].grad is None
        results.append((y.detach(), leaves[0].grad, *buffers))
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want)
        assert want.flatten(1).any(1).all()


@pytest.mark.numeric
def test_compile_for_any_batch_size(compiled: Callable[..., Any]) -> None:
    sketch = fresh()
    f = compiled(lambda a, g: sk.sketch_linear_grads(a, g, sketch), dynamic=True)
    for rows, tokens in ((2, 3), (7, 5), (4, 9)):
        a, g = values(rows, tokens, D_IN), values(rows, tokens, D_OUT)
        expected_linear(a, g, sketch).check(f(a, g))


# ---------------------------------------------------------------------------------------------------------------
# Fake and meta tensors


@pytest.mark.parametrize("make", ["fake", "meta"])
def test_shapes_beyond_two_to_the_31_elements(make: str) -> None:
    rows, tokens, d = 2**14, 2**12, 512  # 2**35 activations, 2**33 bytes of sketches
    sketch = TensorSketch(2**17, d, 2**17)
    # Not by torch.device("meta") as a context: it would not know the poisoned torch.empty of the conftest.
    device = "meta" if make == "meta" else "cpu"
    with FakeTensorMode(allow_non_fake_inputs=True) if make == "fake" else contextlib.nullcontext():
        a = torch.empty(rows, 2, tokens // 2, d, device=device)
        g = torch.empty(rows, 2, tokens // 2, 2**17, dtype=torch.bfloat16, device=device)
        token_ids = torch.empty(rows, 2, tokens // 2, dtype=torch.int64, device=device)
        matrix = torch.empty(rows, 2, 2**17, d, dtype=torch.float64, device=device)
        made = {
            torch.float32: [
                sk.sketch_linear_grads(a, g, sketch, route="direct"),
                sk.sketch_linear_grads(a, g, sketch, route="fft"),
                sk.sketch_embedding_grads(token_ids, a, sketch),
                sk.sketch_vector_grads(g, sketch.out),
            ],
            torch.float64: [sk.sketch_matrix_grads(matrix, sketch)],
        }
        out = torch.empty(rows, 2, 2**17, device=device)
        assert sk.sketch_linear_grads(a, g, sketch, out=out) is out
        weight = torch.empty(2**17, d, requires_grad=True, device=device)
        slot = torch.empty(rows, 3, 2**17, device=device)[:, 1]
        y = sk.sketched_linear(a.requires_grad_(), weight, sketch=sketch, out=slot)
    assert y.shape == (rows, 2, tokens // 2, 2**17)
    assert y.numel() > 2**31
    for dtype, sketches in made.items():
        for made_one in sketches:
            assert made_one.shape == (rows, 2, 2**17)
            assert made_one.dtype == dtype


def test_fake_use_leaves_a_sketch_usable() -> None:
    sketch = fresh()
    with FakeTensorMode(allow_non_fake_inputs=True):
        sk.sketch_linear_grads(torch.empty(2, 3, D_IN), torch.empty(2, 3, D_OUT), sketch)
        sketch.tables("meta")
    a, g = values(2, 3, D_IN), values(2, 3, D_OUT)
    assert sk.sketch_linear_grads(a, g, sketch).isfinite().all()
    assert type(sketch.tables("meta")[0]) is Tensor
