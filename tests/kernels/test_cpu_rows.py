"""The compiled CPU kernel for gradients that come row by row (lookups, whole matrices), on every instruction set."""

from __future__ import annotations

import pytest
import torch
from sketch_cases import expected_linear
from torch import Tensor

from sdi_kernels import HashFamily, TensorSketch, reference, sketch_embedding_grads, sketch_matrix_grads, workspace
from sdi_kernels.calls import EmbeddingCall, MatrixCall
from sdi_kernels.cpu import native, routes

pytestmark = pytest.mark.numeric

needs_kernel = pytest.mark.skipif(not native.has_rows(), reason="the CPU kernels are not built here")

# rows, d_out, d_in, m: single entries, rows shorter and longer than the sketch, more rows than one unit
SHAPES = [(1, 1, 1, 16), (3, 40, 24, 64), (2, 5, 700, 256), (2, 300, 3, 48), (1, 90, 130, 100)]


def whole_numbers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).float()


@needs_kernel
@pytest.mark.parametrize("hashing", ["balanced", "iid"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrices_are_exact_on_small_integers(
    shape: tuple[int, int, int, int], hashing: HashFamily, instruction_set: str
) -> None:
    rows, d_out, d_in, m = shape
    sketch = TensorSketch(d_out, d_in, m, hashing=hashing, seed=3)
    grads, metric = whole_numbers(rows, d_out, d_in), whole_numbers(d_out, d_in)
    for given, entries in ((grads, None), (grads, metric), (grads.mT.contiguous().mT, metric.mT.contiguous().mT)):
        out = torch.ones(rows, m)
        routes.matrix(MatrixCall(out, given, sketch.tables(), m, entries))
        product = grads if entries is None else grads * entries
        assert torch.equal(out.double() - 1, reference.tensor_sketch(product.double(), sketch))


@needs_kernel
@pytest.mark.parametrize("hashing", ["balanced", "iid"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lookups_are_exact_on_small_integers(
    shape: tuple[int, int, int, int], hashing: HashFamily, instruction_set: str
) -> None:
    """Rows that are looked up several times add up; ids and gradients may lie anywhere in memory."""
    rows, d_out, d_in, m = shape
    sketch, tokens = TensorSketch(d_out, d_in, m, hashing=hashing), 2 * d_out + 1
    ids, grads = torch.randint(d_out, (tokens, rows)).t(), whole_numbers(rows, tokens, d_in)
    table = torch.zeros(rows, d_out, d_in)
    table.index_put_((torch.arange(rows)[:, None].expand_as(ids), ids), grads, accumulate=True)
    out = torch.zeros(rows, 2 * m)[:, m:]
    routes.embedding(EmbeddingCall(out, ids, grads, sketch.tables(), m))
    assert torch.equal(out.double(), reference.tensor_sketch(table.double(), sketch))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_exactly(dtype: torch.dtype, instruction_set: str) -> None:
    sketch = TensorSketch(30, 50, 128)
    grads = (torch.randn(2, 30, 50) * torch.logspace(-7, 2, 50)).to(dtype)
    assert torch.equal(sketch_matrix_grads(grads, sketch), sketch_matrix_grads(grads.float(), sketch))


@needs_kernel
def test_no_worse_than_torch(instruction_set: str) -> None:
    """A matrix is as many outer products with unit vectors."""
    for d_out, d_in, m in ((400, 300, 64), (64, 2000, 256)):
        sketch, grads = TensorSketch(d_out, d_in, m), torch.randn(2, d_out, d_in)
        units = torch.eye(d_out).expand(2, -1, -1)
        expected_linear(grads, units, sketch).check(sketch_matrix_grads(grads, sketch))


@needs_kernel
def test_not_a_number_stays_visible_in_its_row(instruction_set: str) -> None:
    grads = torch.randn(2, 4, 6)
    grads[1, 2, 3] = float("nan")
    out = sketch_matrix_grads(grads, TensorSketch(4, 6, 64))
    assert out[0].isfinite().all()
    assert not out[1].isfinite().all()


@needs_kernel
@pytest.mark.parametrize("threads", [1, 3, 64])
def test_threads_change_nothing_and_the_workspace_stays_in_its_limit(threads: int) -> None:
    library = native.library()
    assert library is not None
    sketch, grads = TensorSketch(20, 3000, 1 << 14), torch.randn(40, 20, 3000)
    torch.set_num_threads(1)
    expected = sketch_matrix_grads(grads, sketch)
    library.sdi_peak_bytes()
    torch.set_num_threads(threads)
    assert torch.equal(sketch_matrix_grads(grads, sketch), expected)
    assert 0 < library.sdi_peak_bytes() <= workspace.WORKSPACE_BYTES["cpu"]


@needs_kernel
def test_a_sketch_beyond_the_workspace_goes_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(workspace.WORKSPACE_BYTES, "cpu", 1000)
    sketch, grads = TensorSketch(20, 30, 1024), whole_numbers(3, 20, 30)
    assert torch.equal(sketch_matrix_grads(grads, sketch).double(), reference.tensor_sketch(grads.double(), sketch))


@pytest.mark.parametrize("library", ["none", "older"])
def test_fallback_where_the_kernel_is_not_there(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library, or with one that was built before this kernel was there."""
    monkeypatch.setattr(native, "library", lambda: None if library == "none" else object())
    monkeypatch.setattr(native, "run", lambda *_: pytest.fail("the kernel was called"))
    sketch, grads = TensorSketch(20, 30, 64), whole_numbers(3, 20, 30)
    expected = reference.tensor_sketch(grads.double(), sketch)
    assert torch.equal(sketch_matrix_grads(grads, sketch).double(), expected)
    every = torch.arange(20).expand(3, -1)
    assert torch.equal(sketch_embedding_grads(every, grads, sketch).double(), expected)


def test_ids_beyond_the_table_are_refused() -> None:
    with pytest.raises(IndexError, match="token_ids"):
        sketch_embedding_grads(torch.tensor([[0, 5]]), torch.randn(1, 2, 3), TensorSketch(5, 3, 64))
