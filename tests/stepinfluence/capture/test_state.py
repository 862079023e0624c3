"""What a pass changes in the model is put back: a batch's features do not depend on the batches before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from compare import compare, relative
from oracle import sketched, step_gradients
from stepinfluence import BodyError, ExactCapture, attach, influence
from stepinfluence.search import rerank
from torch import Tensor, nn
from torch.nn import functional as F

CAPTURES = pytest.mark.parametrize("make", [attach, ExactCapture])


class Moving(nn.Module):
    """A core whose behaviour depends on how often it ran: ``kind`` says what it keeps, and how."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.mix, self.kind = zoo.linear(), kind
        self.register_buffer("mean", torch.zeros(zoo.D))
        self.register_buffer("lazy", None)
        self.slots = [torch.zeros(())]
        self.count, self.history, self.table, self.last = 0, [], {}, torch.zeros(())

    def forward(self, h: Tensor) -> Tensor:
        if self.kind == "buffer replaced":
            self.mean = 0.5 * self.mean + 0.05
        elif self.kind == "buffer in place":
            self.mean.mul_(0.5).add_(0.05)
        elif self.kind == "buffer by its data":
            self.mean.data.add_(0.1)
        elif self.kind == "buffer of None":
            self.lazy = torch.full((), 0.1) if self.lazy is None else self.lazy + 0.1
        elif self.kind == "buffer added":
            value = getattr(self, "added", torch.zeros(())) + 0.1
            self._buffers.pop("added", None)
            self.register_buffer("added", value, persistent=False)
        elif self.kind == "count":
            self.count += 1
        elif self.kind == "list":
            self.history.append(0.1)
        elif self.kind == "tensor in a list":
            self.slots[0].add_(0.1)
        elif self.kind == "dictionary":
            self.table["n"] = self.table.get("n", 0) + 1
        elif self.kind == "attribute tensor":
            self.last.add_(0.1)
        shift = 0.1 * self.count + sum(self.history) + 0.1 * self.table.get("n", 0) + self.last + self.slots[0]
        extra = (0 if self.lazy is None else self.lazy) + getattr(self, "added", 0)
        return torch.tanh(self.mix(h) - self.mean - shift - extra)


KINDS = [
    "buffer replaced", "buffer in place", "buffer by its data", "buffer of None", "buffer added", "count", "list",
    "dictionary", "attribute tensor", "tensor in a list",
]  # fmt: skip


@pytest.mark.usefixtures("in_float64")
@CAPTURES
@pytest.mark.parametrize("kind", KINDS)
def test_features_do_not_depend_on_the_batches_before(make: Any, kind: str) -> None:
    model = zoo.Looped(Moving(kind))
    attributes = {name: repr(value) for name, value in vars(model.core).items()}
    batches = [zoo.make_batch(3), zoo.make_batch(2, seed=1), zoo.make_batch(3)]
    capture = make(model, body="core", training=True)
    whole = capture.featurize(batches, zoo.squared_error)
    alone = capture.featurize(batches[1:], zoo.squared_error, first_batch=1)
    assert torch.equal(whole.values[3:], alone.values)
    assert torch.equal(whole.values[:3], whole.values[5:])  # the same batch at another place
    assert attributes == {name: repr(value) for name, value in vars(model.core).items()}
    if make is attach:
        again = rerank(capture, zoo.squared_error, batches[1:], batches[:1], progress=False).sdi
        both = rerank(capture, zoo.squared_error, batches, batches[:1], progress=False).sdi
        torch.testing.assert_close(again, both[3:])


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_a_first_pass(kind: str) -> None:
    model = zoo.Looped(Moving(kind)).double()
    model.core.mean = torch.zeros(zoo.D, dtype=torch.float64)
    batch = zoo.make_batch(3, dtype=torch.float64)
    capture = attach(model, body="core", sketch_size=64, training=True)
    found = capture.featurize([batch, batch], zoo.squared_error).values
    fresh = zoo.Looped(Moving(kind)).double()
    fresh.load_state_dict(model.state_dict())
    names = [t.name for t in capture.targets]
    # All examples in one forward pass, each differentiated by itself: one example at a time would count four times.
    grads = step_gradients(fresh, batch, zoo.squared_error, body=[fresh.core], names=names, whole_batch=lambda: None)
    want = sketched(grads, {t.name: t.sketch for t in capture.targets})
    assert relative(found[:3], want) < 1e-10
    assert relative(found[3:], want) < 1e-10


def test_a_loader_may_change_the_model_between_batches() -> None:
    model = zoo.Looped(zoo.LAYERS["mlp"]())
    batch = zoo.make_batch(3)

    def loader() -> Iterator[Any]:
        for steps in (2, 5):
            model.steps = steps
            yield batch

    assert (
        attach(model, body="core", sketch_size=8).featurize(loader(), zoo.squared_error).steps.tolist()
        == [2] * 3 + [5] * 3
    )


def test_spectral_norm_and_batch_statistics_in_training_mode() -> None:
    layer = torch.nn.utils.spectral_norm(zoo.linear())
    model = zoo.Looped(nn.Sequential(layer, nn.Tanh()))
    batch = zoo.make_batch(3)
    capture = attach(model, body="core", sketch_size=32, training=True)
    first, second = capture.featurize([batch, batch], zoo.squared_error).values.split(3)
    assert torch.equal(first, second)


def test_tensors_cached_by_a_module_are_computed_in_every_pass() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.kept = zoo.normal(zoo.D, zoo.D), None

        def forward(self, h: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = (self.weight @ self.weight.t()).exp()
            return (h @ self.kept).tanh()

    model = zoo.Looped(Cached())
    capture = attach(model, body="core", sketch_size=32)
    first, second = capture.featurize([zoo.make_batch(3)] * 2, zoo.squared_error).values.split(3)
    assert torch.equal(first, second)
    assert model.core.kept is None


@CAPTURES
def test_modes_and_switches_flipped_in_a_pass(make: Any) -> None:
    class Flipping(zoo.Looped):
        def forward(self, x: Tensor) -> Tensor:
            first = self.training
            self.eval()
            self.read_in.weight.requires_grad_(False)
            return super().forward(x) * (2 if first else 1)

    model = Flipping(zoo.linear()).train()
    batch = zoo.make_batch(3)
    first, second = make(model, body="core", training=True).featurize([batch] * 2, zoo.squared_error).values.split(3)
    assert torch.equal(first, second)
    assert all(module.training for module in model.modules())
    assert model.read_in.weight.requires_grad


# --------------------------------------------------------------------------------------------------------------------
# Weights that the run changes


def tokens_of(h: Tensor) -> Tensor:
    return (h.sum(-1).abs() * 7).long() % 5


REWRITES: dict[str, Callable[[], nn.Module]] = {
    "Embedding": lambda: zoo.Core(
        lambda s, h: s.e(tokens_of(h)) + s.mix(h).tanh(), e=nn.Embedding(5, 6, max_norm=0.5), mix=zoo.linear(),
    ),
    "F.embedding": lambda: zoo.Core(
        lambda s, h: F.embedding(tokens_of(h), s.table, max_norm=0.4) + s.mix(h).tanh(),
        table=zoo.normal(5, zoo.D), mix=zoo.linear(),
    ),
    "EmbeddingBag": lambda: zoo.Core(
        lambda s, h: s.e(tokens_of(h)).unsqueeze(1) + s.mix(h).tanh(),
        e=nn.EmbeddingBag(5, 6, max_norm=0.5, mode="sum"), mix=zoo.linear(),
    ),
    "norm 1": lambda: zoo.Core(
        lambda s, h: s.e(tokens_of(h)) + s.mix(h).tanh(), e=nn.Embedding(5, 6, max_norm=0.9, norm_type=1.0),
        mix=zoo.linear(),
    ),
    "outside the body": lambda: zoo.linear(),
}  # fmt: skip


@CAPTURES
@pytest.mark.parametrize("name", REWRITES)
def test_weights_are_as_before(make: Any, name: str) -> None:
    model = zoo.Looped(REWRITES[name]())
    if name == "outside the body":
        model.table = nn.Embedding(5, zoo.FEATURES, max_norm=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def loss(m: Any, batch: Any) -> Tensor:
        x = batch["x"] + (m.table(tokens_of(batch["x"])) if name == "outside the body" else 0)
        return zoo.squared_error(m, {**batch, "x": x})

    capture = make(model, body="core")
    train, query = (capture.featurize([zoo.make_batch(n)], loss) for n in (3, 2))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    influence(train, query)


@pytest.mark.parametrize("name", [n for n in REWRITES if n != "outside the body"])
def test_gradients_are_those_at_the_weights_that_were_used(name: str) -> None:
    """The oracle runs on weights that already have the norm."""
    model = zoo.Looped(REWRITES[name]())
    table = model.core.table if name == "F.embedding" else model.core.e.weight
    with torch.no_grad():
        table.div_(10 * table.norm())
    compare(model, [zoo.make_batch(3)])


@CAPTURES
def test_weights_clamped_in_the_forward_pass_are_put_back(make: Any) -> None:
    class Clamped(zoo.Looped):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.core.weight.clamp_(-0.1, 0.1)
                self.read_out.weight.data = self.read_out.weight.data.sign()
            return super().forward(x)

    model = Clamped(zoo.linear())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    make(model, body="core").featurize([zoo.make_batch(3)] * 2, zoo.squared_error)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_weights_changed_later_are_an_error() -> None:
    """Not in the first pass, when a copy would have been kept. (ExactCapture keeps one of every body weight.)"""

    class Drifting(zoo.Looped):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 2:
                with torch.no_grad():
                    self.core.weight.mul_(0.9)
            return super().forward(x)

    batches = [zoo.make_batch(3), zoo.make_batch(2)]
    with pytest.raises(BodyError, match=r"core\.weight: the forward pass changes this weight"):
        attach(Drifting(zoo.linear()), body="core").featurize(batches, zoo.squared_error)
    model = Drifting(zoo.linear())
    before = model.core.weight.detach().clone()
    ExactCapture(model, body="core").featurize(batches, zoo.squared_error)
    assert torch.equal(before, model.core.weight)
