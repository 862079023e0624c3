"""Two-stage search: candidates from sketches or an index, then exact influence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
import torch
import zoo
from accuracy import inner_products, multilinear
from hypothesis import given, settings
from hypothesis import strategies as st
from looped_examples import N, Q, featurized, search, setting
from stepinfluence import FeatureMismatchError, StoreError, attach, influence, writers
from stepinfluence.files import read_sealed, sealed
from stepinfluence.search import Index, Recompute, TwoStage, ask, top_k, two_stage
from stepinfluence.store import fold_store
from torch import Tensor

faiss = pytest.importorskip("faiss")


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("harmful", [False, True])
@pytest.mark.parametrize("options", [{}, {"query_bytes": 1, "batch_size": 3}, {"steps": slice(0, 2)}])
def test_with_all_rows_as_candidates_it_is_exact(per_step: bool, harmful: bool, options: dict[str, Any]) -> None:
    capture, train, query, full = setting()
    found = search(capture, train, query, 5, candidates=N, per_step=per_step, harmful=harmful, **options).top
    part = full[..., options.get("steps", slice(None))]
    ranked = part if per_step else part.sum(2, keepdim=True)
    expected = torch.tensor(made.by_sorting(ranked.flatten(1), 5, harmful=harmful)).view(Q, ranked.shape[2], 5)
    expected = expected if per_step else expected[:, 0]
    assert torch.equal(found.rows, expected)
    for place in np.ndindex(*expected.shape):
        inner_products("t->t", full[expected[place], place[0]]).check(found.sdi[place])
    assert found.train_ids.tolist() == expected.tolist()


def test_the_short_list_is_recomputed_exactly() -> None:
    """What the sketches rank is kept only as a choice of candidates."""
    capture, train, query, full = setting()
    found = search(capture, train, query, 4, candidates=10)
    first = top_k(featurized(capture, train, per_step=False), featurized(capture, query, per_step=True), 10)
    assert found.candidates.tolist() == [sorted(rows) for rows in first.rows.tolist()]
    for q in range(Q):
        best = sorted(found.candidates[q].tolist(), key=lambda r, q=q: -float(full[r, q].sum()))[:4]
        assert found.top.rows[q].tolist() == best
        inner_products("kt->k", full[best, q]).check(found.top.scores[q])
        sketched = dict(zip(first.rows[q].tolist(), first.scores[q].tolist(), strict=True))
        assert found.estimates[q].tolist() == pytest.approx([sketched[row] for row in best], rel=1e-5)
    assert set(found.seconds) == {"candidates", "exact"}
    sketched = top_k(featurized(capture, train, per_step=False), featurized(capture, query, per_step=True), 4)
    assert found.top.rows.tolist() != sketched.rows.tolist(), "sketches of this size are wrong about the order"


def test_queries_summed_over_steps_get_their_trajectories() -> None:
    """What the features do not tell, the model does."""
    capture, train, query, full = setting()
    summed, found = (search(capture, train, query, 4, candidates=N, query_steps=each) for each in (False, True))
    assert torch.equal(summed.top.rows, found.top.rows)
    assert summed.top.sdi.shape == found.top.sdi.shape == (Q, 4, full.shape[2])
    assert torch.equal(summed.top.sdi, found.top.sdi)


@pytest.mark.parametrize("per_step", [False, True])
def test_estimates_are_what_the_features_say(per_step: bool) -> None:
    capture, train, query, _ = setting()
    found = search(capture, train, query, 4, candidates=10, per_step=per_step, steps=slice(0, 2))
    sdi = influence(featurized(capture, train, per_step=False), featurized(capture, query, per_step=True)).sdi
    for place in np.ndindex(*found.top.rows.shape):
        path = sdi[int(found.top.rows[place]), place[0], :2]
        wanted = path[place[1]] if per_step else path.sum()
        assert float(found.estimates[place]) == pytest.approx(float(wanted), rel=1e-5)


def test_checkpoints(tmp_path: Path) -> None:
    capture, train, query, _ = setting()
    own = {k: v.clone() for k, v in capture.model.state_dict().items()}
    paths, parts, features = [], [], []
    etas = [0.1, 0.4]
    for seed in range(2):
        other, _, _, full = setting(seed + 1)
        paths.append(tmp_path / f"{seed}.pt")
        torch.save(other.model.state_dict(), paths[-1])
        parts.append(full)
        features.append([featurized(other, data, per_step=side == 1) for side, data in enumerate((train, query))])
    expected = sum(eta * part for eta, part in zip(etas, parts, strict=True))
    sides = [[f[side] for f in features] for side in (0, 1)]
    exact = Recompute(capture, zoo.squared_error, train, query, checkpoints=paths)
    asked = ask(*sides, etas=etas)
    found = two_stage(asked, 5, exact=exact, candidates=N)
    assert found.top.rows.tolist() == made.by_sorting(expected.sum(2), 5)
    rows = found.top.rows[0]
    added = multilinear(lambda *p: etas[0] * p[0] + etas[1] * p[1], *(part[rows, 0] for part in parts), rows=False)
    added.check(found.top.sdi[0])
    stores = [made.store(tmp_path / f"{k}", side, etas=etas) for k, side in enumerate(sides)]
    folded = [fold_store(s.path, tmp_path / f"folded{k}") for k, s in enumerate(stores)]
    again = two_stage(ask(*folded), 5, exact=exact, candidates=N)
    assert again.top.rows.tolist() == found.top.rows.tolist()
    for question in (asked, ask(*folded)):
        with pytest.raises(
            FeatureMismatchError, match=r"checkpoints: .*1\.pt does not hold the weights of checkpoint 0"
        ):
            two_stage(question, 5, exact=replace(exact, checkpoints=paths[::-1]), candidates=N)
    with pytest.raises(ValueError, match="checkpoints: got None"):
        two_stage(asked, 5, exact=replace(exact, checkpoints=None), candidates=N)
    assert all(torch.equal(v, own[k]) for k, v in capture.model.state_dict().items())


def test_what_is_refused() -> None:
    capture, train, query, _ = setting()
    for message, options in (
        ("candidates: got 3 for k = 4", {"candidates": 3}),
        ("batch_size: got 0", {"batch_size": 0}),
        ("metric: needs checkpoints", {"metric": "adam"}),
    ):
        with pytest.raises(ValueError, match=message):
            search(capture, train, query, 4, **options)
    with pytest.raises(ValueError, match="train: got 3 examples for 40 rows"):
        search(capture, query, query, 2, features=featurized(capture, train, per_step=False), candidates=2)
    features = featurized(capture, train, per_step=False)
    with torch.no_grad():
        capture.model.core[0].weight += 1  # type: ignore[index,operator,union-attr]
    with pytest.raises(FeatureMismatchError):
        search(capture, train, query, 2, features=features, candidates=2)


@pytest.mark.parametrize(
    ("dtype", "folded"), [("fp32", False), ("fp16", False), ("bf16", False), ("int8", False), ("fp32", True)]
)
def test_examples_that_have_changed_are_refused(tmp_path: Path, dtype: str, folded: bool) -> None:
    """Of each side, at every checkpoint: those that are recomputed are those that the rows were computed from."""
    capture, train, query, _ = setting(sketch_size=64)
    paths, features = [], []
    for seed in range(2):
        other = setting(seed + 1, sketch_size=64)[0]
        paths.append(tmp_path / f"{seed}.pt")
        torch.save(other.model.state_dict(), paths[-1])
        features.append([featurized(other, data, per_step=side == 1) for side, data in enumerate((train, query))])
    sides = [
        made.store(tmp_path / f"{side}", [f[side] for f in features], etas=(0.1, 0.4), dtype=dtype) for side in (0, 1)
    ]
    if folded:
        sides = [fold_store(side.path, tmp_path / f"folded{k}") for k, side in enumerate(sides)]
    exact = Recompute(capture, zoo.squared_error, train, query, checkpoints=paths)

    # The queries as the command line reads them, in memory.
    asked = ask(sides[0], [sides[1].features(k) for k in range(len(sides[1].checkpoints))])

    def found() -> TwoStage:
        return two_stage(asked, 2, exact=exact, candidates=N, progress=False)

    first = found()
    for name, data, row in (("train", train, 7), ("query", query, 1)):
        for field in ("x", "y"):
            before = data.batch[field].clone()
            data.batch[field][row] *= 1 + 1e-12  # rounding
            if field == "x":
                assert torch.equal(found().top.rows, first.top.rows)
            data.batch[field][row] *= 1.1
            with pytest.raises(FeatureMismatchError, match=rf"^{name}: row {row} \(id .*\) is not the example that"):
                found()
            data.batch[field].copy_(before)
    swapped = {field: values.clone() for field, values in train.batch.items()}
    for values in train.batch.values():
        values[[3, 4]] = values[[4, 3]]
    with pytest.raises(FeatureMismatchError, match="train: row 3 "):
        found()
    train.batch.update(swapped)
    capture.training = True
    found()  # dropout would differ: nothing can be compared


def test_a_gradient_that_changed_under_an_equal_loss_is_refused() -> None:
    capture, train, query, _ = setting(sketch_size=64)
    rows = featurized(capture, train, per_step=False)

    def other(model: Any, batch: Any) -> Tensor:
        losses = zoo.squared_error(model, batch)
        return 2 * losses - losses.detach()

    exact = Recompute(capture, other, train, query)
    asked = ask(rows, featurized(capture, query, per_step=True))
    with pytest.raises(FeatureMismatchError, match=r"train: row 0 .* its gradient at checkpoint 0 is another one"):
        two_stage(asked, 2, exact=exact, candidates=N)
    # With sketches of another size, losses alone can be compared.
    small = Recompute(attach(capture.model, body="core", sketch_size=8), other, train, query)
    two_stage(asked, 2, exact=small, candidates=N)


# --------------------------------------------------------------------------------------------------------------------
# The index


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("per_step", [False, True])
def test_a_flat_index_finds_what_a_scan_finds(tmp_path: Path, dtype: str, per_step: bool) -> None:
    shape = (60, made.WIDTH) if dtype != "bf16" else (60, 2, made.WIDTH)
    sides = [
        [made.features(made.normal(*s, seed=k), prefix=p, weights=f"w{k}") for k in range(2)]
        for p, s in (("z", shape), ("q", (4, 3, made.WIDTH)))
    ]
    etas = (0.5, 2.0)
    train = made.store(tmp_path / "t", sides[0], etas=etas, dtype=dtype, failed=[0, 7, 8, 9])
    query = made.store(tmp_path / "q", sides[1], etas=etas)
    Index.build(train, tmp_path / "index", factory="Flat")
    index = Index.open(tmp_path / "index", train)
    for harmful in (False, True):
        for options in ({}, {"parameters": "core.*"}):
            question = ask(train, query, per_step=per_step, harmful=harmful, **options)
            found = index.candidates(question, 6)
            scanned = top_k(train, query, 6, per_step=per_step, harmful=harmful, **options)
            assert found.reshape(scanned.rows.shape).tolist() == scanned.rows.tolist()


def test_inverted_lists_find_clusters(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(8, made.WIDTH, generator=generator) * 4
    values = centres.repeat_interleave(100, 0) + 0.3 * torch.randn(800, made.WIDTH, generator=generator)
    train, query = made.features(values), made.features(centres[:3].unsqueeze(1))
    built = Index.build(train, tmp_path / "i", factory="IVF8,SQ8", probes=2)
    exact = top_k(train, query, 10).rows
    for index in (built, Index.open(tmp_path / "i", train, probes=2)):
        found = index.candidates(ask(train, query), 10)
        hits = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), exact.tolist(), strict=True))
        assert hits >= 27


def test_two_stage_with_an_index() -> None:
    capture, train, query, full = setting(sketch_size=256)
    features = featurized(capture, train, per_step=False)
    index = Index.build(features, factory="Flat")
    found = search(capture, train, query, 3, features=features, candidates=N, index=index)
    assert found.top.rows.tolist() == made.by_sorting(full.sum(2), 3)
    other = Index.build(made.features(made.normal(N, made.WIDTH)), factory="Flat")
    with pytest.raises(FeatureMismatchError, match="index: of other rows"):
        search(capture, train, query, 3, features=features, candidates=N, index=other)


def test_a_stale_or_damaged_index_is_refused(tmp_path: Path) -> None:
    values = made.normal(20, made.WIDTH)
    train = made.store(tmp_path / "t", [made.features(values)])
    Index.build(train, tmp_path / "i", factory="Flat")
    values[3, 3] += 1e-3
    changed = made.store(tmp_path / "t2", [made.features(values)])
    with pytest.raises(StoreError, match="built from other rows"):
        Index.open(tmp_path / "i", changed)
    with pytest.raises(StoreError, match="no index here"):
        Index.open(tmp_path / "none", train)
    with pytest.raises(StoreError, match="holds other files"):
        Index.build(train, tmp_path / "t", factory="Flat")
    with pytest.raises(ValueError, match="factory: got 'Nonsense'"):
        Index.build(train, factory="Nonsense")
    (tmp_path / "i" / "rows.faiss").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="damaged: missing, or its bytes do not fit"):
        Index.open(tmp_path / "i", train)
    seal = read_sealed(tmp_path / "i" / "index.json", 1 << 20)
    for old in ({**seal, "format": "sdi-index-1"}, {k: v for k, v in seal.items() if k != "file"}):
        (tmp_path / "i" / "index.json").write_bytes(sealed(old))
        with pytest.raises(StoreError, match="build it again"):
            Index.open(tmp_path / "i", train)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_damage_to_an_index_is_found(kept_index: tuple[Path, Any], data: st.DataObject) -> None:
    """Some changes to a faiss file are answers of another index, silently: none of them is opened."""
    path, train = kept_index
    file = path / data.draw(st.sampled_from(["rows.faiss", "index.json"]))
    raw = file.read_bytes()
    place = data.draw(st.integers(0, len(raw) - 1))
    changed = bytearray(raw)
    changed[place] ^= data.draw(st.integers(1, 255))
    changed = changed[:place] if data.draw(st.booleans()) else changed
    try:
        file.write_bytes(changed)
        with pytest.raises(StoreError):
            Index.open(path, train)
    finally:
        file.write_bytes(raw)


@pytest.fixture(scope="module")
def kept_index(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("index")
    train = made.store(folder / "t", [made.features(made.normal(200, made.WIDTH))])
    Index.build(train, folder / "i", factory="IVF4,SQ8")
    Index.open(folder / "i", train)
    return folder / "i", train


def test_rows_that_are_not_there_are_no_candidates(kept_index: tuple[Path, Any]) -> None:
    """An index that fits its checksum can still have been made by somebody else."""
    few = made.features(made.normal(20, made.WIDTH))
    index = Index.open(*kept_index, probes=4)
    index.source = Index.build(few, factory="Flat").source
    with pytest.raises(StoreError, match=r"index: gives row \d+ of 20"):
        index.candidates(ask(few, made.features(made.normal(2, 3, made.WIDTH))), 200)


def test_a_killed_build_does_not_stand_in_the_way(tmp_path: Path) -> None:
    train = made.store(tmp_path / "t", [made.features(made.normal(20, made.WIDTH))])
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / f".aside-{writers.host()}-{2**31 - 1}-00000000-rows.faiss").write_bytes(b"half")
    Index.build(train, tmp_path / "i", factory="Flat")
    assert sorted(p.name for p in (tmp_path / "i").iterdir()) == ["index.json", "rows.faiss"]
