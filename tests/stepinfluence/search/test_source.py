"""``curvature="source"``: SOURCE from a store that knows how training went, against matrix exponentials; refusals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from stepinfluence import Features, attach, influence, influence_over_checkpoints, self_influence
from stepinfluence.attribution.curvature import Progress, TrainingTime, Unrolled, segments_of
from stepinfluence.attribution.curvature.kept import load, load_unrolled, save_unrolled
from stepinfluence.errors import FeatureMismatchError, StoreError
from stepinfluence.search import ask, checkpoint_energy, outliers, scores, top_k
from stepinfluence.search.exact_corrected import require_correctable
from stepinfluence.store import Store, fold_store
from torch import Tensor, nn

pytestmark = pytest.mark.numeric

ROWS, QUERIES, STEPS = 20, 3, 4
PROGRESS = tuple(Progress(u, rate, 1.5) for u, rate in ((10, 0.02), (20, 0.02), (35, 0.01), (60, 0.005)))
TIMES = TrainingTime.of(PROGRESS).times
CUTS = (0, 1, 3, 4)  # four checkpoints in three segments
COUNT = len(PROGRESS)


def side(rows: int, seed: int, *, prefix: str, metrics: Sequence[str] = ("",) * COUNT) -> list[Features]:
    found = []
    for k in range(COUNT):
        one = made.features(
            made.normal(rows, STEPS, made.WIDTH, seed=seed + k).double(), prefix=prefix, weights=f"w{k}"
        )
        found.append(replace(one, space=replace(one.space, metric=metrics[k])))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source")
    made.store(path / "train", side(ROWS, 0, prefix="z"), etas=(0.1,) * COUNT, progress=PROGRESS)
    made.store(path / "query", side(QUERIES, 50, prefix="q"), etas=(0.1,) * COUNT, progress=PROGRESS)
    return path


@pytest.fixture
def train(folder: Path) -> Store:
    return Store.open(folder / "train")


@pytest.fixture
def query(folder: Path) -> Store:
    return Store.open(folder / "query")


def dense(train: Store, query: Store) -> Tensor:
    """``(n, q, steps)`` by matrices and their exponentials in float64, from training's length alone."""
    rows = [train.features(k).summed().values.double() for k in range(COUNT)]
    asked = query.features(COUNT - 1).values.double()
    eye = torch.eye(made.WIDTH, dtype=torch.float64)
    kept, total = eye, torch.zeros(ROWS, QUERIES, STEPS, dtype=torch.float64)
    times = (0.0, *TIMES)
    for first, last in reversed(list(itertools.pairwise(CUTS))):
        time, pooled = times[last] - times[first], torch.cat(rows[first:last])
        gram = pooled.T @ pooled / len(pooled)
        shrunk = torch.matrix_exp(-time * gram)
        mean = torch.stack(rows[first:last]).mean(0)
        total += torch.einsum("nd,de,ef,qtf->nqt", mean, (eye - shrunk) @ torch.linalg.inv(gram), kept, asked)
        kept = shrunk @ kept
    return total


def test_segments_follow_from_the_checkpoints() -> None:
    found = segments_of(PROGRESS)
    assert [s.checkpoints for s in found] == [(0,), (1, 2), (3,)]
    assert [s.updates for s in found] == [10, 25, 25]
    assert [s.learning_rate * s.updates for s in found] == pytest.approx(
        [TIMES[0], TIMES[2] - TIMES[0], TIMES[3] - TIMES[2]]
    )
    assert len(segments_of(PROGRESS, 9)) == COUNT
    # A constant rate is every segment's.
    constant = segments_of([Progress(u, 0.1) for u in (5, 10, 20)])
    assert [s.updates for s in constant] == [5, 5, 10]
    assert [s.learning_rate for s in constant] == pytest.approx([0.1] * 3)


def test_a_store_is_asked_by_name(train: Store, query: Store) -> None:
    want = dense(train, query)
    found = scores(train, query, curvature="source", progress=False)
    # float32 features are multiplied; eigenvectors are float64
    size = float(want.abs().max())
    torch.testing.assert_close(found.sdi.double(), want, rtol=1e-5, atol=1e-5 * size)
    assert found.etas == (1.0,) * COUNT
    whole = [replace(f.summed()) for f in (query.features(k) for k in range(COUNT))]
    summed = scores(train, whole, curvature="source", progress=False).sdi.sum(2)
    torch.testing.assert_close(found.sdi.sum(2), summed, rtol=1e-6, atol=1e-6 * size)
    best = top_k(train, query, 5, curvature="source", progress=False)
    assert best.rows.tolist() == want.sum(2).T.topk(5).indices.tolist()
    parts = [
        scores(train, query, curvature="source", parameters=block.name, progress=False).sdi for block in made.BLOCKS
    ]
    torch.testing.assert_close(sum(parts), found.sdi, rtol=1e-5, atol=1e-5 * size)
    alone = [
        scores(train, query, curvature="source", etas=[float(j == k) for j in range(COUNT)], progress=False).sdi
        for k in range(COUNT)
    ]
    torch.testing.assert_close(sum(alone), found.sdi, rtol=1e-5, atol=1e-5 * size)
    energy = torch.stack([one.abs().sum((0, 2)) for one in alone])
    torch.testing.assert_close(
        torch.from_numpy(checkpoint_energy(train, query, curvature="source")).float(), energy, rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("decompose", ["query", "train", "both"])
def test_influence_takes_a_fitted_one_and_conserves(train: Store, query: Store, decompose: Any) -> None:
    unrolled = Unrolled.fit(train, segments_of(PROGRESS))
    trains, asked = side(ROWS, 0, prefix="z"), side(QUERIES, 50, prefix="q")
    in_memory = Unrolled.fit(trains, segments_of(PROGRESS))
    found = influence(trains, asked, curvature=in_memory, decompose=decompose).sdi
    whole = dense(train, query).sum(2)
    torch.testing.assert_close(found.flatten(2).sum(2), whole, rtol=1e-6, atol=1e-6 * float(whole.abs().max()))
    if decompose == "query":
        torch.testing.assert_close(found, influence(trains, in_memory.transform(asked[-1])).sdi, rtol=0, atol=0)
    with pytest.raises(ValueError, match="etas: SOURCE weights checkpoints"):
        influence(trains, asked, etas=0.1, curvature=in_memory)
    with pytest.raises(FeatureMismatchError, match="fitted to 4 checkpoints, and these are features of 3"):
        influence(trains[1:], asked[1:], curvature=unrolled)


def test_rows_followed_to_the_end_are_the_transpose(train: Store, query: Store) -> None:
    unrolled = Unrolled.fit(train, segments_of(PROGRESS))
    rows = [train.features(k, [4]).summed().values.double() for k in range(COUNT)]
    there = unrolled.gathered(rows)
    want = dense(train, query)[4]
    got = torch.einsum("d,qtd->qt", there[0], query.features(COUNT - 1).values.double())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


def test_rows_of_any_dtype(tmp_path: Path) -> None:
    """Only the query is transformed: rows of 8 bits are scanned as ever, and fitted to as they are decoded."""
    made.store(tmp_path / "train", side(ROWS, 0, prefix="z"), etas=(0.1,) * COUNT, progress=PROGRESS, dtype="int8")
    made.store(tmp_path / "query", side(QUERIES, 50, prefix="q"), etas=(0.1,) * COUNT)
    train, query = Store.open(tmp_path / "train"), Store.open(tmp_path / "query")
    want = dense(train, query)
    found = scores(train, query, curvature="source", progress=False).sdi.double()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_it_is_kept(train: Store, tmp_path: Path) -> None:
    for kind in ("fisher", "block"):
        unrolled = Unrolled.fit(train, segments_of(PROGRESS), curvature=kind)  # type: ignore[arg-type]
        save_unrolled(unrolled, tmp_path / kind, of="rows")
        assert load_unrolled(tmp_path / kind, of="rows").digest == unrolled.digest
    with pytest.raises(StoreError, match="fitted to other rows"):
        load_unrolled(tmp_path / "block", of="others")
    with pytest.raises(StoreError, match="its format is 'sdi-source-1'"):
        load(tmp_path / "block")


def refused(match: str, error: type[Exception] = ValueError) -> Any:
    return pytest.raises(error, match=match)


def test_what_lacks_it_is_refused_in_one_line(train: Store, query: Store, tmp_path: Path) -> None:
    sides = side(ROWS, 0, prefix="z")
    one = made.store(tmp_path / "one", sides[:1], progress=(Progress(10, 0.1, first_rate=0.1),))
    with refused("from checkpoint to checkpoint, and there is 1; featurize at several"):
        top_k(one, [query.features(0)], curvature="source", progress=False)
    older = made.store(tmp_path / "older", sides, etas=(0.1,) * COUNT)
    with refused("'source' needs training's length, which is not known at checkpoint 'c0'.*or give 'fisher'") as caught:
        top_k(older, query, curvature="source", progress=False)
    assert "\n" not in str(caught.value)
    backwards = made.store(tmp_path / "backwards", sides, etas=(0.1,) * COUNT, progress=PROGRESS[::-1])
    with refused("'source' needs training's length: checkpoints: after 60, 35, 20, 10 updates, which do not grow"):
        top_k(backwards, query, curvature="source", progress=False)
    metrics = [f"m{k}" for k in range(COUNT)]
    made.store(tmp_path / "metrics", side(ROWS, 0, prefix="z", metrics=metrics), etas=(0.1,) * COUNT, progress=PROGRESS)
    asked = side(QUERIES, 50, prefix="q", metrics=metrics)
    with refused("under different metrics, between which sketches cannot be carried", FeatureMismatchError):
        top_k(Store.open(tmp_path / "metrics"), asked, curvature="source", progress=False)
    folded = fold_store(tmp_path / "older", tmp_path / "folded")
    with refused("folded into one; use the store that was folded"):
        scores(folded, folded, curvature="source", progress=False)
    with refused("the learning rate is 0 from update 10 to 20"):
        segments_of([Progress(10, 0.0, first_rate=0.1), Progress(20, 0.0)])


def test_forms_that_cannot_take_it_refuse(train: Store, query: Store) -> None:
    trains, asked = side(ROWS, 0, prefix="z"), side(QUERIES, 50, prefix="q")
    unrolled = Unrolled.fit(trains, segments_of(PROGRESS))
    with refused("'source' needs to know how training went, and features in memory do not say"):
        influence(trains, asked, curvature="source")
    for curvature in ("source", unrolled):
        with refused("damping: SOURCE has none"):
            influence(trains, asked, curvature=curvature, damping=0.1)  # type: ignore[arg-type]
        with refused("self-influence by SOURCE is not offered"):
            self_influence(trains, curvature=curvature)  # type: ignore[arg-type]
        with refused("normalize: "):
            influence(trains, asked, curvature=curvature, normalize="train")  # type: ignore[arg-type]
    with refused("leverage needs a matrix"):
        outliers(train, by="leverage", curvature="source")
    with refused("exact scores are corrected for curvature='fisher' only"):
        require_correctable(ask(train, query, curvature="source"))
    with refused("etas: SOURCE weights checkpoints by their segments' learning rates"):
        top_k(train, query, etas=0.5, curvature="source", progress=False)
    with refused("transformed already", FeatureMismatchError):
        top_k(trains, unrolled.transform(asked[-1]), curvature=unrolled, progress=False)
    capture = attach(nn.Sequential(nn.Linear(2, 2)), body="0", sketch_size=4)
    with refused("SOURCE is of all checkpoints together"):
        influence_over_checkpoints(capture, ["a.pt", "b.pt"], [], [], lambda m, b: b, curvature="source")
