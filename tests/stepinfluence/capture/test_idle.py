"""Experts that no token of the loader picks are zero, with a warning; what never takes part is an error saying why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from stepinfluence import BodyError, ExactCapture, Features, attach
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import D, normal

pytestmark = pytest.mark.numeric

BATCHES = [zoo.make_batch(size, seed=size, dtype=torch.float64) for size in (3, 4)]


def if_any(choice: Tensor, k: int) -> Tensor | None:
    mask = choice == k
    return mask.nonzero().squeeze(1) if mask.any() else None


def by_count(choice: Tensor, k: int) -> Tensor | None:
    counts = choice.bincount(minlength=3).tolist()
    return choice.argsort(stable=True).split(counts)[k] if counts[k] else None


def by_unique(choice: Tensor, k: int) -> Tensor | None:
    return (choice == k).nonzero().squeeze(1) if k in choice.unique().tolist() else None


def by_item(choice: Tensor, k: int) -> Tensor | None:
    return None if (choice == k).sum().item() == 0 else (choice == k).nonzero().squeeze(1)


def no_rows(choice: Tensor, k: int) -> Tensor | None:
    return (choice == k).nonzero().squeeze(1)


class Experts(nn.Module):
    """Tokens go to the expert of ``choose``; ``kind`` is what holds the experts."""

    def __init__(self, rows: Callable[[Tensor, int], Tensor | None], kind: str, choose: Callable[[Tensor], Tensor]):
        super().__init__()
        self.rows, self.choose = rows, choose
        made = [zoo.linear() for _ in range(3)]
        self.experts: Any = {
            "list": lambda: nn.ModuleList(made),
            "dict": lambda: nn.ModuleDict({str(k): m for k, m in enumerate(made)}),
            "parameters": lambda: nn.ParameterList([m.weight for m in made]),
            "deep": lambda: nn.ModuleList(nn.Sequential(m, nn.Tanh()) for m in made),
        }[kind]()

    def expert(self, k: int, x: Tensor) -> Tensor:
        if isinstance(self.experts, nn.ParameterList):
            return F.linear(x, self.experts[k])
        return (self.experts[str(k)] if isinstance(self.experts, nn.ModuleDict) else self.experts[k])(x)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        choice, out = self.choose(flat), torch.zeros_like(flat)
        for k in range(3):
            index = self.rows(choice, k)
            if index is not None:
                out = out.index_add(0, index, self.expert(k, flat[index]).tanh())
        return out.view_as(x)


def two_of_three(flat: Tensor) -> Tensor:
    return (flat[:, 0] > 0).long()


def block(features: Features, name: str) -> Tensor:
    return torch.cat(
        [features.values[..., b.start : b.stop] for b in features.space.blocks if b.name.startswith(name)], -1
    )


def exact(model: nn.Module) -> Features:
    return ExactCapture(model, body="core").featurize(BATCHES, zoo.squared_error)


@pytest.mark.parametrize("kind", ["list", "dict", "parameters", "deep"])
@pytest.mark.parametrize("rows", [if_any, by_count, by_unique, by_item, no_rows])
def test_an_expert_that_no_token_picks_is_zero_with_a_warning(rows: Any, kind: str) -> None:
    torch.manual_seed(0)
    model = zoo.Looped(Experts(rows, kind, two_of_three)).double()
    with pytest.warns(UserWarning, match=r"core\.experts\.2\S*: no row of the loader's data came to it") as caught:
        features = attach(model, body="core", sketch_size=4096).featurize(BATCHES, zoo.squared_error)
    assert not any("experts.0" in str(w.message) or "experts.1" in str(w.message) for w in caught)
    assert not block(features, "core.experts.2").any()
    found, wanted = block(features, "core.experts.0"), block(exact(model), "core.experts.0")
    norms = found.flatten(1).norm(dim=1), wanted.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms[0], norms[1])  # the sketch of so small a matrix is nearly lossless


@pytest.mark.parametrize("rows", [if_any, by_count, no_rows])
def test_an_expert_of_a_later_batch_is_neither_refused_nor_warned_of(rows: Any) -> None:
    def choose(flat: Tensor) -> Tensor:
        return two_of_three(flat) if len(flat) == 12 else (flat[:, 0] > 0) + (flat[:, 1] > 0).long()

    torch.manual_seed(0)
    model = zoo.Looped(Experts(rows, "list", choose)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = attach(model, body="core", sketch_size=64).featurize(BATCHES, zoo.squared_error)
    assert block(features, "core.experts.2").any()


def test_a_branch_of_a_later_batch_that_stands_in_no_list() -> None:
    def forward(core: Any, x: Tensor) -> Tensor:
        return (core.rare(x) if x.detach().norm() > 1e3 else core.common(x)).tanh()

    model = zoo.Looped(zoo.Core(forward, common=zoo.linear(), rare=zoo.linear())).double()
    large = {k: 1e5 * v for k, v in BATCHES[1].items()}
    attach(model, body="core", sketch_size=8).featurize([BATCHES[0], large], zoo.squared_error)
    with pytest.raises(BodyError, match=r"core\.rare\.weight, core\.rare\.bias: never used: no torch call"):
        attach(model, body="core", sketch_size=8).featurize(BATCHES, zoo.squared_error)


def spare(core: Any, x: Tensor) -> Tensor:
    return core.mix(x)


def without_gradients(core: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        shift = core.spare(x)
    return core.mix(x) + shift


def detached(core: Any, x: Tensor) -> Tensor:
    return core.mix(x) + core.spare.weight.detach().sum()


def looks(core: Any, x: Tensor) -> Tensor:
    return core.mix(x) * (2.0 if bool((x > 0).any()) else 1.0)


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (spare, "never used: no torch call of the forward pass takes it"),
        (looks, "never used: no torch call of the forward pass takes it"),
        (without_gradients, "never used in the loop with gradients on"),
        (detached, "never used in the loop with gradients on"),
    ],
)
def test_what_never_takes_part_is_an_error_that_says_why(fn: Any, why: str) -> None:
    core = zoo.Core(lambda s, x: fn(s, x).tanh(), mix=zoo.linear(), spare=zoo.linear())
    with pytest.raises(BodyError, match=rf"core\.spare\.weight.*: {why}") as caught:
        attach(zoo.Looped(core).double(), body="core", sketch_size=8).featurize(BATCHES, zoo.squared_error)
    assert "\n" not in str(caught.value)


def test_what_is_used_outside_the_loop_only() -> None:
    class Outside(zoo.Looped):
        def forward(self, x: Tensor) -> Tensor:
            state = self.read_in(x) + self.core.shift
            for _ in range(2):
                state = self.core(state)
            return self.read_out(state)

    model = Outside(zoo.Core(lambda s, x: s.mix(x).tanh(), mix=zoo.linear(), shift=normal(D))).double()
    with pytest.raises(BodyError, match=r"core\.shift: used outside the loop only.*outside='ignore'"):
        attach(model, body="core", sketch_size=8, outside="ignore").featurize(BATCHES, zoo.squared_error)


def test_a_dead_layer_beside_idle_experts_is_what_is_named() -> None:
    class Dead(Experts):
        def __init__(self) -> None:
            super().__init__(if_any, "list", two_of_three)
            self.dead = nn.Linear(D, D)

    with pytest.raises(BodyError, match=r"^core\.dead\.weight, core\.dead\.bias: never used: no torch call"):
        attach(zoo.Looped(Dead()).double(), body="core", sketch_size=8).featurize(BATCHES, zoo.squared_error)
