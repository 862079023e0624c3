"""The experiment ``uses``: its stages in order."""

from __future__ import annotations

from functools import partial

from reproduce.base import Outcome, Result, Run
from reproduce.uses import analyse, curriculum, late, probes
from reproduce.uses.config import Config

PARTS = {"late": late.measure, "probes": probes.measure, "curriculum": curriculum.measure}


def run(run: Run[Config]) -> Outcome:
    """Run the experiment; finished stages of an earlier run in the folder are not repeated."""
    config = run.config
    found: dict[str, list[Result]] = {}
    for name, compute in PARTS.items():
        found[name] = [
            run.stage(f"{name}-{seed}", partial(compute, config, seed))
            for seed in range(config.seed, config.seed + config.seeds)
        ]
    return analyse.outcome(run, found)
