"""The ``vector`` kernels forming a gain's gradient on the way, against the definition."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from sketch_cases import expected_vector
from torch import Tensor

from sdi_kernels import CountSketch, reference, torch_routes
from sdi_kernels.calls import ScaledVectorCall
from sdi_kernels.triton import common, launch, vector

FAMILIES = ("balanced", "iid")  # tables of "block" look like balanced ones to these kernels

GIVEN = list(itertools.product([False, True], repeat=2))


def small_integers(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).float()


def definition(g: Tensor, x: Tensor, center: Tensor | None, scale: Tensor | None, sketch: CountSketch) -> Tensor:
    values = x.double() if center is None else x.double() - center.double()[..., None]
    values = values if scale is None else values * scale.double()[..., None]
    return reference.sketch_vector_grads(g.double() * values, sketch)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("hashing", FAMILIES)
@pytest.mark.parametrize("m", [1, 37, 300])
@pytest.mark.parametrize("shape", [(3, 5, 40), (1, 1, 1), (2, 40, 150)])
def test_exact_on_integers(shape: tuple[int, int, int], m: int, hashing: str, deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    sketch = CountSketch(shape[-1], m, hashing=hashing)
    g, x, before = small_integers(*shape), small_integers(*shape), small_integers(shape[0], m)
    for has_center, has_scale in GIVEN if shape == (3, 5, 40) else GIVEN[3:]:
        center = small_integers(*shape[:2]) if has_center else None
        scale = small_integers(*shape[:2]) if has_scale else None
        out = before.clone()
        vector.vector(ScaledVectorCall(out, g, x, center, scale, sketch.tables(), m))
        assert torch.equal((out - before).double(), definition(g, x, center, scale, sketch)), (has_center, has_scale)


@pytest.mark.numeric
def test_error_is_that_of_torch() -> None:
    sketch = CountSketch(150, 64)
    g, x, center, scale = torch.randn(2, 40, 150), torch.randn(2, 40, 150), torch.randn(2, 40), torch.rand(2, 40)
    got, torchs = torch.zeros(2, 64), torch.zeros(2, 64)
    vector.vector(ScaledVectorCall(got, g, x, center, scale, sketch.tables(), 64))
    torch_routes.scaled_vector(ScaledVectorCall(torchs, g, x, center, scale, sketch.tables(), 64))
    replace(expected_vector(g, sketch, factors=x, center=center, scale=scale), plain=torchs).check(got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strides_and_mixed_dtypes(dtype: torch.dtype) -> None:
    """Feature-major gradients, every other token of the factors, statistics with a stride, float64 among them."""
    sketch = CountSketch(20, 40)
    g = small_integers(2, 20, 6).transpose(1, 2).to(dtype)
    x = small_integers(2, 12, 20)[:, ::2]
    center, scale = small_integers(6, 2).T, small_integers(2, 6, 3)[..., 1].double()
    out = torch.zeros(40, 2).T
    vector.vector(ScaledVectorCall(out, g, x, center, scale, sketch.tables(), 40))
    assert torch.equal(out.double(), definition(g, x, center, scale, sketch))


def test_split_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "token_splits", lambda *_: 4)
    sketch, g, x = CountSketch(20, 64), small_integers(2, 70, 20), small_integers(2, 70, 20)
    center = small_integers(2, 70)
    out = torch.zeros(2, 64)
    vector.vector(ScaledVectorCall(out, g, x, center, None, sketch.tables(), 64))
    assert torch.equal(out.double(), definition(g, x, center, None, sketch))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_add(shape: tuple[int, int]) -> None:
    before = torch.randn(shape[0], 16)
    out = before.clone()
    g = torch.randn(*shape, 8)
    vector.vector(ScaledVectorCall(out, g, g, None, None, CountSketch(8, 16).tables(), 16))
    assert torch.equal(out, before)


def test_launcher_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch_routes, "scaled_vector", lambda *_: pytest.fail("fell back to torch"))
    sketch, g, x, scale = CountSketch(20, 32), small_integers(2, 6, 20), small_integers(2, 6, 20), small_integers(2, 6)
    out = torch.zeros(2, 32)
    launch.scaled_vector_sketch_(ScaledVectorCall(out, g, x, None, scale, sketch.tables(), 32))
    assert torch.equal(out.double(), definition(g, x, None, scale, sketch))
