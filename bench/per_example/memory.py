"""Peak memory of one call, in a process that may not take more than a limit."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.capture import growth_mib

OUT_OF_MEMORY = "out of memory"


def peak(part: str, index: int, name: str, limit_gib: float) -> float | str | None:
    """MiB that a call adds at its peak, :data:`OUT_OF_MEMORY`, or None where the system does not tell.

    Raises:
        CalledProcessError: the call failed otherwise.
    """
    command = [sys.executable, "-m", "bench.per_example", "--peak-of", part, str(index), name]
    command += ["--limit-gib", str(limit_gib), "--threads", str(torch.get_num_threads())]
    # Large blocks go back to the system when freed (glibc): the resident set is what is in use, not what fragments.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout.strip()
    if printed == OUT_OF_MEMORY:
        return OUT_OF_MEMORY
    return None if printed == "None" else float(printed)


def print_peak(call: Callable[[], object], limit_gib: float) -> None:
    """What :func:`peak` reads, by the process that it starts."""
    _limit(limit_gib)
    try:
        call()  # one-time allocations of the libraries, and verification
        print(growth_mib(call))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        print(OUT_OF_MEMORY)


def _limit(gib: float) -> None:
    """This process's address space: what it has now, and so much more."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
