"""How long commands take before they do anything: help, wrong use, and commands that need no torch.

    python -m bench.startup --keep

Processor seconds of the whole process, medians, beside those of Python alone and of ``import torch``.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile

from bench.provenance import Provenance, add_output, machine_slug, write

SDI = ("-m", "stepinfluence")
COMMANDS: dict[str, tuple[str, ...]] = {
    "python alone": ("-c", "pass"),
    "sdi --version": (*SDI, "--version"),
    "sdi --help": (*SDI, "--help"),
    "sdi query --help": (*SDI, "query", "--help"),
    "sdi query --nonsense": (*SDI, "query", "--nonsense"),
    "sdi init p.py": (*SDI, "init", "p.py", "--force"),
    "sdi query none --row 0": (*SDI, "query", "none", "--row", "0"),
    "sdi doctor": (*SDI, "doctor"),
    "import torch": ("-c", "import torch"),
}


def cpu_seconds(arguments: tuple[str, ...], folder: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    add_output(parser, f"startup-{machine_slug()}")
    options = parser.parse_args()
    provenance = Provenance()
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for name, arguments in COMMANDS.items():
                found[name].append(cpu_seconds(arguments, folder))
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    print("\n".join(f"{name:<24} {seconds:.2f} s" for name, seconds in medians.items()))
    write(options.json, provenance, {"cpu_seconds": medians, "rounds": options.rounds})


if __name__ == "__main__":
    main()
