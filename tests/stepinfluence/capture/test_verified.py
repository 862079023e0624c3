"""Verification runs once for a loss function, weights and way of telling examples apart, not once per call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch
import zoo
from stepinfluence.attribution.preconditioners import from_optimizer
from stepinfluence.capture import Capture, attach
from stepinfluence.capture.sketched_run import VERIFIED_SHARE
from stepinfluence.capture.verification import Verification
from stepinfluence.capture.verified import Memory
from stepinfluence.errors import LayoutError
from stepinfluence.search import rerank
from torch import Tensor, nn

BATCHES = [zoo.make_batch(4, seed=k) for k in range(2)]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a capture verifies."""
    seen: list[int] = []
    check = Verification.check

    def counted(self: Verification, *args: Any) -> None:
        seen.append(1)
        check(self, *args)

    monkeypatch.setattr(Verification, "check", counted)
    return seen


def model() -> nn.Module:
    return zoo.Looped(zoo.Core(lambda s, x: s.mix(x).tanh(), mix=zoo.linear())).eval()


def other_loss(net: Any, batch: Any) -> Tensor:
    return 2 * zoo.squared_error(net, batch)


def write_in_place(capture: Capture) -> None:
    with torch.no_grad():
        capture.targets[0].parameter.mul_(1.5)


def write_behind_the_version(capture: Capture) -> None:
    capture.targets[0].parameter.data.mul_(1.5)


def write_outside_the_body(capture: Capture) -> None:
    with torch.no_grad():
        capture.model.read_in.weight.mul_(1.5)  # type: ignore[union-attr, operator]


def load(capture: Capture) -> None:
    capture.model.load_state_dict({k: 2 * v for k, v in capture.model.state_dict().items()})


def switch_mode(capture: Capture) -> None:
    capture.training = True


def change_metric(capture: Capture) -> None:
    optimizer = torch.optim.AdamW(capture.model.parameters())
    zoo.squared_error(capture.model, BATCHES[0]).mean().backward()
    before = {n: p.detach().clone() for n, p in capture.model.named_parameters()}
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for name, parameter in capture.model.named_parameters():
            parameter.copy_(before[name])
    capture.precondition(from_optimizer(optimizer, capture.model))


def test_a_second_call_does_not_verify(runs: list[int]) -> None:
    capture = attach(model(), body="core", sketch_size=16)
    first = capture.featurize(BATCHES, zoo.squared_error, per_step=False)
    assert len(runs) == 1
    again = capture.featurize(BATCHES, zoo.squared_error, per_step=False)
    capture.featurize(BATCHES[1:], zoo.squared_error)
    assert len(runs) == 1
    assert torch.equal(first.values, again.values)
    attach(capture.model, body="core", sketch_size=16).featurize(BATCHES, zoo.squared_error)
    assert len(runs) == 2, "another capture knows nothing"


@pytest.mark.parametrize(
    "change", [write_in_place, write_behind_the_version, write_outside_the_body, load, switch_mode, change_metric]
)
def test_what_makes_a_call_verify_again(runs: list[int], change: Callable[[Capture], None]) -> None:
    capture = attach(model(), body="core", sketch_size=16)
    capture.featurize(BATCHES, zoo.squared_error)
    change(capture)
    for _ in range(2):
        capture.featurize(BATCHES, zoo.squared_error)
        assert len(runs) == 2


def test_it_can_be_asked_for(runs: list[int]) -> None:
    capture = attach(model(), body="core", sketch_size=16)
    for calls, verify in enumerate([True, True, None, None, False]):
        capture.featurize(BATCHES, zoo.squared_error, verify=verify)
        assert len(runs) == min(calls + 1, 2)


def test_every_loss_function_is_verified_once(runs: list[int]) -> None:
    capture = attach(model(), body="core", sketch_size=16)
    for _ in range(2):
        capture.featurize(BATCHES, zoo.squared_error)
        capture.featurize(BATCHES, other_loss)
        assert len(runs) == 2


def test_a_batch_of_another_shape_is_not_verified_again(runs: list[int]) -> None:
    """As many examples as tokens: owners are followed in every batch, the shape decides nothing."""
    capture = attach(model(), body="core", sketch_size=16)
    for batch in (zoo.make_batch(4, 5), zoo.make_batch(3, 3), zoo.make_batch(5, 4)):
        capture.featurize([batch], zoo.squared_error)
        assert len(runs) == 1


def test_owners_that_had_to_be_found_are_verified_too(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    capture = attach(model(), body="core", sketch_size=16)
    capture.featurize([zoo.make_batch(4, 5)], zoo.squared_error)
    monkeypatch.setattr("stepinfluence.capture.found.followed_to", lambda *_: False)
    for _ in range(2):
        capture.featurize([zoo.make_batch(4, 5)], zoo.squared_error)
        assert len(runs) == 2


def test_a_loss_that_fails_is_not_remembered(runs: list[int]) -> None:
    def mixing(net: Any, batch: Any) -> Tensor:
        losses = zoo.squared_error(net, batch)
        return losses + losses.mean() * 0.5

    capture = attach(model(), body="core", sketch_size=16)
    for loss_fn in (zoo.squared_error, mixing, mixing, zoo.squared_error):
        if loss_fn is mixing:
            with pytest.raises(ValueError, match="changes with the losses of other examples"):
                capture.featurize(BATCHES, loss_fn)
        else:
            capture.featurize(BATCHES, loss_fn)
    assert len(runs) == 1  # what mixes is found before it is verified


def test_reranking_shares_what_featurizing_verified(runs: list[int]) -> None:
    capture = attach(model(), body="core", sketch_size=16)
    capture.featurize(BATCHES, zoo.squared_error)
    rerank(capture, zoo.squared_error, BATCHES, BATCHES[:1], progress=False)
    assert len(runs) == 1
    rerank(capture, other_loss, BATCHES, BATCHES[:1], progress=False)
    capture.featurize(BATCHES, other_loss)
    assert len(runs) == 2


class Owner:
    def loss(self, net: Any, batch: Any) -> Tensor:
        return zoo.squared_error(net, batch)


class Slotted:
    """A callable that cannot be held weakly."""

    __slots__ = ()

    def __call__(self, net: Any, batch: Any) -> Tensor:
        return zoo.squared_error(net, batch)


def test_how_loss_functions_are_told_apart(runs: list[int]) -> None:
    one, two, slotted = Owner(), Owner(), Slotted()
    partial = functools.partial(zoo.squared_error)
    capture = attach(model(), body="core", sketch_size=16)
    wanted = 0
    for loss_fn, verified in (
        (one.loss, 1), (one.loss, 0), (two.loss, 1), (one.loss, 0),
        (partial, 1), (partial, 0), (functools.partial(zoo.squared_error), 1),
        (slotted, 1), (slotted, 1),
    ):  # fmt: skip
        capture.featurize(BATCHES, loss_fn)
        wanted += verified
        assert len(runs) == wanted


def test_a_loss_function_is_neither_kept_alive_nor_mistaken_for_its_successor() -> None:
    memory = Memory()
    for _ in range(50):  # CPython gives the place of one to the next
        loss_fn = lambda net, batch: zoo.squared_error(net, batch)  # noqa: E731
        checked = memory.recall(loss_fn, "state")
        assert not checked.covers("followed")
        checked.add("followed")
        assert memory.recall(loss_fn, "state").covers("followed")
        del loss_fn
    assert len(memory._known) == 1


class BeginsToMix(nn.Module):
    """Exchanges something between examples in the batches that say so."""

    def __init__(self, exchange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.core, self.exchange = zoo.Core(lambda s, x: s.mix(x).tanh(), mix=zoo.linear()), exchange

    def forward(self, x: Tensor, late: bool) -> Tensor:
        for _ in range(zoo.STEPS):
            x = self.core(x)
            if late:
                x = self.exchange(x)
        return x.flatten(1).sum(1)


def in_the_backward_pass(x: Tensor) -> Tensor:
    """What no forward pass shows: a hook that takes the batch's mean from every gradient."""
    x.register_hook(lambda grad: grad - grad.mean(0))
    return x


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("exchange", [lambda x: x - x.mean(0), in_the_backward_pass], ids=["forward", "backward"])
def test_examples_that_begin_to_mix_later_are_noticed(exchange: Callable[[Tensor], Tensor], seed: int) -> None:
    """What is followed through the forward pass at once; else at the next batch that is picked."""
    capture = attach(BeginsToMix(exchange), body="core", sketch_size=8, seed=seed)
    given: list[int] = []

    def loader() -> Iterator[tuple[Tensor, bool]]:
        for k in range(600):
            given.append(k)
            yield torch.randn(4, 3, zoo.D), k >= 10

    with pytest.raises(LayoutError):
        capture.featurize(loader(), lambda net, batch: net(*batch) ** 2, progress=False)
    picked = (k for k in range(10, 600) if Random(f"{seed}, batch {k}").random() < VERIFIED_SHARE)
    assert given[-1] == (next(picked) if exchange is in_the_backward_pass else 10)


def test_one_batch_in_64_is_picked() -> None:
    assert VERIFIED_SHARE == 1 / 64
    picked = sum(Random(f"0, batch {k}").random() < VERIFIED_SHARE for k in range(64_000))
    assert abs(picked - 1000) < 4 * 1000**0.5
