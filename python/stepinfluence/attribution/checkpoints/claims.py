"""Whether a PyTorch file claims more than it holds, before any of it is allocated.

The pickles in a file are gone through with stand-ins for everything that they name: nothing of theirs is imported,
called or allocated. Storages must be as long as the bytes that are there for them, and tensors must lie within them.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PICKLE_LIMIT = 1 << 30
"""Bytes of a file's pickle, without its tensors, that are looked at."""

LEGACY_PICKLES = 5
"""Pickles at the head of a file in the format before torch 1.6: magic number, version, system, content, keys."""

ITEM_SIZES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexDouble": 16, "ComplexFloat": 8,
}  # fmt: skip
"""Bytes of an element, by the name of the storage's type; others have one at least."""

REBUILT = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_qtensor")
"""Functions whose first arguments are storage, offset, size and stride."""


@dataclass
class _Storage:
    count: int


class _StandIn(dict[Any, Any]):
    """Stands in for an object that a pickle makes; takes whatever is put into it, and keeps nothing else."""

    named = ""

    def __new__(cls, *arguments: Any, **_: Any) -> Any:
        if cls.named in REBUILT and len(arguments) >= 4 and isinstance(arguments[0], _Storage):
            _check_view(arguments[0], *arguments[1:4])
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be a key

    def __setstate__(self, state: object) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _StandIn:
        return _StandIn()

    def append(self, value: object) -> None:
        """Nothing is kept."""

    def extend(self, values: object) -> None:
        """Nothing is kept."""

    def add(self, value: object) -> None:
        """Nothing is kept."""


class _Reader(pickle._Unpickler):  # the C one takes memory for whatever number a memo's entry has
    """Reads a pickle without anything that it names."""

    def __init__(self, file: IO[bytes], limit: int, held: Callable[[str], int]) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogatepass")
        self._limit, self._held = limit, held

    def find_class(self, module: str, name: str) -> Any:  # the interface
        """Nothing is imported."""
        if name in ("bytearray", "bytes"):
            return self._bytes
        return type("StandIn", (_StandIn,), {"named": name})

    def _bytes(self, *arguments: Any) -> _StandIn:
        if any(isinstance(size, int) and size > self._limit for size in arguments):
            raise ValueError(f"it claims {max(arguments)} bytes, the file has {self._limit}")
        return _StandIn()

    def persistent_load(self, pid: Any) -> Any:
        """A storage: ``("storage", type, key, location, count[, view])``."""
        if not isinstance(pid, tuple) or len(pid) < 5 or not isinstance(pid[4], int):
            return _StandIn()
        kind, count = getattr(pid[1], "named", "").removesuffix("Storage"), pid[4]
        if count < 0 or count * ITEM_SIZES.get(kind, 1) > self._held(str(pid[2])):
            raise ValueError(f"it claims {count} elements of a tensor of which it has {self._held(str(pid[2]))} bytes")
        return _Storage(count)


def _check_view(storage: _Storage, offset: Any, size: Any, stride: Any) -> None:
    numbers = [offset, *size, *stride]
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(size) != len(stride):
        raise ValueError("a tensor of it has no sizes and strides")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.count:
        raise ValueError(f"a tensor of it reaches to element {last} of {storage.count}")


def check_claims(path: Path) -> None:
    """Raise unless everything that a PyTorch file claims is in it.

    Raises:
        Exception: of any kind, if it is damaged, or claims more.
    """
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if sum(entry.file_size for entry in entries.values()) > size:
                raise ValueError(f"its parts claim more bytes than the file has ({size})")
            _check_archive(archive, entries, size)
        return
    with path.open("rb") as file:
        for _ in range(LEGACY_PICKLES):  # a file of the oldest format ends earlier, and torch refuses it
            _Reader(file, size, lambda key: size).load()


def _check_archive(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], size: int) -> None:
    found = [name for name in entries if name.endswith("/data.pkl")]
    if len(found) != 1 or entries[found[0]].file_size > PICKLE_LIMIT:
        raise ValueError("no PyTorch archive (no data.pkl of a usual size in it)")
    stem = found[0].removesuffix("data.pkl")

    def held(key: str) -> int:
        return entries[f"{stem}data/{key}"].file_size

    _Reader(io.BytesIO(archive.read(found[0])), size, held).load()
