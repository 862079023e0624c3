"""What is written comes back, to the bit for fp32, and what does not belong together is told apart."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stores
import torch
from safetensors.torch import load_file
from stepinfluence import FeatureMismatchError, StoreError
from stepinfluence.attribution.space import Block
from stepinfluence.store import STORE_DTYPES, FailedRow, Manifest, RowInfo, Store, StoreDtype, StoreWriter, decode


def expected(made: Manifest, checkpoint: int) -> torch.Tensor:
    """The features of all rows, failed ones zero, steps padded."""
    steps = 3 if made.n_shards > 1 else 2
    values = torch.zeros(made.n_rows, steps, made.width) if made.per_step else torch.zeros(made.n_rows, made.width)
    for shard in range(made.n_shards):
        part = stores.features(made, checkpoint, shard).values
        kept = [row for row in made.rows_of(shard) if row not in stores.FAILED]
        if made.per_step:
            values[kept, : part.shape[1]] = part
        else:
            values[kept] = part
    return values


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("dtype", STORE_DTYPES)
def test_features_come_back(tmp_path: Path, dtype: StoreDtype, per_step: bool) -> None:
    made = stores.manifest(dtype=dtype, per_step=per_step)
    store = stores.written(tmp_path / "s", made)
    assert store.complete
    assert store.missing() == []
    assert len(store) == 14
    assert (store.width, store.per_step, store.steps) == (stores.WIDTH, per_step, 3 if per_step else 0)
    tolerance = {"fp32": 0.0, "fp16": 5e-4, "bf16": 4e-3, "int8": 4e-3}[dtype]
    for k in range(2):
        values = expected(made, k)
        read = store.features(k)
        bound = tolerance * values.abs().amax(-1, keepdim=True)
        assert ((read.values - values).abs() <= bound).all()
        assert read.ids == tuple(f"example {row}" for row in range(14))
        assert read.space == made.checkpoints[k].space
        assert (read.lengths is not None) == per_step
        assert read.steps.tolist() == [2] * 4 + [3, 3, 0, 3] + [2] * 4 + [3] * 2
        assert read.step_labels == ("core",) * 3
        assert np.array_equal(np.isnan(store.losses(k)), ~store.valid)
        for rows in (None, 3):
            parts = list(store.blocks(k, rows=rows))
            assert torch.equal(torch.cat([v for _, v in parts]), read.values)
            assert [first for first, _ in parts] == ([0, 4, 8, 12] if rows is None else [0, 3, 4, 7, 8, 11, 12])
        raw = [decode(codes, scales, dtype) for _, codes, scales in store.raw_blocks(k)]
        assert all(
            torch.equal(
                v, read.values[i * 4 : i * 4 + 4, ..., : v.shape[1], :] if per_step else read.values[i * 4 : i * 4 + 4]
            )
            for i, v in enumerate(raw)
        )


def test_some_rows_in_the_order_asked_for(tmp_path: Path) -> None:
    store = stores.written(tmp_path / "s", stores.manifest(per_step=True))
    whole, some = store.features(1), store.features(1, rows=[13, 0, 5, 5])
    assert torch.equal(some.values, whole.values[[13, 0, 5, 5]])
    assert torch.equal(some.losses, whole.losses[[13, 0, 5, 5]])
    assert some.ids == ("example 13", "example 0", "example 5", "example 5")
    assert torch.equal(store.features(rows=slice(2, 9)).values, store.features().values[2:9])
    with pytest.raises(IndexError, match="rows: got"):
        store.features(rows=[14])


def test_blocks_do_not_write_to_the_file(tmp_path: Path) -> None:
    store = stores.written(tmp_path / "s")
    before = stores.content(store.path)
    for _, values in store.blocks():
        values.zero_()
    assert stores.content(store.path) == before
    assert store.features().values.any()


def test_rows_ids_and_failures(tmp_path: Path) -> None:
    store = stores.written(tmp_path / "s")
    row = store.row(13)
    assert (row.row, row.id, row.text, row.metadata) == (13, "example 13", "line\n13 \u2028 é", {"label": 13})
    assert store.find("example 9") == 9
    assert list(store.ids) == [store.ids[k] for k in range(14)] == list(store.ids[:])
    assert store.ids[-1] == "example 13"
    assert store.failed == stores.FAILED
    assert np.flatnonzero(~store.valid).tolist() == [6]
    assert (store.features().values[6] == 0).all()
    with pytest.raises(StoreError, match="id: no row with id 'nobody'"):
        store.find("nobody")
    with pytest.raises(IndexError, match="row: got 14; the store has rows 0 to 13"):
        store.row(14)


def test_ids_that_are_numbers_or_not_unique(tmp_path: Path) -> None:
    made = stores.manifest(n_rows=3, checkpoints=1)
    writer = StoreWriter.create(tmp_path / "s", made)
    writer.write_shard(0, 0, stores.features(made, 0, 0), [RowInfo(7), RowInfo("a"), RowInfo("a", text="\ud800")])
    store = Store.open(tmp_path / "s")
    assert store.find(7) == store.find("7") == 0
    assert store.row(2).text == "\ud800"
    with pytest.raises(StoreError, match="id: 'a' is the id of several rows"):
        store.find("a")


def test_a_shard_is_plain_safetensors(tmp_path: Path) -> None:
    """Others read it without this package."""
    made = stores.manifest(dtype="bf16")
    store = stores.written(tmp_path / "s", made)
    arrays = load_file(store.path / "c001" / "shard-00000000.safetensors")
    assert arrays["values"].dtype == torch.bfloat16
    assert torch.equal(arrays["values"], expected(made, 1)[:4].bfloat16())


def test_an_empty_dataset(tmp_path: Path) -> None:
    store = stores.written(tmp_path / "s", stores.manifest(n_rows=0))
    assert store.complete
    assert store.features().values.shape == (0, stores.WIDTH)
    assert list(store.ids) == list(store.blocks()) == []


def test_incomplete_store_says_so(tmp_path: Path) -> None:
    made = stores.manifest()
    writer = StoreWriter.create(tmp_path / "s", made)
    assert writer.pending(1) == [0, 1, 2, 3]
    assert writer.pending(1, rank=1, world_size=3) == [1]
    writer.write_shard(1, 2, stores.features(made, 1, 2), stores.rows(made, 2))
    store = Store.open(tmp_path / "s")
    assert not store.complete
    assert store.missing() == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 3)]
    assert torch.equal(store.features(1, rows=[8]).values, stores.features(made, 1, 2).values[:1])
    for read in (lambda: list(store.blocks(1)), store.features, store.losses, lambda: store.row(0)):
        with pytest.raises(StoreError, match="incomplete"):
            read()
    with pytest.raises(StoreError, match="incomplete: 7 shards are missing, the first is shard 0 of checkpoint 0"):
        writer.finish()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_rows": 15}, "n_rows: 14 here, 15 there"),
        ({"dtype": "int8"}, "dtype: 'fp32' here, 'int8' there"),
        ({"per_step": True}, "per_step: False here, True there"),
        ({"loss": "answers only"}, "loss: '' here, 'answers only' there"),
        ({"project": {"lr": [1, 2]}}, "project: {} here"),
    ],
)
def test_resuming_with_other_settings_names_them(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    stores.written(tmp_path / "s")
    with pytest.raises(StoreError, match=re.escape(message)):
        StoreWriter.create(tmp_path / "s", replace(stores.manifest(), **change))


def test_resuming_does_not_mind_versions(tmp_path: Path) -> None:
    stores.written(tmp_path / "s", stores.manifest(versions={"torch": "1.0"}))
    assert StoreWriter.create(tmp_path / "s", stores.manifest(versions={"torch": "9.9"})).pending(0) == []
    assert Store.open(tmp_path / "s").manifest.versions == {"torch": "1.0"}


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(StoreError, match="holds other files; give a new or empty folder"):
        StoreWriter.create(tmp_path, stores.manifest())
    with pytest.raises(StoreError, match="no store here"):
        Store.open(tmp_path)


def test_what_does_not_fit_the_shard_is_refused(tmp_path: Path) -> None:
    made = stores.manifest()
    writer = StoreWriter.create(tmp_path / "s", made)
    good, rows = stores.features(made, 0, 0), stores.rows(made, 0)
    stray = replace(good, space=stores.space(1))
    per_step = replace(stores.features(replace(made, per_step=True), 0, 0))
    nan = replace(good, values=good.values.index_fill(0, torch.tensor([2]), torch.nan))
    for arguments, message in [
        ((good, rows[:3]), "rows: got 3 for shard 0, which has 4"),
        ((good, rows, [FailedRow(1, "why")]), "features: got 4 for shard 0, which has 4 rows of which 1 failed"),
        ((good, rows, [FailedRow(4, "why")]), "failed: got rows \\[4\\]; give rows 0 to 3"),
        ((None, rows), "features: got 0 for shard 0"),
        ((stray, rows), "features: not those of the store's checkpoint 0: .* other weights"),
        ((per_step, rows), "features: per step, the store's are summed over steps"),
        ((nan, rows), "features: NaN"),
        ((good, [*rows[:3], RowInfo(1.5)]), "rows: got an id of type float"),  # type: ignore[arg-type]
        ((good, [*rows[:3], RowInfo("x", metadata={"a": float("nan")})]), "rows: 'x': its metadata cannot be written"),
    ]:
        with pytest.raises(StoreError, match=message):
            writer.write_shard(0, 0, *arguments)
    assert writer.pending(0) == [0, 1, 2, 3]


def test_a_shard_can_be_written_twice_but_not_differently(tmp_path: Path) -> None:
    made = stores.manifest()
    store = stores.written(tmp_path / "s", made)
    before, writer = stores.content(store.path), StoreWriter.resume(store.path)
    writer.write_shard(0, 0, stores.features(made, 0, 0), stores.rows(made, 0))
    with pytest.raises(StoreError, match="written before with other content"):
        writer.write_shard(0, 0, replace(stores.features(made, 0, 0), losses=torch.zeros(4)), stores.rows(made, 0))
    with pytest.raises(StoreError, match="other rows than those"):
        writer.write_shard(0, 0, stores.features(made, 0, 0), stores.rows(made, 0)[::-1])
    assert stores.content(store.path) == before


def test_a_shard_of_failures_only(tmp_path: Path) -> None:
    made = stores.manifest(n_rows=2, checkpoints=1, per_step=True)
    writer = StoreWriter.create(tmp_path / "s", made)
    writer.write_shard(0, 0, None, stores.rows(made, 0), [FailedRow(0, "a"), FailedRow(1, "b")])
    store = Store.open(tmp_path / "s")
    assert store.failed == {0: "a", 1: "b"}
    assert store.features().values.shape == (2, 0, stores.WIDTH)


def test_declared_steps_are_the_step_axis(tmp_path: Path) -> None:
    store = stores.written(tmp_path / "s", stores.manifest(per_step=True, steps=5))
    assert store.steps == 5
    assert all(codes.shape[1] == 5 for _, codes, _ in store.raw_blocks())
    with pytest.raises(StoreError, match="an example of 3 loop steps, the manifest says 2"):
        stores.written(tmp_path / "t", stores.manifest(per_step=True, steps=2))


OTHER_BLOCKS = (Block("w", (3, 4), 0, 7), Block("b", (3,), 7, stores.WIDTH))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "another"}, "made with another model"),
        ({"checkpoints": 1}, "has 1 checkpoints, .* has 2"),
        ({"space": {"tables": "u"}}, r"checkpoint 0 \(step-0.pt\): .*other sketches"),
        ({"space": {"blocks": OTHER_BLOCKS}}, "other sketches"),
        ({"space": {"metric": "adam"}}, "another metric than"),
        ({"space": {"weights": "x"}}, "other weights"),
        ({"eta": 0.3}, "has eta 0.3, in .* it has 0.1"),
    ],
)
def test_stores_that_cannot_be_compared(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    made = stores.manifest(model="this")
    ours = stores.written(tmp_path / "ours", made)
    ours.require_comparable(ours)
    parts = list(made.checkpoints)
    for k, part in enumerate(parts):
        parts[k] = replace(part, space=replace(part.space, **change.get("space", {})), eta=change.get("eta", part.eta))
    fields = {"model": change["model"]} if "model" in change else {}
    other = replace(made, checkpoints=tuple(parts[: change.get("checkpoints", 2)]), **fields)
    StoreWriter.create(tmp_path / "theirs", other)
    with pytest.raises(FeatureMismatchError, match=message):
        ours.require_comparable(Store.open(tmp_path / "theirs"))
