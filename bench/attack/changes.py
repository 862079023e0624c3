"""Code, data, weights or settings changed under a run: refused, by name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from bench.attack.campaign import Attack, Campaign
from bench.attack.made import featurize, write_project
from bench.attack.mutate import content_of
from bench.attack.processes import Ended, forked, must, of_command, preload, sdi
from bench.attack.verdicts import LOST, REFUSED, SAME, SILENT, UNCAUGHT, UNJUST, Verdict

Change: TypeAlias = tuple[str, str]

CHANGES: dict[str, tuple[Change, ...]] = {
    "the loss": (("return value ** 2", "return value ** 2 * 1.5"),),
    "the loss in the project file": (('squared(model(batch["x"], 3))', 'squared(model(batch["x"], 4))'),),
    "the data": (("DATA_SEED = 0", "DATA_SEED = 9"),),
    "one example": (("for n in range(sizes[split])]", "for n in range(sizes[split])][::-1]"),),
    "the model's code": (("nn.Tanh()", "nn.Sigmoid()"),),
    "the collation": (('torch.stack([e["x"] for e in examples])', 'torch.stack([e["x"] * 2 for e in examples])'),),
    "weights outside of the body": (
        ("return Looped()", "m = Looped()\n    m.head.weight.data.mul_(1.25)\n    return m"),
    ),
    "nothing": (),
}
ANSWERS = {
    "the loss": "exact",
    "the data": "exact",
    "one example": "exact",
    "the model's code": "exact",
    "weights outside of the body": "exact",
}
"""Which changes an exact search must notice: those that change a score or what it is about."""


def dying_at(row: int, function: Callable[[], None]) -> Callable[[], None]:
    """A command that is killed when it reads a row of the training split."""

    def run() -> None:
        os.environ["DIE_AT"] = str(row)
        function()

    return run


def prepare(folder: Path) -> Attack:
    preload()
    os.environ["XDG_CONFIG_HOME"] = str(folder / "settings")
    at = folder / "attacked"
    at.mkdir()
    project = write_project(at)
    must(sdi(*featurize(project, at / "run")), at)
    whole = content_of(at / "run")
    finished = folder / "finished"
    shutil.move(at, finished)

    def run(*arguments: Any) -> Ended:
        return forked(sdi(*arguments), at)

    def on_resuming(rng: Random, name: str) -> Verdict:
        where = f"{name} changed before resuming"
        killed = forked(dying_at(rng.choice((5, 9, 14, 21)), sdi(*featurize(project, at / "run"))), at)
        if killed.code != -9:
            return Verdict(UNCAUGHT, f"{where}: was to be killed: {killed.line}")
        write_project(at, *CHANGES[name])
        return verdict_of(of_command(run(*featurize(project, at / "run")), where), name, kills=1)

    def of_a_finished_run(_: Random, name: str) -> Verdict:
        restore()
        write_project(at, *CHANGES[name])
        return verdict_of(of_command(run(*featurize(project, at / "run")), f"{name} changed after the end"), name)

    def before_another_split(_: Random, name: str) -> Verdict:
        """Another split is featurized after the change: its scores must not be taken beside the others'."""
        restore()
        write_project(at, *CHANGES[name])
        where = f"{name} changed before another split"
        first = of_command(run("featurize", "--split", "more", "--out", at / "run"), where)
        if first.kind != SAME:
            return verdict_of(first, name)
        found = of_command(run("influence", at / "run", "--query", "more", "--device", "cpu"), where)
        # Only what the weights' digests tell can be told here: the new split is its own beginning.
        return verdict_of(found, name) if name == "weights outside of the body" else found

    def before_an_exact_search(_: Random, name: str) -> Verdict:
        restore()
        write_project(at, *CHANGES[name])
        where = f"{name} changed before an exact search"
        found = of_command(run("query", at / "run", "--row", 0, "--exact", "--json"), where)
        return verdict_of(found, name if name in ANSWERS else "nothing") if name in (*ANSWERS, "nothing") else found

    def restore() -> None:
        shutil.rmtree(at, ignore_errors=True)
        shutil.copytree(finished, at)

    def verdict_of(found: Verdict, name: str, kills: int = 0) -> Verdict:
        if found.bad:
            return found._replace(kills=kills)
        if name == "nothing":
            if found.kind == REFUSED:
                return Verdict(UNJUST, found.detail, kills)
            same = content_of(at / "run") == whole
            return Verdict(SAME if same else LOST, found.detail, kills)
        return Verdict(REFUSED if found.kind == REFUSED else SILENT, found.detail, kills)

    situations = (on_resuming, of_a_finished_run, before_another_split, before_an_exact_search)

    def attack(rng: Random) -> Verdict:
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir()
        write_project(at)
        situation = rng.choice(situations)
        name = rng.choice(list(CHANGES))
        if situation is before_another_split and name == "nothing":
            name = "weights outside of the body"
        return situation(rng, name)

    return attack


CAMPAIGN = Campaign("changes", "code, data or weights changed under a run", 0.07, prepare, mutated=False)
