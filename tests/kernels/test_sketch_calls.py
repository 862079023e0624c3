"""How the sketch functions are called: nothing to sum, ``out=``, examples that stay alone, surrounding modes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sketch_cases import (
    SKETCH,
    assert_sketches,
    call,
    expected_embedding,
    expected_linear,
    expected_matrix,
    expected_vector,
    integers,
    kinds,
)
from torch import Tensor

import sdi_kernels as sk
from sdi_kernels import TensorSketch

pytestmark = pytest.mark.numeric


@kinds
@pytest.mark.parametrize(("lead", "tokens"), [((3,), 0), ((0,), 2), ((2, 0), 2), ((0,), 0), ((), 0)], ids=str)
def test_nothing_to_sum(kind: str, lead: tuple[int, ...], tokens: int) -> None:
    f, _ = call(kind, lead, tokens)
    if kind != "matrix":
        assert torch.equal(f(), torch.zeros(*lead, 7))
    assert f().shape == (*lead, 7)
    out = torch.ones(*lead, 7)
    f(out=out)
    if kind != "matrix":
        assert torch.equal(out, torch.ones(*lead, 7))


# ---------------------------------------------------------------------------------------------------------------
# out=


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_out_is_added_to_and_returned(kind: str, dtype: torch.dtype) -> None:
    f, want = call(kind, (3,), dtype=dtype)
    out = integers(3, 7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    before = out.clone()
    assert f(out=out) is out
    assert f(out=out) is out
    assert_sketches(out, before + 2 * want, exact=kind != "fft")


# Where the slots of one (examples, steps, m) buffer lie: a step's slot, an m-slice, a transposed buffer, a gap
# between the last two dimensions.
SLOTS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "step": lambda: (b := torch.full((3, 4, 7), 5.0), b[:, 2]),
    "columns": lambda: (b := torch.full((3, 20), 5.0), b[:, 6:13]),
    "transposed": lambda: (b := torch.full((7, 3), 5.0), b.T),
    "every second": lambda: (b := torch.full((6, 14), 5.0), b[::2, ::2]),
}


@kinds
@pytest.mark.parametrize("slot", SLOTS)
def test_out_may_be_a_slice(kind: str, slot: str) -> None:
    f, want = call(kind, (3,))
    buffer, out = SLOTS[slot]()
    assert f(out=out) is out
    assert_sketches(out, 5 + want, exact=kind != "fft")
    out.fill_(5)
    assert torch.equal(buffer, torch.full_like(buffer, 5)), "something beside the slot was written"


@kinds
def test_out_may_have_leading_dimensions_that_do_not_merge(kind: str) -> None:
    f, want = call(kind, (2, 3))
    buffer = torch.full((3, 4, 2, 7), 5.0)
    out = buffer[:, 1].transpose(0, 1)
    assert f(out=out) is out
    assert_sketches(out, 5 + want, exact=kind != "fft")
    out.fill_(5)
    assert torch.equal(buffer, torch.full_like(buffer, 5))


def test_out_is_not_differentiated_through() -> None:
    a, g = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    out = torch.zeros(2, 7)
    assert not sk.sketch_linear_grads(a, g, SKETCH, out=out).requires_grad
    assert sk.sketch_linear_grads(a, g, SKETCH).requires_grad


# ---------------------------------------------------------------------------------------------------------------
# One example never reaches another; modes that surround a call do not change it


@kinds
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_example_stays_alone(kind: str, bad: float) -> None:
    x = {d: integers(4, 6, d) for d in (4, 5)}
    grads, ids = integers(4, 5, 4), torch.randint(5, (4, 6))

    def f() -> Tensor:
        if kind == "matrix":
            return sk.sketch_matrix_grads(grads, SKETCH)
        if kind == "embedding":
            return sk.sketch_embedding_grads(ids, x[4], SKETCH)
        if kind == "vector":
            return sk.sketch_vector_grads(x[5], SKETCH.out)
        return sk.sketch_linear_grads(x[4], x[5], SKETCH, route=kind)  # type: ignore[arg-type]

    clean = f()
    for values in (x[4], x[5], grads):
        values[2, 3, 1] = bad
    spoilt = f()
    assert not torch.isfinite(spoilt[2]).all(), "a bad value was lost"
    assert torch.equal(spoilt[[0, 1, 3]], clean[[0, 1, 3]])


@kinds
def test_autocast_does_not_lower_the_precision(kind: str) -> None:
    x = {d: torch.randn(2, 60, d) for d in (4, 5)}
    ids = torch.randint(5, (2, 60))
    run: Callable[[], Tensor]
    if kind == "matrix":
        run, expected = lambda: sk.sketch_matrix_grads(x[4][:, :5], SKETCH), expected_matrix(x[4][:, :5], SKETCH)
    elif kind == "embedding":
        run, expected = lambda: sk.sketch_embedding_grads(ids, x[4], SKETCH), expected_embedding(ids, x[4], SKETCH)
    elif kind == "vector":
        run, expected = lambda: sk.sketch_vector_grads(x[5], SKETCH.out), expected_vector(x[5], SKETCH.out)
    else:
        run = lambda: sk.sketch_linear_grads(x[4], x[5], SKETCH, route=kind)  # type: ignore[arg-type]  # noqa: E731
        expected = expected_linear(x[4], x[5], SKETCH)
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    assert got.dtype == torch.float32
    expected.check(got, kind)


def test_sketch_first_used_in_inference_mode_serves_training() -> None:
    a, g = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    with torch.inference_mode():
        sketch = TensorSketch(5, 4, 7)
        sk.sketch_linear_grads(a, g, sketch)
    g.requires_grad_()
    sk.sketch_linear_grads(a, g, sketch).sum().backward()
    assert g.grad is not None


def test_sketch_made_under_a_default_device_is_a_host_sketch() -> None:
    with torch.device("meta"):
        sketch = TensorSketch(5, 4, 7)
    assert {t.device.type for t in sketch.tables()} == {"cpu"}
    assert sketch.fingerprint == SKETCH.fingerprint
