"""Who is writing: files aside that name their writer, what dead writers left behind, and a lock on a folder."""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from stepinfluence.errors import StoreError

ASIDE = ".aside-"
"""Start of the names of files that are still being written, or were when their writer was killed."""

LOCK = ".lock"
"""The file that is locked for as long as a command writes to a folder."""

ABANDONED_SECONDS = 24 * 3600
"""A file aside whose writer cannot be asked (it is, or was, on another machine) counts as left behind when it has not
been written to for this long."""

_recent: collections.deque[Path] = collections.deque(maxlen=64)
"""Names that :func:`aside` gave last; no thread is at more of them at a time."""

_tidied: set[Path] = set()
"""Folders in which :func:`tidy` has looked."""

_locks: list[_Lock] = []
"""Locks that this process has taken, or is about to."""

_OWNED = re.compile(re.escape(ASIDE) + r"(?P<host>[0-9a-f]{8})-(?P<process>\d+)-")


@functools.cache
def host() -> str:
    """Where process numbers mean what they mean here: this machine since it was started, and this container."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with contextlib.suppress(OSError):
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.blake2b(repr(facts).encode(), digest_size=4).hexdigest()


def aside(path: Path) -> Path:
    """A new name beside ``path`` for what is to become it; tells this process."""
    made = path.with_name(f"{ASIDE}{host()}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    _recent.append(made)
    return made


def own_name(path: Path) -> Path:
    """The path that a file aside is to become; another path as it is."""
    aside_name = _OWNED.match(path.name)
    return path.with_name(path.name[aside_name.end() :].partition("-")[2]) if aside_name else path


def remove_own_leftovers() -> None:
    """Remove what this process has left aside, and locks: for the way out after a signal, which may have come while it
    tidied."""
    while _locks:
        _locks[-1].release()
    for made in _recent:
        for path in (made, folder_aside(made)):
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def folder_aside(made: Path) -> Path:
    """The folder beside a file aside in which a library may write it, with files aside of its own."""
    return made.with_name(f"{made.name}.folder")


def remove_leftovers(folder: Path, *, within: bool = False) -> None:
    """Remove what writers that are gone left aside in a folder, and with ``within`` in all folders in it."""
    for parent, folders, names in os.walk(folder):
        for name in folders:
            if name.startswith(ASIDE) and _is_abandoned(Path(parent) / name):
                shutil.rmtree(Path(parent) / name, ignore_errors=True)
        for name in names:
            if name.startswith(ASIDE) and _is_abandoned(Path(parent) / name):
                with contextlib.suppress(OSError):
                    (Path(parent) / name).unlink(missing_ok=True)
        if not within:
            return


def tidy(folder: Path) -> None:
    """Remove what killed writers left aside in a folder that may be anybody's, the first time that this process writes
    there: else a training that is often killed fills it up."""
    if folder in _tidied:
        return
    _tidied.add(folder)
    with contextlib.suppress(OSError):  # no such folder: whoever writes will say so
        for entry in os.scandir(folder):
            path = Path(entry)
            if _OWNED.match(entry.name) and _is_abandoned(path):
                with contextlib.suppress(OSError):
                    shutil.rmtree(path) if entry.is_dir(follow_symlinks=False) else path.unlink(missing_ok=True)


def unknown_files(folder: Path, known: Collection[str]) -> list[str]:
    """Names in a folder that are neither known nor files aside, once what dead writers left there is removed."""
    remove_leftovers(folder)
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(p.name for p in there if p.name not in known and not p.name.startswith(ASIDE))


def _is_abandoned(path: Path) -> bool:
    owner = _OWNED.match(path.name)
    if owner is not None and owner["host"] == host() and sys.platform != "win32":
        return not _is_alive(int(owner["process"]))
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_SECONDS
    except OSError:  # finished or removed meanwhile
        return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # asks, and does nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other commands from writing to a folder meanwhile. The folder is made if it is not there, and removed again
    if it is empty at the end. The system lets a lock go when its process ends, however it ends.

    Raises:
        StoreError: another command is writing there (names its process and machine), or the folder cannot be written.
    """
    lock = _Lock(folder)
    _locks.append(lock)
    try:
        try:
            lock.take()
        except OSError as error:
            raise StoreError(
                f"{folder}: could not be written ({error.strerror or error}); give a folder that can"
            ) from error
        yield
    finally:
        lock.release()


class _Lock:
    """A folder's lock. A signal may strike anywhere, so letting go asks the system whose it is, not this object."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / LOCK
        self._made = not folder.is_dir()
        self._file: IO[str] | None = None

    def take(self) -> None:
        """Hold the lock, and tell who does.

        Raises:
            StoreError: another process holds it.
            OSError: the folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        while True:
            self._file = self._path.open("a+", encoding="utf-8")
            if not _lock(self._file):
                raise StoreError(
                    f"{self._folder}: another command is writing here ({_owner(self._file)}); wait for it or end it"
                )
            if _is_at(self._file, self._path):
                break
            self._file.close()  # its owner has just ended, and removed it
        self._file.truncate(0)
        self._file.write(json.dumps({"process": os.getpid(), "machine": socket.gethostname(), "since": time.time()}))
        self._file.flush()

    def release(self) -> None:
        """Let go, and leave nothing; done before, nothing more is done."""
        if self not in _locks:
            return
        with contextlib.suppress(OSError), self._open() as file:
            # While it is still locked: whoever opened it meanwhile finds it gone, and makes one anew.
            if _lock(file) and _is_at(file, self._path):
                self._path.unlink(missing_ok=True)
        if self._made:
            with contextlib.suppress(OSError):  # something came of it
                self._folder.rmdir()
        _locks.remove(self)

    def _open(self) -> IO[str]:
        """The lock's file, opened again where a signal struck as it was opened or closed.

        Raises:
            OSError: it is gone.
        """
        if self._file is None or self._file.closed:
            return self._path.open("r+", encoding="utf-8")
        return self._file


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[str]) -> bool:
    """Whether the lock is ours now. Also where the file system has no locks: there, nothing can be kept out."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 20)  # beyond the text, which stays readable
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def _owner(file: IO[str]) -> str:
    """Who holds a lock, in words."""
    try:
        file.seek(0)
        owner = json.loads(file.read(4096))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(owner["since"])))
        return f"process {int(owner['process'])} on {str(owner['machine'])[:80]}, since {since}"
    except (ValueError, KeyError, TypeError, OSError, OverflowError):  # it has just begun, and not told yet
        return "it has not told its process yet"
