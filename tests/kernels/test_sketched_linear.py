"""``sketched_linear``: F.linear forward, dX and sketches backward, nothing for the parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from accuracy import Expected
from sketch_cases import expected_linear
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sdi_kernels as sk
from sdi_kernels import CountSketch, HashFamily, TensorSketch, reference

pytestmark = pytest.mark.numeric

B, T, D_IN, D_OUT, M = 3, 5, 4, 6, 8
SKETCH = TensorSketch(D_OUT, D_IN, M)
BIAS_SKETCH = CountSketch(D_OUT, 5)

families = pytest.mark.parametrize("hashing", sk.HASH_FAMILIES)
double = torch.float64


def leaf(*shape: int, dtype: torch.dtype = double) -> Tensor:
    return torch.randn(shape, dtype=double).to(dtype).requires_grad_()


def per_example_gradients(f: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """Gradients of ``f(x[b:b+1]).sum()`` for each example alone: obviously correct, and slow."""
    each = [torch.autograd.grad(f(x[b : b + 1]).sum(), parameters) for b in range(len(x))]
    return [torch.stack(grads) for grads in zip(*each, strict=True)]


@families
@pytest.mark.parametrize("middle", [(), (T,), (2, T), (T, 1, 2)], ids=str)
@pytest.mark.parametrize("route", ["auto", "direct", "fft"])
def test_forward_and_both_gradients(hashing: HashFamily, middle: tuple[int, ...], route: sk.Route) -> None:
    """Output and dX are those of F.linear; ``out`` gets the sketch of each example's exact gradient."""
    sketch = TensorSketch(D_OUT, D_IN, M, hashing=hashing)
    bias_sketch = CountSketch(D_OUT, 5, hashing=hashing)
    x, weight, bias = leaf(B, *middle, D_IN), leaf(D_OUT, D_IN), leaf(D_OUT)
    out, bias_out = torch.zeros(B, M, dtype=double), torch.zeros(B, 5, dtype=double)

    y = sk.sketched_linear(
        x, weight, bias, sketch=sketch, out=out, bias_sketch=bias_sketch, bias_out=bias_out, route=route
    )
    assert torch.equal(y, F.linear(x, weight, bias))
    assert not out.any(), "the forward pass must not write sketches"
    y.sin().sum().backward()

    (dx,) = torch.autograd.grad(F.linear(x, weight, bias).sin().sum(), x)
    torch.testing.assert_close(x.grad, dx)
    assert weight.grad is None
    assert bias.grad is None

    dw, db = per_example_gradients(lambda x: F.linear(x, weight, bias).sin(), x, weight, bias)
    torch.testing.assert_close(out, reference.tensor_sketch(dw, sketch), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(bias_out, reference.count_sketch(db, bias_sketch), rtol=1e-10, atol=1e-10)


def looped(x: Tensor, weight: Tensor, bias: Tensor, use: Callable[[Tensor, int], Tensor], steps: int) -> Tensor:
    h = x
    for t in range(steps):
        h = x + torch.tanh(use(h, t))
    return h.square()


@families
def test_looped_use_gives_every_step_its_gradient(hashing: HashFamily) -> None:
    """``out=buffer[:, t]``: slot t gets the sketch of the gradient through the t-th use alone (paper, eq. 1-2)."""
    steps, sketch = 4, TensorSketch(D_IN, D_IN, M, hashing=hashing)
    x, weight, bias = leaf(B, T, D_IN), leaf(D_IN, D_IN), leaf(D_IN)
    bias_sketch = CountSketch(D_IN, 5, hashing=hashing)
    buffer, bias_buffer = torch.zeros(B, steps + 1, M, dtype=double), torch.zeros(B, steps + 1, 5, dtype=double)
    slots = {"sketch": sketch, "bias_sketch": bias_sketch}
    y = looped(
        x,
        weight,
        bias,
        lambda h, t: sk.sketched_linear(h, weight, bias, out=buffer[:, t], bias_out=bias_buffer[:, t], **slots),
        steps,
    )
    y.sum().backward()

    # One copy of the parameters for each step gives exact step gradients by autograd alone.
    copies = [(leaf(D_IN, D_IN), leaf(D_IN)) for _ in range(steps)]
    for w, b in copies:
        w.data.copy_(weight.data)
        b.data.copy_(bias.data)
    unrolled = lambda x: looped(x, weight, bias, lambda h, t: F.linear(h, *copies[t]), steps)  # noqa: E731
    exact = per_example_gradients(unrolled, x, *(p for pair in copies for p in pair))
    for t in range(steps):
        want = reference.tensor_sketch(exact[2 * t], sketch)
        torch.testing.assert_close(buffer[:, t], want, rtol=1e-9, atol=1e-9)
        want = reference.count_sketch(exact[2 * t + 1], bias_sketch)
        torch.testing.assert_close(bias_buffer[:, t], want, rtol=1e-9, atol=1e-9)
    assert not buffer[:, steps].any(), "a step that never ran has no gradient"
    (dx,) = torch.autograd.grad(unrolled(x).sum(), x)
    torch.testing.assert_close(x.grad, dx)

    # Conservation: the steps add up to the gradient of the tied weight.
    tied = per_example_gradients(
        lambda x: looped(x, weight, bias, lambda h, t: F.linear(h, weight, bias), steps), x, weight
    )
    torch.testing.assert_close(buffer.sum(1), reference.tensor_sketch(tied[0], sketch), rtol=1e-9, atol=1e-9)


def test_uses_that_share_a_slot_add_up() -> None:
    """Twice within a step, and once more in a second backward pass: all add to what is there."""
    sketch = TensorSketch(D_IN, D_IN, M)
    x, weight = leaf(B, T, D_IN), leaf(D_IN, D_IN)

    def step(out: Tensor) -> Tensor:
        h = torch.tanh(sk.sketched_linear(x, weight, sketch=sketch, out=out))
        return sk.sketched_linear(h, weight, sketch=sketch, out=out)

    (dw,) = per_example_gradients(lambda x: F.linear(torch.tanh(F.linear(x, weight)), weight), x, weight)
    want = reference.tensor_sketch(dw, sketch)
    out = torch.ones(B, M, dtype=double)
    step(out).sum().backward()
    torch.testing.assert_close(out, 1 + want)
    step(out).sum().backward()
    torch.testing.assert_close(out, 1 + 2 * want)


def test_backward_twice_through_one_graph() -> None:
    """With retain_graph: a second loss of the same forward pass adds its own sketch."""
    x, weight, out = leaf(B, T, D_IN), leaf(D_OUT, D_IN), torch.zeros(B, M, dtype=double)
    y = sk.sketched_linear(x, weight, sketch=SKETCH, out=out)
    y.sum().backward(retain_graph=True)
    once = out.clone()
    (2 * y).sum().backward()
    torch.testing.assert_close(out, 3 * once)


def test_truncated_backpropagation_leaves_steps_untouched() -> None:
    sketch = TensorSketch(D_IN, D_IN, M)
    weight, buffer = leaf(D_IN, D_IN), torch.zeros(B, 4, M, dtype=double)
    h = torch.randn(B, T, D_IN, dtype=double)
    for t in range(4):
        h = torch.tanh(sk.sketched_linear(h, weight, sketch=sketch, out=buffer[:, t]))
        if t == 1:
            h = h.detach()
    h.sum().backward()
    assert not buffer[:, :2].any()
    assert buffer[:, 2].any(1).all()
    assert buffer[:, 3].any(1).all()


@pytest.mark.parametrize("x_requires_grad", [True, False])
@pytest.mark.parametrize("weight_requires_grad", [True, False])
def test_either_leaf_is_enough_to_reach_the_layer(x_requires_grad: bool, weight_requires_grad: bool) -> None:
    x, weight = leaf(B, T, D_IN), leaf(D_OUT, D_IN)
    out = torch.zeros(B, M, dtype=double)
    y = sk.sketched_linear(
        x.requires_grad_(x_requires_grad), weight.requires_grad_(weight_requires_grad), sketch=SKETCH, out=out
    )
    assert y.requires_grad == (x_requires_grad or weight_requires_grad)
    if y.requires_grad:
        y.sum().backward()
        grads = torch.ones(B, T, D_OUT, dtype=double)
        torch.testing.assert_close(out, reference.sketch_linear_grads(x, grads, SKETCH))
    assert (x.grad is not None) == x_requires_grad
    assert weight.grad is None


def test_a_bias_need_not_be_sketched() -> None:
    x, weight, bias = leaf(B, T, D_IN), leaf(D_OUT, D_IN), leaf(D_OUT)
    out = torch.zeros(B, M, dtype=double)
    y = sk.sketched_linear(x, weight, bias, sketch=SKETCH, out=out)
    assert torch.equal(y, F.linear(x, weight, bias))
    y.sum().backward()
    assert bias.grad is None
    assert out.any()


def test_no_grad_writes_nothing() -> None:
    out = torch.zeros(B, M, dtype=double)
    with torch.no_grad():
        y = sk.sketched_linear(leaf(B, T, D_IN), leaf(D_OUT, D_IN), sketch=SKETCH, out=out)
    assert not y.requires_grad
    assert not out.any()


# Where a slot may lie in a larger buffer: any strides.
SLOTS: dict[str, Callable[[Tensor], Tensor]] = {
    "step": lambda buffer: buffer[:, 1],
    "columns": lambda buffer: buffer.flatten(1)[:, 3 : 3 + M],
    "transposed": lambda buffer: buffer.flatten().view(-1, B).T[:, :M],
    "strided": lambda buffer: buffer.flatten(1)[:, ::2][:, :M],
}


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_and_low_precision(slot: str, dtype: torch.dtype) -> None:
    """Non-contiguous x, weight, gradient and buffer at once; sketches accumulate in float32 whatever the inputs."""
    x = leaf(D_IN, T, B, dtype=dtype).detach().permute(2, 1, 0).requires_grad_()
    weight = leaf(D_IN, D_OUT, dtype=dtype).detach().T.requires_grad_()
    buffer = torch.zeros(B, 4, M)
    grads = torch.randn(D_OUT, B, T).to(dtype).permute(1, 2, 0)
    y = sk.sketched_linear(x, weight, sketch=SKETCH, out=SLOTS[slot](buffer))
    assert y.dtype == dtype
    y.backward(grads)
    expected_linear(x, grads, SKETCH).check(SLOTS[slot](buffer))
    SLOTS[slot](buffer).zero_()
    assert not buffer.any(), "something beside the slot was written"
    assert x.grad is not None
    assert x.grad.dtype == dtype


def test_autocast_is_that_of_linear() -> None:
    x, weight, bias = (leaf(*s, dtype=torch.float32) for s in ((B, T, D_IN), (D_OUT, D_IN), (D_OUT,)))
    out = torch.zeros(B, M)
    with torch.autocast("cpu", torch.bfloat16):
        y = sk.sketched_linear(x, weight, bias, sketch=SKETCH, out=out)
        want = F.linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)
    grads = torch.randn(B, T, D_OUT).bfloat16()
    factors = grads.double(), weight.detach().bfloat16().double()
    (dx,) = torch.autograd.grad(want, x, grads)
    y.backward(grads)
    exact, magnitude = (torch.einsum("bto,oi->bti", *f) for f in (factors, [f.abs() for f in factors]))
    Expected(exact, dx, magnitude, torch.finfo(torch.bfloat16).eps).check(x.grad)
    # What the layer really multiplied is x in bfloat16.
    expected_linear(x.bfloat16(), grads, SKETCH).check(out)


def test_recomputation_gives_the_same_sketches() -> None:
    """Non-reentrant checkpointing runs the forward pass twice; the slot belongs to the use, not to a counter."""
    steps, sketch = 3, TensorSketch(D_IN, D_IN, M)
    x, weight = leaf(B, T, D_IN), leaf(D_IN, D_IN)
    buffers = torch.zeros(2, B, steps, M, dtype=double)

    for recompute, buffer in zip((False, True), buffers, strict=True):
        h = x
        for t in range(steps):

            def step(h: Tensor, out: Tensor = buffer[:, t]) -> Tensor:
                return torch.tanh(sk.sketched_linear(h, weight, sketch=sketch, out=out))

            h = checkpoint(step, h, use_reentrant=False) if recompute else step(h)
        h.sum().backward()
    assert buffers[0].any(-1).all()
    torch.testing.assert_close(buffers[0], buffers[1])


def test_offloaded_activations() -> None:
    """Hooks that move saved tensors must not make the backward pass write to a copy of the buffer."""
    x, weight, out = leaf(B, T, D_IN), leaf(D_OUT, D_IN), torch.zeros(B, M, dtype=double)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        sk.sketched_linear(x, weight, sketch=SKETCH, out=out).sum().backward()
    torch.testing.assert_close(out, reference.sketch_linear_grads(x, torch.ones(B, T, D_OUT), SKETCH))


def test_graph_lets_go_of_its_buffer() -> None:
    out = torch.zeros(B, M, dtype=double)
    gone = weakref.ref(out)
    y = sk.sketched_linear(leaf(B, T, D_IN), leaf(D_OUT, D_IN), sketch=SKETCH, out=out)
    y.sum().backward()
    del y, out
    assert gone() is None


@pytest.mark.parametrize("shape", [(0, T, D_IN), (B, 0, D_IN), (0, 0, D_IN), (0, D_IN)], ids=str)
def test_empty_batches(shape: tuple[int, ...]) -> None:
    x, weight, bias = leaf(*shape), leaf(D_OUT, D_IN), leaf(D_OUT)
    out, bias_out = torch.zeros(shape[0], M, dtype=double), torch.zeros(shape[0], 5, dtype=double)
    y = sk.sketched_linear(x, weight, bias, sketch=SKETCH, out=out, bias_sketch=BIAS_SKETCH, bias_out=bias_out)
    y.sum().backward()
    assert y.shape == (*shape[:-1], D_OUT)
    assert x.grad is not None
    assert x.grad.shape == shape
    assert not out.any()
    assert not bias_out.any()


# ---------------------------------------------------------------------------------------------------------------
# Errors

X, W, BIAS, OUT = torch.zeros(B, T, D_IN), torch.zeros(D_OUT, D_IN), torch.zeros(D_OUT), torch.zeros(B, M)
Case = tuple[dict[str, object], type[Exception], str]
ERRORS: dict[str, Case] = {
    "x: no tensor": ({"x": [1.0]}, TypeError, "x: got list; pass a torch.Tensor"),
    "x: dtype": ({"x": X.long()}, TypeError, "x: got dtype torch.int64; pass float32"),
    "x: dimensions": ({"x": X[0, 0]}, ValueError, "x: got shape (4,); pass at least 2 dimensions"),
    "x: d_in": (
        {"x": X[..., :3]},
        ValueError,
        "x: last dimension is 3, but the sketch was made for d_in=4; pass shape (..., 4)",
    ),
    "weight": (
        {"weight": W.T},
        ValueError,
        "weight: got shape (4, 6), the sketch was made for (6, 4); make the sketch for this layer",
    ),
    "bias": ({"bias": BIAS[:5]}, ValueError, "bias: got shape (5,); pass shape (6,)"),
    "devices": (
        {"weight": W.to("meta")},
        ValueError,
        "x: tensors lie on different devices (x on cpu, weight on meta); move them together",
    ),
    "sketch": ({"sketch": BIAS_SKETCH}, TypeError, "sketch: got CountSketch; pass a TensorSketch"),
    "out: none": ({"out": None}, TypeError, "out: got NoneType; pass a torch.Tensor of shape (3, 8)"),
    "out: shape": (
        {"out": OUT[:, :7]},
        ValueError,
        "out: got shape (3, 7) torch.float32 on cpu; pass a buffer of shape (3, 8) torch.float32 on cpu",
    ),
    "out: device": (
        {"out": OUT.to("meta")},
        ValueError,
        "out: got shape (3, 8) torch.float32 on meta; pass a buffer of shape (3, 8) torch.float32 on cpu",
    ),
    "out: dtype": (
        {"x": X.bfloat16(), "weight": W.bfloat16(), "out": OUT.bfloat16()},
        ValueError,
        "out: got shape (3, 8) torch.bfloat16 on cpu; pass a buffer of shape (3, 8) torch.float32 on cpu",
    ),
    "out: requires grad": (
        {"out": OUT.clone().requires_grad_()},
        ValueError,
        "out: got a tensor that requires grad; detach it",
    ),
    "bias_sketch alone": (
        {"bias": BIAS, "bias_sketch": BIAS_SKETCH},
        ValueError,
        "bias_sketch, bias_out: pass both (and a bias) to sketch the bias, or neither",
    ),
    "bias_out alone": (
        {"bias": BIAS, "bias_out": torch.zeros(B, 5)},
        ValueError,
        "bias_sketch, bias_out: pass both (and a bias) to sketch the bias, or neither",
    ),
    "no bias to sketch": (
        {"bias_sketch": BIAS_SKETCH, "bias_out": torch.zeros(B, 5)},
        ValueError,
        "bias_sketch, bias_out: pass both (and a bias) to sketch the bias, or neither",
    ),
    "bias_sketch: kind": (
        {"bias": BIAS, "bias_sketch": SKETCH, "bias_out": torch.zeros(B, 5)},
        TypeError,
        "bias_sketch: got TensorSketch; pass a CountSketch",
    ),
    "bias_sketch: d": (
        {"bias": BIAS, "bias_sketch": CountSketch(7, 5), "bias_out": torch.zeros(B, 5)},
        ValueError,
        "bias_sketch: got one for d=7, the bias has 6; make the sketch for this bias",
    ),
    "bias_out: shape": (
        {"bias": BIAS, "bias_sketch": BIAS_SKETCH, "bias_out": torch.zeros(B, 4)},
        ValueError,
        "bias_out: got shape (3, 4) torch.float32 on cpu; pass a buffer of shape (3, 5) torch.float32 on cpu",
    ),
    "route": ({"route": "gpu"}, ValueError, "route: got 'gpu'; use one of 'auto', 'direct', 'fft'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    change, kind, message = ERRORS[case]
    given: dict[str, object] = {"x": X, "weight": W, "sketch": SKETCH, "out": OUT, **change}
    with pytest.raises(kind) as caught:
        sk.sketched_linear(**given)  # type: ignore[arg-type]
    text = str(caught.value)
    assert text.startswith(message)
    assert "\n" not in text
