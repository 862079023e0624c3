"""What the tests of the sketch functions share: exact inputs, comparison with a twin, every function as a call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sdi_kernels as sk
from sdi_kernels import TensorSketch, reference

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
