"""The settings of glibc's allocator under which a process' resident memory is what is in use.

glibc raises the size from which it takes a block from the system and gives it back, to 32 MiB in the course of a pass.
Smaller tensors then come from a heap that cannot shrink around those that stay: with activation checkpointing, what
was freed lies between the states that are kept, and memory grows as if nothing had been checkpointed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Blocks from this many bytes are the system's again as soon as they are freed. Other allocators do not read it."""


def printed_by(command: Sequence[str]) -> str:
    """What a child process with the settings prints."""
    environment = {**os.environ, **SETTINGS}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def restart() -> None:
    """Run this command again in this process with the settings, which are read once, at its start; returns when it has
    them already."""
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **SETTINGS})  # noqa: S606  # the command that runs
