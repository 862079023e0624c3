"""What is computed from body parameters alone counts at the step in which it meets the data, in both captures.

The oracle is the same model that computes it anew wherever it is used: then every use is of that step by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from compare import compare
from stepinfluence import BodyError, ExactCapture, attach
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import FEATURES, STEPS, D, normal

pytestmark = pytest.mark.numeric

BATCHES = [zoo.make_batch(size, seed=size, dtype=torch.float64) for size in (3, 5)]


class Body(nn.Module):
    """Holds parameters; ``use(parameters' function, state, step)`` says what a step does."""

    def __init__(self, use: Callable[[Any, Any, Tensor, int], Tensor], parts: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.use = use
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, made: Callable[[], Any], state: Tensor, step: int) -> Tensor:
        return self.use(self, made(), state, step)


class Model(nn.Module):
    """Computes ``make(body)`` anew at every use, or at one moment: before the loop, or in one of its steps."""

    def __init__(self, make: Callable[[Any], Any], use: Any, parts: dict[str, nn.Parameter], when: str) -> None:
        super().__init__()
        self.read_in, self.read_out = nn.Linear(FEATURES, D), nn.Linear(D, 1)
        self.core, self.make, self.when = Body(use, parts), make, when

    def forward(self, x: Tensor) -> Tensor:
        injected = self.read_in(x)
        kept = [self.make(self.core)] if self.when == "before" else []

        def made() -> Any:
            if self.when == "anew":
                return self.make(self.core)
            if not kept:
                kept.append(self.make(self.core))
            return kept[0]

        state = injected
        for step in range(STEPS):
            state = self.core(made, state, step) + injected
        return self.read_out(state)


def linear(body: Any, weight: Tensor, state: Tensor, step: int) -> Tensor:
    return F.linear(state, weight).tanh()


def own_bias(body: Any, biases: Tensor, state: Tensor, step: int) -> Tensor:
    return (state + biases[step]).tanh()


def only_first(body: Any, start: Tensor, state: Tensor, step: int) -> Tensor:
    return F.linear(state + start if step == 0 else state, body.w).tanh()


def twice(body: Any, made: tuple[Tensor, Tensor], state: Tensor, step: int) -> Tensor:
    return F.linear(state, made[0], body.b).tanh() * made[1]


def written(body: Any) -> Tensor:
    weight = torch.zeros(D, D, dtype=body.v.dtype)
    weight[:2] = body.v[:2]
    weight[2:] = 2 * body.v[2:]
    return weight


CASES: dict[str, tuple[Callable[[Any], Any], Any, dict[str, tuple[int, ...]]]] = {
    "weight norm": (lambda c: c.g * c.v / c.v.norm(dim=1, keepdim=True), linear, {"g": (D, 1), "v": (D, D)}),
    "spectral": (lambda c: c.v / torch.linalg.matrix_norm(c.v, 2), linear, {"v": (D, D)}),
    "low rank": (lambda c: c.a @ c.b, linear, {"a": (D, 2), "b": (2, D)}),
    "transposed": (lambda c: c.v.t(), linear, {"v": (D, D)}),
    "of each step": (
        lambda c: torch.stack([c.p * k for k in range(1, STEPS + 1)]).exp(),
        own_bias,
        {"p": (D,)},
    ),
    "initial state": (lambda c: c.start.tanh(), only_first, {"start": (D,), "w": (D, D)}),
    "a parameter as it is": (lambda c: c.v, linear, {"v": (D, D)}),
    "written in place": (written, linear, {"v": (D, D)}),
    "two tensors": (lambda c: (c.v.exp(), c.p.sigmoid()), twice, {"v": (D, D), "p": (D,), "b": (D,)}),
}  # fmt: skip


def models(name: str, when: str) -> tuple[Model, Model]:
    make, use, shapes = CASES[name]
    torch.manual_seed(len(name))
    parts = {part: normal(*shape) for part, shape in shapes.items()}
    once, anew = Model(make, use, parts, when).double(), Model(make, use, parts, "anew").double()
    anew.load_state_dict(once.state_dict())
    return once, anew


@pytest.mark.parametrize("when", ["before", "within"])
@pytest.mark.parametrize("name", CASES)
def test_counts_where_it_meets_the_data(name: str, when: str) -> None:
    once, anew = models(name, when)
    compare(once, BATCHES, plain=anew)


@pytest.mark.parametrize("kind", [attach, ExactCapture])
@pytest.mark.parametrize(
    "early",
    [
        lambda core, state: state + core.p,
        lambda core, state: state + core.p.expand(len(state), D).unsqueeze(1),
        lambda core, state: state * core.p.exp(),
        lambda core, state: F.linear(state, core.v.tanh()),
    ],
)
def test_a_use_by_the_data_before_the_loop_is_outside(kind: Any, early: Any) -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read_in, self.read_out = nn.Linear(FEATURES, D), nn.Linear(D, 1)
            self.core = zoo.Core(lambda s, x: F.linear(x + s.p, s.v).tanh(), v=normal(D, D), p=normal(D))

        def forward(self, x: Tensor) -> Tensor:
            state = early(self.core, self.read_in(x))
            for _ in range(STEPS):
                state = self.core(state)
            return self.read_out(state)

    torch.manual_seed(0)
    model = Early().double()
    with pytest.raises(BodyError, match=r"core\.\w+: used outside the loop body"):
        kind(model, body="core").featurize(BATCHES, zoo.squared_error)
    ignoring = kind(model, body="core", outside="ignore").featurize(BATCHES, zoo.squared_error)
    assert bool((ignoring.values != 0).any())


@pytest.mark.parametrize("kind", [attach, ExactCapture])
def test_computed_in_the_loop_and_used_after_it_is_outside(kind: Any) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read_in, self.read_out = nn.Linear(FEATURES, D), nn.Linear(D, 1)
            self.core = zoo.Core(self.step, v=normal(D, D), p=normal(D))

        def step(self, core: Any, state: Tensor) -> Tensor:
            self.kept = core.p.exp()
            return F.linear(state * core.p, core.v).tanh()

        def forward(self, x: Tensor) -> Tensor:
            state = self.read_in(x)
            for _ in range(STEPS):
                state = self.core(state)
            return self.read_out(state * self.kept)

    torch.manual_seed(0)
    with pytest.raises(BodyError, match=r"core\.p: used outside the loop body"):
        kind(Late().double(), body="core").featurize(BATCHES, zoo.squared_error)
