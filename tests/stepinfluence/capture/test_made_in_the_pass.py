"""Batches that a pass itself makes tensors of: texts of lengths of their own, records one after the other; and states
that nothing tells from constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from stepinfluence import ExactCapture, LayoutError, UnsupportedUseError, attach
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from zoo import Core, D, normal

TEXTS = ["abc", "bcdef", "ad", "fe"]


class Reader(nn.Module):
    """``(..., T)`` token numbers to ``(..., T, V)``: tokens do not look at each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.core, self.head = nn.Embedding(6, D), nn.Linear(D, D), nn.Linear(D, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        h = x = self.embed(tokens)
        for _ in range(3):
            h = torch.tanh(self.core(h)) + x
        logits: Tensor = self.head(h)
        return logits


def tokens(text: str) -> list[int]:
    return [ord(c) - ord("a") for c in text]


def by_token(model: nn.Module, numbers: Tensor) -> Tensor:
    return F.cross_entropy(model(numbers), numbers, reduction="none")


def padded(make: Callable[[list[int]], Tensor]) -> Callable[[nn.Module, Sequence[str]], Tensor]:
    def loss(model: nn.Module, texts: Sequence[str]) -> Tensor:
        numbers = pad_sequence([make(tokens(t)) for t in texts], batch_first=True)
        there = torch.arange(numbers.shape[1]) < torch.tensor([[len(t)] for t in texts])
        return (F.cross_entropy(model(numbers).mT, numbers, reduction="none") * there).sum(1)

    return loss


def packed(model: nn.Module, texts: Sequence[str]) -> Tensor:
    losses = by_token(model, torch.cat([torch.tensor(tokens(t)) for t in texts]))
    whose = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor([len(t) for t in texts]))
    return torch.zeros(len(texts), dtype=losses.dtype).index_add(0, whose, losses)


def split(model: nn.Module, texts: Sequence[str]) -> Tensor:
    losses = by_token(model, torch.as_tensor(np.concatenate([tokens(t) for t in texts])))
    return torch.stack([part.sum() for part in losses.split([len(t) for t in texts])])


def one_by_one(model: nn.Module, texts: Sequence[str]) -> Tensor:
    return torch.stack([by_token(model, torch.tensor(tokens(t))).sum() for t in texts])


def alone(model: Reader, texts: Sequence[str]) -> dict[str, Tensor]:
    """``(B, steps, *shape)`` of each parameter: one text at a time, a copy of the core for each step."""
    names = [f"core.{name}" for name, _ in model.core.named_parameters()]
    rows = []
    for text in texts:
        copies = [[p.detach().clone().requires_grad_() for p in model.core.parameters()] for _ in range(3)]
        numbers = torch.tensor(tokens(text))
        h = x = model.embed(numbers)
        for copy in copies:
            h = torch.tanh(F.linear(h, *copy)) + x
        loss = F.cross_entropy(model.head(h), numbers, reduction="sum")
        rows.append(torch.autograd.grad(loss, [p for copy in copies for p in copy]))
    return {n: torch.stack([torch.stack(row[k::2]) for row in rows]) for k, n in enumerate(names)}


WAYS: dict[str, Any] = {
    "padded": padded(torch.tensor),
    "padded from numpy": padded(lambda numbers: torch.from_numpy(np.array(numbers))),
    "end to end": packed,
    "end to end from numpy, split": split,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("texts", [TEXTS, ["abcd", "bcdef", "ad", "f"], ["a", "bc", "def"]])
def test_texts_against_autograd(way: str, texts: list[str]) -> None:
    """Also where one is as long as the batch, or of one token."""
    model = Reader().double()
    truth = alone(model, texts)
    exact = ExactCapture(model, body="core").featurize([texts], WAYS[way]).values
    torch.testing.assert_close(exact, torch.cat([g.flatten(2) for g in truth.values()], -1))
    capture = attach(model, body="core", sketch_size=16)
    found = capture.featurize([texts], WAYS[way]).values
    torch.testing.assert_close(found, oracle.sketched(truth, {t.name: t.sketch for t in capture.targets}))


@pytest.mark.parametrize("texts", [TEXTS, ["abcd", *TEXTS[1:]]])
@pytest.mark.parametrize("outside", ["error", "ignore"])
def test_one_example_at_a_time_has_no_steps_of_its_own(texts: list[str], outside: Any) -> None:
    capture = attach(Reader(), body="core", sketch_size=16, outside=outside)
    with pytest.raises(LayoutError, match=r"one example .* at a time.*first of example 1 is step 4.*batches of one"):
        capture.featurize([texts], one_by_one)
    summed = capture.featurize([texts], one_by_one, per_step=False).values
    each = capture.featurize([[text] for text in texts], one_by_one).values
    torch.testing.assert_close(summed, each.sum(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("outside", ["error", "ignore"])
@pytest.mark.parametrize("texts", [TEXTS, ["abcd", *TEXTS[1:]]])
def test_texts_beside_a_tensor_are_to_be_one(texts: list[str], outside: Any) -> None:
    """The batch has tensors, and what the pass makes of its texts is not among them."""

    def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        scores = [model(torch.tensor(tokens(t)))[-1, 0] for t in batch["texts"]]
        return torch.stack([(a - b) ** 2 for a, b in zip(scores, batch["y"], strict=True)])

    with pytest.raises(UnsupportedUseError, match=r"core\.\w+: the loop was run on tensors that no tensor of"):
        attach(Reader(), body="core", sketch_size=16, outside=outside).featurize(
            [{"texts": texts, "y": torch.randn(4)}], loss
        )


def test_a_batch_that_takes_no_part_is_called_that() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(torch.tensor([[1, 2, 3], [3, 2, 1]])).square().mean((1, 2)).repeat(2)[: len(batch)]

    with pytest.raises(UnsupportedUseError, match=r"make them in the loader, or from the batch's tensors"):
        attach(Reader(), body="core", sketch_size=16).featurize([torch.zeros(3, 4)], loss)


class Forward(Reader):
    """Adds the derivative of its core along the state, taken forward."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core  # type: ignore[assignment]

    def forward(self, tokens: Tensor) -> Tensor:
        h = x = self.embed(tokens)
        for _ in range(2):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(h, torch.ones_like(h))
                value, slope = forward_ad.unpack_dual(torch.tanh(self.core(dual)))
            h = value + slope + x
        logits: Tensor = self.head(h)
        return logits


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, within itself
def test_derivatives_taken_forward() -> None:
    """Refused where a tap does not see them; what is only multiplied by a parameter is an ordinary use of it."""
    batch = torch.randint(6, (3, 4), generator=torch.Generator().manual_seed(0))

    def loss(model: nn.Module, numbers: Tensor) -> Tensor:
        return F.cross_entropy(model(numbers).mT, numbers, reduction="none").sum(1)

    linear = Forward(nn.Linear(D, D))
    with pytest.raises(UnsupportedUseError, match=r"torch\.autograd\.forward_ad.*use ExactCapture"):
        attach(linear, body="core", sketch_size=16).featurize([batch], loss)
    assert len(ExactCapture(linear, body="core").featurize([batch], loss)) == 3
    gain = Forward(Core(lambda s, x: x * s.gain, gain=normal(D))).double()
    capture = attach(gain, body="core", sketch_size=16)
    exact = ExactCapture(gain, body="core").featurize([batch], loss).values
    expected = oracle.sketched({"core.gain": exact}, {t.name: t.sketch for t in capture.targets})
    torch.testing.assert_close(capture.featurize([batch], loss).values, expected)
