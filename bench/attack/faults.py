"""A disk that is full, or renames that fail, at any moment of writing: one line, and a rerun gives the same bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from bench.attack.campaign import Attack, Campaign
from bench.attack.made import halves, write_store
from bench.attack.mutate import content_of
from bench.attack.verdicts import LOST, SAME, Verdict, judged

Operation: TypeAlias = Callable[[Path], object]
"""Writes into a folder, or goes on with what it finds there."""

CALLS = ("fsync", "replace", "rename", "link", "mkdir", "unlink", "open")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EMFILE)


@contextlib.contextmanager
def failing(names: tuple[str, ...], after: int, number: int, times: int) -> Iterator[list[int]]:
    """Have some of the system's calls fail for a while, once so many of them have been made; counts those that did."""
    left, failed = [after], [0]
    originals = {name: getattr(os, name) for name in names}

    def failing_one(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if -times < left[0] <= 0:
                failed[0] += 1
                raise OSError(number, os.strerror(number), str(arguments[0]))
            return originals[name](*arguments, **options)

        return call

    for name in names:
        setattr(os, name, failing_one(name))
    try:
        yield failed
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


@contextlib.contextmanager
def full(limit: int) -> Iterator[list[int]]:
    """Let no file of this process grow beyond some bytes: the system's own refusal, whichever library writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def operations(folder: Path) -> dict[str, Operation]:
    """What writes, by name."""
    import faiss
    from stepinfluence.search import Index
    from stepinfluence.store import Store, export, merge

    from bench.attack.configs import module

    faiss.omp_set_num_threads(1)
    write_store(folder / "train", per_step=True, dtype="int8", n_rows=8)
    write_store(folder / "summed", n_rows=60)
    write_store(folder / "query", per_step=True, n_rows=5)
    parts = halves(folder / "train", folder)
    found: dict[str, Operation] = {
        "write": lambda at: write_store(at / "store", per_step=True, dtype="int8", n_rows=8),
        "merge": lambda at: merge(parts, at / "store"),
        "merge of copies": lambda at: merge(parts, at / "store", link=False),
        "export npz": lambda at: export(folder / "train", at / "out.npz", "npz"),
        "export safetensors": lambda at: export(folder / "train", at / "out.safetensors", "safetensors"),
        "index": lambda at: Index.build(
            Store.open(folder / "summed"), at / "index", factory="IVF4,SQ8", progress=False
        ),
    }
    if (scores := module("stepinfluence.app.runs.scores")) is not None:
        train, query = Store.open(folder / "summed"), Store.open(folder / "query")
        found["influence"] = lambda at: scores.write_scores(
            train, query, at / "influence.npy", parameters=None, device="cpu", progress=False
        )
    return found


def prepare(folder: Path) -> Attack:
    from stepinfluence.errors import StepInfluenceError

    warnings.simplefilter("ignore")
    known = operations(folder)
    wanted = {}
    for name, operation in known.items():
        at = folder / f"whole-{name}"
        at.mkdir()
        operation(at)
        wanted[name] = content_of(at)
    at = folder / "attacked"

    def attack(rng: Random) -> Verdict:
        name = rng.choice(list(known))
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir()
        verdict, may_stay = Verdict(SAME, name), False
        for _ in range(rng.choice((1, 1, 2, 3))):
            if rng.random() < 0.3:
                limit = rng.choice((0, rng.randrange(200), rng.randrange(20_000)))
                what, fault = f"files of {limit} bytes", full(limit)
            else:
                calls = tuple(rng.sample(CALLS, rng.choice((1, 2, 6))))
                number, times = rng.choice(ERRORS), rng.choice((1, 1, 3, 1000))
                what = f"{errno.errorcode[number]} of {', '.join(calls)}"
                may_stay |= "unlink" in calls
                fault = failing(calls, rng.randrange(1, 60), number, times)
            with fault:
                _, wrong = judged(lambda: known[name](at), (StepInfluenceError,), f"{name}, {what}")
            if wrong is not None and wrong.bad:
                return wrong
            verdict = wrong or verdict
        _, wrong = judged(lambda: known[name](at), (), f"{name}, again after a fault")
        if wrong is not None:
            return wrong
        now, whole = content_of(at), wanted[name]
        other = sorted(k for k in now.keys() | whole.keys() if now.get(k) != whole.get(k))
        if may_stay:  # what this process could not remove stays for as long as it lives
            other = [k for k in other if "/.aside-" not in f"/{k}"]
        if other:
            return Verdict(LOST, f"{name}: other bytes in {', '.join(other[:4])}")
        return verdict

    return attack


CAMPAIGN = Campaign("faults", "full disks and failing renames", 0.04, prepare)
