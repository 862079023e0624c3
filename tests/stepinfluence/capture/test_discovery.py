"""A capture without a body finds the loop by the first batch; a body that is no loop is told where the loop is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from stepinfluence import BodyError, ExactCapture, attach, influence
from torch import Tensor, nn

STEPS = 5


class Looped(nn.Module):
    """A head that is called once, and a loop of two parts."""

    def __init__(self, *, only_in_training: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.core = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.gate = nn.Linear(4, 4)
        self.only_in_training = only_in_training
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.embed(x)
        for _ in range(STEPS if self.training or not self.only_in_training else 0):
            h = self.core(h) * self.gate(h).sigmoid()
        return self.head(h)


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean(1)


@pytest.fixture
def model() -> Looped:
    torch.manual_seed(0)
    return Looped()


BATCHES = [torch.randn(6, 3, generator=torch.Generator().manual_seed(k)) for k in range(2)]


def test_the_loop_is_found_and_said(model: Looped, capsys: pytest.CaptureFixture[str]) -> None:
    model.train()
    pending = attach(model, sketch_size=16)
    assert repr(pending) == "PendingCapture(Looped, loop body not known yet)"
    with pytest.raises(BodyError, match="body: not known yet"):
        _ = pending.width
    found = pending.featurize(BATCHES, loss_fn)
    assert model.training
    assert float(model.calls) == 0  # nothing of the run is left in the model
    said = capsys.readouterr().err
    known = attach(model, body=["core", "gate"], sketch_size=16)
    assert said.startswith(f"loop body: core, gate ({STEPS} steps, 4 parameters, ")
    assert f"{4 * STEPS * known.width * 12 / 1024:.2f} KiB of features for 12 examples" in said
    want = known.featurize(BATCHES, loss_fn)
    assert torch.equal(found.values, want.values)
    assert found.space == want.space
    assert pending.width == known.width
    again = pending.featurize(BATCHES, loss_fn, per_step=False)
    assert capsys.readouterr().err == ""  # said once
    assert influence(again, found).sdi.shape == (12, 12, STEPS)
    assert "followed" in repr(pending) or "Capture(Looped" in repr(pending)


def test_batches_that_are_given_once_are_all_featurized(model: Looped) -> None:
    found = attach(model, sketch_size=16).featurize(iter(BATCHES), loss_fn)
    assert len(found) == 12
    assert torch.equal(
        found.values, attach(model, body=["core", "gate"], sketch_size=16).featurize(BATCHES, loss_fn).values
    )


def test_a_loop_of_training_mode(capsys: pytest.CaptureFixture[str]) -> None:
    model = Looped(only_in_training=True)
    attach(model, sketch_size=16, training=True).featurize(BATCHES, loss_fn)
    assert "loop body: core, gate" in capsys.readouterr().err
    with pytest.raises(BodyError, match="no module is entered more than once"):
        attach(model, sketch_size=16).featurize(BATCHES, loss_fn)


def test_steps_in_the_order_of_entry(model: Looped, capsys: pytest.CaptureFixture[str]) -> None:
    found = attach(model, sketch_size=16, loop="timeline").featurize(BATCHES, loss_fn)
    assert f"({2 * STEPS} steps" in capsys.readouterr().err
    assert found.values.shape[1] == 2 * STEPS


def test_a_model_without_a_loop(model: Looped) -> None:
    with pytest.raises(BodyError, match="no module is entered more than once"):
        attach(model.head).featurize([torch.randn(3, 4)], loss_fn)


def test_a_body_that_is_entered_once_is_told_where_the_loop_is(model: Looped) -> None:
    with pytest.warns(UserWarning, match=r"body: head was entered once .* core \(5 times\), gate \(5 times\)"):
        attach(model, body="head", sketch_size=16).featurize(BATCHES, loss_fn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, body="core", sketch_size=16).featurize(BATCHES, loss_fn)
        attach(nn.Sequential(nn.Linear(3, 1)), body="0", sketch_size=16).featurize(BATCHES, loss_fn)  # no loop at all


@pytest.mark.parametrize("loader", [[], iter([])])
@pytest.mark.parametrize(
    "make", [attach, lambda m, **o: attach(m, body="core", **o), lambda m: ExactCapture(m, body="core")]
)
def test_no_examples_are_an_error(model: Looped, make: Any, loader: Any) -> None:
    with pytest.raises(ValueError, match="loader: gave no batch"):
        make(model).featurize(loader, loss_fn)
