"""Folded checkpoints: unbiased, reproducible, and not to be mixed up with what they were folded from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import stores
import torch
from accuracy import inner_products
from stepinfluence import FeatureMismatchError, StoreError, influence
from stepinfluence.store import fold, fold_store

pytestmark = pytest.mark.numeric

MADE = stores.manifest(n_rows=8, shard_rows=8, checkpoints=3)
ETAS = [0.3, 0.0, 0.2]


def sides(per_step: bool = False) -> list[list[stores.Features]]:
    made = replace(MADE, per_step=per_step)
    whole = [stores.features(made, k, 0) for k in range(3)]
    train = [replace(f, values=f.values[:4], losses=f.losses[:4], steps=f.steps[:4], ids=f.ids[:4],
                     lengths=None if f.lengths is None else f.lengths[:4]) for f in whole]  # fmt: skip
    query = [replace(f, values=f.values[4:], losses=f.losses[4:], steps=f.steps[4:], ids=f.ids[4:],
                     lengths=None if f.lengths is None else f.lengths[4:]) for f in whole]  # fmt: skip
    return [train, query]


def test_unbiased_over_seeds() -> None:
    train, query = sides()[0], sides(per_step=True)[1]
    wanted = influence(train, query, etas=ETAS).sdi
    trials = torch.stack([influence(fold(train, ETAS, seed=k), fold(query, ETAS, seed=k)).sdi for k in range(600)])
    error = trials.mean(0) - wanted
    assert (error.abs() <= 5 * trials.std(0) / 600**0.5 + 1e-4).all(), "products across checkpoints do not average out"
    assert trials.std(0).max() > 1e-2


def test_one_checkpoint_folds_without_error() -> None:
    train, query = sides()
    found = fold(train[:1], [0.25]).values @ fold(query[:1], [0.25]).values.T
    inner_products("nd,qd->nq", train[0].values, query[0].values, scale=0.25).check(found)


def test_spaces_tell_what_was_folded() -> None:
    train, query = sides()
    ours = fold(train, ETAS).space
    ours.require_equal(fold(query, ETAS).space)
    for other in (fold(query, ETAS, seed=1), fold(query, [0.3, 0.1, 0.2]), fold(query[:2], ETAS[:2]), query[0]):
        with pytest.raises(FeatureMismatchError, match="other sketches"):
            ours.require_equal(other.space)
    weights = [replace(f, space=replace(f.space, weights="x")) for f in query]
    with pytest.raises(FeatureMismatchError, match="other weights"):
        ours.require_equal(fold(weights, ETAS).space)


def test_what_cannot_be_folded() -> None:
    train, query = sides()
    with pytest.raises(ValueError, match=r"etas: got -0\.1"):
        fold(train, [0.1, -0.1, 0.1])
    with pytest.raises(ValueError, match="etas: got 2 for features of 3 checkpoints"):
        fold(train, [0.1, 0.1])
    with pytest.raises(FeatureMismatchError, match="different examples"):
        fold([train[0], query[0]], [0.1, 0.1])


@pytest.mark.parametrize("per_step", [True, False])
def test_folded_store(tmp_path: Path, per_step: bool) -> None:
    store = stores.written(tmp_path / "s", stores.manifest(per_step=per_step))
    folded = fold_store(store.path, tmp_path / "f", seed=3)
    assert [c.eta for c in folded.checkpoints] == [1.0]
    assert folded.failed == store.failed
    assert list(folded.ids) == list(store.ids)
    assert folded.manifest.fold is not None
    assert [part["eta"] for part in folded.manifest.fold["checkpoints"]] == [0.1, 0.2]
    wanted = fold([store.features(k) for k in range(2)], [0.1, 0.2], seed=3)
    assert torch.equal(folded.features().values, wanted.values)
    before = stores.content(folded.path)
    assert stores.content(fold_store(store.path, tmp_path / "f", seed=3).path) == before
    with pytest.raises(StoreError, match="begun with other settings"):
        fold_store(store.path, tmp_path / "f", seed=4)
