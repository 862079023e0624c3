"""Several threads at one model are told; several models are theirs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from stepinfluence import BodyError, ExactCapture, attach
from torch import nn

BATCHES = [zoo.make_batch(4, seed=k) for k in range(3)]
SECOND: dict[str, Callable[[Any, nn.Module], Any]] = {
    "one capture": lambda capture, model: capture,
    "another capture of the model": lambda capture, model: attach(model, body="core", sketch_size=8),
    "exact gradients of the model": lambda capture, model: ExactCapture(model, body="core"),
}


def model() -> nn.Module:
    torch.manual_seed(3)
    return zoo.Looped(zoo.Core(lambda s, x: s.mix(x).tanh(), mix=zoo.linear())).eval()


class Meanwhile:
    """A loader in the middle of which another thread does something, to its end."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[Any]:
        yield BATCHES[0]
        thread = threading.Thread(target=self._run, name="second")
        thread.start()
        thread.join()
        yield from BATCHES[1:]

    def _run(self) -> None:
        try:
            self._act()
        except Exception as error:
            self.error = error


@pytest.mark.parametrize("first", ["sketched", "exact"])
@pytest.mark.parametrize("second", SECOND)
def test_another_thread_is_refused_in_one_line(first: str, second: str) -> None:
    net = model()
    capture = attach(net, body="core", sketch_size=8) if first == "sketched" else ExactCapture(net, body="core")
    alone = capture.featurize(BATCHES, zoo.squared_error)
    other = SECOND[second](capture, net)
    loader = Meanwhile(lambda: other.featurize(BATCHES, zoo.squared_error))
    found = capture.featurize(loader, zoo.squared_error)
    assert isinstance(loader.error, BodyError)
    assert "model: is being featurized by another thread (MainThread)" in str(loader.error)
    assert "\n" not in str(loader.error)
    assert torch.equal(found.values, alone.values), "the first thread's work is not touched"
    assert torch.equal(capture.featurize(BATCHES, zoo.squared_error).values, alone.values)


def test_two_models_are_two_threads_own() -> None:
    capture, other = (attach(m, body="core", sketch_size=8) for m in (model(), copy.deepcopy(model())))
    alone = capture.featurize(BATCHES, zoo.squared_error)
    loader = Meanwhile(lambda: other.featurize(BATCHES, zoo.squared_error))
    assert torch.equal(capture.featurize(loader, zoo.squared_error).values, alone.values)
    assert loader.error is None


def test_a_thread_after_the_other_is_fine_also_after_an_error() -> None:
    capture = attach(model(), body="core", sketch_size=8)
    with pytest.raises(ZeroDivisionError):
        capture.featurize(BATCHES, lambda net, batch: zoo.squared_error(net, batch) * (1 // 0))
    loader = Meanwhile(lambda: None)
    errors: list[Exception | None] = []

    def run() -> None:
        try:
            capture.featurize(loader, zoo.squared_error)
            errors.append(None)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == [None]


@pytest.mark.parametrize("kind", ["sketched", "exact"])
def test_features_under_inference_mode_are_plain_tensors(kind: str) -> None:
    net = model()
    capture = attach(net, body="core", sketch_size=8) if kind == "sketched" else ExactCapture(net, body="core")
    outside = capture.featurize(BATCHES, zoo.squared_error)
    with torch.inference_mode():
        within = capture.featurize([{k: v.clone() for k, v in b.items()} for b in BATCHES], zoo.squared_error)
    assert torch.equal(within.values, outside.values)
    for tensor in (within.values, within.losses, within.steps, within.lengths):
        assert tensor is not None
        assert not tensor.is_inference()
    within.values.mul_(2)
