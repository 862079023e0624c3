"""Offsets beyond 2**31 elements, on real memory: sparse files hold the tensors, so only touched pages exist."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sketch_cases import expected_linear
from torch import Tensor

from sdi_kernels import CountSketch, TensorSketch, reference
from sdi_kernels.calls import EmbeddingCall, LinearCall, MatrixCall, ScaledVectorCall, VectorCall
from sdi_kernels.triton import direct, embedding, fft, matrix, shear, vector

FAR = 2**31 + 16


def far_apart(path: Path, near: Tensor, far: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``near`` and ``far`` of one tensor whose row stride is beyond 2**31."""
    file = np.memmap(
        path, dtype=np.float16 if dtype == torch.float16 else np.float32, mode="w+", shape=(FAR + far.numel(),)
    )
    flat = torch.from_numpy(file)
    flat[: near.numel()] = near.flatten().to(dtype)
    flat[FAR:] = far.flatten().to(dtype)
    return flat.as_strided((2, *near.shape), (FAR, *near.contiguous().stride()))


def small_integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).float()


def test_rows_beyond_32_bits(tmp_path: Path) -> None:
    tokens, d, m = 3, 20, 256
    a = far_apart(tmp_path / "a", small_integers(tokens, d), small_integers(tokens, d), torch.float16)
    out = far_apart(tmp_path / "out", torch.zeros(m), torch.zeros(m), torch.float32)
    g = small_integers(2, tokens, 7)
    sketch, count = TensorSketch(7, d, m), CountSketch(d, m)
    want = reference.sketch_linear_grads(a, g, sketch).float()

    direct.linear_direct(LinearCall(out, a, g, sketch.tables(), m, "direct"))
    assert torch.equal(out, want)
    shear.linear_shear(LinearCall(out.zero_(), a, g, sketch.tables(), m, "shear"))
    assert torch.equal(out, want)
    fft.linear_fft(LinearCall(out.zero_(), a, g, sketch.tables(), m, "fft"))
    expected_linear(a, g, sketch).check(out)
    vector.vector(VectorCall(out.zero_(), a, count.tables(), m))
    assert torch.equal(out, reference.sketch_vector_grads(a, count).float())
    vector.vector(ScaledVectorCall(out.zero_(), a, a, None, None, count.tables(), m))
    assert torch.equal(out, reference.sketch_vector_grads(a.float() ** 2, count).float())
    matrix.matrix(MatrixCall(out.zero_(), a, TensorSketch(tokens, d, m).tables(), m))
    assert torch.equal(out, reference.tensor_sketch(a, TensorSketch(tokens, d, m)).float())
    ids = torch.randint(0, 7, (2, tokens))
    embedding.embedding(EmbeddingCall(out.zero_(), ids, a, sketch.tables(), m))
    assert torch.equal(out, reference.sketch_embedding_grads(ids, a, sketch).float())


@pytest.mark.parametrize("axis", ["tokens", "features"])
def test_tokens_and_features_beyond_32_bits(axis: str, tmp_path: Path) -> None:
    two = far_apart(tmp_path / "a", small_integers(5), small_integers(5), torch.float16)  # (2, 5), far apart
    a = (two if axis == "tokens" else two.T)[None]
    g = small_integers(*a.shape[:2], 4)
    m, d_in = 256, a.shape[-1]
    sketch = TensorSketch(4, d_in, m)
    want = reference.sketch_linear_grads(a, g, sketch).float()
    out = torch.zeros(1, m)
    direct.linear_direct(LinearCall(out, a, g, sketch.tables(), m, "direct"))
    assert torch.equal(out, want)
    shear.linear_shear(LinearCall(out.zero_(), a, g, sketch.tables(), m, "shear"))
    assert torch.equal(out, want)
    fft.linear_fft(LinearCall(out.zero_(), a, g, sketch.tables(), m, "fft"))
    expected_linear(a, g, sketch).check(out)
    matrices = TensorSketch(*a.shape[1:], m)
    matrix.matrix(MatrixCall(out.zero_(), a, matrices.tables(), m))
    assert torch.equal(out, reference.tensor_sketch(a, matrices).float())
