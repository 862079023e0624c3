"""What the library's functions are given by mistake is refused in one line that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
import torch
from stepinfluence import Features, StoreError, align_steps, allocate_sizes, influence, influence_over_checkpoints
from stepinfluence.loaders import ids_in
from stepinfluence.search import scores, top_k
from stepinfluence.store import (
    FailedRow,
    Manifest,
    RowInfo,
    Store,
    StoredCheckpoint,
    StoreWriter,
    bytes_per_row,
    decode,
    encode,
)

TRAIN = made.features(made.normal(5, made.WIDTH))
QUERY = made.features(made.normal(2, 3, made.WIDTH, seed=1), prefix="q")


def wrong(**parts: Any) -> Features:
    return replace(TRAIN, **parts)


ODD: dict[str, Callable[[], Features]] = {
    r"values of shape \(5, 7\)": lambda: wrong(values=torch.randn(5, 7)),
    r"values of shape \(13,\)": lambda: wrong(values=torch.randn(13)),
    r"values of shape \(5, 2, 2, 13\)": lambda: wrong(values=torch.randn(5, 2, 2, 13)),
    "values of torch.int64": lambda: wrong(values=torch.ones(5, 13, dtype=torch.int64)),
    "1 ids for 5 examples": lambda: wrong(ids=("a",)),
    "3 losses for 5 examples": lambda: wrong(losses=torch.ones(3)),
    "4 steps for 5 examples": lambda: wrong(steps=torch.ones(4, dtype=torch.int64)),
    "2 content for 5 examples": lambda: wrong(content=(1, 2)),
}


@pytest.mark.parametrize("message", ODD)
def test_features_whose_parts_do_not_fit(message: str, tmp_path: Path) -> None:
    features = ODD[message]()
    for ask in (influence, lambda t, q: top_k(t, q, 2, progress=False), lambda t, q: scores(t, q, progress=False)):
        with pytest.raises((TypeError, ValueError), match=f"^train: {message}"):
            ask(features, QUERY)
    with pytest.raises((TypeError, ValueError), match=f"^features: {message}"):
        allocate_sizes(features, width=100)
    writer = StoreWriter.create(tmp_path / "s", manifest(n_rows=5))
    with pytest.raises(StoreError, match=f"^features: {message}|^features: got .* for shard 0"):
        writer.write_shard(0, 0, features, [RowInfo(k) for k in range(5)])


def manifest(**fields: Any) -> Manifest:
    given = {"n_rows": 4, "checkpoints": (StoredCheckpoint("c", 1.0, made.space()),), **fields}
    return Manifest(**given)


def shard(path: Path, **changes: Any) -> None:
    four = TRAIN.select([0, 1, 2, 3])
    given = {"checkpoint": 0, "index": 0, "features": four, "rows": [RowInfo(k) for k in range(4)], **changes}
    StoreWriter.create(path / "s", manifest()).write_shard(**given)


def stored(path: Path) -> Store:
    return made.store(path / "stored", [TRAIN])


CASES: dict[str, Callable[[Path], Any]] = {
    "query: features of torch.float32, train of torch.float64": lambda _: influence(
        wrong(values=TRAIN.values.double()), QUERY
    ),
    "values: got list": lambda _: align_steps([[1.0, 2.0]], torch.ones(1, dtype=torch.int64)),
    "lengths: got Tensor": lambda _: align_steps(torch.ones(2, 2), torch.tensor(1)),
    "lengths: got torch.bool": lambda _: align_steps(torch.ones(2, 2), torch.tensor([True, False])),
    "largest: got str": lambda _: influence(TRAIN, QUERY).top(largest="no"),
    "parameters: got 3": lambda _: top_k(TRAIN, QUERY, 2, parameters=3),
    r"parameters: got \[None\]": lambda _: scores(TRAIN, QUERY, parameters=[None]),
    "smallest: got 0": lambda _: allocate_sizes(TRAIN, width=100, smallest=0),
    "smallest: got -4": lambda _: allocate_sizes(TRAIN, width=100, smallest=-4),
    "width: got float": lambda _: allocate_sizes(TRAIN, width=100.5),
    "powers_of_two: got str": lambda _: allocate_sizes(TRAIN, width=100, powers_of_two="no"),
    "features: got NoneType": lambda _: allocate_sizes(None, width=100),
    "features: some are not finite": lambda _: allocate_sizes(wrong(values=TRAIN.values * torch.inf), width=100),
    "checkpoints: got int": lambda _: influence_over_checkpoints(None, 3, [], [], made.normal),
    "ids: got int 5 for a batch": lambda _: ids_in(None, lambda _: 5),
    "ids: got str 'ab' for a batch": lambda _: ids_in(None, lambda _: "ab"),
    "width: got -3": lambda _: bytes_per_row(-3, "fp32"),
    "dtype: got 'x'": lambda _: bytes_per_row(3, "x"),
    "dtype: got 'y'": lambda _: encode(torch.ones(2, 3), "y"),
    "codes, scales: got int8 without scales": lambda _: decode(np.zeros((2, 3), np.int8), None, "int8"),
    "codes, scales: got float32 without scales": lambda _: decode(np.zeros((2, 3), np.float32), None, "bf16"),
    "features: all are too small for float32": lambda _: encode(
        torch.full((2, 3), 1e-300, dtype=torch.float64), "fp32"
    ),
    "checkpoints: 'c' has eta 'x'": lambda _: manifest(checkpoints=(StoredCheckpoint("c", "x", made.space()),)),
    "checkpoints: 3 has eta 1.0": lambda _: manifest(checkpoints=(StoredCheckpoint(3, 1.0, made.space()),)),
    "per_step: got 'yes'": lambda _: manifest(per_step="yes"),
    "loss: got 3": lambda _: manifest(loss=3),
    "rows: got NoneType": lambda path: shard(path, rows=None),
    "rows: got int": lambda path: shard(path, rows=[0, 1, 2, 3]),
    "failed: got a row or reason": lambda path: shard(path, failed=[FailedRow(1, 3)]),
    "checkpoint: got str '0'": lambda path: shard(path, checkpoint="0"),
    "index: got float 0.0": lambda path: shard(path, index=0.0),
    "features: a loss is not finite": lambda path: shard(
        path, features=replace(TRAIN.select([0, 1, 2, 3]), losses=torch.full((4,), torch.nan))
    ),
    r"rows: got \[0.5\]": lambda path: stored(path).features(0, [0.5]),
    r"rows: got \[True, False\]": lambda path: stored(path).values(0, [True, False]),
    "row: got float 0.5": lambda path: stored(path).row(0.5),
}


@pytest.mark.parametrize("message", CASES)
def test_it_is_refused(message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError, IndexError), match=message) as caught:
        CASES[message](tmp_path)
    assert "\n" not in str(caught.value)


def test_no_queries_are_no_error() -> None:
    none = QUERY.select([])
    assert scores(TRAIN, none, progress=False).sdi.shape == (5, 0, 3)
    assert influence(TRAIN, none).sdi.shape == (5, 0, 3)
