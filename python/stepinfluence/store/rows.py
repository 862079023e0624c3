"""Rows of a store by number and by id, read one line at a time."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from stepinfluence.errors import StoreError
from stepinfluence.store.manifest import Manifest
from stepinfluence.store.shards import RowId, RowInfo, row_from_bytes, rows_path

LINE_LIMIT = 1 << 26
"""Bytes of one row's text, metadata and tokens that are read, at most."""


def numbers_of(rows: Sequence[int] | slice | None, count: int) -> npt.NDArray[np.int64]:
    """The numbers of some of ``count`` rows, in the order given; None for all.

    Raises:
        IndexError: they are no whole numbers, or there are no such rows.
    """
    if rows is None or isinstance(rows, slice):
        return np.arange(count)[slice(None) if rows is None else rows]
    given = np.asarray(rows)
    if given.ndim != 1 or (given.size and (given.dtype.kind not in "iu" or given.min() < 0 or given.max() >= count)):
        raise IndexError(f"rows: got {rows!r}; give numbers from 0 to {count - 1}")
    return given.astype(np.int64)


@dataclass(frozen=True)
class StoredRow:
    """A row of a store.

    Attributes:
        row: its number: the example's position in the dataset.
        id: the user's.
        text, metadata: what was given with it; None and empty if nothing was.
        tokens: the text of each token; None if they were not given.
    """

    row: int
    id: RowId
    text: str | None
    metadata: dict[str, Any]
    tokens: tuple[str, ...] | None = None


class RowTable:
    """Rows by number. Keeps where each line starts (8 bytes a row, of shards that were touched), and no line."""

    def __init__(self, store: Path, manifest: Manifest) -> None:
        self._store, self._manifest = store, manifest
        self._starts: dict[int, npt.NDArray[np.int64]] = {}
        self._by_id: dict[RowId, int] | None = None

    def _line_starts(self, shard: int) -> npt.NDArray[np.int64]:
        """Offsets of the shard's lines, and of the end of the last."""
        if shard not in self._starts:
            path, expected = rows_path(self._store, shard), len(self._manifest.rows_of(shard))
            starts, place = [np.zeros(1, np.int64)], 0
            try:
                with path.open("rb") as file:
                    while chunk := file.read(1 << 20):
                        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + place + 1
                        starts.append(ends.astype(np.int64))
                        place += len(chunk)
            except FileNotFoundError:
                raise StoreError(f"{path}: no such rows; the store is incomplete (featurize again to resume)") from None
            found = np.concatenate(starts)
            if len(found) != expected + 1 or found[-1] != place:
                raise StoreError(f"{path}: damaged: {len(found) - 1} lines where {expected} rows are expected")
            self._starts[shard] = found
        return self._starts[shard]

    def __getitem__(self, row: int) -> StoredRow:
        manifest = self._manifest
        if isinstance(row, bool) or not isinstance(row, int | np.integer):
            raise TypeError(f"row: got {type(row).__name__} {row!r}; give a whole number")
        if not 0 <= row < manifest.n_rows:
            raise IndexError(f"row: got {row}; the store has rows 0 to {manifest.n_rows - 1}")
        shard, k = divmod(row, manifest.shard_rows)
        starts = self._line_starts(shard)
        with rows_path(self._store, shard).open("rb") as file:
            file.seek(int(starts[k]))
            line = file.read(min(LINE_LIMIT, int(starts[k + 1] - starts[k])))
        return self._stored(row, line)

    def _stored(self, row: int, line: bytes) -> StoredRow:
        info: RowInfo = row_from_bytes(f"{rows_path(self._store, row // self._manifest.shard_rows)}: row {row}", line)
        tokens = None if info.tokens is None else tuple(info.tokens)
        return StoredRow(row, info.id, info.text, dict(info.metadata or {}), tokens)

    def of_shard(self, shard: int) -> list[StoredRow]:
        """All rows of a shard."""
        self._line_starts(shard)
        with rows_path(self._store, shard).open("rb") as file:
            return [self._stored(row, file.readline()) for row in self._manifest.rows_of(shard)]

    def __iter__(self) -> Iterator[StoredRow]:
        for shard in range(self._manifest.n_shards):
            yield from self.of_shard(shard)

    def find(self, id: RowId) -> int:  # noqa: A002  # the field's name
        """The row with an id; the first call reads all rows.

        Raises:
            StoreError: there is none, or more than one.
        """
        if self._by_id is None:
            by_id: dict[RowId, int] = {}
            for row in self:
                by_id[row.id] = -1 if row.id in by_id else row.row
            self._by_id = by_id
        # Numbers on a command line are text.
        key = id if id in self._by_id else int(id) if isinstance(id, str) and id.isdecimal() else id
        if key not in self._by_id:
            texts = [str(one) for one in islice(self._by_id, 10_000)]  # some are enough
            near = difflib.get_close_matches(str(key), texts, 3) or texts[:3]
            among = f"there are {len(self._by_id):,}, such as {', '.join(near)}" if near else "it is empty"
            raise StoreError(f"id: no row with id {id!r} in {self._store}; {among}")
        if self._by_id[key] < 0:
            raise StoreError(f"id: {id!r} is the id of several rows of {self._store}; use row numbers")
        return self._by_id[key]

    def matching(self, find: str, most: int) -> list[int]:
        """The first rows, ``most`` at most, whose id or text contains ``find`` (case does not matter), in order."""
        wanted = find.casefold()
        quoted = json.dumps(wanted, ensure_ascii=False)[1:-1]  # as it stands in a line
        found: list[int] = []
        for shard in range(self._manifest.n_shards):
            content, first = self._bytes_of(shard), self._manifest.rows_of(shard).start
            folded = content.decode(errors="replace").casefold()
            # Lines with halves of characters are written in ASCII altogether.
            if quoted not in folded and "\\u" not in folded:
                continue
            lines = content.split(b"\n")
            for place, line in enumerate(folded.split("\n")):
                if quoted not in line and "\\u" not in line:
                    continue
                row = self._stored(first + place, lines[place])
                if wanted in str(row.id).casefold() or wanted in (row.text or "").casefold():
                    found.append(row.row)
                    if len(found) >= most:
                        return found
        return found

    def _bytes_of(self, shard: int) -> bytes:
        self._line_starts(shard)
        return rows_path(self._store, shard).read_bytes()


class RowIds(Sequence[RowId]):
    """The ids of a store's rows, read when asked for."""

    def __init__(self, table: RowTable, length: int) -> None:
        self._table, self._length = table, length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> RowId: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RowId, ...]: ...
    def __getitem__(self, index: int | slice) -> RowId | tuple[RowId, ...]:
        if isinstance(index, slice):
            return tuple(self._table[row].id for row in range(*index.indices(self._length)))
        return self._table[index + self._length if index < 0 else index].id

    def __iter__(self) -> Iterator[RowId]:
        return (row.id for row in self._table)
