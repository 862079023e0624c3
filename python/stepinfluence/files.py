"""Files that are there whole or not at all, and JSON that knows when it was changed.

A file is written aside under a name that tells its writer, fsynced and renamed; its folder is fsynced after it. So a
reader sees no half-written file, whenever a writer is killed or the disk fills up.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from stepinfluence.errors import StoreError
from stepinfluence.writers import aside, folder_aside, own_name, tidy

if TYPE_CHECKING:
    from torch import Tensor

SEAL = "sha256"
"""The field of a JSON file that holds the checksum of the others."""


def sync_folder(path: Path) -> None:
    """Make renames within a folder durable (where the system can open folders)."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a file aside, then put it at ``path`` durably.

    Raises:
        StoreError: the file could not be written (disk full, no permission); ``path`` is then as it was.
    """
    tidy(path.parent)
    made = aside(path)
    try:
        fill(made)
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"{own_name(path)}: could not be written ({reason(error)}); free some space or mend the folder, and rerun"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            made.unlink(missing_ok=True)


def hand_out(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a file that was asked for by name: whole or not at all, through a link to where it points,
    and straight into what is no file (``/dev/stdout``, a pipe).

    Raises:
        StoreError: it could not be written; a file that is there is then as it was.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        try:
            fill(path)
        except OSError as error:
            raise StoreError(f"{path}: could not be written ({reason(error)})") from error
    else:
        write_atomically(path.resolve() if path.is_symlink() else path, fill)


def save_torch(content: object, made: Path) -> None:
    """``torch.save`` within :func:`write_atomically`.

    Raises:
        OSError: it could not be written; torch has a RuntimeError for that.
    """
    import torch

    try:
        torch.save(content, made)
    except RuntimeError as error:
        raise OSError("the disk is full, or the file may not be that large") from error


def reason(error: Exception) -> str:
    """Why a file could not be read or written, without the names of files aside."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def write_bytes(path: Path, content: bytes) -> None:
    """:func:`write_atomically` of bytes."""
    write_atomically(path, lambda made: made.write_bytes(content))


def remove(path: Path) -> None:
    """Remove a file durably, if it is there.

    Raises:
        StoreError: it could not be removed.
    """
    try:
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"{path}: could not be removed ({reason(error)}); mend the folder, and rerun") from error


def save_tensors(tensors: dict[str, Tensor], made: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a file aside, within :func:`write_atomically`.

    safetensors has a file aside of its own, beside the one that it is asked for, whose name tells nothing: a writer
    that is killed would leave it behind for good. So it gets a folder, whose name tells the writer.
    """
    from safetensors.torch import save_file  # torch is not needed for anything else here

    folder = folder_aside(made)
    try:
        folder.mkdir()
        save_file(tensors, folder / made.name, metadata=metadata)
        (folder / made.name).replace(made)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder (and those above it) durably; one that exists is left as it is."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        raise StoreError(f"{path}: this folder could not be made ({reason(error)}); give another") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def canonical(content: Mapping[str, Any]) -> bytes:
    """The one way in which an object is written as JSON: keys in the given order, two spaces, a newline at the end."""
    return (json.dumps(content, indent=2, ensure_ascii=True, allow_nan=False) + "\n").encode()


def sealed(content: Mapping[str, Any]) -> bytes:
    """Canonical JSON of ``content`` with the checksum of that in a last field."""
    return canonical({**content, SEAL: hashlib.sha256(canonical(content)).hexdigest()})


def read_within(path: Path, limit: int) -> bytes:
    """A file's bytes; of one that is larger than ``limit`` one byte more. Takes memory for what the file has."""
    with path.open("rb") as file:
        return file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)


def _refused_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def parse_json(name: str, content: bytes) -> Any:
    """JSON that may come from anywhere.

    Raises:
        StoreError: it is not JSON (NaN, deep nesting and endless numbers included).
    """
    try:
        return json.loads(content.decode(), parse_constant=_refused_constant)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{name}: not readable JSON ({str(error) or type(error).__name__})") from error


def read_sealed(path: Path, limit: int) -> dict[str, Any]:
    """The content of a file written by :func:`sealed`, without its seal.

    Raises:
        StoreError: the file is missing, larger than ``limit`` bytes, no JSON object, or not as it was written.
    """
    try:
        raw = read_within(path, limit)
    except OSError as error:
        raise StoreError(f"{path}: could not be read ({error.strerror or error})") from error
    if len(raw) > limit:
        raise StoreError(f"{path}: larger than {limit} bytes, which no store writes; it is damaged or not a store's")
    content = parse_json(str(path), raw)
    if not isinstance(content, dict) or not isinstance(content.get(SEAL), str):
        raise StoreError(f"{path}: no {SEAL} field in it; it is damaged or not a store's")
    try:
        intact = raw == sealed({key: value for key, value in content.items() if key != SEAL})
    except (ValueError, RecursionError):  # lone surrogates, numbers beyond a float: readable, never written
        intact = False
    if not intact:
        raise StoreError(f"{path}: damaged or edited: its content does not fit its checksum")
    del content[SEAL]
    return content
