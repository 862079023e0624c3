"""One linear layer: who gives what of the per-example weight gradients, from the same activations and gradients.

A contestant gives either the gradients themselves, ``(rows, d_out, d_in)``, or sketches of them, ``(rows, m)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from opacus.grad_sample.linear import compute_linear_grad_sample
from sdi.sketch import TensorSketchSpec, tensor_sketch_linear_weight
from torch import Tensor, nn

from sdi_kernels import TensorSketch, reference, sketch_linear_grads, sketch_matrix_grads

SKETCH_SIZE = 2048
OURS = "sdi-kernels"
SUM = "sum over examples (dW)"
LAYERS = [(128, 128, 32, 81), (512, 128, 32, 81), (768, 768, 8, 128), (3072, 768, 8, 128)]
"""Output features, input features, rows, tokens."""


@dataclass(frozen=True)
class Contestant:
    """What it does, and whether the gradients, sketches of them or only their sum come out."""

    call: Callable[[], Tensor]
    gives: str


def inputs(layer: tuple[int, int, int, int]) -> tuple[nn.Linear, Tensor, Tensor]:
    """The layer itself, what goes into it, and the gradients at its output."""
    torch.manual_seed(0)
    d_out, d_in, rows, tokens = layer
    return nn.Linear(d_in, d_out, bias=False), torch.randn(rows, tokens, d_in), torch.randn(rows, tokens, d_out)


def contestants(layer: tuple[int, int, int, int]) -> dict[str, Contestant]:
    """Name -> contestant, all on the same inputs."""
    d_out, d_in, *_ = layer
    module, a, g = inputs(layer)
    weight = module.weight.detach()
    sketch = TensorSketch(d_out, d_in, SKETCH_SIZE)
    h_out, s_out, _, h_in, s_in, _ = (table.long() for table in sketch.tables())
    spec = TensorSketchSpec(h_out, s_out, h_in, s_in, SKETCH_SIZE)

    def product(w: Tensor, x: Tensor, at_output: Tensor) -> Tensor:
        """Its gradient by ``w`` is that of the layer, whatever the loss behind it is."""
        return (nn.functional.linear(x, w) * at_output).sum()

    per_example = torch.func.vmap(torch.func.grad(product), in_dims=(None, 0, 0))

    def einsum() -> Tensor:
        return torch.einsum("nto,nti->noi", g, a)

    return {
        OURS: Contestant(lambda: sketch_linear_grads(a, g, sketch), "sketches"),
        "published package": Contestant(
            lambda: tensor_sketch_linear_weight(activations=a, backprops=g, spec=spec), "sketches"
        ),
        "gradients by einsum, then sketched": Contestant(lambda: sketch_matrix_grads(einsum(), sketch), "sketches"),
        "gradients by einsum": Contestant(einsum, "gradients"),
        "gradients by torch.func": Contestant(lambda: per_example(weight, a, g), "gradients"),
        "gradients by Opacus": Contestant(
            lambda: compute_linear_grad_sample(module, [a], g)[module.weight], "gradients"
        ),
        SUM: Contestant(lambda: g.flatten(0, 1).T @ a.flatten(0, 1), "sum"),
    }


def check(layer: tuple[int, int, int, int]) -> None:
    """Every contestant of a layer, against gradients in float64 and, of two rows, their sketches by definition.

    Raises:
        SystemExit: one gives something else.
    """
    work = contestants(layer)
    d_out, d_in, *_ = layer
    _, a, g = inputs(layer)
    gradients = reference.linear_grads(a, g)
    sketches = reference.tensor_sketch(gradients[:2], TensorSketch(d_out, d_in, SKETCH_SIZE))
    wanted = {"gradients": gradients, "sketches": sketches, "sum": gradients.sum(0)}
    for name, contestant in work.items():
        want = wanted[contestant.gives]
        error = float((contestant.call().double()[: len(want)] - want).norm() / want.norm())
        if not error < 1e-5:
            raise SystemExit(f"{name}: relative error {error:.1e} on {layer}; a wrong result is not timed")
