"""``shear`` kernel against the definition, for the hash family it is made for and for every other it can take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sketch_cases import expected_linear
from torch import Tensor

from sdi_kernels import HashFamily, TensorSketch, reference, torch_routes
from sdi_kernels.calls import LinearCall
from sdi_kernels.triton import common, direct, fft, launch, shear

# rows, tokens, d_out, d_in, m: one block, blocks half full, all buckets used, several sources of a bucket, d_in = m
# (which wraps around the end of the table), more blocks and columns than a tile has.
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 3, 5, 7, 32),
    (2, 5, 40, 24, 64),
    (1, 2, 100, 33, 48),
    (2, 3, 20, 64, 64),
    (1, 1, 700, 130, 1200),
]


def small_integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).float()


def problem(shape: tuple[int, ...], hashing: HashFamily = "block") -> tuple[TensorSketch, Tensor, Tensor]:
    rows, tokens, d_out, d_in, m = shape
    sketch = TensorSketch(d_out, d_in, m, hashing=hashing, name="w")
    assert sketch.shearable
    return sketch, small_integers(rows, tokens, d_in), small_integers(rows, tokens, d_out)


@pytest.mark.parametrize("hashing", ["block", "balanced"])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_on_integers(shape: tuple[int, ...], hashing: HashFamily) -> None:
    sketch, a, g = problem(shape, hashing)
    before = small_integers(len(a), sketch.m)
    buffer = torch.full((len(a), 3, sketch.m + 5), float("nan"))
    out = buffer[:, 1, 2:-3]
    out.copy_(before)
    shear.linear_shear(LinearCall(out, a, g, sketch.tables(), sketch.m, "shear"))
    assert torch.isnan(buffer).sum() == buffer.numel() - out.numel(), "something beside the slot was written"
    assert torch.equal(out - before, reference.sketch_linear_grads(a, g, sketch).float())


def test_given_tables_of_the_output_side() -> None:
    """Several sources in a bucket and empty ones between, as independent draws have them."""
    sides = TensorSketch(60, 20, 48, hashing="iid").out, TensorSketch(60, 20, 48).inp
    sketch = TensorSketch.from_sides(*sides)
    a, g = small_integers(2, 3, 20), small_integers(2, 3, 60)
    out = torch.zeros(2, 48)
    shear.linear_shear(LinearCall(out, a, g, sketch.tables(), 48, "shear"))
    assert torch.equal(out, reference.sketch_linear_grads(a, g, sketch).float())


@pytest.mark.numeric
def test_error_is_that_of_torch() -> None:
    sketch = TensorSketch(60, 50, 128, hashing="block")
    a, g = torch.randn(2, 9, 50), 1e-6 * torch.randn(2, 9, 60)
    got, torchs = torch.zeros(2, 128), torch.zeros(2, 128)
    shear.linear_shear(LinearCall(got, a, g, sketch.tables(), 128, "shear"))
    # Where there is no kernel, it is direct.
    torch_routes.linear(LinearCall(torchs, a, g, sketch.tables(), 128, "shear"))
    replace(expected_linear(a, g, sketch), plain=torchs).check(got)


# Triton's interpreter multiplies the bit patterns of bf16 (3.7.1), so that product is left to tests/gpu.
@pytest.mark.parametrize(("dtype", "mixed"), [(torch.float16, False), (torch.bfloat16, True)])
def test_half_inputs_and_strides(dtype: torch.dtype, mixed: bool) -> None:
    """Feature-major activations, every other output gradient, a transposed buffer."""
    sketch = TensorSketch(20, 30, 64, hashing="block")
    a = small_integers(2, 30, 5).transpose(1, 2).to(dtype)
    g = small_integers(2, 5, 40)[..., ::2].to(torch.float32 if mixed else dtype)
    out = torch.zeros(64, 2).T
    shear.linear_shear(LinearCall(out, a, g, sketch.tables(), 64, "shear"))
    assert torch.equal(out, reference.sketch_linear_grads(a, g, sketch).float())


def test_split_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "token_splits", lambda *_: 3)
    sketch, a, g = problem((2, 11, 20, 12, 32))
    out = torch.zeros(2, 32)
    shear.linear_shear(LinearCall(out, a, g, sketch.tables(), 32, "shear"))
    assert torch.equal(out, reference.sketch_linear_grads(a, g, sketch).float())


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_add(shape: tuple[int, int]) -> None:
    sketch, before = TensorSketch(20, 30, 64, hashing="block"), torch.randn(shape[0], 64)
    out = before.clone()
    shear.linear_shear(LinearCall(out, torch.randn(*shape, 30), torch.randn(*shape, 20), sketch.tables(), 64, "shear"))
    assert torch.equal(out, before)


def test_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The route goes to its kernel; a scale and deterministic algorithms to those that can."""
    ran: list[str] = []
    for module, name in ((fft, "linear_fft"), (direct, "linear_direct"), (shear, "linear_shear")):
        monkeypatch.setattr(module, name, lambda *_, tag=name, **__: ran.append(tag))
    monkeypatch.setattr(torch_routes, "linear_direct", lambda *_: ran.append("torch linear_direct"))
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())

    def call(m: int, scale: Tensor | None = None) -> str:
        a, g = torch.zeros(1, 1, 3), torch.zeros(1, 1, 2)
        launch.linear_sketch_(LinearCall(torch.zeros(1, m), a, g, [], m, "shear", scale))
        return ran.pop()

    assert call(256) == "linear_shear"
    assert call(256, torch.ones(2, 3)) == "linear_direct"
    torch.use_deterministic_algorithms(True)
    assert call(256) == "linear_fft"
    assert call(48) == "torch linear_direct"
