"""Commands at once on one run, and calls that fail before others: one run comes of it, and it is a whole one."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from random import Random
from typing import Any

import yaml

from bench.attack.campaign import Attack, Campaign
from bench.attack.made import featurize, write_project
from bench.attack.mutate import content_of
from bench.attack.processes import Ended, Forked, forked, must, must_work, of_command, preload, sdi
from bench.attack.verdicts import LOST, REFUSED, SAME, SILENT, UNJUST, Verdict


def of_second(ended: Ended, where: str) -> Verdict:
    """The verdict on one of two commands at once: done, or told who is at work. Nothing else is true."""
    found = of_command(ended, where)
    if (
        found.kind == REFUSED
        and "another command is writing here" not in found.detail
        and "begun with" not in found.detail
    ):
        return Verdict(UNJUST, found.detail)
    return found


def differing(now: dict[str, bytes], whole: dict[str, bytes]) -> str:
    """Names of the files that differ, some of them."""
    other = sorted(k for k in now.keys() | whole.keys() if now.get(k) != whole.get(k))
    return ", ".join(other[:4])


def prepare(folder: Path) -> Attack:
    preload()
    os.environ["XDG_CONFIG_HOME"] = str(folder / "settings")
    project = write_project(folder)
    whole: dict[int, dict[str, bytes]] = {}
    seconds = 0.0
    at = folder / "attacked"

    def command(seed: int, *more: object) -> Any:
        return sdi(*featurize(project, at / "run", "--seed", seed, *more, splits=("train",)))

    for seed in (0, 1):
        at.mkdir()
        began = time.monotonic()
        must(command(seed), at)
        seconds = time.monotonic() - began
        whole[seed] = content_of(at)
        shutil.rmtree(at)

    def at_once(rng: Random, seeds: tuple[int, int]) -> Verdict:
        where = f"seeds {seeds} at once"
        running = []
        for seed in seeds:
            running.append(Forked(command(seed), at))
            time.sleep(rng.choice((0, 0, rng.random() * seconds)))
        found = [of_second(process.end(), where) for process in running]
        for verdict in found:
            if verdict.bad:
                return verdict
        config = yaml.safe_load((at / "run" / "config.yaml").read_text())
        seed = config["seed"]
        wrong = must_work(forked(command(seed), at), f"{where}: again")
        if wrong is not None:
            return wrong
        if other := differing(content_of(at), whole[seed]):
            return Verdict(LOST, f"{where}: other bytes in {other}")
        return Verdict(SAME, where)

    def after_a_failure(rng: Random) -> Verdict:
        bad: tuple[object, ...] = rng.choice(
            (
                ("--checkpoints", "nowhere/*.pt"),
                ("--checkpoints", project),
                ("--metric", "adam"),
                ("--eta", "nan", "--checkpoints", project),
                ("--sketch-size", "0"),
                ("--split", "no such split"),
            )
        )
        where = f"after a call with {bad[0]} {Path(str(bad[1])).name}"
        first = of_command(forked(command(1, *bad), at), where)
        if first.bad:
            return first
        if first.kind == SAME:
            return Verdict(SILENT, f"{where}: it was taken")
        wrong = must_work(forked(command(0), at), where)
        if wrong is not None:
            return wrong
        if other := differing(content_of(at), whole[0]):
            return Verdict(LOST, f"{where}: other bytes in {other}")
        return Verdict(SAME, where)

    def attack(rng: Random) -> Verdict:
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir()
        kind = rng.randrange(3)
        return after_a_failure(rng) if kind == 0 else at_once(rng, (0, 0) if kind == 1 else (0, 1))

    return attack


CAMPAIGN = Campaign("together", "two commands at once, and calls after one that failed", 0.05, prepare, mutated=False)
