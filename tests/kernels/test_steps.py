"""Lists of pairs: all uses of a looped layer by one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sketch_cases import Uses, dtypes, families, integers, uses
from torch import Tensor

import sdi_kernels as sk
from sdi_kernels import HashFamily, TensorSketch, ops

D_OUT, D_IN, M = 5, 4, 16
SKETCH = TensorSketch(D_OUT, D_IN, M)
KINDS = pytest.mark.parametrize("kind", ["equal", "summed", "ragged"])


def sketched(made: Uses, sketch: TensorSketch = SKETCH, **options: Any) -> Tensor:
    return sk.sketch_linear_grads(
        made.activations, made.grad_outputs, sketch, steps=made.steps, rows=made.rows, **options
    )


@pytest.mark.numeric
@families
@KINDS
@pytest.mark.parametrize("route", ["auto", "direct", "fft"])
def test_every_pair_is_added_to_its_slot(kind: str, route: sk.Route, hashing: HashFamily) -> None:
    sketch = TensorSketch(D_OUT, D_IN, M, hashing=hashing)
    made = uses(kind, D_IN, D_OUT)
    out = torch.full((made.size[0], 3, made.size[1], M + 2), 0.5)
    slots = out[:, 1, :, 1 : M + 1]
    assert sketched(made, sketch, route=route, out=slots) is slots
    made.expected(sketch, before=0.5).check(slots)
    slots.fill_(0.5)
    assert (out == 0.5).all()


@dtypes
@KINDS
def test_exact_on_integers(kind: str, dtype: torch.dtype) -> None:
    made = uses(kind, D_IN, D_OUT, dtype, integers)
    out = torch.zeros(*made.size, M, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(sketched(made, out=out, route="direct").double(), made.expected(SKETCH).exact)


def test_one_step_a_pair_without_more_said() -> None:
    made = uses("equal", D_IN, D_OUT)
    got = sk.sketch_linear_grads(tuple(made.activations), made.grad_outputs, SKETCH, route="direct")
    assert got.shape == (2, 5, M)
    for k, (a, g) in enumerate(zip(made.activations, made.grad_outputs, strict=True)):
        assert torch.equal(got[:, k], sk.sketch_linear_grads(a, g, SKETCH, route="direct"))


def test_the_result_is_as_small_as_holds_every_pair() -> None:
    made = uses("ragged", D_IN, D_OUT)
    got = sketched(made)
    assert got.shape == (4, 3, M)
    made._replace(size=(4, 3)).expected(SKETCH).check(got)


@pytest.mark.numeric
@pytest.mark.parametrize("route", ["direct", "fft"])
def test_strided_views(route: sk.Route) -> None:
    made = uses("ragged", D_IN, D_OUT)
    a = [torch.stack([x, x], 2).flatten(1, 2)[:, ::2] for x in made.activations]
    g = [torch.stack([x, x], -1)[..., 0] for x in made.grad_outputs]
    got = sketched(made._replace(activations=a, grad_outputs=g), route=route, out=torch.zeros(M, 4, 4).permute(1, 2, 0))
    made.expected(SKETCH).check(got)


@pytest.mark.numeric
@KINDS
def test_a_metric(kind: str) -> None:
    made, metric = uses(kind, D_IN, D_OUT), torch.rand(D_OUT, D_IN)
    made.expected(SKETCH, metric=metric).check(sketched(made, metric=metric, out=torch.zeros(*made.size, M)))


@KINDS
def test_gradients(kind: str) -> None:
    made = uses(kind, D_IN, D_OUT, torch.float64)
    inputs = [x.requires_grad_(i != 1) for i, x in enumerate((*made.activations, *made.grad_outputs))]
    metric, half = torch.rand(D_OUT, D_IN), len(inputs) // 2

    def f(*x: Tensor) -> Tensor:
        return sketched(made._replace(activations=list(x[:half]), grad_outputs=list(x[half:])), metric=metric)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.numeric
@KINDS
def test_compiles_as_one_graph(kind: str) -> None:
    made = uses(kind, D_IN, D_OUT)
    torch._dynamo.reset()

    def f(a: list[Tensor], g: list[Tensor], out: Tensor) -> Tensor:
        doubled = made._replace(activations=[2 * x for x in a], grad_outputs=g)
        sketched(doubled, out=out)
        return sketched(doubled)

    out = torch.zeros(*made.size, M)
    got = torch.compile(f, fullgraph=True, backend="aot_eager")(made.activations, made.grad_outputs, out)
    expected = made.expected(SKETCH)
    expected.check(out / 2)
    assert torch.equal(got, out[:, : got.shape[1]])


def test_fake_and_meta() -> None:
    made = uses("ragged", D_IN, D_OUT)
    a, g = ([x.to("meta") for x in values] for values in (made.activations, made.grad_outputs))
    got = sketched(made._replace(activations=a, grad_outputs=g), route="direct")
    assert got.shape == (4, 3, M)
    assert got.is_meta
    with pytest.raises(ValueError, match=r"grad_outputs\[1\]: got shape \(1, 6, 5\) on meta"):
        sketched(made._replace(activations=a, grad_outputs=[g[0], g[1][:, 1:], *g[2:]]), route="direct")


A, G = torch.zeros(2, 3, D_IN), torch.zeros(2, 3, D_OUT)
OUT = torch.zeros(2, 2, M)
Change = dict[str, Any]
WRONG: dict[str, tuple[Change, type[Exception], str]] = {
    "no pair": ({"activations": [], "grad_outputs": []}, ValueError, "activations: got a list of 0; pass at least one"),
    "a pair less": ({"grad_outputs": [G]}, ValueError, "grad_outputs: got a list of 1; pass 2, one for each"),
    "no list": ({"grad_outputs": G}, TypeError, "grad_outputs: got Tensor beside a list of activations; pass a list"),
    "no tensor": ({"activations": [A, 1]}, TypeError, "activations[1]: got int; pass a torch.Tensor"),
    "integers": ({"activations": [A.int()] * 2}, TypeError, "activations[0]: got dtype torch.int32; pass float32"),
    "mixed dtypes": ({"grad_outputs": [G, G.half()]}, TypeError, "grad_outputs[1]: got dtype torch.float16, grad_outp"),
    "two dimensions": ({"activations": [A, A[0]]}, ValueError, "activations[1]: got shape (3, 4) on cpu; pass a t"),
    "width": ({"activations": [A, G]}, ValueError, "activations[1]: got shape (2, 3, 5) on cpu; pass a tensor of sh"),
    "tokens": ({"grad_outputs": [G, G[:, 1:]]}, ValueError, "grad_outputs[1]: got shape (2, 2, 5) on cpu; pass a te"),
    "device": ({"grad_outputs": [G, G.to("meta")]}, ValueError, "grad_outputs[1]: got a tensor on meta, activations["),
    "a step less": ({"steps": [0]}, ValueError, "steps: got 1 numbers for 2 pairs; pass one for each"),
    "steps as a tensor": ({"steps": torch.arange(2)}, TypeError, "steps: got Tensor; pass a list of integers"),
    "half a step": ({"steps": [0, 1.5]}, TypeError, "steps[1]: got float 1.5; pass an integer"),
    "a step beyond": ({"steps": [0, 2]}, ValueError, "steps[1]: got 2; out has room for steps 0 to 1, pass one of th"),
    "a step before": ({"steps": [-1, 0]}, ValueError, "steps[0]: got -1; out has room"),
    "a negative step, no out": ({"steps": [-1, 0], "out": None}, ValueError, "steps[0]: got -1; out has room"),
    "a row beyond": ({"rows": [0, 1]}, ValueError, "rows[1]: got 1 for a pair of 2 rows; out has 2 rows, pass where"),
    "a row before": ({"rows": [-1, 0]}, ValueError, "rows[0]: got -1 for a pair of 2 rows"),
    "out of two dimensions": ({"out": OUT[0]}, ValueError, "out: got shape (2, 16); pass at least 3 dimensions"),
    "out of another size": ({"out": OUT[..., 1:]}, ValueError, "out: got shape (2, 2, 15) torch.float32 on cpu; pass"),
    "out of another dtype": ({"out": OUT.double()}, ValueError, "out: got shape (2, 2, 16) torch.float64 on cpu; pass"),
    "a metric and fft": ({"metric": torch.ones(5, 4), "route": "fft"}, ValueError, "route: got 'fft' with metric; the"),
    "a metric and no route": ({"metric": torch.ones(5, 4), "route": "dense"}, ValueError, "route: got 'dense'"),
    "steps of tensors": ({"activations": A, "grad_outputs": G, "steps": [0]}, ValueError, "steps, rows: got them with"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors(case: str) -> None:
    change, kind, message = WRONG[case]
    call: Change = {"activations": [A, A], "grad_outputs": [G, G], "sketch": SKETCH, "out": OUT, **change}
    with pytest.raises(kind) as caught:
        sk.sketch_linear_grads(**call)
    text = str(caught.value)
    assert text.startswith(message)
    assert "\n" not in text


@pytest.mark.parametrize(
    "change",
    [
        lambda call: {**call, "steps": [0]},
        lambda call: {**call, "rows": [0, 3]},
        lambda call: {**call, "grad_outputs": [G]},
        lambda call: {**call, "activations": [], "grad_outputs": []},
        lambda call: {**call, "activations": [A, A[..., 1:]]},
        lambda call: {**call, "out": OUT[:, 0]},
        lambda call: {**call, "out": OUT[:, :1].expand(2, 2, M)},
        lambda call: {**call, "m": M + 1},
        lambda call: {**call, "route": "dense"},
    ],
)
def test_the_operator_itself_refuses(change: Callable[[Change], Change]) -> None:
    call = {"out": OUT, "activations": [A, A], "grad_outputs": [G, G], "tables": SKETCH.tables(), "m": M,
            "route": "direct", "steps": [0, 1], "rows": [0, 0]}  # fmt: skip
    ops.linear_steps_sketch_(**call)
    with pytest.raises((ValueError, TypeError)):
        ops.linear_steps_sketch_(**change(call))


def test_the_operator_that_returns_refuses() -> None:
    for size, acts in (([2], [A]), ([2, 1], [])):
        with pytest.raises(ValueError, match="size: got"):
            ops.linear_steps_sketch(acts, [G], SKETCH.tables(), M, "direct", [0], [0], size)


def test_autograd_sees_that_out_was_written_to() -> None:
    out = torch.zeros(2, 3, M)
    version, weight = out._version, torch.ones(2, 2, M, requires_grad=True)
    product = weight * out[:, 1:]
    with torch.inference_mode():
        sk.sketch_linear_grads([A], [G], SKETCH, out=torch.zeros(2, 1, M))
    sk.sketch_linear_grads([A.requires_grad_(), A], [G, G], SKETCH, out=out[:, 1:])
    A.requires_grad_(False)
    assert out._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.numeric
def test_compiles_for_any_batch_size() -> None:
    torch._dynamo.reset()
    f = torch.compile(lambda a, g: sk.sketch_linear_grads(a, g, SKETCH), dynamic=True, fullgraph=True, backend="eager")
    for rows, tokens in ((2, 3), (7, 5)):
        made = Uses(
            [torch.randn(rows, tokens, D_IN) for _ in range(2)],
            [torch.randn(rows, tokens, D_OUT) for _ in range(2)],
            [0, 1],
            [0, 0],
            (rows, 2),
        )
        made.expected(SKETCH).check(f(made.activations, made.grad_outputs))
