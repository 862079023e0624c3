"""``matrix`` kernels against the definition: exact on small integers, in fp32 no worse than torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sketch_cases import expected_matrix
from torch import Tensor

from sdi_kernels import TensorSketch, reference, torch_routes
from sdi_kernels.calls import MatrixCall
from sdi_kernels.triton import common, launch, matrix

FAMILIES = ("balanced", "iid")  # tables of "block" look like balanced ones to these kernels

# rows, d_out, d_in: below and above the sketch sizes on either side, a single entry, tiles that end early.
SHAPES = [(3, 40, 24), (1, 1, 1), (2, 33, 150), (2, 70, 3)]


def small_integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).float()


def slot(before: Tensor) -> Tensor:
    """``before`` as a slice of a larger buffer of NaN."""
    buffer = torch.full((len(before), 3, before.shape[1] + 5), float("nan"))
    view = buffer[:, 1, 2:-3]
    view.copy_(before)
    return view


def assert_rest_untouched(view: Tensor) -> None:
    buffer = view._base
    assert buffer is not None
    assert torch.isnan(buffer).sum() == buffer.numel() - view.numel()


@pytest.fixture(params=["gather", "scatter"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take one of the two kernels whatever the shape."""
    monkeypatch.setattr(matrix, "ATOMIC_COST", 1e9 if request.param == "gather" else 0)
    return str(request.param)


@pytest.mark.parametrize("hashing", FAMILIES)
@pytest.mark.parametrize("m", [1, 37, 300])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("kernel")
def test_exact_on_integers(shape: tuple[int, int, int], m: int, hashing: str) -> None:
    sketch = TensorSketch(shape[1], shape[2], m, hashing=hashing, name="w")
    grads, before = small_integers(*shape), small_integers(shape[0], m)
    out = slot(before)
    matrix.matrix(MatrixCall(out, grads, sketch.tables(), m))
    assert_rest_untouched(out)
    assert torch.equal(out - before, reference.tensor_sketch(grads, sketch).float())


@pytest.mark.usefixtures("kernel")
def test_preconditions_elementwise() -> None:
    sketch = TensorSketch(40, 20, 32)
    grads, metric = small_integers(2, 40, 20), small_integers(20, 40).T  # a strided preconditioner
    for dtype in (torch.float32, torch.float16):
        out = torch.zeros(2, 32)
        matrix.matrix(MatrixCall(out, grads, sketch.tables(), 32, metric=metric.to(dtype)))
        assert torch.equal(out.double(), reference.tensor_sketch(metric.double() * grads, sketch))


@pytest.mark.numeric
@pytest.mark.usefixtures("kernel")
def test_error_is_that_of_torch() -> None:
    sketch = TensorSketch(90, 70, 64)
    grads, metric = torch.randn(2, 90, 70), torch.rand(90, 70)
    got, torchs = torch.zeros(2, 64), torch.zeros(2, 64)
    matrix.matrix(MatrixCall(got, grads, sketch.tables(), 64, metric=metric))
    torch_routes.matrix(MatrixCall(torchs, grads, sketch.tables(), 64, metric))
    replace(expected_matrix(grads, sketch, metric=metric), plain=torchs).check(got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("kernel")
def test_strided_inputs_and_outputs(dtype: torch.dtype) -> None:
    """A transposed matrix, every other line, one matrix expanded over all rows, a transposed buffer."""
    sketch = TensorSketch(10, 30, 40)
    grads = small_integers(2, 30, 20).transpose(1, 2)[:, ::2].to(dtype)
    out = torch.zeros(40, 2).T
    matrix.matrix(MatrixCall(out, grads, sketch.tables(), 40))
    assert torch.equal(out, reference.tensor_sketch(grads, sketch).float())
    one = grads[:1].expand(3, -1, -1)
    out = torch.zeros(3, 40)
    matrix.matrix(MatrixCall(out, one, sketch.tables(), 40))
    assert torch.equal(out, reference.tensor_sketch(one, sketch).float())


def test_split_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "token_splits", lambda *_: 4)
    sketch, grads = TensorSketch(70, 40, 64), small_integers(2, 70, 40)
    out = torch.zeros(2, 64)
    matrix.matrix(MatrixCall(out, grads, sketch.tables(), 64))
    assert torch.equal(out, reference.tensor_sketch(grads, sketch).float())


def test_deterministic_mode_takes_no_atomics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where scattering would be cheaper, and where few rows would have their lines split."""
    monkeypatch.setattr(common, "token_splits", lambda *_: 4)
    monkeypatch.setattr(matrix, "matrix_scatter_kernel", None)
    sketch, grads = TensorSketch(70, 3, 300), small_integers(2, 70, 3)
    launched: list[tuple[int, ...]] = []
    real = matrix.matrix_gather_kernel
    monkeypatch.setattr(matrix, "matrix_gather_kernel", Recorder(real, launched))
    torch.use_deterministic_algorithms(True)
    out = torch.zeros(2, 300)
    matrix.matrix(MatrixCall(out, grads, sketch.tables(), 300))
    assert torch.equal(out, reference.tensor_sketch(grads, sketch).float())
    assert launched == [(2 * 2, 1)]


class Recorder:
    """A kernel that notes the grids it is launched with."""

    def __init__(self, kernel: object, grids: list[tuple[int, ...]]) -> None:
        self._kernel, self._grids = kernel, grids

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self._grids.append(grid)
        return self._kernel[grid]  # type: ignore[index]


def test_no_rows() -> None:
    out = torch.zeros(0, 16)
    matrix.matrix(MatrixCall(out, torch.randn(0, 5, 8), TensorSketch(5, 8, 16).tables(), 16))
    assert out.shape == (0, 16)


def test_launcher_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch_routes, "matrix", lambda *_: pytest.fail("fell back to torch"))
    sketch, grads, metric = TensorSketch(20, 7, 32), small_integers(2, 20, 7), small_integers(20, 7)
    out = torch.zeros(2, 32)
    launch.matrix_sketch_(MatrixCall(out, grads, sketch.tables(), 32, metric))
    assert torch.equal(out.double(), reference.tensor_sketch(metric.double() * grads, sketch))
