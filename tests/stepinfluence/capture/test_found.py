"""Owners found by gradients, where a custom function hides whose rows are whose: rows in any order, some without
gradient, and no backward pass more than it takes to tell the examples' numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from compare import compare
from stepinfluence import LayoutError, attach
from torch import Tensor, nn
from zoo import Core, D

pytestmark = pytest.mark.numeric


class Ordered(torch.autograd.Function):
    """Rows in another order, out of sight."""

    backward_passes = 0

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        return rows[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        Ordered.backward_passes += 1
        return torch.empty_like(grad).index_copy_(0, ctx.order, grad), None


def order_of(kind: str, batch: int, tokens: int) -> Tensor:
    numbers = torch.arange(batch * tokens)
    if kind == "tokens first":
        return numbers.view(batch, tokens).t().flatten()
    if kind == "shuffled":
        return numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(3))]
    return {"as they are": numbers, "backwards": numbers.flip(0)}[kind]


def hidden(kind: str) -> Core:
    def run(s: Any, x: Tensor) -> Tensor:
        order = order_of(kind, *x.shape[:2])
        rows = s.inner(Ordered.apply(x.flatten(0, 1), order))
        return (Ordered.apply(rows, order.argsort()).view_as(x) * s.gain).tanh()

    inner = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 9), nn.GELU(), nn.Linear(9, D))
    return Core(run, inner=inner, gain=zoo.normal(D))


def first_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """All tokens but the first two are without gradient."""
    return (model(batch["x"]).squeeze(-1) - batch["y"])[:, :2].square().mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [zoo.squared_error, first_tokens])
@pytest.mark.parametrize("kind", ["as they are", "backwards", "tokens first", "shuffled"])
def test_rows_in_any_order(kind: str, loss: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = zoo.Looped(hidden(kind), steps=2).to(dtype)
    batches = [zoo.make_batch(size, tokens, dtype=dtype) for size, tokens in ((3, 4), (4, 5), (5, 3))]
    assert compare(model, batches, loss).capture.owners == "found"


@pytest.mark.parametrize(("size", "passes"), [(2, 2), (32, 2), (33, 3), (1025, 4)])
def test_no_more_backward_passes_than_digits_and_one(size: int, passes: int) -> None:
    capture = attach(zoo.Looped(hidden("shuffled"), steps=1), body="core", sketch_size=16, verify=False)
    Ordered.backward_passes = 0
    capture.featurize([zoo.make_batch(size, 1)], zoo.squared_error, progress=False)
    assert capture.owners == "found"
    assert Ordered.backward_passes == passes


def test_large_and_small_gradients_of_a_row() -> None:
    """Squares of these leave the range of single precision, and most entries of a row are zero. A power of two changes
    no digit."""

    def run(s: Any, x: Tensor) -> Tensor:
        rows = Ordered.apply(x.flatten(0, 1), order_of("shuffled", *x.shape[:2]))
        wide = s.wide(rows)
        sparse = torch.zeros_like(wide).index_copy(1, torch.tensor([37]), wide[:, 37:38])
        back = Ordered.apply(s.narrow(sparse), order_of("shuffled", *x.shape[:2]).argsort())
        return back.view_as(x).tanh()

    for scale in (2.0**-80, 2.0**70):
        torch.manual_seed(1)
        model = zoo.Looped(Core(run, wide=nn.Linear(D, 80), narrow=nn.Linear(80, D)), steps=2)
        capture = attach(model, body="core", sketch_size=64)
        batch = zoo.make_batch(4, 3)
        plain = capture.featurize([batch], zoo.squared_error, progress=False).values
        assert capture.owners == "found"
        scaled = capture.featurize([batch], lambda m, b, k=scale: k * zoo.squared_error(m, b), progress=False).values
        assert torch.equal(scaled.double() / scale, plain.double())


DEAD = {
    "addmm": (lambda s, rows: s.part(rows), lambda: zoo.Conv1D()),
    "bilinear": (lambda s, rows: s.part(rows, rows), lambda: nn.Bilinear(D, D, D)),
    "transposed convolution": (
        lambda s, rows: s.part(rows.unsqueeze(-1)).squeeze(-1),
        lambda: nn.ConvTranspose1d(D, D, 1),
    ),
    "addmm behind a norm": (lambda s, rows: s.part(rows), lambda: nn.Sequential(nn.LayerNorm(D), zoo.Conv1D())),
}


@pytest.mark.parametrize("name", DEAD)
def test_rows_of_zeros_have_a_bias_all_the_same(name: str) -> None:
    """The weight has no gradient there, and the bias has."""
    use, make = DEAD[name]

    def run(s: Any, x: Tensor) -> Tensor:
        order = order_of("shuffled", *x.shape[:2])
        rows = Ordered.apply(x.flatten(0, 1), order)
        rows = rows * (rows.detach().sum(-1, keepdim=True) > 0.1)
        return Ordered.apply(use(s, rows), order.argsort()).view_as(x).tanh()

    torch.manual_seed(2)
    model = zoo.Looped(Core(run, part=make()), steps=2).double()
    batches = [zoo.make_batch(size, tokens, dtype=torch.float64) for size, tokens in ((3, 4), (4, 5))]
    assert compare(model, batches).capture.owners == "found"


def test_rows_without_gradient_are_no_sign_of_clipping() -> None:
    """What is wrong here is that examples meet; rows that no loss looks at do not scale with any."""

    def run(s: Any, x: Tensor) -> Tensor:
        rows = Ordered.apply(x.flatten(0, 1), order_of("backwards", *x.shape[:2]))
        back = Ordered.apply(rows @ s.matrix, order_of("backwards", *x.shape[:2])).view_as(x)
        return (back[:, :2] + back[:, :2].mean((0, 1))).tanh().repeat(1, 2, 1)

    torch.manual_seed(0)
    capture = attach(zoo.Looped(Core(run, matrix=zoo.normal(D, D)), steps=2), body="core", sketch_size=16)
    with pytest.raises(LayoutError, match="changes with the losses of other examples"):
        capture.featurize([zoo.make_batch(3, 4)], zoo.squared_error)
