"""Programs of a launch may run in any order: a kernel that depends on it has a race."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sketch_cases import expected_linear, expected_matrix
from torch import Tensor

from sdi_kernels import CountSketch, TensorSketch
from sdi_kernels.calls import EmbeddingCall, LinearCall, MatrixCall, VectorCall
from sdi_kernels.triton import common, direct, embedding, fft, matrix, pairwise, shear, vector

ROWS, TOKENS, D_OUT, D_IN, M = 2, 70, 40, 24, 256
SKETCH = TensorSketch(D_OUT, D_IN, M, hashing="block")
COUNT = CountSketch(D_IN, 16)

Run = Callable[[Tensor, Tensor, Tensor], None]


def gathered_matrix(out: Tensor, a: Tensor, g: Tensor) -> None:
    matrix.matrix(MatrixCall(out, g[:, :D_OUT, :D_IN], SKETCH.tables(), M))


def embedded(out: Tensor, a: Tensor, g: Tensor) -> None:
    ids = torch.arange(ROWS * TOKENS).reshape(ROWS, TOKENS) % D_OUT
    embedding.embedding(EmbeddingCall(out, ids, a, SKETCH.tables(), M))


def paired(out: Tensor, a: Tensor, g: Tensor) -> None:
    out[:, 0] = pairwise.pairwise(a, g, a.flip(0), g.flip(0))


WITHOUT_ATOMICS: dict[str, Run] = {
    "fft": lambda out, a, g: fft.linear_fft(LinearCall(out, a, g, SKETCH.tables(), M, "fft")),
    "vector gather": lambda out, a, g: vector.vector(VectorCall(out[:, :16], a, COUNT.tables(), 16)),
    "matrix gather": gathered_matrix,
    "embedding": embedded,
    "pairwise": paired,
}


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Activations and gradients; whatever may be split into parts is."""
    monkeypatch.setattr(common, "token_splits", lambda *_: 3)
    return torch.randn(ROWS, TOKENS, D_IN), torch.randn(ROWS, TOKENS, D_OUT)


@pytest.mark.parametrize("name", WITHOUT_ATOMICS)
def test_same_bits_without_atomics(
    name: str, problem: tuple[Tensor, Tensor], shuffle_programs: Callable[[int], None]
) -> None:
    torch.use_deterministic_algorithms(name not in ("fft", "pairwise"))  # those split, and still add in order
    in_order = torch.zeros(ROWS, M)
    WITHOUT_ATOMICS[name](in_order, *problem)
    for seed in torch.randint(1 << 30, (3,)).tolist():
        shuffle_programs(seed)
        out = torch.zeros(ROWS, M)
        WITHOUT_ATOMICS[name](out, *problem)
        assert torch.equal(out, in_order), f"seed {seed}"


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["direct", "shear", "matrix scatter"])
def test_same_sums_with_atomics(
    name: str, problem: tuple[Tensor, Tensor], shuffle_programs: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, g = problem
    monkeypatch.setattr(matrix, "ATOMIC_COST", 0)
    grads = g[:, :D_OUT, :D_IN]
    expected = expected_matrix(grads, SKETCH) if name == "matrix scatter" else expected_linear(a, g, SKETCH)
    for seed in torch.randint(1 << 30, (3,)).tolist():
        shuffle_programs(seed)
        out = torch.zeros(ROWS, M)
        if name == "matrix scatter":
            matrix.matrix(MatrixCall(out, grads, SKETCH.tables(), M))
        else:
            run = direct.linear_direct if name == "direct" else shear.linear_shear
            run(LinearCall(out, a, g, SKETCH.tables(), M, name))
        expected.check(out, f"seed {seed}")


def test_shuffling_shuffles(shuffle_programs: Callable[[int], None]) -> None:
    """The parts of a sum, added by plain stores one after another, come in another order."""
    shuffle_programs(1)
    seen: list[int] = []
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder()
    builder.set_grid_dim(4, 3, 2)
    for x in range(4):
        for y in range(3):
            for z in range(2):
                builder.set_grid_idx(x, y, z)
                seen.append((builder.grid_idx[0] * 3 + builder.grid_idx[1]) * 2 + builder.grid_idx[2])
    assert sorted(seen) == list(range(24))
    assert seen != sorted(seen)
