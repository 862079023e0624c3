"""``fft`` gathers from rows in shared memory where one token fills a block: any widths of both sides, any strides, any
number of sources, in one pass or in several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from sketch_cases import expected_linear

from sdi_kernels import TensorSketch
from sdi_kernels.calls import LinearCall
from sdi_kernels.triton import common, fft, slots, transforms

FP16 = 2.0**-11
"""What rounding to nearest loses of an operand of fp16."""


def constants_of(sketch: TensorSketch, size: int = 4) -> Mapping[str, Any]:
    """What the kernel is compiled for."""
    config = transforms.config_of(sketch.m, size == 4, common.FALLBACK_SHARED)
    sides = (slots.side(x.tables()[2], x.d, size, config) for x in (sketch.inp, sketch.out))
    layout_in, layout_out = (side.layout for side in sides)
    return slots.constants_of((layout_in, layout_out), size, config)


def check(sketch: TensorSketch, dtype: torch.dtype = torch.float32, tokens: int = 2) -> None:
    a = torch.randn(1, 2 * tokens, sketch.d_in).to(dtype)[:, ::2]
    g = torch.randn(1, sketch.d_out, tokens).to(dtype).transpose(1, 2)
    out = torch.zeros(1, sketch.m)
    fft.linear_fft(LinearCall(out, a, g, sketch.tables(), sketch.m, "fft"))
    expected = expected_linear(a, g, sketch)
    (replace(expected, eps=FP16) if dtype == torch.float16 else expected).check(out)


@pytest.mark.numeric
@pytest.mark.parametrize("m", [1024, 2048, 4096, 8192])
@pytest.mark.parametrize("seed", range(3))
def test_random_shapes(m: int, seed: int) -> None:
    """One source of a bucket on a side, or several of them; the other side as well."""
    draw = torch.Generator().manual_seed(1000 * seed + m)
    d_out, d_in = (int(2 ** (12.0 * x)) + 1 for x in torch.rand(2, generator=draw))
    sketch = TensorSketch(d_out, d_in, m, hashing=("balanced", "iid")[seed % 2])
    check(sketch, (torch.float32, torch.float16)[seed % 2], tokens=1 + seed)


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("d_out", "d_in", "m", "name"),
    [
        (30, 1024, 2048, "IS_SHORT"),  # zeros in half of a block
        (30, 1025, 4096, "IS_KEPT_IN"),
        (3000, 2500, 4096, "IS_KEPT_OUT"),  # in order over two chunks
        (9000, 300, 4096, "IS_WHOLE"),
        (300, 9000, 4096, "IS_WHOLE"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_way_of_the_kernel(d_out: int, d_in: int, m: int, name: str, dtype: torch.dtype) -> None:
    sketch = TensorSketch(d_out, d_in, m)
    assert constants_of(sketch, dtype.itemsize)[name]
    check(sketch, dtype)


@pytest.mark.numeric
@pytest.mark.parametrize("m", [1024, 4096, 8192])
@pytest.mark.parametrize("hashing", ["balanced", "iid"])
def test_several_passes(m: int, hashing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows longer than what is brought to shared memory at a time, and buckets fuller than what a pass takes."""
    monkeypatch.setattr(slots, "MAX_ROW", 256)
    monkeypatch.setattr(slots, "MAX_SLOTS", m)
    sketch = TensorSketch(700, 2 * m + 5 if m < 8192 else 900, m, hashing=hashing)
    made = constants_of(sketch)
    assert made["IS_LONG_OUT"]
    assert made["IS_LONG_IN"] or made["SLOTS_IN"] == 0
    check(sketch)
    check(sketch, torch.float16)


def test_one_bucket_for_all() -> None:
    """A table that no family would draw."""
    zeros, signs = torch.zeros(300, dtype=torch.int64), torch.ones(300, dtype=torch.int64)
    check(TensorSketch.from_tables(zeros, signs, zeros + 1023, -signs, 1024))
