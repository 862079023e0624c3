"""Whether a run's folder was written here, by this user: only then is the project file that it names run unasked.

``RUN/.written-here`` is a code over the places of the run and of its project file, under a key of this user on this
machine. A folder that was copied, moved, or made by somebody else has none that fits.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

import typer

from stepinfluence.errors import StoreError
from stepinfluence.files import write_bytes

MARK = ".written-here"
KEY_BYTES = 32


def mark(run: Path, project: Path) -> None:
    """Note that a run was written here. Nothing is noted where this user's key cannot be kept: one is asked again."""
    with contextlib.suppress(OSError, StoreError):
        content = _code(run, project, _key(make=True))
        path = run / MARK
        if not path.is_file() or path.read_bytes() != content:
            write_bytes(path, content)


def is_written_here(run: Path, project: Path) -> bool:
    """Whether :func:`mark` was called for this run at this place, with this project file."""
    with contextlib.suppress(OSError):
        with (run / MARK).open("rb") as file:
            found = file.read(1024)
        return hmac.compare_digest(found, _code(run, project, _key(make=False)))
    return False


def _code(run: Path, project: Path, key: bytes) -> bytes:
    places = b"\0".join(os.fsencode(path.resolve()) for path in (run, project))
    return hmac.new(key, places, hashlib.sha256).hexdigest().encode() + b"\n"


def _key(*, make: bool) -> bytes:
    """This user's key, made at the first run.

    Raises:
        OSError: there is none, or it cannot be kept.
    """
    path = Path(typer.get_app_dir("sdi")) / "key"
    if make and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError):  # another worker makes it
            aside = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
            aside.touch(mode=0o600)
            aside.write_bytes(secrets.token_bytes(KEY_BYTES))
            try:
                path.hardlink_to(aside)  # whole, and only if there is none
            finally:
                aside.unlink()
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise OSError(f"{path} is no key")
    return key
