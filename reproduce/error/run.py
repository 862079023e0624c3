"""The experiment ``error``: its stages in order."""

from __future__ import annotations

from functools import partial

from reproduce.base import Outcome, Result, Run
from reproduce.error.config import Config

SOURCES = {
    "adapter, untrained": ("adapter", False),
    "adapter, trained": ("adapter", True),
    "slow, untrained": ("slow", False),
    "slow, trained": ("slow", True),
    "orthogonal steps": ("orthogonal", False),
}
"""What depth is looked at on: kind and whether it is trained."""


def run(run: Run[Config]) -> Outcome:
    """Run the experiment; finished stages of an earlier run in the folder are not repeated."""
    from reproduce.error import measure

    config = run.config
    seeds = range(config.seed, config.seed + config.seeds)
    depth: dict[str, list[Result]] = {}
    for source, (kind, trained) in SOURCES.items():
        name = source.replace(",", "").replace(" ", "-")
        one = partial(measure.depth, config, kind, trained=trained)
        depth[source] = [run.stage(f"depth-{name}-{s}", partial(one, seed=s)) for s in seeds]
    by_seed: dict[str, list[Result]] = {name: [] for name in ("masked", "active", "lemma", "trained", "untrained")}
    for seed in seeds:
        models = measure.Models(config, seed)
        parts = {
            "masked": partial(measure.masked, models),
            "active": partial(measure.active, models),
            "lemma": partial(measure.lemma, models),
            "trained": partial(measure.search, models, trained=True),
            "untrained": partial(measure.search, models, trained=False),
        }
        for name, compute in parts.items():
            by_seed[name].append(run.stage(f"{name}-{seed}", compute))
    from reproduce.error.analyse import outcome

    return outcome(run, depth, by_seed, run.stage("tight", partial(measure.tight, config)))
