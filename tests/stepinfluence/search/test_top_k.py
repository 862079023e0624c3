"""``top_k`` against a full sort of all scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
import torch
from accuracy import inner_products
from stepinfluence import FeatureMismatchError, StoreError, influence
from stepinfluence.attribution.space import Block
from stepinfluence.search import scan, sources, top_k
from stepinfluence.store import Manifest, Store, StoredCheckpoint, StoreWriter

pytestmark = pytest.mark.numeric


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that winners are spread over many."""
    monkeypatch.setattr(scan, "BLOCK_BYTES", 4 * 12 * 5)
    monkeypatch.setattr("stepinfluence.search.ranking.RANKED_TOGETHER", 40)
    monkeypatch.setattr(scan, "DECODED_ROWS_BYTES", 4 * made.WIDTH * 3)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("harmful", [False, True])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("train_steps", [None, 2])
@pytest.mark.parametrize("k", [1, 4, 1000])
def test_equals_a_full_sort_with_ties(harmful: bool, per_step: bool, train_steps: int | None, k: int) -> None:
    shape = (61, made.WIDTH) if train_steps is None else (61, train_steps, made.WIDTH)
    train = made.features(made.small_integers(*shape, bound=1))
    query = made.features(made.small_integers(4, 3, made.WIDTH, seed=1, bound=1), prefix="q")
    full = influence(train, query).sdi
    found = top_k(train, query, k, per_step=per_step, harmful=harmful)
    ranked = full if per_step else full.sum(2, keepdim=True)
    flat = ranked.flatten(1)
    assert len(flat.unique()) < 61, "there must be ties for this test to mean anything"
    expected = torch.tensor(made.by_sorting(flat, min(k, 61), harmful=harmful)).view(4, ranked.shape[2], -1)
    expected = expected if per_step else expected[:, 0]
    assert torch.equal(found.rows, expected)
    for place in np.ndindex(*expected.shape):
        row, q = int(expected[place]), place[0]
        assert torch.equal(found.sdi[place], full[row, q])
        assert found.scores[place] == (full[row, q, place[1]] if per_step else full[row, q].sum())
        assert found.train_ids[place] == f"z{row}"
    assert found.query_ids == ("q0", "q1", "q2", "q3")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("train_steps", [None, 3])
def test_a_store_gives_what_its_decoded_features_give(tmp_path: Path, dtype: str, train_steps: int | None) -> None:
    shape = (45, made.WIDTH) if train_steps is None else (45, train_steps, made.WIDTH)
    train = made.store(tmp_path / "train", [made.features(made.normal(*shape))], dtype=dtype)
    query = made.store(tmp_path / "query", [made.features(made.normal(5, 3, made.WIDTH, seed=1), prefix="q")])
    found = top_k(train, query, 7)
    decoded = top_k(train.features(), query.features(), 7)
    assert torch.equal(found.rows, decoded.rows)
    left = train.features().values[found.rows]  # (queries, 7, [steps,] columns)
    left = left if train_steps is None else left.sum(2)
    total = inner_products("qkd,qtd->qk", left, query.features().values)
    for scores in (found.scores, decoded.scores, found.sdi.sum(-1)):
        total.check(scores)
    inner_products("qkd,qtd->qkt", left, query.features().values).check(found.sdi)
    assert found.train_ids.tolist() == decoded.train_ids.tolist()


def test_a_store_stays_mapped_while_it_is_open_if_it_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = made.store(tmp_path / "t", [made.features(made.small_integers(20, made.WIDTH))], dtype="int8")
    query = made.features(made.small_integers(2, 2, made.WIDTH, seed=1))
    maps: list[int] = []
    original = Store.raw_blocks
    monkeypatch.setattr(Store, "raw_blocks", lambda self, c=0: maps.append(c) or original(self, c))
    first = top_k(train, query, 4).rows
    assert torch.equal(top_k(train, query, 4).rows, first)
    assert maps == [0]
    monkeypatch.setattr(sources, "KEPT_MAP_BYTES", 0)
    again = Store.open(train.path)
    for _ in range(2):
        assert torch.equal(top_k(again, query, 4).rows, first)
    assert maps == [0, 0, 0]


@pytest.mark.usefixtures("small_blocks")
def test_checkpoints_are_weighted_by_eta(tmp_path: Path) -> None:
    sides = []
    for prefix, n in (("z", 30), ("q", 3)):
        shape = (n, made.WIDTH) if prefix == "z" else (n, 2, made.WIDTH)
        sides.append(
            [made.features(made.small_integers(*shape, seed=k + n), prefix=prefix, weights=f"w{k}") for k in range(3)]
        )
    etas = (0.5, 2.0, -1.0)
    full = influence(sides[0], sides[1], etas=etas).sdi
    expected = made.by_sorting(full.sum(2), 6)
    stores = [made.store(tmp_path / str(k), side, etas=etas) for k, side in enumerate(sides)]
    for found in (top_k(*stores, 6), top_k(*sides, 6, etas=etas), top_k(stores[0], sides[1], 6)):
        assert found.rows.tolist() == expected
        assert found.etas == etas
        for q in range(3):
            assert torch.equal(found.sdi[q], full[found.rows[q], q])
    assert top_k(*stores, 6, etas=1.0).rows.tolist() == made.by_sorting(influence(*sides).sdi.sum(2), 6)


@pytest.mark.parametrize("pattern", ["core.*", "norm.gain", ["core.weight", "norm.*"], "core.bias"])
def test_restricted_to_parameters(pattern: Any) -> None:
    train = made.features(made.small_integers(40, made.WIDTH))
    query = made.features(made.small_integers(3, 2, made.WIDTH, seed=1))
    patterns = [pattern] if isinstance(pattern, str) else pattern
    kept = torch.zeros(made.WIDTH)
    for block in made.BLOCKS:
        if any(block.name == p or (p[-1] == "*" and block.name.startswith(p[:-1])) for p in patterns):
            kept[block.start : block.stop] = 1
    part = made.features(train.values * kept)
    full = influence(part, query).sdi
    found = top_k(train, query, 5, parameters=pattern)
    assert found.rows.tolist() == made.by_sorting(full.sum(2), 5)
    assert torch.equal(found.sdi[1], full[found.rows[1], 1])


@pytest.mark.parametrize(("steps", "chosen"), [(1, [1]), (-1, [3]), (slice(1, 3), [1, 2]), (range(0, 4, 2), [0, 2])])
def test_restricted_to_steps(steps: Any, chosen: list[int]) -> None:
    train = made.features(made.small_integers(40, made.WIDTH))
    query = made.features(made.small_integers(3, 4, made.WIDTH, seed=1))
    full = influence(train, query).sdi
    found = top_k(train, query, 5, steps=steps)
    assert found.ranked == tuple(chosen)
    assert found.rows.tolist() == made.by_sorting(full[..., chosen].sum(2), 5)
    assert torch.equal(found.sdi[0], full[found.rows[0], 0]), "trajectories show all steps"
    each = top_k(train, query, 5, steps=steps, per_step=True)
    assert each.rows.shape == (3, len(chosen), 5)
    for k, step in enumerate(chosen):
        assert each.rows[:, k].tolist() == made.by_sorting(full[..., step], 5)


def test_rows_that_failed_are_never_returned(tmp_path: Path) -> None:
    """Their stored features are zero, which would beat every negative score."""
    values = -made.normal(20, made.WIDTH).abs()
    failed = [0, 3, 8, 9, 10, 11, 12, 13, 14, 15, 19]
    train = made.store(tmp_path / "train", [made.features(values)], failed=failed)
    query = made.features(made.normal(2, 2, made.WIDTH, seed=1).abs())
    found = top_k(train, query, 50)
    assert found.rows.shape == (2, 20 - len(failed))
    assert not set(found.rows.flatten().tolist()) & set(failed)
    good = [r for r in range(20) if r not in failed]
    full = influence(made.features(values), query).tracin[good]
    assert found.rows.tolist() == [[good[r] for r in column] for column in made.by_sorting(full, 50)]


def test_scores_that_are_not_finite_are_never_returned() -> None:
    values = made.small_integers(12, made.WIDTH)
    values[2, 0] = torch.nan
    values[5, 1] = torch.inf
    query = made.features(made.small_integers(2, 2, made.WIDTH, seed=1) + 10)
    for harmful in (False, True):
        found = top_k(made.features(values), query, 12, harmful=harmful)
        assert found.rows[:, -2:].tolist() == [[-1, -1]] * 2
        assert found.scores[:, -2:].isnan().all()
        assert found.sdi[:, -2:].isnan().all()
        assert found.train_ids[:, -2:].tolist() == [[None, None]] * 2
        assert sorted(found.rows[0, :-2].tolist()) == [r for r in range(12) if r not in (2, 5)]


def test_overflow_is_refused_beside_a_query_that_is_not_finite() -> None:
    train = made.features(made.small_integers(9, made.WIDTH))
    values = made.small_integers(2, 2, made.WIDTH, seed=1) + 10
    assert top_k(train, made.features(values), 4, etas=1e30).scores.isfinite().all()
    values[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="scores: some are too large for float32"):
        top_k(train, made.features(values), 4, etas=1e38)


def test_queries_that_failed_have_no_winners(tmp_path: Path) -> None:
    train = made.features(made.small_integers(9, made.WIDTH))
    query = made.store(tmp_path / "q", [made.features(made.normal(3, 2, made.WIDTH))], failed=[1])
    found = top_k(train, query, 4)
    assert (found.rows[1] == -1).all()
    assert found.scores[1].isnan().all()
    assert (found.rows[[0, 2]] >= 0).all()


def test_nothing_to_search() -> None:
    query = made.features(made.normal(2, 2, made.WIDTH))
    found = top_k(made.features(made.normal(0, made.WIDTH)), query, 4)
    assert found.rows.shape == (2, 0)
    assert found.sdi.shape == (2, 0, 2)
    nobody = top_k(made.features(made.normal(5, made.WIDTH)), made.features(made.normal(0, 2, made.WIDTH)), 3)
    assert nobody.rows.shape == (0, 3)


def test_queries_summed_over_steps() -> None:
    train = made.features(made.small_integers(9, made.WIDTH))
    query = made.features(made.small_integers(2, made.WIDTH, seed=1))
    found = top_k(train, query, 4)
    assert found.sdi.shape == (2, 4, 1)
    assert torch.equal(found.sdi[..., 0], found.scores)


def test_float64_features_are_searched_in_float64() -> None:
    """Two rows whose scores differ by less than float32 can tell."""
    values = torch.zeros(2, made.WIDTH, dtype=torch.float64)
    values[0, 0], values[1, 0] = 1.0, 1.0 + 1e-12
    query = made.features(torch.ones(1, 1, made.WIDTH, dtype=torch.float64))
    assert top_k(made.features(values), query, 1).rows.tolist() == [[1]]


def shared_columns() -> list[Block]:
    return [Block(b.name, b.shape, 0, made.WIDTH) for b in made.BLOCKS]


def test_what_is_refused(tmp_path: Path) -> None:
    train = made.features(made.normal(5, made.WIDTH))
    query = made.features(made.normal(2, 3, made.WIDTH))
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "k: got 0", {"k": 0}),
        (ValueError, "k: got True", {"k": True}),
        (ValueError, "steps: got 3", {"steps": 3}),
        (ValueError, "steps: got slice", {"steps": slice(2, 2)}),
        (ValueError, "parameters: 'head' fits none of core.weight", {"parameters": "head"}),
        (ValueError, "parameters: got an empty list", {"parameters": []}),
        (ValueError, "etas: got 2 for 1", {"etas": [1.0, 2.0]}),
        (ValueError, "etas: .*finite", {"etas": float("nan")}),
        (TypeError, "query: got str", {"query": "store"}),
        (FeatureMismatchError, "other weights", {"query": made.features(made.normal(2, made.WIDTH), weights="other")}),
        (FeatureMismatchError, "2 checkpoints, train of 1", {"query": [query, query]}),
        (ValueError, "per_step: .*summed over steps", {"query": query.summed(), "per_step": True}),
        (ValueError, "steps: .*summed over steps", {"query": query.summed(), "steps": 1}),
    ]
    for error, message, arguments in wrong:
        with pytest.raises(error, match=message) as caught:
            top_k(**{"train": train, "query": query, **arguments})
        assert "\n" not in str(caught.value)
    both = [made.features(f.values, blocks=shared_columns()) for f in (train, query)]
    assert top_k(*both, 2).rows.shape == (2, 2)
    with pytest.raises(ValueError, match="in the sum layout"):
        top_k(*both, 2, parameters="core.*")
    manifest = Manifest(checkpoints=(StoredCheckpoint("c", 1.0, train.space),), n_rows=5)
    StoreWriter.create(tmp_path / "half", manifest)
    with pytest.raises(StoreError, match=r"train: .*incomplete"):
        top_k(Store.open(tmp_path / "half"), query)


def test_stores_of_other_etas_or_folds_are_refused(tmp_path: Path) -> None:
    train = made.store(tmp_path / "a", [made.features(made.normal(5, made.WIDTH))])
    for name, other in (("eta", {"etas": (2.0,)}), ("folded", {"fold": {"seed": 1}})):
        query = made.store(tmp_path / name, [made.features(made.normal(2, made.WIDTH))], **other)
        with pytest.raises(FeatureMismatchError, match=name):
            top_k(train, query)
