"""``sketch_scaled_vector_grads`` against its definition: the gain of a normalisation, in one pass."""

from __future__ import annotations

import pytest
import torch
from accuracy import Expected
from sketch_cases import expected_vector
from torch import Tensor
from torch.nn import functional as F

import sdi_kernels
from sdi_kernels import CountSketch, ops, reference
from sdi_kernels.cpu import native

pytestmark = pytest.mark.numeric


@pytest.fixture(params=["compiled", "torch"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("the CPU kernels were not built")
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("rows", "tokens", "d", "m"), [(3, 5, 7, 16), (4, 81, 128, 2048), (2, 70, 300, 64), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("statistics", ["both", "scale", "none"])
def test_matches_the_definition(
    route: str, rows: int, tokens: int, d: int, m: int, dtype: torch.dtype, statistics: str
) -> None:
    grads, factors = torch.randn(rows, tokens, d).to(dtype), torch.randn(rows, tokens, d).to(dtype)
    center = torch.randn(rows, tokens) if statistics == "both" else None
    scale = torch.rand(rows, tokens) if statistics != "none" else None
    sketch = CountSketch(d, m, seed=3)
    statistic = {"factors": factors, "center": center, "scale": scale}
    # Into a strided slice that already holds something.
    buffer = torch.ones(rows, 3, m, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    out = buffer[:, 1]
    got = sdi_kernels.sketch_scaled_vector_grads(grads, factors, sketch, center=center, scale=scale, out=out)
    assert got.data_ptr() == out.data_ptr()
    expected_vector(grads, sketch, before=1, **statistic).check(out)
    assert bool((buffer[:, [0, 2]] == 1).all())
    fresh = sdi_kernels.sketch_scaled_vector_grads(grads, factors, sketch, center=center, scale=scale)
    expected_vector(grads, sketch, **statistic).check(fresh)


def test_strided_inputs_and_no_tokens(route: str) -> None:
    sketch = CountSketch(6, 8)
    wide = torch.randn(2, 5, 24)
    grads, factors = wide[..., ::4], wide[..., 1::4]
    out = torch.zeros(2, 8)
    sdi_kernels.sketch_scaled_vector_grads(grads, factors, sketch, out=out)
    expected_vector(grads, sketch, factors=factors).check(out)
    before = out.clone()
    sdi_kernels.sketch_scaled_vector_grads(torch.zeros(2, 0, 6), torch.zeros(2, 0, 6), sketch, out=out)
    assert torch.equal(out, before)


def test_is_the_gradient_of_a_layer_norm_gain(route: str) -> None:
    x, weight = torch.randn(3, 9, 10), torch.randn(10)
    upstream = torch.randn_like(x)
    _, mean, rstd = torch.native_layer_norm(x, (10,), None, None, 1e-5)
    sketch = CountSketch(10, 32)
    out = torch.zeros(3, 32)
    sdi_kernels.sketch_scaled_vector_grads(
        upstream, x, sketch, center=mean.squeeze(-1), scale=rstd.squeeze(-1), out=out
    )

    def gains(dtype: torch.dtype) -> Tensor:
        """By autograd, row by row."""
        gain = weight.to(dtype).requires_grad_()
        y = F.layer_norm(x.to(dtype), (10,), gain)
        rows = [torch.autograd.grad(y[k], gain, upstream[k].to(dtype), retain_graph=True)[0] for k in range(3)]
        return reference.count_sketch(torch.stack(rows), sketch)

    terms = expected_vector(upstream, sketch, factors=x, center=mean.squeeze(-1), scale=rstd.squeeze(-1)).magnitude
    Expected(gains(torch.float64), gains(torch.float32), terms).check(out)


def test_differentiable_without_out() -> None:
    sketch = CountSketch(4, 5)
    inputs = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda g, x: sdi_kernels.sketch_scaled_vector_grads(g, x, sketch), inputs)


def test_operator_is_registered_correctly() -> None:
    tables = CountSketch(4, 5).tables()
    arguments = (torch.zeros(2, 5), torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 3), None, tables, 5)
    torch.library.opcheck(ops.scaled_vector_sketch_, arguments)


def test_errors_name_the_argument() -> None:
    sketch, grads = CountSketch(4, 5), torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"^factors: got shape \(2, 3, 5\)"):
        sdi_kernels.sketch_scaled_vector_grads(grads, torch.zeros(2, 3, 5), sketch)
    with pytest.raises(ValueError, match=r"^scale: got \(2,\); pass one number per token"):
        sdi_kernels.sketch_scaled_vector_grads(grads, grads, sketch, scale=torch.zeros(2))
    with pytest.raises(ValueError, match=r"^out: got shape"):
        sdi_kernels.sketch_scaled_vector_grads(grads, grads, sketch, out=torch.zeros(2, 4))
