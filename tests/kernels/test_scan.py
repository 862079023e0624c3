"""The compiled scan of stored rows, on every instruction set this machine has."""

from __future__ import annotations

import pytest
import torch
from accuracy import inner_products
from torch import Tensor

from sdi_kernels.cpu import scan

pytestmark = pytest.mark.numeric

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def codes_of(dtype: torch.dtype, rows: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + d)
    if dtype == torch.int8:
        return torch.randint(-128, 128, (rows, d), generator=generator, dtype=torch.int8)
    return torch.randn(rows, d, generator=generator).to(dtype)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_products(dtype: torch.dtype, scaled: bool) -> None:
    shapes = ((1, 1, 1), (3, 15, 2), (9, 16, 3), (300, 129, 7), (70, 5000, 5), (2, 9000, 16), (0, 4, 2))
    many = ((1, 1, 16), (33, 64, 17), (3, 63, 131), (67, 4097, 18), (4, 8256, 64))  # int8: multiplied as integers
    for rows, d, count in (*shapes, *many):
        codes, vectors = codes_of(dtype, rows, d), torch.randn(count, d)
        scales = torch.rand(rows) + 0.5 if scaled else None
        factors = (codes, vectors) if scales is None else (codes, vectors, scales)
        found = scan.row_products(codes, scales, vectors)
        assert found is not None
        inner_products("nd,kd->nk" if scales is None else "nd,kd,n->nk", *factors).check(found)


def spread(count: int, d: int) -> Tensor:
    """Vectors whose columns differ in size by eight orders of magnitude, one of them zero."""
    vectors = torch.randn(count, d) * 10 ** torch.linspace(-4, 4, d)[torch.randperm(d)]
    vectors[1] = 0
    return vectors


@pytest.mark.usefixtures("instruction_set")
def test_many_vectors_are_as_exact_as_float32() -> None:
    """Largest and smallest codes, and vectors of columns of very different size."""
    codes, vectors, scales = codes_of(torch.int8, 37, 8300), spread(19, 8300), torch.rand(37) + 0.5
    codes[0], codes[1] = -128, 127
    found = scan.row_products(codes, scales, vectors)
    assert found is not None
    inner_products("nd,kd,n->nk", codes, vectors, scales).check(found)
    assert (found[:, 1] == 0).all()


@pytest.mark.usefixtures("instruction_set")
def test_vectors_that_are_not_finite() -> None:
    """Among many: those that are finite have their products all the same."""
    codes, vectors = codes_of(torch.int8, 4, 20), torch.randn(16, 20)
    vectors[2, 3], vectors[4, 1] = torch.nan, torch.inf
    found = scan.row_products(codes, None, vectors)
    assert found is not None
    assert found[:, 2].isnan().all()
    finite = [k for k in range(16) if k not in (2, 4)]
    inner_products("nd,kd->nk", codes, vectors[finite]).check(found[:, finite])


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_wider_rows(dtype: torch.dtype) -> None:
    codes = codes_of(dtype, 33, 100)
    for count in (3, 17):
        vectors = torch.randn(count, 41)
        found = scan.row_products(codes[:, 30:71], None, vectors)
        assert found is not None
        inner_products("nd,kd->nk", codes[:, 30:71], vectors).check(found)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vectors_each", [6, 17])
def test_equal_rows_have_equal_products_wherever_they_lie(dtype: torch.dtype, vectors_each: int) -> None:
    one, vectors = codes_of(dtype, 1, 333), torch.randn(vectors_each, 333)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found = scan.row_products(one.expand(1003, -1).contiguous(), None, vectors)
            assert found is not None
            assert (found == found[0]).all()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("instruction_set")
def test_halves_of_every_value() -> None:
    """All 2**16 bit patterns, subnormals, infinities and NaN included."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        codes = bits.view(dtype).unsqueeze(1).expand(-1, 16).contiguous()
        vectors = torch.zeros(1, 16)
        vectors[0, 3] = 1
        finite = codes[:, 0].isfinite()
        found = scan.row_products(codes, None, vectors)
        assert found is not None
        assert torch.equal(found[finite, 0], codes[finite, 0].float())
        assert found[~finite, 0].isnan().all()  # times zero


def test_what_it_does_not_take() -> None:
    codes, vectors = codes_of(torch.int8, 4, 8), torch.randn(2, 8)
    assert scan.row_products(codes.long(), None, vectors) is None
    assert scan.row_products(codes, None, vectors.double()) is None
    assert scan.row_products(codes_of(torch.int8, 8, 4).T, None, vectors) is None
