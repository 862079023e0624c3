"""The experiment ``planted``: its stages in order."""

from __future__ import annotations

from typing import Any

import numpy as np

from reproduce.base import Outcome, Result, Run
from reproduce.planted import analyse, figures
from reproduce.planted.config import Config, make_task
from reproduce.planted.measure import all_scores, by_name, sketched
from reproduce.planted.planting import KINDS, Planted, plant
from reproduce.planted.retraining import counterfactuals
from reproduce.planted.tasks.step_task import StepTask
from reproduce.planted.timing import profiles
from reproduce.planted.training import accuracy_of, answer_loss, train


def run(run: Run[Config]) -> Outcome:
    """Train, attribute, retrain and compare; every long part is a stage that survives an interruption."""
    numbers = {name: _one_task(run, name) for name in run.config.tasks}
    run.figure("timing", figures.timing(numbers))
    run.figure("critical", figures.critical(numbers))
    run.figure("trajectories", figures.trajectories(numbers))
    run.figure("mislabelled", figures.mislabelled(numbers))
    run.figure("retraining", figures.retraining(numbers))
    return analyse.make_outcome(numbers, run.config)


def _one_task(run: Run[Config], name: str) -> dict[str, Any]:
    """Every number of a task."""
    config = run.config
    task = make_task(name, large=config.large)
    planted = plant(task, config)
    trained = run.stage(f"{name}-train", lambda: _train(run, task, planted))
    paths = [run.checkpoints / name / file for file in trained["checkpoints"]]
    scored = run.stage(f"{name}-scores", lambda: all_scores(task, planted, paths, config))
    timed = {
        "answer": run.stage(f"{name}-timing-answer", lambda: profiles(task, config, taught=False)),
        "taught": run.stage(f"{name}-timing-taught", lambda: profiles(task, config, taught=True)),
    }
    largest = by_name(scored)[sketched(config.sketch_sizes[-1])]
    retrained = run.stage(f"{name}-retraining", lambda: counterfactuals(task, planted, largest, config))

    def statistics() -> Result:
        return {
            "conservation": analyse.conservation(scored),
            "timing": {regime: analyse.timing(stage, config) for regime, stage in timed.items()},
            "critical": analyse.critical(scored, planted, config),
            "trajectories": _mean_trajectories(scored["trajectories"], planted),
            "mislabelled": analyse.mislabelled(scored, planted, config),
            "retraining": analyse.retraining(retrained, planted, config),
        }

    return {
        "example": task.text(planted.queries.inputs[planted.of_kind("plain")[0]]),
        "accuracy": trained["accuracy"],
        "feature_share": scored["feature_share"],
        **run.stage(f"{name}-statistics", statistics),
    }


def _train(run: Run[Config], task: StepTask, planted: Planted) -> Result:
    config = run.config
    model, paths = train(
        task,
        planted.train,
        config,
        loss=answer_loss(task),
        seed=config.seed,
        folder=run.checkpoints / task.name,
    )
    accuracy = {kind: accuracy_of(model, task, planted.queries[planted.of_kind(kind)]) for kind in (*KINDS, "plain")}
    return {"checkpoints": [path.name for path in paths], "accuracy": accuracy}


def _mean_trajectories(sdi: Any, planted: Planted) -> dict[str, list[float]]:
    """Mean over pairs of a planted example and its query, and over all other pairs of those queries: ``(steps,)``."""
    found = {}
    for kind in KINDS:
        columns = planted.of_kind(kind)
        found[kind] = sdi[:, columns][planted.critical[:, columns]].mean(0).tolist()
    columns = [q for kind in KINDS for q in planted.of_kind(kind)]
    found["others"] = np.asarray(sdi[:, columns][~planted.critical[:, columns]]).mean(0).tolist()
    return found
