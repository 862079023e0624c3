"""Rows across checkpoints: matched by ids, or refused; never rows of different examples added."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stepinfluence import (
    ExactCapture,
    FeatureMismatchError,
    attach,
    influence,
    influence_over_checkpoints,
    self_influence,
)
from stepinfluence.compat import CheckpointSpec, ProjectedTracInSDI
from stepinfluence.search import rerank
from stepinfluence.store import fold
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

pytestmark = pytest.mark.usefixtures("in_float64")


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.core, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        for _ in range(3):
            h = torch.tanh(self.core(h))
        return self.head(h)


def loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["t"]).transpose(1, 2), batch["t"].flip(1), reduction="none").mean(1)


def ids(batch: Any) -> Any:
    return batch["id"]


TOKENS = torch.randint(7, (10, 4), generator=torch.Generator().manual_seed(5))
DATA = [{"t": TOKENS[i], "id": i} for i in range(10)]
QUERY = [{"t": TOKENS[:3], "id": torch.arange(3)}]


def loader(**options: Any) -> Any:
    return DataLoader(DATA, batch_size=4, **options)


def shuffled() -> Any:
    return loader(shuffle=True, generator=torch.Generator().manual_seed(1))


class Shuffling(IterableDataset[Any]):
    """A stream in another order every time, of which no sampler tells."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self) -> Iterator[Any]:
        for i in torch.randperm(10, generator=self.generator).tolist():
            yield DATA[i]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Toy, list[Path]]:
    model = Toy()
    paths = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for path in paths:
        torch.save(model.state_dict(), path)
        with torch.no_grad():
            model.core.weight.mul_(1.1)
    return model, paths


MAKE = pytest.mark.parametrize("make", [attach, ExactCapture])


@MAKE
@pytest.mark.parametrize("kind", ["sampler", "stream"])
def test_rows_are_matched_by_ids(make: Any, kind: str, two: tuple[Toy, list[Path]]) -> None:
    model, paths = two
    capture = make(model, body="core")

    def scores(train: Any, query: Any = QUERY) -> Any:
        return influence_over_checkpoints(capture, paths, train, query, loss, etas=1.0, ids=ids, progress=False)

    expected = scores(loader())
    for train, query in (
        (shuffled() if kind == "sampler" else DataLoader(Shuffling(), batch_size=4), QUERY),
        (loader(), shuffled()),
    ):
        found = scores(train, query)
        rows = [found.train_ids.index(i) for i in range(10)]
        columns = [found.query_ids.index(i) for i in range(3)]
        torch.testing.assert_close(found.sdi[rows][:, columns], expected.sdi)


@MAKE
def test_an_order_that_changes_is_refused_without_ids(make: Any, two: tuple[Toy, list[Path]]) -> None:
    model, paths = two
    capture = make(model, body="core")

    def scores(train: Any, query: Any = QUERY, count: int = 2) -> Any:
        return influence_over_checkpoints(capture, paths[:count], train, query, loss, etas=1.0, progress=False)

    def refused(match: str, *given: Any) -> None:
        with pytest.raises(FeatureMismatchError, match=match) as caught:
            scores(*given)
        assert "\n" not in str(caught.value)

    refused(r"^train: its loader draws a new order .*RandomSampler.*shuffle=False, or ids=", shuffled())
    refused(r"^query: its loader draws a new order", loader(), shuffled())
    refused(r"^train: the loader gave other examples.*\(row \d is the first", DataLoader(Shuffling(), batch_size=4))
    refused(r"^query: the loader gave other examples", loader(), DataLoader(Shuffling(), batch_size=4))
    refused(r"^train: got an iterator \(list_iterator\)", iter(list(loader())))
    refused(r"^train: got an iterator \(generator\)", (b for b in loader()))
    refused(r"^query: got an iterator \(map\)", loader(), map(dict, QUERY))
    same = iter(list(loader()))
    refused(r"^train: got an iterator", same, same, 1)
    scores(iter(list(loader())), count=1)
    scores(shuffled(), count=1)


def test_features_of_several_calls(two: tuple[Toy, list[Path]]) -> None:
    """The same for features that were computed one call at a time."""
    model, paths = two
    capture = attach(model, body="core")
    plain, mixed, named, other = [], [], [], []
    stream = DataLoader(Shuffling(), batch_size=4)
    for path in paths:
        model.load_state_dict(torch.load(path))
        plain.append(capture.featurize(loader(), loss))
        mixed.append(capture.featurize(stream, loss))
        named.append(capture.featurize(stream, loss, ids=ids))
        other.append(capture.featurize(QUERY, loss))
    expected = influence(plain, other)
    for broken in (lambda: influence(mixed, other), lambda: self_influence(mixed), lambda: fold(mixed, [1.0, 1.0])):
        with pytest.raises(FeatureMismatchError, match="other examples, or the same in another order"):
            broken()
    found = influence(named, other)
    rows = [found.train_ids.index(i) for i in range(10)]
    torch.testing.assert_close(found.sdi[rows], expected.sdi)
    torch.testing.assert_close(self_influence(named)[rows], self_influence(plain))
    # Other batch sizes are no other order.
    model.load_state_dict(torch.load(paths[1]))
    again = capture.featurize(DataLoader(DATA, batch_size=3), loss)
    torch.testing.assert_close(influence([plain[0], again], other).sdi, expected.sdi)
    twice = [replace(f, ids=tuple(i % 5 for i in f.ids)) for f in named]
    with pytest.raises(FeatureMismatchError, match="ids that occur twice"):
        influence(twice, other)
    with pytest.raises(FeatureMismatchError, match=r"different examples \(\d is missing"):
        influence([named[0], replace(named[1], ids=tuple(i + 5 for i in named[1].ids))], other)
    with pytest.raises(FeatureMismatchError, match=r"different examples \(10 and 3 rows"):
        influence([plain[0], other[1]], other)


def test_exact_influence_in_several_rounds() -> None:
    """Training examples are gone through once for every group of queries."""
    capture = attach(Toy(), body="core", sketch_size=16)
    queries = [{"t": TOKENS[i : i + 1], "id": torch.tensor([i])} for i in range(3)]

    def scores(train: Any, size: int = 1, **options: Any) -> Any:
        return rerank(capture, loss, train, queries, query_bytes=size, progress=False, **options)

    expected = scores(loader())
    assert bool((expected.sdi != 0).any((0, 2)).all())
    torch.testing.assert_close(scores(iter(list(loader())), 1 << 30).sdi, expected.sdi)
    for train, match in (
        (iter(list(loader())), "train: got an iterator"),
        (shuffled(), "train: its loader draws a new order"),
        (DataLoader(Shuffling(), batch_size=4), "train: batch 0 holds other examples"),
    ):
        with pytest.raises(FeatureMismatchError, match=match):
            scores(train)
    with pytest.raises(FeatureMismatchError, match="train: batch 0 holds other examples"):
        scores(shuffled(), ids=ids)


def test_the_published_interface(two: tuple[Toy, list[Path]]) -> None:
    model, paths = two
    estimator = ProjectedTracInSDI(model=model, target_modules=model.core, projection_size=16)
    specs = [CheckpointSpec(path) for path in paths]
    for train, match in (
        (shuffled(), "train_loader: its loader draws"),
        (iter(list(loader())), "train_loader: got an iterator"),
        (DataLoader(Shuffling(), batch_size=4), "train_loader: the loader gave other examples"),
    ):
        with pytest.raises(FeatureMismatchError, match=match):
            estimator.influence_across_checkpoints(
                checkpoints=specs, train_loader=train, query_loader=QUERY, loss_fn=loss
            )
