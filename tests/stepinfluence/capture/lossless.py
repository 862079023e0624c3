"""A looped model of which sketches lose nothing, all of whose parameters are in the body; data, and an update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from stepinfluence import Capture, TrainingInfluence, attach
from torch import Tensor, nn

D, STEPS = 4, 3


class Core(nn.Module):
    """A loop body of vectors, which are kept without loss."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(D * D) * 0.4)
        self.b = nn.Parameter(torch.randn(D) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.w.view(D, D) + self.b).tanh()


class Model(nn.Module):
    """All that is trained is in the body."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.core = Core()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(STEPS):
            x = self.core(x)
        return x


Batch = dict[str, Tensor]


def loss_fn(model: Any, batch: Batch) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean(1)


def examples(count: int, seed: int) -> Batch:
    made = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(count, D, generator=made, dtype=torch.float64) for _ in range(2))
    return {"x": x, "y": y.tanh()}


def some(data: Batch, places: Any) -> Batch:
    return {name: values[places] for name, values in data.items()}


DATA, QUERY = examples(12, 1), examples(2, 2)


def captured(model: Model) -> Capture:
    return attach(model, body="core", sketch_size=64)


def batches(count: int, size: int = 4) -> Iterator[tuple[list[int], Batch]]:
    """Rows of the data, in order, again and again."""
    for k in range(count):
        places = [(k * size + i) % len(DATA["x"]) for i in range(size)]
        yield places, some(DATA, places)


def accumulate(influence: TrainingInfluence, model: Model, count: int = 3, factor: float = 1.0) -> None:
    for places, batch in batches(count):
        with influence.batch(batch, ids=places) as inline:
            (inline.losses(loss_fn(model, batch)).mean() * factor / count).backward()
