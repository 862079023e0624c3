"""Scores and their description, of two calls that write to one place: never those of one beside those of the other."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from random import Random

from bench.attack.campaign import Attack, Campaign
from bench.attack.configs import module
from bench.attack.kills import disturbance
from bench.attack.made import featurize, write_project
from bench.attack.processes import forked, must, must_work, preload, sdi
from bench.attack.verdicts import FOUND, LOST, SAME, SILENT, Verdict

FILES = ("influence.npy", "influence.json")


def prepare(folder: Path) -> Attack:
    preload()
    os.environ["XDG_CONFIG_HOME"] = str(folder / "settings")
    scores = module("stepinfluence.app.runs.scores")
    run = folder / "run"
    must(sdi(*featurize(write_project(folder), run)), folder)
    calls = {"all": (), "biases": ("--parameters", "*bias"), "weights": ("--parameters", "*weight")}
    whole, seconds = {}, 0.0
    for name, options in calls.items():
        at = folder / f"whole-{name}"
        at.mkdir()
        began = time.monotonic()
        must(sdi("influence", run, "--out", at / FILES[0], "--device", "cpu", *options), at)
        seconds = time.monotonic() - began
        whole[name] = [(at / file).read_bytes() for file in FILES]
    at = folder / "attacked"

    def attack(rng: Random) -> Verdict:
        first, second = rng.sample(list(calls), 2)
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir()
        for file, content in zip(FILES, whole[first], strict=True):
            (at / file).write_bytes(content)
        again = sdi("influence", run, "--out", at / FILES[0], "--device", "cpu", *calls[second])
        planned = disturbance(rng, seconds)
        if planned.event is not None:
            planned = replace(planned, event=rng.randrange(1, 14))
        ended = forked(again, at, planned)
        where, kills = f"{first}, then {second}: {planned}", int(ended.disturbed)
        there = [(at / file).read_bytes() if (at / file).is_file() else None for file in FILES]
        verdict = Verdict(SAME, where, kills)
        if there not in (whole[first], whole[second]):
            named = scores is not None and scores.scores_problem(at / FILES[0]) is not None
            if there[1] is not None and not named:
                return Verdict(SILENT, f"{where}: scores of one call, description of another", kills)
            if there[0] not in (whole[first][0], whole[second][0]):
                return Verdict(LOST, f"{where}: no scores of either call", kills)
            verdict = Verdict(FOUND, where, kills)
        wrong = must_work(forked(again, at), f"{where}: again")
        if wrong is not None:
            return wrong._replace(kills=kills)
        if [(at / file).read_bytes() for file in FILES] != whole[second] or len(list(at.iterdir())) != len(FILES):
            return Verdict(LOST, f"{where}: other bytes", kills)
        return verdict

    return attack


CAMPAIGN = Campaign("pairs", "score tables whose writer is killed", 0.06, prepare, mutated=False)
