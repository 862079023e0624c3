"""The capture says how the owners of rows became known, and what was verified."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from stepinfluence import attach
from torch import Tensor, nn

from sdi_kernels import sketched_linear

BATCHES = [zoo.make_batch(size, seed=size) for size in (3, 4)]


class Double(torch.autograd.Function):
    """Out of sight: owners cannot be followed through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


def followed(core: Any, x: Tensor) -> Tensor:
    return (core.mix(x) * core.gain).tanh()


def found(core: Any, x: Tensor) -> Tensor:
    return (Double.apply(core.mix(x)) * core.gain).tanh()


def make(fn: Any, **options: Any) -> Any:
    core = zoo.Core(fn, mix=zoo.linear(), gain=zoo.normal(zoo.D))
    return attach(zoo.Looped(core), body="core", sketch_size=16, **options)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("fn", [followed, found])
def test_which_uses_were_followed_found_verified(fn: Any, verify: bool) -> None:
    capture = make(fn, verify=verify)
    assert capture.uses() == ()
    assert "no batch featurized yet" in repr(capture)
    capture.featurize(BATCHES, zoo.squared_error)
    table = {use.parameters: use for use in capture.uses()}
    assert set(table) == {"core.mix.weight, core.mix.bias", "core.gain"}
    assert table["core.gain"].operation == "mul"
    for use in table.values():
        assert use.steps == zoo.STEPS
        assert (use.followed, use.found) == ((2, 0) if fn is followed else (0, 2))
        assert use.verified == int(verify)
    lines = str(capture.uses()).splitlines()
    assert len(lines) == 1 + len(table)
    assert lines[0].split() == ["parameters", "operation", "steps", "followed", "found", "verified"]
    assert f"followed in {2 if fn is followed else 0}" in repr(capture)


def test_each_run_has_a_table_of_its_own() -> None:
    capture = make(followed)
    for _ in range(2):
        capture.featurize(BATCHES, zoo.squared_error)
    assert {use.followed for use in capture.uses()} == {2}
    assert {use.verified for use in capture.uses()} == {0}  # nothing new to verify


def test_a_layer_of_your_own_gives_the_same_columns() -> None:
    """``sketched_linear`` with a capture's own sketch, step by step, against the capture."""
    torch.manual_seed(3)
    model = zoo.Looped(zoo.Core(lambda s, x: torch.tanh(s.mix(x)), mix=nn.Linear(zoo.D, zoo.D))).double()
    capture = attach(model, body="core", sketch_size=32)
    batch = zoo.make_batch(3, 4, seed=3, dtype=torch.float64)
    expected = capture.featurize([batch], zoo.squared_error)
    place = next(k for k, t in enumerate(capture.targets) if t.parameter.dim() == 2)
    target, block = capture.targets[place], capture.space().blocks[place]
    features = torch.zeros(3, model.steps, block.stop - block.start, dtype=torch.float64)
    steps = iter(range(model.steps))

    def sketched(x: Tensor) -> Tensor:
        layer, out = model.core.mix, features[:, next(steps)]
        return torch.tanh(sketched_linear(x, layer.weight, layer.bias, sketch=target.sketch, out=out))

    model.core.forward = sketched
    zoo.squared_error(model, batch).sum().backward()
    assert target.parameter.grad is None
    torch.testing.assert_close(features, expected.values[..., block.start : block.stop], rtol=1e-10, atol=1e-14)
