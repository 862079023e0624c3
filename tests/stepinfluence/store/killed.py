"""Writers that die on purpose; imported by the processes that the crash tests fork."""

from __future__ import annotations

import errno
import os
import pathlib
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import stores
import torch
from stepinfluence.store import Manifest

MANIFEST = stores.manifest(n_rows=22, per_step=True, dtype="int8")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def after(count: int, act: Callable[[], None], patch: Callable[[object, str, Any], None] = setattr) -> None:
    """Call ``act`` in place of the ``count``-th write, fsync or rename from now on; writes get half way first."""
    left = [count]

    def wrap(owner: Any, name: str, half: Callable[..., None] | None = None) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if half is not None:
                    half(*args)
                act()
            return original(*args, **kwargs)

        patch(owner, name, wrapped)

    def half_of_bytes(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])

    def half_of_arrays(arrays: Any, path: Path) -> None:
        half_of_bytes(path, safetensors.torch.save(arrays))

    wrap(os, "fsync")
    wrap(pathlib.Path, "replace")
    wrap(pathlib.Path, "write_bytes", half_of_bytes)
    wrap(safetensors.torch, "save_file", half_of_arrays)


def run(path: Path, log: Path, count: int, made: Manifest = MANIFEST) -> None:
    """Write a store, and be killed at the ``count``-th event (0: not at all)."""
    torch.set_num_threads(1)
    if count:
        after(count, die)
    stores.write(path, made, log)


def run_forever(path: Path, log: Path) -> None:
    """Write a store; for killing from outside."""
    torch.set_num_threads(1)
    while True:
        stores.write(path, MANIFEST, log)


def run_with_file_limit(path: Path, log: Path, limit: int) -> None:
    """Write a store where the system refuses to let any file grow beyond ``limit`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run(path, log, 0)
