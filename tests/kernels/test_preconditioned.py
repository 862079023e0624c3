"""Sketches of ``metric * G``: gradients under an optimizer's elementwise metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from sketch_cases import expected_linear
from torch import Tensor

from sdi_kernels import (
    HashFamily,
    TensorSketch,
    ops,
    reference,
    sketch_linear_grads,
    sketch_matrix_grads,
    torch_routes,
    workspace,
)
from sdi_kernels.calls import LinearCall
from sdi_kernels.cpu import native
from sdi_kernels.triton import launch

pytestmark = pytest.mark.numeric

# rows, tokens, d_out, d_in: single numbers, odd sizes, several blocks of tokens and of rows
SHAPES = [(1, 1, 1, 1), (3, 1, 40, 24), (2, 17, 33, 70), (2, 300, 5, 130), (1, 9, 700, 31), (2, 40, 64, 513)]


@pytest.fixture(params=["avx512", "avx2", "baseline", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The compiled kernels on each instruction set of this machine, and the plain-torch fallback."""
    name: str = request.param
    if name == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
        yield name
        return
    before = native.instruction_set()
    if before is None or not native.set_instruction_set(name):
        pytest.skip(f"no compiled kernels for {name} here")
    yield name
    native.set_instruction_set(before)


def problem(rows: int, tokens: int, d_out: int, d_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers: every sum is exact, whatever its order."""
    draw: Callable[..., Tensor] = lambda *shape: torch.randint(-3, 4, shape).float()  # noqa: E731
    return draw(rows, tokens, d_in), draw(rows, tokens, d_out), draw(d_out, d_in)


def definition(a: Tensor, g: Tensor, metric: Tensor, sketch: TensorSketch) -> Tensor:
    return reference.tensor_sketch(metric.double() * reference.linear_grads(a, g), sketch)


@pytest.mark.parametrize("m", [3, 100, 1024])
@pytest.mark.parametrize("hashing", ["balanced", "iid"])
def test_agrees_with_the_definition(hashing: HashFamily, m: int, kernels: str) -> None:
    for shape in SHAPES:
        a, g, metric = problem(*shape)
        sketch = TensorSketch(*shape[2:], m, hashing=hashing, seed=3)
        got = sketch_linear_grads(a, g, sketch, metric=metric)
        assert torch.equal(got.double(), definition(a, g, metric, sketch)), (shape, kernels)


def test_compiled_kernels_take_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both families, sides longer than the sketch: nothing falls back to torch, and so nothing large is allocated."""
    if native.library() is None:
        pytest.skip("the CPU kernels are not built here")
    monkeypatch.setattr(torch_routes, "linear_direct", lambda *_: pytest.fail("fell back to torch"))
    for hashing in ("balanced", "iid"):
        for shape in SHAPES:
            a, g, metric = problem(*shape)
            sketch_linear_grads(a, g, TensorSketch(*shape[2:], 64, hashing=hashing), metric=metric)


@pytest.mark.parametrize("m", [64, 1024])
def test_factor_one_changes_no_bit(m: int, kernels: str) -> None:
    a, g = torch.randn(3, 70, 60), torch.randn(3, 70, 50)
    sketch = TensorSketch(50, 60, m)
    plain = sketch_linear_grads(a, g, sketch, route="direct")
    assert torch.equal(sketch_linear_grads(a, g, sketch, metric=torch.ones(50, 60)), plain)


@pytest.mark.parametrize("hashing", ["balanced", "iid"])
def test_factors_that_vary_in_size(hashing: HashFamily, kernels: str) -> None:
    """Adam's metric spans many orders of magnitude."""
    a, g = torch.randn(2, 96, 160), torch.randn(2, 96, 192)
    metric = torch.logspace(-4, 4, 192 * 160)[torch.randperm(192 * 160)].view(192, 160)
    sketch = TensorSketch(192, 160, 512, hashing=hashing)
    expected_linear(a, g, sketch, metric=metric).check(sketch_linear_grads(a, g, sketch, metric=metric))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype, kernels: str) -> None:
    a, g, metric = problem(2, 17, 33, 70)
    sketch = TensorSketch(33, 70, 100)
    got = sketch_linear_grads(a.to(dtype), g.to(dtype), sketch, metric=metric)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(got.double(), definition(a, g, metric, sketch))
    assert torch.equal(sketch_linear_grads(a, g, sketch, metric=metric.to(dtype)), got.float())


def test_strides_leading_dimensions_and_slots(kernels: str) -> None:
    """The metric may be transposed, sliced or expanded; the output a slot of a buffer, which is added to."""
    a, g, _ = problem(6, 5, 33, 70)
    a, g = a.view(2, 3, 5, 70), g.transpose(1, 2).contiguous().transpose(1, 2).view(2, 3, 5, 33)
    sketch = TensorSketch(33, 70, 64)
    wide = torch.randint(-3, 4, (66, 75)).float()
    for metric in (wide[::2, 3:73], wide[:33, :70].T.contiguous().T, torch.tensor(2.0).expand(33, 70)):
        buffer = torch.ones(2, 3, 4, 64)
        out = buffer[:, :, 1]
        assert sketch_linear_grads(a, g, sketch, metric=metric, out=out) is out
        assert torch.equal(out.double(), 1 + definition(a, g, metric, sketch))
        assert (buffer[:, :, [0, 2, 3]] == 1).all()


def test_no_tokens() -> None:
    sketch = TensorSketch(4, 3, 16)
    got = sketch_linear_grads(torch.zeros(2, 0, 3), torch.zeros(2, 0, 4), sketch, metric=torch.ones(4, 3))
    assert not got.any()


@pytest.mark.parametrize("hashing", ["balanced", "iid"])
@pytest.mark.parametrize("budget", [1 << 10, 1 << 14])
def test_fallback_in_chunks(budget: int, hashing: HashFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    a, g, metric = problem(4, 37, 60, 50)
    monkeypatch.setitem(workspace.WORKSPACE_BYTES, "cpu", budget)
    sketch = TensorSketch(60, 50, 48, hashing=hashing)
    assert torch.equal(sketch_linear_grads(a, g, sketch, metric=metric).double(), definition(a, g, metric, sketch))


def test_cuda_registration_passes_it_on() -> None:
    """Host tensors make the launcher take the torch route, as a GPU without Triton would."""
    a, g, metric = (t.double() for t in problem(2, 5, 6, 7))
    sketch, out = TensorSketch(6, 7, 16), torch.zeros(2, 16, dtype=torch.float64)
    launch.linear_sketch_(LinearCall(out, a, g, sketch.tables(), 16, "direct", metric))
    assert torch.equal(out, definition(a, g, metric, sketch))


def test_operators_pass_opcheck() -> None:
    a, g, metric = problem(2, 3, 5, 4)
    sketch = TensorSketch(5, 4, 7)
    torch.library.opcheck(ops.linear_sketch_, (torch.zeros(2, 7), a, g, sketch.tables(), 7, "direct", metric))
    a, g = a.requires_grad_(), g.requires_grad_()
    torch.library.opcheck(ops.linear_sketch, (a, g, sketch.tables(), 7, "direct", metric))


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    sketch = TensorSketch(5, 4, 7, hashing="iid")
    a, g, metric = (t.double() for t in problem(2, 3, 5, 4))
    inputs = (a.requires_grad_(), g.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, y: sketch_linear_grads(x, y, sketch, metric=metric), inputs)
    learned = metric.clone().requires_grad_()
    sketch_linear_grads(*inputs, sketch, metric=learned).sum().backward()
    assert a.grad is not None
    assert learned.grad is None


def test_calling_function_compiles_as_one_graph() -> None:
    a, g, metric = problem(2, 3, 6, 8)
    sketch = TensorSketch(6, 8, 256)
    step: Callable[..., Tensor] = lambda x, y, p: sketch_linear_grads(x * 2, y, sketch, metric=p)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, g, metric), step(a, g, metric))


def test_errors() -> None:
    a, g, metric = problem(2, 3, 5, 4)
    sketch = TensorSketch(5, 4, 256)
    with pytest.raises(ValueError, match="route: got 'fft' with metric"):
        sketch_linear_grads(a, g, sketch, route="fft", metric=metric)
    with pytest.raises(ValueError, match="route: got 'dense'"):
        sketch_linear_grads(a, g, sketch, route="dense", metric=metric)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"metric: got shape \(4, 5\).*\(5, 4\)"):
        sketch_linear_grads(a, g, sketch, metric=metric.T)
    with pytest.raises(TypeError, match="metric: got list"):
        sketch_linear_grads(a, g, sketch, metric=[1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="metric: got dtype"):
        sketch_linear_grads(a, g, sketch, metric=metric.long())
    with pytest.raises(ValueError, match="different devices"):
        sketch_linear_grads(a, g, sketch, metric=metric.to("meta"))
    call = LinearCall(torch.zeros(2, 256), a, g, sketch.tables(), 256, "fft", metric)
    with pytest.raises(ValueError, match="metric: the fft route cannot apply it"):
        torch_routes.linear(call)
    with pytest.raises(ValueError, match="metric: the fft route cannot apply it"):
        ops.linear_sketch_(*call)


# ---------------------------------------------------------------------------------------------------------------
# Gradients that are there as matrices


def test_matrix_agrees_with_the_definition() -> None:
    sketch, metric = TensorSketch(40, 24, 100), torch.randint(-3, 4, (24, 40)).double().T
    grads = torch.randint(-3, 4, (3, 40, 24)).float()
    want = reference.tensor_sketch(metric * grads, sketch)
    assert torch.equal(sketch_matrix_grads(grads, sketch, metric=metric).double(), want)
    out = torch.ones(3, 100)
    sketch_matrix_grads(grads, sketch, metric=metric, out=out)
    assert torch.equal(out.double() - 1, want)


def test_matrix_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    sketch, metric = TensorSketch(7, 5, 12), torch.randint(-3, 4, (7, 5)).float()
    grads = torch.randint(-3, 4, (3, 7, 5)).float()
    monkeypatch.setitem(workspace.WORKSPACE_BYTES, "cpu", 300)
    assert torch.equal(
        sketch_matrix_grads(grads, sketch, metric=metric).double(), reference.tensor_sketch(metric * grads, sketch)
    )


def test_matrix_is_differentiable_in_the_gradients_alone() -> None:
    sketch = TensorSketch(4, 3, 5)
    grads = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    metric = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: sketch_matrix_grads(g, sketch, metric=metric), grads)
    sketch_matrix_grads(grads, sketch, metric=metric).sum().backward()
    assert metric.grad is None


def test_matrix_names_a_metric_that_does_not_fit() -> None:
    sketch = TensorSketch(4, 3, 5)
    with pytest.raises(ValueError, match=r"^metric: got shape \(3, 4\); pass one number per weight, shape \(4, 3\)$"):
        sketch_matrix_grads(torch.zeros(2, 4, 3), sketch, metric=torch.zeros(3, 4))
