"""Measure again what the documentation states, keep it, and rewrite the pages: one command for a quiet machine.

    python -m bench.keep                        # everything, about half an hour of one core
    python -m bench.keep capture store-layouts  # some
    python -m bench.keep --list

Needs the extras ``bench``, ``hf`` and ``index``. Each command runs in a process of its own; one that fails is named at
the end and does not take the others along. Some are run only if asked for: ``attack`` and ``soak``, an hour each;
``curvature-cost``, which writes 10 GB; ``large``, which needs 13 GiB of memory; ``paper-batch``, half an hour;
``ladder``, ``steps-removed`` and ``kronecker``, which train models again; and ``peers``, which needs an environment of
its own (``make bench-peers``) and ``--python .venv-peers/bin/python``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.provenance import RESULTS, ROOT

PROBLEMS = {
    "ladder": ("language", "majority", "trm"),
    "steps_removed": ("language", "majority"),
    "kronecker": ("adder", "language", "majority", "trm"),
}
RETRAINED = {
    f"{name.replace('_', '-')}-{problem}": ["-m", f"bench.{name}", problem, "--keep"]
    for name, problems in PROBLEMS.items()
    for problem in problems
}

COMMANDS: dict[str, list[str]] = {
    "capture": ["-m", "bench.capture", "--keep"],
    "sketch": ["-m", "bench.bench_sketch", "--keep"],
    "host-overhead": ["-m", "bench.host_overhead", "--keep"],
    "scale": ["-m", "bench.scale", "--keep"],
    "large": ["-m", "bench.large", "--keep"],
    "paper-batch": ["-m", "bench.paper_batch", "--keep"],
    "sketch-sizes": ["-m", "bench.sketch_sizes", "--keep"],
    "store-layouts": ["-m", "bench.store_layouts", "--keep"],
    "variance-table": ["-m", "bench.variance_table", "--keep"],
    "integrations": ["-m", "bench.integrations", "--keep"],
    "explore": ["-m", "bench.explore", "--scratch", "SCRATCH", "--keep"],
    "curvature-cost": ["-m", "bench.curvature_cost", "--scratch", "SCRATCH", "--keep"],
    "search": ["-m", "bench.search", "--cpu-seconds", "--scratch", "SCRATCH", "--keep"],
    "install": ["-m", "bench.install", "--keep"],
    "startup": ["-m", "bench.startup", "--keep"],
    "attack": ["-m", "bench.attack", "--minutes", "60", "--keep"],
    "soak": ["-m", "bench.soak", "--minutes", "60", "--out", str(RESULTS / "soak")],
    **{
        f"uses-{use}": ["-m", "bench.uses", use, "--keep"]
        for use in ("mislabelled", "curation", "horizon", "cancellation")
    },
    **RETRAINED,
    "workspace": ["-m", "bench.workspace", "--keep"],
    "inline": ["-m", "bench.inline", "--keep"],
    "calls": ["-m", "bench.calls", "--keep"],
    "training": ["-m", "bench.training", "--keep"],
    "per-example": ["-m", "bench.per_example", "--keep"],
    "models": ["-m", "bench.models", "--keep", "--anew"],
    "peers": ["-m", "bench.peers", "--keep"],
}
IF_ASKED = ("attack", "soak", "curvature-cost", "large", "paper-batch", "peers", *RETRAINED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of --list; all but {', '.join(IF_ASKED)} if none is given"
    )
    parser.add_argument("--list", action="store_true", help="print names and commands")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the measurements")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name:<16} python {' '.join(command)}" for name, command in COMMANDS.items()))
        return 0
    if unknown := sorted(set(options.names) - set(COMMANDS)):
        parser.error(f"NAME: got {', '.join(unknown)}; use some of {', '.join(COMMANDS)}")
    failed, names = [], options.names or [n for n in COMMANDS if n not in IF_ASKED]
    for name in names:
        print(f"--- {name}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            command = [scratch if part == "SCRATCH" else part for part in COMMANDS[name]]
            if subprocess.run([options.python, *command], cwd=ROOT, check=False).returncode:
                failed.append(name)
    picture = RESULTS / "soak.png"
    if picture.exists():
        picture.replace(Path(ROOT, "docs", "images", "soak.png"))
    for script in ("figures.py", *(["curvature_figures.py"] if RETRAINED.keys() & set(names) else ())):
        subprocess.run([sys.executable, Path("docs", "_site", script)], cwd=ROOT, check=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
