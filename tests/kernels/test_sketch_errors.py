"""Errors: one line that starts with the argument, says what came and what to pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sketch_cases import SKETCH

import sdi_kernels as sk
from sdi_kernels import CountSketch, TensorSketch
from sdi_kernels.hashing import MAX_SKETCH_SIZE

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
        lambda: linear(1.0, G, SKETCH),  # type: ignore[arg-type]
        TypeError,
        "activations: got float; pass a torch.Tensor",
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
    "linear: shear with a metric": (
        lambda: linear(A, G, SKETCH, route="shear", metric=torch.ones(5, 4)),
        ValueError,
        "route: got 'shear' with metric; the shear route cannot apply it, use 'auto' or 'direct'",
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
