"""A capture leaves the model, and the process, as it found them."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Any

import loops
import numpy as np
import pytest
import torch
import zoo
from stepinfluence import ExactCapture, attach
from torch import Tensor, nn


class Stateful(nn.Module):
    """Counts its calls in a buffer, keeps running statistics, draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = zoo.linear(), nn.BatchNorm1d(zoo.D, affine=False)
        self.frozen = zoo.linear().requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("running", torch.zeros(zoo.D), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.running.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        return self.frozen(self.mix(x) + 0 * torch.rand(())).tanh()


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "parameters": {n: (id(p), p.detach().clone(), p._version) for n, p in model.named_parameters()},
        "buffers": {n: (id(b), b.clone()) for n, b in model.named_buffers()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": {n: None if p.grad is None else (id(p.grad), p.grad.clone()) for n, p in model.named_parameters()},
        "training": [m.training for m in model.modules()],
        "hooks": [[len(getattr(m, name)) for name in vars(m) if name.endswith("_hooks")] for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "rng": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002  # the global stream is what must not move
        "python": random.getstate(),
        "modes": (torch.is_grad_enabled(), len(torch.overrides._get_current_function_mode_stack())),
        "threads": torch.get_num_threads(),
    }


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return bool(torch.equal(one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def stateful_model() -> zoo.Looped:
    model = zoo.Looped(Stateful())
    model.train()
    model.read_in.eval()
    model.read_in.weight.requires_grad_(False)
    model(zoo.make_batch(3)["x"]).sum().backward()
    return model


@pytest.mark.parametrize("fails", [None, "loss", "forward", "layout", "second batch"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [attach, ExactCapture])
def test_nothing_changes(make: Any, training: bool, fails: str | None) -> None:
    model = stateful_model()
    before = snapshot(model)
    seen = 0

    def loss_fn(m: Any, batch: Any) -> Tensor:
        nonlocal seen
        seen += 1
        losses = zoo.squared_error(m, batch)
        if fails == "forward" or (fails == "second batch" and seen > 2):
            raise KeyError("boom")
        if fails == "layout":
            raise KeyError("boom")
        return losses.mean() if fails == "loss" else losses

    capture = make(model, body="core", training=training, **({"sketch_size": 32} if make is attach else {}))
    batches = [zoo.make_batch(3), zoo.make_batch(3, seed=1), zoo.make_batch(2)]
    if fails is None:
        capture.featurize(batches, loss_fn)
    else:
        with pytest.raises((ValueError, KeyError)):
            capture.featurize(batches, loss_fn)
    after = snapshot(model)
    for key in before:
        assert same(before[key], after[key]), key


def test_failure_in_the_backward_pass_changes_nothing() -> None:
    model = zoo.Looped(
        zoo.Core(lambda s, x: s.mix(x.transpose(0, 1).reshape(-1, zoo.D)[:5]).sum() + x, mix=zoo.linear())
    )
    before = snapshot(model)
    with pytest.raises(ValueError, match="examples"):
        attach(model, body="core", sketch_size=32).featurize([zoo.make_batch(3)], zoo.squared_error)
    assert same(before, snapshot(model))


def test_featurizing_repeats_exactly_and_in_any_mode() -> None:
    model = loops.Injected(dropout=0.3)
    capture = attach(model, body="core", sketch_size=32, training=True)
    batches = [zoo.make_batch(3), zoo.make_batch(2)]
    first = capture.featurize(batches, zoo.squared_error)
    torch.manual_seed(99)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            again = capture.featurize(batches, zoo.squared_error)
        assert torch.equal(first.values, again.values)


def test_loop_counts_drawn_by_python_repeat() -> None:
    """A featurization runs the first batch twice: it must draw the same both times, and the next time."""

    class Drawn(zoo.Looped):
        def forward(self, x: Tensor) -> Tensor:
            self.steps = random.randint(1, 4) + int(np.random.randint(3))  # noqa: NPY002
            return super().forward(x + random.random())

    capture = attach(Drawn(zoo.LAYERS["mlp"]()), body="core", sketch_size=32)
    batches = [zoo.make_batch(3, seed=k) for k in range(4)]
    first, second = (capture.featurize(batches, zoo.squared_error) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert len(set(first.steps.tolist())) > 1


def test_ids_given_as_a_tensor_are_numbers() -> None:
    capture = attach(zoo.Looped(zoo.LAYERS["mlp"]()), body="core", sketch_size=32)
    batch = {**zoo.make_batch(3), "row": torch.tensor([7, 5, 6])}
    assert capture.featurize([batch], zoo.squared_error, ids=lambda b: b["row"]).ids == (7, 5, 6)


def test_training_afterwards_is_as_before() -> None:
    """A captured model trains bit for bit like one that was not captured."""
    weights = []
    for captured in (False, True):
        torch.manual_seed(4)
        model = loops.Injected(dropout=0.2).train()
        if captured:
            attach(model, body="core", sketch_size=32).featurize([zoo.make_batch(3)], zoo.squared_error)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            zoo.squared_error(model, zoo.make_batch(4)).mean().backward()
            optimizer.step()
        weights.append(model.core[1].weight.detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize("name", ["weight norm", "fused qkv, output chunks", "positions by arange"])
def test_memory_does_not_grow(name: str) -> None:
    # Not those of tests before: they go when something else lets go of them, which would hide as many new ones.
    others = {id(o): weakref.ref(o) for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)}
    capture = attach(zoo.Looped(zoo.LAYERS[name]()), body="core", sketch_size=32)
    batches = [zoo.make_batch(3), zoo.make_batch(2)]

    def live() -> int:
        gc.collect()
        here = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
        return sum(1 for o in here if id(o) not in others or others[id(o)]() is not o)

    for _ in range(2):
        capture.featurize(batches, zoo.squared_error)
    before = live()
    for _ in range(10):
        capture.featurize(batches, zoo.squared_error)
    assert live() == before
