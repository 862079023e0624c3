"""Both halves of a first look at a GPU: the benchmark, then the tests, each with a time limit of its own.

    python -m bench.gpu.check                  # make gpu-check: both, under nine minutes from a cold kernel cache
    python -m bench.gpu.check --only bench     # make gpu-bench
    python -m bench.gpu.check --only tests     # make gpu-tests

Neither stops the other. The benchmark writes its results as they come (run.py); the tests' output goes to
``bench/results/gpu-tests.log`` line by line, so that what was finished is there when a half is stopped. Tests run in
eight processes, which compile kernels side by side, where pytest-xdist is installed.

Exit status 1 for wrong numbers and for kernels that do not run; never for speed, memory, or a limit of time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOG = ROOT / "bench" / "results" / "gpu-tests.log"
BAD = re.compile(r"^(?:\[gw\d+\] \[ *\d+%\] )?(?:FAILED|ERROR)\b|\b(?:FAILED|ERROR)(?: +\[ *\d+%\])?$", re.MULTILINE)
"""A failed test in pytest's output, as it is printed when the test ends."""


@dataclass(frozen=True)
class Half:
    """A command and the seconds that it may take."""

    name: str
    command: Sequence[str]
    seconds: float
    log: Path | None = None


def halves() -> list[Half]:
    """The benchmark and the tests, as they are run on this machine."""
    spread = ["-n", "8"] if importlib.util.find_spec("xdist") is not None else []
    tests = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-v", "-p", "no:cacheprovider", *spread]
    return [
        Half("bench", [sys.executable, "-m", "bench.gpu.run", "--seconds", "270"], 290),
        Half("tests", tests, 240, LOG),
    ]


def run(half: Half) -> tuple[str, bool]:
    """How a half ended, in words, and whether something was wrong."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "PYTHONUNBUFFERED": "1"}
    log = half.log.open("w", encoding="utf-8") if half.log is not None else None
    try:
        process = subprocess.Popen(
            half.command,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log and subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(half.seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
    finally:
        if log is not None:
            log.close()
    text = half.log.read_text(encoding="utf-8", errors="replace") if half.log is not None else ""
    if code is None:
        failed = len(BAD.findall(text))
        said = f"stopped after {half.seconds:.0f} s; what it had finished is in bench/results/"
        return said + (f", with {failed} failed" if failed else ""), bool(failed)
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return (last or f"ended with status {code}"), code != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["bench", "tests"], help="one half")
    options = parser.parse_args()
    ended = {half.name: run(half) for half in halves() if options.only in (None, half.name)}
    for name, (said, wrong) in ended.items():
        sys.stdout.write(f"{name}: {'WRONG: ' if wrong else ''}{said}\n")
    return int(any(wrong for _, wrong in ended.values()))


if __name__ == "__main__":
    raise SystemExit(main())
