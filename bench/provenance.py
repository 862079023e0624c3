"""What a kept result says of where it comes from: machine, versions, commit, and how busy the machine was.

Every file in ``bench/results/`` holds what :class:`Provenance` gives under the key ``provenance``; a test asks for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from stepinfluence.doctor import machine_facts, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "SDI_KERNELS_CPU", "OMP_NUM_THREADS")
"""Variables that change which instructions or how many threads are used; named where they are set."""


class Provenance:
    """Made before a measurement begins; :meth:`finish` after it gives what to keep beside the figures."""

    def __init__(self) -> None:
        self._load = load_average()
        self._began = time.time()

    def finish(self) -> dict[str, Any]:
        """Facts as JSON values: command, commit, whether files differed from it, machine, CPU flags, versions, load."""
        return {
            "command": " ".join([f"python -m {module_name()}", *sys.argv[1:]]),
            "commit": _git("rev-parse", "HEAD") or "n/a",
            "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
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


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """The options ``--json FILE`` and ``--keep`` of a command whose kept result is called ``name``."""
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--keep",
        action="store_const",
        dest="json",
        const=RESULTS / f"{name}.json",
        help=f"also write the figures to bench/results/{name}.json, from which the documentation is made",
    )


def write(path: Path | None, provenance: Provenance, figures: dict[str, Any]) -> None:
    """Write figures with their provenance; nothing if there is no path."""
    if path is not None:
        content = {"provenance": provenance.finish(), **figures}
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def machine_slug() -> str:
    """This machine's name in names of files: CPU and the widest vectors that torch uses on it."""
    name = f"{machine_facts()['CPU']} {torch.backends.cpu.get_cpu_capability()}"
    name = re.sub(r"\(R\)|\(TM\)|\bCPU\b|\bProcessor\b|@.*?GHz", " ", name)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine_line(provenance: dict[str, Any]) -> str:
    """The facts that a reader wants first, in one line."""
    machine, version = provenance["machine"], provenance["versions"]
    commit = provenance["commit"][:12] + (" with changes" if provenance["dirty"] else "")
    return (
        f"{machine['CPU']} ({provenance['torch_cpu_capability']}), {machine['torch threads']} torch thread(s) of "
        f"{machine['cores']} core(s), torch {version['torch']}, Python {version['python']}, {provenance['date']}, "
        f"commit {commit}, load {provenance['load_before']} before and {provenance['load_after']} after"
    )


def module_name() -> str:
    """Name of the module that is being run with ``python -m``."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).name


def load_average() -> float | str:
    """Processes that wanted the CPU in the last minute; ``n/a`` where the system does not tell."""
    with contextlib.suppress(AttributeError, OSError):
        return round(os.getloadavg()[0], 2)
    return "n/a"


def cpu_flags() -> str:
    """The CPU's vector instructions, as Linux names them; ``n/a`` elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                wanted = ("sse", "ssse", "avx", "fma", "amx", "f16c")
                return " ".join(sorted(f for f in line.partition(":")[2].split() if f.startswith(wanted)))
    return "n/a"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
