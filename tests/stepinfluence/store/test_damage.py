"""Damage is found, and what a file says is never trusted further than it can be checked."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed
import pytest
import stores
from stepinfluence import StoreError, writers
from stepinfluence.files import canonical, read_sealed, read_within, remove, sealed
from stepinfluence.store import Manifest, Store, StoreWriter, verify

Content = dict[str, Any]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stores.written(tmp_path_factory.mktemp("damage") / "s", stores.manifest(dtype="int8", per_step=True)).path


@pytest.fixture
def path(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "s"))


def problems(path: Path) -> list[str]:
    try:
        return verify(path)
    except StoreError as error:  # the manifest
        return [str(error)]


def test_verify_finds_nothing_in_a_good_store(path: Path) -> None:
    assert verify(path) == []


def test_verify_finds_any_flipped_bit(path: Path) -> None:
    """In every kind of file, first and last bytes and random ones."""
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and f.name != stores.TIMES]
    kinds = [path / "manifest.json", path / "rows/shard-00000001.jsonl", path / "c001/shard-00000002.json"]
    for file in [*kinds, path / "c000/shard-00000000.safetensors", random.choice(files)]:
        data = file.read_bytes()
        for place in {0, len(data) - 1, *(random.randrange(len(data)) for _ in range(12))}:
            changed = bytearray(data)
            changed[place] ^= 1 << random.randrange(8)
            file.write_bytes(changed)
            found = problems(path)
            assert found, f"{file.name}: byte {place} changed and nothing found"
            assert all(str(file) in line for line in found)
        file.write_bytes(data)
    assert verify(path) == []


def test_verify_finds_missing_cut_foreign_and_left_behind_files(path: Path) -> None:
    (path / "c000/shard-00000000.json").unlink()
    (path / "c000/shard-00000001.safetensors").unlink()
    values = path / "c001/shard-00000001.safetensors"
    values.write_bytes(values.read_bytes()[:-1])
    (path / "c001/notes.txt").write_text("hello")
    (path / "rows/.aside-12-shard-00000000.jsonl").write_text("")
    (path / "c009").symlink_to("/")
    found = "\n".join(verify(path))
    for line in (
        "c000/shard-00000000.json: missing: the shard was not written",
        "c000/shard-00000001.safetensors: missing",
        "c001/shard-00000001.safetensors: damaged",
        "c001/notes.txt: no part of the store",
        "left behind by a killed writer",
        "c009: no part of the store",
    ):
        assert line in found
    assert len(found.splitlines()) == 6
    with pytest.raises(StoreError, match=r"shard-00000001\.safetensors: damaged: the file is missing"):
        Store.open(path)


def test_a_shard_of_another_store_is_told_apart(path: Path, tmp_path: Path) -> None:
    other = stores.written(tmp_path / "other", stores.manifest(dtype="int8", per_step=True, loss="another")).path
    for name in ("c000/shard-00000000.json", "c000/shard-00000000.safetensors"):
        shutil.copy(other / name, path / name)
    assert "belongs to a store with another manifest" in verify(path)[0]
    with pytest.raises(StoreError, match="belongs to a store with another manifest"):
        Store.open(path)


def test_a_record_at_another_place_is_told_apart(path: Path) -> None:
    for suffix in ("json", "safetensors"):
        shutil.copy(path / f"c000/shard-00000000.{suffix}", path / f"c000/shard-00000002.{suffix}")
    with pytest.raises(StoreError, match="not a valid record of checkpoint 0, shard 2"):
        Store.open(path)


def test_finish_removes_what_was_left_behind(path: Path) -> None:
    before = stores.content(path)
    with subprocess.Popen(["true"]) as dead:  # noqa: S607
        pass
    days = 2 * 24 * 3600
    for age, name, stays in (
        (0, f".aside-{writers.host()}-{dead.pid}-00000000-shard-00000000.json", False),
        (days, f".aside-{writers.host()}-{os.getpid()}-00000000-shard-00000000.json", True),  # alive: this process
        (0, ".aside-ffffffff-1-00000000-shard-00000000.json", True),  # on another machine: it cannot be asked
        (days, ".aside-ffffffff-1-00000000-shard-00000000.json", False),
        (days, ".aside-0123456789abcdef-shard-00000000.json", False),  # as earlier versions named them
    ):
        left = path / "c000" / name
        left.write_text("half")
        os.utime(left, (time.time() - age,) * 2)
        for use in (StoreWriter.resume, lambda p: StoreWriter(p, Manifest.read(p)).finish()):
            use(path)
            assert left.exists() == stays
        left.unlink(missing_ok=True)
    assert stores.content(path) == before


def _set(key: str, value: Any) -> Callable[[Content], Content]:
    return lambda content: {**content, key: value}


def _block(**fields: Any) -> Callable[[Content], Content]:
    return lambda content: {**content, "blocks": [{**content["blocks"][0], **fields}, *content["blocks"][1:]]}


HOSTILE: dict[str, Callable[[Content], Content]] = {
    "no field": lambda content: {k: v for k, v in content.items() if k != "blocks"},
    "another format": _set("format", "sdi-store-9"),
    "more fields": _set("values_path", "../../etc/passwd"),
    "rows without end": _set("n_rows", 1 << 62),
    "more shards than there can be": lambda c: {**c, "n_rows": 1 << 40, "shard_rows": 1},
    "negative rows": _set("n_rows", -1),
    "rows that are no number": _set("n_rows", "14"),
    "rows that are true": _set("n_rows", True),
    "rows that are a float": _set("n_rows", 14.0),
    "no rows a shard": _set("shard_rows", 0),
    "a path for a dtype": _set("dtype", "../../x"),
    "a list for a dtype": _set("dtype", ["int8"]),
    "no checkpoints": _set("checkpoints", []),
    "checkpoints that are none": _set("checkpoints", [1, 2]),
    "too many checkpoints": lambda c: {**c, "checkpoints": c["checkpoints"] * 5000},
    "blocks that overlap": _block(stop=9),
    "blocks that go back": _block(start=8, stop=0),
    "blocks beyond all columns": _block(stop=1 << 60),
    "blocks without a name": _block(name=None),
    "a width that is not the blocks'": _set("width", 12),
    "a layout that is not the blocks'": _set("layout", "sum"),
    "steps that are many": _set("steps", 1 << 40),
    "an unknown hash family": _set("sketch", {"sizes": {}, "hashing": "md5", "seed": 0, "hash_format": ""}),
    "project that is a list": _set("project", [[1]]),
    "versions that are nested": _set("versions", {"torch": {"a": 1}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_manifest_that_lies_is_refused(path: Path, name: str) -> None:
    """With a seal that fits: made by an enemy, not by a bad disk."""
    content = json.loads((path / "manifest.json").read_bytes())
    del content["sha256"]
    (path / "manifest.json").write_bytes(sealed(HOSTILE[name](content)))
    with pytest.raises(StoreError, match=r"manifest\.json|sdi-store|: got|blocks|checkpoints"):
        Store.open(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"{}",
        b'{"format": "sdi-store-1", "sha256": "x"}',
        b'{"a": NaN, "sha256": ""}',
        b'{"a": ' + b"9" * 5000 + b', "sha256": ""}',
        b'{"a": 1e999, "sha256": ""}',
        b'{"a": "\\ud800", "sha256": ""}',
        b"[" * 200_000,
        b'{"a":' * 100_000,
    ],
)
def test_a_manifest_that_is_none_is_refused(path: Path, raw: bytes) -> None:
    (path / "manifest.json").write_bytes(raw)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        Store.open(path)


def test_a_store_of_an_earlier_version_says_what_to_do(path: Path) -> None:
    content = json.loads((path / "manifest.json").read_bytes())
    del content["sha256"]
    (path / "manifest.json").write_bytes(sealed({**content, "format": "sdi-store-1"}))
    with pytest.raises(StoreError, match=r"did not record the weights outside of the body; featurize again"):
        Store.open(path)


def test_a_manifest_that_claims_millions_of_shards_is_quickly_read(path: Path) -> None:
    """What is there is listed; what is claimed is not asked for one by one."""
    content = json.loads((path / "manifest.json").read_bytes())
    del content["sha256"]
    shutil.rmtree(path / "c000")
    shutil.rmtree(path / "c001")
    (path / "manifest.json").write_bytes(sealed({**content, "n_rows": 1 << 22, "shard_rows": 1}))
    began = time.process_time()
    store = Store.open(path)
    assert (store.missing_count, store.complete) == (2 << 22, False)
    assert "8388608 shards missing" in repr(store)
    problems = verify(path)
    assert sum("missing: the shard was not written" in line for line in problems) == 200
    assert sum("4,194,204 more shards of checkpoint" in line for line in problems) == 2
    assert time.process_time() - began < 10  # the goal for any input; asked one by one it takes minutes


def test_a_manifest_without_end_is_not_read(path: Path) -> None:
    with (path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no space
    with pytest.raises(StoreError, match="larger than"):
        Store.open(path)


def test_what_was_read_was_written_by_hand(path: Path) -> None:
    """The format is open: JSON with a checksum over the rest, which anyone can compute."""
    content = json.loads((path / "manifest.json").read_bytes())
    seal = content.pop("sha256")
    assert seal == hashlib.sha256(canonical(content)).hexdigest()
    assert Manifest.read(path) == stores.manifest(dtype="int8", per_step=True)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b'{"values": 1}',
        b'{"values": {"dtype": "I8", "shape": [4, 2, 11], "data_offsets": [0, 88]}}',
        b"ALL",
    ],
)
def test_a_shard_that_lies_about_its_arrays_is_refused(path: Path, header: bytes) -> None:
    file = path / "c000/shard-00000000.safetensors"
    size = file.stat().st_size
    if header == b"ALL":
        names = {"values": "I8", "losses": "F32", "steps": "I32", "lengths": "I32", "scales": "F32"}
        offsets = {"dtype": "F32", "shape": [4], "data_offsets": [-16, 1 << 62]}
        header = json.dumps({name: {**offsets, "dtype": kind} for name, kind in names.items()}).encode()
    file.write_bytes((struct.pack("<Q", len(header)) + header).ljust(size, b"\0")[:size])
    with pytest.raises(StoreError, match=r"shard-00000000\.safetensors: (damaged|not readable)"):
        Store.open(path).features()


def test_a_header_without_end_is_not_read(path: Path) -> None:
    file = path / "c000/shard-00000000.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60).ljust(file.stat().st_size, b"\0"))
    with pytest.raises(StoreError, match="no safetensors header"):
        Store.open(path).features()


@pytest.mark.parametrize("line", [b"{}", b'{"id": 1.5}', b'{"id": 1, "text": 3}', b'{"id": 1, "metadata": []}', b"x"])
def test_a_row_that_is_none_is_refused(path: Path, line: bytes) -> None:
    file = path / "rows/shard-00000000.jsonl"
    lines = file.read_bytes().splitlines()
    lines[1] = line.ljust(len(lines[1]))
    file.write_bytes(b"".join(part + b"\n" for part in lines))
    store = Store.open(path)
    assert store.row(0).id == "example 0"
    with pytest.raises(StoreError, match=r"shard-00000000.jsonl: row 1"):
        store.row(1)


def test_memory_is_taken_for_what_a_file_has(tmp_path: Path) -> None:
    """Not for what it may have."""
    (tmp_path / "a.json").write_bytes(sealed({"a": 1}))
    tracemalloc.start()
    assert read_sealed(tmp_path / "a.json", 1 << 40) == {"a": 1}
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1 << 20
    assert len(read_within(tmp_path / "a.json", 10)) == 11


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb", "a b"),
        ("a\r\x1b[2Jb", r"a \x1b[2Jb"),
        ("a\x85b", "a b"),
        ("a\u2028b", "a b"),
        ("a\ud800b", r"a\ud800b"),
        ("a\0b", r"a\x00b"),
        ("a\u202eb", r"a\u202eb"),
    ],
)
def test_an_error_is_one_line_whatever_it_names(name: str, shown: str) -> None:
    text = str(StoreError(f"{name}: é \u3000 is no store"))
    assert text == f"{shown}: é \u3000 is no store"
    assert text.splitlines() == [text]
    assert text.encode().decode() == text


def test_what_a_process_leaves_is_removed_on_its_way_out(tmp_path: Path) -> None:
    made = [writers.aside(tmp_path / name) for name in ("a", "b")]
    made[0].write_bytes(b"half")
    writers.folder_aside(made[1]).mkdir()
    (writers.folder_aside(made[1]) / "inside").write_bytes(b"half")
    (tmp_path / "whole").write_bytes(b"whole")
    writers.remove_own_leftovers()
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_what_cannot_be_removed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove(tmp_path / "not there")
    (tmp_path / "there").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: killed.disk_full())
        with pytest.raises(StoreError, match=r"there: could not be removed \(.*No space left"):
            remove(tmp_path / "there")
    remove(tmp_path / "there")
    assert not list(tmp_path.iterdir())
