"""``fft`` gathers from rows in shared memory where one token fills a block: any widths of both sides, any strides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sketch_cases import expected_linear

from sdi_kernels import TensorSketch
from sdi_kernels.calls import LinearCall
from sdi_kernels.triton import fft, transforms

FP16 = 2.0**-11
"""What rounding to nearest loses of an operand of fp16."""


@pytest.mark.numeric
@pytest.mark.parametrize("m", [1024, 2048])
@pytest.mark.parametrize("seed", range(3))
def test_random_shapes(m: int, seed: int) -> None:
    """One source of a bucket on a side, or several of them; the other side as well."""
    draw = torch.Generator().manual_seed(1000 * seed + m)
    d_out, d_in = (int(2 ** (12.0 * x)) + 1 for x in torch.rand(2, generator=draw))
    tokens = int(torch.randint(1, 4, (1,), generator=draw))
    config = transforms.config_of(m, seed % 2 == 0, torch.device("cpu"))
    assert transforms.rows_of(config, min(d_in, 4096), min(d_out, 4096)) != (0, 0)
    sketch = TensorSketch(min(d_out, 4096), min(d_in, 4096), m, hashing=("balanced", "iid")[seed % 2])
    dtype = (torch.float32, torch.float16)[seed % 2]
    a = torch.randn(1, 2 * tokens, sketch.d_in, generator=draw).to(dtype)[:, ::2]
    g = torch.randn(1, sketch.d_out, tokens, generator=draw).to(dtype).transpose(1, 2)
    out = torch.zeros(1, m)
    fft.linear_fft(LinearCall(out, a, g, sketch.tables(), m, "fft"))
    expected = expected_linear(a, g, sketch)
    (replace(expected, eps=FP16) if dtype == torch.float16 else expected).check(out)


def test_rows_are_for_one_token_and_one_chunk() -> None:
    cpu = torch.device("cpu")
    longest = transforms.MAX_ROW
    assert transforms.rows_of(transforms.config_of(2048, True, cpu), 700, longest) == (1024, longest)
    assert transforms.rows_of(transforms.config_of(2048, True, cpu), 3, longest + 1) == (0, 0)
    assert transforms.rows_of(transforms.config_of(512, False, cpu), 700, 700) == (0, 0)
    assert transforms.rows_of(transforms.config_of(4096, True, cpu), 700, 700) == (0, 0)
    assert transforms.rows_of(transforms.config_of(4096, False, cpu), 700, 1) == (1024, 32)
