"""Stores put together and taken out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import stores
import torch
from safetensors import safe_open
from stepinfluence import StoreError
from stepinfluence.store import Manifest, Store, StoreWriter, export, merge, verify
from stepinfluence.store.manifest import MANIFEST


def part(path: Path, shards: list[tuple[int, int]], made: Manifest) -> Path:
    writer = StoreWriter.create(path, made)
    for checkpoint, shard in shards:
        failed = [stores.FailedRow(r, w) for r, w in stores.FAILED.items() if r in made.rows_of(shard)]
        writer.write_shard(
            checkpoint, shard, stores.features(made, checkpoint, shard), stores.rows(made, shard), failed
        )
    return path


@pytest.mark.parametrize("link", [True, False])
def test_parts_make_the_whole(tmp_path: Path, link: bool) -> None:
    made = stores.manifest()
    whole = stores.written(tmp_path / "whole", made)
    ours = part(tmp_path / "a", [(0, 0), (0, 2), (1, 3)], made)
    theirs = part(tmp_path / "b", [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)], made)
    merged = merge([ours, theirs], tmp_path / "merged", link=link)
    assert merged.complete
    assert stores.content(merged.path) == stores.content(whole.path)
    assert verify(merged.path) == []
    same = (ours / "c000/shard-00000000.safetensors").stat().st_ino
    assert ((merged.path / "c000/shard-00000000.safetensors").stat().st_ino == same) == link
    assert stores.content(merge([theirs], merged.path).path) == stores.content(whole.path)


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    made = stores.manifest()
    ours = part(tmp_path / "a", [(0, 0)], made)
    with pytest.raises(StoreError, match=r"not a part of the same store as .*: loss: '' here, 'x' there"):
        merge([ours, part(tmp_path / "b", [(0, 1)], stores.manifest(loss="x"))], tmp_path / "m")
    writer = StoreWriter.create(tmp_path / "c", made)
    writer.write_shard(0, 0, stores.features(made, 0, 2), stores.rows(made, 0))
    with pytest.raises(StoreError, match="shard 0 of checkpoint 0 is another one than the merged store has"):
        merge([ours, tmp_path / "c"], tmp_path / "m")
    values = ours / "c000/shard-00000000.safetensors"
    values.write_bytes(values.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match=r"safetensors: damaged"):
        merge([ours], tmp_path / "n")
    with pytest.raises(ValueError, match="paths: got none"):
        merge([], tmp_path / "n")


@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_export(tmp_path: Path, form: Literal["npz", "safetensors"], per_step: bool) -> None:
    store = stores.written(tmp_path / "s", stores.manifest(dtype="int8", per_step=per_step))
    out = export(store.path, tmp_path / f"out.{form}", format=form)
    if form == "npz":
        with np.load(out) as file:
            arrays = {name: file[name] for name in file.files}
        texts = {name: arrays.pop(f"{name}_json").tobytes().decode() for name in ("ids", "manifest")}
    else:
        with safe_open(out, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            texts = file.metadata()
    assert set(arrays) == {"etas", "valid", "features_0", "features_1", "losses_0", "losses_1"}
    for k in range(2):
        assert np.array_equal(arrays[f"features_{k}"], store.features(k).values.numpy())
        assert np.array_equal(arrays[f"losses_{k}"], store.losses(k), equal_nan=True)
    assert arrays["etas"].tolist() == [0.1, 0.2]
    assert np.array_equal(arrays["valid"].astype(bool), store.valid)
    assert json.loads(texts["ids"]) == list(store.ids)
    assert texts["manifest"] == (store.path / MANIFEST).read_text()


def test_export_of_half_a_store_or_to_an_unknown_format(tmp_path: Path) -> None:
    half = part(tmp_path / "a", [(0, 0)], stores.manifest())
    with pytest.raises(StoreError, match="incomplete: 7 shards are missing"):
        export(half, tmp_path / "x.npz")
    with pytest.raises(ValueError, match="format: got 'csv'"):
        export(half, tmp_path / "x.csv", format="csv")  # type: ignore[arg-type]
    assert not (tmp_path / "x.npz").exists()


def test_hard_links_do_not_tie_stores_together(tmp_path: Path) -> None:
    """Files are replaced, never written to: a change in one store does not reach the other."""
    whole = stores.written(tmp_path / "s")
    merged = merge([whole.path], tmp_path / "m")
    before = stores.content(whole.path)
    for _, values in merged.blocks():
        values += 1
    assert stores.content(whole.path) == before
    assert torch.equal(Store.open(merged.path).features().values, whole.features().values)


def test_merging_a_store_of_relative_links_leaves_no_link(tmp_path: Path) -> None:
    whole = stores.written(tmp_path / "deep" / "whole").path
    linked = tmp_path / "linked"
    for file in whole.rglob("*"):
        place = linked / file.relative_to(whole)
        if file.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(file, place.parent))
    merge([linked], tmp_path / "out" / "merged")
    assert not any(file.is_symlink() for file in (tmp_path / "out").rglob("*"))
    assert stores.content(tmp_path / "out" / "merged") == stores.content(whole)
