"""A batch that is over leaves nothing behind: its graph, its tensors, what followed its rows.

What taps hold leads from autograd's graph to Python, and what Python holds of a tensor leads back to the graph, by a
way that Python's collector does not see. Such a circle is never freed, and keeps a batch's activations.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

import pytest
import torch
import zoo
from stepinfluence import StepInfluenceError, attach
from stepinfluence.attribution.features import weights_digest
from stepinfluence.capture.uses.interceptor import Interceptor
from torch import Tensor, nn

from bench.fuzz.build import build, loss_fn
from bench.fuzz.generate import draw


def alive(work: Callable[[], object]) -> tuple[int, int]:
    """Interceptors and tensors that live after ``work`` and did not before."""
    gc.collect()
    gc.freeze()  # what is there already is not looked at
    try:
        work()
        gc.collect()
        made = gc.get_objects()
    finally:
        gc.unfreeze()  # also what others froze: nobody here does
    return sum(isinstance(o, Interceptor) for o in made), sum(type(o) is torch.Tensor for o in made)


def test_it_would_be_seen() -> None:
    def circle() -> None:
        x = torch.zeros(3, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            x.exp()

    assert alive(circle) == (0, 2)


def featurize(model: nn.Module, body: Any, batches: list[Any], loss: Callable[..., Tensor], training: bool) -> None:
    """In a run, in training steps, and in a training step that ends before its backward pass."""
    for how in ("run", "steps", "stopped"):
        with suppress(StepInfluenceError):
            capture = attach(model, body=body, sketch_size=4, training=training)
            if how == "run":
                capture.featurize(batches, loss, progress=False)
                continue
            for batch in batches:
                with capture.inline(batch) as step:
                    losses = step.losses(loss(model, batch))
                    if how == "steps":
                        losses.mean().backward()
    model.zero_grad()


@pytest.mark.filterwarnings("ignore:body. .* was entered once")
def test_of_random_models() -> None:
    specs = [draw(Random(7000 + seed)) for seed in range(30)]

    def work() -> None:
        for spec in specs:
            model, body, batches = build(spec)
            featurize(model, body, batches, loss_fn, spec.training)

    assert alive(work) == (0, 0)


def test_of_every_kind_of_layer() -> None:
    torch.manual_seed(0)
    models = [zoo.Looped(zoo.LAYERS[kind]()).eval() for kind in sorted(zoo.LAYERS)]
    batch = zoo.make_batch(3)
    weights_digest([torch.zeros(64)])  # makes a table, once for good
    assert alive(lambda: [featurize(m, "core", [batch], zoo.squared_error, False) for m in models]) == (0, 0)
