"""How long the environments of the two commands take to make, and what they weigh.

    python -m bench.install --keep

Clones the commit that is checked out into a temporary folder and runs there what ``make demo`` and ``make test`` run
before they start: a virtual environment with every package downloaded (no cache) and the C library compiled. Time is
mostly that of the package index and the disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.provenance import ROOT, Provenance, add_output, machine_slug, write

STAGES = {"make demo": ".venv/.stamp-report", "then make test": ".venv/.stamp-test"}


def megabytes(folder: Path) -> float:
    """Size of the files of a folder, hard links counted once."""
    sizes = {
        (found.st_dev, found.st_ino): found.st_size
        for found in (path.lstat() for path in folder.rglob("*"))
    }  # fmt: skip
    return sum(sizes.values()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output(parser, f"install-{machine_slug()}")
    options = parser.parse_args()
    provenance, stages = Provenance(), []
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "clone")
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)  # noqa: S607
        for name, target in STAGES.items():
            began = time.perf_counter()
            command = ["make", f"PYTHON={sys.executable}", target]
            subprocess.run(command, cwd=clone, check=True, stdout=subprocess.DEVNULL, env={
                **environment, "PIP_NO_CACHE_DIR": "1"})  # fmt: skip
            row = {"stage": name, "seconds": time.perf_counter() - began, "megabytes": megabytes(clone / ".venv")}
            print(f"{name}: {row['seconds']:.0f} s, .venv {row['megabytes']:.0f} MB", flush=True)
            stages.append(row)
    write(options.json, provenance, {"stages": stages})


if __name__ == "__main__":
    main()
