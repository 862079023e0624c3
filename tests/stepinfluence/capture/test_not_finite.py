"""NaN and infinity, in one pass of a verification or in both, are errors that say which example where that is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from stepinfluence import LossError, attach
from stepinfluence.capture.passes import TappedPass
from stepinfluence.capture.recording.recorder import SketchRecorder
from torch import Tensor

BATCH = zoo.make_batch(4)


class Unseen(torch.autograd.Function):
    """Out of sight: owners have to be found by gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def make(fn: Any) -> Any:
    return attach(zoo.Looped(zoo.Core(fn, mix=zoo.linear())), body="core", sketch_size=16)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("ids", [None, lambda batch: ["a", "b", "c", "d"]])
def test_gradients_of_the_second_pass_only(value: float, ids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an overflow when losses are multiplied, or a state of its own, would have it."""
    capture = make(lambda s, x: s.mix(x).tanh())
    backward, calls = TappedPass.backward, []

    def spoilt(self: TappedPass, sink: SketchRecorder, weights: Tensor | None = None) -> bool:
        coarse = backward(self, sink, weights)
        calls.append(1)
        if len(calls) == 2:
            sink.buffer[2, 0, 3] = value
        return coarse

    monkeypatch.setattr(TappedPass, "backward", spoilt)
    with pytest.raises(LossError, match="was finite and is NaN or infinite") as caught:
        capture.featurize([BATCH], zoo.squared_error, ids=ids)
    assert f"for example {2 if ids is None else repr('c')} " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_losses_of_the_second_pass_only_name_the_example() -> None:
    calls: list[int] = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        losses = zoo.squared_error(model, batch)
        calls.append(1)
        return losses if len(calls) == 1 else losses * torch.tensor([1.0, float("nan"), 1.0, 1.0])

    with pytest.raises(LossError, match=r"NaN or infinite for example.*'b'"):
        make(lambda s, x: s.mix(x).tanh()).featurize([BATCH], loss_fn, ids=lambda _: ["a", "b", "c", "d"])


def rooted(core: Any, x: Tensor) -> Tensor:
    y = core.mix(x)
    zero = torch.zeros_like(y)
    zero[1] = 1  # the second example has a root at zero
    return y + ((y - y.detach()) * zero + 1 - zero).sqrt() * zero


def test_gradients_of_both_passes_name_the_example_where_followed() -> None:
    with pytest.raises(LossError, match=r"gradients are NaN or infinite for example\(s\) row 1"):
        make(rooted).featurize([BATCH], zoo.squared_error)


def test_where_owners_have_to_be_found_it_is_not_called_mixing() -> None:
    with pytest.raises(LossError, match=r"gradients are NaN or infinite in 4 of 16 rows at core\.mix") as caught:
        make(lambda s, x: Unseen.apply(rooted(s, x))).featurize([BATCH], zoo.squared_error)
    assert "batches of one" in str(caught.value)
