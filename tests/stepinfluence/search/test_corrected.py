"""Searches with a curvature: the queries are transformed, the stored rows stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
import torch
from stepinfluence import FeatureMismatchError, Features, Fisher, StoreError, influence
from stepinfluence.attribution.curvature import BlockFisher, factors
from stepinfluence.search import checkpoint_energy, outliers, scores, top_k
from stepinfluence.store import Store, fold_store, reader

pytestmark = pytest.mark.numeric

ETAS = (0.3, 0.7)
FAILED = (2, 30)


def sides(tmp_path: Path, dtype: str, train_steps: int | None) -> tuple[Store, Store]:
    shape = (45, made.WIDTH) if train_steps is None else (45, train_steps, made.WIDTH)
    given = [
        [made.features(made.normal(*s, seed=k), prefix=p, weights=f"w{k}") for k in range(2)]
        for p, s in (("z", shape), ("q", (4, 3, made.WIDTH)))
    ]
    train = made.store(tmp_path / "t", given[0], etas=ETAS, dtype=dtype, failed=FAILED)
    return train, made.store(tmp_path / "q", given[1], etas=ETAS, dtype=dtype)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("train_steps", [None, 3])
@pytest.mark.parametrize("kind", [Fisher, BlockFisher])
def test_equals_influence_of_the_decoded_rows(
    tmp_path: Path, dtype: str, train_steps: int | None, kind: type[Fisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BLOCK_BYTES", 4 * made.WIDTH * 5)  # five rows at a time
    train, query = sides(tmp_path, dtype, train_steps)
    decoded: list[list[Features]] = [[s.features(k) for k in range(2)] for s in (train, query)]
    expected = influence(*decoded, etas=ETAS, curvature=kind.kind, damping=1e-2)
    good = [row for row in range(45) if row not in FAILED]
    size = float(expected.sdi.abs().max())
    found = scores(train, query, curvature=kind.kind, damping=1e-2)
    torch.testing.assert_close(found.sdi[good], expected.sdi[good], rtol=1e-5, atol=1e-5 * size)
    leading = top_k(train, query, 5, curvature=kind.kind, damping=1e-2)
    want = expected.tracin[good].topk(5, dim=0).values.T
    torch.testing.assert_close(leading.scores, want, rtol=1e-5, atol=1e-5 * size)
    torch.testing.assert_close(leading.sdi.sum(2), leading.scores, rtol=1e-5, atol=1e-6 * size)
    fitted = [kind.fit(train, checkpoint=k, damping=1e-2) for k in range(2)]
    again = top_k(train, query, 5, curvature=fitted)
    assert torch.equal(again.scores, leading.scores)
    energies = [
        influence(decoded[0][k].select(good), decoded[1][k], etas=ETAS[k], curvature=fitted[k]).energies
        for k in range(2)
    ]
    found_energy = checkpoint_energy(train, query, curvature=fitted)
    np.testing.assert_allclose(found_energy, torch.cat(energies).numpy(), rtol=1e-4)  # type: ignore[arg-type]
    # Parts by parameter add up to the whole.
    parts = [scores(train, query, parameters=name, curvature=fitted).sdi[good] for name in ("core.*", "norm.gain")]
    torch.testing.assert_close(parts[0] + parts[1], found.sdi[good], rtol=1e-5, atol=1e-5 * size)


def test_a_store_is_fitted_in_streamed_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = sides(tmp_path, "fp32", None)
    whole = Fisher.fit(train, damping=1e-2)
    good = [row for row in range(45) if row not in FAILED]
    assert whole.rows == len(good)
    asked = made.normal(3, made.WIDTH, seed=9)
    of_features = Fisher.fit(train.features(0).select(good), damping=1e-2)
    torch.testing.assert_close(whole.solve(asked), of_features.solve(asked))
    monkeypatch.setattr(factors, "EXACT_SIDE", 4)
    monkeypatch.setattr(Store, "features", None)  # blocks only
    torch.testing.assert_close(Fisher.fit(train, damping=1e-2, rank=made.WIDTH).solve(asked), whole.solve(asked))


def test_outliers_of_a_store_have_their_texts(tmp_path: Path) -> None:
    train, _ = sides(tmp_path, "fp32", 3)
    features = [train.features(k) for k in range(2)]
    found = outliers(train, 4)
    want = outliers(features, 4, etas=ETAS)
    assert [(one.row, one.id, one.text) for one in found] == [(one.row, train.row(one.row).id, None) for one in want]
    for one, other in zip(found, want, strict=True):
        np.testing.assert_array_equal(one.steps, other.steps)
    assert not {one.row for one in outliers(train, 45)} & set(FAILED)


@pytest.mark.parametrize("by", ["self-influence", "leverage"])
def test_outliers_of_checkpoints_in_another_order_are_matched_by_ids(tmp_path: Path, by: Any) -> None:
    train, _ = sides(tmp_path, "fp32", 3)
    good = [row for row in range(len(train)) if row not in FAILED]
    first, second = (train.features(k).select(good) for k in range(2))
    backwards = second.select(list(range(len(good)))[::-1])
    damping = 1e-2 if by == "leverage" else None
    want, found = (outliers([first, s], 4, by=by, etas=ETAS, damping=damping) for s in (second, backwards))
    assert [one.id for one in found] == [one.id for one in want]
    for one, other in zip(found, want, strict=True):
        np.testing.assert_allclose(
            one.steps, other.steps, rtol=1e-9
        )  # float64; only the order of the fit's rows differs
        assert one.loss == other.loss


def test_wrong_use(tmp_path: Path) -> None:
    train, query = sides(tmp_path, "fp32", None)
    fitted = [Fisher.fit(train, checkpoint=k, damping=1e-2) for k in range(2)]
    with pytest.raises(FeatureMismatchError, match="other weights"):
        top_k(train, query, curvature=fitted[::-1])
    with pytest.raises(ValueError, match="curvature: got 1 for 2 checkpoints"):
        top_k(train, query, curvature=fitted[0])
    transformed = [one.transform(query.features(k)) for k, one in enumerate(fitted)]
    assert torch.equal(top_k(train, transformed, 3, etas=ETAS).rows, top_k(train, query, 3, curvature=fitted).rows)
    with pytest.raises(FeatureMismatchError, match="transformed already"):
        top_k(train, transformed, curvature=fitted)
    with pytest.raises(StoreError, match="transformed by a curvature"):
        made.store(tmp_path / "x", transformed[:1])
    with pytest.raises(FeatureMismatchError, match="folded checkpoints"):
        Fisher.fit(fold_store(tmp_path / "t", tmp_path / "folded"))
