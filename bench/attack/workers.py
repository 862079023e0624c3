"""Attacks in processes of their own: one that hangs or dies is a verdict, not the end."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from types import TracebackType

import torch

from bench.attack.campaign import Campaign
from bench.attack.verdicts import CRASHED, HANG, Verdict

LIMIT = 10.0
"""Seconds within which an input must be done with."""

PATIENCE = 12
"""A process that has not had half of :data:`LIMIT` of a processor may take this many times as long: it was not let."""

LIVES = 20_000
"""Inputs after which a worker is replaced by a fresh one."""

PLACE = "work"
"""The folder in which a worker attacks."""

MEMORY = 3 << 30
"""Bytes of addresses that a worker may take beyond those that it begins with."""


def processor_seconds(process: int) -> float:
    """Processor time that a process has had so far; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def random_of(campaign: str, seed: int) -> Random:
    """The generator that an input of a campaign is made from."""
    return Random(f"{campaign}:{seed}")


class Worker:
    """A process that attacks; made anew after one that was lost."""

    def __init__(self, campaign: Campaign, folder: Path, limit: float) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=f"{campaign.name}-", dir=folder))
        self._limit, self.done = limit, 0
        ours, theirs = multiprocessing.Pipe()
        self._pipe: Connection = ours
        self._process = multiprocessing.get_context("fork").Process(
            target=_attack, args=(campaign, self._folder, theirs), daemon=False
        )
        self._process.start()
        theirs.close()
        self._receive(None)  # prepared

    def ask(self, seed: int) -> Verdict:
        """The verdict on the input of a seed; afterwards :attr:`alive` tells whether the worker still is."""
        self._pipe.send(seed)
        self.done += 1
        return self._receive(seed)

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def _receive(self, seed: int | None) -> Verdict:
        limit = self._limit if seed is not None else 30 * self._limit
        began, had = time.monotonic(), processor_seconds(self._process.pid or 0)
        while not self._pipe.poll(min(limit, 1)) and self.alive:
            passed = time.monotonic() - began
            worked = processor_seconds(self._process.pid or 0) - had
            if passed >= limit and (worked >= limit / 2 or passed >= PATIENCE * limit):
                self.close()
                return self._lost(seed, HANG, f"no end after {passed:.0f} s")
        try:
            found = self._pipe.recv() if self._pipe.poll() else None
        except (EOFError, ConnectionResetError):
            found = None
        if found is None:
            self._process.join()
            code = self._process.exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            return self._lost(seed, CRASHED, f"{name}; {self._last_words()}")
        if isinstance(found, str):
            self.close()
            raise RuntimeError(f"the attack itself failed: {found}")
        verdict = Verdict(*found)
        return verdict._replace(detail=verdict.detail.replace(f"{self._folder / PLACE}/", ""))

    def _lost(self, seed: int | None, kind: str, detail: str) -> Verdict:
        if seed is None:
            raise RuntimeError(f"preparing: {detail}")
        return Verdict(kind, detail)

    def _last_words(self) -> str:
        log = self._folder / "worker.log"
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        said = [line.strip() for line in lines[-60:] if "File" in line or "rror" in line][:8]
        return " | ".join(re.sub(r'File "[^"]*/([^/"]+)"', r"\1", line) for line in said)

    def close(self) -> None:
        """End the process and remove its folder."""
        if self._process.is_alive():
            os.kill(self._process.pid or 0, signal.SIGKILL)
        self._process.join()
        self._pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _attack(campaign: Campaign, folder: Path, pipe: Connection) -> None:
    """What a worker does until it is asked nothing more."""
    with (folder / "worker.log").open("w") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        faulthandler.enable(log)
        addresses = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (addresses + MEMORY, addresses + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # what is forked from here may get one at once
            signal.signal(number, signal.SIG_DFL)
        torch.set_num_threads(1)  # no threads of the process that was forked are here
        place = folder / PLACE
        place.mkdir()
        try:
            attack = campaign.prepare(place)
            pipe.send(Verdict("same"))
            while True:
                seed = pipe.recv()
                pipe.send(attack(random_of(campaign.name, seed)))
        except (EOFError, KeyboardInterrupt):
            pass
        except BaseException:
            pipe.send(traceback.format_exc())
    os._exit(0)


class Workers:
    """Verdicts of one campaign after the other, each worker kept for as long as it lives."""

    def __init__(self, limit: float = LIMIT) -> None:
        self._limit = limit
        self._folder = Path(tempfile.mkdtemp(prefix="attack-"))
        self._worker: Worker | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self) -> None:
        if self._worker is not None:
            with contextlib.suppress(OSError):
                self._worker.close()
            self._worker = None

    def verdicts(self, campaign: Campaign, seeds: Iterable[int]) -> Iterator[tuple[int, Verdict]]:
        """The verdict on the input of every seed, in order."""
        for seed in seeds:
            if self._worker is None:
                self._worker = Worker(campaign, self._folder, self._limit)
            found = self._worker.ask(seed)
            if found.kind in (HANG, CRASHED) or self._worker.done >= LIVES or not self._worker.alive:
                self._end()
            yield seed, found
        self._end()


def replayed(campaign: Campaign, seed: int) -> Verdict:
    """The verdict on one input, in this process: an error of the attack itself shows its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        return campaign.prepare(Path(folder))(random_of(campaign.name, seed))
