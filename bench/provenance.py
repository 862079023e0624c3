"""What a kept result says of where it comes from: machine, versions, commit, and how busy the machine was.

Every file in ``bench/results/`` holds what :class:`Provenance` gives under the key ``provenance``; a test asks for it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from stepinfluence import provenance
from stepinfluence.machine import machine_facts

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
OUTPUTS = ("--json", "--out", "--scratch", "--folder")


class Provenance(provenance.Provenance):
    """Made before a measurement begins; :meth:`finish` after it gives what to keep beside the figures."""

    def finish(self, command: str | None = None) -> dict[str, Any]:
        """Facts as JSON values; the command is the one that is running, unless given."""
        return super().finish(command or f"python -m {module_name()} {asked(sys.argv[1:])}".strip())


def asked(arguments: list[str]) -> str:
    """The arguments of a command but for where it writes, which is a path of one machine."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument not in (*OUTPUTS, "--keep"):
            kept.append(argument)
        skip = argument in OUTPUTS
    return " ".join(kept)


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
