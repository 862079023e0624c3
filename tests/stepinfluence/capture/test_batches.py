"""Batches of any kind: streams without a length, text, nested structures, bags with offsets."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from compare import relative
from oracle import sketched, step_gradients
from stepinfluence import ExactCapture, LossError, UnsupportedUseError, attach
from stepinfluence.capture.body.batches import fingerprints, infer_batch_size, length_of
from stepinfluence.loaders import is_one_shot, random_sampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

CAPTURES = pytest.mark.parametrize("make", [attach, ExactCapture])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        batch = zoo.make_batch(7)
        for i in range(7):
            yield {k: v[i] for k, v in batch.items()}


class Unsized:
    """A length that raises, as some libraries' streams have it."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __len__(self) -> int:
        raise self.error

    def __iter__(self) -> Iterator[Any]:
        yield zoo.make_batch(7)


@pytest.mark.usefixtures("in_float64")
@CAPTURES
def test_loaders_without_a_length(make: Any) -> None:
    model = zoo.Looped(zoo.LAYERS["mlp"]())
    capture = make(model, body="core")
    expected = capture.featurize([zoo.make_batch(7)], zoo.squared_error).values
    loaders: list[Any] = [
        DataLoader(Stream(), batch_size=3),
        Unsized(TypeError),
        Unsized(NotImplementedError),
        iter([zoo.make_batch(7)]),
        (b for b in [zoo.make_batch(7)]),
        map(zoo.make_batch, [7]),
    ]
    for loader in loaders:
        found = capture.featurize(loader, zoo.squared_error).values
        torch.testing.assert_close(found, expected)


@CAPTURES
@pytest.mark.parametrize("per_step", [True, False])
def test_a_length_that_no_memory_holds(make: Any, per_step: bool) -> None:
    class Endless(list[Any]):
        dataset = range(10**15)

    capture = make(zoo.Looped(zoo.LAYERS["mlp"]()), body="core")
    batches = [zoo.make_batch(3), zoo.make_batch(2)]
    found = capture.featurize(Endless(batches), zoo.squared_error, per_step=per_step)
    assert torch.equal(found.values, capture.featurize(batches, zoo.squared_error, per_step=per_step).values)


@dataclass
class Record:
    x: Tensor
    y: Tensor
    names: list[str]


Pair = namedtuple("Pair", ["x", "y"])
RECORDS: dict[str, Any] = {
    "dataclass": lambda b: Record(b["x"], b["y"], ["a", "b", "c"]),
    "named tuple": lambda b: Pair(b["x"], b["y"]),
    "user dictionary": lambda b: UserDict(b),
    "object": lambda b: SimpleNamespace(**b),
    "nested": lambda b: {"deep": [{"x": b["x"]}, (b["y"], "text")], "n": 3},
}


def unpacked(batch: Any) -> dict[str, Tensor]:
    if isinstance(batch, dict) and "deep" in batch:
        return {"x": batch["deep"][0]["x"], "y": batch["deep"][1][0]}
    return dict(batch) if isinstance(batch, UserDict) else {"x": batch.x, "y": batch.y}


@CAPTURES
@pytest.mark.parametrize("name", RECORDS)
def test_structures(make: Any, name: str) -> None:
    batch = zoo.make_batch(3)
    model = zoo.Looped(zoo.LAYERS["mlp"]())
    capture = make(model, body="core")
    expected = capture.featurize([batch], zoo.squared_error)
    given = RECORDS[name](batch)
    assert infer_batch_size(given) == 3
    found = capture.featurize([given], lambda m, b: zoo.squared_error(m, unpacked(b)))
    assert torch.equal(found.values, expected.values)


def padded(model: Any, batch: Any) -> Tensor:
    """Losses of token vectors ``(tokens, FEATURES)``, one tensor for each example, padded to one length."""
    rows = batch if isinstance(batch, list) else batch["rows"]
    x = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return model(x).square().flatten(1).sum(1)


@pytest.mark.usefixtures("in_float64")
@CAPTURES
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_list_of_examples_that_are_of_one_length_by_chance(make: Any, count: int) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(4, zoo.FEATURES) for _ in range(count)]
    capture = make(zoo.Looped(zoo.LAYERS["mlp"]()), body="core")
    expected = capture.featurize([[row] for row in rows], padded).values
    for batch in (rows, {"rows": rows}, {"rows": tuple(rows), "scale": torch.tensor(1.0)}):
        assert relative(capture.featurize([batch], padded).values, expected) < 1e-10


@CAPTURES
def test_losses_of_tokens_are_not_taken_for_those_of_a_list(make: Any) -> None:
    capture = make(zoo.Looped(zoo.LAYERS["mlp"]()), body="core")
    batch = list(zoo.make_batch(3).values())
    with pytest.raises(LossError, match=r"returned shape \(12,\), expected \(3,\)"):
        capture.featurize([batch], lambda model, b: model(b[0]).square().flatten())


TEXTS = ["a cat", "two dogs here", "no", "some more words to read"]


def encode(texts: list[str]) -> Tensor:
    rows = [[ord(c) % 11 for c in text][:6] for text in texts]
    return torch.tensor([row + [0] * (6 - len(row)) for row in rows])


class Reader(nn.Module):
    """Embeds text; its core has an operation that needs to know how many examples there are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, zoo.D)
        self.core = zoo.Core(
            lambda s, h: torch.einsum("btd,de->bte", h, s.w).cumsum(1).tanh() + s.shift.expand(len(h), 1, -1),
            w=zoo.normal(zoo.D, zoo.D), shift=zoo.normal(zoo.D),
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for _ in range(3):
            h = self.core(h)
        return h.square().flatten(1).mean(1)


STRINGS: dict[str, Any] = {
    "list": (lambda t: t, lambda b: b),
    "tuple in a dictionary": (lambda t: {"text": tuple(t)}, lambda b: list(b["text"])),
    "list of dictionaries": (lambda t: [{"text": x} for x in t], lambda b: [x["text"] for x in b]),
    "lists of characters": (lambda t: [list(x) for x in t], lambda b: ["".join(x) for x in b]),
    "bytes": (lambda t: [x.encode() for x in t], lambda b: [x.decode() for x in b]),
}


@CAPTURES
@pytest.mark.parametrize("name", STRINGS)
def test_batches_of_text(make: Any, name: str) -> None:
    model = Reader()
    pack, unpack = STRINGS[name]
    capture = make(model, body="core")
    expected = capture.featurize([encode(TEXTS), encode(TEXTS[:2])], lambda m, b: m(b))
    found = capture.featurize([pack(TEXTS), pack(TEXTS[:2])], lambda m, b: m(encode(unpack(b))))
    assert torch.equal(found.values, expected.values)
    assert infer_batch_size(pack(TEXTS)) is None


# --------------------------------------------------------------------------------------------------------------------
# Bags


class Bags(nn.Module):
    def __init__(self, *, scaled: bool = False, **options: Any) -> None:
        super().__init__()
        self.bag, self.mix, self.scaled = nn.EmbeddingBag(9, zoo.D, **options), zoo.linear(), scaled

    def forward(self, h: Tensor, *bag: Tensor) -> Tensor:
        weights = {"per_sample_weights": (bag[0] + 1).double() / 9.0} if self.scaled else {}
        return torch.tanh(self.mix(h) + self.bag(*bag, **weights))


class BagModel(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, size: int, *bag: Tensor) -> Tensor:
        h = torch.linspace(-1, 1, zoo.D, dtype=torch.float64).expand(size, -1)
        for _ in range(3):
            h = self.core(h, *bag)
        return h.square().mean(1)


OPTIONS: list[dict[str, Any]] = [
    {"mode": "mean"},
    {"mode": "sum"},
    {"mode": "max"},
    {"mode": "mean", "padding_idx": 2},
    {"mode": "max", "padding_idx": 2},
    {"mode": "sum", "scaled": True},
    {"mode": "sum", "sparse": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", ["matrix", "offsets", "last offset", "jagged"])
def test_bags(options: dict[str, Any], form: str) -> None:
    options = {**options, "include_last_offset": form == "last offset"}
    model = BagModel(Bags(**options)).double()
    tokens = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(2))
    rows = [tokens[i] for i in range(4)]
    if form == "jagged":
        rows = [tokens[0, :2], tokens[1, :0], tokens[2], tokens[3, :1]]
    lengths = torch.tensor([len(r) for r in rows])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    offsets = starts if form == "last offset" else starts[:-1]
    batch: Any = tokens if form == "matrix" else (torch.cat(rows), offsets)

    def loss(m: nn.Module, b: Any) -> Tensor:
        return m(4, b) if form == "matrix" else m(4, *b)

    def alone(m: nn.Module, index: Tensor) -> Tensor:
        row = rows[int(index)]
        if form == "matrix":
            return m(1, row[None])
        return m(1, row, torch.tensor([0, len(row)][: 1 + (form == "last offset")]))

    names = [n for n, _ in model.named_parameters()]
    grads = step_gradients(model, torch.arange(4), alone, body=[model.core], names=names)
    capture = attach(model, body="core", sketch_size=64)
    want = sketched(grads, {t.name: t.sketch for t in capture.targets})
    assert relative(capture.featurize([batch], loss).values, want) < 1e-10
    exact = ExactCapture(model, body="core").featurize([batch], loss)
    assert relative(exact.values, torch.cat([grads[n].flatten(2) for n in names], -1)) < 1e-10


def test_bags_with_weights_that_are_parameters_say_so() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.weights = nn.EmbeddingBag(9, zoo.D, mode="sum"), zoo.normal(4, 5)

        def forward(self, h: Tensor, tokens: Tensor) -> Tensor:
            return torch.tanh(h + self.bag(tokens, per_sample_weights=self.weights))

    model = BagModel(Weighted()).double()
    with pytest.raises(UnsupportedUseError, match=r"core\.bag\.weight, core\.weights: .*embedding_bag.*per_sample"):
        attach(model, body="core").featurize([torch.randint(9, (4, 5))], lambda m, b: m(4, b))


# --------------------------------------------------------------------------------------------------------------------


def test_lengths_and_orders() -> None:
    data = [torch.zeros(2)] * 5
    assert length_of([1, 2]) == 2
    assert length_of(DataLoader(Stream())) is None
    assert is_one_shot(iter([]))
    assert is_one_shot(map(str, []))
    assert not is_one_shot([])
    assert not is_one_shot(DataLoader(data))
    assert random_sampler(DataLoader(data)) is None
    assert random_sampler([1]) is None
    assert random_sampler(DataLoader(data, shuffle=True)) == "RandomSampler"
    weighted = torch.utils.data.WeightedRandomSampler([1.0] * 5, 5)
    assert random_sampler(DataLoader(data, sampler=weighted)) == "WeightedRandomSampler"
    batches = torch.utils.data.BatchSampler(torch.utils.data.SubsetRandomSampler(range(5)), 2, False)
    assert random_sampler(DataLoader(data, batch_sampler=batches)) == "SubsetRandomSampler"


def test_fingerprints_go_with_their_examples() -> None:
    batch = {**zoo.make_batch(4), "ids": torch.arange(4), "mask": torch.eye(4, 3) > 0, "z": torch.randn(4, 2) + 1j}
    order = torch.tensor([2, 0, 3, 1])
    whole = fingerprints(batch, 4)
    moved = fingerprints({k: v[order] for k, v in batch.items()}, 4)
    assert moved == [whole[i] for i in order.tolist()]
    assert len(set(whole)) == 4
    assert fingerprints(["a", "b"], 2) != fingerprints(["b", "a"], 2)
    assert fingerprints(torch.zeros(3, 2), 2, batch_dim=1) == fingerprints(torch.zeros(3, 2), 2, batch_dim=1)
