"""Every kind of parameter use under a preconditioner: each gradient is multiplied by the root, and once."""

from __future__ import annotations

import oracle
import pytest
import torch
import zoo
from compare import flat, relative
from stepinfluence import ExactCapture, attach
from stepinfluence.attribution.preconditioners import Elementwise, Factored, Root
from torch import Tensor


def random_root(parameter: Tensor, kind: str) -> Root:
    if kind == "elementwise" or parameter.dim() < 2:
        return Elementwise(torch.rand(parameter.shape, dtype=torch.float64) + 0.1)
    rows = parameter.shape[0]
    columns = torch.rand(parameter.numel() // rows, dtype=torch.float64)
    return Factored(torch.rand(rows, dtype=torch.float64) + 0.1, columns + 0.1)


@pytest.mark.parametrize("kind", ["elementwise", "factored"])
@pytest.mark.parametrize("name", zoo.LAYERS)
def test_layer(name: str, kind: str) -> None:
    torch.manual_seed(len(name))
    model = zoo.Looped(zoo.LAYERS[name]()).double().eval()
    roots = {n: random_root(p, kind) for n, p in model.named_parameters()}
    batch = zoo.make_batch(3, 4, dtype=torch.float64)
    capture = attach(model, body="core", sketch_size=29, preconditioner=roots)
    names = [t.name for t in capture.targets]
    grads = oracle.step_gradients(model, batch, zoo.squared_error, body=[model.core], names=names)
    scaled = {n: g * roots[n].as_matrix().reshape(g.shape[2:]) for n, g in grads.items()}
    expected = oracle.sketched(scaled, {t.name: t.sketch for t in capture.targets})
    assert relative(capture.featurize([batch], zoo.squared_error).values, expected) <= 1e-10
    summed = capture.featurize([batch], zoo.squared_error, per_step=False)
    assert relative(summed.values, expected.sum(1)) <= 1e-10
    exact = ExactCapture(model, body="core", preconditioner=roots).featurize([batch], zoo.squared_error)
    assert relative(exact.values, flat(scaled)) <= 1e-10


@pytest.mark.parametrize("name", zoo.LAYERS)
def test_factors_of_one_change_no_bit(name: str) -> None:
    model = zoo.Looped(zoo.LAYERS[name]()).eval()
    ones = {n: Elementwise(torch.ones_like(p)) for n, p in model.named_parameters()}
    batch = zoo.make_batch(3, 4)
    plain = attach(model, body="core", sketch_size=512, route="direct")
    under_ones = attach(model, body="core", sketch_size=512, route="direct", preconditioner=ones)
    found = [c.featurize([batch], zoo.squared_error).values for c in (plain, under_ones)]
    assert torch.equal(*found)
