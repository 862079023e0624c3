"""What a kept result says of where it comes from: machine, versions, commit, and how busy the machine was."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from stepinfluence.machine import LIMITS, cpu_flags, machine_facts, versions

SOURCES = Path(__file__).resolve().parent


class Provenance:
    """Made before a measurement begins; :meth:`finish` after it gives what to keep beside the figures."""

    def __init__(self) -> None:
        self._load = load_average()
        self._sources = checkout()  # at the start: the checkout may move on while something is measured
        self._began = time.time()

    def finish(self, command: str) -> dict[str, Any]:
        """Facts as JSON values: command, commit, whether files differed from it, machine, CPU flags, versions, load."""
        return {
            "command": command,
            **self._sources,
            "date": time.strftime("%Y-%m-%d", time.gmtime(self._began)),
            "seconds": round(time.time() - self._began, 1),
            "machine": machine_facts(),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cpu_flags": cpu_flags(),
            "environment": {name: os.environ[name] for name in LIMITS if name in os.environ},
            "versions": versions(),
            "load_before": self._load,
            "load_after": load_average(),
        }


def checkout() -> dict[str, Any]:
    """Commit of the sources, and whether tracked files differ from it; ``n/a`` where they are no git checkout."""
    # A package that is installed into somebody's repository is not a checkout of ours.
    if not _git("ls-files", "--", Path(__file__).name):
        return {"commit": "n/a", "dirty": "n/a"}
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "--untracked-files=no"))}


def load_average() -> float | str:
    """Processes that wanted the CPU in the last minute; ``n/a`` where the system does not tell."""
    with contextlib.suppress(AttributeError, OSError):
        return round(os.getloadavg()[0], 2)
    return "n/a"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=SOURCES, capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
