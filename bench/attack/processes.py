"""Commands in processes of their own, forked from one that has everything imported, and ways to disturb them."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.attack.verdicts import HANG, REFUSED, SAME, UNCAUGHT, UNJUST, Verdict
from bench.attack.workers import LIMIT, PATIENCE, processor_seconds

EVENTS = ("open", "os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "fcntl.flock")
"""What Python tells of a process's dealings with files, before they are done."""


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a process to end."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit status; negative: the signal that ended it; None: it was ended because it took too long.
        text: what it wrote to stderr and stdout.
        disturbed: whether the signal that it was to get was sent.
        process: its number.
    """

    code: int | None
    text: str
    disturbed: bool
    process: int

    @property
    def line(self) -> str:
        return " ".join(self.text.split())[-300:]


@dataclass(frozen=True)
class Disturbance:
    """A signal that a process gets: after some seconds, or in place of the n-th of its dealings with files."""

    number: int
    seconds: float | None = None
    event: int | None = None

    def arm(self, folder: Path) -> None:
        """In the process itself: count its dealings with files below a folder."""
        if self.event is None:
            return
        left = [self.event]
        below = str(folder)

        def strike() -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), self.number)

        def seen(name: str, arguments: tuple[Any, ...]) -> None:
            if name not in EVENTS or left[0] <= 0:
                return
            if name == "open" and not (len(arguments) > 2 and isinstance(arguments[2], int) and arguments[2] & 3):
                return  # for reading
            if name == "fcntl.flock" or any(str(a).startswith(below) for a in arguments if isinstance(a, str | Path)):
                strike()

        fsync = os.fsync

        def noticed(handle: int) -> None:
            strike()
            fsync(handle)

        sys.addaudithook(seen)
        os.fsync = noticed


class Forked:
    """A function in a process of its own.

    Args:
        function: what it does; ``SystemExit`` is its exit status.
        folder: where its output is kept, and below which its dealings with files are counted.
    """

    def __init__(self, function: Callable[[], object], folder: Path, disturbance: Disturbance | None = None) -> None:
        self._disturbance, self._began = disturbance, time.monotonic()
        self._output = folder.parent / f"output-{folder.name}-{time.monotonic_ns()}"
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process:
            return
        code = 1
        try:
            handle = os.open(self._output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(handle, number)
            sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python begins; the others are the system's
            if disturbance is not None:
                disturbance.arm(folder)
            function()
            code = 0
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0 if left.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)

    def end(self) -> Ended:
        """Wait for it, disturb it when it is time, and end it if it takes too long."""
        due = self._disturbance.seconds if self._disturbance is not None else None
        disturbed, status = False, None
        while True:
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                break
            passed = time.monotonic() - self._began
            if due is not None and not disturbed and passed >= due:
                assert self._disturbance is not None
                os.kill(self.process, self._disturbance.number)
                disturbed = True
            if passed > LIMIT and (processor_seconds(self.process) > LIMIT or passed > PATIENCE * LIMIT):
                os.kill(self.process, signal.SIGKILL)
                os.waitpid(self.process, 0)
                return Ended(None, self._text(), disturbed, self.process)
            time.sleep(0.0005 if due is not None and not disturbed else 0.005)
        code = os.waitstatus_to_exitcode(status)
        struck = self._disturbance is not None and code in (-self._disturbance.number, 128 + self._disturbance.number)
        return Ended(code, self._text(), struck, self.process)

    def _text(self) -> str:
        try:
            text = self._output.read_text(encoding="utf-8", errors="replace")
            self._output.unlink()
        except OSError:
            return ""
        return text


def forked(function: Callable[[], object], folder: Path, disturbance: Disturbance | None = None) -> Ended:
    """:class:`Forked`, to its end."""
    return Forked(function, folder, disturbance).end()


def sdi(*arguments: object) -> Callable[[], None]:
    """The command ``sdi`` with these arguments, as its own process would run it."""

    def run() -> None:
        from stepinfluence.app.cli import main

        sys.argv = ["sdi", *map(str, arguments)]
        main()

    return run


def must(function: Callable[[], object], folder: Path) -> str:
    """Run what prepares an attack; what it wrote.

    Raises:
        RuntimeError: it failed.
    """
    ended = forked(function, folder)
    if ended.code != 0:
        raise RuntimeError(f"preparing ended with {ended.code}: {ended.text[-2000:]}")
    return ended.text


def of_command(ended: Ended, where: str, *, fine: tuple[int, ...] = (0,)) -> Verdict:
    """The verdict on how a command ended: the same, refused in one line, or bad."""
    if ended.code is None:
        return Verdict(HANG, f"{where}: no end: {ended.line}")
    if "Traceback" in ended.text:
        return Verdict(UNCAUGHT, f"{where}: {ended.line}")
    if ended.code in fine:
        return Verdict(SAME, f"{where}: exit status {ended.code}")
    if ended.code == 2 and any(line.startswith("sdi: ") for line in ended.text.splitlines()):
        return Verdict(REFUSED, f"{where}: {ended.line}")
    return Verdict(UNCAUGHT, f"{where}: exit status {ended.code}: {ended.line}")


def must_work(ended: Ended, where: str) -> Verdict | None:
    """The verdict on a command that nothing is wrong with; None if it went well."""
    found = of_command(ended, where)
    if found.kind == REFUSED:
        return Verdict(UNJUST, found.detail)
    return None if found.kind == SAME else found


def preload() -> None:
    """Import all that commands do, so that the processes forked from here need not. Nothing is computed: threads do not
    survive a fork."""
    import faiss
    import torch
    import torch._dynamo
    from stepinfluence.app import cli, runs
    from stepinfluence.app.runs import curvatures, query, stored
    from stepinfluence.search import topk, two_stage
    from torch.utils import checkpoint

    del cli, runs, curvatures, query, stored, topk, two_stage, checkpoint
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    handlers, arguments = {number: signal.getsignal(number) for number in ENDING}, sys.argv
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        sdi("--version")()
    sys.argv = arguments
    for number, handler in handlers.items():
        signal.signal(number, handler)
