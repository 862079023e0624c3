"""Checking stores and putting them together: :func:`verify`, :func:`merge`."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from stepinfluence.errors import StoreError
from stepinfluence.files import file_digest, write_atomically, write_bytes
from stepinfluence.progress import tqdm
from stepinfluence.store.manifest import MANIFEST, Manifest
from stepinfluence.store.reader import Store
from stepinfluence.store.rows import RowTable
from stepinfluence.store.shards import (
    TIMES,
    Record,
    expected_arrays,
    map_arrays,
    read_record,
    record_path,
    rows_path,
    values_path,
    written_shards,
)
from stepinfluence.writers import ASIDE

SHARD_NAME = re.compile(r"shard-([0-9]{8})\.(jsonl|safetensors|json)")

MISSING_LINES = 100
"""Shards of a checkpoint that are named if they are missing."""


def verify(path: str | Path, *, progress: bool = False) -> list[str]:
    """Every problem of a store, one line each; none if it is whole and as it was written.

    Reads every byte. Finds changed bytes (in values, rows, records and the manifest), missing shards and files, files
    that are no part of the store, and what killed writers left behind. ``times.jsonl``, a log, is not looked into.

    Raises:
        StoreError: there is no store, or its manifest is damaged: then nothing else can be checked.
    """
    path = Path(path)
    manifest = Manifest.read(path)
    digest, table = manifest.digest, RowTable(path, manifest)
    problems = []
    rows_seen: dict[int, str] = {}
    shards = [(k, s) for k in range(len(manifest.checkpoints)) for s in written_shards(path, k, manifest)]
    problems += _missing(path, manifest, shards)
    for checkpoint, shard in tqdm(shards, desc="verify", unit="shard", delay=2, disable=not progress):
        files = {"rows": rows_path(path, shard), "values": values_path(path, checkpoint, shard)}
        try:
            record = read_record(path, manifest, digest, checkpoint, shard)
            for name, file in files.items():
                if not file.is_file():
                    raise StoreError(f"{file}: missing")
                found = rows_seen[shard] if name == "rows" and shard in rows_seen else file_digest(file)
                if name == "rows":
                    rows_seen[shard] = found
                if found != record.files[name][1]:
                    raise StoreError(f"{file}: damaged: its bytes do not fit the checksum in the shard's record")
            map_arrays(files["values"], expected_arrays(manifest, record))
            if checkpoint == 0:
                table.of_shard(shard)
        except (StoreError, OSError) as error:
            problems.append(str(error))
    return problems + list(_foreign(path, manifest))


def _missing(path: Path, manifest: Manifest, shards: Sequence[tuple[int, int]]) -> list[str]:
    """A line for each shard that was not written, up to :data:`MISSING_LINES` of a checkpoint, and how many more."""
    problems = []
    for checkpoint in range(len(manifest.checkpoints)):
        there = {shard for k, shard in shards if k == checkpoint}
        lacking = manifest.n_shards - len(there)
        named = itertools.islice((s for s in range(manifest.n_shards) if s not in there), MISSING_LINES)
        problems += [f"{record_path(path, checkpoint, s)}: missing: the shard was not written" for s in named]
        if lacking > MISSING_LINES:
            problems.append(
                f"{path}: {lacking - MISSING_LINES:,} more shards of checkpoint {checkpoint} were not written"
            )
    return problems


def _foreign(path: Path, manifest: Manifest) -> Iterator[str]:
    folders = {record_path(path, k, 0).parent for k in range(len(manifest.checkpoints))}
    for file in sorted(path.rglob("*")):
        if file in (path / MANIFEST, path / TIMES) or (file.is_dir() and not file.is_symlink()):
            continue
        shard = SHARD_NAME.fullmatch(file.name)
        parts = ("jsonl",) if file.parent == rows_path(path, 0).parent else ("safetensors", "json")
        placed = file.parent in folders or len(parts) == 1
        if placed and shard is not None and shard[2] in parts and int(shard[1]) < manifest.n_shards:
            continue
        what = "left behind by a killed writer; the next command that writes here removes it"
        left = file.name.startswith(ASIDE)
        yield f"{file}: {what if left else 'no part of the store'}"


def merge(paths: Sequence[str | Path], out: str | Path, *, link: bool = True, progress: bool = False) -> Store:
    """One store of the shards that several stores with one manifest hold.

    Args:
        paths: stores; where two hold a shard, it must be the same one.
        out: the merged store's folder: new, or a store with that manifest, to which shards are added.
        link: make hard links where the file system can, which takes no space; copies otherwise.
        progress: show a progress bar.

    Returns:
        The merged store, which may still be incomplete (:attr:`Store.complete`).

    Raises:
        StoreError: manifests differ (says where), a shard is damaged, or two stores hold different versions of one.
    """
    from stepinfluence.store.writer import StoreWriter  # verify needs no torch

    if not paths:
        raise ValueError("paths: got none; give the stores to merge")
    sources = [Path(p) for p in paths]
    manifest = Manifest.read(sources[0])
    for source in sources[1:]:
        difference = manifest.difference(Manifest.read(source))
        if difference is not None:
            raise StoreError(f"{source}: not a part of the same store as {sources[0]}: {difference}")
    StoreWriter.create(out, manifest)
    for source in sources:
        shards = [(k, s) for k in range(len(manifest.checkpoints)) for s in written_shards(source, k, manifest)]
        for checkpoint, shard in tqdm(shards, desc=f"merge {source.name}", unit="shard", delay=2, disable=not progress):
            record = read_record(source, manifest, manifest.digest, checkpoint, shard)
            _add_shard(source, Path(out), manifest, record, link=link)
    return Store.open(out)


def _add_shard(source: Path, out: Path, manifest: Manifest, record: Record, *, link: bool) -> None:
    checkpoint, shard = record.checkpoint, record.shard
    there = record_path(out, checkpoint, shard)
    if there.is_file():
        if not record.same_shard(read_record(out, manifest, record.manifest, checkpoint, shard)):
            raise StoreError(
                f"{source}: shard {shard} of checkpoint {checkpoint} is another one than the merged store has"
            )
        return
    pairs = {
        "rows": (rows_path(source, shard), rows_path(out, shard)),
        "values": (values_path(source, checkpoint, shard), values_path(out, checkpoint, shard)),
    }
    for name, (old, new) in pairs.items():
        if not old.is_file() or file_digest(old) != record.files[name][1]:
            raise StoreError(f"{old}: damaged: its bytes do not fit the checksum in the shard's record")
        if new.is_file() and file_digest(new) == record.files[name][1]:
            continue
        if name == "rows" and new.is_file():
            raise StoreError(f"{old}: other rows than the merged store has; the stores are of different datasets")
        write_atomically(new, lambda aside, old=old: _link_or_copy(old, aside, link=link))  # type: ignore[misc]
    write_bytes(there, record_path(source, checkpoint, shard).read_bytes())


def _link_or_copy(old: Path, new: Path, *, link: bool) -> None:
    if link:
        try:
            new.hardlink_to(old.resolve())  # a link to a symbolic link would be one that leads elsewhere
            return
        except OSError:  # another file system, or one without hard links
            pass
    shutil.copyfile(old, new)
