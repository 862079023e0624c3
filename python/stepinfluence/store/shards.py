"""One shard: a range of rows at one checkpoint, in three files.

    rows/shard-00000003.jsonl         one JSON object a row: ``id``; ``text``, ``metadata`` and ``tokens`` where given
    c000/shard-00000003.safetensors   values, scales (fp16 and int8), losses, steps, lengths (per step)
    c000/shard-00000003.json          the commit record, written last: a shard exists exactly when its record does

File names follow from the numbers of checkpoint and shard. Nothing that a file says is ever taken for a path.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from stepinfluence.errors import StoreError
from stepinfluence.files import parse_json, read_sealed
from stepinfluence.store.dtypes import NUMPY_DTYPES, SCALED
from stepinfluence.store.manifest import MAX_STEPS, Manifest

TIMES = "times.jsonl"
"""Seconds that shards took, one line each: a log beside the store, no part of it."""

RowId: TypeAlias = str | int
RECORD_LIMIT = 1 << 28
RECORD_NAME = re.compile(r"shard-([0-9]{8})\.json")
HEADER_LIMIT = 1 << 20
SAFETENSORS_NAMES = {"<f4": "F32", "<f2": "F16", "<u2": "BF16", "i1": "I8", "<i4": "I32"}


@dataclass(frozen=True)
class RowInfo:
    """What is known of a row whatever the checkpoint: the user's id, and text, metadata and the text of each token
    where there are any."""

    id: RowId
    text: str | None = None
    metadata: Mapping[str, str | int | float | bool | None] | None = None
    tokens: Sequence[str] | None = None


@dataclass(frozen=True)
class FailedRow:
    """A row whose example has no features, and why. It is stored with zero features and a NaN loss."""

    row: int
    reason: str


def rows_path(store: Path, shard: int) -> Path:
    return store / "rows" / f"shard-{shard:08d}.jsonl"


def values_path(store: Path, checkpoint: int, shard: int) -> Path:
    return store / f"c{checkpoint:03d}" / f"shard-{shard:08d}.safetensors"


def record_path(store: Path, checkpoint: int, shard: int) -> Path:
    return values_path(store, checkpoint, shard).with_suffix(".json")


def written_shards(store: Path, checkpoint: int, manifest: Manifest) -> list[int]:
    """Numbers of a checkpoint's shards that have a record, in order: what is there, not what a manifest claims."""
    folder = record_path(store, checkpoint, 0).parent
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = (int(match[1]) for name in names if (match := RECORD_NAME.fullmatch(name)))
    return sorted(shard for shard in found if shard < manifest.n_shards)


def rows_to_bytes(rows: Sequence[RowInfo]) -> bytes:
    """JSON lines of rows.

    Raises:
        StoreError: an id is neither text nor a whole number, or something cannot be written as JSON (names the id).
    """
    lines = []
    for row in rows:
        if type(row.id) not in (str, int):
            raise StoreError(f"rows: got an id of type {type(row.id).__name__} ({row.id!r}); use text or whole numbers")
        fields: dict[str, Any] = {"id": row.id}
        if row.text is not None:
            fields["text"] = row.text
        if row.metadata:
            fields["metadata"] = dict(row.metadata)
        if row.tokens is not None:
            fields["tokens"] = list(row.tokens)
        try:
            try:
                line = json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()
            except UnicodeEncodeError:  # lone surrogates, as broken tokenizations give them
                line = json.dumps(fields, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise StoreError(f"rows: {row.id!r}: its metadata cannot be written as JSON ({error})") from error
        lines.append(line)
    return b"".join(line + b"\n" for line in lines)


def row_from_bytes(name: str, line: bytes) -> RowInfo:
    """The inverse of :func:`rows_to_bytes` for one line; ``name`` says where it stands.

    Raises:
        StoreError: the line is not one that it writes.
    """
    fields = parse_json(name, line)
    if not isinstance(fields, dict) or type(fields.get("id")) not in (str, int):
        raise StoreError(f"{name}: damaged: no row with an id")
    text, metadata, tokens = fields.get("text"), fields.get("metadata"), fields.get("tokens")
    if not isinstance(text, str | None) or not isinstance(metadata, dict | None) or not _is_tokens(tokens):
        raise StoreError(f"{name}: damaged: text, metadata or tokens of a wrong type")
    return RowInfo(fields["id"], text, metadata, None if tokens is None else tuple(tokens))


def _is_tokens(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(token, str) for token in value))


@dataclass(frozen=True)
class Record:
    """A shard's commit record.

    Attributes:
        manifest: digest of the store's manifest.
        machine: what the last bits of its values depend on (:func:`stepinfluence.machine.arithmetic`).
        steps: length of the step axis of the shard's values; 0 where they are summed over steps.
        step_labels: names of the steps of the longest example.
        files: size in bytes and SHA-256 of the shard's files, under ``"values"`` and ``"rows"``.
    """

    checkpoint: int
    shard: int
    manifest: str
    machine: str
    steps: int
    step_labels: tuple[str, ...]
    failed: tuple[FailedRow, ...]
    files: Mapping[str, tuple[int, str]]

    def same_shard(self, other: Record) -> bool:
        """Whether two records are of the same bytes, whichever machine they were made on."""
        return dict(self.files) == dict(other.files) and self.failed == other.failed

    def content(self, manifest: Manifest, ids: Mapping[int, RowId]) -> dict[str, Any]:
        """As JSON values; ``ids`` of the failed rows, for whoever reads the file."""
        rows = manifest.rows_of(self.shard)
        return {
            "manifest": self.manifest,
            "machine": self.machine,
            "checkpoint": self.checkpoint,
            "shard": self.shard,
            "rows": [rows.start, rows.stop],
            "steps": self.steps,
            "step_labels": list(self.step_labels),
            "failed": [{"row": f.row, "id": ids[f.row], "reason": f.reason} for f in self.failed],
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in self.files.items()},
        }


def read_record(store: Path, manifest: Manifest, digest: str, checkpoint: int, shard: int) -> Record:
    """The record of a shard of a store; ``digest`` is the manifest's, which takes long to compute for every shard.

    Raises:
        StoreError: it is damaged, or another store's.
    """
    path = record_path(store, checkpoint, shard)
    content = read_sealed(path, RECORD_LIMIT)
    if content.get("manifest") != digest:
        raise StoreError(f"{path}: belongs to a store with another manifest")
    rows = manifest.rows_of(shard)
    try:
        failed = tuple(FailedRow(f["row"], f["reason"]) for f in content["failed"])
        record = Record(
            checkpoint=content["checkpoint"],
            shard=content["shard"],
            manifest=digest,
            machine=content["machine"],
            steps=content["steps"],
            step_labels=tuple(content["step_labels"]),
            failed=failed,
            files={name: (f["bytes"], f["sha256"]) for name, f in content["files"].items()},
        )
        wrong = (
            (record.checkpoint, record.shard, content["rows"]) != (checkpoint, shard, [rows.start, rows.stop])
            or set(record.files) != {"values", "rows"}
            or not all(type(f.row) is int and f.row in rows and isinstance(f.reason, str) for f in failed)
            or not all(type(size) is int and isinstance(sha, str) for size, sha in record.files.values())
            or not isinstance(record.machine, str)
            or type(record.steps) is not int
            or not (0 <= record.steps <= MAX_STEPS)
            or not all(isinstance(label, str) for label in record.step_labels)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path}: not a valid record ({error})") from error
    if wrong:
        raise StoreError(f"{path}: not a valid record of checkpoint {checkpoint}, shard {shard}")
    return record


def expected_arrays(manifest: Manifest, record: Record) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every array of a shard."""
    n = len(manifest.rows_of(record.shard))
    lead = (n, record.steps) if manifest.per_step else (n,)
    arrays = {
        "values": (str(NUMPY_DTYPES[manifest.dtype]), (*lead, manifest.width)),
        "losses": ("<f4", (n,)),
        "steps": ("<i4", (n,)),
    }
    if manifest.dtype in SCALED:
        arrays["scales"] = ("<f4", lead)
    if manifest.per_step:
        arrays["lengths"] = ("<i4", (n,))
    return arrays


def map_arrays(path: Path, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a safetensors file, memory-mapped: nothing is read before it is used.

    Writing to them changes the process's own copy of a page, never the file.

    Raises:
        StoreError: the file does not hold exactly these.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else HEADER_LIMIT + 1
            if length > min(HEADER_LIMIT, size - 8):
                raise StoreError(f"{path}: damaged: no safetensors header")
            header = parse_json(str(path), file.read(length))
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise StoreError(f"{path}: could not be read ({error.strerror or error})") from error
    found: dict[str, npt.NDArray[Any]] = {}
    if not isinstance(header, dict) or set(header) - {"__metadata__"} != set(arrays):
        raise StoreError(f"{path}: damaged: not the arrays that its record tells of")
    for name, (dtype, shape) in arrays.items():
        entry = header[name]
        count = math.prod(shape)
        need = count * np.dtype(dtype).itemsize
        try:
            start, stop = entry["data_offsets"]
            fits = (
                (entry["dtype"], entry["shape"]) == (SAFETENSORS_NAMES[dtype], list(shape))
                and type(start) is int
                and 0 <= start <= stop <= size - 8 - length
                and stop - start == need
            )
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise StoreError(f"{path}: damaged: {name} is not {dtype} of shape {shape}")
        found[name] = np.frombuffer(mapped, dtype=dtype, count=count, offset=8 + length + start).reshape(shape)
    return found
