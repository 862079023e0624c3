"""What storing a row in fewer bytes changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from stepinfluence import StoreError
from stepinfluence.store import STORE_DTYPES, StoreDtype, bytes_per_row, decode, encode
from torch import Tensor

BOUNDS = {"fp32": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 0.5 / 127}
"""Largest error of an entry over the largest magnitude of its row."""


def there_and_back(values: Tensor, dtype: StoreDtype) -> Tensor:
    codes, scales = encode(values, dtype)
    array = codes.view(torch.int16).numpy().view("<u2") if dtype == "bf16" else codes.numpy()
    return decode(array, None if scales is None else scales.numpy(), dtype)


@pytest.mark.parametrize("dtype", STORE_DTYPES)
@pytest.mark.parametrize("shape", [(5, 40), (5, 3, 40), (0, 40), (2, 0, 40)])
def test_error_is_bounded_by_the_rows_largest_entry(dtype: StoreDtype, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape) * torch.logspace(-9, 9, shape[0] or 1).view(-1, *[1] * (len(shape) - 1))[: shape[0]]
    found = there_and_back(values, dtype)
    assert found.dtype == torch.float32
    assert found.shape == values.shape
    largest = values.abs().amax(-1, keepdim=True)
    assert ((found - values).abs() <= (BOUNDS[dtype] * (1 + 1e-5)) * largest).all()


@pytest.mark.parametrize("dtype", STORE_DTYPES)
@given(st.floats(2.0**-120, 2.0**127, width=32), st.integers(0, 2**32))
def test_any_magnitude_is_kept(dtype: StoreDtype, size: float, seed: int) -> None:
    values = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed)) * size
    values[1] = 0
    found = there_and_back(values, dtype)
    assert (found[1] == 0).all()
    assert ((found - values).abs() <= (BOUNDS[dtype] * (1 + 1e-5)) * values.amax(-1, keepdim=True) + 1e-43).all()


@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_codes_of_stored_values_are_the_same_again(dtype: StoreDtype) -> None:
    once = there_and_back(torch.randn(4, 33), dtype)
    assert torch.equal(there_and_back(once, dtype), once)


@pytest.mark.parametrize("dtype", STORE_DTYPES)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=6))
@example([torch.finfo(torch.float32).max])
@example([-torch.finfo(torch.float32).max, 1.0])
@example([190 * 2.0**-149, 2.0**-149])
@example([2.0**-149])
def test_the_largest_and_the_smallest_numbers_are_kept(dtype: StoreDtype, row: list[float]) -> None:
    """Near the largest float32 nothing becomes infinite; below the normal ones a step of the format is all there is."""
    values = torch.tensor([row])
    found = there_and_back(values, dtype)
    assert found.isfinite().all()
    largest, step = float(values.abs().max()), 2.0**-133 if dtype == "bf16" else 2.0**-149
    assert ((found.double() - values.double()).abs() <= BOUNDS[dtype] * (1 + 1e-5) * largest + step).all()


def test_int8_rounds_to_nearest() -> None:
    codes, scales = encode(torch.tensor([[127.0, 0.49, 0.51, -1.49, -1.51, -127.0]]), "int8")
    assert codes.tolist() == [[127, 0, 1, -1, -2, -127]]
    assert scales is not None
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize("dtype", STORE_DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])
def test_what_no_float_can_hold_is_refused(dtype: StoreDtype, value: float) -> None:
    values = torch.ones(2, 4, dtype=torch.float64)
    values[1, 2] = value
    with pytest.raises(StoreError, match="features: NaN, infinite or beyond float32"):
        encode(values, dtype)


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 400), ("fp16", 204), ("bf16", 200), ("int8", 104)])
def test_bytes_of_a_row(dtype: StoreDtype, size: int) -> None:
    assert bytes_per_row(100, dtype) == size
    codes, scales = encode(torch.randn(1, 100), dtype)
    assert codes.numel() * codes.element_size() + (0 if scales is None else 4) == size
