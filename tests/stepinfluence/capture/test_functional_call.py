"""A body that is called with other tensors in place of its parameters: what those were computed from, and nothing that
the module holds, is what gradients belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stepinfluence import ExactCapture, attach
from torch import Tensor, nn
from torch.func import functional_call

D, STEPS = 4, 3


class Model(nn.Module):
    """``h <- tanh(f(h))`` with what ``tensors(f, step)`` gives in place of the parameters of ``f``."""

    def __init__(self, tensors: Callable[[nn.Linear, int], dict[str, Tensor]]) -> None:
        super().__init__()
        self.f, self.tensors = nn.Linear(D, D), tensors

    def forward(self, h: Tensor) -> Tensor:
        for step in range(STEPS):
            h = functional_call(self.f, self.tensors(self.f, step), (h,)).tanh()
        return h


def naive(model: Model, x: Tensor) -> Tensor:
    """``(B, steps, parameters)``: batches of one, and a layer of its own for each step."""
    rows = []
    for one in x:
        layers = [nn.Linear(D, D).double() for _ in range(STEPS)]
        h = one
        for step, layer in enumerate(layers):
            layer.load_state_dict(model.f.state_dict())
            held = dict(layer.named_parameters()) | model.tensors(layer, step)
            h = (held["weight"] @ h + held["bias"]).tanh()
        leaves = [p for layer in layers for p in (layer.weight, layer.bias)]
        grads = torch.autograd.grad(h.square().sum(), leaves, allow_unused=True)
        flat = [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, leaves, strict=True)]
        rows.append(torch.cat(flat).view(STEPS, -1))
    return torch.stack(rows)


TENSORS: dict[str, Callable[[nn.Linear, int], dict[str, Tensor]]] = {
    "the parameters": lambda f, step: dict(f.named_parameters()),
    "scaled by step": lambda f, step: {name: p * (1.0 + step) for name, p in f.named_parameters()},
    "a part of them": lambda f, step: {"weight": f.weight * 0.5},
    "moved, in some steps": lambda f, step: {"weight": f.weight + 0.1} if step else {},
    "detached in the first step": lambda f, step: {} if step else {"weight": f.weight.detach() * 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_gradients_are_of_what_the_tensors_were_computed_from(name: str) -> None:
    torch.manual_seed(0)
    model, x = Model(TENSORS[name]).double(), torch.randn(3, D, dtype=torch.float64)
    expected = naive(model, x)

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        return model(batch).square().sum(1)

    exact = ExactCapture(model, body="f").featurize([x], loss_fn).values
    assert torch.allclose(exact, expected, rtol=1e-10, atol=1e-12)
    # Wide enough that products of sketches are nearly those of gradients.
    capture = attach(model, body="f", sketch_size=4096)
    sketch, flat = capture.featurize([x], loss_fn).values.flatten(1), expected.flatten(1)
    assert float((sketch @ sketch.T - flat @ flat.T).norm()) < 0.05 * float((flat @ flat.T).norm())
