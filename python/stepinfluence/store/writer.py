"""``StoreWriter``: writes a store shard by shard; any number of processes may write shards of one store at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from stepinfluence.arguments import non_negative_int, positive_int
from stepinfluence.attribution.features import Features
from stepinfluence.errors import FeatureMismatchError, StoreError
from stepinfluence.files import file_digest, make_folder, save_tensors, sealed, write_atomically, write_bytes
from stepinfluence.machine import arithmetic
from stepinfluence.store.again import differ_by_rounding
from stepinfluence.store.codecs import encode
from stepinfluence.store.manifest import FORMAT, MANIFEST, Manifest
from stepinfluence.store.shards import (
    TIMES,
    FailedRow,
    Record,
    RowInfo,
    expected_arrays,
    map_arrays,
    read_record,
    record_path,
    rows_path,
    rows_to_bytes,
    values_path,
    written_shards,
)
from stepinfluence.writers import ASIDE, remove_leftovers


class _StaysError(Exception):
    """A shard that is to be written is there, with other roundings."""


def _check_share(rank: int, world_size: int) -> None:
    """Raise unless there is a worker ``rank`` of ``world_size``.

    Raises:
        TypeError, ValueError: there is none.
    """
    if positive_int("world_size", world_size) <= non_negative_int("rank", rank):
        raise ValueError(f"rank: got {rank} of world_size {world_size}; workers are counted from 0")


def _check_rows(rows: Sequence[RowInfo], failed: Sequence[FailedRow]) -> None:
    """Raise unless these are rows and failures that can be written.

    Raises:
        StoreError: they are not.
    """
    for name, given, kind in (("rows", rows, RowInfo), ("failed", failed, FailedRow)):
        several = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        wrong = next((one for one in several if not isinstance(one, kind)), None)
        if wrong is not None or several is not given:
            raise StoreError(
                f"{name}: got {type(wrong if several is given else given).__name__}; give a list of {kind.__name__}"
            )
    if any(type(one.row) is not int or not isinstance(one.reason, str) for one in failed):
        raise StoreError("failed: got a row or reason of another type; give the row's number and a text")


def is_unwritten(path: Path) -> bool:
    """Whether there is nothing of a store in a folder, or its manifest alone: no shard has been begun."""
    return not any(
        entry.is_file() and entry.name != MANIFEST and not entry.name.startswith(ASIDE) for entry in path.rglob("*")
    )


class StoreWriter:
    """Writes the shards of a store; made by :meth:`create`.

    A shard appears when its record is renamed into place, after its values and rows. Workers need not know of one
    another: who writes a shard makes no difference to its bytes, and a shard written twice is written alike.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._digest = manifest.digest
        self._wrote = False

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> StoreWriter:
        """Begin a store, or go on with one that was begun with the same manifest (code versions apart).

        Raises:
            StoreError: the folder holds a store with another manifest (says what differs), or other files.
        """
        path = Path(path)
        cls.require_free(path)
        if not (path / MANIFEST).exists():
            make_folder(path)
            write_bytes(path / MANIFEST, manifest.to_bytes())
        return cls.resume(path, manifest)

    @staticmethod
    def require_free(path: Path) -> None:
        """Raise unless a store is in a folder, or one can be begun there.

        Raises:
            StoreError: the folder holds other files.
        """
        if (path / MANIFEST).exists() or not path.is_dir():
            return
        others = any(not p.name.startswith(ASIDE) and p.name != MANIFEST for p in path.iterdir())
        if others and not (path / MANIFEST).exists():  # unless another worker has begun it meanwhile
            raise StoreError(f"{path}: holds other files; give a new or empty folder")

    @classmethod
    def resume(cls, path: str | Path, manifest: Manifest | None = None) -> StoreWriter:
        """Go on with a store; its manifest must equal ``manifest``, if given.

        Raises:
            StoreError: no store there, damaged, or begun with another manifest (says what differs).
        """
        path = Path(path)
        stored = Manifest.read(path)
        difference = stored.difference(manifest) if manifest is not None else None
        if difference is not None:
            raise StoreError(
                f"{path}: begun with other settings: {difference} (here: in the store); "
                "use the same ones to resume, or another folder"
            )
        writer = cls(path, stored)
        remove_leftovers(path, within=True)
        for folder in {
            rows_path(path, 0).parent,
            *(record_path(path, k, 0).parent for k in range(writer._checkpoints)),
        }:
            make_folder(folder)
        return writer

    @property
    def _checkpoints(self) -> int:
        return len(self.manifest.checkpoints)

    def pending(self, checkpoint: int, *, rank: int = 0, world_size: int = 1) -> list[int]:
        """Shards that have not been written at a checkpoint: all, or the share of worker ``rank`` of ``world_size``."""
        self._check(checkpoint, 0)
        _check_share(rank, world_size)
        written = set(written_shards(self.path, checkpoint, self.manifest))
        return [shard for shard in range(rank, self.manifest.n_shards, world_size) if shard not in written]

    def to_write(self, checkpoint: int, *, rank: int = 0, world_size: int = 1) -> list[int]:
        """:meth:`pending`, and before these, in a store that was begun earlier, a shard that is there.

        It must come out as it was, but for rounding: what no manifest tells (the data and their order, the loss, the
        model's code and mode, the batches) is seen to be the same before anything is added. It is the last of the
        worker's share, of the last checkpoint that has any; where nothing is pending at any checkpoint, none is.
        """
        missing = self.pending(checkpoint, rank=rank, world_size=world_size)
        if self._wrote or not any(
            self.pending(k, rank=rank, world_size=world_size) for k in range(checkpoint, self._checkpoints)
        ):
            return missing
        there = {
            k: [s for s in written_shards(self.path, k, self.manifest) if s % world_size == rank]
            for k in range(self._checkpoints)
        }
        last = max((k for k, shards in there.items() if shards), default=None)
        return [there[checkpoint][-1], *missing] if last == checkpoint else missing

    def _check(self, checkpoint: int, shard: int) -> None:
        for name, number in (("checkpoint", checkpoint), ("index", shard)):
            if type(number) is not int:
                raise TypeError(f"{name}: got {type(number).__name__} {number!r}; give a whole number")
        if not 0 <= checkpoint < self._checkpoints:
            raise IndexError(f"checkpoint: got {checkpoint}; the store has {self._checkpoints}, counted from 0")
        if not 0 <= shard < max(1, self.manifest.n_shards):
            raise IndexError(f"index: got {shard}; the store has {self.manifest.n_shards} shards, counted from 0")

    def write_shard(
        self,
        checkpoint: int,
        index: int,
        features: Features | None,
        rows: Sequence[RowInfo],
        failed: Sequence[FailedRow] = (),
        *,
        seconds: float | None = None,
    ) -> None:
        """Write one shard durably.

        Args:
            checkpoint, index: which; :attr:`Manifest.rows_of` tells the shard's rows.
            features: of the shard's examples that did not fail, in the order of their rows; None if all failed.
            rows: one for every row of the shard, failed ones included.
            failed: the rows (numbers in the store) that have no features, with a reason each.
            seconds: what the shard took, for the log.

        Raises:
            StoreError: numbers of rows do not fit, features of other columns or steps than the manifest's, values that
                are not finite, rows other than at an earlier checkpoint, another content than a shard that is there
                (one that differs by rounding stays as it is), or the disk is full (then nothing of the shard counts as
                written, and it can be written again).
        """
        self._check(checkpoint, index)
        _check_rows(rows, failed)
        numbers = self.manifest.rows_of(index)
        bad = {failure.row for failure in failed}
        if len(rows) != len(numbers):
            raise StoreError(f"rows: got {len(rows)} for shard {index}, which has {len(numbers)}; give one each")
        if not all(row in numbers for row in bad) or len(bad) != len(failed):
            raise StoreError(
                f"failed: got rows {sorted(bad)[:5]}; give rows {numbers.start} to {numbers.stop - 1} once"
            )
        if (0 if features is None else len(features)) != len(numbers) - len(bad):
            raise StoreError(
                f"features: got {0 if features is None else len(features)} for shard {index}, which has {len(numbers)} "
                f"rows of which {len(bad)} failed; give one for each of the others"
            )
        arrays = self._arrays(checkpoint, features, [r - numbers.start for r in numbers if r not in bad], len(numbers))
        record = Record(
            checkpoint=checkpoint,
            shard=index,
            manifest=self._digest,
            machine=arithmetic(),
            steps=arrays["values"].shape[1] if self.manifest.per_step else 0,
            step_labels=features.step_labels if features is not None else (),
            failed=tuple(sorted(failed, key=lambda failure: failure.row)),
            files={"rows": self._write_rows(index, rows), "values": (0, "")},
        )
        self._commit(record, arrays, {failure.row: rows[failure.row - numbers.start].id for failure in failed})
        self._wrote = True
        if seconds is not None:
            line = json.dumps(
                {"checkpoint": checkpoint, "shard": index, "rows": len(rows), "seconds": round(seconds, 3)}
            )
            # One short line: appends of several workers do not mix. A log is not worth failing for.
            with contextlib.suppress(OSError), (self.path / TIMES).open("a") as log:
                log.write(line + "\n")

    def _arrays(self, checkpoint: int, features: Features | None, places: list[int], n: int) -> dict[str, Tensor]:
        manifest, space = self.manifest, self.manifest.checkpoints[checkpoint].space
        steps = manifest.steps or 0
        if features is not None:
            try:
                features.require_whole("features")
            except (TypeError, ValueError) as error:
                raise StoreError(str(error)) from None
            if not bool(features.losses.isfinite().all()):
                raise StoreError("features: a loss is not finite; leave such examples out as failed ones")
            try:
                space.require_equal(features.space)
            except FeatureMismatchError as error:
                what = str(error).removeprefix("query: ").replace("train's", "the store's")
                raise StoreError(f"features: not those of the store's checkpoint {checkpoint}: {what}") from None
            if features.space.curvature:
                raise StoreError("features: transformed by a curvature, which stores do not record; store plain ones")
            if features.per_step != manifest.per_step:
                kinds = ("summed over steps", "per step")
                raise StoreError(
                    f"features: {kinds[features.per_step]}, the store's are {kinds[manifest.per_step]}; "
                    f"featurize with per_step={manifest.per_step}"
                )
            most = int(features.steps.max()) if len(features) else 0
            if manifest.steps is not None and most > manifest.steps:
                raise StoreError(f"steps: got an example of {most} loop steps, the manifest says {manifest.steps}")
            if manifest.steps is None:
                steps = features.values.shape[1] if manifest.per_step else 0
        lead = (n, steps) if manifest.per_step else (n,)
        values = torch.zeros(*lead, manifest.width)
        losses = torch.full((n,), torch.nan)
        counts, lengths = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
        if features is not None:
            if manifest.per_step:
                values[places, : features.values.shape[1]] = features.values.to("cpu", torch.float32)
                assert features.lengths is not None
                lengths[places] = features.lengths.to(torch.int32)
            else:
                values[places] = features.values.to("cpu", torch.float32)
            losses[places] = features.losses.float().cpu()
            counts[places] = features.steps.to(torch.int32)
        codes, scales = encode(values, manifest.dtype)
        arrays = {"values": codes, "losses": losses, "steps": counts}
        if scales is not None:
            arrays["scales"] = scales
        return {**arrays, "lengths": lengths} if manifest.per_step else arrays

    def _write_rows(self, index: int, rows: Sequence[RowInfo]) -> tuple[int, str]:
        """The rows' file, written by whoever comes first; its size and digest."""
        path, content = rows_path(self.path, index), rows_to_bytes(rows)
        if not path.is_file():
            write_bytes(path, content)
        elif path.read_bytes() != content:
            raise StoreError(
                f"rows: other rows than those that {path} was written with; the dataset has changed since then, or its "
                "order has: use another folder"
            )
        return len(content), file_digest(path)

    def _commit(self, record: Record, arrays: dict[str, Tensor], ids: dict[int, str | int]) -> None:
        checkpoint, shard = record.checkpoint, record.shard
        path, there = values_path(self.path, checkpoint, shard), record_path(self.path, checkpoint, shard)
        files = dict(record.files)

        def fill(aside: Path) -> None:
            save_tensors(arrays, aside, {"format": FORMAT})
            map_arrays(aside, expected_arrays(self.manifest, record))  # all there, whatever the library did on errors
            files["values"] = (aside.stat().st_size, file_digest(aside))
            if there.is_file():
                before = read_record(self.path, self.manifest, self._digest, checkpoint, shard)
                if before.same_shard(replace(record, files=files)):
                    return
                if differ_by_rounding(self.path, self.manifest, before, record, arrays):
                    raise _StaysError
                raise StoreError(
                    f"{there}: was written before with other content: the data, their order, the batches, the loss or "
                    "the model's code or mode have changed since, or featurizing is not repeatable here "
                    "(docs/store.md), or the store is damaged; put things back, or use another folder"
                )

        with contextlib.suppress(_StaysError):
            write_atomically(path, fill)
            content = replace(record, files=files).content(self.manifest, ids)
            write_bytes(there, sealed(content))

    def finish(self) -> None:
        """Check that everything was written, and remove what dead writers left behind.

        Raises:
            StoreError: shards are missing.
        """
        left = [(k, s) for k in range(self._checkpoints) for s in self.pending(k)]
        if left:
            checkpoint, shard = left[0]
            raise StoreError(
                f"{self.path}: incomplete: {len(left)} shards are missing, the first is shard {shard} of checkpoint "
                f"{checkpoint}; featurize again to resume"
            )
        remove_leftovers(self.path, within=True)
