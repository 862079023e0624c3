"""``Store``: a folder of feature shards, opened for reading; torch is imported where values are decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stepinfluence.attribution.curvature.stored import StoredFeatures
from stepinfluence.errors import FeatureMismatchError, StoreError
from stepinfluence.store.checkpoints import StoredCheckpoint
from stepinfluence.store.manifest import Manifest
from stepinfluence.store.rows import RowIds, RowTable, StoredRow, numbers_of
from stepinfluence.store.shards import (
    Record,
    RowId,
    expected_arrays,
    map_arrays,
    read_record,
    rows_path,
    values_path,
    written_shards,
)

if TYPE_CHECKING:
    from torch import Tensor

    from stepinfluence.attribution.features import Features
    from stepinfluence.capture import Capture, ExactCapture

BLOCK_BYTES = 32 << 20
"""Decoded bytes of a block of :meth:`Store.blocks`, unless told otherwise."""


class Store(StoredFeatures):
    """A store opened for reading; made by :meth:`open`. Values are memory-mapped, rows read one at a time.

    Attributes:
        path: the store's folder.
        manifest: what it holds.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._records: dict[tuple[int, int], Record] = {}
        digest = manifest.digest
        for checkpoint in range(len(manifest.checkpoints)):
            for shard in written_shards(path, checkpoint, manifest):
                record = read_record(path, manifest, digest, checkpoint, shard)
                self._check_sizes(record)
                self._records[checkpoint, shard] = record
        self._table = RowTable(path, manifest)
        stored_steps = max((r.steps for r in self._records.values()), default=0)
        self._steps = stored_steps if manifest.steps is None else manifest.steps

    @classmethod
    def open(cls, path: str | Path, *, capture: Capture | ExactCapture | None = None) -> Store:
        """Open a store; an incomplete one opens too (:attr:`complete`), and what is missing cannot be read.

        Checks the manifest and every commit record, and that the shards' files are there in full; what their bytes are
        is checked by :func:`stepinfluence.store.verify`.

        Args:
            path: the store's folder.
            capture: what is to be compared with the store: its model, weights and sketches must be the store's.

        Raises:
            StoreError: no store there, another format version, damaged files.
            FeatureMismatchError: the store is not of the capture's model, weights or sketches (says what differs).
        """
        path = Path(path)
        manifest = Manifest.read(path)
        store = cls(path, manifest)
        if capture is not None:
            store.require_capture(capture)
        return store

    def _check_sizes(self, record: Record) -> None:
        paths = {
            "values": values_path(self.path, record.checkpoint, record.shard),
            "rows": rows_path(self.path, record.shard),
        }
        for name, path in paths.items():
            found = path.stat().st_size if path.is_file() else None
            if found != record.files[name][0]:
                state = "missing" if found is None else f"of {found} bytes instead of {record.files[name][0]}"
                raise StoreError(f"{path}: damaged: the file is {state}; sdi store verify lists all such files")

    # ------------------------------------------------------------------------------------------------------------
    # What there is

    def __len__(self) -> int:
        """Rows of the dataset, whether or not all are there yet."""
        return self.manifest.n_rows

    def __repr__(self) -> str:
        m = self.manifest
        kind = "per step" if m.per_step else "summed over steps"
        state = "" if self.complete else f", {self.missing_count} shards missing"
        return (
            f"Store({str(self.path)!r}: {m.n_rows} rows, {kind}, {m.width} columns of {m.dtype}, "
            f"{len(m.checkpoints)} checkpoints{state})"
        )

    @property
    def checkpoints(self) -> tuple[StoredCheckpoint, ...]:
        return self.manifest.checkpoints

    @property
    def per_step(self) -> bool:
        return self.manifest.per_step

    @property
    def steps(self) -> int:
        """Length of the step axis of per-step values: the most steps of any example; 0 for summed ones, unless the
        manifest states the steps."""
        return self._steps

    @property
    def step_labels(self) -> tuple[str, ...]:
        """Names of the steps of the longest example."""
        return max((r.step_labels for r in self._records.values()), key=len, default=())

    @property
    def width(self) -> int:
        """D', columns of a stored row."""
        return self.manifest.width

    @property
    def complete(self) -> bool:
        return self.missing_count == 0

    @property
    def missing_count(self) -> int:
        """How many shards are not there yet, of all checkpoints together."""
        return self.manifest.n_shards * len(self.checkpoints) - len(self._records)

    def missing(self) -> list[tuple[int, int]]:
        """(checkpoint, shard) of all shards that are not there yet."""
        return [
            (c, s)
            for c in range(len(self.checkpoints))
            for s in range(self.manifest.n_shards)
            if (c, s) not in self._records
        ]

    @property
    def failed(self) -> dict[int, str]:
        """Rows without features, and why, at whichever checkpoint they failed first."""
        reasons: dict[int, str] = {}
        for _, record in sorted(self._records.items()):
            for failure in record.failed:
                reasons.setdefault(failure.row, failure.reason)
        return reasons

    def machine_of(self, checkpoint: int, shard: int) -> str:
        """What the last bits of a shard depend on: the machine that it was written on, in words.

        Raises:
            StoreError: the shard is missing.
        """
        return self._record(checkpoint, shard).machine

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """``(n,)``: which rows have features at every checkpoint."""
        valid = np.ones(len(self), dtype=bool)
        valid[list(self.failed)] = False
        return valid

    def row(self, row: int) -> StoredRow:
        """Id, text and metadata of a row.

        Raises:
            IndexError: no such row.
            StoreError: its shard is missing or damaged.
        """
        return self._table[row]

    def find(self, id: RowId) -> int:  # noqa: A002  # the field's name
        """The row with an id; the first call reads all rows. Digits are also looked up as a number.

        Raises:
            StoreError: there is none, or more than one.
        """
        return self._table.find(id)

    def matching(self, find: str, most: int = 10_000) -> list[int]:
        """The first rows, ``most`` at most, whose id or text contains ``find`` (case does not matter), in order.

        Raises:
            StoreError: a shard is missing or damaged.
        """
        return self._table.matching(find, most)

    @property
    def ids(self) -> RowIds:
        """Ids of all rows, read when asked for."""
        return RowIds(self._table, len(self))

    # ------------------------------------------------------------------------------------------------------------
    # What it holds

    def _record(self, checkpoint: int, shard: int) -> Record:
        if not 0 <= checkpoint < len(self.checkpoints):
            raise IndexError(f"checkpoint: got {checkpoint}; the store has {len(self.checkpoints)}, counted from 0")
        record = self._records.get((checkpoint, shard))
        if record is None:
            raise StoreError(
                f"{self.path}: incomplete: shard {shard} of checkpoint {checkpoint} is missing, and "
                f"{self.missing_count - 1} more; featurize again to resume"
            )
        return record

    def _arrays(self, checkpoint: int, shard: int) -> dict[str, npt.NDArray[Any]]:
        record = self._record(checkpoint, shard)
        return map_arrays(values_path(self.path, checkpoint, shard), expected_arrays(self.manifest, record))

    def losses(self, checkpoint: int = 0) -> npt.NDArray[np.float32]:
        """``(n,)`` float32; NaN for failed rows."""
        return self._gather(checkpoint, "losses", np.float32)

    def lengths(self, checkpoint: int = 0) -> npt.NDArray[np.int64] | None:
        """``(n,)`` int64: the last loop step that each row's loss depends on; None for features summed over steps."""
        return self._gather(checkpoint, "lengths", np.int64) if self.per_step else None

    def _gather(self, checkpoint: int, name: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        parts = [self._arrays(checkpoint, shard)[name] for shard in range(self.manifest.n_shards)]
        return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)

    def raw_blocks(self, checkpoint: int = 0) -> Iterator[tuple[int, npt.NDArray[Any], npt.NDArray[np.float32] | None]]:
        """Shard by shard ``(first row, codes, scales)``, memory-mapped: for scans that decode on the way.

        Codes are ``(rows, [shard's steps,] D')`` of ``NUMPY_DTYPES[dtype]`` (bfloat16 as uint16 bits), scales ``(rows
        [, steps])`` float32 with value = code * scale, or None. Failed rows are zero.

        Raises:
            StoreError: a shard is missing or damaged.
        """
        for shard in range(self.manifest.n_shards):
            arrays = self._arrays(checkpoint, shard)
            yield self.manifest.rows_of(shard).start, arrays["values"], arrays.get("scales")

    def blocks(self, checkpoint: int = 0, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """``(first row, values)`` in order, values float32 ``(r, [steps,] D')``, in bounded memory.

        Args:
            checkpoint: which.
            rows: at most this many rows at a time; as many as decode to 32 MiB if not given. Blocks end with shards.

        Raises:
            StoreError: a shard is missing or damaged.
        """
        per_row = 4 * self.width * max(1, self.steps if self.per_step else 1)
        size = max(1, BLOCK_BYTES // per_row) if rows is None else rows
        if size < 1:
            raise ValueError(f"rows: got {rows}; give a positive number of rows per block")
        for first, codes, scales in self.raw_blocks(checkpoint):
            for k in range(0, len(codes), size):
                part = slice(k, k + size)
                yield first + k, self._decoded(codes[part], None if scales is None else scales[part])

    def _decoded(self, codes: npt.NDArray[Any], scales: npt.NDArray[np.float32] | None) -> Tensor:
        import torch

        from stepinfluence.store.codecs import decode

        values = decode(codes, scales, self.manifest.dtype)
        if self.per_step and values.shape[1] < self.steps:
            values = torch.nn.functional.pad(values, (0, 0, 0, self.steps - values.shape[1]))
        return values

    def _within(
        self, checkpoint: int, rows: Sequence[int] | slice | None
    ) -> tuple[npt.NDArray[np.int64], Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any], dict[str, npt.NDArray[Any]]]]]:
        """The numbers of rows, and shard by shard: their places among these, in the shard, and the shard's arrays."""
        wanted = numbers_of(rows, len(self))
        shards = wanted // self.manifest.shard_rows

        def parts() -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any], dict[str, npt.NDArray[Any]]]]:
            for shard in np.unique(shards):
                (places,) = np.nonzero(shards == shard)
                within = wanted[places] - int(shard) * self.manifest.shard_rows
                yield places, within, self._arrays(checkpoint, int(shard))

        return wanted, parts()

    def values(self, checkpoint: int = 0, rows: Sequence[int] | slice | None = None) -> Tensor:
        """Values of :meth:`features` alone, float32 ``([rows], [steps,] D')``: ids, of which each is read from a file,
        are not.

        Raises:
            IndexError, StoreError: as for :meth:`features`.
        """
        wanted, parts = self._within(checkpoint, rows)
        values = self._zeros(len(wanted))
        for places, within, arrays in parts:
            self._fill(values, places, within, arrays)
        return values

    def _zeros(self, rows: int) -> Tensor:
        import torch

        return torch.zeros(*((rows, self.steps) if self.per_step else (rows,)), self.width)

    def _fill(self, values: Tensor, places: npt.NDArray[Any], within: npt.NDArray[Any], arrays: Any) -> None:
        for k in range(0, len(places), 256):
            part, chosen = places[k : k + 256], within[k : k + 256]
            scales = arrays["scales"][chosen] if "scales" in arrays else None
            values[part] = self._decoded(arrays["values"][chosen], scales)

    def features(
        self, checkpoint: int = 0, rows: Sequence[int] | slice | None = None, *, numbered: bool = False
    ) -> Features:
        """Features of all rows, or of some in the order given, decoded and in memory.

        Failed rows come with zero features and a NaN loss (:attr:`valid` tells).

        Args:
            numbered: give the rows' numbers for ids, which are then not read.

        Raises:
            IndexError: a row that the store does not have.
            StoreError: a shard is missing or damaged.
        """
        import torch

        from stepinfluence.attribution.features import Features

        wanted, parts = self._within(checkpoint, rows)
        values = self._zeros(len(wanted))
        losses = np.zeros(len(wanted), "<f4")
        steps, lengths = np.zeros(len(wanted), "<i8"), np.zeros(len(wanted), "<i8")
        for places, within, arrays in parts:
            self._fill(values, places, within, arrays)
            losses[places], steps[places] = arrays["losses"][within], arrays["steps"][within]
            if self.per_step:
                lengths[places] = arrays["lengths"][within]
        ids = tuple(wanted.tolist()) if numbered else tuple(self.ids) if rows is None else None
        return Features(
            values=values,
            losses=torch.from_numpy(losses),
            steps=torch.from_numpy(steps),
            lengths=torch.from_numpy(lengths) if self.per_step else None,
            ids=tuple(self._table[int(row)].id for row in wanted) if ids is None else ids,
            space=self.checkpoints[checkpoint].space,
            step_labels=self.step_labels,
            stored_as=self.manifest.dtype,
        )

    # ------------------------------------------------------------------------------------------------------------
    # What it can be compared with

    def require_comparable(self, other: Store) -> None:
        """Raise unless scores of this store's rows and another's mean something.

        Raises:
            FeatureMismatchError: model, checkpoints, etas, columns, sketches, weights or metric differ (says which).
        """
        ours, theirs = self.manifest, other.manifest
        if ours.model and theirs.model and ours.model != theirs.model:
            raise FeatureMismatchError(
                f"{other.path}: made with another model than {self.path}; featurize both with one"
            )
        if len(ours.checkpoints) != len(theirs.checkpoints):
            raise FeatureMismatchError(
                f"{other.path}: has {len(theirs.checkpoints)} checkpoints, {self.path} has {len(ours.checkpoints)}; "
                "featurize both at the same ones"
            )
        for k, (a, b) in enumerate(zip(ours.checkpoints, theirs.checkpoints, strict=True)):
            try:
                a.space.require_equal(b.space)
            except FeatureMismatchError as error:
                raise FeatureMismatchError(f"{other.path}: checkpoint {k} ({b.name}): {error}") from None
            if a.eta != b.eta:
                raise FeatureMismatchError(
                    f"{other.path}: checkpoint {k} ({b.name}) has eta {b.eta}, in {self.path} it has {a.eta}"
                )

    def require_capture(self, capture: Capture | ExactCapture) -> int:
        """The checkpoint of the store at whose weights a capture's model is.

        Raises:
            FeatureMismatchError: the model is another, or at no checkpoint's weights, or columns, sketches or metric
                differ (says which).
        """
        from stepinfluence.store.models import checkpoint_of, model_fingerprint

        if self.manifest.model and model_fingerprint(capture.model) != self.manifest.model:
            raise FeatureMismatchError(f"{self.path}: made with another model (names, shapes or dtypes differ)")
        space = checkpoint_of(capture, "present", 1.0).space
        matching = [k for k, c in enumerate(self.checkpoints) if c.space.weights == space.weights]
        whole = [k for k in matching if self.checkpoints[k].space.model_weights in ("", space.model_weights)]
        chosen = (whole or matching or [0])[0]
        self.checkpoints[chosen].space.require_equal(space)
        return chosen
