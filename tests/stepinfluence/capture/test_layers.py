"""Every kind of parameter use, against micro-batches of one."""

from __future__ import annotations

import pytest
import torch
import zoo
from compare import compare

pytestmark = pytest.mark.numeric

SIZES = [(3, 4), (2, 4), (1, 4), (4, 2), (6, 3), (2, 5)]
SQUARE = [(4, 4), (5, 5)]


def build(name: str, dtype: torch.dtype) -> zoo.Looped:
    torch.manual_seed(len(name))
    return zoo.Looped(zoo.LAYERS[name]()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", zoo.LAYERS)
def test_layer(name: str, dtype: torch.dtype) -> None:
    """Batches of several sizes, the last smaller, one of a single example, and as many tokens as examples."""
    sizes = SIZES + SQUARE
    model = build(name, dtype)
    compare(model, [zoo.make_batch(b, t, dtype=dtype) for b, t in sizes])


@pytest.mark.parametrize("hashing", ["balanced", "iid"])
@pytest.mark.parametrize("sketch_size", [1, 5, 97])
def test_sketch_sizes_smaller_than_a_layer(hashing: str, sketch_size: int) -> None:
    batches = [zoo.make_batch(3, dtype=torch.float64)]
    compare(build("mlp", torch.float64), batches, hashing=hashing, sketch_size=sketch_size)


@pytest.mark.parametrize("route", ["direct", "fft"])
def test_routes_agree(route: str) -> None:
    compare(build("fused qkv, output chunks", torch.float32), [zoo.make_batch(3)], route=route)
