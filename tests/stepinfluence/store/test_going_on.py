"""A store that was begun earlier goes on only with what it was begun with, also where no manifest tells of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stores
import torch
from stepinfluence import ExactCapture, StoreError, attach
from stepinfluence.store import STORE_DTYPES, Manifest, RowInfo, StoreWriter, checkpoint_of, verify
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from bench.attack.programs import BATCH, ROWS, SHARD, Looped, examples, loss, made

DATA = examples(ROWS, 1)


class Other(Looped):
    """The same weights, and other code."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def moved(part: str) -> Looped:
    model = made()
    with torch.no_grad():
        model.get_submodule(part).weight += 1
    return model


def of_class(kind: type[Looped]) -> Looped:
    torch.manual_seed(0)
    return kind().eval()


def dropping(p: float) -> Looped:
    model = made()
    model.dropout.p = p
    return model


def doubled(model: nn.Module, batch: Tensor) -> Tensor:
    return 2 * loss(model, batch)


def run(
    path: Path,
    *,
    stop: int | None = None,
    model: Looped | None = None,
    capture: Any = None,
    data: Tensor = DATA,
    loss_fn: Callable[..., Tensor] = loss,
    batch: int = BATCH,
    first: bool = True,
    row: Callable[[int], int] = lambda r: r,
    eta: float = 0.1,
    fields: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Featurize into a store, and leave after so many shards."""
    model = model or made()
    options = {"sketch_size": 8, "training": True, **options}
    capture = capture or attach(model, body="core", **options)
    described = [checkpoint_of(capture, "c", eta), checkpoint_of(capture, "d", eta)]
    manifest = Manifest.of(capture, ROWS, described, **{"shard_rows": SHARD, "per_step": True, **(fields or {})})
    writer = StoreWriter.create(path, manifest)
    for k in range(2):
        for shard in writer.to_write(k):
            if stop == 0:
                return
            stop = None if stop is None else stop - 1
            rows = manifest.rows_of(shard)
            found = capture.featurize(
                DataLoader(Subset(data, rows), batch_size=batch),  # type: ignore[arg-type]
                loss_fn,
                per_step=manifest.per_step,
                first_batch=rows.start // batch if first else 0,
                progress=False,
            )
            writer.write_shard(k, shard, found, [RowInfo(row(r)) for r in rows])
    writer.finish()


CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "weights of the body": lambda: {"model": moved("core")},
    "weights of the head": lambda: {"model": moved("head")},
    "a model of float64": lambda: {"model": made().double(), "data": DATA.double()},
    "the model's code": lambda: {"model": of_class(Other)},
    "dropout": lambda: {"model": dropping(0.5)},
    "the mode": lambda: {"training": False},
    "the order of the data": lambda: {"data": DATA.flip(0)},
    "the data": lambda: {"data": DATA + 1},
    "ids": lambda: {"row": lambda r: r + 1},
    "the loss": lambda: {"loss_fn": doubled},
    "batches": lambda: {"batch": 4},
    "numbers of batches": lambda: {"first": False},
    "seed": lambda: {"seed": 1},
    "sketch size": lambda: {"sketch_size": 16},
    "hashing": lambda: {"hashing": "iid"},
    "layout": lambda: {"layout": "sum"},
    "exact features": lambda: {"capture": ExactCapture(made(), body="core", training=True)},
    "eta": lambda: {"eta": 0.2},
    "dtype": lambda: {"fields": {"dtype": "int8"}},
    "rows of a shard": lambda: {"fields": {"shard_rows": 2}},
    "summed over steps": lambda: {"fields": {"per_step": False}},
    "the loss's name": lambda: {"fields": {"loss": "another"}},
}


@pytest.mark.parametrize("begun", [2, 4])
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_refused(change: str, begun: int, tmp_path: Path) -> None:
    """In the middle of a checkpoint, and between two."""
    run(tmp_path, stop=begun)
    before = stores.content(tmp_path)
    with pytest.raises(StoreError, match=r"begun with other settings|was written before with other content|other rows"):
        run(tmp_path, **CHANGES[change]())
    assert stores.content(tmp_path) == before
    assert sum(not problem.endswith("not written") for problem in verify(tmp_path)) == 0


@pytest.mark.parametrize("begun", [0, 1, 3, 4, 6, 8])
def test_what_has_not_changed_goes_on_to_the_same_bytes(begun: int, tmp_path: Path) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "s", stop=begun)
    run(tmp_path / "s")
    assert stores.content(tmp_path / "s") == stores.content(tmp_path / "whole")


@pytest.mark.parametrize("dtype", STORE_DTYPES)
@pytest.mark.parametrize("per_step", [False, True])
def test_what_differs_by_rounding_stays_as_it_is(dtype: Any, per_step: bool, tmp_path: Path) -> None:
    made_up = stores.manifest(dtype=dtype, per_step=per_step)
    stores.write(tmp_path, made_up)
    before = stores.content(tmp_path)
    again = stores.features(made_up, 1, 1)
    failed = [stores.FailedRow(row, why) for row, why in stores.FAILED.items() if row in made_up.rows_of(1)]
    writer = StoreWriter.resume(tmp_path)

    def write(changed: Any) -> None:
        writer.write_shard(1, 1, changed, stores.rows(made_up, 1), failed)

    write(replace(again, values=again.values * (1 + 2.0**-20), losses=again.losses * (1 + 2.0**-22)))
    assert stores.content(tmp_path) == before
    for changed in (
        replace(again, values=again.values * 1.2),
        replace(again, values=again.values.flip(0)),
        replace(again, losses=again.losses * 1.1),
        replace(again, steps=again.steps - 1),
    ):
        with pytest.raises(StoreError, match="was written before with other content: the data, their order"):
            write(changed)
    assert stores.content(tmp_path) == before


def test_what_is_to_be_written(tmp_path: Path) -> None:
    """What is pending, and before it one shard that is there, until this writer has written."""
    made_up = stores.manifest(n_rows=16)  # four shards at two checkpoints
    writer = StoreWriter.create(tmp_path, made_up)

    def write(writer: StoreWriter, checkpoint: int, shard: int) -> None:
        failed = [stores.FailedRow(row, why) for row, why in stores.FAILED.items() if row in made_up.rows_of(shard)]
        found = stores.features(made_up, checkpoint, shard)
        writer.write_shard(checkpoint, shard, found, stores.rows(made_up, shard), failed)

    assert [writer.to_write(k) for k in range(2)] == [[0, 1, 2, 3]] * 2
    for shard in (0, 1):
        write(writer, 0, shard)
    assert [writer.to_write(k) for k in range(2)] == [[2, 3], [0, 1, 2, 3]]
    other = StoreWriter.resume(tmp_path)
    assert [other.to_write(k) for k in range(2)] == [[1, 2, 3], [0, 1, 2, 3]]
    assert [other.to_write(0, rank=r, world_size=3) for r in range(3)] == [[0, 3], [1], [2]]
    write(other, 0, 1)
    assert other.to_write(0) == [2, 3]
    for shard in (2, 3):
        write(writer, 0, shard)
    other = StoreWriter.resume(tmp_path)
    assert [other.to_write(k) for k in range(2)] == [[3], [0, 1, 2, 3]], "what is there is of an earlier checkpoint"
    write(writer, 1, 2)
    other = StoreWriter.resume(tmp_path)
    assert [other.to_write(k) for k in range(2)] == [[], [2, 0, 1, 3]]
    for shard in (0, 1, 3):
        write(writer, 1, shard)
    assert [StoreWriter.resume(tmp_path).to_write(k) for k in range(2)] == [[], []]
    for share in ({"rank": 2, "world_size": 2}, {"rank": -1}, {"world_size": 0}):
        with pytest.raises(ValueError, match=r"rank: got|world_size: got"):
            writer.to_write(0, **share)
