"""What cannot be captured is refused with a clear message, never given a number."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from stepinfluence import BodyError, LayoutError, UnsupportedUseError, attach
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import Core, D, linear, normal


class Hiding(torch.autograd.Function):
    """Recomputes a module in its own backward, as reversible layers do: the parameters are no inputs of the node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            torch.autograd.backward(ctx.module(leaf), grad)
        return leaf.grad, None


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.flatten(0, 1).T @ grad.flatten(0, 1)


class SomeReentrant(nn.Module):
    """Reentrant checkpointing in one step of three only: the parameter is seen in the others."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.mix, self.at, self.calls = linear(), at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.calls % zoo.STEPS == self.at
        out: Tensor = checkpoint(self.mix, x, use_reentrant=True) if hidden else self.mix(x)
        return out.tanh()


def energy(core: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(core.mix(point).tanh().sum(), point, create_graph=True)
    return x - slope


def inner_backward(core: Any, x: Tensor) -> Tensor:
    point = x.detach().requires_grad_()
    core.mix(point).tanh().sum().backward()
    return core.mix(x) - point.grad


USES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "hidden in a custom function": (
        lambda: Core(lambda s, x: s.mix(Hiding.apply(x, s.mix)).tanh(), mix=linear()), "custom autograd function"
    ),
    "input of a custom function": (
        lambda: Core(lambda s, x: Product.apply(x, s.p).tanh(), p=normal(D, D)), r"core\.p:.*custom autograd function"
    ),
    **{f"reentrant at step {k}": (lambda k=k: SomeReentrant(k), "use_reentrant=False") for k in (0, 1, 2)},
    "gradient of an energy": (lambda: Core(energy, mix=linear()), "takes gradients through the loop body"),
    "backward in the forward pass": (lambda: Core(inner_backward, mix=linear()), "takes gradients through"),
    "vmap in the model": (
        lambda: Core(lambda s, x: torch.vmap(lambda row: s.mix(row).tanh())(x), mix=linear()),
        r"core\.mix\.weight.*torch\.vmap",
    ),
    "scale_grad_by_freq": (
        lambda: Core(
            lambda s, x: (x + s.t((x[..., 0] > 0).long())).tanh(), t=nn.Embedding(2, D, scale_grad_by_freq=True)
        ),
        "scale_grad_by_freq",
    ),
}  # fmt: skip

MIXING: dict[str, Callable[[], nn.Module]] = {
    "attention over examples": lambda: Core(
        lambda s, x: s.mix(F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3).transpose(0, 1)), mix=linear()
    ),
    "mean over examples": lambda: Core(lambda s, x: s.mix(x - x.mean(0, keepdim=True)).tanh(), mix=linear()),
    "neighbours": lambda: Core(lambda s, x: s.mix(x + 0.5 * x.roll(1, 0)).tanh(), mix=linear()),
    "pairs": lambda: Core(
        lambda s, x: s.mix(x + 0.5 * x.view(-1, 2, *x.shape[1:]).flip(1).view_as(x)).tanh(), mix=linear()
    ),
    "a thousandth of the neighbour": lambda: Core(lambda s, x: s.mix(x + 1e-3 * x.roll(1, 0)).tanh(), mix=linear()),
    "permuted examples": lambda: Core(lambda s, x: s.mix(x.flip(0)).flip(0).roll(1, 0).tanh(), mix=linear()),
}


def one_line(error: BaseException) -> None:
    assert "\n" not in str(error)


def run(core: nn.Module, sizes: list[tuple[int, int]], **options: Any) -> None:
    model = zoo.Looped(core)
    capture = attach(model, body="core", sketch_size=32, **options)
    capture.featurize([zoo.make_batch(b, t, seed=k) for k, (b, t) in enumerate(sizes)], zoo.squared_error)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", USES)
def test_use_is_refused(name: str, verify: bool) -> None:
    make, message = USES[name]
    with pytest.raises(UnsupportedUseError, match=message) as caught:
        run(make(), [(3, 4)], verify=verify)
    one_line(caught.value)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
@pytest.mark.parametrize("name", MIXING)
def test_mixing_of_examples_is_refused(name: str, size: int) -> None:
    permuted = name == "permuted examples"  # found at the losses, each of which is wholly another example's
    message = "return losses in the order of the batch" if permuted else "changes with the losses of other examples"
    with pytest.raises(LayoutError, match=message) as caught:
        run(MIXING[name](), [(size, 3)])
    one_line(caught.value)


def test_mixing_in_the_loss_is_refused_also_for_a_second_loss() -> None:
    def contrastive(model: Any, batch: Any) -> Tensor:
        out = model(batch["x"]).flatten(1)
        return F.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none")

    capture = attach(zoo.Looped(linear()), body="core", sketch_size=32)
    capture.featurize([zoo.make_batch(4)], zoo.squared_error)
    with pytest.raises(LayoutError):
        capture.featurize([zoo.make_batch(4)], contrastive)


def test_batch_norm_in_training_mode_is_refused() -> None:
    inside = Core(lambda s, x: s.norm(s.mix(x).mT).mT, mix=linear(), norm=nn.BatchNorm1d(D))
    with pytest.raises(UnsupportedUseError, match=r"core\.norm\.weight: batch normalisation .* featurize in eval mode"):
        run(inside, [(3, 4)], training=True)
    plain = Core(lambda s, x: s.norm(s.mix(x).mT).mT, mix=linear(), norm=nn.BatchNorm1d(D, affine=False))
    with pytest.raises(LayoutError, match="batch normalisation"):
        run(plain, [(3, 4)], training=True)
    run(inside, [(3, 4)])


def test_scripted_body_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        core = torch.jit.script(nn.Sequential(linear(), nn.Tanh()))
    for body in (core, nn.Sequential(linear(), core)):
        with pytest.raises(BodyError, match="scripted") as caught:
            run(body, [(3, 4)])
        one_line(caught.value)


def test_activation_changed_in_place_after_use_is_an_error() -> None:
    def forward(core: Any, x: Tensor) -> Tensor:
        y = x * 1
        z = core.mix(y)
        y.mul_(2.0)
        return (z + y).tanh()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(Core(forward, mix=linear()), [(3, 4)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(Core(lambda s, x: forward_norm(s, x), mix=nn.LayerNorm(D)), [(3, 4)])


def forward_norm(core: Any, x: Tensor) -> Tensor:
    y = x * 1
    z = core.mix(y)
    y.relu_()
    return z + y


def nested_in_the_model(core: Any, x: Tensor) -> Tensor:
    jagged = torch.nested.nested_tensor([row[: k + 1] for k, row in enumerate(x)], layout=torch.jagged)
    return core.mix(jagged).to_padded_tensor(0.0)


def nested_by_lengths(core: Any, x: Tensor) -> Tensor:
    jagged = torch.nested.narrow(x, 1, torch.zeros(len(x), dtype=torch.long), torch.arange(1, len(x) + 1), torch.jagged)
    return core.mix(jagged).to_padded_tensor(0.0)


@pytest.mark.filterwarnings("ignore")  # torch says that nested tensors are a prototype
@pytest.mark.parametrize("fn", [nested_in_the_model, nested_by_lengths])
def test_nested_tensors_are_refused(fn: Any) -> None:
    model = zoo.Looped(zoo.Core(fn, mix=zoo.linear()))
    with pytest.raises(UnsupportedUseError, match=r"nested \(jagged\) tensor.*pass padded") as caught:
        attach(model, body="core", sketch_size=8).featurize([zoo.make_batch(3)], zoo.squared_error)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_batches_of_nested_tensors_are_refused(layout: Any) -> None:
    batch = {"x": torch.nested.nested_tensor([torch.randn(k + 2, zoo.FEATURES) for k in range(3)], layout=layout)}

    def loss(model: Any, given: Any) -> Tensor:
        return model(given["x"].to_padded_tensor(0.0)).square().flatten(1).mean(1)

    model = zoo.Looped(zoo.Core(lambda s, x: s.mix(x).tanh(), mix=zoo.linear()))
    with pytest.raises(UnsupportedUseError, match=r"nested \(jagged\) tensor, in the batch.*pass padded"):
        attach(model, body="core", sketch_size=8).featurize([batch], loss)


class Adjoint(torch.autograd.Function):
    """As solvers of differential equations have it: the way back is solved anew, without the way there."""

    @staticmethod
    def forward(ctx: Any, core: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.core = core
        ctx.save_for_backward(x, *parameters)
        with torch.no_grad():
            return x + 0.1 * core.mix(x).tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            end = start + 0.1 * ctx.core.mix(start).tanh()
            return None, *torch.autograd.grad(end, [start, *parameters], grad, allow_unused=True)


def adjoint(core: Any, x: Tensor) -> Tensor:
    return Adjoint.apply(core, x, *core.mix.parameters())  # type: ignore[no-any-return]


def reentrant(core: Any, x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda y: core.mix(y).tanh(), x, use_reentrant=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("fn", "fix"), [(adjoint, "without the adjoint method"), (reentrant, "use_reentrant=False")])
def test_gradients_by_functions_of_their_own_are_refused(fn: Any, fix: str) -> None:
    model = zoo.Looped(zoo.Core(fn, mix=zoo.linear()))
    with pytest.raises(UnsupportedUseError, match=rf"core\.mix\.weight.*{fix}") as caught:
        attach(model, body="core", sketch_size=8).featurize([zoo.make_batch(3)], zoo.squared_error)
    assert "\n" not in str(caught.value)
