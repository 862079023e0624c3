"""What the tests of the sketch functions share: exact inputs, comparison with a twin, every function as a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from accuracy import Expected, multilinear
from torch import Tensor

import sdi_kernels as sk
from sdi_kernels import CountSketch, TensorSketch, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ROUTES = ("auto", "direct", "fft")

families = pytest.mark.parametrize("hashing", sk.HASH_FAMILIES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
kinds = pytest.mark.parametrize("kind", ["direct", "fft", "matrix", "embedding", "vector"])


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


# What plain torch makes of a gradient: formed, signed, and its entries added up by bucket. Signs are inputs, so that
# the terms' absolute values are to be had (accuracy.py).


def in_buckets(values: Tensor, buckets: Tensor, m: int) -> Tensor:
    """(..., n) added up into (..., m); ``buckets`` is (n,)."""
    return values.new_zeros(*values.shape[:-1], m).index_add(-1, buckets, values)


def signs_of(sketch: TensorSketch) -> tuple[Tensor, Tensor]:
    """Of outputs and inputs; both float32."""
    return torch.tensor(sketch.out.sign).float(), torch.tensor(sketch.inp.sign).float()


def buckets_of(sketch: TensorSketch) -> Tensor:
    """(d_out * d_in,), row by row."""
    h_out, h_in = torch.tensor(sketch.out.bucket).long(), torch.tensor(sketch.inp.bucket).long()
    return (h_out[:, None] + h_in).remainder(sketch.m).flatten()


def signed_sketch(
    a: Tensor, g: Tensor, s_out: Tensor, s_in: Tensor, *metric: Tensor, buckets: Tensor, m: int
) -> Tensor:
    grads = torch.einsum("...to,...ti->...oi", g * s_out, a * s_in)
    for factors in metric:
        grads = grads * factors
    return in_buckets(grads.flatten(-2), buckets, m)


def expected_linear(
    a: Tensor, g: Tensor, sketch: TensorSketch, *, metric: Tensor | None = None, before: float = 0
) -> Expected:
    """What is expected of the sketches of ``metric * sum_t g_t a_t'``, added to a buffer full of ``before``."""
    buckets = buckets_of(sketch)

    def plain(*inputs: Tensor) -> Tensor:
        return before + signed_sketch(*inputs, buckets=buckets, m=sketch.m)

    grads = reference.linear_grads(a, g)
    exact = reference.tensor_sketch(grads if metric is None else metric.double() * grads, sketch)
    metrics = () if metric is None else (metric,)
    return multilinear(plain, a, g, *signs_of(sketch), *metrics, exact=before + exact)


def expected_matrix(grads: Tensor, sketch: TensorSketch, *, metric: Tensor | None = None) -> Expected:
    buckets, ones = buckets_of(sketch), torch.ones(())
    scaled = grads.double() * (ones if metric is None else metric).double()

    def plain(grads: Tensor, s_out: Tensor, s_in: Tensor, metric: Tensor) -> Tensor:
        return in_buckets((grads * metric * s_out[:, None] * s_in).flatten(-2), buckets, sketch.m)

    return multilinear(
        plain,
        grads,
        *signs_of(sketch),
        ones if metric is None else metric,
        exact=reference.tensor_sketch(scaled, sketch),
    )


def expected_embedding(ids: Tensor, g: Tensor, sketch: TensorSketch) -> Expected:
    one_hot = torch.nn.functional.one_hot(ids.long(), sketch.d_out).float()
    exact = reference.sketch_embedding_grads(ids, g, sketch)
    return replace(expected_linear(g, one_hot, sketch), exact=exact)


def expected_vector(
    g: Tensor,
    sketch: CountSketch,
    *,
    factors: Tensor | None = None,
    center: Tensor | None = None,
    scale: Tensor | None = None,
    before: float = 0,
) -> Expected:
    """Of ``sum_t g_t * (factors_t - center_t) * scale_t``, each of the three left out where it is None."""
    buckets, signs = torch.tensor(sketch.bucket).long(), torch.tensor(sketch.sign).float()
    one, zero = torch.ones(()), torch.zeros(())
    given = (
        one if factors is None else factors,
        zero if center is None else -center.unsqueeze(-1),
        one if scale is None else scale.unsqueeze(-1),
    )

    def plain(g: Tensor, factors: Tensor, minus_center: Tensor, scale: Tensor, signs: Tensor) -> Tensor:
        values = g * (factors + minus_center) * scale * signs
        return before + in_buckets(values.sum(-2), buckets, sketch.m)

    wide = [x.double() for x in (g, *given)]
    exact = reference.sketch_vector_grads(wide[0] * (wide[1] + wide[2]) * wide[3], sketch)
    return multilinear(plain, g, *given, signs, exact=before + exact)


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


class Uses(NamedTuple):
    """The uses of a looped layer, as lists of pairs, and where their sketches go: ``out`` is (rows, steps, m)."""

    activations: list[Tensor]
    grad_outputs: list[Tensor]
    steps: list[int]
    rows: list[int]
    size: tuple[int, int]

    def expected(self, sketch: TensorSketch, *, before: float = 0, metric: Tensor | None = None) -> Expected:
        """Every slot's tokens one after another, with zeros in the rows that a pair has not."""
        tokens = sum(a.shape[1] for a in self.activations)
        sides = []
        for values in (self.activations, self.grad_outputs):
            side, at = torch.zeros(*self.size, tokens, values[0].shape[2], dtype=torch.float64), 0
            for x, step, row in zip(values, self.steps, self.rows, strict=True):
                side[row : row + x.shape[0], step, at : at + x.shape[1]] = x.detach().double()
                at += x.shape[1]
            sides.append(side)
        return expected_linear(*sides, sketch, metric=metric, before=before)


def uses(kind: str, d_in: int, d_out: int, dtype: torch.dtype = torch.float32, make: Call = torch.randn) -> Uses:
    """``equal`` pairs, one a step; ``summed`` in one slot; or ``ragged``: rows, tokens and places of their own."""
    shapes, steps, rows = [(2, 3)] * 5, [0, 1, 2, 3, 4], [0] * 5
    size = 2, 5
    if kind == "summed":
        steps, size = [0] * 5, (2, 1)
    if kind == "ragged":
        shapes = [(2, 3), (1, 7), (4, 1), (0, 4), (3, 0), (2, 5), (4, 2)]
        steps, rows, size = [2, 0, 2, 1, 1, 2, 0], [1, 3, 0, 2, 1, 2, 0], (4, 4)
    acts, grads = ([make(*shape, d).to(dtype) for shape in shapes] for d in (d_in, d_out))
    return Uses(acts, grads, steps, rows, size)
