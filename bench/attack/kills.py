"""Commands killed at any moment, then repeated: the bytes of an undisturbed run."""

from __future__ import annotations

import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

from bench.attack import programs
from bench.attack.campaign import Attack, Campaign
from bench.attack.made import featurize, halves, write_project
from bench.attack.mutate import content_of
from bench.attack.processes import Disturbance, Ended, forked, must, must_work, preload, sdi
from bench.attack.verdicts import HANG, LOST, SAME, UNCAUGHT, Verdict, judged

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PROGRAMS = ("index", "capture", "capture by workers", "training")
"""What is no command, but a program of somebody's: how it ends by other signals than SIGKILL is its own affair."""

EXPECTED = ("was not written", "were not written", "left behind")
"""What is said of a store whose writer was killed."""

MOST_EVENTS = 150
"""Dealings with files after which the last kills come: more than any of the commands has."""


def index(store: Path, at: Path) -> Callable[[], None]:
    """A program that builds an index."""

    def run() -> None:
        import faiss
        from stepinfluence.search import Index
        from stepinfluence.store import Store

        warnings.simplefilter("ignore")
        faiss.omp_set_num_threads(1)
        Index.build(Store.open(store), at / "index", factory="IVF2,SQ8", progress=False)

    return run


def commands(folder: Path) -> dict[str, Callable[[Path], Callable[[], None]]]:
    """What is killed, by name: each writes below a folder, and is repeated as it is."""
    project = write_project(folder)
    run = folder / "run"
    must(sdi(*featurize(project, run)), folder)
    parts = halves(run / "train", folder)
    return {
        "featurize": lambda at: sdi(*featurize(project, at / "run")),
        "influence": lambda at: sdi("influence", run, "--out", at / "influence.npy", "--device", "cpu"),
        "merge": lambda at: sdi("store", "merge", *parts, "--out", at / "store"),
        "export": lambda at: sdi("store", "export", run / "train", at / "out.npz", "--force"),
        "index": lambda at: index(run / "train", at),
        "capture": lambda at: programs.featurizing(at, 0),
        "capture by workers": lambda at: programs.featurizing(at, 2),
        "training": programs.training,
    }


def disturbance(rng: Random, seconds: float) -> Disturbance:
    """When, and with which signal: half of them at some moment of an undisturbed run, half at a dealing with files."""
    number = rng.choice(SIGNALS)
    if rng.random() < 0.5:
        return Disturbance(number, seconds=seconds * rng.random() ** 0.5)
    return Disturbance(number, event=1 + int(MOST_EVENTS * rng.random() ** 3))


def well_ended(ended: Ended, planned: Disturbance, at: Path, where: str, *, first: bool) -> Verdict | None:
    """The verdict on the way in which a process left after a signal; None if it is as promised.

    Args:
        first: whether no process was killed here before, which may have left its lock.
    """
    if ended.code is None:
        return Verdict(HANG, f"{where}: no end: {ended.line}")
    if planned.number == signal.SIGKILL or not ended.disturbed:
        return must_work(ended, where) if not ended.disturbed else None
    if "Traceback" in ended.text:
        return Verdict(UNCAUGHT, f"{where}: {ended.line}")
    left = [path.name for path in at.rglob(f".aside-*-{ended.process}-*")]
    left += [path.name for path in at.rglob(".lock")] if first else []
    return Verdict(LOST, f"{where}: left {left[0]} behind") if left and ended.code > 0 else None


def stores_are_readable(at: Path, where: str) -> Verdict | None:
    """The verdict on stores that a killed writer left: they open, and nothing is said of them but that shards are
    missing and files were left aside."""
    from stepinfluence.errors import StepInfluenceError
    from stepinfluence.store import Store, verify

    for manifest in at.rglob("manifest.json"):
        problems, wrong = judged(lambda path=manifest.parent: verify(path), (), f"{where}: verify")  # type: ignore[misc]
        _, unread = judged(lambda path=manifest.parent: Store.open(path), (StepInfluenceError,), f"{where}: open")  # type: ignore[misc]
        if wrong is not None or (unread is not None and unread.bad):
            return wrong or unread
        if unread is not None:
            return Verdict(LOST, unread.detail)
        strange = [p for p in problems or () if not any(known in p for known in EXPECTED)]
        if strange:
            return Verdict(LOST, f"{where}: {strange[0]}")
    return None


def prepare(folder: Path) -> Attack:
    preload()
    os.environ["XDG_CONFIG_HOME"] = str(folder / "settings")
    known = commands(folder)
    wanted, seconds = {}, {}
    for name, command in known.items():
        at = folder / f"whole-{name}"
        at.mkdir()
        began = time.monotonic()
        must(command(at), at)
        seconds[name] = time.monotonic() - began
        wanted[name] = content_of(at)

    def attack(rng: Random) -> Verdict:
        name = rng.choice(("featurize", *known))
        at = folder / f"attacked-{name}"
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir()
        kills = 0
        for _ in range(rng.choice((1, 1, 2, 3))):
            planned = disturbance(rng, seconds[name])
            if name in PROGRAMS and planned.number == signal.SIGINT:
                planned = replace(planned, number=signal.SIGTERM)
            moment = f"event {planned.event}" if planned.event is not None else f"{planned.seconds:.2f} s"
            where = f"{name}, {signal.Signals(planned.number).name} at {moment}"
            ended = forked(known[name](at), at, planned)
            wrong = well_ended(ended, planned, at, where, first=not kills) or stores_are_readable(at, where)
            kills += ended.disturbed
            if wrong is not None:
                return wrong._replace(kills=kills)
        wrong = must_work(forked(known[name](at), at), f"{name}, again after {where}")
        if wrong is not None:
            return wrong._replace(kills=kills)
        now, whole = content_of(at), wanted[name]
        other = sorted(k for k in now.keys() | whole.keys() if now.get(k) != whole.get(k))
        if other:
            return Verdict(LOST, f"{where}: other bytes in {', '.join(other[:4])}", kills)
        return Verdict(SAME, where, kills)

    return attack


CAMPAIGN = Campaign("kills", "killed commands, repeated", 0.32, prepare, mutated=False)
